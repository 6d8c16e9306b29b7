"""Export of a finished run, one format a file."""
