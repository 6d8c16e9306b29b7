"""File formats of adapters: PEFT, compact files, and the rounding error of merged weights."""
