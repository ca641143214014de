"""Sources of raw data: arrays, files and tables."""
