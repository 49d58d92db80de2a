"""What the package says about itself: python -m flash_mla, is_available and the reason, other packages of its name."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flash_mla
from flash_mla import __main__ as report
from flash_mla import extension, ops

MISSING = ImportError("No module named 'flash_mla._C'")
BUILT = {
    "cuda": True,
    "reason": None,
    "arch": "sm_90a",
    "cuda_version": "13.0",
    "torch_version": torch.__version__,
    "cutlass_version": "4.2.0",
}
NOT_BUILT = {**BUILT, "cuda": False, "reason": "nvcc was not found", "cuda_version": None, "cutlass_version": None}


@pytest.fixture
def package_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(extension.read_build_info, "__defaults__", (tmp_path,))
    return tmp_path


def write_build_info(package_dir: Path, info: dict) -> None:
    (package_dir / extension.BUILD_INFO_FILE).write_text(json.dumps(info))


def fake_gpus(monkeypatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(extension, "_extension", extension.Extension(SimpleNamespace(), None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU{device}")


def test_the_command_prints_the_report():
    result = subprocess.run([sys.executable, "-m", "flash_mla"], capture_output=True, text=True, check=True)
    labels = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert labels[:7] == ["flash_mla", "kernels", "usable", "torch", "GPUs", "driver", "Python"]
    assert labels[7:9] == ["FLASH_MLA_CHECK", "FLASH_MLA_BATCH_INVARIANT"]
    assert flash_mla.__version__ in result.stdout and torch.__version__ in result.stdout


def test_kernels_that_are_built(package_dir):
    write_build_info(package_dir, BUILT)
    assert report.describe_kernels() == (f"built for sm_90a with CUDA 13.0, torch {torch.__version__}, CUTLASS 4.2.0")


def test_kernels_that_are_not_built(package_dir):
    write_build_info(package_dir, NOT_BUILT)
    assert report.describe_kernels() == "not built: nvcc was not found"


@pytest.mark.parametrize("content", [None, "{"], ids=["missing", "broken"])
def test_no_record_of_a_build(package_dir, content):
    if content is not None:
        (package_dir / extension.BUILD_INFO_FILE).write_text(content)
    assert "was not installed" in report.describe_kernels()


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (None, "flash_mla was imported from /source, where it was not installed (pip install .)"),
        (NOT_BUILT, "flash_mla was installed without CUDA kernels: nvcc was not found"),
        (BUILT, "the CUDA kernels were built but cannot be loaded (No module named 'flash_mla._C')"),
        (
            {**BUILT, "torch_version": "1.0"},
            f"the CUDA kernels were built with torch 1.0 and cannot be loaded with torch {torch.__version__} "
            "(No module named 'flash_mla._C')",
        ),
    ],
    ids=["source-tree", "left-out", "unloadable", "other-torch"],
)
def test_reason_for_a_missing_extension(info, reason):
    assert extension.explain_missing_extension(MISSING, info, Path("/source")) == reason


def test_available_with_one_sm_90_among_others(monkeypatch):
    fake_gpus(monkeypatch, (8, 0), (9, 0))
    assert flash_mla.is_available() and flash_mla.unavailable_reason() is None


def test_unavailable_on_other_gpus(monkeypatch):
    fake_gpus(monkeypatch, (8, 0), (10, 0))
    assert not flash_mla.is_available()
    assert flash_mla.unavailable_reason().endswith("this machine has GPU0 (sm_80), GPU1 (sm_100)")


def test_unavailable_without_a_gpu(monkeypatch):
    fake_gpus(monkeypatch)
    assert flash_mla.unavailable_reason() == "torch sees no CUDA GPU"
    assert extension.missing_kernels_reason() is None


def test_unavailable_with_a_torch_without_cuda(monkeypatch):
    fake_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = f"torch {torch.__version__} was built without CUDA"
    assert flash_mla.unavailable_reason() == extension.missing_kernels_reason() == reason


def test_unavailable_without_the_extension(monkeypatch):
    fake_gpus(monkeypatch, (9, 0))
    monkeypatch.setattr(extension, "_extension", extension.Extension(None, "not built"))
    assert not flash_mla.is_available()
    assert flash_mla.unavailable_reason() == extension.missing_kernels_reason() == "not built"
    # What CUDA tensors get then.
    with pytest.raises(RuntimeError, match="flash_mla has no kernels for CUDA tensors: not built"):
        ops._no_kernels()


def test_import_without_the_extension():
    """The package works on the CPU, says why not on the GPU, and tells so to callers with CUDA tensors."""
    code = (
        "import sys; sys.modules['flash_mla._C'] = None\n"
        "import flash_mla, torch\n"
        "assert not flash_mla.is_available() and flash_mla.unavailable_reason()\n"
        "metadata, num_splits = flash_mla.get_mla_decoding_metadata(torch.ones(2, dtype=torch.int32), 16, 1)\n"
        "assert metadata.shape == (132, 8)\n"
        "if torch.cuda.is_available():\n"
        "    try: flash_mla.get_mla_decoding_metadata(torch.ones(2, dtype=torch.int32, device='cuda'), 16, 1)\n"
        "    except RuntimeError as error: assert 'no kernels for CUDA tensors' in str(error)\n"
        "    else: raise AssertionError('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def fake_rival(monkeypatch, site_packages: Path) -> None:
    rival = SimpleNamespace(version="1.0.0", locate_file=lambda path: site_packages / path)
    monkeypatch.setattr(metadata, "distribution", lambda name: {"sgl-flash-mla": rival}[name])


def test_no_rival(monkeypatch, recwarn):
    def not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", not_found)
    assert extension.find_rival() is None
    extension.warn_of_rival()
    assert not recwarn


def test_rival_elsewhere(monkeypatch, tmp_path):
    fake_rival(monkeypatch, tmp_path)
    assert extension.find_rival().startswith("sgl-flash-mla 1.0.0 is installed too")
    with pytest.warns(RuntimeWarning, match=r"this is the flash_mla in .*, which comes first in sys\.path"):
        extension.warn_of_rival()
    assert dict(report.environment())["conflict"].startswith("sgl-flash-mla 1.0.0")


def test_rival_in_the_same_folder(monkeypatch):
    fake_rival(monkeypatch, extension.PACKAGE_DIR.parent)
    with pytest.warns(RuntimeWarning, match="the files of both are mixed"):
        extension.warn_of_rival()


@pytest.mark.gpu
def test_report_names_the_gpu():
    rows = dict(report.environment())
    assert rows["usable"] == "yes"
    assert torch.cuda.get_device_name(0) in rows["GPUs"] and "sm_90" in rows["GPUs"]


@pytest.mark.gpu
def test_extension_was_built_as_recorded():
    info = extension._extension.module.build_info()
    recorded = extension.read_build_info()
    assert (info["arch"], info["cuda"]) == (recorded["arch"], recorded["cuda_version"])
    assert recorded["torch_version"].startswith(info["torch"]) and info["cutlass"] == recorded["cutlass_version"]
