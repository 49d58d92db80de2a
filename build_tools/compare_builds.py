"""Says whether two builds hold the same machine code for the GPU, kernel by kernel.

    python -m build_tools.compare_builds FIRST SECOND

Each is an extension (_C*.so), an object file or a wheel. Files of two wheels that are not extensions have to be the
same byte for byte. Host code is not compared: nvcc puts names of temporary files into it, and the compiler the folders
of the build. That of the GPU follows from the sources, the flags and the compiler's release, all of which are pinned.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from build_tools.toolchain import DEFAULT_CUDA_HOME, PYPI_CUDA_VERSION, major_version, wheel_dirs

# In the mangled name of a kernel: the length of the part that stands for an unnamed namespace, in which hashes of paths
# and sometimes a process id are around the name of the file.
_UNNAMED_NAMESPACE = re.compile(r"(\d\d)(?=_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+_cu)_)")
# Of a wheel: the hashes of its files.
_RECORD = re.compile(r"[^/]+\.dist-info/RECORD")


def find_tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit, or of its wheels on PyPI."""
    folders = [str(each / "bin") for each in wheel_dirs(sys.path, major_version(PYPI_CUDA_VERSION))]
    if cuda_home := os.environ.get("CUDA_HOME"):
        folders.insert(0, str(Path(cuda_home, "bin")))
    folders += [os.environ.get("PATH", ""), str(DEFAULT_CUDA_HOME / "bin")]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(f"{name} is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def cuobjdump(file: Path, *options: str) -> str:
    # cuobjdump looks for nvdisasm on PATH.
    path = os.pathsep.join([str(Path(find_tool("nvdisasm")).parent), os.environ.get("PATH", "")])
    command = [find_tool("cuobjdump"), *options, str(file)]
    process = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    return process.stdout + process.stderr


def stable_name(kernel: str) -> str:
    """The mangled name without what is another in every build."""
    found = _UNNAMED_NAMESPACE.search(kernel)
    if found is None:
        return kernel
    end = found.end() + int(found.group(1))
    return f"{kernel[: found.start()]}({found.group(2)}){kernel[end:]}"


def machine_code(file: Path) -> dict[str, str]:
    """The instructions of every kernel, with their encoding, by the kernel's mangled name."""
    code: dict[str, list[str]] = {}
    current: list[str] = []
    for line in cuobjdump(file, "-sass").splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            current = code.setdefault(stable_name(function.group(1)), [])
        elif re.match(r"\s*/\*", line):
            current.append(line.strip())
    return {name: "\n".join(lines) for name, lines in code.items()}


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def contents(file: Path) -> dict[str, str]:
    """What a build consists of, and a digest of each part."""
    if file.suffix != ".whl":
        return {name: digest(code) for name, code in machine_code(file).items()}
    parts: dict[str, str] = {}
    with zipfile.ZipFile(file) as wheel, tempfile.TemporaryDirectory() as folder:
        for name in wheel.namelist():
            if name.endswith(".so"):
                parts |= contents(Path(wheel.extract(name, folder)))
            elif not _RECORD.fullmatch(name):
                parts[name] = digest(wheel.read(name))
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    options = parser.parse_args(arguments)
    first, second = contents(options.first), contents(options.second)
    if not first:
        print(f"error: {options.first} holds no machine code for a GPU", file=sys.stderr)
        return 2
    different = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    for name in {**first, **second}:
        mark = "differs" if name in different else "same"
        print(f"{mark:<8}{first.get(name, 'missing'):<18}{second.get(name, 'missing'):<18}{name}")
    print(f"{len(different)} of {len({**first, **second})} parts differ" if different else "the builds are the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
