"""One run of the suite: choose, announce, measure, write down, report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .. import backends
from . import peers, report
from .cases import Case, select
from .end_to_end import lazy_iteration
from .machine import conditions
from .results import FAIL, OK, ResultsFile, Row
from .runner import measure, now
from .swap import cases as swap_cases
from .terminal import UNSTEADY, Terminal
from .tune import tune
from .workload import Session

INTERRUPTED = 130  # as a shell reports Ctrl-C


def run(arguments: argparse.Namespace) -> int:
    terminal = Terminal()
    if arguments.report:
        return _report(Path(arguments.report), terminal)
    device = torch.device(arguments.device)
    graphs = arguments.cuda_graph or "CUDA graph" in (arguments.mode or ())
    if graphs and device.type != "cuda":
        terminal.say(f"a CUDA graph needs a CUDA device, got --device {device}")
        return 2
    if arguments.tune:
        arguments.op = ["layers"]
        arguments.mode = arguments.mode or ["forward", "forward+backward"]
    of_peers = [case for path in arguments.peer for case in swap_cases(path)]
    cases = select(arguments, device.type, of_peers)
    if not cases:
        terminal.say("no case matches; `--list --full` shows all of them")
        return 2
    if arguments.list:
        for case in cases:
            terminal.say(str(case))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    seconds, least = (0.05, 3) if arguments.quick else (1.0, 5)
    seconds = seconds if arguments.seconds is None else arguments.seconds
    file = ResultsFile(Path(arguments.out))
    session = Session(
        device,
        file.path.parent,
        tuple(peers.load(path, device) for path in arguments.peer),
        compiles=not (arguments.quick or arguments.no_compile),
    )
    if arguments.tune:
        return tune(cases, session, seconds, terminal, 60 * arguments.minutes)
    known = {**conditions(device), "run": now()}
    plan = f"{len(cases)} cases, {_minutes(cases, seconds, session)}"
    _announce(terminal, known, device, file, plan)

    rows: list[Row] = []
    interrupted = False
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        with terminal.progress() as progress:
            task = progress.add_task("", total=len(cases))
            for done, case in enumerate(cases):
                if time.monotonic() > deadline:
                    terminal.say(f"the time is up; {len(cases) - done} cases are left")
                    break
                progress.update(task, description=str(case), refresh=True)
                measured = measure(case, session, seconds, known, least, arguments.cuda_graph)
                file.append(measured)
                terminal.rows(measured)
                rows += measured
                progress.advance(task)
        mean = lazy_iteration(rows)
        file.append(mean)
        terminal.rows(mean)
        rows += mean
    except KeyboardInterrupt:
        interrupted = True
        terminal.say("interrupted; what was measured is kept")

    failed = sum(row.status == FAIL for row in rows)
    timed = sum(row.status == OK for row in rows)
    terminal.say(f"{timed} rows timed, {len(rows) - timed - failed} skipped, {failed} FAIL")
    terminal.say(f"{UNSTEADY} marks medians whose p80 is more than 1.5 × p20")
    terminal.say(f"rows: {file.path}")
    if rows:
        _report(file.path, terminal)
    return INTERRUPTED if interrupted else int(failed > 0)


def _report(path: Path, terminal: Terminal) -> int:
    try:
        written, missing = report.write(path)
    except (OSError, ValueError) as error:
        terminal.say(f"no report: {error}")
        return 2
    terminal.say(f"report: {written}")
    if missing:
        terminal.say(missing)
    return 0


def _announce(
    terminal: Terminal, known: dict[str, str], device: torch.device, file: ResultsFile, plan: str
) -> None:
    dirty = " with uncommitted changes" if known["dirty"] == "yes" else ""
    commit = known["commit"][:12] or "an unknown commit"
    terminal.say(
        f"stylegan_fast {known['stylegan_fast']} at {commit}{dirty}, torch {known['torch']}, "
        f"{known['processor']}, {known['threads']} threads"
    )
    for name in backends.BACKENDS:
        reason = backends.refusal(name, "bias_act", device.type, torch.float32)
        terminal.say(f"  {name}: {'usable' if reason is None else reason}")
    if float(known["load"] or 0) > int(known["cores"]) / 2:
        busy = f"the machine is busy (load {known['load']} on {known['cores']} cores)"
        terminal.say(f"{busy}: what is timed now is mostly noise", "bold yellow")
    for path in file.avoided:
        terminal.say(f"{path} has other columns than this version writes; it is left as it is")
    terminal.say(f"{plan}; rows are appended to {file.path}; Ctrl-C keeps those written so far")
    terminal.heading()


def _minutes(cases: list[Case], seconds: float, session: Session) -> str:
    """An estimate: the timing, a second for gates and memory, six for a compilation, and more
    where the stock formulation takes longer than the timing may."""
    total = 0.0
    for case in cases:
        compiled = session.compiles and case.level == "user" and case.mode != "double backward"
        total += seconds + (
            10 if case.level in ("network", "training", "repository") else 7 if compiled else 1
        )
        total += 3 * (case.op == "upfirdn2d" and case.level == "user")
        total += 60 * (case.mode == "training step")
        total += 40 * (case.level == "network" and case.shape[2] > 256)
    return "less than a minute" if total < 60 else f"about {total / 60:.0f} minutes"
