"""Makes the small models that ship with Darkroom: data, tokenizer, VAE, denoiser, and the judge of their pictures."""
