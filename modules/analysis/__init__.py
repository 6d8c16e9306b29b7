"""Analyses of trained adapters, in pure torch and float64: `spectra`, `similarity` and `theory`."""
