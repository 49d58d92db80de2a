"""`make faults`: the patches fit the kernels, are planted one at a time, and what the tools say of them is judged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sanitized_cases import APPEND_CASES, CASES

from build_tools import planted_faults, sanitize
from build_tools.planted_faults import FOLDER, read_fault

ROOT = Path(__file__).resolve().parents[1]
PATCHES = sorted(FOLDER.glob("*.patch"))
EXTENSION = "_C.cpython-312-x86_64-linux-gnu.so"


def test_memory_and_synchronisation_are_both_spoiled():
    assert {read_fault(path).tool for path in PATCHES} == {"memcheck", "racecheck"}


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_patch_applies(path):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    process = subprocess.run(["git", "apply", "--check", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    fault = read_fault(path)
    known = [*(case.name for case in CASES), *(f"append, {case.name}" for case in APPEND_CASES)]
    assert fault.tool in sanitize.TOOLS and set(fault.cases) <= set(known)
    re.compile(fault.says)


def test_patch_without_its_first_lines_is_refused(tmp_path, capsys):
    patch = tmp_path / "a.patch"
    patch.write_text("Tool: memcheck\n\ndiff --git a/x b/x\nCase: of the patch itself\n")
    with pytest.raises(SystemExit):
        planted_faults.main([str(patch)])
    assert "lacks What is wrong, Case, Says" in capsys.readouterr().err


@pytest.fixture
def pretend_sanitizer(tmp_path, monkeypatch):
    """Prints a report and ends with a status; the Python that it should start does not run."""

    def write(report: str, status: int) -> None:
        program = tmp_path / "bin" / "compute-sanitizer"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho \"$@\"\ncat <<'END'\n{report}\nEND\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_HOME", raising=False)

    return write


@pytest.fixture
def builds(tmp_path):
    """A folder as --builds leaves it."""
    for path in PATCHES:
        folder = tmp_path / "builds" / path.stem
        folder.mkdir(parents=True)
        (folder / EXTENSION).write_text(path.stem)
    return tmp_path / "builds"


FOUND = """========= Invalid __global__ read of size 4 bytes
=========     at kernel+0x10 in load_cursor.h:38
=========     by thread (32,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error"""


@pytest.mark.parametrize(
    ("report", "status", "found"), [(FOUND, 1, True), (FOUND, 0, False), ("RuntimeError: Invalid", 1, False)]
)
def test_found_is_what_is_reported_and_fails(pretend_sanitizer, builds, tmp_path, capsys, report, status, found):
    pretend_sanitizer(report, status)
    name = "block-table-read-past-its-end"
    arguments = [name, "--builds", str(builds), "--logs", str(tmp_path / "logs")]
    assert planted_faults.main(arguments) == (0 if found else 1)
    printed = capsys.readouterr().out
    assert printed.endswith(f"{name}: {'found' if found else 'NOT FOUND'} by memcheck\n")
    assert ("\n    at kernel+0x10 in load_cursor.h:38\n" in printed) == (report == FOUND)
    log = (tmp_path / "logs" / f"{name}.txt").read_text()
    assert report in log and "--tool memcheck" in log and "sanitized_cases.py --case whole tiles" in log


def test_each_fault_runs_with_its_own_extension(builds, monkeypatch, tmp_path):
    """In the copy: this checkout keeps what it has."""
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "flash_mla").iterdir()}
    trees = set()
    tree = tmp_path / "tree"
    planted_faults.copy_sources(tree)
    assert not list(tree.glob("**/*.so")) and not (tree / ".git").exists()
    for path in PATCHES:
        fault = read_fault(path)
        extension = planted_faults.find_extension(fault, tree, builds)
        monkeypatch.setattr(
            planted_faults.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess([], 0)
        )
        planted_faults.watch(fault, tree, extension)
        (loaded,) = (tree / "flash_mla").glob("_C*.so")
        trees.add(loaded.read_text())
    assert trees == {path.stem for path in PATCHES}
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "flash_mla").iterdir()}


@pytest.mark.skipif(shutil.which("git") is None, reason="patches are applied by git")
def test_built_once_with_the_fault_alone(tmp_path, monkeypatch):
    tree, builds = tmp_path / "tree", tmp_path / "builds"
    planted_faults.copy_sources(tree)
    run = subprocess.run
    built = []

    def changed_files():
        paths = (path.relative_to(tree) for path in (tree / "csrc").rglob("*") if path.is_file())
        return [path.as_posix() for path in paths if (tree / path).read_bytes() != (ROOT / path).read_bytes()]

    def build(command, cwd, **options):
        if command[0] == "git":
            return run(command, cwd=cwd, **options)
        built.append(changed_files())
        (tree / "flash_mla" / EXTENSION).write_text(str(built[-1]))
        return None

    monkeypatch.setattr(planted_faults.subprocess, "run", build)
    for _ in range(2):
        for path in PATCHES:
            planted_faults.find_extension(read_fault(path), tree, builds)
    assert built == [re.findall(r"^\+\+\+ b/(.*)$", path.read_text(), re.MULTILINE) for path in PATCHES]
    assert changed_files() == []
    assert sorted(path.name for path in builds.iterdir()) == [path.stem for path in PATCHES]


def test_missing_sanitizer_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "DEFAULT_CUDA_HOME", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert planted_faults.main([]) == 2
    assert "compute-sanitizer was not found" in capsys.readouterr().err


def test_a_build_alone_needs_a_folder(capsys):
    with pytest.raises(SystemExit):
        planted_faults.main(["--build-only"])
    assert "--build-only: needs --builds" in capsys.readouterr().err
