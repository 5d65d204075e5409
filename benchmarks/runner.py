"""Gate every provider, time the green ones together, make rows of it."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch

from .. import swap
from . import gate
from .adain import Adain
from .bias_act import BiasAct
from .cases import Case
from .end_to_end import TrainingStep
from .filtered_lrelu import FilteredLrelu
from .layers import ConvolutionLayer
from .machine import MEMORY_METHODS, launches, matrix_product, matrix_rate, peak_memory
from .networks import NetworkForward
from .peers import one_line
from .photographs import Photographs
from .results import FAIL, OK, SKIPPED, Row
from .swap import Swapped
from .timing import Call, graphed, interleaved, stopwatch
from .upfirdn2d import Upfirdn2d
from .workload import Provider, Session, Workload

WORKLOADS: dict[str, Callable[[Case, Session], Workload]] = {
    "bias_act": BiasAct,
    "upfirdn2d": Upfirdn2d,
    "filtered_lrelu": FilteredLrelu,
    "adain": Adain,
    "photographs": Photographs,
    "layers": ConvolutionLayer,
    "networks": NetworkForward,
    "training": TrainingStep,
    "swap": Swapped,
}

COPY, MATRIX_PRODUCT = "copy_", "matrix product"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def measure(
    case: Case,
    session: Session,
    seconds: float,
    conditions: dict[str, Any],
    least: int = 5,
    cuda_graph: bool = False,
) -> list[Row]:
    """The rows of a case, one a provider, from `least` or more rounds in about `seconds`."""
    blank = Row(
        timestamp=now(),
        op=case.op,
        variant=case.variant,
        layer=case.layer,
        shape=case.shape_name,
        dtype=case.dtype,
        layout=case.layout,
        level=case.level,
        mode=case.mode,
        **conditions,
    )
    status = SKIPPED
    try:
        return _measure(case, session, seconds, blank, least, cuda_graph)
    except ImportError as error:
        reason = f"{error}; pip install 'stylegan_fast[bench]'"
    except torch.cuda.OutOfMemoryError:
        reason = "the device has too little memory for this case"
    except Exception as error:
        status, reason = FAIL, one_line(error)
    finally:
        swap.uninstall()
    return [replace(blank, provider="all", status=status, detail=reason)]


def _measure(
    case: Case, session: Session, seconds: float, blank: Row, least: int, cuda_graph: bool
) -> list[Row]:
    work = WORKLOADS[case.op](case, session)
    blank = replace(blank, bytes=work.bytes, flops=work.flops, images=work.images)

    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    expected = work.expected()
    for provider in work.providers():
        row = rows[provider.name] = replace(blank, provider=provider.name, detail=provider.detail)
        call = _gated(row, provider, expected)
        if call is not None and case.level != "kernel":
            row.peak_bytes = peak_memory(call, session.device)
            row.memory_method = MEMORY_METHODS[session.device.type]
        if call is not None and case.level == "network":
            row.launches = launches(call, session.device)
        if call is not None and (cuda_graph or case.mode == "CUDA graph"):
            call = _graphed(row, call, session.device)
        if call is not None:
            calls[provider.name] = call
    del expected
    gc.collect()

    copy = work.copy()
    if copy is not None:
        calls[COPY] = copy
        if case.level == "kernel":
            rows[COPY] = replace(blank, provider=COPY, bytes=work.copied_bytes(), flops=0)
    else:
        calls[MATRIX_PRODUCT], matrix_flops = matrix_product(session.device, work.arithmetic)
    timings = interleaved(calls, stopwatch(session.device), seconds, least)

    if copy is not None:
        copy_rate = work.copied_bytes() / timings[COPY].median_us * 1e6
        matrix = matrix_rate(session.device, work.arithmetic)
    else:
        copy_rate = math.nan
        matrix = matrix_flops / timings[MATRIX_PRODUCT].median_us * 1e6
    for name, row in rows.items():
        row.copy_gbyte_s, row.matrix_gflop_s = copy_rate / 1e9, matrix / 1e9
        moving = row.bytes / copy_rate if row.bytes else 0.0
        if row.bytes or row.flops:
            row.roofline_us = max(moving, row.flops / matrix) * 1e6
        if name in timings:
            row.median_us, row.p20_us, row.p80_us, row.n = timings[name]
            row.of_roofline = row.roofline_us / row.median_us
            if work.baseline in timings:
                row.baseline = work.baseline
                row.speedup = timings[work.baseline].median_us / row.median_us
    return list(rows.values())


def _gated(row: Row, provider: Provider, expected: list[gate.Expected]) -> Call | None:
    """The provider's call, if it may be timed."""
    if provider.call is None:
        row.status = SKIPPED
        return None
    try:
        row.gate_error, wrong = gate.check(provider.call(), expected)
    except torch.cuda.OutOfMemoryError as error:
        row.status, row.detail = SKIPPED, one_line(error)
        return None
    except Exception as error:
        row.status = FAIL if provider.ours else SKIPPED
        row.detail = one_line(error)
        return None
    if wrong:
        row.status, row.detail = FAIL, wrong
        return None
    row.status = OK
    return provider.call


def _graphed(row: Row, call: Call, device: torch.device) -> Call | None:
    try:
        return graphed(call, device)
    except RuntimeError as error:
        row.status, row.detail = SKIPPED, f"no CUDA graph: {one_line(error)}"
        return None
