"""Darkroom serves diffusion models as separate gRPC services: text encoding, denoising and VAE work."""

__version__ = "0.1.0"
