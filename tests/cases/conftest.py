"""Fixtures of tests/app. tests/cases has tests for each numbered input that once failed: `test_case_NN_…`."""

from tests.app.conftest import *  # noqa: F403
