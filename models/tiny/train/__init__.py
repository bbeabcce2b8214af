"""How the tiny family is made, from nothing but this folder: `python -m glassine.models.tiny.train --out DIR`.

drawings, captions   what is drawn and what is said of it: pictures from distance fields, prompts, the vocabulary
networks, files      the networks at their narrow sizes, and the file layouts and names they are shipped in
fit                  one training loop for every stage: bf16 weights, fp32 masters, cosine, average, CUDA graph
base, extras         the stages and their losses: vae, unet (with the text encoder); control, lcm, alpha, transparent
judge, measure       the classifier that reads pictures, and the figures of the model card
"""
