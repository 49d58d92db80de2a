"""examples/decode_demo.py: it runs, shows what it decodes, and finds wrong results."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import pytest
import torch

import flash_mla

SMALL = ["--batch", "3", "--tokens", "70", "--layers", "2", "--steps", "3", "--heads", "4"]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return importlib.import_module("decode_demo")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_prints_steps_and_a_table(demo, device, dtype, capsys):
    assert demo.main([*SMALL, "--device", device, "--dtype", dtype]) == 0
    steps, table = capsys.readouterr().out.split("\n\n")
    assert re.findall(r"^step (\d)/3 .* ok$", steps, re.MULTILINE) == ["1", "2", "3"]
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in table.splitlines())
    assert list(rows) == [
        "device",
        "batch",
        "cached tokens",
        "µs per layer",
        "effective GB/s",
        "effective TFLOP/s",
        "max error",
    ]
    assert rows["batch"] == f"3 requests, 4 heads, {dtype}"
    # Requests of a half, three quarters and all of 70 tokens, and 3 tokens more each.
    assert rows["cached tokens"] == f"{35 + 52 + 70 + 3 * 3} in each layer at the end"
    assert rows["max error"].endswith(", ok")


@pytest.mark.parametrize("part", [0, 1], ids=["out", "lse"])
@pytest.mark.parametrize("wrong", [lambda result: result * 1.05, lambda result: result * float("nan")])
def test_wrong_results_are_found(demo, monkeypatch, capsys, part, wrong):
    right = flash_mla.flash_mla_with_kvcache

    def decode(*arguments, **options):
        result = list(right(*arguments, **options))
        result[part] = wrong(result[part])
        return tuple(result)

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", decode)
    assert demo.main([*SMALL, "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("WRONG\n") == 3 and printed.endswith("WRONG in 3 steps\n")


def test_says_why_it_uses_the_cpu(demo, monkeypatch, capsys):
    monkeypatch.setattr(flash_mla, "unavailable_reason", lambda: "torch sees no CUDA GPU")
    assert demo.main(["--batch", "1", "--tokens", "1", "--layers", "1", "--steps", "1", "--heads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Decoding on the CPU: torch sees no CUDA GPU\n")
    assert "1 request, 1 head," in printed and "2 in the layer" in printed


def test_takes_the_gpu_that_the_kernels_run_on(demo, monkeypatch, capsys):
    capabilities = [(8, 0), (9, 0), (9, 0)]
    monkeypatch.setattr(flash_mla, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    options = demo.parse_arguments([])
    assert demo.parse_arguments(["--device", "cuda"]).device == torch.device("cuda:1")
    assert demo.parse_arguments(["--device", "cuda:2"]).device == torch.device("cuda:2")
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--device", "cuda:3"])
    assert "--device: cannot be cuda:3: torch sees 3 GPUs" in capsys.readouterr().err
    assert options.device == torch.device("cuda:1")
    assert (options.batch, options.tokens, options.layers, options.steps, options.heads) == (128, 8192, 4, 32, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--device", "tpu"], "--device: must be auto, cpu or cuda, got 'tpu'"),
        (["--device", "meta"], "--device: must be auto, cpu or cuda, got 'meta'"),
        (["--device", "cuda"], "--device: cannot be cuda: torch sees no CUDA GPU"),
    ],
)
def test_bad_arguments(demo, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(flash_mla, "unavailable_reason", lambda: "torch sees no CUDA GPU")
    with pytest.raises(SystemExit, match="2"):
        demo.main(arguments)
    assert message in capsys.readouterr().err
