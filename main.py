"""Fine-tune with asymmetric low-rank adapters: `python main.py --help`, or `onesided --help` once installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the command `onesided` imports this file from site-packages

from app.cli import main

if __name__ == "__main__":
    sys.exit(main())
