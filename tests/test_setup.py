"""Which CUDA compiler the build takes, what it says where there is none, and an installation without kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from build_tools import compare_builds, requirements, toolchain
from build_tools.toolchain import PYPI_CUDA_VERSION, PYPI_NVCC_PACKAGES, ToolchainError

ROOT = Path(__file__).resolve().parents[1]


def make_executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def make_toolkit(home: Path, version: str = "13.0", library_dir: str = "lib64") -> Path:
    """The outline of a CUDA toolkit: an nvcc that answers what the build asks it, and empty files for the rest."""
    make_executable(
        home / "bin" / "nvcc",
        f'case "$1" in\n--version) echo "Cuda compilation tools, release {version}, V{version}.88";;\n'
        f'--dryrun) echo "#\\$ TOP={home}/bin/..";;\nesac',
    )
    files = ("include/cuda_runtime.h", "include/crt/host_config.h", "include/cccl/cuda/std/utility", "nvvm/bin/cicc")
    for name in (*files, f"{library_dir}/libcudart.so.{version.split('.')[0]}"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    return home


def make_wheels(site_packages: Path, version: str = "13.0", package_versions: dict[str, str] | None = None) -> Path:
    """What the compiler's wheels leave in site-packages."""
    for package in PYPI_NVCC_PACKAGES:
        package_version = (package_versions or {}).get(package, f"{version}.88")
        info = site_packages / f"{package.replace('-', '_')}-{package_version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {package_version}\n")
    return make_toolkit(site_packages / "nvidia" / f"cu{version.split('.')[0]}", version, library_dir="lib")


@pytest.fixture
def find(tmp_path):
    """find_cuda for a torch of CUDA 13.0 on a machine that has nothing but what is named."""

    def find_cuda(torch_cuda_version="13.0", search_path=(), default_home=tmp_path / "nowhere", **environ):
        environ.setdefault("PATH", str(tmp_path / "nowhere"))
        return toolchain.find_cuda(torch_cuda_version, environ, list(map(str, search_path)), Path(default_home))

    return find_cuda


def test_cuda_home_comes_first(find, tmp_path):
    chosen, other = make_toolkit(tmp_path / "chosen"), make_toolkit(tmp_path / "other")
    cuda = find(CUDA_HOME=str(chosen), PATH=f"{other / 'bin'}:/usr/bin:/bin", default_home=other)
    assert cuda.nvcc == chosen / "bin" / "nvcc"
    assert cuda.version == "13.0"
    assert cuda.include_dirs == (chosen / "include",)
    assert cuda.library_dirs == (chosen / "lib64",)
    assert cuda.runtime_library == "libcudart.so.13"


