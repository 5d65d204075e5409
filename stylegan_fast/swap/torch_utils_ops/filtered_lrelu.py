"""`torch_utils.ops.filtered_lrelu`."""

from stylegan_fast import ops
from stylegan_fast.swap.impl import backend_of

__all__ = ["filtered_lrelu"]


def filtered_lrelu(
    x,
    fu=None,
    fd=None,
    b=None,
    up=1,
    down=1,
    padding=0,
    gain=2**0.5,
    slope=0.2,
    clamp=None,
    flip_filter=False,
    impl="cuda",
):
    backend = backend_of(impl)
    shape = (up, down, padding)
    return ops.filtered_lrelu(
        x, fu, fd, b, *shape, gain, slope, clamp, flip_filter, backend=backend
    )
