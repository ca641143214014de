"""Export of encoders that run without this package."""
