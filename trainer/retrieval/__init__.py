"""Retrieval with a trained encoder: embedding, search and evaluation."""
