"""Each layer knows only those below it, and what two layers must agree on is the same in both."""

from __future__ import annotations

import ast
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from plans import CAPACITIES, UNUSUAL_CLUSTERS

from flash_mla import checks, schedule

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "flash_mla"
INTEGRATIONS = PACKAGE / "integrations"

CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"})
TORCH_HEADERS = ("torch/", "ATen/", "c10/", "pybind11/", "Python.h")
CUTLASS_HEADERS = ("cute/", "cutlass/")
PRIMITIVES = "kernels/sm90/primitives"

# What each module of the package may import is what stands before it.
PYTHON_LAYERS = (
    {"_version", "extension"},
    {"schedule"},
    {"checks"},
    {"merge", "value_checks"},
    {"cpu"},
    {"ops"},
    {"cache", "plan"},
    {"interface"},
    {"__init__", "__main__", "flash_mla_interface"},
)


def relative(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def includes(path: Path) -> tuple[list[str], list[str]]:
    """The headers of this project that a file includes, and the others."""
    text = path.read_text()
    return (
        re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE),
        re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, re.MULTILINE),
    )


def allowed_folders(path: Path) -> tuple[str, ...]:
    """Where the headers of this project come from that a file may include."""
    folder = relative(path.parent)
    if path == CSRC / "bindings.cpp":
        return ("ops",)
    if folder == "params":
        return ("params",)
    if folder == "ops":
        return ("ops", "kernels", "params")
    # No kernel's folder includes a sibling: what two kernels need moves down.
    return (folder, PRIMITIVES, "params") if folder != PRIMITIVES else (PRIMITIVES, "params")


def test_there_is_something_to_check():
    folders = {relative(path).partition("/")[0] for path in CPP_FILES}
    assert folders == {"bindings.cpp", "kernels", "ops", "params"}


@pytest.mark.parametrize("path", CPP_FILES, ids=relative)
def test_cpp_file_includes_only_layers_below(path):
    own, others = includes(path)
    for header in own:
        assert (CSRC / header).is_file(), f"{header}: includes are relative to csrc/"
        assert str(Path(header).parent).startswith(allowed_folders(path)), header
    for header in others:
        if header.startswith(TORCH_HEADERS):
            assert relative(path).startswith(("ops/", "bindings.cpp")), f"{header}: torch is known to ops/ only"
        if header.startswith(CUTLASS_HEADERS):
            allowed = relative(path).startswith("kernels/") or header == "cutlass/version.h"
            assert allowed, f"{header}: CUTLASS is known to kernels/ only"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_python_module_imports_only_layers_below(path):
    rank = {module: index for index, layer in enumerate(PYTHON_LAYERS) for module in layer}
    assert path.stem in rank, "give the new module its place in PYTHON_LAYERS"
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        if top == "flash_mla":
            imported = rest.partition(".")[0] or "__init__"
            assert rank[imported] < rank[path.stem], f"{path.stem} imports {imported}"
        else:
            assert top == "torch" or top in sys.stdlib_module_names, f"{path.stem} imports {module}"


def imported_modules(path: Path) -> list[str]:
    """Absolute names of the imported modules; `from flash_mla import ops` counts as flash_mla.ops."""
    return names_of(ast.walk(ast.parse(path.read_text())))


def names_of(nodes: Iterable[ast.AST]) -> list[str]:
    modules = []
    for node in nodes:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            if node.module == "flash_mla":
                modules += [f"flash_mla.{alias.name}" for alias in node.names]
            else:
                modules.append(node.module)
    return modules


@pytest.mark.parametrize("path", sorted(INTEGRATIONS.glob("*.py")), ids=lambda path: path.name)
def test_integration_imports_only_its_framework(path):
    framework = path.stem.partition("_")[0]
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        if top != "flash_mla":
            assert top == "torch" or top in sys.stdlib_module_names or top == framework, f"{path.stem} imports {module}"
        elif not rest.startswith("integrations"):
            # Where sgl-flash-mla was installed later, flash_mla/__init__.py and flash_mla_interface.py are its own.
            assert (PACKAGE / f"{rest.partition('.')[0]}.py").is_file() and rest != "flash_mla_interface", module
    if path.stem != "vllm_backend":  # which vLLM imports
        at_import = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert framework not in {name.partition(".")[0] for name in names_of(at_import)}


