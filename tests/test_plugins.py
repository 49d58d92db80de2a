"""What the plugins for serving frameworks share: found by entry points, imported without them, never in the way."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from flash_mla.integrations import plugin

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ["vllm.general_plugins", "sglang.srt.plugins"]
LOG = logging.getLogger("test_plugins")


@pytest.mark.parametrize("group", GROUPS)
def test_entry_points_load(group):
    """That an installation has them is in test_setup.py."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"][group].items()
    assert name == "flash_mla"  # what VLLM_PLUGINS and SGLANG_PLUGINS name
    assert callable(metadata.EntryPoint(name, value, group).load())


@pytest.mark.parametrize("group", GROUPS)
def test_entry_points_are_found(group):
    """Through importlib.metadata, as the frameworks look for them."""
    found = [point for point in metadata.entry_points(group=group) if point.name == "flash_mla"]
    if not found:
        pytest.skip("the flash_mla that is installed here is older than its plugins (pip install --editable .)")
    assert [callable(point.load()) for point in found] == [True]


def test_import_needs_no_framework():
    program = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "sglang", "sgl_kernel"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import flash_mla.integrations.plugin, flash_mla.integrations.sglang, flash_mla.integrations.vllm
flash_mla.integrations.sglang.register()
flash_mla.integrations.vllm.register()
"""
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "vLLM does without flash_mla: " in process.stderr and "SGLang does without flash_mla: " in process.stderr


@pytest.mark.parametrize(
    ("value", "disabled"), [(None, False), ("", False), ("0", False), (" 1 ", True), ("yes", True)]
)
def test_disabling_variable(value, disabled):
    assert plugin.is_disabled({} if value is None else {plugin.DISABLING_VARIABLE: value}) is disabled


def refuse() -> str:
    raise plugin.Refusal("there is no GPU")


def fail() -> str:
    raise AttributeError("no such thing")


@pytest.mark.parametrize(
    ("register", "level", "message"),
    [
        (lambda: "flash_mla is there", logging.INFO, "flash_mla is there"),
        (refuse, logging.WARNING, "Server does without flash_mla: there is no GPU"),
        (fail, logging.WARNING, "Server does without flash_mla: AttributeError: no such thing"),
    ],
)
def test_one_line_says_what_came_of_it(caplog, monkeypatch, register, level, message):
    monkeypatch.setattr(plugin.is_disabled, "__defaults__", ({},))
    with caplog.at_level(logging.INFO):
        plugin.run("Server", LOG, register)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(level, message)]


def test_disabled_plugins_are_not_run(caplog, monkeypatch):
    monkeypatch.setattr(plugin.is_disabled, "__defaults__", ({plugin.DISABLING_VARIABLE: "1"},))
    with caplog.at_level(logging.INFO):
        plugin.run("Server", LOG, pytest.fail)
    assert caplog.messages == ["Server does without flash_mla: FLASH_MLA_DISABLE_PLUGINS is set"]


def test_first_use_is_logged_once(caplog):
    plugin.log_first_use.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            plugin.log_first_use("Server", LOG)
    (message,) = caplog.messages
    assert message.startswith("Server decodes with flash_mla ")
