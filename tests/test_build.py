"""What was compiled: the instructions in the built extension, its libraries, and the check of ptxas' report."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from build_tools import checked_nvcc, compare_builds
from build_tools.compare_builds import cuobjdump
from build_tools.flags import NVCC_FLAGS
from build_tools.toolchain import find_cuda
from flash_mla import extension

ROOT = Path(__file__).resolve().parents[1]
CHECKED_NVCC = ROOT / "build_tools" / "checked_nvcc.py"

# How the mangled names of the kernels say for which dtype they are.
ELEMENT_TYPES = ("bfloat16_t", "half_t")


@pytest.fixture(scope="module")
def library() -> Path:
    """The built extension. Only an installation that was to have no kernels may lack it."""
    spec = importlib.util.find_spec("flash_mla._C")
    if spec is None or spec.origin is None:
        info = extension.read_build_info()
        reason = info.get("reason") if info else "this source tree was not installed"
        if os.environ.get("FLASH_MLA_CUDA") == "1" or (info and info.get("cuda")):
            pytest.fail(f"the kernels were to be built, but flash_mla._C is missing ({reason})")
        pytest.skip(f"the kernels are not built: {reason}")
    return Path(spec.origin)


@pytest.fixture(scope="module")
def instructions(library) -> dict[str, Counter[str]]:
    """How often each kernel (mangled name) has each instruction (without modifiers)."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in cuobjdump(library, "-sass").splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            current = counts[function.group(1)] = Counter()
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            current[instruction.group(1)] += 1
    return counts


@pytest.fixture(scope="module")
def dense_decode(instructions) -> dict[str, Counter[str]]:
    return {name: counts for name, counts in instructions.items() if "dense_decode_kernel" in name}


def test_all_kernels_are_there(instructions):
    for kernel in ("decode_schedule_kernel", "split_kv_combine_kernel", "dense_decode_kernel", "append_kv_kernel"):
        assert any(kernel in name for name in instructions), kernel
    assert all(counts["EXIT"] for counts in instructions.values())


def test_dense_decode_is_there_for_every_dtype(dense_decode):
    for element_type in ELEMENT_TYPES:
        assert any(element_type in name for name in dense_decode), element_type


def test_dense_decode_multiplies_on_tensor_cores_and_loads_by_tma(dense_decode):
    for name, counts in dense_decode.items():
        # 576 / 16 steps for the scores; the values take fewer, wider ones.
        assert counts["HGMMA"] >= 36, name
        assert counts["UTMALDG"] > 0, name
        # The GEMMs of older architectures would be right, and slow.
        assert counts["HMMA"] == 0, name


def test_no_kernel_uses_local_memory(instructions):
    for name, counts in instructions.items():
        assert counts["LDL"] == 0 and counts["STL"] == 0, name


def test_only_sm_90a_code_and_no_ptx(library):
    cubins = re.findall(r"ELF file +\d+: (\S+)", cuobjdump(library, "-lelf"))
    assert cubins
    assert {cubin.split(".")[-2] for cubin in cubins} == {"sm_90a"}
    assert "PTX file" not in cuobjdump(library, "-lptx").replace("No PTX file found", "")


def test_links_only_what_it_needs(library):
    """No libcuda, so that it can be imported without a driver; nothing of CUDA besides the runtime that torch loads."""
    process = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(\S+)\]", process.stdout))
    of_cuda = {name for name in needed if re.match(r"lib(cu|nv)", name)}
    assert of_cuda == {f"libcudart.so.{str(torch.version.cuda).split('.')[0]}"}
    of_torch = {name for name in needed if re.match(r"lib(c10|torch)", name)}
    assert of_torch <= {
        f"lib{name}.so" for name in ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python")
    }


def test_host_code_is_hardened(library):
    """What the loader binds is read-only afterwards, the stack holds no code, and returns are guarded."""
    process = subprocess.run(["readelf", "-dlsW", str(library)], capture_output=True, text=True, check=True)
    output = process.stdout
    assert "GNU_RELRO" in output and re.search(r"\(FLAGS\).*BIND_NOW", output)
    assert re.search(r"GNU_STACK .* RW ", output)
    assert "__stack_chk_fail" in output
    assert "TEXTREL" not in output and "RPATH" not in output and "RUNPATH" not in output


def compile_kernel(folder: Path, body: str) -> Path:
    """An object with one kernel, in an unnamed namespace as most of ours are."""
    folder.mkdir()
    source, output = folder / "kernel.cu", folder / "kernel.o"
    source.write_text(f"namespace {{ __global__ void kernel(float* x) {{ {body} }} }}\nauto* used = &kernel;\n")
    cuda = find_cuda(str(torch.version.cuda))
    includes = [f"-I{each}" for each in cuda.include_dirs]
    subprocess.run([str(cuda.nvcc), *NVCC_FLAGS, *includes, "-c", str(source), "-o", str(output)], check=True)
    return output


def test_builds_in_two_folders_are_the_same(library, tmp_path, capsys):
    first, second = (compile_kernel(tmp_path / name, "x[threadIdx.x] = 1;") for name in ("first", "second"))
    assert first.read_bytes() != second.read_bytes()
    assert compare_builds.main([str(first), str(second)]) == 0
    assert "the builds are the same" in capsys.readouterr().out
    assert compare_builds.main([str(library), str(library)]) == 0


