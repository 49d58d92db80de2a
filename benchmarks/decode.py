"""Time the dense decode beside other libraries: `python -m benchmarks.decode --shapes first --json result.json`.

Before a library is timed, its result is checked: a few requests against float64, all against the first library's. The
result file is rewritten after every measurement, so that an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.ceilings import measure_ceilings
from benchmarks.inputs import CachePool, Inputs, check_result, compare_results
from benchmarks.machine import GpuMonitor, describe_gpu
from benchmarks.model import decode_work
from benchmarks.peers import DEFAULT_PEERS, PEERS, BatchInvariant, Decoder, Peer, ThisPackage, load_peers
from benchmarks.record import describe_run, save_json
from benchmarks.shapes import PRESETS, Shape, select_shapes
from benchmarks.timer import GraphTimer, TimerSettings, Timing


class DeviceLost(Exception):
    """The GPU takes no more work after a library's failure."""


class Progress:
    """One line that is rewritten on a terminal, and a line per measurement elsewhere."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.begin = time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin

    def step(self, what: str) -> None:
        self.done += 1
        width = 24
        filled = width * self.done // max(self.total, 1)
        bar = "█" * filled + "·" * (width - filled)
        line = f"{bar} {self.done}/{self.total} {self.elapsed_s:5.0f} s  {what}"
        print(
            f"\r\033[K{line}" if self.is_terminal else line,
            end="" if self.is_terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self.is_terminal:
            print(file=sys.stderr)


def measure_peer(
    peer: Peer,
    inputs: Inputs,
    timer: GraphTimer,
    first_out: Tensor | None,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], Tensor | None]:
    """Check, then time one library; returns the record and the output where it is right."""
    reason = peer.unsupported(inputs.shape)
    if reason is not None:
        return {"skipped": reason}, None
    try:
        decoder = peer.prepare(inputs)
        out, lse = decoder.result(decoder.run(0))
        max_error, wrong = check_result(inputs, out, lse)
        if wrong is None and first_out is not None:
            wrong = compare_results(first_out, out)
        if wrong is not None:
            return {"error": wrong, "max_error": max_error}, None
        return {**_time(decoder, inputs, timer, options), "max_error": max_error}, out
    except Exception as error:
        # Whatever a library raises at a shape belongs in the table; only a dead GPU ends the run.
        if inputs.q.is_cuda:
            _synchronize(error)
        message = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {message[0] if message else ''}"}, None


def _synchronize(cause: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(str(cause)) from error


def _time(decoder: Decoder, inputs: Inputs, timer: GraphTimer, options: argparse.Namespace) -> dict[str, Any]:
    copies = len(inputs.caches)
    timing: Timing = timer.measure(decoder.run, copies, sustained=options.sustained > 0)
    measured = timing.to_json()
    if options.eager:
        measured["eager_us"] = timer.host_us(decoder.run, copies, timing.short_us)
    if options.plan and decoder.plan is not None:
        plan = decoder.plan
        measured["plan_us"] = timer.measure(lambda _: plan(), 1, sustained=False).short_us
    return measured


def run_benchmark(
    shapes: Sequence[Shape],
    peers: Sequence[Peer],
    pool: CachePool,
    timer: GraphTimer,
    record: dict[str, Any],
    save: Callable[[], None],
    options: argparse.Namespace,
) -> None:
    """Fill `record` shape by shape, calling `save` after each measurement."""
    progress = Progress(len(shapes) * len(peers))
    record["not_run"] = []
    try:
        for shape in shapes:
            if options.budget is not None and progress.elapsed_s > options.budget:
                record["not_run"].append(shape.name)
                continue
            inputs = pool.inputs(shape)
            entry: dict[str, Any] = {"shape": shape.to_json(), "work": asdict(decode_work(shape)), "peers": {}}
            record["results"].append(entry)
            first_out: Tensor | None = None
            for peer in peers:
                try:
                    measured, out = measure_peer(peer, inputs, timer, first_out, options)
                except DeviceLost as error:
                    entry["peers"][peer.name] = {"error": f"the GPU was lost: {error}"}
                    raise
                first_out = out if first_out is None else first_out
                entry["peers"][peer.name] = measured
                save()
                progress.step(f"{shape.name} {peer.name} {_outcome(measured)}")
    finally:
        progress.close()
        save()


def _outcome(measured: dict[str, Any]) -> str:
    for problem in ("error", "skipped"):
        if problem in measured:
            return f"{problem}: {measured[problem]}"
    sustained = measured.get("sustained_us")
    return f"{measured['short_us']:.1f}" + ("" if sustained is None else f" / {sustained:.1f}") + " µs"


def new_record(options: argparse.Namespace, peers: Sequence[Peer], unavailable: dict[str, str]) -> dict[str, Any]:
    return {
        **describe_run(),
        "shapes": options.shapes,
        "peer_versions": {peer.name: peer.version for peer in peers},
        "unavailable": unavailable,
        "gpu": {},
        "timer": {},
        "ceilings": None,
        "results": [],
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description="Time the dense decode beside other libraries.",
        epilog=f"Presets: {', '.join(f'{name} ({len(shapes)})' for name, shapes in PRESETS.items())}.",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["first"],
        metavar="SHAPE",
        help="presets, or shapes such as b=128,q=2,h=128,k=8192,varlen",
    )
    parser.add_argument(
        "--peers", nargs="+", default=DEFAULT_PEERS, choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}"
    )
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="also this package's batch-invariant calls, right after the others",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there as they come")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="take no new shape after this time")
    parser.add_argument(
        "--sustained", type=float, default=0.3, metavar="SECONDS", help="length of a sustained run; 0: none"
    )
    parser.add_argument("--rounds", type=int, default=5, help="short replays, of which the median counts")
    parser.add_argument("--eager", action="store_true", help="also the host time of a call outside a graph")
    parser.add_argument("--plan", action="store_true", help="also the device time of planning")
    parser.add_argument(
        "--no-ceilings", dest="ceilings", action="store_false", help="do not measure the machine's own rates"
    )
    options = parser.parse_args(arguments)
    if options.batch_invariant and BatchInvariant.name not in options.peers:
        place = options.peers.index(ThisPackage.name) + 1 if ThisPackage.name in options.peers else 0
        options.peers = [*options.peers[:place], BatchInvariant.name, *options.peers[place:]]
    try:
        options.selected = select_shapes(options.shapes)
    except ValueError as error:
        parser.error(str(error))
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if not 0 <= options.sustained <= 60:
        parser.error(f"--sustained must be between 0 and 60 seconds, got {options.sustained}")
    return options


def print_results(record: dict[str, Any]) -> None:
    print()
    print(report.caption(record))
    print(report.as_text(report.result_table(record)))
    for line in [*report.summary_lines(record), report.ceiling_line(record), *report.problem_lines(record)]:
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch finds none", file=sys.stderr)
        return 1
    peers, unavailable = load_peers(options.peers)
    for name, reason in unavailable.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    if not peers:
        print("error: none of the libraries can be used here", file=sys.stderr)
        return 1

    monitor = GpuMonitor()
    settings = TimerSettings(rounds=options.rounds, sustained_s=options.sustained)
    timer = GraphTimer(settings, monitor)
    record = new_record(options, peers, unavailable)
    record["gpu"] = describe_gpu(monitor)
    record["timer"] = asdict(settings)

    def save() -> None:
        if options.json is not None:
            save_json(record, options.json)

    if options.ceilings:
        record["ceilings"] = measure_ceilings(timer).to_json()
        print(report.ceiling_line(record), file=sys.stderr, flush=True)
        save()
    pool = CachePool(torch.device("cuda"), record["gpu"]["l2_bytes"])
    pool.reserve(options.selected)
    lost = False
    try:
        run_benchmark(options.selected, peers, pool, timer, record, save, options)
    except DeviceLost as error:
        lost = True
        print(f"error: the GPU takes no more work since: {error}", file=sys.stderr)
    print_results(record)
    failed = any("error" in result["peers"].get(report.OURS, {}) for result in record["results"])
    return 1 if failed or lost else 0


if __name__ == "__main__":
    sys.exit(main())
