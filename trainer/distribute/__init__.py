"""Replicas: strategies and the collectives between them."""