def test_another_instruction_is_another_build(library, tmp_path, capsys):
    first, second = (compile_kernel(tmp_path / value, f"x[threadIdx.x] = {value};") for value in ("1", "2"))
    assert compare_builds.main([str(first), str(second)]) == 1
    assert "1 of 1 parts differ" in capsys.readouterr().out
    assert compare_builds.main([str(library), str(second)]) == 1


def test_extension_reports_what_was_built(library):
    module = extension.load_extension().module
    assert module is not None
    reported, recorded = module.build_info(), extension.read_build_info()
    assert recorded is not None
    assert reported["arch"] == recorded["arch"] == "sm_90a"
    assert reported["cutlass"] == recorded["cutlass_version"]
    assert recorded["torch_version"].startswith(reported["torch"])
    assert set(reported["dtypes"]) == {"bfloat16", "float16"}


CLEAN_REPORT = """\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
BAD_REPORTS = {
    "stack frame": "    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
    "spill stores": "    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads",
    "spill loads": "    0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads",
    "spill warning": "ptxas warning : Registers are spilled to local memory in function '_Z6kernelv'",
    "local memory warning": "ptxas warning : Local memory used for function '_Z6kernelv', size of stack frame: 8 bytes",
    "serialized wgmma": "ptxas info    : (C7510) Potential Performance Loss: wgmma instructions are serialized",
    "ignored setmaxnreg": "ptxas info    : (C7508) setmaxnreg ignored to maintain minimum register requirement",
    "C75 with a prefix": "ptxas warning : C7517: waits were inserted",
}


def test_clean_report_is_accepted():
    assert checked_nvcc.find_problems(CLEAN_REPORT.splitlines()) == []


@pytest.mark.parametrize("line", BAD_REPORTS.values(), ids=BAD_REPORTS.keys())
def test_bad_report_is_refused(line):
    problems = checked_nvcc.find_problems([*CLEAN_REPORT.splitlines(), line])
    assert len(problems) == 1
    assert line.strip() in problems[0]


def test_refusal_names_the_function():
    report = CLEAN_REPORT.replace("0 bytes spill stores", "12 bytes spill stores")
    assert checked_nvcc.find_problems(report.splitlines()) == [
        "_Z6kernelv: 0 bytes stack frame, 12 bytes spill stores, 0 bytes spill loads"
    ]


def run_checked(
    tmp_path: Path, report: str, returncode: int, allow_spills: str = ""
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run a pretended nvcc that writes an object, prints this report and ends with this code."""
    nvcc, output = tmp_path / "nvcc.py", tmp_path / "kernel.o"
    nvcc.write_text(
        "import pathlib, sys\n"
        "pathlib.Path(sys.argv[sys.argv.index('-o') + 1]).touch()\n"
        f"print({report!r}, file=sys.stderr)\n"
        f"sys.exit({returncode})\n"
    )
    command = [sys.executable, str(CHECKED_NVCC), sys.executable, str(nvcc), "-c", "kernel.cu", "-o", str(output)]
    environ = {**os.environ, "FLASH_MLA_ALLOW_SPILLS": allow_spills}
    return subprocess.run(command, capture_output=True, text=True, env=environ), output


def test_wrapper_keeps_a_good_object(tmp_path):
    process, output = run_checked(tmp_path, CLEAN_REPORT, returncode=0)
    assert process.returncode == 0
    assert output.exists()
    assert "Used 168 registers" in process.stdout


def test_wrapper_removes_a_bad_object(tmp_path):
    process, output = run_checked(tmp_path, CLEAN_REPORT + BAD_REPORTS["serialized wgmma"], returncode=0)
    assert process.returncode == 1
    assert not output.exists()
    assert "error: refused because of what ptxas reports" in process.stdout
    assert "C7510" in process.stdout


@pytest.mark.parametrize("allow_spills", ["", "1"], ids=["strict", "spills-allowed"])
def test_wrapper_passes_on_the_failure_of_nvcc(tmp_path, allow_spills):
    process, _ = run_checked(tmp_path, "error: expected a declaration", returncode=2, allow_spills=allow_spills)
    assert process.returncode == 2
    assert "expected a declaration" in process.stdout


def test_wrapper_warns_of_a_bad_object_that_is_allowed(tmp_path):
    report = CLEAN_REPORT + BAD_REPORTS["spill stores"]
    process, output = run_checked(tmp_path, report, returncode=0, allow_spills="1")
    assert process.returncode == 0
    assert output.exists()
    assert "warning: allowed by FLASH_MLA_ALLOW_SPILLS=1" in process.stdout
    assert "4 bytes spill stores" in process.stdout.partition("warning: allowed")[2]


@pytest.mark.parametrize(
    ("body", "accepted"),
    [
        ("data[threadIdx.x] = 1.0f;", True),
        ("float a[64]; a[int(data[0])] = data[1]; data[2] = a[int(data[3])];", False),
    ],
    ids=["registers", "local-memory"],
)
def test_wrapper_judges_the_report_of_the_real_compiler(library, tmp_path, body, accepted):
    cuda = find_cuda(str(torch.version.cuda))
    source, output = tmp_path / "kernel.cu", tmp_path / "kernel.o"
    source.write_text(f"__global__ void kernel(float* data) {{ {body} }}\n")
    includes = [f"-I{each}" for each in cuda.include_dirs]
    command = [sys.executable, str(CHECKED_NVCC), str(cuda.nvcc), *NVCC_FLAGS, *includes, "-c", str(source)]
    environ = {**os.environ, "FLASH_MLA_ALLOW_SPILLS": ""}
    process = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, env=environ)
    assert (process.returncode == 0) is accepted, process.stdout + process.stderr
    assert output.exists() is accepted
