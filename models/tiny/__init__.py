"""The embedded tiny Stable Diffusion family: weights small enough to ship, and in `train` the script that made them."""
