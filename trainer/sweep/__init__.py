"""Hyperparameter sweeps: many runs from one sweep file, and their results."""
