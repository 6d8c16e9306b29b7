"""Around a run: the command line, callbacks, and commands that read finished runs."""

import os

# before anything imports torch: or one process that fails has the others print where in C++ they noticed
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
