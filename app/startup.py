"""What Lightning brings along that no run uses, left out."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from typing import Any

from lightning_utilities.core import imports

# what torchmetrics imports, where it is installed, for metrics and plots that nothing here has
UNUSED = ("matplotlib", "scipy", "torchvision", "transformers")


def import_torchmetrics() -> None:
    """Import torchmetrics as if the packages of `UNUSED` were not installed.

    Lightning imports torchmetrics, and torchmetrics all its metrics with their packages, which takes a good part of
    the time of `import lightning.pytorch` (docs/benchmarks.md) and has transformers in memory in a run on images.
    Whoever needs these packages imports them as ever; but torchmetrics' own plots, and its metrics that need one of
    them, say in this process that it is missing.
    """
    looks = ("find_spec", "_version")  # how the requirements that torchmetrics checks are looked up
    own: dict[str, Any] = {name: getattr(imports, name) for name in looks if hasattr(imports, name)}
    if "torchmetrics" in sys.modules or len(own) < len(looks):  # another release: all is imported
        return

    def find_spec(name: str) -> Any:
        return None if name in UNUSED else own["find_spec"](name)

    def version(name: str) -> Any:
        if name in UNUSED:
            raise PackageNotFoundError(name)
        return own["_version"](name)

    vars(imports).update(find_spec=find_spec, _version=version)
    try:
        import torchmetrics  # noqa: F401
    finally:
        vars(imports).update(own)
        imports.package_available.cache_clear()
        imports.module_available.cache_clear()
