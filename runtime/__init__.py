"""Drawing with converted models. NumPy only; the files read in the order of the data.

prompt / image / change map -> conditioning -> latents -> loop(denoiser, sampler, blend) -> decode -> image
"""
