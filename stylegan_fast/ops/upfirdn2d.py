"""FIR resampling of images: setup_filter, upfirdn2d and its three common uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .._checks import check_device, check_number, check_tensor
from ..backends import inside_transform, select
from ..backends.geometry import Fir
from ..reference.bias_act import Epilogue
from ..reference.upfirdn2d import centring, output_size
from ..reference.upfirdn2d import filter_size as _get_filter_size
from ..reference.upfirdn2d import parse_padding as _parse_padding
from ..reference.upfirdn2d import parse_scaling as _parse_scaling
from ..reference.upfirdn2d import upfirdn2d as reference_upfirdn2d
from . import fir as fir_ops
from .epilogue import apply_epilogue


def check_image(name: str, x: torch.Tensor) -> None:
    """x is a floating-point [N, C, H, W] of which only N may be 0."""
    check_tensor(name, x, 4)
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{name} must have channels and pixels, got {name}.shape={tuple(x.shape)}; "
            "only the batch may be empty"
        )


def check_filter(name: str, f: torch.Tensor | None, x: torch.Tensor) -> None:
    """f is None or a FIR filter for x."""
    if f is None:
        return
    if not isinstance(f, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {f!r}; use setup_filter")
    check_tensor(name, f, 1, 2)
    if f.numel() == 0:
        raise ValueError(f"{name} must have a tap, got {name}.shape={tuple(f.shape)}")
    check_device(name, f, x)
    if f.requires_grad:
        raise NotImplementedError(
            f"{name}.requires_grad is True, but the gradient of a FIR filter is not supported; "
            f"pass {name}.detach()"
        )
    _check_finite(name, f)


_known_finite = WeakIdKeyDictionary()


def _check_finite(name: str, f: torch.Tensor) -> None:
    """f holds no NaN and no infinity, as float32. Looked up once for each version of a tensor,
    because on a GPU that waits for it; not at all where there are no values to look at."""
    known_type = type(f) in (torch.Tensor, torch.nn.Parameter)
    if not known_type or f.is_meta or torch.compiler.is_compiling():
        return
    version = None if f.is_inference() else f._version
    if version is not None and _known_finite.get(f) == version:
        return
    if inside_transform() or (f.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if not f.float().isfinite().all():
        raise ValueError(f"{name} must be finite in float32, got {name}={f.tolist()}")
    _known_finite[f] = version


def check_output_size(output: tuple[int, int], **arguments: object) -> None:
    """The output, (H, W), has a pixel."""
    if min(output) < 1:
        shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise ValueError(
            f"the output would have {output[0]} x {output[1]} pixels with {shown}; the padded "
            "image must not be smaller than the filter: increase padding"
        )


def setup_filter(
    f: Sequence | torch.Tensor | float | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """f * gain / sum(f) as a float32 tensor, ready for upfirdn2d.

    Args:
        f: 2-D filter `[fh, fw]`, 1-D filter `[taps]`, a number, or None (the identity); a nested
            list, an array or a tensor, which is never modified or aliased.
        device: where the result goes.
        normalize: divide by the sum.
        flip_filter: reverse every axis.
        gain: factor of the image's magnitude. A 1-D filter, which is applied twice, gets its
            square root.
        separable: keep a 1-D filter 1-D; False makes it 2-D by the outer product with itself. None
            keeps it if it has at least 8 taps.

    Returns:
        `[fh, fw]` or `[taps]`.

    Raises:
        TypeError: f holds something else than real numbers.
        ValueError: f is empty, of rank above 2, not finite, sums to zero (with normalize), is 2-D
            with separable=True, or the gain of a 1-D result is negative.

    The originals' `setup_filter`, value for value.
    """
    check_number("gain", gain)
    values = 1 if f is None else f
    if not isinstance(values, torch.Tensor) and hasattr(values, "tolist"):
        values = values.tolist()
    try:
        taps = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"f must hold real numbers, got {f!r}: {error}") from error
    if taps.is_complex():
        raise TypeError(f"f must hold real numbers, got {f!r}")
    taps = taps.detach().to(torch.float32)
    if taps.numel() == 0 or taps.ndim > 2:
        raise ValueError(f"f must be [taps] or [fh, fw], got the shape {tuple(taps.shape)}")
    if not taps.isfinite().all():
        raise ValueError(f"f must be finite, got {f!r}")
    if taps.ndim == 2 and separable:
        raise ValueError(f"f of shape {tuple(taps.shape)} is 2-D; separable=True needs a 1-D f")

    taps = taps.reshape(-1) if taps.ndim == 0 else taps
    keep = taps.numel() >= 8 if separable is None else separable
    if taps.ndim == 1 and not keep:
        taps = taps.outer(taps)
    if taps.ndim == 1 and gain < 0:
        raise ValueError(
            f"gain={gain!r} of a separable filter must not be negative: each of its two passes "
            "takes the square root; give the gain to upfirdn2d"
        )
    if normalize:
        total = taps.sum()
        if total.abs() <= 1e-6 * taps.abs().sum():
            raise ValueError(f"f sums to zero and cannot be normalized, got {f!r}; normalize=False")
        taps = taps / total
    if flip_filter:
        taps = taps.flip(tuple(range(taps.ndim)))
    return (taps * gain ** (taps.ndim / 2)).to(device)


def upfirdn2d(
    x: torch.Tensor,  # [N, C, H, W]
    f: torch.Tensor | None,  # [fh, fw] or [taps]
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y[oy, ox] = gain * sum over ky, kx of g[ky, kx] * z[oy * dy + ky - y0, ox * dx + kx - x0]

    with z[j * uy, i * ux] = x[j, i] and 0 elsewhere, and g = f if flip_filter else f rotated by 180
    degrees: zero-stuff by `up`, pad or crop, filter every channel, keep every `down`-th pixel.

    Args:
        x: `[N, C, H, W]`, float64, float32, float16 or bfloat16; N may be 0.
        f: filter `[fh, fw]`, or `[taps]` to be applied along x and along y, or None, the identity;
            of any floating dtype. Taps compute in float32, in float64 for float64 x.
        up, down: factor, or `[x, y]`.
        padding: of the zero-stuffed image: number, `[x, y]` or `[x0, x1, y0, y1]` = left, right,
            top, bottom; negative crops.
        flip_filter: False convolves, True correlates.
        gain: factor of the output, applied once.
        backend: None chooses; else 'reference', 'cpu', 'triton' or 'cuda'.

    Returns:
        `[N, C, (H * uy + y0 + y1 - fh) // dy + 1, (W * ux + x0 + x1 - fw) // dx + 1]`, dtype and
        memory format (NCHW or channels_last) of x. 16-bit types are rounded once, at the end.

    Gradients: any order with respect to x; none with respect to f. `torch.func` (vmap over x, grad,
    jvp) and forward mode work on every backend.

    Kernels keep neither the zero-stuffed image nor what a separable filter leaves between its two
    axes. On CUDA, float32 on the reference obeys `torch.backends.cudnn.allow_tf32` as PyTorch's
    convolutions do; kernels ignore it.

    Autocast: computes and returns in x's dtype.

    Raises:
        TypeError: x or f is not a floating-point tensor; up, down or padding holds something else
            than ints; gain is not a number.
        ValueError: wrong rank, length, factor or device, f is not finite, or an output without
            pixels.
        NotImplementedError: f requires a gradient.
        RuntimeError: the explicitly chosen backend cannot run this.

    The originals' `upfirdn2d`.
    """
    return _run(x, f, check_upfirdn2d(x, f, up, down, padding, flip_filter, gain), backend)


