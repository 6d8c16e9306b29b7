"""The program around models and data: command line, callbacks, run directories, exports, reports and sweeps."""

import os

# Set before torch is imported. Otherwise, when one rank fails, the other ranks print C++ stack traces.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
