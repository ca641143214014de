"""Imports the modules that register parts with gin, so that configs can name them."""
