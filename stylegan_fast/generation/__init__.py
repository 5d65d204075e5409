"""What trained generators are for: images from seeds, mixed styles, ways through the latent spaces,
directions of change, and the projection of real images.

The functions take a generator of `models.stylegan` or `models.stylegan2`; `load` makes what they
take of any checkpoint.
"""

from .networks import load

__all__ = ["load"]
