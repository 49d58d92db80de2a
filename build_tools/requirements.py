"""Prints what has to be installed to build the package, and with `--extra NAME` what an extra of it needs.

    python -m build_tools.requirements --extra test > requirements.txt

The lists are those of pyproject.toml; the CUDA compiler's wheels are left out where there is a toolkit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from build_tools.toolchain import PYPI_NVCC_PACKAGES, needs_pypi_nvcc

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PROJECT_ROOT = Path(__file__).resolve().parents[1]


def requirements(extras: list[str]) -> list[str]:
    pyproject = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
    listed = list(pyproject["build-system"]["requires"])
    if not needs_pypi_nvcc():
        listed = [each for each in listed if not each.startswith(PYPI_NVCC_PACKAGES)]
    for extra in extras:
        listed += pyproject["project"]["optional-dependencies"][extra]
    return listed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="print the build requirements, one per line")
    parser.add_argument("--extra", action="append", default=[], help="also those of this extra")
    print("\n".join(requirements(parser.parse_args().extra)))
