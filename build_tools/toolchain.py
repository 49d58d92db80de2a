"""Decides whether the CUDA kernels can be built here, and with what.

The CUDA compiler comes from the first of these places where it belongs to the same CUDA major version as torch:
the environment variable CUDA_HOME, the nvcc on PATH, /usr/local/cuda, and the nvcc wheels of PyPI. Where none has it,
`plan_build` says why in one line. Only the standard library is imported here, torch excepted, and that only by
`plan_build`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ARCH = "sm_90a"
DEFAULT_MAX_JOBS = 4  # each nvcc of a CuTe kernel takes a few GB of memory

# The wheels that hold the CUDA compiler and the headers it goes with. All must have the same minor version: a newer
# nvvm emits PTX that an older ptxas rejects, and the headers reject another compiler. pyproject.toml pins releases of
# PYPI_CUDA_VERSION, which is that of the torch release required there.
PYPI_CUDA_VERSION = "13.0"
PYPI_NVCC_PACKAGES = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
DEFAULT_CUDA_HOME = Path("/usr/local/cuda")


class ToolchainError(Exception):
    """Something that the kernels need is missing or does not fit; the message is one line."""


@dataclass(frozen=True)
class CudaToolchain:
    """A CUDA compiler with the headers and the runtime library that belong to it."""

    nvcc: Path
    home: Path
    version: str
    include_dirs: tuple[Path, ...]
    library_dirs: tuple[Path, ...]

    @property
    def major(self) -> str:
        return major_version(self.version)

    @property
    def runtime_library(self) -> str:
        """File name of the CUDA runtime that torch has loaded too. The wheels have no libcudart.so beside it."""
        return f"libcudart.so.{self.major}"


@dataclass(frozen=True)
class BuildPlan:
    """What setup.py is going to build. The kernels are left out where `reason` says why."""

    required: bool
    reason: str | None = None
    cuda: CudaToolchain | None = None
    cutlass_include_dir: Path | None = None
    cutlass_version: str | None = None
    torch_version: str | None = None

    def summary(self) -> str:
        if self.cuda is None:
            return f"flash_mla: building without CUDA kernels: {self.reason}"
        return f"flash_mla: building CUDA kernels for {ARCH} with nvcc {self.cuda.version} ({self.cuda.nvcc})"

    def build_info(self) -> dict[str, bool | str | None]:
        """The contents of flash_mla/_build_info.json, from which the package explains later why kernels are missing."""
        return {
            "cuda": self.cuda is not None,
            "reason": self.reason,
            "arch": ARCH,
            "cuda_version": self.cuda.version if self.cuda else None,
            "torch_version": self.torch_version,
            "cutlass_version": self.cutlass_version,
        }


def plan_build(environ: Mapping[str, str] = os.environ) -> BuildPlan:
    """Look for everything that the kernels need. FLASH_MLA_CUDA=0 leaves them out; =1 makes a `reason` an error."""
    choice = environ.get("FLASH_MLA_CUDA", "").strip() or "auto"
    if choice not in ("auto", "0", "1"):
        raise ToolchainError(f"FLASH_MLA_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return BuildPlan(required=False, reason="FLASH_MLA_CUDA=0 was set when the package was installed")
    torch_version = None
    try:
        torch_version, torch_cuda_version = find_torch()
        cuda = find_cuda(torch_cuda_version, environ)
        cutlass_include_dir = find_cutlass_include_dir()
        require_host_tools(environ)
    except ToolchainError as error:
        return BuildPlan(required=choice == "1", reason=str(error), torch_version=torch_version)
    return BuildPlan(
        required=choice == "1",
        cuda=cuda,
        cutlass_include_dir=cutlass_include_dir,
        cutlass_version=read_cutlass_version(cutlass_include_dir),
        torch_version=torch_version,
    )


def find_torch() -> tuple[str, str]:
    """The versions of torch and of the CUDA that it was built with."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ToolchainError(f"torch cannot be imported ({error})") from error
    if torch.version.cuda is None:
        raise ToolchainError(f"torch {torch.__version__} was built without CUDA")
    return str(torch.__version__), str(torch.version.cuda)


def find_cuda(
    torch_cuda_version: str,
    environ: Mapping[str, str] = os.environ,
    search_path: Sequence[str] | None = None,
    default_home: Path = DEFAULT_CUDA_HOME,
) -> CudaToolchain:
    """The first CUDA compiler that fits torch, or a ToolchainError that says what was wrong with each."""
    search_path = sys.path if search_path is None else search_path
    problems = []
    for origin, nvcc in nvcc_candidates(environ, search_path, major_version(torch_cuda_version), default_home):
        try:
            return inspect_nvcc(nvcc, torch_cuda_version, search_path)
        except ToolchainError as error:
            problems.append(f"{origin}: {error}")
    wanted = f"no nvcc of CUDA {major_version(torch_cuda_version)} (the version of torch) was found"
    raise ToolchainError("; ".join([wanted, *problems]))


def nvcc_candidates(
    environ: Mapping[str, str], search_path: Sequence[str], cuda_major: str, default_home: Path
) -> Iterator[tuple[str, Path]]:
    if cuda_home := environ.get("CUDA_HOME"):
        yield "CUDA_HOME", Path(cuda_home) / "bin" / "nvcc"
    if on_path := shutil.which("nvcc", path=environ.get("PATH")):
        yield "PATH", Path(on_path)
    if default_home.is_dir():
        yield str(default_home), default_home / "bin" / "nvcc"
    for wheels in wheel_dirs(search_path, cuda_major):
        if (wheels / "bin" / "nvcc").exists():
            yield "PyPI", wheels / "bin" / "nvcc"


