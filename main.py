"""Fine-tune with asymmetric low-rank adapters: `python main.py --help`, or `onesided --help` once installed."""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the command `onesided` imports this file from site-packages

from app.help_pages import print_help_page

if print_help_page(sys.argv):
    sys.exit()

gc.disable()  # Imports create a million lasting objects. Garbage collection would take a tenth of the start-up time.
from app.cli import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    sys.exit(main())
