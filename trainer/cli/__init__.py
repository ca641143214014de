"""Modes of the command line, one module per mode."""
