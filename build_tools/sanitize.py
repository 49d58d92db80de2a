"""Runs tests/sanitized_cases.py under the tools of compute-sanitizer, which watch the kernels of this package only.

    python -m build_tools.sanitize [memcheck | racecheck | synccheck | initcheck ...] [--case "whole tiles" ...]

All four, and all cases, without arguments. Needs an sm_90 GPU, the built kernels, and compute-sanitizer of a CUDA 13
toolkit, in CUDA_HOME, on PATH or in /usr/local/cuda.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from build_tools.toolchain import DEFAULT_CUDA_HOME

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")

# A regular expression for the names of the kernels of this package; tests hold it to the sources.
OWN_KERNELS = "dense_decode|swapped_decode|split_kv_combine|granule_combine|decode_schedule|granule_schedule|append_kv"
# More than any CTA of them has.
NUM_CUDA_BARRIERS = 64
NOT_FOUND = "compute-sanitizer was not found in CUDA_HOME, on PATH or in /usr/local/cuda"


def command(sanitizer: str, tool: str, cases: Sequence[str] = (), print_limit: int = 0) -> list[str]:
    """The sanitizer, its options, this Python, what it runs; a print limit of 0 is none."""
    options = [
        *("--tool", tool),
        *("--kernel-name", f"regex={OWN_KERNELS}"),
        *("--error-exitcode", "1"),
        *("--print-limit", str(print_limit)),
        *("--num-cuda-barriers", str(NUM_CUDA_BARRIERS)),
    ]
    if tool == "racecheck":
        options += ["--racecheck-report", "all"]
    program = [sys.executable, str(ROOT / "tests" / "sanitized_cases.py")]
    selection = [argument for case in cases for argument in ("--case", case)]
    if tool == "racecheck":
        selection.append("--for-racecheck")
    return [sanitizer, *options, *program, *selection]


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """With an allocation for every tensor, so that what lies beyond its end is nobody's."""
    path = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    return {**environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}


def find_sanitizer(environ: Mapping[str, str] = os.environ) -> str | None:
    homes = [environ.get("CUDA_HOME"), str(DEFAULT_CUDA_HOME)]
    in_homes = [str(Path(home, "bin")) for home in homes if home]
    folders = [*in_homes[:-1], environ.get("PATH", ""), in_homes[-1]]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="tool", help="|".join(TOOLS))
    parser.add_argument("--case", dest="cases", action="append", default=[], metavar="NAME", help="one of the cases")
    parser.add_argument("--print-limit", type=int, default=0, metavar="N", help="reports to print; 0: all")
    options = parser.parse_args(arguments)
    tools = options.tools or list(TOOLS)
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        parser.error(f"tool must be one of {', '.join(TOOLS)}, got {unknown[0]}")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(f"error: {NOT_FOUND}", file=sys.stderr)
        return 2
    failed = []
    for tool in tools:
        tool_command = command(sanitizer, tool, options.cases, options.print_limit)
        print(f"{tool}: {shlex.join(tool_command)}", flush=True)
        begin = time.monotonic()
        process = subprocess.run(tool_command, cwd=ROOT, env=environment())
        if process.returncode != 0:
            failed.append(tool)
        result = "clean" if process.returncode == 0 else f"failed with {process.returncode}"
        print(f"{tool}: {result} after {time.monotonic() - begin:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"clean: {', '.join(tools)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