def wheel_dirs(search_path: Sequence[str], cuda_major: str) -> list[Path]:
    """Where the CUDA wheels of PyPI, torch's dependencies among them, put bin/, include/ and lib/."""
    dirs = (Path(entry or ".") / "nvidia" / f"cu{cuda_major}" for entry in search_path)
    return list(dict.fromkeys(each for each in dirs if each.is_dir()))


def inspect_nvcc(nvcc: Path, torch_cuda_version: str, search_path: Sequence[str]) -> CudaToolchain:
    """Ask nvcc for its version and its root, and check that what it needs is there."""
    if not nvcc.is_file():
        raise ToolchainError(f"{nvcc} does not exist")
    release = re.search(r"release (\d+\.\d+)", run_nvcc(nvcc, "--version"))
    if release is None:
        raise ToolchainError(f"{nvcc} --version names no release")
    version = release.group(1)
    if major_version(version) != major_version(torch_cuda_version):
        raise ToolchainError(f"{nvcc} is of CUDA {version}, torch of CUDA {torch_cuda_version}")

    # The nvcc on PATH may be a wrapper in another folder; nvcc itself knows its root.
    top = re.search(r"^#\$ TOP=(.*)$", run_nvcc(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    if top is None:
        raise ToolchainError(f"{nvcc} --dryrun names no root (TOP=)")
    home = Path(top.group(1).strip()).resolve()

    wheels = wheel_dirs(search_path, major_version(version))
    if home in [each.resolve() for each in wheels]:
        require_matching_wheels(home, version, torch_cuda_version)
    include_dirs = existing(home / "include", *(each / "include" for each in wheels))
    library_dirs = existing(home / "lib64", home / "lib", *(each / "lib" for each in wheels))
    toolchain = CudaToolchain(home / "bin" / "nvcc", home, version, include_dirs, library_dirs)
    for tool in (toolchain.nvcc, home / "nvvm" / "bin" / "cicc"):
        if not tool.is_file():
            raise ToolchainError(f"{tool} does not exist")
    for header in ("cuda_runtime.h", "crt/host_config.h", "cccl/cuda/std/utility"):
        if not any((each / header).is_file() for each in include_dirs):
            raise ToolchainError(f"no {header} in {home / 'include'}")
    if not any((each / toolchain.runtime_library).exists() for each in library_dirs):
        raise ToolchainError(f"no {toolchain.runtime_library} in {home / 'lib'}")
    return toolchain


def require_matching_wheels(home: Path, version: str, torch_cuda_version: str) -> None:
    """The compiler's wheels are separate packages; all must have the minor version of torch's headers."""
    site_packages = metadata.distributions(path=[str(home.parents[1])])
    installed = {str(dist.metadata["Name"]).lower(): dist.version for dist in site_packages}
    for package in PYPI_NVCC_PACKAGES:
        if package not in installed:
            raise ToolchainError(f"{package} is not installed beside nvcc {version}")
        if minor_version(installed[package]) != minor_version(torch_cuda_version):
            raise ToolchainError(f"{package} {installed[package]} does not fit torch's CUDA {torch_cuda_version}")


def run_nvcc(nvcc: Path, *arguments: str) -> str:
    try:
        command = [str(nvcc), *arguments]
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{nvcc} cannot be run ({error})") from error
    return process.stdout


def find_cutlass_include_dir() -> Path:
    spec = importlib.util.find_spec("cutlass_library")
    for package_dir in (spec.submodule_search_locations or ()) if spec else ():
        include_dir = Path(package_dir) / "source" / "include"
        if (include_dir / "cute" / "tensor.hpp").is_file():
            return include_dir
    raise ToolchainError("the CUTLASS headers are missing (pip install nvidia-cutlass==4.2.0.0)")


def read_cutlass_version(include_dir: Path) -> str:
    text = (include_dir / "cutlass" / "version.h").read_text()
    return ".".join(
        re.findall(rf"^#define CUTLASS_{part} (\d+)", text, re.MULTILINE)[0] for part in ("MAJOR", "MINOR", "PATCH")
    )


def require_host_tools(environ: Mapping[str, str] = os.environ) -> None:
    compiler = shlex.split(environ.get("CXX", "") or "c++")[0]
    if shutil.which(compiler, path=environ.get("PATH")) is None:
        raise ToolchainError(f"no C++ compiler was found ({compiler})")
    if find_ninja(environ) is None:
        raise ToolchainError("ninja is missing (pip install ninja)")


def find_ninja(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The ninja of the package of this name, else the one on PATH.

    In this order, so that every way to build takes the same one, whether or not the environment is activated: another
    version of ninja may not read the log of the last build, and then compiles everything again.
    """
    if importlib.util.find_spec("ninja") is not None:
        packaged = Path(importlib.import_module("ninja").BIN_DIR) / "ninja"
        if packaged.is_file():
            return packaged
    on_path = shutil.which("ninja", path=environ.get("PATH"))
    return Path(on_path) if on_path else None


def needs_pypi_nvcc(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether kernels are wanted and no CUDA toolkit can build them. Asked before torch is there."""
    if environ.get("FLASH_MLA_CUDA", "").strip() == "0":
        return False
    for _, nvcc in nvcc_candidates(environ, [], major_version(PYPI_CUDA_VERSION), DEFAULT_CUDA_HOME):
        try:
            inspect_nvcc(nvcc, PYPI_CUDA_VERSION, [])
        except ToolchainError:
            continue
        return False
    return True


def default_max_jobs() -> int:
    return min(len(os.sched_getaffinity(0)), DEFAULT_MAX_JOBS)


def existing(*dirs: Path) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(each for each in dirs if each.is_dir()))


def major_version(version: str) -> str:
    return version.split(".")[0]


def minor_version(version: str) -> str:
    return ".".join(version.split(".")[:2])
