"""`torch_utils.ops.upfirdn2d`."""

from stylegan_fast import ops
from stylegan_fast.ops.upfirdn2d import _get_filter_size as _get_filter_size
from stylegan_fast.ops.upfirdn2d import _parse_padding as _parse_padding
from stylegan_fast.ops.upfirdn2d import _parse_scaling as _parse_scaling
from stylegan_fast.swap.impl import backend_of

__all__ = ["downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upsample2d"]

setup_filter = ops.setup_filter


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="cuda"):
    backend = backend_of(impl)
    return ops.upfirdn2d(x, f, up, down, padding, flip_filter, gain, backend=backend)


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl="cuda"):
    return ops.filter2d(x, f, padding, flip_filter, gain, backend=backend_of(impl))


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    return ops.upsample2d(x, f, up, padding, flip_filter, gain, backend=backend_of(impl))


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    return ops.downsample2d(x, f, down, padding, flip_filter, gain, backend=backend_of(impl))