def upfirdn2d_epilogue(
    x: torch.Tensor,  # [N, C, H, W]
    f: torch.Tensor | None,  # [fh, fw] or [taps]
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    end: Epilogue,
    add: torch.Tensor | None = None,  # [N, C, H', W']
    backend: str | None = None,
) -> torch.Tensor:
    """E(upfirdn2d(x)) + add in one pass: what follows a transposed convolution.

    The callers have validated `end`. Differentiable as `bias_act`.
    """
    fir = check_upfirdn2d(x, f, up, down, padding, flip_filter, gain)
    if add is not None:
        _check_added(add, x, f, fir)
    return apply_epilogue(x, end, backend=backend, f=f, fir=fir, add=add)


def check_upfirdn2d(x, f, up, down, padding, flip_filter, gain, centred=False, name="f") -> Fir:
    """The validated arguments; `centred` adds the padding that keeps the image centred and the gain
    that makes up for the stuffed zeros, `name` is what the caller calls f."""
    check_image("x", x)
    check_filter(name, f, x)
    gain = check_number("gain", gain)
    up = _parse_scaling(up, "up")
    down = _parse_scaling(down, "down")
    padding = _parse_padding(padding)
    taps = fw, fh = _get_filter_size(f)
    if centred:
        centres = centring(fw, up[0], down[0]) + centring(fh, up[1], down[1])
        padding = tuple(pad + centre for pad, centre in zip(padding, centres))
        gain = gain * up[0] * up[1]
    height, width = x.shape[2:]
    output = output_size((height, width), taps, up, down, padding)
    check_output_size(
        output, image=(height, width), filter=taps[::-1], up=up, down=down, padding=padding
    )
    return Fir.of(up, down, padding, bool(flip_filter), gain)


