"""`torch_utils.ops.conv2d_gradfix`, and the `conv2d_gradfix` of the other family.

PyTorch's convolutions have had their higher derivatives for long, and autograd computes no weight
gradient that is not asked for, so both flags are there to be set and change nothing.
"""

import contextlib

import torch.nn.functional as F

from stylegan_fast.swap import modulation

__all__ = ["conv2d", "conv_transpose2d", "no_weight_gradients"]

enabled = False
weight_gradients_disabled = False


@contextlib.contextmanager
def no_weight_gradients(disable=True):
    global weight_gradients_disabled
    previous = weight_gradients_disabled
    weight_gradients_disabled = previous or disable
    try:
        yield
    finally:
        weight_gradients_disabled = previous


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    modulation.called()
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):
    return F.conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )
