"""`make sanitize`: its cases take every way through the kernels, and its filter has the names of all of them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import sanitized_cases
import segments
import torch
from plans import CAPACITIES
from sanitized_cases import (
    ALL_CASES,
    APPEND_CASES,
    CASES,
    INVARIANT_CASES,
    INVARIANT_ROUTES,
    ROUTES,
    SWAPPED_CASES,
    invariant_routes_of,
    routes_of,
)

from build_tools import sanitize

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "kernels"


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=map(str, CAPACITIES))
def test_cases_take_every_way(capacity):
    taken: set[str] = set()
    for case in CASES:
        taken |= routes_of(case, capacity)
    assert taken == ROUTES


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=map(str, CAPACITIES))
def test_invariant_cases_take_every_way(capacity):
    taken: set[str] = set()
    for case in INVARIANT_CASES:
        taken |= invariant_routes_of(case, capacity)
    assert taken == INVARIANT_ROUTES


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=map(str, CAPACITIES))
def test_racecheck_follows_the_dense_kernel_and_its_combine(capacity):
    """Workers of the swapped kernel have more blocks than it has stages, but for one case."""
    followed = [case for case in INVARIANT_CASES if sanitized_cases.is_followed_by_racecheck(case, capacity)]
    assert [case.name for case in followed] == [
        case.name for case in INVARIANT_CASES if not case.grid(capacity).is_swapped or "two segments" in case.name
    ]
    taken = {way for case in followed for way in invariant_routes_of(case, capacity)}
    assert {way for way in INVARIANT_ROUTES if way.startswith("dense")} <= taken


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=map(str, CAPACITIES))
def test_cases_run_the_kernel_they_are_for(capacity):
    assert [case.name for case in CASES if case.grid(capacity).is_swapped] == [case.name for case in SWAPPED_CASES]


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=map(str, CAPACITIES))
def test_racecheck_follows_clusters_of_all_sizes(capacity):
    followed = [case for case in SWAPPED_CASES if sanitized_cases.is_followed_by_racecheck(case, capacity)]
    assert {case.split_ctas for case in followed if case.num_rows_per_head_kv == 16} >= {16, 8, 6, 5, 4, 3, 2, 1}
    assert {case.grid(capacity).split_ctas for case in followed if case.num_rows_per_head_kv == 32} == {8}


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("kNumStages", "sm90/dense_decode/traits.h", sanitized_cases.NUM_STAGES["dense"]),
        ("kNumStages", "sm90/swapped_decode/traits.h", sanitized_cases.NUM_STAGES["swapped"]),
        ("kCapacity", "sm90/dense_decode/piece_queue.h", sanitized_cases.QUEUE_CAPACITY),
        ("kMostUnshared", "split_kv_combine/split_kv_combine.cu", sanitized_cases.MOST_UNSHARED),
    ],
)
def test_sizes_are_those_of_the_kernel(name, file, expected):
    assert re.search(rf"constexpr u?int(?:32_t)? {name} = (\d+);", (KERNELS / file).read_text())[1] == str(expected)


def test_shares_are_those_of_the_combine_of_granules():
    source = (KERNELS / "split_kv_combine/granule_combine.cu").read_text()
    found = dict(re.findall(r"using (\w+)Share = Share<.*, (\d+, \d+)>;", source))
    assert found == {
        "Fine": ", ".join(map(str, segments.FINE_SHARE)),
        "Coarse": ", ".join(map(str, segments.COARSE_SHARE)),
    }


def test_divisions_are_those_of_the_combine():
    source = (KERNELS / "split_kv_combine/split_kv_combine.cu").read_text()
    found: dict[str, list[sanitized_cases.Division]] = {"Packed": [], "Float": []}
    chosen = r"(\w+)Numbers, Division<(?:void|Portion<(\d+), (\d+)>), (\d+), (\d+)>>"
    for numbers, parts, pieces, shared, ctas_per_sm in re.findall(chosen, source):
        columns = (int(parts), int(pieces)) if parts else None
        found[numbers].append(sanitized_cases.Division(columns, int(shared), int(ctas_per_sm)))
    assert {"dense": tuple(found["Packed"]), "swapped": tuple(found["Float"])} == sanitized_cases.DIVISIONS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name.replace(" ", "-").replace(",", ""))
def test_case(device, case, dtype):
    """As they are run there, but unwatched."""
    sanitized_cases.run(case, dtype, device)


@pytest.mark.parametrize("case", APPEND_CASES, ids=lambda case: case.name.replace(" ", "-").replace(",", ""))
def test_append_case(device, case):
    sanitized_cases.run_append(case, device)


def test_filter_has_the_names_of_all_kernels():
    sources = "\n".join(path.read_text() for path in KERNELS.rglob("*.cu*"))
    kernels = re.findall(r"__global__ void (?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(", sources)
    assert len(kernels) == sources.count("__global__")
    for kernel in kernels:
        assert re.search(sanitize.OWN_KERNELS, kernel), kernel


def pretend_sanitizer(folder: Path, script: str) -> None:
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("failing", ["", "racecheck", "initcheck"])
def test_every_tool_runs_and_a_failure_is_reported(failing, tmp_path, monkeypatch, capfd):
    """All tools, also after one that failed."""
    pretend_sanitizer(
        tmp_path,
        f'echo "ran $2 $PYTORCH_NO_CUDA_MEMORY_CACHING"\ncase "$2" in {failing or "none"}) exit 1;; esac',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert sanitize.main([]) == (1 if failing else 0)
    output = capfd.readouterr().out
    assert re.findall(r"ran (\w+) 1", output) == list(sanitize.TOOLS)
    assert output.endswith(f"failed: {failing}\n" if failing else "clean: memcheck, racecheck, synccheck, initcheck\n")


def test_missing_sanitizer_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "DEFAULT_CUDA_HOME", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert sanitize.main(["memcheck"]) == 2
    assert "compute-sanitizer was not found" in capsys.readouterr().err


@pytest.mark.parametrize("name", [CASES[0].name, f"append, {APPEND_CASES[0].name}"])
def test_one_case(name, tmp_path, monkeypatch, capfd):
    """The name comes through to the cases, of which only that one runs."""
    pretend_sanitizer(tmp_path, 'while [ "$1" != --case ]; do shift; done; echo "case $2"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert sanitize.main(["racecheck", "--case", name]) == 0
    assert f"\ncase {name}\n" in capfd.readouterr().out
    assert sanitized_cases.main(["--device", "cpu", "--case", name]) == 0
    ran = capfd.readouterr().out.splitlines()
    assert ran and all(re.fullmatch(rf"{name}(, \w+)?: ok", line) for line in ran)


def test_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        sanitized_cases.main(["--device", "cpu", "--case", "nothing"])
    assert "--case: must be one of whole tiles; " in capsys.readouterr().err


def test_command_watches_our_kernels_with_this_python():
    for tool in sanitize.TOOLS:
        command = sanitize.command("compute-sanitizer", tool)
        python = command.index(sys.executable)
        assert command[0] == "compute-sanitizer"
        assert command[python + 2 :] == (["--for-racecheck"] if tool == "racecheck" else [])
        options = dict(zip(command[1:python:2], command[2:python:2], strict=True))
        assert options["--tool"] == tool and options["--kernel-name"] == f"regex={sanitize.OWN_KERNELS}"
        assert options["--error-exitcode"] == "1"
