"""Latents to image files."""
