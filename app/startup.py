"""Start of a process that prints a page of help: imports that the page does not need are skipped."""

from __future__ import annotations

import re

from lightning_utilities.core.imports import RequirementCache

PAGES = {"-h", "--help", "--version"}
# Optional packages of torchmetrics, which imports them with any metric. Their imports take more than half of the start.
OPTIONAL = ("matplotlib", "nltk", "scipy", "torchvision", "transformers")


def skip_optional_packages() -> None:
    """Report the optional packages of torchmetrics as missing for the rest of this process.

    This module must be imported before Lightning, and the process must compute nothing.
    """
    is_available = RequirementCache.__bool__

    def is_needed(requirement: RequirementCache) -> bool:
        name = re.match(r"[\w-]*", requirement.requirement or requirement.module or "")
        return not (name and name[0] in OPTIONAL) and is_available(requirement)

    RequirementCache.__bool__ = is_needed  # type: ignore[assignment, method-assign]
