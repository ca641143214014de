"""Checks whether a run's step compiles for a TPU and fits its memory, without a TPU."""