def _run(x: torch.Tensor, f: torch.Tensor | None, fir: Fir, backend: str | None) -> torch.Tensor:
    name = select("upfirdn2d", x, backend)
    if name == "reference":
        return reference_upfirdn2d(x, f, *fir.arguments())
    return fir_ops.linear(x, f, fir, name)


def _check_added(add: torch.Tensor, x: torch.Tensor, f: torch.Tensor | None, fir: Fir) -> None:
    check_tensor("add", add, 4)
    check_device("add", add, x)
    n, channels, height, width = x.shape
    shape = (n, channels, *fir.output_size(height, width, _get_filter_size(f)))
    if add.shape != shape:
        raise ValueError(
            f"add must have the shape {shape} of the output, got add.shape={tuple(add.shape)}"
        )


def filter2d(
    x: torch.Tensor,  # [N, C, H, W]
    f: torch.Tensor | None,  # [fh, fw] or [taps]
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = gain * (f convolved with x), `[N, C, H, W]`; `padding` is added to what keeps the size.

    Everything else as `upfirdn2d`.
    """
    return _run(x, f, check_upfirdn2d(x, f, 1, 1, padding, flip_filter, gain, True), backend)


def upsample2d(
    x: torch.Tensor,  # [N, C, H, W]
    f: torch.Tensor | None,  # [fh, fw] or [taps]
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = gain * ux * uy * (f convolved with x zero-stuffed by `up`), `[N, C, H * uy, W * ux]`.

    The factor keeps the magnitude of the image. `padding`, in pixels of the output, is added to
    what gives that size. Everything else as `upfirdn2d`.
    """
    return _run(x, f, check_upfirdn2d(x, f, up, 1, padding, flip_filter, gain, True), backend)


def upsample2d_add(
    x: torch.Tensor,  # [N, C, H, W]
    f: torch.Tensor | None,  # [fh, fw] or [taps]
    add: torch.Tensor,  # [N, C, H * up, W * up]
    up: int = 2,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = upsample2d(x, f, up) + add in one pass: how images grow from block to block."""
    fir = check_upfirdn2d(x, f, up, 1, 0, False, 1, True)
    _check_added(add, x, f, fir)
    return apply_epilogue(x, Epilogue(), backend=backend, f=f, fir=fir, add=add)


def downsample2d(
    x: torch.Tensor,  # [N, C, H, W]
    f: torch.Tensor | None,  # [fh, fw] or [taps]
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """y = gain * every down-th pixel of (f convolved with x), `[N, C, H // dy, W // dx]`.

    `padding`, in pixels of the input, is added to what gives that size. Everything else as
    `upfirdn2d`.
    """
    return _run(x, f, check_upfirdn2d(x, f, 1, down, padding, flip_filter, gain, True), backend)
