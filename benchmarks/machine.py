"""What a result needs beside its numbers: GPU, clocks, versions and the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


class GpuMonitor:
    """Clock and power of the current GPU through NVML; None where NVML or its Python package is missing."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            self._nvml = pynvml
        except Exception:
            # Timings are as good without a clock reading, whatever the reason that there is none.
            self._nvml = None

    def _read(self, function: str, *arguments: Any) -> Any:
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def sm_clock_mhz(self) -> int | None:
        return self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM) if self._nvml else None

    def power_w(self) -> float | None:
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def limits(self) -> dict[str, Any]:
        if self._nvml is None:
            return {}
        power_limit = self._read("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "max_sm_clock_mhz": self._read("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
            "power_limit_w": None if power_limit is None else power_limit / 1e3,
            "driver": self._nvml.nvmlSystemGetDriverVersion(),
        }


def describe_gpu(monitor: GpuMonitor) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "num_sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        **monitor.limits(),
    }


def describe_versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def package_version(*names: str) -> str:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def current_commit() -> str:
    """FLASH_MLA_COMMIT where the checkout carries no history, else what git says; `+` marks uncommitted changes."""
    if os.environ.get("FLASH_MLA_COMMIT"):
        return os.environ["FLASH_MLA_COMMIT"]
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
