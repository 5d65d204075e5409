"""`op.conv2d_gradfix`."""

from stylegan_fast.swap.torch_utils_ops.conv2d_gradfix import (
    conv2d,
    conv_transpose2d,
    no_weight_gradients,
)

__all__ = ["conv2d", "conv_transpose2d", "no_weight_gradients"]

enabled = True
weight_gradients_disabled = False
