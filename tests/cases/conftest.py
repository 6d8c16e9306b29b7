"""The command lines of tests/app, for one test a row of the inputs that failed."""

from tests.app.conftest import *  # noqa: F403
