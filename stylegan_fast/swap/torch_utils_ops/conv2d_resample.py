"""`torch_utils.ops.conv2d_resample`."""

from stylegan_fast import ops
from stylegan_fast.swap import modulation

__all__ = ["conv2d_resample"]


def conv2d_resample(
    x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False
):
    modulation.called()
    return ops.conv2d_resample(x, w, f, up, down, padding, groups, flip_weight, flip_filter)
