"""Help pages as files: `--help` and `fit --help` then import no library and print at once.

`make help-pages` writes the files from the parsers. A test compares the files with the parsers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent / "assets" / "help"
PAGES = {("--help",): "program.txt", ("fit", "--help"): "fit.txt"}


def print_help_page(argv: Sequence[str]) -> bool:
    """Print the help page that a command line asks for.

    Args:
        argv: The program's name and the words after it.

    Returns:
        False if there is no page for these words, or if the output cannot be written. The parsers print the help then.
    """
    words = tuple("--help" if word == "-h" else word for word in argv[1:])
    if words not in PAGES:
        return False
    text = (FOLDER / PAGES[words]).read_text(encoding="utf-8")
    if Path(argv[0]).name == "onesided":
        text = text.replace("python main.py", "onesided")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, UnicodeError):
        return False
    return True
