"""What leaves the package: an encoder that answers without it."""
