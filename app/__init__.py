"""Around a run: the command line, callbacks, and commands that read finished runs."""

import os

# Set before torch is imported. Otherwise, when one rank fails, the other ranks print C++ stack traces.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
