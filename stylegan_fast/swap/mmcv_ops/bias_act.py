"""`mmcv.ops.bias_act`."""

from stylegan_fast.swap.torch_utils_ops import bias_act as nvlabs

__all__ = ["bias_act"]

activation_funcs = nvlabs.activation_funcs


def bias_act(
    input,
    bias=None,
    dim=1,
    act="linear",
    alpha=None,
    gain=None,
    clamp=None,
    use_custom_op=True,
):
    impl = "cuda" if use_custom_op else "ref"
    return nvlabs.bias_act(input, bias, dim, act, alpha, gain, clamp, impl)
