"""A file of results -> one self-contained HTML page with plots, made from nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .end_to_end import LAZY
from .photographs import CAPTIONS
from .results import FAIL, OK, Row, read
from .runner import COPY
from .terminal import cells, mode_text, size_text, time_text

NO_PLOTS = "no plots: matplotlib is missing; pip install 'stylegan_fast[bench]', then --report CSV"

STOCK = {
    "bias_act": "add, leaky_relu, mul, clamp",
    "upfirdn2d": "zero-stuff, pad, depthwise conv2d; mul, add, add, leaky_relu, mul, clamp",
    "filtered_lrelu": "add, zero-stuff, pad, depthwise conv2d, leaky_relu, mul, clamp, conv2d",
    "adain": "mul, add, add, leaky_relu, mul, instance_norm, mul, add",
    "photographs": "zero-stuff, pad, depthwise conv2d",
    "layers": "grouped convolution with a weight for each sample, then the passes of the others",
}
"""What the formulation consists of that speedups are against."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .15em .7em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
td.reason { white-space: normal }
tr.FAIL td { color: #b00020; font-weight: bold }
tr.skipped td { color: #777 }
figure { margin: 1.5em 0 } img { max-width: 100% } figcaption { color: #555 }
"""


def write(path: Path) -> tuple[Path, str]:
    """The page beside the CSV file, and a remark if it lacks the plots.

    Of what was measured several times under the same conditions, the latest row counts.
    """
    rows = list({row.key: row for row in read(path)}.values())
    machines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        machines.setdefault((row.device, row.processor, row.threads), []).append(row)
    try:
        import matplotlib  # noqa: F401

        remark = ""
    except ImportError:
        remark = NO_PLOTS
    failed = sum(row.status == FAIL for row in rows)
    verdict = f"{failed} of {len(rows)} rows FAIL their gate" if failed else "every gate is green"
    sections = [_section(machine, path.parent, not remark) for machine in machines.values()]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>stylegan_fast benchmarks</title>"
        f"<style>{STYLE}</style><h1>stylegan_fast benchmarks</h1><p>{len(rows)} rows; {verdict}. "
        f"{html.escape(remark)}</p>{''.join(sections)}</html>\n"
    )
    written = path.with_suffix(".html")
    written.write_text(page, encoding="utf-8")
    return written, remark


def _section(rows: list[Row], folder: Path, plots: bool) -> str:
    parts = [f"<h2>{html.escape(rows[0].processor or rows[0].device)}</h2>", _conditions(rows)]
    if plots:
        for op in dict.fromkeys(row.op for row in rows if row.level in ("kernel", "user")):
            own = [row for row in rows if row.op == op]
            parts += [_figure(draw, own) for draw in (_copy_bars, _speedups)]
        parts += [_figure(draw, rows) for draw in (_roofline, _networks, _training)]
    parts.append(_images(rows, folder))
    parts.append(_table(rows))
    return "".join(parts)


def _conditions(rows: list[Row]) -> str:
    """What the rows have in common, and what they have not."""
    lines = []
    for name in ("threads", "cores", "clock", "system", "preload", "python", "torch", "cuda",
                 "triton", "stylegan_fast", "simd", "commit", "dirty", "load", "run"):  # fmt: skip
        values = dict.fromkeys(getattr(row, name) for row in rows)
        text = ", ".join(value for value in values if value)
        if text:
            lines.append(f"<tr><th>{name}</th><td class=reason>{html.escape(text)}</td></tr>")
    methods = {row.memory_method for row in rows if row.memory_method}
    lines += [f"<tr><th>memory</th><td class=reason>{html.escape(m)}</td></tr>" for m in methods]
    return f"<table>{''.join(lines)}</table>"


def _table(rows: list[Row]) -> str:
    headings = ("op", "layer", "shape", "dtype", "layout", "mode", "provider", "median",
                "p20 – p80", "n", "speedup", "of roofline", "memory",
                "launches", "gate")  # fmt: skip
    body = []
    for row in rows:
        op, *case = cells(row)[:6]
        texts = [op, row.layer, *case]
        if row.status == OK:
            median, speedup, *rest = cells(row)[6:]
            spread = f"{time_text(row.p20_us)} – {time_text(row.p80_us)}"
            gate = "" if math.isnan(row.gate_error) else f"{row.gate_error:.2g} of tolerance"
            texts += [median, spread, str(row.n), speedup, *rest, gate]
            line = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        else:
            line = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
            line += f"<td colspan=8 class=reason>{html.escape(f'{row.status}: {row.detail}')}</td>"
        body.append(f"<tr class={row.status}>{line}</tr>")
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    return f"<h3>All rows</h3><table><tr>{head}</tr>{''.join(body)}</table>"


def _images(rows: list[Row], folder: Path) -> str:
    names = dict.fromkeys(name for row in rows for name in row.images.split())
    figures = []
    for name in names:
        if (folder / name).is_file():
            data = _inline("image/png", (folder / name).read_bytes())
            figures.append(
                f"<figure><img alt='{name}' src='{data}'>"
                f"<figcaption>{CAPTIONS.get(name, name)}</figcaption></figure>"
            )
    return "".join(figures)


def _inline(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _figure(draw: Callable[[Any, list[Row]], str], rows: list[Row]) -> str:
    """The plot with the caption it returns; nothing if there is nothing to draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    caption = draw(axes, [row for row in rows if row.status == OK])
    if not caption:
        return ""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    data = _inline("image/svg+xml", file.getvalue())
    return f"<figure><img alt='' src='{data}'><figcaption>{caption}</figcaption></figure>"


def _label(row: Row) -> str:
    return f"{row.variant} {row.shape} {row.dtype} {row.layout} {mode_text(row)}".lstrip()


def _grouped_bars(
    axes: Any,
    rows: list[Row],
    value: Callable[[Row], float],
    spread: Callable[[Row], tuple[float, float]] | None = None,
    start: float = 0,
) -> bool:
    """One group a case, one bar a provider; whether there is anything to draw."""
    if not rows:
        return False
    cases = list(dict.fromkeys(_label(row) for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    width = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        own = [row for row in rows if row.provider == provider]
        place = [cases.index(_label(row)) - 0.4 + (index + 0.5) * width for row in own]
        values = [value(row) for row in own]
        lengths = [v - start for v in values]
        axes.barh(place, lengths, width, left=start, label=provider)
        if spread is not None:
            limits = [spread(row) for row in own]
            below = [max(v - low, 0) for v, (low, _) in zip(values, limits)]
            above = [max(high - v, 0) for v, (_, high) in zip(values, limits)]
            errors = [below, above]
            axes.errorbar(values, place, xerr=errors, fmt="none", ecolor="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.axvline(start, color="black", linewidth=0.8)
    axes.get_figure().set_figheight(1.2 + len(cases) * (0.1 + 0.15 * len(providers)))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    return True


def _copy_bars(axes: Any, rows: list[Row]) -> str:
    kernels = [row for row in rows if row.level == "kernel" and row.provider != COPY]
    axes.set_xlabel("fraction of the roofline")
    if not _grouped_bars(axes, kernels, lambda row: row.of_roofline):
        return ""
    axes.axvline(1, color="black", linestyle="--", linewidth=0.8)
    return (
        f"{kernels[0].op}: kernels writing into existing tensors. 1 is what <code>copy_</code> "
        "between existing tensors takes, in the same interleaved rounds, for as many bytes; or a "
        "large matrix product for as many FLOPs, where that is longer."
    )


def _speedups(axes: Any, rows: list[Row]) -> str:
    users = [row for row in rows if row.level == "user" and row.provider != row.baseline]
    users = [row for row in users if not math.isnan(row.speedup)]
    axes.set(xlabel="speedup over the stock formulation", xscale="log")

    def spread(row: Row) -> tuple[float, float]:
        return row.speedup * row.median_us / row.p80_us, row.speedup * row.median_us / row.p20_us

    if not _grouped_bars(axes, users, lambda row: row.speedup, spread, start=1):
        return ""
    low, high = axes.get_xlim()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.set_xticks([], minor=True)
    return (
        f"{users[0].op} as a user calls it, allocation of the results included. Stock: "
        f"{STOCK[users[0].op]}. Bars: median over median; lines: p20 to p80 of the provider's own "
        "time."
    )


def _roofline(axes: Any, rows: list[Row]) -> str:
    placed = [row for row in rows if row.bytes and row.flops and row.provider != COPY]
    if not placed:
        return ""
    intensities = [row.flops / row.bytes for row in placed]
    bandwidths = sorted(row.copy_gbyte_s for row in placed)
    matrix = max(row.matrix_gflop_s for row in placed)
    low, high = min(intensities) / 4, max(matrix / bandwidths[0], max(intensities)) * 4
    x = [low * (high / low) ** (step / 100) for step in range(101)]
    for bandwidth, style in ((bandwidths[-1], "-"), (bandwidths[len(bandwidths) // 2], "--")):
        label = f"copy {bandwidth:.3g} GB/s ({'best' if style == '-' else 'median'} shape)"
        axes.plot(x, [min(v * bandwidth, matrix) for v in x], style, color="black", label=label)
    for level, marker in (("kernel", "o"), ("user", "x")):
        for provider in dict.fromkeys(row.provider for row in placed):
            own = [row for row in placed if (row.level, row.provider) == (level, provider)]
            if own:
                axes.plot(
                    [row.flops / row.bytes for row in own],
                    [row.flops / row.median_us / 1e3 for row in own],
                    marker,
                    label=f"{level} {provider}",
                )
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s")
    axes.legend(fontsize=7)
    return (
        f"Roofline. Ceilings measured in the run: copy bandwidth, and {matrix:.3g} GFLOP/s of a "
        "large matrix product. Bytes and FLOPs are the least the case needs."
    )


def _milliseconds(axes: Any, rows: list[Row]) -> bool:
    axes.set_xlabel("milliseconds")

    def spread(row: Row) -> tuple[float, float]:
        return row.p20_us / 1e3, row.p80_us / 1e3

    return _grouped_bars(axes, rows, lambda row: row.median_us / 1e3, spread)


def _memory(rows: list[Row]) -> str:
    texts = [
        f"{row.variant} {row.mode}, {row.provider}: {size_text(row.peak_bytes)}".lstrip()
        for row in rows
        if row.peak_bytes
    ]
    return f"Peak memory: {html.escape('; '.join(texts))}."


def _networks(axes: Any, rows: list[Row]) -> str:
    networks = [row for row in rows if row.level == "network"]
    if not _milliseconds(axes, networks):
        return ""
    return (
        "Whole StyleGAN2 networks without gradients; stock: "
        f"{STOCK['layers']}; lines: p20 to p80. {_memory(networks)}"
    )


def _training(axes: Any, rows: list[Row]) -> str:
    steps = [row for row in rows if row.level == "training"]
    if not _milliseconds(axes, steps):
        return ""
    return (
        "Losses and gradients of one training step of StyleGAN2 at 64×64 on crops of photographs, "
        f"without the optimiser; “{LAZY}” is the mean of 16 iterations with R1 in one of them "
        f"and path length in four; lines: p20 to p80. {_memory(steps)}"
    )
