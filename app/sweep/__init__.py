"""Sweeps: a study of variants, its trials as processes, and its report."""
