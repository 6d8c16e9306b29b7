"""Start of a process that prints a page of help: imports that the page does not need are skipped."""

from __future__ import annotations

import re

from lightning_utilities.core import imports

PAGES = {"-h", "--help", "--version"}
# Optional packages of torchmetrics, which imports them with any metric. Their imports take more than half of the start.
OPTIONAL = ("matplotlib", "nltk", "scipy", "torchvision", "transformers")


def skip_optional_packages() -> None:
    """Report the optional packages of torchmetrics as missing for the rest of this process.

    Call this function before Lightning is imported, and only in a process that computes nothing.
    """
    is_met, is_package = imports.RequirementCache.__bool__, imports.package_available

    def is_needed(requirement: imports.RequirementCache) -> bool:
        name = re.match(r"[\w-]*", requirement.requirement or requirement.module or "")
        return not (name and name[0] in OPTIONAL) and is_met(requirement)

    def is_needed_package(name: str) -> bool:
        return name not in OPTIONAL and is_package(name)

    imports.RequirementCache.__bool__ = is_needed  # type: ignore[assignment, method-assign]
    imports.package_available = is_needed_package  # type: ignore[assignment]
