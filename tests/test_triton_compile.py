"""The Triton kernels compiled ahead of time for GPUs that need not be here, and what came out.

Under TRITON_INTERPRET=1 @triton.jit makes interpreted functions, so the compiling is done by this
file run as a program, once, in a process without that variable. It records the arguments the
launchers pass, so that what is compiled is what would be launched.
"""

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
from stylegan_fast.backends.geometry import Geometry

# The interface for compiling without a device differs in older versions.
pytest.importorskip("triton", minversion="3.4")

NCHW = Geometry(4, 64, 128 * 128, 128 * 128)
NHWC = Geometry(4 * 128 * 128, 64, 1, 128 * 128)
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
    module.epilogue_forward(x, empty(g.numel, dtype=dtype), mask, *others, g, act, 0.2, 1.4, clamp)


def masked(module, g, dtype, per_sample=False):
    dy, dx = empty(g.numel, dtype=dtype), empty(g.numel, dtype=dtype)
    mask = empty((g.numel + 7) // 8 * 2, dtype=torch.uint8)
    scale = operands(g, dtype, per_sample)[0]
    module.epilogue_masked(dy, mask, dx, empty(g.channels), scale, g, 0.2, 1.4)


def curved(module, g, dtype, order, act=SWISH, per_sample=False):
    x, dy, h, dx = (empty(g.numel, dtype=dtype) for _ in range(4))
    module.epilogue_curved(
        order, x, dy, h if order == 2 else None, dx, empty(g.channels),
        *operands(g, dtype, per_sample), g, act, 0.0, 1.4, math.inf,
    )  # fmt: skip


# The kernels of a training step: every dtype, both layouts.
HOT = {}
for _dtype, _torch_dtype in DTYPES.items():
    for _layout, _geometry in (("nchw", NCHW), ("nhwc", NHWC)):
        _key = f"{_layout} {_dtype}"
        HOT[f"forward {_key}"] = (forward, _geometry, _torch_dtype, LRELU, False)
        HOT[f"forward with mask {_key}"] = (forward, _geometry, _torch_dtype)
        HOT[f"forward with noise {_key}"] = (forward, _geometry, _torch_dtype, LRELU, True, True)
        HOT[f"masked {_key}"] = (masked, _geometry, _torch_dtype)

_HALF = torch.float16
OTHERS = {
    "masked with scale nhwc": (masked, NHWC, _HALF, True),
    "forward of a 3-channel nhwc image": (forward, Geometry(4 * 128 * 128, 3, 1, 128 * 128), _HALF),
    "masked of a 3-channel nhwc image": (masked, Geometry(4 * 128 * 128, 3, 1, 128 * 128), _HALF),
    "forward of odd planes": (forward, Geometry(2, 3, 25, 25), _HALF, LRELU, True, True),
    "masked of odd planes": (masked, Geometry(2, 3, 25, 25), _HALF, True),
    "forward of runs": (forward, Geometry(1, 3, 32, 8), _HALF, LRELU, True, True),
    "forward above 2^31": (forward, Geometry(2, 2**10, 2**20, 2**20), _HALF, LRELU, True, True),
    "masked above 2^31": (masked, Geometry(2 * 2**20, 2**10, 1, 2**20), _HALF, True),
    "curved 1 bfloat16": (curved, NHWC, torch.bfloat16, 1, SWISH, True),
    "curved 2 bfloat16": (curved, NHWC, torch.bfloat16, 2, SWISH, True),
}
for _row in ACTIVATIONS.values():
    _arguments = (NCHW, torch.float32, _row.code, False, False, math.inf)
    OTHERS[f"forward {_row.name}"] = (forward, *_arguments)
    if _row.curved:
        OTHERS[f"curved 1 {_row.name}"] = (curved, NCHW, _HALF, 1, _row.code)
        OTHERS[f"curved 2 {_row.name}"] = (curved, NCHW, _HALF, 2, _row.code)

CASES = {**HOT, **OTHERS}
TARGETS = {
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "sm_80": ("cuda", 80, 32),
    "sm_100": ("cuda", 100, 32),
}
# Every kernel on one target of each maker; on the others one of each kind.
SOME = [name for name in HOT if "float16" in name.split() and "forward with mask" not in name] + [
    "curved 1 bfloat16",
    "curved 2 bfloat16",
]
COMPILED = [
    (target, name) for target in TARGETS for name in (CASES if target in ("sm_90", "gfx942") else SOME)
]


class _Recorder:
    """Stands for a kernel and keeps the arguments it is launched with."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.arguments = None

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments):
        self.arguments = arguments


def recorded(module, name):
    """The kernel and the arguments of one case."""
    launch, *arguments = CASES[name]
    attribute = f"epilogue_{launch.__name__}_kernel"
    kernel = getattr(module, attribute)
    recorder = _Recorder(kernel)
    setattr(module, attribute, recorder)
    launch(module, *arguments)
    setattr(module, attribute, kernel)
    return kernel, recorder.arguments


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
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            assert parameter.do_not_specialize
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
    return ASTSource(kernel, signature, constants, attributes)


def resources(compiled, folder):
    """Registers and spilled bytes of a compiled kernel, by the assembler's own account."""
    import triton

    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        spilled = re.findall(r"\.(?:private_segment_fixed_size|[sv]gpr_spill_count): *(\d+)", text)
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

    from stylegan_fast.kernels import epilogue

    report = []
    for target, name in COMPILED:
        compiled = triton.compile(
            source(*recorded(epilogue, name)), target=GPUTarget(*TARGETS[target])
        )
        registers, spilled = resources(compiled, folder)
        text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
        pattern = r"\b(?:ld|st)\.(?:global|shared|local)[\w.:]*|\bglobal_(?:load|store)_\w+"
        report.append((target, name, registers, spilled, re.findall(pattern, text)))
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """{(target, case): (registers, spilled bytes, memory instructions)}"""
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
def test_hot_kernels_leave_room_for_a_full_multiprocessor(report, target):
    """2048 threads, of which the 65536 registers give each 32; half of them keep memory busy."""
    registers = {name: row[0] for (t, name), row in report.items() if t == target and name in HOT}
    assert registers and max(registers.values()) <= 64, registers


def accesses(report, target, name):
    memory = report[target, name][2]
    return {kind: memory.count(kind) for kind in memory}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype, wide", [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_nvidia_accesses_are_of_16_bytes(report, layout, dtype, wide):
    """16 elements of a thread are 4 accesses in float32 and 2 in 16 bits, for each tensor."""
    plain = accesses(report, "sm_90", f"forward {layout} {dtype}")
    bias = {"nchw": {f"ld.global.b{4 * 8 // (4 // wide * 2) if wide == 2 else 32}": 1}, "nhwc": {}}
    loads = wide * (2 if layout == "nhwc" else 1)
    assert plain == {"ld.global.v4.b32": loads, "st.global.v4.b32": wide, **bias[layout]}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
