"""Plots from a result file: `python -m benchmarks.plot RESULT.json --out DIR`.

roofline.svg         every shape against the rates of the same run
time-vs-batch.svg    where a result has at least four batch sizes of one shape
time-vs-context.svg  where it has at least four context lengths of one shape
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.report import TITLES, Row, ceiling_line, peers_in, read_ceilings, read_rows
from benchmarks.shapes import UNIFORM, Shape

STYLES: dict[str, dict[str, Any]] = {
    "flash_mla": {"color": "#c0392b", "marker": "o", "zorder": 5},
    "flashmla": {"color": "#2c6fbb", "marker": "s"},
    "flashinfer": {"color": "#3a9d5d", "marker": "^"},
    "fa3": {"color": "#8e5ea2", "marker": "D"},
    "torch": {"color": "#888888", "marker": "x"},
}
MIN_POINTS = 4
MAX_PANELS = 4

Series = dict[Hashable, list[Row]]


def group_rows(rows: Sequence[Row], along: str) -> list[tuple[str, list[Row]]]:
    """Series in which only `along` (a field of Shape) differs, titled, those with most points first."""
    series: Series = defaultdict(list)
    for row in rows:
        if row.shape.lengths == UNIFORM:
            fixed = {name: value for name, value in row.shape.to_json().items() if name != along}
            series[tuple(fixed.items())].append(row)
    titled = []
    for group in series.values():
        if len({getattr(row.shape, along) for row in group}) >= MIN_POINTS:
            ordered = sorted(group, key=lambda row: getattr(row.shape, along))
            titled.append((_title(ordered[0].shape, along), ordered))
    titled.sort(key=lambda item: -len(item[1]))
    return titled[:MAX_PANELS]


def _title(shape: Shape, along: str) -> str:
    parts = [f"{shape.num_heads_q} heads"]
    if along != "batch_size":
        parts.append(f"batch {shape.batch_size}")
    if along != "seqlen_k":
        parts.append(f"{shape.seqlen_k} cached tokens")
    if shape.seqlen_q != 1 and along != "seqlen_q":
        parts.append(f"{shape.seqlen_q} query tokens")
    parts += ["causal"] if shape.causal else []
    parts += [shape.dtype] if shape.dtype != "bf16" else []
    return ", ".join(parts)


def draw_roofline(plt: Any, rows: Sequence[Row], ceilings: Ceilings | None) -> Any:
    figure, axes = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
    if ceilings is not None and rows:
        intensities = [row.work.intensity for row in rows]
        left, right = min(intensities) / 1.5, max(intensities) * 1.5
        for sustained, line in ((False, "-"), (True, "--")):
            rates = ceilings.rates(sustained)
            ridge = rates.flops_per_s / rates.read_bytes_per_s
            points = sorted({left, min(max(ridge, left), right), right})
            roof = [min(point * rates.read_bytes_per_s, rates.flops_per_s) / 1e12 for point in points]
            axes.plot(
                points, roof, line, color="black", linewidth=1, label="sustained rates" if sustained else "short rates"
            )
    for name in peers_in(rows):
        measured = [(row.work.intensity, row.work.tflops_per_s(time)) for row in rows if (time := row.time_us(name))]
        style = STYLES.get(name, {})
        axes.scatter(*zip(*measured, strict=True), s=22, alpha=0.8, label=TITLES.get(name, name), **style)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s (short)")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(frameon=False)
    return figure


def draw_series(
    plt: Any, groups: Sequence[tuple[str, list[Row]]], along: str, label: str, ceilings: Ceilings | None
) -> Any:
    columns = min(len(groups), 2)
    lines = -(-len(groups) // columns)
    size = (5.2 * columns, 3.8 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, (title, rows) in zip(grid.flat, groups, strict=False):
        for name in peers_in(rows):
            points = [(getattr(row.shape, along), time) for row in rows if (time := row.time_us(name))]
            axes.plot(
                *zip(*points, strict=True),
                linewidth=1.3,
                markersize=4,
                label=TITLES.get(name, name),
                **STYLES.get(name, {}),
            )
        if ceilings is not None:
            rates = ceilings.rates(sustained=False)
            floor = [(getattr(row.shape, along), row.work.floor_us(rates)) for row in rows]
            axes.plot(*zip(*floor, strict=True), ":", color="black", linewidth=1, label="floor")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="µs (short)", title=title)
        axes.set_xscale("log", base=2)
        axes.grid(True, which="both", linewidth=0.3)
        axes.legend(frameon=False, fontsize="small")
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    return figure


def draw_all(record: dict[str, Any], out: Path, suffix: str, announce: Callable[[str], None]) -> list[Path]:
    """Write the plots that the record has data for."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same record gives the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "flash_mla", "font.size": 9})
    from matplotlib import pyplot as plt

    rows, ceilings = read_rows(record), read_ceilings(record)
    if not peers_in(rows):
        raise ValueError("the result file holds no timings")
    figures = {"roofline": draw_roofline(plt, rows, ceilings)}
    for name, along, label in (
        ("time-vs-batch", "batch_size", "batch size"),
        ("time-vs-context", "seqlen_k", "cached tokens per request"),
    ):
        groups = group_rows(rows, along)
        if groups:
            figures[name] = draw_series(plt, groups, along, label, ceilings)
        else:
            announce(f"{name} is left out: no shape has {MIN_POINTS} values of {along}")
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.suptitle(
            f"{record['gpu']['name']}, {record['started'][:10]}, commit {record['commit']}", fontsize=8, color="gray"
        )
        path = out / f"{name}.{suffix}"
        figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
        plt.close(figure)
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Draw the plots of a result file.")
    parser.add_argument("result", type=Path, help="what `python -m benchmarks.decode --json` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the plots go")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args(arguments)
    try:
        record = json.loads(options.result.read_text())
        written = draw_all(record, options.out, options.format, lambda line: print(line, file=sys.stderr))
    except ImportError:
        parser.error("the plots need matplotlib: pip install matplotlib")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for path in written:
        print(path)
    print(ceiling_line(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
