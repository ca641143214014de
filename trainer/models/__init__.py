"""Encoders: a backbone and the head that makes embeddings of its features."""
