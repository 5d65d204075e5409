"""CUDA C++ kernels (csrc/cuda)."""

from __future__ import annotations

import functools

import torch

from . import native
from .choice import ConvClass
from .geometry import FilteredLrelu, Fir, Geometry, Tail
from .native import adain, address, epilogue, filtered_lrelu, tail_epilogue, upfirdn2d


@functools.cache
def unavailable() -> str | None:
    module, reason = native.load()
    if module is None:
        return reason
    if not module.with_cuda:
        said = native.build_record().get("cuda", {}).get("reason", "").partition("\n")[0]
        return "the package was built without CUDA kernels" + (f" ({said})" if said else "")
    if torch.version.hip is not None:
        return "this PyTorch is for ROCm; the triton backend runs there"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return _architecture_mismatch(torch.cuda.get_device_capability())


def _architecture_mismatch(capability: tuple[int, int]) -> str | None:
    """Machine code sm_XY runs on X.Z with Z >= Y, PTX compute_XY on everything from X.Y on; what
    is compiled for an XYa runs on X.Y alone, for an XYf within X."""
    architectures = native.build_record().get("cuda", {}).get("architectures", [])
    device = capability[0] * 10 + capability[1]
    for entry in architectures:
        kind, number = entry.split("_")
        built = int(number.rstrip("af"))
        same_family = built // 10 == device // 10 and built <= device
        if number.endswith("a"):
            runs = built == device
        elif number.endswith("f") or kind == "sm":
            runs = same_family
        else:
            runs = built <= device
        if runs:
            return None
    if not architectures:
        return None
    return (
        f"the CUDA kernels were built for {', '.join(architectures)}, the device is sm_{device}; "
        "rebuild with TORCH_CUDA_ARCH_LIST"
    )


def device_types() -> tuple[str, ...]:
    return ("cuda",)


def dtypes() -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.float16, torch.bfloat16)


def _stream(x: torch.Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _workspace(problem: object, total: torch.Tensor | None) -> torch.Tensor | None:
    if total is None:
        return None
    size = native.module().cuda_epilogue_workspace(problem)
    return torch.empty(size, dtype=total.dtype, device=total.device)


def epilogue_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    geometry: Geometry,
    tail: Tail,
) -> None:
    problem = tail_epilogue(x, geometry, tail)
    with torch.cuda.device(x.device):
        native.module().cuda_epilogue_forward(
            problem, x.data_ptr(), y.data_ptr(), address(mask), _stream(x)
        )


def epilogue_masked(
    dy: torch.Tensor,
    mask: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    scale: torch.Tensor | None,
    geometry: Geometry,
    negative_slope: float,
    gain: float,
) -> None:
    problem = epilogue(dy, geometry, gain=gain, scale=scale)
    with torch.cuda.device(dy.device):
        workspace = _workspace(problem, total)  # its size depends on the current device
        native.module().cuda_epilogue_masked(
            problem,
            negative_slope,
            dy.data_ptr(),
            address(mask),
            dx.data_ptr(),
            address(total),
            address(workspace),
            _stream(dy),
        )


def epilogue_curved(
    order: int,
    x: torch.Tensor,
    dy: torch.Tensor,
    h: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    geometry: Geometry,
    tail: Tail,
) -> None:
    problem = tail_epilogue(x, geometry, tail)
    with torch.cuda.device(x.device):
        workspace = _workspace(problem, total)  # its size depends on the current device
        native.module().cuda_epilogue_curved(
            problem,
            order,
            x.data_ptr(),
            dy.data_ptr(),
            address(h),
            dx.data_ptr(),
            address(total),
            address(workspace),
            _stream(x),
        )


def epilogue_backward(
    dy: torch.Tensor,
    y: torch.Tensor | None,
    mask: torch.Tensor | None,
    noise: torch.Tensor | None,
    scale: torch.Tensor | None,
    dx: torch.Tensor | None,
    moments: torch.Tensor | None,
    geometry: Geometry,
    negative_slope: float,
    gain: float,
) -> None:
    problem = epilogue(dy, geometry, gain=gain, scale=scale, noise=noise)
    with torch.cuda.device(dy.device):
        workspace = None
        if moments is not None:
            size = native.module().cuda_epilogue_moments_workspace(problem)
            workspace = moments.new_empty(size)
        native.module().cuda_epilogue_backward(
            problem,
            negative_slope,
            dy.data_ptr(),
            address(y),
            address(mask),
            address(dx),
            address(moments),
            address(workspace),
            _stream(dy),
        )


def upfirdn2d_forward(
    x: torch.Tensor,
    f: torch.Tensor | None,
    fir: Fir,
    y: torch.Tensor,
    add: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    geometry: Geometry | None = None,
    tail: Tail | None = None,
) -> None:
    with torch.cuda.device(x.device):
        native.module().cuda_upfirdn2d_forward(
            upfirdn2d(x, f, y, fir),
            tail_epilogue(y, geometry, tail),
            x.data_ptr(),
            address(add),
            y.data_ptr(),
            address(mask),
            _stream(x),
        )