def test_nvcc_on_path_may_be_a_wrapper_in_another_folder(find, tmp_path):
    home = make_toolkit(tmp_path / "toolkit")
    wrapper = make_executable(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    cuda = find(PATH=f"{wrapper.parent}:/usr/bin:/bin")
    assert cuda.home == home
    assert cuda.nvcc == home / "bin" / "nvcc"


def test_default_folder(find, tmp_path):
    home = make_toolkit(tmp_path / "toolkit")
    assert find(default_home=home).home == home


def test_newer_minor_version_of_a_toolkit_is_taken(find, tmp_path):
    home = make_toolkit(tmp_path / "toolkit", version="13.2")
    assert find(default_home=home).version == "13.2"


def test_unusable_toolkits_are_passed_over(find, tmp_path):
    old, new = make_toolkit(tmp_path / "old", version="12.4"), make_toolkit(tmp_path / "new")
    assert find(CUDA_HOME=str(old), default_home=new).home == new


def test_wheels_serve_where_there_is_no_toolkit(find, tmp_path):
    home = make_wheels(tmp_path / "site-packages")
    cuda = find(search_path=[tmp_path / "empty", tmp_path / "site-packages"])
    assert cuda.home == home
    assert cuda.library_dirs == (home / "lib",)


def test_toolkit_is_preferred_to_wheels(find, tmp_path):
    make_wheels(tmp_path / "site-packages")
    home = make_toolkit(tmp_path / "toolkit")
    assert find(search_path=[tmp_path / "site-packages"], default_home=home).home == home


@pytest.mark.parametrize("package", PYPI_NVCC_PACKAGES)
def test_wheels_of_mixed_versions_are_refused(find, tmp_path, package):
    make_wheels(tmp_path / "site-packages", package_versions={package: "13.1.5"})
    with pytest.raises(ToolchainError, match=rf"{package} 13\.1\.5 does not fit torch's CUDA 13\.0"):
        find(search_path=[tmp_path / "site-packages"])


def test_missing_wheel_is_named(find, tmp_path):
    make_wheels(tmp_path / "site-packages")
    shutil.rmtree(tmp_path / "site-packages" / "nvidia_nvvm-13.0.88.dist-info")
    with pytest.raises(ToolchainError, match="nvidia-nvvm is not installed beside nvcc"):
        find(search_path=[tmp_path / "site-packages"])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("bin/nvcc", "nvcc does not exist"),
        ("nvvm/bin/cicc", "cicc does not exist"),
        ("include/crt/host_config.h", "no crt/host_config.h"),
        ("include/cccl/cuda/std/utility", "no cccl/cuda/std/utility"),
        ("lib64/libcudart.so.13", "no libcudart.so.13"),
    ],
)
def test_incomplete_toolkit_says_what_is_missing(find, tmp_path, missing, message):
    home = make_toolkit(tmp_path / "toolkit")
    (home / missing).unlink()
    with pytest.raises(ToolchainError, match=message):
        find(CUDA_HOME=str(home))


def test_every_candidate_is_accounted_for_in_one_line(find, tmp_path):
    old = make_toolkit(tmp_path / "old", version="12.4")
    broken = make_executable(tmp_path / "bin" / "nvcc", "exit 3")
    with pytest.raises(ToolchainError) as refusal:
        find(CUDA_HOME=str(old), PATH=f"{broken.parent}:/usr/bin:/bin")
    message = str(refusal.value)
    assert "\n" not in message
    assert "no nvcc of CUDA 13 (the version of torch) was found" in message
    assert f"CUDA_HOME: {old}/bin/nvcc is of CUDA 12.4, torch of CUDA 13.0" in message
    assert f"PATH: {broken} --version names no release" in message


def test_compiler_wheels_are_needed_only_where_there_is_no_toolkit(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "DEFAULT_CUDA_HOME", tmp_path / "nowhere")
    nothing = {"PATH": str(tmp_path / "nowhere")}
    assert toolchain.needs_pypi_nvcc(nothing)
    assert not toolchain.needs_pypi_nvcc({**nothing, "FLASH_MLA_CUDA": "0"})
    assert not toolchain.needs_pypi_nvcc({**nothing, "CUDA_HOME": str(make_toolkit(tmp_path / "toolkit"))})
    assert toolchain.needs_pypi_nvcc({**nothing, "CUDA_HOME": str(make_toolkit(tmp_path / "old", version="12.4"))})


@pytest.mark.parametrize("needed", [True, False])
def test_requirements_of_the_build_and_of_extras(monkeypatch, needed):
    monkeypatch.setattr(requirements, "needs_pypi_nvcc", lambda: needed)
    listed = requirements.requirements(["test"])
    assert {"torch==2.11.0", "nvidia-cutlass==4.2.0.0"} <= set(listed)
    assert any(each.startswith("pytest") for each in listed)
    compilers = [each.partition(";")[0] for each in listed if each.startswith(PYPI_NVCC_PACKAGES)]
    # torch brings the headers of the runtime.
    expected = [package for package in PYPI_NVCC_PACKAGES if "runtime" not in package]
    assert [each.partition("==")[0] for each in compilers] == (expected if needed else [])
    assert all(each.partition("==")[2].startswith(f"{PYPI_CUDA_VERSION}.") for each in compilers)


