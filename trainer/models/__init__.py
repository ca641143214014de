"""Encoders: a backbone and a head that computes embeddings from its features."""
