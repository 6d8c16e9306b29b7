"""The backbones of tests/modules/adapters, for files of their adapters."""

from tests.modules.adapters.conftest import backbone, randomize

__all__ = ["backbone", "randomize"]
