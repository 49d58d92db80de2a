"""`python -m flash_mla` prints what a bug report needs."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from flash_mla import extension, interface, value_checks
from flash_mla._version import __version__

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def environment() -> list[tuple[str, str]]:
    """Pairs of a label and what it names."""
    rows = [
        ("flash_mla", f"{__version__} in {extension.PACKAGE_DIR}"),
        ("kernels", describe_kernels()),
        ("usable", "yes" if (reason := extension.unavailable_reason()) is None else f"no: {reason}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("GPUs", "; ".join(describe_gpus()) or "none"),
        ("driver", describe_driver()),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("FLASH_MLA_CHECK", "on" if value_checks.ENABLED else "off"),
        ("FLASH_MLA_BATCH_INVARIANT", "on" if interface.BATCH_INVARIANT else "off"),
    ]
    if rival := extension.find_rival():
        rows.append(("conflict", rival))
    return rows


def describe_kernels() -> str:
    """What setup.py built, as it recorded it."""
    info = extension.read_build_info()
    if info is None:
        return "not built: this is a source tree that was not installed (pip install .)"
    if not info.get("cuda"):
        return f"not built: {info.get('reason')}"
    return (
        f"built for {info.get('arch')} with CUDA {info.get('cuda_version')}, torch {info.get('torch_version')}, "
        f"CUTLASS {info.get('cutlass_version')}"
    )


def describe_gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    descriptions = []
    for device in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(device)
        descriptions.append(
            f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} SMs, {gpu.total_memory >> 30} GiB"
        )
    return descriptions


def describe_driver() -> str:
    try:
        return DRIVER_FILE.read_text().splitlines()[0].removeprefix("NVRM version:").strip()
    except (OSError, IndexError):
        return "not found"


def main() -> None:
    rows = environment()
    width = max(len(label) for label, _ in rows) + 2
    for label, text in rows:
        print(f"{label + ':':<{width}}{text}")


if __name__ == "__main__":
    main()
