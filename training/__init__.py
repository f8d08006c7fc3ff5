"""Makes the small models that ship with Darkroom: a book, to be read in this order.

scenes      the world they draw, and the words for it         judge       reads a picture back, by rules
tokenizer   the words as tokens                               styles      in which style a thing is painted
descent     the loop that every training shares               features    a network's view, for distances of sets
text        what a caption says                               evaluate    a model's figures
vae         pictures to latents and back                      previews    latents to colours, without a network
latents     scenes as latents, kept on disk
denoiser    latents from captions
saving      what is left in the store, in diffusers' formats
shapes      the pipeline `shapes`, assembled and trained       distil      `shapes-turbo`, two steps
lora        other styles                                      dit         `shapes-dit`, a transformer
controlnet  edges say where                                   scorer      when a light picture will do
"""
