"""Runs nvcc, passes its output on, and fails where ptxas reports what costs a kernel its speed.

    python checked_nvcc.py nvcc -Xptxas=-v,-warn-spills,-warn-lmem-usage ... -o kernel.o

These are spills and other uses of local memory, and the warnings C75xx: matrix instructions serialized, setmaxnreg
ignored.

FLASH_MLA_ALLOW_SPILLS=1 in the environment turns the refusal into a warning, for experiments. The object then stays,
also for later builds without the variable (`make clean` removes it), and tests/test_build.py still refuses it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_WARNING = re.compile(r"\bC75\d\d\b|spilled to local memory|local memory used", re.IGNORECASE)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def find_problems(lines: list[str]) -> list[str]:
    """The lines of ptxas' report that must not be there."""
    problems = []
    function = ""
    for line in lines:
        if "Function properties for" in line:
            function = line.rpartition(" ")[2]
        elif _WARNING.search(line):
            problems.append(line)
        elif (frame := _FRAME.search(line)) and any(int(size) for size in frame.groups()):
            problems.append(f"{function}: {frame.group(0)}")
    return problems


def output_file(command: list[str]) -> Path | None:
    return Path(command[command.index("-o") + 1]) if "-o" in command[:-1] else None


def main(command: list[str]) -> int:
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    problems = find_problems(lines)
    if process.returncode != 0 or not problems:
        return process.returncode
    if os.environ.get("FLASH_MLA_ALLOW_SPILLS") == "1":
        print(
            "warning: allowed by FLASH_MLA_ALLOW_SPILLS=1 despite what ptxas reports:",
            *problems,
            sep="\n  ",
            flush=True,
        )
        return 0
    # An object that stayed would pass for up to date in the next build.
    if output := output_file(command):
        output.unlink(missing_ok=True)
    print("error: refused because of what ptxas reports:", *problems, sep="\n  ", flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
