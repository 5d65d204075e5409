"""`mmcv.ops.filtered_lrelu`."""

from stylegan_fast.swap.torch_utils_ops import filtered_lrelu as nvlabs

__all__ = ["filtered_lrelu"]


def filtered_lrelu(
    input,
    filter_up=None,
    filter_down=None,
    bias=None,
    up=1,
    down=1,
    padding=0,
    gain=2**0.5,
    slope=0.2,
    clamp=None,
    flip_filter=False,
    use_custom_op=True,
):
    impl = "cuda" if use_custom_op else "ref"
    shape = (up, down, padding)
    return nvlabs.filtered_lrelu(
        input, filter_up, filter_down, bias, *shape, gain, slope, clamp, flip_filter, impl
    )
