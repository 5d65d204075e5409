"""The Triton kernels compiled ahead of time for GPUs that need not be here, and what came out.

Under TRITON_INTERPRET=1 @triton.jit makes interpreted functions, so the compiling is done by this
file run as a program, once, in a process without that variable. It records the arguments the
launchers pass, so that what is compiled is what would be launched.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stylegan_fast.activations import ACTIVATIONS
from stylegan_fast.backends.geometry import FilteredLrelu, Fir, Geometry, Tail

# The interface for compiling without a device differs in older versions.
pytest.importorskip("triton", minversion="3.4")

NCHW = Geometry(32, 64, 256 * 256, 256 * 256)
NHWC = Geometry(32 * 256 * 256, 64, 1, 256 * 256)
RGB = Geometry(32 * 256 * 256, 3, 1, 256 * 256)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LRELU, SWISH = ACTIVATIONS["lrelu"].code, ACTIVATIONS["swish"].code


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(g, dtype, per_sample):
    b = empty(g.channels, dtype=dtype)
    if not per_sample:
        return None, None, None, b
    samples = g.outer * g.inner // g.pixels
    return empty(samples, g.channels), empty(samples, g.pixels), empty(1), b


def forward(module, g, dtype, act=LRELU, with_mask=True, per_sample=False, clamp=256.0):
    x = empty(g.numel, dtype=dtype)
    mask = empty((g.numel + 7) // 8 * 2, dtype=torch.uint8) if with_mask else None
    others = operands(g, dtype, per_sample)
    module.epilogue_forward(
        x, empty(g.numel, dtype=dtype), mask, g, (*others, act, 0.2, 1.4, clamp)
    )


def masked(module, g, dtype, per_sample=False, slope=0.2):
    dy, dx = empty(g.numel, dtype=dtype), empty(g.numel, dtype=dtype)
    mask = empty((g.numel + 7) // 8 * 2, dtype=torch.uint8)
    scale = operands(g, dtype, per_sample)[0]
    module.epilogue_masked(dy, mask, dx, empty(g.channels), scale, g, slope, 1.4)


def backward(module, g, dtype, noise=True, slope=0.2, gradient=True, with_mask=True):
    dy, y, dx = (empty(g.numel, dtype=dtype) for _ in range(3))
    mask = empty((g.numel + 7) // 8 * 2, dtype=torch.uint8) if with_mask else None
    scale, pixels, *_ = operands(g, dtype, True)
    module.epilogue_backward(
        dy, y, mask, pixels if noise else None, scale, dx if gradient else None,
        empty(3, *scale.shape), g, slope, 1.4,
    )  # fmt: skip


def curved(module, g, dtype, order, act=SWISH, per_sample=False):
    x, dy, h, dx = (empty(g.numel, dtype=dtype) for _ in range(4))
    module.epilogue_curved(
        order, x, dy, h if order == 2 else None, dx, empty(g.channels),
        g, (*operands(g, dtype, per_sample), act, 0.0, 1.4, math.inf),
    )  # fmt: skip


def adain(module, g, dtype, backward=False, act=LRELU, per_sample=True):
    samples, channels = g.outer * g.inner // g.pixels, g.channels
    x, y = empty(g.numel, dtype=dtype), empty(g.numel, dtype=dtype)
    noise = empty(samples, g.pixels) if per_sample else empty(g.pixels)
    tail = Tail(None, noise, empty(channels), empty(channels), act, 0.2, 1.4, math.inf)
    statistics, styles = empty(2, samples, channels), empty(samples, 2 * channels)
    if backward:
        module.adain_backward(
            y, x, statistics, styles, x, styles, torch.zeros_like(statistics), g, tail
        )
    else:
        module.adain_forward(x, y, statistics, styles, g, tail, 1e-8)


def adain_statistics(*arguments):
    adain(*arguments)


def adain_forward(*arguments):
    adain(*arguments)


def adain_sums(*arguments):
    adain(*arguments, backward=True)


def adain_backward(*arguments):
    adain(*arguments, backward=True)


def demodulation(module, samples, channels_last=False, taps=9):
    weight = image((512, 512, taps, 1), channels_last, torch.float32)
    styles, d = empty(samples, 512), empty(samples, 512)
    module.demodulation(weight, styles, empty(512, 512), d, 1e-8)


def image(size, nhwc, dtype):
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta").contiguous(memory_format=layout)


def image_geometry(x):
    n, c, h, w = x.shape
    return Geometry(n, c, h * w, h * w) if x.is_contiguous() else Geometry(n * h * w, c, 1, h * w)


def fir_operands(size, taps, up, down, pad, nhwc, dtype):
    """x, f, fir and y."""
    x, f, fir = image(size, nhwc, dtype), empty(*taps), Fir(up, up, down, down, *pad, False, 1.0)
    out_height, out_width = fir.output_size(*size[2:], (taps[-1], taps[0]))
    return x, f, fir, image((*size[:2], out_height, out_width), nhwc, dtype)


def fir_forward(module, *operands, with_tail=False, with_add=False):
    x, f, fir, y = fir_operands(*operands)
    g = image_geometry(y)
    mask = tail = None
    if with_tail:
        mask = empty(g.numel // 4, dtype=torch.uint8)
        samples = y.shape[0]
        scale, noise = empty(samples, g.channels), empty(samples, g.pixels)
        b = empty(g.channels, dtype=y.dtype)
        tail = Tail(scale, noise, empty(1), b, LRELU, 0.2, 1.4, 256.0)
    module.upfirdn2d_forward(x, f, fir, y, y if with_add else None, mask, g, tail)


def fir_fused(module, *operands):
    fir_forward(module, *operands, with_tail=True)


def fir_added(module, *operands):
    fir_forward(module, *operands, with_add=True)


def fir_masked(module, *operands):
    dy, f, fir, dx = fir_operands(*operands)
    mask = empty(dy.numel() // 4, dtype=torch.uint8)
    total, scale = empty(dy.shape[1]), empty(*dy.shape[:2])
    module.upfirdn2d_masked(dy, mask, dx, total, scale, f, fir, image_geometry(dy), 0.2, 1.4)


IMAGE, CONVOLVED = (32, 64, 256, 256), (32, 64, 257, 257)
FIRS = {
    "same": (CONVOLVED, (4, 4), 1, 1, (1, 1, 1, 1)),
    "up2": (IMAGE, (4, 4), 2, 1, (2, 1, 2, 1)),
    "down2": (IMAGE, (4, 4), 1, 2, (1, 1, 1, 1)),
    "up2 of 12 taps": (IMAGE, (12,), 2, 1, (6, 5, 6, 5)),
    "down2 of 12 taps": (IMAGE, (12,), 1, 2, (5, 5, 5, 5)),
}


def fir_cases():
    half, single, brain = torch.float16, torch.float32, torch.bfloat16
    hot, others = {}, {}
    for layout in ("nchw", "nhwc"):
        nhwc = layout == "nhwc"
        for name in ("same", "up2", "down2"):
            hot[f"{name} {layout} float16"] = fir_forward, *FIRS[name], nhwc, half
        for name in FIRS:
            others[f"{name} {layout} float32"] = fir_forward, *FIRS[name], nhwc, single
        hot[f"same with tail {layout} bfloat16"] = fir_fused, *FIRS["same"], nhwc, brain
        adjoint = (IMAGE, (4, 4), 1, 1, (2, 2, 2, 2), nhwc)
        hot[f"same masked {layout} bfloat16"] = fir_masked, *adjoint, brain
        hot[f"same masked {layout} float32"] = fir_masked, *adjoint, single
        others[f"up2 of 12 taps with tail {layout}"] = (
            fir_fused, *FIRS["up2 of 12 taps"], nhwc, half,
        )  # fmt: skip
        others[f"up2 masked {layout}"] = fir_masked, *FIRS["up2"], nhwc, half
        others[f"up3 {layout}"] = fir_fused, IMAGE, (5, 6), 3, 2, (2, 2, 2, 2), nhwc, half
        others[f"blur of 61 taps {layout}"] = (
            fir_forward, IMAGE, (61,), 1, 1, (30, 30, 30, 30), nhwc, half,
        )  # fmt: skip
        rgb = (32, 3, 256, 256)
        others[f"up2 of 3 channels {layout}"] = fir_added, rgb, *FIRS["up2"][1:], nhwc, half
        large = (32, 64, 1024, 1024)
        others[f"up2 above 2^31 {layout}"] = fir_fused, large, *FIRS["up2"][1:], nhwc, half
        others[f"up2 masked above 2^31 {layout}"] = (
            fir_masked, large, *FIRS["up2"][1:], nhwc, half,
        )  # fmt: skip
    return hot, others


def filtered_lrelu(module, masked, channels, up, down, nhwc, dtype):
    """With 6 taps for each step of a factor; the largest layer of StyleGAN3, or such a gradient."""
    fu, fd, inner = empty(6 * up), empty(6 * down), (278 * up + 7 * up, 278 * up + 7 * up)
    x = image((8, channels, 278, 278), nhwc, dtype)
    y = image((8, channels, *((n - 6 * down) // down + 1 for n in inner)), nhwc, dtype)
    signs = empty(x.numel() * up * up // 4, dtype=torch.uint8)
    problem = FilteredLrelu(up, down, 6 * up, 7 * up, False, 5.6, 0.2, 256.0, *inner)
    if masked:
        module.filtered_lrelu_masked(x, signs, fu, fd, y, problem, nhwc)
    else:
        b = empty(channels, dtype=dtype)
        module.filtered_lrelu_forward(x, b, fu, fd, y, signs, problem, nhwc)


FILTERED_LRELUS = {  # the targets, and the arguments of the launch
    "filtered_lrelu nchw": (("gfx942",), False, 91, 2, 2, False, torch.float16),
    "filtered_lrelu nhwc": (("sm_90", "sm_100"), False, 128, 2, 2, True, torch.bfloat16),
    "filtered_lrelu masked nchw": (("sm_90", "sm_80"), True, 91, 2, 4, False, torch.bfloat16),
}


def conv_operands(size, out_channels, taps, up, down, pad, nhwc, dtype):
    """x, conv and y."""
    x, conv = image(size, nhwc, dtype), Fir(up, up, down, down, *pad, True, 1.0)
    return x, conv, image((size[0], out_channels, *conv.output_size(*size[2:], taps)), nhwc, dtype)


def conv_forward(module, config, *operands, scaled=True, with_mask=True, transposed=False):
    """The configuration of this number, with boxes where it is negative; with styles before and
    demodulation after, or with weights of each sample."""
    x, conv, y = conv_operands(*operands)
    (n, i), o, (kh, kw) = x.shape[:2], y.shape[1], operands[2]
    shape = (1 if scaled else n, *((i, kh, kw, o) if transposed else (o, kh, kw, i)))
    w = empty(*shape, dtype=x.dtype).permute(0, *((4, 1, 2, 3) if transposed else (1, 4, 2, 3)))
    g = image_geometry(y)
    tail = Tail(
        empty(n, o) if scaled else None, empty(n, g.pixels), empty(1), empty(o, dtype=x.dtype),
        LRELU, 0.2, 1.4, 256.0,
    )  # fmt: skip
    mask = empty(g.numel // 4, dtype=torch.uint8) if with_mask else None
    module._has_boxes = lambda device: config < 0
    module.tuning.choose = lambda key, configs, *rest: configs[~config if config < 0 else config]
    module._processors = lambda device: 132
    w, pre = (w[0], empty(n, i)) if scaled else (w, None)
    module.conv2d_forward(x, w, conv, y, pre, None, mask, g, tail)


def conv_sum(module, *operands):
    conv_forward(module, *operands)


def conv_weight_gradient(module, config, *operands):
    x, conv, dy = conv_operands(*operands)
    (n, i), o = x.shape[:2], dy.shape[1]
    module.tuning.choose = lambda key, configs, *rest: configs[config]
    module._processors = lambda device: 132
    dw = empty(o, i, *operands[2])
    module.conv2d_weight_gradient(x, dy, conv, dw, empty(n, i), empty(n, o))


def with_options(launch, **options):
    named = functools.partial(launch, **options)
    named.__name__ = launch.__name__
    return named


PER_SAMPLE = with_options(conv_forward, scaled=False)
TRANSPOSED = with_options(conv_forward, transposed=True, with_mask=False)
SAME = ((3, 3), 1, 1, (1, 1, 1, 1), True, torch.float16)
DOWN = ((3, 3), 1, 2, (1, 0, 1, 0), True, torch.float16)
COMPOSED = ((6, 6), 2, 1, (3, 2, 3, 2), True, torch.float16)
MULTIPLIES = {
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n(256|128|64|32)k(16|8)\.",
    "gfx942": r"v_mfma_f32_(16x16x16|32x32x8)_f16",
    "sm_80": r"mma\.sync\.aligned\.m16n8k16",
    "sm_100": r"tcgen05\.mma",
}
BLOCKS = {  # shape of x, channels of y
    "4x4": ((8, 512, 4, 4), 512),
    "64x64": ((32, 512, 64, 64), 512),
    "256x256": ((32, 128, 256, 256), 128),
    "512x512": ((32, 64, 512, 512), 64),
    "1024x1024": ((8, 32, 1024, 1024), 32),
}
# name: (targets, launch, its arguments but the module)
CONVS = {
    "conv 4x4": (("sm_90",), conv_forward, 0, *BLOCKS["4x4"], *SAME),
    "conv 4x4, the sum": (("sm_90", "gfx942"), conv_sum, 0, *BLOCKS["4x4"], *SAME),
    "conv 64x64": (("sm_80", "sm_90"), conv_forward, 0, *BLOCKS["64x64"], *SAME),
    "conv 64x64, on AMD": (("gfx942",), conv_forward, 1, *BLOCKS["64x64"], *SAME),
    "conv 512x512": (("sm_80",), PER_SAMPLE, 0, *BLOCKS["512x512"], *SAME),
    "conv 1024x1024": (("sm_80", "gfx942"), PER_SAMPLE, 0, *BLOCKS["1024x1024"], *SAME),
    "conv down2": (("sm_90",), conv_forward, 0, *BLOCKS["256x256"], *DOWN),
    "conv above 2^31": (("sm_90",), conv_forward, 0, (32, 64, 1024, 1024), 64, *SAME),
    "conv tf32": (("sm_90",), conv_forward, 0, *BLOCKS["256x256"], *SAME[:-1], torch.float32),
    "boxes 64x64": (("sm_90", "sm_100"), conv_forward, -1, *BLOCKS["64x64"], *SAME),
    "boxes 64x64, widest": (("sm_90",), TRANSPOSED, -4, *BLOCKS["64x64"], *SAME),
    "boxes 256x256": (("sm_90",), PER_SAMPLE, -1, *BLOCKS["256x256"], *SAME),
    "boxes 512x512": (("sm_90",), PER_SAMPLE, -1, *BLOCKS["512x512"], *SAME),
    "boxes 1024x1024": (("sm_90",), PER_SAMPLE, -1, *BLOCKS["1024x1024"], *SAME),
    "boxes up2": (("sm_90",), PER_SAMPLE, -1, *BLOCKS["512x512"], *COMPOSED),
    "conv weights 4x4": (("sm_90",), conv_weight_gradient, 0, *BLOCKS["4x4"], *SAME),
    "conv weights 64x64": (tuple(MULTIPLIES), conv_weight_gradient, 0, *BLOCKS["64x64"], *SAME),
    "conv weights above 2^31": (
        ("sm_90",),
        conv_weight_gradient,
        0,
        (32, 64, 1024, 1024),
        64,
        *SAME,
    ),
}


def cases():
    """name: (launch, its arguments but the module)"""
    half = torch.float16
    odd, runs = Geometry(2, 3, 25, 25), Geometry(1, 3, 32, 8)
    large, large_nhwc = Geometry(2, 2**10, 2**20, 2**20), Geometry(2**21, 2**10, 1, 2**20)
    hot, others = {}, {}
    for name, dtype in DTYPES.items():
        for layout, geometry in (("nchw", NCHW), ("nhwc", NHWC)):
            key = f"{layout} {name}"
            hot[f"forward {key}"] = forward, geometry, dtype, LRELU, False
            hot[f"forward with mask {key}"] = forward, geometry, dtype
            hot[f"forward with noise {key}"] = forward, geometry, dtype, LRELU, True, True
            hot[f"masked {key}"] = masked, geometry, dtype
            hot[f"backward {key}"] = backward, geometry, dtype
        others[f"curved 1 {name}"] = curved, NHWC, dtype, 1, SWISH, True
        others[f"curved 2 {name}"] = curved, NHWC, dtype, 2, SWISH, True
    others |= {
        "masked with scale": (masked, NHWC, half, True),
        "forward of 3 channels": (forward, RGB, half),
        "masked of 3 channels": (masked, RGB, half),
        "forward of odd planes": (forward, odd, half, LRELU, True, True),
        "masked of odd planes": (masked, odd, half, True),
        "forward of runs": (forward, runs, half, LRELU, True, True),
        "forward above 2^31": (forward, large, half, LRELU, True, True),
        "masked above 2^31": (masked, large_nhwc, half, True),
        "backward of styles nchw": (backward, NCHW, half, False, 1.0, True, False),
        "backward of styles nhwc": (backward, NHWC, half, False, 1.0, True, False),
        "backward of 3 channels": (backward, RGB, half),
        "backward of odd planes": (backward, odd, half),
        "backward of relu": (backward, NCHW, half, True, 0.0),
        "backward without a gradient": (backward, NCHW, half, True, 0.2, False),
        "backward above 2^31": (backward, large_nhwc, half),
    }
    for kernel in (adain_statistics, adain_forward, adain_sums, adain_backward):
        for layout, geometry in (("nchw", NCHW), ("nhwc", NHWC)):
            others[f"{kernel.__name__} {layout}"] = kernel, geometry, half
    others |= {
        "demodulation": (demodulation, 4),
        "demodulation nhwc": (demodulation, 32, True),
        "demodulation 1x1": (demodulation, 1, False, 1),
    }
    for name, row in ACTIVATIONS.items():
        others[f"forward {name}"] = forward, NCHW, half, row.code, False, False, math.inf
        if row.curved:
            others[f"curved 1 {name}"] = curved, NCHW, half, 1, row.code
            others[f"curved 2 {name}"] = curved, NCHW, half, 2, row.code
        else:
            slope = row.negative_slope(row.alpha)
            others[f"masked {name}"] = masked, NCHW, half, False, slope
    return hot, others


HOT, OTHERS = cases()
FIR_HOT, FIR_OTHERS = fir_cases()
CASES = HOT | OTHERS | FIR_HOT | FIR_OTHERS
CONV_CASES = {name: case for name, (_, *case) in CONVS.items()}
FILTERED_CASES = {name: (filtered_lrelu, *case) for name, (_, *case) in FILTERED_LRELUS.items()}
TARGETS = {
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "sm_80": ("cuda", 80, 32),
    "sm_100": ("cuda", 100, 32),
}
# Everything for one target of each maker, and for the others one kernel of each kind.
SOME = [name for name in CASES if name.endswith(" bfloat16")]
COMPILED = [
    (target, name)
    for target in TARGETS
    for name in (CASES if target in ("sm_90", "gfx942") else SOME)
] + [
    (target, name)
    for name, (targets, *_) in (CONVS | FILTERED_LRELUS).items()
    for target in targets
]


class _Recorder:
    """Stands for a kernel and keeps the arguments it is launched with."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.arguments = None
        self.options = None

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **options):
        self.arguments = arguments
        self.options = options


