"""Retrieval with a trained encoder: embed, search, measure."""
