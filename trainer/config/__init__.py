"""The configuration of a run: gin files, checked, resolved and saved."""