def recorded(name):
    """The kernel, the arguments and the options of one case."""
    from stylegan_fast.kernels import adain, conv2d, demodulation, epilogue, upfirdn2d
    from stylegan_fast.kernels import filtered_lrelu as lrelu

    launch, *arguments = (CASES | CONV_CASES | FILTERED_CASES)[name]
    if launch.__name__.startswith("fir_"):
        module, attribute = upfirdn2d, "upfirdn2d_kernel"
    elif launch.__name__.startswith("conv_"):
        module, attribute = conv2d, launch.__name__.replace("conv_", "conv2d_") + "_kernel"
    elif launch.__name__.startswith("adain_"):
        module, attribute = adain, f"{launch.__name__}_kernel"
    elif launch.__name__ == "filtered_lrelu":
        module, attribute = lrelu, "filtered_lrelu_kernel"
    elif launch.__name__ == "demodulation":
        module, attribute = demodulation, "demodulation_kernel"
    else:
        module, attribute = epilogue, f"epilogue_{launch.__name__}_kernel"
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    recorders = {name: _Recorder(kernel) for name, kernel in kernels.items()}
    vars(module).update(recorders)
    launch(module, *arguments)
    vars(module).update(kernels)
    return kernels[attribute], recorders[attribute].arguments, recorders[attribute].options


