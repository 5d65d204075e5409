"""`mmcv.ops.conv2d_gradfix`."""

from stylegan_fast.swap.torch_utils_ops.conv2d_gradfix import conv2d, conv_transpose2d

__all__ = ["conv2d", "conv_transpose2d"]

enabled = True
weight_gradients_disabled = False