def test_versions_are_pinned_where_they_decide_what_is_built(monkeypatch):
    """What is compiled or compiles is one release; for tools, and for what tests use, any of a range that ends."""
    monkeypatch.setattr(requirements, "needs_pypi_nvcc", lambda: True)
    tools = {"setuptools", "ninja"}
    for each in requirements.requirements([]):
        name, version = re.fullmatch(r"([\w-]+)([^;]*)(?:;.*)?", each).groups()
        pattern = r">=[\d.]+,<[\d.]+" if name in tools else r"==\d+(\.\d+)+"
        assert re.fullmatch(pattern, version), each
    for extra in ("test", "lint", "benchmark", "docs"):
        for each in set(requirements.requirements([extra])) - set(requirements.requirements([])):
            assert re.match(r"[\w-]+(==\d+(\.\d+)+|>=[\d.]+,<[\d.]+)(;|$)", each), each


def test_plan_without_kernels_on_request():
    plan = toolchain.plan_build({"FLASH_MLA_CUDA": "0"})
    assert plan.cuda is None and not plan.required
    expected = "flash_mla: building without CUDA kernels: FLASH_MLA_CUDA=0 was set when the package was installed"
    assert plan.summary() == expected
    assert plan.build_info()["cuda"] is False


@pytest.mark.parametrize(("choice", "required"), [("1", True), ("auto", False), ("", False)])
def test_plan_gives_the_reason_when_kernels_cannot_be_built(monkeypatch, choice, required):
    def find_no_torch():
        raise ToolchainError("torch cannot be imported (No module named 'torch')")

    monkeypatch.setattr(toolchain, "find_torch", find_no_torch)
    plan = toolchain.plan_build({"FLASH_MLA_CUDA": choice})
    assert plan.cuda is None
    assert plan.required is required
    assert plan.build_info()["reason"] == "torch cannot be imported (No module named 'torch')"


def test_unknown_choice_is_refused():
    with pytest.raises(ToolchainError, match="FLASH_MLA_CUDA must be 0, 1 or auto, got 'yes'"):
        toolchain.plan_build({"FLASH_MLA_CUDA": "yes"})


def test_missing_host_compiler_is_named(tmp_path):
    with pytest.raises(ToolchainError, match=r"no C\+\+ compiler was found \(g\+\+-99\)"):
        toolchain.require_host_tools({"CXX": "g++-99 -m64", "PATH": str(tmp_path)})


@pytest.fixture
def source_copy(tmp_path):
    """The package's sources without anything built from them, to build there."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for folder in ("flash_mla", "build_tools", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    return copy


def run_pip(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True)


WHEEL_OPTIONS = ("wheel", "--verbose", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", "wheels", ".")


@pytest.fixture
def environment(tmp_path) -> Path:
    """The python of a virtual environment that has nothing installed."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


def run_without_kernels(python: Path) -> subprocess.CompletedProcess[str]:
    """Import the package in an environment that borrows torch from this one, but no editable installation."""
    program = "import flash_mla; print(flash_mla.__file__, flash_mla.is_available(), flash_mla.unavailable_reason())"
    environ = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1])}
    command = [str(python), "-c", program]
    return subprocess.run(command, cwd=python.parent, env=environ, capture_output=True, text=True)


