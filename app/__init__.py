"""Around a run: the command line, callbacks, and commands that read finished runs."""
