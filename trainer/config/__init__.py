"""Configuration of a run: gin files, their checks, resolution and saving."""
