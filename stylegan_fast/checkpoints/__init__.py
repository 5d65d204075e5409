"""Networks in files: the library's own, and those of other StyleGAN code bases.

Nothing in a file is executed: no class is imported and no function called by a name the file gives.
"""

from .contents import CheckpointError, atomic_write
from .files import load_generator, load_networks
from .native import read_metadata, save_networks

__all__ = [
    "CheckpointError",
    "atomic_write",
    "load_generator",
    "load_networks",
    "read_metadata",
    "save_networks",
]