def test_constants_are_the_same_on_host_and_device():
    headers = ("work_division.h", "segments.h")
    text = "".join((CSRC / "params" / name).read_text() for name in headers)
    definitions = re.findall(r"constexpr int (k\w+ = \d+(?:, k\w+ = \d+)*);", text)
    of_device = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", " ".join(definitions))}
    assert of_device == {
        "kPageSize": schedule.PAGE_SIZE,
        "kBlockM": schedule.BLOCK_M,
        "kMaxLanes": schedule.MAX_LANES,
        "kMaxSplitCtas": schedule.MAX_SPLIT_CTAS,
        "kMaxSwappedRows": schedule.MAX_SWAPPED_ROWS,
        "kMaxSwappedRowsOfMany": schedule.MAX_SWAPPED_ROWS_OF_MANY,
        "kDenseSplitOverhead": schedule.DENSE_SPLIT_OVERHEAD,
        "kDenseMinSplit": schedule.DENSE_MIN_SPLIT,
        "kDenseWholeTileOfFew": schedule.DENSE_WHOLE_TILE_OF_FEW,
        "kDenseWholeSlack": schedule.DENSE_WHOLE_SLACK,
        "kDenseWholeSlackOfSome": schedule.DENSE_WHOLE_SLACK_OF_SOME,
        "kSwappedSplitOverhead": schedule.SWAPPED_SPLIT_OVERHEAD,
        "kDenseSegmentsSplitOverhead": schedule.DENSE_SEGMENTS_SPLIT_OVERHEAD,
        "kSegmentsSplitOverhead": schedule.SEGMENTS_SPLIT_OVERHEAD,
        "kSwappedSplitOverheadOfMore": schedule.SWAPPED_SPLIT_OVERHEAD_OF_MORE,
        "kSwappedMinSplit": schedule.SWAPPED_MIN_SPLIT,
        "kSwappedWholeTile": schedule.SWAPPED_WHOLE_TILE,
        "kMaxSegments": schedule.MAX_SEGMENTS,
        "kMaxSegmentBits": schedule.NUM_GRANULES[schedule.MAX_SEGMENTS],
        "kFoldLevels": schedule.FOLD_LEVELS,
        "kDenseMinSegment": schedule.DENSE_MIN_SEGMENT,
        "kDenseLongTile": schedule.DENSE_LONG_TILE,
        "kDenseMinSegmentOfLongTile": schedule.DENSE_MIN_SEGMENT_OF_LONG_TILE,
        "kSwappedMinSegment": schedule.SWAPPED_MIN_SEGMENT,
        "kSwappedMinSegmentOf32Rows": schedule.SWAPPED_MIN_SEGMENT_OF_32_ROWS,
        "kMaxScratchBytes": schedule.MAX_SCRATCH_BYTES,
        "kVectorNumbers": 128,
        "kVectorRows": 8,
        "kVectorColumns": 16,
        "kHeadDim": checks.HEAD_DIM,
        "kHeadDimV": checks.HEAD_DIM_V,
    }
    others = [path for path in CPP_FILES if path.name not in headers]
    for name in of_device:
        assert not [path for path in others if re.search(rf"constexpr int {name}\b", path.read_text())], name


GRID_PROGRAM = """
#include <cstdio>
#include "params/segments.h"
using namespace flash_mla;
void print(WorkerGrid const& grid) {
    std::printf("%d %d %d %d %d %d %d %d %d %d ", grid.num_lanes, grid.num_workers, grid.tiles_per_request,
                grid.lane_groups, grid.rows_per_tile, grid.split_ctas, grid.split_overhead_blocks,
                grid.min_blocks_per_split, grid.num_granules, grid.is_swapped());
}
int main() {
    std::printf("%d\\n", kWorkerRowInts);
    ClusterCapacity capacity{};
    for (int batch_size, rows, heads; std::scanf("%d %d %d", &batch_size, &rows, &heads) == 3;) {
        for (int& clusters : capacity.num_clusters) if (std::scanf("%d", &clusters) != 1) return 1;
        print(worker_grid(batch_size, rows, heads, capacity));
        print(dense_grid(rows, heads, capacity.num_sms()));
        print(swapped_grid(batch_size > 0 ? batch_size : 1, rows, heads, capacity));
        WorkerGrid const invariant = decode_grid(batch_size, rows, heads, capacity, true);
        print(invariant);
        std::printf("%d %lld %lld\\n", num_plan_rows(rows, heads, capacity.num_sms()),
                    static_cast<long long>(num_partial_rows(rows, heads, capacity.num_sms())),
                    static_cast<long long>(invariant_scratch_bytes(invariant, batch_size)));
    }
}
"""


