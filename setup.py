"""Builds flash_mla, with its CUDA kernels wherever a toolchain for them is found (build_tools/toolchain.py).

FLASH_MLA_CUDA=0 leaves the kernels out, FLASH_MLA_CUDA=1 makes a missing toolchain an error, otherwise the package
installs without kernels and says why. MAX_JOBS bounds the parallel compilations. Everything else is in pyproject.toml.
"""

import functools
import json
import os
import shlex
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools.flags import CXX_FLAGS, LINK_FLAGS, NVCC_FLAGS  # noqa: E402
from build_tools.toolchain import BuildPlan, ToolchainError, default_max_jobs, find_ninja, plan_build  # noqa: E402


def kernel_extension(plan: BuildPlan) -> Extension:
    from torch.utils import cpp_extension

    sources = [ROOT / "csrc" / "bindings.cpp", *ROOT.glob("csrc/ops/*.cpp"), *ROOT.glob("csrc/kernels/**/*.cu")]
    include_dirs = [ROOT / "csrc", plan.cutlass_include_dir, *cpp_extension.include_paths(), *plan.cuda.include_dirs]
    return Extension(
        "flash_mla._C",
        sources=sorted(str(source.relative_to(ROOT)) for source in sources),
        include_dirs=[str(each) for each in include_dirs],
        library_dirs=[*cpp_extension.library_paths(), *map(str, plan.cuda.library_dirs)],
        libraries=["c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python"],
        extra_link_args=[f"-l:{plan.cuda.runtime_library}", *LINK_FLAGS],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        language="c++",
    )


def prepare_environment(plan: BuildPlan) -> None:
    """Tell torch's build which CUDA to use, where ninja is, how many jobs to run, and to check what ptxas reports."""
    os.environ["CUDA_HOME"] = str(plan.cuda.home)
    os.environ.setdefault("MAX_JOBS", str(default_max_jobs()))
    os.environ["PATH"] = os.pathsep.join([str(find_ninja().parent), os.environ["PATH"]])
    # python and python3 of an environment are one file. Ninja compares commands, and would compile again for the other.
    python = Path(sys.executable).resolve()
    checked_nvcc = [str(python), str(ROOT / "build_tools" / "checked_nvcc.py"), str(plan.cuda.nvcc)]
    os.environ["PYTORCH_NVCC"] = shlex.join(checked_nvcc)


try:
    PLAN = plan_build()
except ToolchainError as error:
    sys.exit(f"error: {error}")

if PLAN.cuda is None:
    BuildExtension = build_ext
    ext_modules = []
    # Without kernels any torch that has the op registration API will do.
    torch_requirement = "torch>=2.11"
else:
    prepare_environment(PLAN)
    from torch.utils.cpp_extension import BuildExtension

    ext_modules = [kernel_extension(PLAN)]
    # torch keeps no stable C++ ABI from one minor version to the next.
    torch_requirement = f"torch=={'.'.join(PLAN.torch_version.split('.')[:2])}.*"


@functools.cache
def announce_plan() -> None:
    if PLAN.required and PLAN.cuda is None:
        sys.exit(f"error: FLASH_MLA_CUDA=1, but the CUDA kernels cannot be built: {PLAN.reason}")
    print(PLAN.summary(), flush=True)


def write_build_info(package_dir: Path) -> None:
    package_dir.mkdir(parents=True, exist_ok=True)
    (package_dir / "_build_info.json").write_text(json.dumps(PLAN.build_info(), indent=2) + "\n")


class BuildPyWithInfo(build_py):
    def run(self) -> None:
        announce_plan()
        super().run()
        write_build_info((ROOT if self.editable_mode else Path(self.build_lib)) / "flash_mla")


class BuildKernels(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            # pip's temporary folder would compile everything again at each editable install.
            self.build_temp = str(ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

    def run(self) -> None:
        announce_plan()
        if self.inplace:
            write_build_info(ROOT / "flash_mla")
            if PLAN.cuda is None:
                remove_built_extension()
        super().run()


def remove_built_extension() -> None:
    """An extension left over from an earlier build in place would be loaded although none was asked for now."""
    for library in (ROOT / "flash_mla").glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
        library.unlink()


setup(
    packages=["flash_mla", "flash_mla.integrations"],
    package_data={"flash_mla": ["py.typed"]},
    license="MIT",
    install_requires=[torch_requirement],
    ext_modules=ext_modules,
    cmdclass={"build_py": BuildPyWithInfo, "build_ext": BuildKernels},
)
