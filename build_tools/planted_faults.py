"""Shows that compute-sanitizer finds faults in the kernels: plants some, and runs build_tools/sanitize.py over each.

    python -m build_tools.planted_faults [name | file.patch ...]

Without arguments all of tests/planted_faults. Each is a patch that opens with what is wrong, the tool that is to find
it, the cases it is to find it in, and, as a regular expression, what the tool is to say. Faults are planted and built
in a copy of this source tree, one after the other. Needs what the sanitizers and a build need, and git.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from build_tools import sanitize

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "planted_faults"
NOT_COPIED = (".*", "build", "dist", "site", "__pycache__", "*.egg-info", "*.so", "_build_info.json")
EXTENSION = "_C.*.so"
# A tool repeats itself for every thread; this much is enough to see that it has found something.
PRINT_LIMIT = 20


@dataclass(frozen=True)
class PlantedFault:
    path: Path
    what: str
    tool: str
    cases: tuple[str, ...]
    says: str  # a regular expression for a line of the tool

    @property
    def name(self) -> str:
        return self.path.stem


def read_fault(path: Path) -> PlantedFault:
    """Raises ValueError for a patch without the lines that belong in front of it."""
    header = path.read_text().partition("\ndiff ")[0]
    fields: dict[str, list[str]] = {}
    for key, value in re.findall(r"^([A-Z][\w ]*): (.+)$", header, re.MULTILINE):
        fields.setdefault(key, []).append(value)
    keys = ("What is wrong", "Tool", "Case", "Says")
    if missing := [key for key in keys if key not in fields]:
        raise ValueError(f"{path} must begin with lines {', '.join(keys)}, but lacks {', '.join(missing)}")
    (what, *_), (tool, *_), cases, (says, *_) = (fields[key] for key in keys)
    return PlantedFault(path, what, tool, tuple(cases), says)


def copy_sources(target: Path) -> None:
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)


def apply_patch(patch: Path, tree: Path, *options: str) -> None:
    # A repository around the tree would be taken for the one that the patch is for.
    environ = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    subprocess.run(["git", "apply", *options, str(patch.resolve())], cwd=tree, env=environ, check=True)


@contextmanager
def planted(fault: PlantedFault, tree: Path) -> Iterator[None]:
    apply_patch(fault.path, tree)
    try:
        yield
    finally:
        apply_patch(fault.path, tree, "--reverse")


def build(fault: PlantedFault, tree: Path) -> Path:
    """The extension with the fault, whatever ptxas has to say of it."""
    environ = {**os.environ, "FLASH_MLA_CUDA": "1", "FLASH_MLA_ALLOW_SPILLS": "1"}
    with planted(fault, tree):
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, env=environ, stdout=subprocess.DEVNULL, check=True)
    (extension,) = (tree / "flash_mla").glob(EXTENSION)
    return extension


def find_extension(fault: PlantedFault, tree: Path, builds: Path | None) -> Path:
    """From the folder of builds where it is there, else built, and left there."""
    if builds is None:
        return build(fault, tree)
    folder = builds / fault.name
    if not any(folder.glob(EXTENSION)):
        print(f"{fault.name}: building", flush=True)
        built = build(fault, tree)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, folder)
    (extension,) = folder.glob(EXTENSION)
    return extension


def watch(fault: PlantedFault, tree: Path, extension: Path) -> tuple[int, str]:
    """Run the cases of a fault under its tool; returns the exit status and all that was printed."""
    for other in (tree / "flash_mla").glob(EXTENSION):
        if other != extension:
            other.unlink()
    if extension.parent != tree / "flash_mla":
        shutil.copy2(extension, tree / "flash_mla")
    cases = [argument for case in fault.cases for argument in ("--case", case)]
    command = [sys.executable, "-m", "build_tools.sanitize", fault.tool, *cases, "--print-limit", str(PRINT_LIMIT)]
    process = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process.returncode, process.stdout


def lines_that_say(fault: PlantedFault, output: str) -> list[str]:
    """The lines of the report that was expected: from the one that matches to the end of its paragraph."""
    lines = [line.removeprefix("=========").rstrip() for line in output.splitlines() if line.startswith("=========")]
    for index, line in enumerate(lines):
        if re.search(fault.says, line):
            end = next((i for i in range(index, len(lines)) if not lines[i]), len(lines))
            return [line.strip() for line in lines[index:end]]
    return []


def report(fault: PlantedFault, status: int, output: str) -> bool:
    """Print what the tool said; returns whether it found the fault."""
    print(f"{fault.name}: {fault.what}")
    said = lines_that_say(fault, output)
    found = bool(said) and status != 0
    for line in said:
        print(f"    {line}")
    print(f"{fault.name}: {'found' if found else 'NOT FOUND'} by {fault.tool}", flush=True)
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="fault", help="a name from tests/planted_faults, or a patch")
    parser.add_argument(
        "--builds", type=Path, metavar="FOLDER", help="take extensions from there, and leave there what is built"
    )
    parser.add_argument("--build-only", action="store_true", help="fill that folder and watch nothing")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="put all that the tools print there")
    options = parser.parse_args(arguments)
    if options.build_only and options.builds is None:
        parser.error("argument --build-only: needs --builds")
    paths = [Path(name) if name.endswith(".patch") else FOLDER / f"{name}.patch" for name in options.faults]
    try:
        options.faults = [read_fault(path) for path in paths or sorted(FOLDER.glob("*.patch"))]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if not options.build_only and sanitize.find_sanitizer() is None:
        print(f"error: {sanitize.NOT_FOUND}", file=sys.stderr)
        return 2
    not_found = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        copy_sources(tree)
        for fault in options.faults:
            extension = find_extension(fault, tree, options.builds)
            if options.build_only:
                continue
            status, output = watch(fault, tree, extension)
            if options.logs is not None:
                options.logs.mkdir(parents=True, exist_ok=True)
                (options.logs / f"{fault.name}.txt").write_text(output)
            if not report(fault, status, output):
                not_found.append(fault.name)
    return 1 if not_found else 0


if __name__ == "__main__":
    sys.exit(main())