def grids_of(batch_size: int, rows: int, heads: int, capacity: schedule.ClusterCapacity) -> list[int]:
    """What the program prints."""
    grids = (
        schedule.worker_grid(batch_size, rows, heads, capacity),
        schedule.dense_grid(rows, heads, capacity.num_sms),
        schedule.swapped_grid(max(batch_size, 1), rows, heads, capacity),
        schedule.decode_grid(batch_size, rows, heads, capacity, batch_invariant=True),
    )
    sizes = (schedule.num_plan_rows, schedule.num_partial_rows)
    numbers = [number for grid in grids for number in (*grid, int(grid.is_swapped))]
    numbers += [size(rows, heads, capacity.num_sms) for size in sizes]
    return [*numbers, schedule.invariant_scratch_bytes(grids[-1], batch_size)]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found (c++)")
def test_worker_grid_is_the_same_on_host_and_device(tmp_path):
    source, program = tmp_path / "grid.cpp", tmp_path / "grid"
    source.write_text(GRID_PROGRAM)
    subprocess.run(["c++", "-std=c++17", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    rows = {
        *range(1, 140, 5),
        16,
        32,
        48,
        64,
        128,
        *(64 * tiles + more for tiles in (1, 2, 7, 9, 33) for more in (0, 1)),
    }
    capacities = [*CAPACITIES.values(), *(schedule.ClusterCapacity(clusters) for clusters in UNUSUAL_CLUSTERS)]
    batch_sizes = (0, 1, 2, 3, 9, 12, 15, 16, 17, 20, 30, 31, 40, 70, 140, 24 * 1024)
    cases = list(itertools.product(batch_sizes, sorted(rows), (1, 3), capacities))
    # Requests times heads beyond 32 bits.
    cases += [(4, 1, 2**30, capacity) for capacity in capacities]
    given = "\n".join(" ".join(map(str, (*case, *capacity.num_clusters))) for *case, capacity in cases)
    process = subprocess.run([str(program)], input=given, capture_output=True, text=True, check=True)
    columns, *lines = process.stdout.splitlines()
    assert int(columns) == schedule.METADATA_COLUMNS and len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        assert list(map(int, line.split())) == grids_of(*case), case


def op_names() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.partition("::")[2] for name in names if name.startswith("flash_mla::")}


def test_schemas_are_defined_once():
    sources = {path: path.read_text() for path in (*CPP_FILES, *PACKAGE.rglob("*.py"))}
    definition = r"torch\.library\.Library\(|\bcustom_op\(|\bTORCH_LIBRARY(_FRAGMENT)?\(|\b(library|m)\.def\("
    assert [path.name for path, text in sources.items() if re.search(definition, text)] == ["ops.py"]
    for name in op_names():
        schema = rf"\b{name}\((Tensor (?!const)\w|\{{_)[^\n]*"
        found = [(path.name, hit[0]) for path, text in sources.items() for hit in re.finditer(schema, text)]
        assert [file for file, _ in found] == ["ops.py"], found


def test_every_op_has_a_cuda_implementation():
    implemented = re.findall(r'library\.impl\("(\w+)"', (CSRC / "bindings.cpp").read_text())
    assert sorted(implemented) == sorted(op_names())


def test_device_memory_comes_from_torch_only():
    """So that its allocator, its graphs and its statistics know of all of it."""
    allocation = r"\bcu(da)?(Malloc|MemAlloc|MemCreate|HostAlloc|MallocHost)\w*\s*\("
    for path in CPP_FILES:
        assert not re.search(allocation, path.read_text()), path


def test_nothing_ends_the_process():
    """Errors are raised: whoever serves thousands of requests decides what becomes of the process."""
    in_cpp = r"\b(_?exit|_Exit|quick_exit|abort|terminate|assert|__trap|CUTE_INVALID_CONTROL_PATH)\s*\("
    in_python = r"\b(_?exit|abort)\(|SystemExit"
    sources = [(path, in_cpp) for path in CPP_FILES] + [(path, in_python) for path in PACKAGE.rglob("*.py")]
    for path, pattern in sources:
        found = re.search(pattern, path.read_text())
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"
