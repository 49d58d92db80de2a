"""What the documents promise: the example runs, the commands and the named tests exist, the links resolve."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_mla

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_example_runs_as_it_stands(tmp_path):
    (example,) = code_blocks(ROOT / "README.md", "python")
    assert len([line for line in example.splitlines() if line]) <= 20
    script = tmp_path / "example.py"
    script.write_text(example)
    process = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{torch.Size([4, 1, 16, 512])} {torch.Size([4, 16, 1])}\n"


def test_example_gives_what_its_comments_say():
    (example,) = code_blocks(ROOT / "README.md", "python")
    names: dict[str, torch.Tensor] = {}
    exec(example, names)
    out, lse = names["out"], names["lse"]
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert (out[2] == 0).all() and torch.isposinf(lse[2]).all()
    assert torch.isfinite(lse[[0, 1, 3]]).all()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = document.read_text()
    named = re.findall(r"`make ([a-z]+)", text)
    for block in code_blocks(document, ""):
        named += re.findall(r"^make ([a-z]+)", block, re.MULTILINE)
    assert set(named) <= targets
    if document.name == "README.md":
        assert {"demo", "test", "bench"} <= set(named)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not re.match(r"https?://|#", target):
            assert (document.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_named_files_and_functions_exist(document):
    for name in re.findall(r"`([\w./]+)`", document.read_text()):
        if re.match(r"(flash_mla|csrc|tests|benchmarks|build_tools|docs|examples)/", name):
            assert (ROOT / name).exists(), name
        elif function := re.fullmatch(r"flash_mla\.(\w+)", name):
            assert hasattr(flash_mla, function.group(1)), name
    for function in re.findall(r"`flash_mla\.(\w+)\(", document.read_text()):
        assert hasattr(flash_mla, function), function


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_named_tests_exist(document):
    for file, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", document.read_text()):
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_every_reported_bug_is_in_the_document_on_reliability():
    text = (ROOT / "docs" / "reliability.md").read_text()
    for name in re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_reported_bugs.py").read_text(), re.MULTILINE):
        assert f"`tests/test_reported_bugs.py::{name}`" in text, name


def test_version_is_in_the_changelog():
    assert f"## [{flash_mla.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
