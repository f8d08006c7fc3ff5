"""Embeddings to latents, many requests at a time."""
