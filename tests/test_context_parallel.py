"""examples/context_parallel.py: ranks in processes of their own agree with one rank, and wrong results are found."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import flash_mla

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "context_parallel.py"
# With 4 ranks: pages on all of them, a last page that is not full, on one only, and on none.
TOKENS = [1100, 300, 5, 0]
SMALL = ["--tokens", *map(str, TOKENS), "--heads", "4"]
SECONDS = 120  # for a process that hangs; it takes some 10


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return importlib.import_module("context_parallel")


def run(*command: str) -> str:
    process = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def check_printed(printed: str, num_ranks: int, where: str = "CPU, gloo", dtype: str = "bf16") -> None:
    title, table, verdicts = printed.split("\n\n")
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    assert title == f"{ranks} ({where}), 4 heads, {dtype}: tokens per request and rank"
    rows = {name: cells for name, *cells in (re.split(r" {2,}", line) for line in table.splitlines())}
    assert list(rows) == ["rank", *map(str, range(num_ranks)), "all"]
    assert rows["rank"] == [f"request {request}" for request in range(len(TOKENS))] + ["MB"]
    counts = [list(map(int, rows[str(rank)][:-1])) for rank in range(num_ranks)]
    assert [sum(column) for column in zip(*counts, strict=True)] == list(map(int, rows["all"][:-1])) == TOKENS
    # No rank has more than a page more of a request than another.
    assert all(max(column) - min(column) <= 64 for column in zip(*counts, strict=True))
    assert [line.split()[0] for line in verdicts.splitlines()] == ["out", "lse", "ranks"]
    assert all(line.endswith(", ok") for line in verdicts.splitlines())


@pytest.mark.timeout(SECONDS + 10)
@pytest.mark.parametrize(("num_ranks", "dtype"), [(2, "bf16"), (4, "fp16")])
def test_starts_ranks(num_ranks, dtype):
    printed = run(str(EXAMPLE), "--ranks", str(num_ranks), *SMALL, "--device", "cpu", "--dtype", dtype)
    check_printed(printed, num_ranks, dtype=dtype)


@pytest.mark.timeout(SECONDS + 10)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_under_torchrun(num_ranks):
    # --standalone takes a free port.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    check_printed(run(*torchrun, str(EXAMPLE), *SMALL, "--device", "cpu"), num_ranks)


def test_one_rank(example, device, capsys):
    assert example.main(["--ranks", "1", *SMALL, "--device", device]) == 0
    where = "CPU, gloo" if device == "cpu" else f"{torch.cuda.get_device_name()}, NCCL"
    check_printed(capsys.readouterr().out, 1, where)


@pytest.mark.parametrize("part", [0, 1], ids=["out", "lse"])
@pytest.mark.parametrize("wrong", [lambda result: result * 1.05, lambda result: result * float("nan")])
def test_wrong_results_are_found(example, monkeypatch, capsys, part, wrong):
    right = flash_mla.merge_attention_states

    def merge(outs, lses):
        result = list(right(outs, lses))
        result[part] = wrong(result[part])
        return tuple(result)

    monkeypatch.setattr(flash_mla, "merge_attention_states", merge)
    assert example.main(["--ranks", "1", *SMALL, "--device", "cpu"]) == 1
    verdicts = capsys.readouterr().out.splitlines()[-3:]
    assert [line.endswith("WRONG") for line in verdicts] == [part == 0, part == 1, False]


def test_ranks_that_differ_are_found(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "all_ranks_have", lambda tensor: False)
    assert example.main(["--ranks", "1", *SMALL, "--device", "cpu"]) == 1
    assert capsys.readouterr().out.endswith("ranks  have different bits, WRONG\n")


def test_status_of_a_rank_is_that_of_the_program(example, monkeypatch):
    def spawn(function, arguments, nprocs):
        raise torch.multiprocessing.ProcessExitedException("a rank ended", 0, 1234, exit_code=1)

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    assert example.main(["--ranks", "2", *SMALL, "--device", "cpu"]) == 1


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_shards_hold_every_token_once(example, num_ranks):
    def tokens_of(shard, request):
        length = int(shard.cache_seqlens[request])
        pages = shard.block_table[request, : -(-length // 64)].long()
        return shard.pages[pages].flatten(0, 1)[:length, 0]

    cpu = torch.device("cpu")
    whole = example.make_shard(TOKENS, 0, 1, torch.bfloat16, cpu)
    shards = [example.make_shard(TOKENS, rank, num_ranks, torch.bfloat16, cpu) for rank in range(num_ranks)]
    for request, length in enumerate(TOKENS):
        pages = [tokens_of(shard, request).split(64) for shard in shards]
        in_order = [pages[index % num_ranks][index // num_ranks] for index in range(-(-length // 64))]
        assert sum(int(shard.cache_seqlens[request]) for shard in shards) == sum(map(len, in_order))
        expected = tokens_of(whole, request)
        assert len(expected) == length and expected.isfinite().all()
        assert torch.equal(torch.cat([expected[:0], *in_order]), expected)
    for shard in shards:
        assert int(shard.pages[..., 0].isfinite().sum()) == int(shard.cache_seqlens.sum())


def test_device_follows_the_gpus(example, monkeypatch):
    capabilities = [(8, 0), (9, 0), (9, 0)]
    monkeypatch.setattr(flash_mla, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert example.find_gpus() == [torch.device("cuda:1"), torch.device("cuda:2")]
    for requested, ranks, expected in (("auto", 2, "cuda"), ("auto", 3, "cpu"), ("cuda", 2, "cuda"), ("cpu", 1, "cpu")):
        assert example.choose_device(requested, ranks) == torch.device(expected)
    with pytest.raises(ValueError, match=r"^cannot be cuda: 3 ranks need as many sm_90 GPUs, torch sees 2"):
        example.choose_device("cuda", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0"], "--ranks: must be at least 1, got 0"),
        (["--heads", "-1"], "--heads: must be at least 1, got -1"),
        (["--tokens", "5", "-3"], "--tokens: must not be negative, got -3"),
        (["--device", "cuda"], "--device: cannot be cuda: there is none here"),
    ],
)
def test_bad_arguments(example, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(flash_mla, "unavailable_reason", lambda: "there is none here")
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


def test_torchrun_sets_the_number_of_ranks(example, monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert example.parse_arguments(["--device", "cpu"]).ranks == 8
    with pytest.raises(SystemExit):
        example.parse_arguments(["--ranks", "2"])
    assert "--ranks: torchrun has started the ranks" in capsys.readouterr().err