def upfirdn2d_masked(
    dy: torch.Tensor,
    mask: torch.Tensor | None,
    dx: torch.Tensor,
    total: torch.Tensor | None,
    scale: torch.Tensor | None,
    f: torch.Tensor | None,
    fir: Fir,
    geometry: Geometry,
    negative_slope: float,
    gain: float,
) -> None:
    problem, head = upfirdn2d(dy, f, dx, fir), epilogue(dy, geometry, gain=gain, scale=scale)
    with torch.cuda.device(dy.device):
        workspace = None
        if total is not None:
            size = native.module().cuda_upfirdn2d_workspace(problem, head)
            workspace = torch.empty(size, dtype=total.dtype, device=total.device)
        native.module().cuda_upfirdn2d_masked(
            problem,
            head,
            negative_slope,
            dy.data_ptr(),
            address(mask),
            dx.data_ptr(),
            address(total),
            address(workspace),
            _stream(dy),
        )


def adain_forward(
    x: torch.Tensor,
    y: torch.Tensor,
    statistics: torch.Tensor,
    styles: torch.Tensor,
    geometry: Geometry,
    tail: Tail,
    eps: float,
) -> None:
    problem = adain(x, styles, geometry, tail)
    with torch.cuda.device(x.device):
        parts = native.module().cuda_adain_parts(problem)  # depends on the current device
        workspace = statistics.new_empty((*statistics.shape[1:], parts, 4))
        native.module().cuda_adain_forward(
            problem,
            eps,
            x.data_ptr(),
            y.data_ptr(),
            statistics.data_ptr(),
            workspace.data_ptr(),
            _stream(x),
        )


def adain_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    styles: torch.Tensor,
    dx: torch.Tensor,
    d_styles: torch.Tensor,
    sums: torch.Tensor,
    geometry: Geometry,
    tail: Tail,
) -> None:
    problem = adain(x, styles, geometry, tail)
    with torch.cuda.device(x.device):
        parts = native.module().cuda_adain_parts(problem)  # depends on the current device
        workspace = statistics.new_empty((*statistics.shape[1:], parts, 4))
        partial = statistics.new_empty(sums.numel() * parts)
        used = native.module().cuda_adain_backward(
            problem,
            x.data_ptr(),
            dy.data_ptr(),
            statistics.data_ptr(),
            dx.data_ptr(),
            d_styles.data_ptr(),
            partial.data_ptr(),
            workspace.data_ptr(),
            _stream(x),
        )
        partial = partial[: sums.numel() * used].view(*sums.shape, used)
        torch.sum(partial, -1, out=sums)


def demodulation(
    weight: torch.Tensor, styles: torch.Tensor, energy: torch.Tensor, d: torch.Tensor, eps: float
) -> None:
    problem = native.demodulation(weight, styles, eps)
    with torch.cuda.device(weight.device):
        native.module().cuda_demodulation(
            problem,
            weight.data_ptr(),
            styles.data_ptr(),
            energy.data_ptr(),
            d.data_ptr(),
            _stream(weight),
        )


def conv2d_refusal(call: ConvClass) -> str:
    return "it has no convolution of its own yet"


def filtered_lrelu_forward(
    x: torch.Tensor,
    b: torch.Tensor | None,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    y: torch.Tensor,
    signs: torch.Tensor | None,
    problem: FilteredLrelu,
    channels_last: bool,
) -> None:
    call = filtered_lrelu(x, fu, fd, y, problem, channels_last, b)
    with torch.cuda.device(x.device):
        native.module().cuda_filtered_lrelu_forward(
            call, x.data_ptr(), y.data_ptr(), address(signs), _stream(x)
        )


def filtered_lrelu_masked(
    dy: torch.Tensor,
    signs: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    dx: torch.Tensor,
    problem: FilteredLrelu,
    channels_last: bool,
) -> None:
    call = filtered_lrelu(dy, fu, fd, dx, problem, channels_last)
    with torch.cuda.device(dy.device):
        native.module().cuda_filtered_lrelu_masked(
            call, dy.data_ptr(), signs.data_ptr(), dx.data_ptr(), _stream(dy)
        )


def filtered_lrelu_refusal(
    dtype: torch.dtype, fu: torch.Tensor | None, fd: torch.Tensor | None, up: int, down: int
) -> str | None:
    """None, or why no kernel takes these filters; their parts run then."""
    taps = max([1, *[size for f in (fu, fd) if f is not None for size in f.shape]])
    if taps > 32:
        return f"its kernels take filters of up to 32 taps along an axis, not {taps}"
    if max(up, down) > 4:
        return f"its kernels take factors up to 4, not {up=} and {down=}"
    return None
