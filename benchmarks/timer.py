"""The one timer: calls captured in a CUDA graph, over rotating inputs that together exceed the L2 cache.

short       the graph is replayed after an idle gap; the median of a few such replays. The clock is at its highest.
sustained   the graph is replayed back to back for a third of a second. The power limit sets the clock.
host        what a call outside a graph costs the Python thread, with the GPU kept from blocking it.

A graph holds enough calls that its own launch does not count, and each copy of the inputs is used equally often.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.machine import GpuMonitor

Call = Callable[[int], Any]  # takes the number of the input copy


@dataclass(frozen=True)
class TimerSettings:
    graph_us: float = 1500.0  # a graph is about this long, or one round of the copies if that is longer
    max_calls: int = 512  # calls in a graph, unless there are more copies
    rounds: int = 5
    idle_s: float = 0.005  # before each short replay; long replays wait in proportion, so that heat does not add up
    idle_per_busy: float = 3.0
    rest_s: float = 0.05  # before the first short replay, after whatever ran before
    sustained_s: float = 0.3
    host_batches: int = 5


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    short_us: float
    short_min_us: float
    short_max_us: float
    sustained_us: float | None
    calls_per_graph: int
    sm_clock_mhz: int | None = None  # at the end of the sustained run
    power_w: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def calls_per_graph(call_us: float, num_copies: int, settings: TimerSettings) -> int:
    """Whole rounds of the copies, as many as make a graph of `settings.graph_us`, and at least two calls."""
    rounds = math.ceil(settings.graph_us / (call_us * num_copies))
    rounds = min(rounds, settings.max_calls // num_copies)
    return num_copies * max(rounds, 1 if num_copies > 1 else 2)


def idle_seconds(graph_us: float, settings: TimerSettings) -> float:
    return max(settings.idle_s, settings.idle_per_busy * graph_us * 1e-6)


def host_batch_size(call_us: float) -> int:
    """Calls in a row of which the launch queue never fills, and which the GPU finishes soon afterwards."""
    return max(10, min(50, int(20_000 / call_us)))


class GraphTimer:
    # About half a millisecond, in which the host queues the graph so that its launch is not timed.
    SPIN_CYCLES = 1_000_000

    def __init__(self, settings: TimerSettings, monitor: GpuMonitor):
        self.settings = settings
        self.monitor = monitor
        self.stream = torch.cuda.Stream()

    def measure(self, call: Call, num_copies: int = 1, sustained: bool = True) -> Timing:
        """Time `call(copy)` for copies 0 .. num_copies - 1 in turn."""
        torch.cuda.synchronize()  # the inputs were made on another stream
        with torch.cuda.stream(self.stream):
            estimate_us = self._warm_up(call, num_copies)
            calls = calls_per_graph(estimate_us, num_copies, self.settings)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                for index in range(calls):
                    call(index % num_copies)
            graph.replay()
            self.stream.synchronize()
            short = self._short(graph)
            sustained_us, clock, power = self._sustained(graph, statistics.median(short)) if sustained else (None,) * 3
            self.stream.synchronize()
            graph.reset()
        return Timing(
            short_us=statistics.median(short) / calls,
            short_min_us=min(short) / calls,
            short_max_us=max(short) / calls,
            sustained_us=None if sustained_us is None else sustained_us / calls,
            calls_per_graph=calls,
            sm_clock_mhz=clock,
            power_w=power,
        )

    def host_us(self, call: Call, num_copies: int, call_us: float) -> float:
        """Time that the calling thread spends in one call, the GPU working behind it."""
        batch = host_batch_size(call_us)
        per_call = []
        for _ in range(self.settings.host_batches + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for index in range(batch):
                call(index % num_copies)
            per_call.append((time.perf_counter() - begin) * 1e6 / batch)
        torch.cuda.synchronize()
        return statistics.median(per_call[1:])

    def _warm_up(self, call: Call, num_copies: int) -> float:
        """Leave compilation and first allocations behind; returns a first estimate of microseconds per call."""
        for copy in range(min(num_copies, 2)):
            call(copy)
        calls = 4
        start, end = self._events()
        start.record(self.stream)
        for index in range(calls):
            call(index % num_copies)
        end.record(self.stream)
        end.synchronize()
        return max(start.elapsed_time(end) * 1e3 / calls, 1.0)

    def _short(self, graph: torch.cuda.CUDAGraph) -> list[float]:
        """Microseconds of single replays, each from idle."""
        start, end = self._events()
        times: list[float] = []
        idle = self.settings.rest_s
        for _ in range(self.settings.rounds):
            time.sleep(idle)
            torch.cuda._sleep(self.SPIN_CYCLES)
            start.record(self.stream)
            graph.replay()
            end.record(self.stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
            idle = idle_seconds(times[-1], self.settings)
        return times

    def _sustained(self, graph: torch.cuda.CUDAGraph, graph_us: float) -> tuple[float, int | None, float | None]:
        """Microseconds per replay back to back, with the clock and power late in the run."""
        replays = max(2, math.ceil(self.settings.sustained_s * 1e6 / graph_us))
        start, end = self._events()
        begin = time.perf_counter()
        start.record(self.stream)
        for _ in range(replays):
            graph.replay()
        end.record(self.stream)
        time.sleep(max(0.0, 0.7 * self.settings.sustained_s - (time.perf_counter() - begin)))
        clock, power = self.monitor.sm_clock_mhz(), self.monitor.power_w()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / replays, clock, power

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
