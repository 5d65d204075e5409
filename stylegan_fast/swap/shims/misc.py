"""`torch_utils.misc`, as far as networks use it."""

import contextlib
import functools
import warnings

import torch

__all__ = [
    "assert_shape",
    "constant",
    "copy_params_and_buffers",
    "named_params_and_buffers",
    "nan_to_num",
    "params_and_buffers",
    "profiled_function",
    "suppress_tracer_warnings",
]

nan_to_num = torch.nan_to_num


def assert_shape(tensor, ref_shape):
    """AssertionError unless the tensor has this shape, where None is any size."""
    if tensor.ndim != len(ref_shape):
        raise AssertionError(f"{tensor.ndim} dimensions, expected {len(ref_shape)}")
    for dim, (size, expected) in enumerate(zip(tensor.shape, ref_shape)):
        if expected is not None and int(size) != int(expected):
            raise AssertionError(f"size {int(size)} of dimension {dim}, expected {int(expected)}")


@functools.lru_cache(maxsize=256)
def _constant(value, dtype, device):
    return torch.tensor(value, dtype=dtype, device=device)


def constant(value, shape=None, dtype=None, device=None, memory_format=None):
    """A tensor of this value, made once."""
    value = value.tolist() if hasattr(value, "tolist") else value
    value = _hashable(value)
    tensor = _constant(value, dtype or torch.get_default_dtype(), torch.device(device or "cpu"))
    if shape is not None:
        tensor = tensor.expand(shape)
    return tensor.contiguous(memory_format=memory_format or torch.contiguous_format)


def _hashable(value):
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def suppress_tracer_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        yield


def profiled_function(function):
    """The function, as a region of its name in a profile."""

    @functools.wraps(function)
    def profiled(*args, **kwargs):
        with torch.autograd.profiler.record_function(function.__name__):
            return function(*args, **kwargs)

    return profiled


def params_and_buffers(module):
    return [tensor for _, tensor in named_params_and_buffers(module)]


def named_params_and_buffers(module):
    return [*module.named_parameters(), *module.named_buffers()]


def copy_params_and_buffers(src_module, dst_module, require_all=False):
    """Copies by name into the tensors of dst_module. KeyError for one that src_module lacks, with
    require_all."""
    source = dict(named_params_and_buffers(src_module))
    for name, tensor in named_params_and_buffers(dst_module):
        if name in source:
            tensor.detach().copy_(source[name].detach()).requires_grad_(tensor.requires_grad)
        elif require_all:
            raise KeyError(f"{name} is missing")
