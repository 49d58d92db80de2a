"""Tables from a result file: `python -m benchmarks.report RESULT.json` prints the one for the README in Markdown."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.model import Work, decode_work, geometric_mean
from benchmarks.shapes import PRESETS, Shape, select_shapes

OURS, OURS_BATCH_INVARIANT = "flash_mla", "flash_mla_batch_invariant"
TITLES = {
    "flash_mla": "this package",
    "flash_mla_batch_invariant": "batch-invariant",
    "flashmla": "FlashMLA",
    "flashinfer": "FlashInfer",
    "fa3": "FlashAttention-3",
    "torch": "plain torch",
}
KINDS = ("short_us", "sustained_us")


@dataclass(frozen=True)
class Row:
    """Everything measured at one shape."""

    shape: Shape
    work: Work
    peers: dict[str, dict[str, Any]]  # by name: timings, or `skipped` or `error` with the reason

    def time_us(self, peer: str, kind: str = "short_us") -> float | None:
        return self.peers.get(peer, {}).get(kind)

    def best_other_us(self, kind: str = "short_us") -> float | None:
        times = [self.time_us(peer, kind) for peer in self.peers if peer not in (OURS, OURS_BATCH_INVARIANT, "torch")]
        return min((time for time in times if time is not None), default=None)

    def speedup(self, peer: str | None, kind: str = "short_us") -> float | None:
        """How many times longer a peer takes than this package; None as the peer means the fastest of them."""
        ours = self.time_us(OURS, kind)
        other = self.best_other_us(kind) if peer is None else self.time_us(peer, kind)
        return None if ours is None or other is None else other / ours


def read_rows(record: dict[str, Any]) -> list[Row]:
    shapes = [Shape.from_json(result["shape"]) for result in record["results"]]
    return [
        Row(shape, decode_work(shape), result["peers"]) for shape, result in zip(shapes, record["results"], strict=True)
    ]


def read_ceilings(record: dict[str, Any]) -> Ceilings | None:
    return Ceilings(**record["ceilings"]) if record.get("ceilings") else None


def peers_in(rows: Sequence[Row]) -> list[str]:
    """Names of the peers that were measured at some shape, this package first."""
    names = dict.fromkeys(name for row in rows for name, result in row.peers.items() if "short_us" in result)
    return sorted(names, key=lambda name: name != OURS)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _pair(values: Sequence[float | None], form: str = "") -> str:
    texts = ["–" if value is None else (form.format(value) if form else _number(value)) for value in values]
    return " / ".join(texts) if any(text != "–" for text in texts) else "–"


def _times(row: Row, peer: str) -> str:
    result = row.peers.get(peer, {})
    if "error" in result:
        return "error"
    return _pair([row.time_us(peer, kind) for kind in KINDS])


def _rate(row: Row, peer: str, to_rate: str) -> str:
    time = row.time_us(peer)
    return "–" if time is None else f"{getattr(row.work, to_rate)(time):.0f}"


def _of_floor(row: Row, peer: str, ceilings: Ceilings | None) -> str:
    if ceilings is None:
        return "–"
    shares = []
    for kind in KINDS:
        time = row.time_us(peer, kind)
        rates = ceilings.rates(sustained=kind == "sustained_us")
        shares.append(None if time is None else 100 * row.work.floor_us(rates) / time)
    return _pair(shares, "{:.0f}")


def result_table(record: dict[str, Any], shapes: Sequence[Shape] | None = None) -> list[list[str]]:
    """Header and rows as text."""
    rows = [row for row in read_rows(record) if shapes is None or row.shape in shapes]
    ceilings = read_ceilings(record)
    names = peers_in(rows)
    # Where this package was not measured, the rates are those of the first library.
    subject = names[0] if names else OURS
    others = [name for name in names if name != subject]
    has_eager = any("eager_us" in result for row in rows for result in row.peers.values())
    header = ["shape", "floor µs", f"{TITLES.get(subject, subject)} µs", "TFLOP/s", "GB/s", "% of floor"]
    for name in others:
        header += [f"{TITLES.get(name, name)} µs"] + ([f"× {TITLES.get(name, name)}"] if subject == OURS else [])
    header += ["host µs"] if has_eager else []
    table = [header]
    for row in rows:
        floor = None if ceilings is None else row.work.floor_us(ceilings.rates(sustained=False))
        cells = [row.shape.name, _number(floor), _times(row, subject)]
        cells += [_rate(row, subject, "tflops_per_s"), _rate(row, subject, "gbytes_per_s")]
        cells += [_of_floor(row, subject, ceilings)]
        for name in others:
            cells.append(_times(row, name))
            if subject == OURS:
                cells.append(_pair([row.speedup(name, kind) for kind in KINDS], "{:.2f}"))
        if has_eager:
            host = [row.time_us(name, "eager_us") for name in names]
            cells.append(_pair(host))
        table.append(cells)
    return table


def summary_lines(record: dict[str, Any], shapes: Sequence[Shape] | None = None) -> list[str]:
    """Geometric means of the speed-ups, and the smallest."""
    rows = [row for row in read_rows(record) if shapes is None or row.shape in shapes]
    lines = []
    others = [name for name in peers_in(rows) if name != OURS]
    candidates: list[str | None] = [*others]
    if len([name for name in others if name not in (OURS_BATCH_INVARIANT, "torch")]) > 1:
        candidates.append(None)
    for peer in candidates:
        texts = []
        for kind in KINDS:
            speedups = [(value, row.shape.name) for row in rows if (value := row.speedup(peer, kind)) is not None]
            if speedups:
                least, where = min(speedups)
                mean = geometric_mean(value for value, _ in speedups)
                label = kind.removesuffix("_us")
                texts.append(f"{label} ×{mean:.2f} (least ×{least:.2f} at {where}, {len(speedups)} shapes)")
        if texts:
            title = "the fastest of them" if peer is None else TITLES.get(peer, peer)
            lines.append(f"Geometric mean against {title}: {'; '.join(texts)}")
    return lines


def ceiling_line(record: dict[str, Any]) -> str:
    ceilings = read_ceilings(record)
    if ceilings is None:
        return "No ceilings were measured in this run."
    return (
        f"In the same run (short / sustained): reads {ceilings.read_gbytes_per_s:.0f} / "
        f"{ceilings.read_gbytes_per_s_sustained:.0f} GB/s ({ceilings.read_method}), an 8192³ bf16 GEMM "
        f"{ceilings.gemm_tflops_per_s:.0f} / {ceilings.gemm_tflops_per_s_sustained:.0f} TFLOP/s."
    )


def problem_lines(record: dict[str, Any]) -> list[str]:
    """Everything that was to be measured and was not."""
    lines = [f"{TITLES.get(name, name)} not measured: {reason}" for name, reason in record["unavailable"].items()]
    for row in read_rows(record):
        for name, result in row.peers.items():
            for problem in ("error", "skipped"):
                if problem in result:
                    lines.append(f"{row.shape.name}: {TITLES.get(name, name)} {problem}: {result[problem]}")
    if record.get("not_run"):
        lines.append(f"No time was left for {len(record['not_run'])} shapes: {' '.join(record['not_run'])}")
    return lines


def as_text(table: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_markdown(table: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]])


def caption(record: dict[str, Any]) -> str:
    gpu = record["gpu"]
    versions = [f"torch {record['versions']['torch']}", f"CUDA {record['versions']['cuda']}"]
    versions += [f"{TITLES.get(name, name)} {version}" for name, version in record["peer_versions"].items()]
    return (
        f"{gpu['name']}, {record['started'][:10]}, commit {record['commit']}; {', '.join(versions)}. "
        "Times are microseconds per call, short / sustained."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Print the table of a result file."
    )
    parser.add_argument("result", type=Path, help="what `python -m benchmarks.decode --json` wrote")
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help=f"only these: {', '.join(PRESETS)}, or b=..,h=..,k=.."
    )
    parser.add_argument("--text", action="store_true", help="for a terminal instead of Markdown")
    options = parser.parse_args(arguments)
    try:
        record = json.loads(options.result.read_text())
        shapes = select_shapes(options.shapes) if options.shapes else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    table = result_table(record, shapes)
    print(caption(record), end="\n\n")
    print(as_text(table) if options.text else as_markdown(table), end="\n\n")
    for line in [*summary_lines(record, shapes), ceiling_line(record)]:
        print(line, end="\n" if options.text else "\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
