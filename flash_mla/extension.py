"""Loads the compiled module flash_mla._C, and knows why the CUDA kernels cannot run where they cannot."""

from __future__ import annotations

import importlib
import json
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

PACKAGE_DIR = Path(__file__).resolve().parent
BUILD_INFO_FILE = "_build_info.json"
COMPUTE_CAPABILITY = (9, 0)
# Another distribution with this import name.
RIVAL_DISTRIBUTION = "sgl-flash-mla"


class Extension(NamedTuple):
    """The compiled module, or why there is none."""

    module: ModuleType | None
    problem: str | None


def load_extension() -> Extension:
    """Import flash_mla._C, which gives the ops their CUDA implementations. Their schemas have to be defined before."""
    global _extension
    build_info = read_build_info()
    try:
        _extension = Extension(importlib.import_module("flash_mla._C"), None)
    except ImportError as error:
        _extension = Extension(None, explain_missing_extension(error, build_info))
    return _extension


def loaded_module() -> ModuleType | None:
    """flash_mla._C, None where there is none."""
    return _extension.module


def read_build_info(package_dir: Path = PACKAGE_DIR) -> dict[str, bool | str | None] | None:
    """What setup.py recorded: cuda (bool), reason, arch, cuda_version, torch_version, cutlass_version; None without a
    record, as in a source tree that was never installed."""
    try:
        return json.loads((package_dir / BUILD_INFO_FILE).read_text())
    except (OSError, ValueError):
        return None


def explain_missing_extension(
    error: ImportError, build_info: dict[str, bool | str | None] | None, package_dir: Path = PACKAGE_DIR
) -> str:
    """One sentence that says why flash_mla._C could not be imported, and where that can be told, what to do."""
    if build_info is None:
        return f"flash_mla was imported from {package_dir}, where it was not installed (pip install .)"
    if not build_info.get("cuda"):
        return f"flash_mla was installed without CUDA kernels: {build_info.get('reason')}"
    built_with = build_info.get("torch_version")
    if built_with != torch.__version__:
        return (
            f"the CUDA kernels were built with torch {built_with} and cannot be loaded with torch {torch.__version__} "
            f"({error})"
        )
    return f"the CUDA kernels were built but cannot be loaded ({error})"


def missing_kernels_reason() -> str | None:
    """Why this process could use the CUDA kernels on no GPU at all, in one sentence; None if it could.

    Looks at what is installed, not for GPUs: CUDA is not initialized.
    """
    if _extension.module is None:
        return _extension.problem
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None


def unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot run here, in one sentence; None if they can.

    Initializes CUDA if the kernels are there and torch sees a GPU.
    """
    if (reason := missing_kernels_reason()) is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    names = []
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability == COMPUTE_CAPABILITY:
            return None
        major, minor = capability
        names.append(f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})")
    return f"the CUDA kernels need an sm_90 GPU (H100, H200, H800, H20), this machine has {', '.join(names)}"


def is_available() -> bool:
    """Whether the CUDA kernels are built, and at least one GPU here can run them. CPU tensors work regardless."""
    return unavailable_reason() is None


def find_rival() -> str | None:
    """Describes an installed sgl-flash-mla, which has the same import name; None if there is none."""
    try:
        rival = metadata.distribution(RIVAL_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    found = f"{RIVAL_DISTRIBUTION} {rival.version} is installed too and has the same import name, flash_mla"
    if Path(str(rival.locate_file("flash_mla"))).resolve() == PACKAGE_DIR:
        return (
            f"{found}: the files of both are mixed in {PACKAGE_DIR}; uninstall both, then install one of them "
            "(or, for SGLang, both: docs/serving.md)"
        )
    return f"{found}: this is the flash_mla in {PACKAGE_DIR}, which comes first in sys.path"


def warn_of_rival() -> None:
    if rival := find_rival():
        warnings.warn(rival, RuntimeWarning, stacklevel=3)


_extension = Extension(None, "the ops of flash_mla are not loaded")
