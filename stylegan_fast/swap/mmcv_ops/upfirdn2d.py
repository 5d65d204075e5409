"""`mmcv.ops.upfirdn2d`."""

from stylegan_fast import ops
from stylegan_fast.ops.upfirdn2d import _get_filter_size as _get_filter_size
from stylegan_fast.ops.upfirdn2d import _parse_padding as _parse_padding
from stylegan_fast.ops.upfirdn2d import _parse_scaling as _parse_scaling

__all__ = ["downsample2d", "filter2d", "upfirdn2d", "upsample2d"]


def _backend(use_custom_op):
    return None if use_custom_op else "reference"


def upfirdn2d(
    input, filter, up=1, down=1, padding=0, flip_filter=False, gain=1, use_custom_op=True
):
    backend = _backend(use_custom_op)
    return ops.upfirdn2d(input, filter, up, down, padding, flip_filter, gain, backend=backend)


def filter2d(input, filter, padding=0, flip_filter=False, gain=1, use_custom_op=True):
    backend = _backend(use_custom_op)
    return ops.filter2d(input, filter, padding, flip_filter, gain, backend=backend)


def upsample2d(input, filter, up=2, padding=0, flip_filter=False, gain=1, use_custom_op=True):
    backend = _backend(use_custom_op)
    return ops.upsample2d(input, filter, up, padding, flip_filter, gain, backend=backend)


def downsample2d(input, filter, down=2, padding=0, flip_filter=False, gain=1, use_custom_op=True):
    backend = _backend(use_custom_op)
    return ops.downsample2d(input, filter, down, padding, flip_filter, gain, backend=backend)
