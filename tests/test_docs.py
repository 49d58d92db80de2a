"""The documentation as a site: it builds, its code runs, its messages are those of the package."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flash_mla
from build_tools import checked_nvcc, toolchain
from flash_mla import extension, ops, value_checks
from flash_mla.integrations import plugin

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built without the network."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="`make test` installs what the site is built with")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # A proxy where nothing listens: what would load from another host fails.
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environ = {**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


def test_the_environment_of_the_tests_has_what_the_site_needs():
    (line,) = re.findall(r"^.*build_tools\.requirements .*> \$@$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "--extra test" in line and "--extra docs" in line


def test_every_page_is_in_the_site(site):
    pages = {path.stem for path in DOCS.glob("*.md")} | {"CHANGELOG", "CONTRIBUTING", "SECURITY"}
    index = (site / "index.html").read_text()
    for page in pages:
        assert (site / f"{page}.html").exists(), page
        assert f'href="{page}.html"' in index, f"{page} is not in the navigation"


def test_every_public_name_is_on_the_page_of_the_api(site):
    page = (site / "api.html").read_text()
    for name in flash_mla.__all__:
        assert f'id="flash_mla.{name}"' in page, name
    assert "num_heads_per_head_k" in page and "NotImplementedError for anything but" in page


def test_results_are_on_the_page_of_performance(site):
    page = (site / "performance.html").read_text()
    assert "<!-- results -->" not in page
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for path in results:
        assert (site / "benchmarks" / "results" / path.name).read_bytes() == path.read_bytes()
        assert f'href="benchmarks/results/{path.name}"' in page
    plots = re.findall(r'src="(plots/[^"]+\.svg)"', page)
    assert plots
    assert all((site / name).read_text().startswith("<?xml") for name in plots)
    assert "<td style" in page and "In the same run" in page


def test_pages_load_nothing_from_other_hosts(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not re.findall(r'src="(?:https?:)?//[^"]*"', text), path.name
        for tag in re.findall(r"<link [^>]*>", text):
            assert not re.search(r'href="(?:https?:)?//', tag), tag


@pytest.mark.parametrize("page", ["quickstart.md", "graphs.md"])
def test_code_runs_as_it_stands(page, capsys):
    """From the top to the bottom of the page, with its own assertions; in a graph where there is a GPU."""
    names: dict[str, object] = {}
    for block in code_blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    output = capsys.readouterr().out
    if page == "quickstart.md":
        device = "" if names["device"] == "cpu" else ", device='cuda:0'"
        assert output == f"{torch.Size([2, 1, 16, 512])} {torch.Size([2, 16, 1])}\ntensor(inf{device})\n"


class Messages:
    """Collects what functions of this package say."""

    def __init__(self, replacements: dict[str, str]):
        self.said: set[str] = set()
        self.replacements = replacements  # of paths of this machine, by those of the page

    def add(self, text: object) -> None:
        text = str(text)
        for here, there in self.replacements.items():
            text = text.replace(here, there)
        self.said.add(text)

    def of(self, function, *arguments, **keywords) -> None:
        """The message of the exception that a call raises."""
        with pytest.raises((Exception, SystemExit)) as raised:
            function(*arguments, **keywords)
        self.add(raised.value)


def say_what_installation_says(messages: Messages, monkeypatch, tmp_path: Path) -> None:
    real_import = importlib.import_module

    def without_torch(name):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real_import(name)

    with monkeypatch.context() as patch:
        patch.setattr(toolchain.importlib, "import_module", without_torch)
        messages.add(toolchain.plan_build({}).summary())
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        patch.setattr(torch, "__version__", "2.11.0+cpu")
        messages.add(toolchain.plan_build({}).summary())

    nothing = {"PATH": str(tmp_path)}
    messages.of(toolchain.find_cuda, "13.0", nothing, [], tmp_path / "nowhere")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 12.4, V12.4.1"\n')
    nvcc.chmod(0o755)
    messages.of(toolchain.find_cuda, "13.0", {**nothing, "CUDA_HOME": str(tmp_path / "toolkit")}, [], tmp_path / "none")
    for name, version in (("nvidia-cuda-nvcc", "13.0.88"), ("nvidia-nvvm", "13.1.5")):
        info = tmp_path / "site-packages" / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    home = tmp_path / "site-packages" / "nvidia" / "cu13"
    messages.of(toolchain.require_matching_wheels, home, "13.0", "13.0")

    with monkeypatch.context() as patch:
        patch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
        messages.of(toolchain.find_cutlass_include_dir)
    messages.of(toolchain.require_host_tools, {**nothing})
    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "find_ninja", lambda environ: None)
        messages.of(toolchain.require_host_tools, {"CXX": "sh", "PATH": os.environ["PATH"]})
    cuda = toolchain.CudaToolchain(Path("/usr/local/cuda/bin/nvcc"), Path("/usr/local/cuda"), "13.0", (), ())
    messages.add(toolchain.BuildPlan(required=True, cuda=cuda).summary())


def say_what_scripts_say(messages: Messages, tmp_path: Path) -> None:
    """setup.py ends with these; running it for each would take longer than the rest. Their text is in the source."""
    setup = (ROOT / "setup.py").read_text()
    refusal = "error: FLASH_MLA_CUDA=1, but the CUDA kernels cannot be built: "
    assert f'f"{refusal}{{PLAN.reason}}"' in setup and 'sys.exit(f"error: {error}")' in setup
    messages.add(f"{refusal}no C++ compiler was found (c++)")
    with pytest.raises(toolchain.ToolchainError) as raised:
        toolchain.plan_build({"FLASH_MLA_CUDA": "yes"})
    messages.add(f"error: {raised.value}")

    makefile = (ROOT / "Makefile").read_text()
    for error in re.findall(r'echo "(error: [^"]*PYTHON=)"', makefile):
        messages.add(error.replace("$(PYTHON)", "python3"))
    report = "import sys; print('x (C7510) wgmma serialized')"
    process = subprocess.run(
        [sys.executable, checked_nvcc.__file__, sys.executable, "-c", report], capture_output=True, text=True
    )
    messages.add(process.stdout.splitlines()[1])


def say_what_loading_says(messages: Messages, monkeypatch) -> None:
    built = {"cuda": True, "torch_version": "2.11.0+cu130"}
    explain = extension.explain_missing_extension
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.12.0+cu130")
        messages.add(explain(ImportError("undefined symbol: _ZN3c105ErrorC2"), built))
        patch.setattr(torch, "__version__", "2.11.0+cu130")
        messages.add(explain(ImportError("libcudart.so.13: cannot open shared object file"), built))
    messages.add(explain(ImportError(), None, Path("/home/me/flash_mla/flash_mla")))

    without = explain(ImportError(), {"cuda": False, "reason": "no C++ compiler was found (c++)"})
    with monkeypatch.context() as patch:
        patch.setattr(extension, "_extension", extension.Extension(None, without))
        messages.of(ops._no_kernels)
    with monkeypatch.context() as patch:
        patch.setattr(extension, "_extension", extension.Extension(SimpleNamespace(), None))
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        messages.add(flash_mla.unavailable_reason())
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
        messages.add(flash_mla.unavailable_reason())
    compiled = (ROOT / "csrc" / "ops" / "device.cpp").read_text()
    needed = "flash_mla's kernels need an sm_90 GPU (H100, H200, H800, H20), got sm_"
    assert f'"{needed}"' in compiled and re.search(r'major, minor, " \(cuda:", index, "\)"', compiled)
    messages.add(f"{needed}80 (cuda:0)")

    for site_packages in (Path("/elsewhere"), extension.PACKAGE_DIR.parent):
        rival = SimpleNamespace(version="1.0.0", locate_file=lambda path, folder=site_packages: folder / path)
        with monkeypatch.context() as patch:
            patch.setattr(extension.metadata, "distribution", lambda name, rival=rival: rival)
            messages.add(extension.find_rival())

    with monkeypatch.context() as patch:
        patch.setenv(plugin.DISABLING_VARIABLE, "1")
        log = SimpleNamespace(info=lambda text, *arguments: messages.add(text % arguments))
        plugin.run("vLLM", log, lambda: "")


def say_what_calls_say(messages: Messages, monkeypatch) -> None:
    monkeypatch.setattr(value_checks, "ENABLED", True)

    def decode(lengths=(100, 0, 0, 300), num_pages=20, page_size=64, schedule=None, **keywords):
        table = torch.arange(20, dtype=torch.int32).view(4, 5)[: len(lengths)].clone()
        for row, column, page in keywords.pop("pages", ()):
            table[row, column] = page
        flash_mla.flash_mla_with_kvcache(
            torch.zeros(len(lengths), 1, 16, 576, dtype=torch.bfloat16),
            torch.zeros(num_pages, page_size, 1, 576, dtype=torch.bfloat16),
            table,
            torch.tensor(lengths, dtype=torch.int32),
            512,
            schedule or flash_mla.get_mla_metadata()[0],
            **keywords,
        )

    messages.of(decode, page_size=16)
    messages.of(decode, is_fp8_kvcache=True)
    schedule, _ = flash_mla.get_mla_metadata()
    messages.of(torch.zeros(132, 8, dtype=torch.int32).copy_, schedule)
    decode((100, 0), schedule=schedule)
    messages.of(decode, (100, 0, 0), schedule=schedule)
    messages.of(decode, (100, 0, 321, 300))
    messages.of(decode, pages=[(3, 4, -1)])
    messages.of(decode, (100, 0, -5, 300))
    tokens = torch.zeros(2, 576, dtype=torch.bfloat16)
    cache = torch.zeros(20, 64, 1, 576, dtype=torch.bfloat16)
    messages.of(flash_mla.append_mla_kv, tokens[:, :512], tokens[:, 512:], cache, torch.tensor([0, 1280]))


def test_messages_are_those_of_the_package(monkeypatch, tmp_path):
    quoted = [block.rstrip("\n") for block in code_blocks("troubleshooting.md", "text")]
    assert all("\n" not in message for message in quoted)
    messages = Messages(
        {
            str(tmp_path / "toolkit"): "/opt/cuda-12.4",
            str(extension.PACKAGE_DIR): "/site-packages/flash_mla",
        }
    )
    say_what_installation_says(messages, monkeypatch, tmp_path)
    say_what_scripts_say(messages, tmp_path)
    say_what_loading_says(messages, monkeypatch)
    say_what_calls_say(messages, monkeypatch)
    assert sorted(quoted) == sorted(messages.said)
