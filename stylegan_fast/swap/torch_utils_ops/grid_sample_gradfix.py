"""`torch_utils.ops.grid_sample_gradfix`."""

import torch.nn.functional as F

from stylegan_fast.training.augment import GridSample

__all__ = ["grid_sample"]

enabled = False  # to be set; the result is the same either way


def grid_sample(input, grid):
    """Of any order with respect to input, in every version of PyTorch, where grid is constant."""
    if grid.requires_grad:
        return F.grid_sample(input, grid, "bilinear", "zeros", align_corners=False)
    return GridSample.apply(input, grid)