def test_wheel_without_kernels(source_copy, environment, tmp_path):
    process = run_pip(*WHEEL_OPTIONS, cwd=source_copy, FLASH_MLA_CUDA="0")
    output = process.stdout + process.stderr
    assert process.returncode == 0, output
    reason = "flash_mla: building without CUDA kernels: FLASH_MLA_CUDA=0 was set when the package was installed"
    assert output.count(reason) == 1

    (wheel,) = (source_copy / "wheels").glob("flash_mla-*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"flash_mla/__init__.py", "flash_mla/py.typed", "flash_mla/_build_info.json"} <= set(names)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flash_mla").rglob("*.py")}
    assert modules <= set(names)
    assert not [name for name in names if name.endswith((".so", ".cu", ".cpp"))]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"flash_mla"}

    # Installed apart from the sources, and once more over itself, the package runs and knows why it has no kernels.
    site_packages = environment.parents[1] / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    for options in ([], ["--force-reinstall"]):
        install = ("--python", str(environment), "install", "--no-deps", "--no-index", *options, str(wheel))
        process = run_pip(*install, cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        process = run_without_kernels(environment)
        assert process.returncode == 0, process.stderr
        file, available, explanation = process.stdout.strip().split(" ", 2)
        assert Path(file).is_relative_to(site_packages)
        assert available == "False"
        assert "FLASH_MLA_CUDA=0" in explanation
    (distribution,) = metadata.distributions(name="flash_mla", path=[str(site_packages)])
    assert {(point.group, point.value) for point in distribution.entry_points} == {
        ("vllm.general_plugins", "flash_mla.integrations.vllm:register"),
        ("sglang.srt.plugins", "flash_mla.integrations.sglang:register"),
    }

    # Uninstalled, it leaves nothing behind, what was compiled at import included.
    process = run_pip("--python", str(environment), "uninstall", "--yes", "flash_mla", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert not list(site_packages.glob("flash_mla*"))
    assert "No module named 'flash_mla'" in run_without_kernels(environment).stderr


def test_wheels_of_the_same_sources_are_the_same(source_copy, tmp_path):
    """Byte for byte, from two folders, where SOURCE_DATE_EPOCH says what time it is. That of one with kernels depends
    on them: build_tools/compare_builds.py."""
    first, second = (build_wheel(source_copy, tmp_path / name) for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert compare_builds.main([str(first), str(second)]) == 0

    (source_copy / "flash_mla" / "cpu.py").write_text("# another file\n")
    assert compare_builds.main([str(first), str(build_wheel(source_copy, tmp_path / "third"))]) == 1


def build_wheel(sources: Path, folder: Path) -> Path:
    """Of a copy of the sources in this folder, at a given time."""
    shutil.copytree(sources, folder)
    program = "from setuptools import build_meta; build_meta.build_wheel('.')"
    environ = {**os.environ, "FLASH_MLA_CUDA": "0", "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environ, check=True, capture_output=True)
    (wheel,) = folder.glob("flash_mla-*.whl")
    return wheel


def test_source_archive(source_copy, tmp_path):
    """It has every source, and a wheel can be built from it alone."""
    sources = {path.relative_to(source_copy).as_posix() for path in source_copy.rglob("*") if path.is_file()}
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    environ = {**os.environ, "FLASH_MLA_CUDA": "0"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.run(command, cwd=source_copy, env=environ, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (archive,) = tmp_path.glob("flash_mla-*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    assert sources <= packed

    process = run_pip(*WHEEL_OPTIONS[:-1], str(archive), cwd=tmp_path, FLASH_MLA_CUDA="0")
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = (tmp_path / "wheels").glob("flash_mla-*-py3-none-any.whl")
    assert "flash_mla/_build_info.json" in zipfile.ZipFile(wheel).namelist()


def test_required_kernels_that_cannot_be_built_are_an_error(source_copy):
    # A compiler that does not exist stands for any other reason.
    process = run_pip(*WHEEL_OPTIONS, cwd=source_copy, FLASH_MLA_CUDA="1", CXX="no-such-compiler")
    output = process.stdout + process.stderr
    assert process.returncode != 0
    assert "error: FLASH_MLA_CUDA=1, but the CUDA kernels cannot be built: " in output
    assert not list(source_copy.glob("wheels/*.whl"))


def test_hooks_use_the_tools_of_the_environment():
    """The linters run alike in `make lint` and in the hooks, and are pinned where the environment is made from."""
    process = subprocess.run(
        [str(Path(sys.executable).parent / "pre-commit"), "validate-config"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout
    entries = re.findall(r"entry: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    tools = {entry.removeprefix(".venv/bin/") for entry in entries}
    assert tools == {"ruff", "clang-format", "mypy"}
    assert tools == set(re.findall(r"\$\(BIN\)/(ruff|clang-format|mypy)\b", (ROOT / "Makefile").read_text()))
    pinned = {each.partition("==")[0] for each in requirements.requirements(["lint"]) if "==" in each}
    assert tools <= pinned
