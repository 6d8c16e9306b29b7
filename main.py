"""Fine-tune with asymmetric low-rank adapters: `python main.py --help`, or `onesided --help` once installed."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the command `onesided` imports this file from site-packages

gc.disable()  # imports create a million objects that stay: to look for garbage among them takes a tenth of the start
from app.startup import PAGES, skip_optional_packages  # noqa: E402

if not PAGES.isdisjoint(sys.argv):
    skip_optional_packages()
from app.cli import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    sys.exit(main())