# Of a launch one of these is 1, and the others are not known to be multiples of anything.
STRIDES = ("stride_w", "stride_c", "x_w", "x_c", "w_o", "w_i", "d_i")


def source(kernel, arguments):
    """What Triton would specialise this launch to: aligned pointers, sizes left open."""
    from triton.compiler import ASTSource

    names = {
        torch.float32: "*fp32",
        torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
        torch.int16: "*i16",
    }
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = names[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            dtype = names[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{dtype}{value.block_shape}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            assert parameter.do_not_specialize or parameter.name in STRIDES
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
    return ASTSource(kernel, signature, constants, attributes)


def resources(compiled, folder):
    """Registers and spilled bytes of a compiled kernel, by the assembler's own account."""
    import triton

    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        # Scalars spill into a vector register, which costs no memory access.
        spilled = re.findall(r"\.(?:private_segment_fixed_size|vgpr_spill_count): *(\d+)", text)
        return int(re.search(r"\.vgpr_count: *(\d+)", text)[1]), sum(map(int, spilled))
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    text = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", path],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def main(folder):
    import triton
    from triton.backends.compiler import GPUTarget

    report = []
    for target, name in COMPILED:
        kernel, arguments, options = recorded(name)
        gpu = GPUTarget(*TARGETS[target])
        # The launcher's choice for a GPU of the other maker.
        if "num_stages" in options and gpu.backend == "hip":
            options["num_stages"] = 2
        elif "num_warps" in options and "num_stages" not in options:
            options["num_warps"] = 128 // gpu.warp_size
        compiled = triton.compile(source(kernel, arguments), target=gpu, options=options)
        registers, spilled = resources(compiled, folder)
        text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
        pattern = (
            r"\b(?:ld|st|max|min|wgmma|mma|tcgen05|cp\.async)\.[\w.:]+"
            r"|\b(?:global_(?:load|store)|buffer_(?:load|store)|v_mfma)_\w+"
        )
        report.append((target, name, registers, spilled, re.findall(pattern, text)))
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """{(target, case): (registers, spilled bytes, accesses to memory, minima and maxima)}"""
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    ran = subprocess.run(
        [sys.executable, __file__, folder], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    rows = json.loads((folder / "report.json").read_text())
    return {(target, name): tuple(rest) for target, name, *rest in rows}


def test_every_kernel_compiles_for_every_target(report):
    assert set(report) == set(COMPILED)
    assert {target for target, _ in report} == set(TARGETS)


def test_nothing_spills(report):
    assert {key: spilled for key, (_, spilled, _) in report.items() if spilled} == {}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_hot_kernels_leave_room_for_threads(report, target):
    """At 80 registers six blocks of 128 threads fit on a multiprocessor, which are enough to keep
    memory busy with 2 to 4 wide loads of each. Three do with 8 to 12 loads: at 168 registers, of
    which the sums of the moments over a column of pixels take 48."""
    registers = {name: row[0] for (t, name), row in report.items() if t == target and name in HOT}
    moments = {name: registers.pop(name) for name in list(registers) if "backward" in name}
    assert registers and max(registers.values()) <= 80, registers
    assert moments and max(moments.values()) <= 168, moments


def test_adain_moves_packs(report):
    kernels = {name: row[2] for (target, name), row in report.items() if target == "sm_90"}
    kernels = {name: accesses for name, accesses in kernels.items() if name.startswith("adain_")}
    assert len(kernels) == 8
    for name, accesses in kernels.items():
        assert "ld.global.v4.b32" in accesses, name
        writes = name.startswith(("adain_forward", "adain_backward"))
        assert not writes or "st.global.v4.b32" in accesses, name


def global_accesses(report, target, name):
    """(loads, stores) of 16 bytes, and of less."""
    wide, narrow = [0, 0], [0, 0]
    for kind in report[target, name][2]:
        if "global" in kind:
            size = wide if re.search(r"v4\.b32|v2\.b64|dwordx4", kind) else narrow
            size["st" in kind] += 1
    return tuple(wide), tuple(narrow)


def test_demodulation_reads_packs(report):
    """The styles, and of NHWC the weight; the 9 taps of a channel start anywhere."""
    assert global_accesses(report, "sm_90", "demodulation nhwc")[0][0] == 8
    assert global_accesses(report, "sm_90", "demodulation")[0][0] == 1


@pytest.mark.parametrize("dtype, each", [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_accesses_are_wide(report, dtype, each):
    """16 elements of a thread are 4 accesses of 16 bytes in float32 and 2 in 16 bits. The bias is
    one number a plane, but a row of numbers in NHWC; a thread has 2 words of the mask."""
    accesses = {
        name: global_accesses(report, "sm_90", f"{name} {dtype}")
        for name in (
            "forward nchw",
            "forward nhwc",
            "forward with mask nchw",
            "forward with mask nhwc",
            "masked nchw",
            "masked nhwc",
        )
    }
    assert accesses == {
        "forward nchw": ((each, each), (1, 0)),
        "forward nhwc": ((2 * each, each), (0, 0)),
        "forward with mask nchw": ((each, each), (1, 2)),
        "forward with mask nhwc": ((2 * each, each), (0, 2)),
        "masked nchw": ((each, each), (2, 1)),
        "masked nhwc": ((each, each), (2, 1)),
    }
    for layout in ("nchw", "nhwc"):  # dy and y, and the noise of a plane or the scale of a pixel
        wide, _ = global_accesses(report, "sm_90", f"backward {layout} {dtype}")
        assert wide == (2 * each + 4, each)
    # With 64 threads a warp each has half of that.
    for name, (wide, _) in accesses.items():
        if "nchw" in name:
            loads, stores = wide
            amd, _ = global_accesses(report, "gfx942", f"{name} {dtype}")
            assert amd == (loads // 2, stores // 2), name


def test_clamp_propagates_nan(report):
    """What the interpreter cannot show: there any minimum does."""
    kinds = set(report["sm_90", "forward with mask nchw float32"][2])
    assert {"max.NaN.f32", "min.NaN.f32"} <= kinds
    assert not {"max.f32", "min.f32"} & kinds


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_hot_filters_leave_room_for_threads(report, target):
    """At 168 registers three blocks of 128 threads fit on a multiprocessor; Triton 3.9 takes 176
    for one kernel on sm_100. A thread holds 64 partial sums, or 32 of NCHW and of float32, and has
    3 to 6 wide loads under way."""
    registers = {n: row[0] for (t, n), row in report.items() if t == target and n in FIR_HOT}
    assert registers
    assert max(registers.values()) <= 176, registers
    assert sorted(registers.values())[-2] <= 168, registers


def test_accesses_of_filters_are_wide(report):
    """NHWC: one wide load a sample, one wide store a pixel: two pixels of one to four rows at a
    time, and the taps one by one. NCHW: one wide store a row; the samples, which are not aligned,
    one by one."""

    def wide(name):
        return global_accesses(report, "sm_90", f"{name} float16")[0]

    assert {name: wide(f"{name} nhwc") for name in ("same", "up2", "down2")} == {
        "same": (5, 2),
        "up2": (3, 4),
        "down2": (12, 2),
    }
    assert {name: wide(f"{name} nchw") for name in ("same", "up2", "down2")} == {
        "same": (0, 1),
        "up2": (0, 2),
        "down2": (0, 1),
    }
    for name, (loads, stores) in (("same", (5, 2)), ("up2", (3, 4)), ("down2", (12, 2))):
        assert global_accesses(report, "gfx942", f"{name} nhwc float16")[0] == (loads, stores)


def test_filtered_lrelu_is_of_the_tensor_cores(report):
    """NHWC of whole units is read and written 8 channels at a time. At 168 registers three blocks
    of 128 threads fit on a multiprocessor, at 255 one of 256."""
    for name, (targets, *_) in FILTERED_LRELUS.items():
        for target in targets:
            registers, _, kinds = report[target, name]
            assert any(re.match(r"wgmma|mma\.sync|tcgen05\.mma|v_mfma", kind) for kind in kinds)
            if target == "sm_90":
                assert registers <= (255 if "nhwc" in name else 168)
    wide, _ = global_accesses(report, "sm_90", "filtered_lrelu nhwc")
    assert wide == (4, 4)


CONV_TARGETS = [(target, name) for name, (targets, *_) in CONVS.items() for target in targets]


@pytest.mark.parametrize("target, name", [c for c in CONV_TARGETS if "sum" not in c[1]])
def test_convolutions_are_of_the_tensor_cores(report, target, name):
    assert any(re.match(MULTIPLIES[target], kind) for kind in report[target, name][2])


@pytest.mark.parametrize("target, name", CONV_TARGETS)
def test_convolutions_access_vectors(report, target, name):
    """x and w come as boxes, or 16 bytes at a time and on NVIDIA's past the registers, at least
    two steps ahead of the products; y goes 16 bytes at a time. Where dy is scaled as it comes, it
    comes through registers. Beside boxes, some versions of Triton take the styles 16 bytes at a
    time past the registers."""
    kinds = report[target, name][2]
    boxes = sum(kind.startswith("cp.async.bulk.tensor") for kind in kinds)
    ahead = sum(kind.startswith("cp.async.cg") for kind in kinds)
    (loads, stores), _ = global_accesses(report, target, name)
    if name.startswith("boxes"):
        assert boxes >= 6
    elif "sum" in name or target == "gfx942":
        assert loads > 0
    else:
        assert ahead >= 3 and not boxes
    if "weights" not in name and "sum" not in name:
        assert stores >= 2


def test_narrow_convolutions_leave_room(report):
    """The fewer the channels, the more a layer waits for memory: blocks of 128 threads that the
    65536 registers of a multiprocessor hold."""
    blocks = {
        name: 65536 // (128 * math.ceil(report["sm_90", f"boxes {name}"][0] / 8) * 8)
        for name in ("512x512", "1024x1024", "up2")
    }
    assert blocks["512x512"] >= 3 and blocks["1024x1024"] >= 5 and blocks["up2"] >= 3, blocks


if __name__ == "__main__":
    main(Path(sys.argv[1]))
