"""examples/check_server.py: it starts frameworks, asks servers, and finds answers that are wrong.

The frameworks are modules of the same name whose engines answer from a table.
"""

from __future__ import annotations

import importlib
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any

import pytest

TOKENS = ["a", "b", "c"]
LOGPROBS = [-0.1, -0.2, -0.3]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return importlib.import_module("check_server")


def top_of(tokens: list[str], logprobs: list[float], others: dict[str, float]) -> list[dict[str, float]]:
    return [{token: logprob, **others} for token, logprob in zip(tokens, logprobs, strict=True)]


def make_answer(example: ModuleType, tokens: str = "abc", logprobs: Any = LOGPROBS, **others: float) -> Any:
    values = list(logprobs)[: len(tokens)]
    return example.Answer("prompt", list(tokens), values, top_of(list(tokens), values, others))


@pytest.mark.parametrize(
    ("actual", "compared", "first_difference", "largest_error"),
    [
        ({}, 3, None, 0.0),
        ({"logprobs": [-0.1, -0.25, -0.3]}, 3, None, 0.05),
        # Near ties: what follows is not compared.
        ({"tokens": "axy", "logprobs": [-0.1, -0.21, -9.0], "b": -0.22}, 2, 1, 0.1),
        ({"tokens": "axc", "b": -0.7}, 2, 1, 0.5),
        ({"tokens": "axc"}, 2, 1, math.inf),
        ({"tokens": "ayc", "b": -0.2}, 2, 1, math.inf),
        ({"tokens": "ab"}, 2, 2, math.inf),
    ],
)
def test_compare(example, actual, compared, first_difference, largest_error):
    expected = make_answer(example, x=-0.3)
    result = example.compare(expected, make_answer(example, **actual))
    assert (result.compared, result.first_difference) == (compared, first_difference)
    assert result.largest_error == pytest.approx(largest_error)


def test_report_counts_nothing_as_wrong(example, capsys):
    empty = make_answer(example, "")
    assert not example.report([empty], [empty], 0.2)
    assert capsys.readouterr().out.endswith("0  WRONG\n")
    assert not example.report([empty], [], 0.2)


def test_built_in_prompts_have_all_lengths(example):
    sizes = [len(prompt.split()) for prompt in example.PROMPTS]
    assert sizes == sorted(sizes) and sizes[0] < 10 and 5000 < sizes[-1] < 15_000


# Servers


class FakeServer(BaseHTTPRequestHandler):
    logprobs: Any = LOGPROBS
    status = 200

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.answer({"data": [{"id": "some-model"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body == {
            "model": "some-model",
            "prompt": body["prompt"],
            "temperature": 0,
            "max_tokens": 3,
            "logprobs": 5,
        }
        values = None
        if self.logprobs is not None:
            top = top_of(TOKENS, self.logprobs, {"z": -5.0})
            values = {"tokens": TOKENS, "token_logprobs": self.logprobs, "top_logprobs": top}
        self.answer({"choices": [{"logprobs": values}]})

    def answer(self, body: Any) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch) -> Iterator[str]:
    monkeypatch.setattr(FakeServer, "logprobs", LOGPROBS)
    monkeypatch.setattr(FakeServer, "status", 200)
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_server_with_and_without(example, url, tmp_path, capsys, monkeypatch):
    saved = tmp_path / "without.json"
    common = ["url", f"{url}/", "--max-tokens", "3"]
    assert example.main([*common, "--save", str(saved)]) == 0
    assert capsys.readouterr().out == f"Answers to {len(example.PROMPTS)} prompts are in {saved}\n"
    assert example.main([*common, "--against", str(saved)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["prompt", "tokens", "first", "difference", "largest", "error"]
    assert len(lines) == len(example.PROMPTS) and all(line.endswith("0  ok") for line in lines)

    monkeypatch.setattr(FakeServer, "logprobs", [-0.1, -0.9, -0.3])
    assert example.main([*common, "--against", str(saved)]) == 1
    assert capsys.readouterr().out.count("0.7  WRONG\n") == len(example.PROMPTS)
    assert example.main([*common, "--against", str(saved), "--tolerance", "0.8"]) == 0


def test_other_prompts_are_not_compared(example, url, tmp_path, capsys):
    saved, prompts = tmp_path / "answers.json", tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    common = ["url", url, "--max-tokens", "3"]
    assert example.main([*common, "--prompts", str(prompts), "--save", str(saved)]) == 0
    assert [each["prompt"] for each in json.loads(saved.read_text())] == ["one", "two"]
    assert example.main([*common, "--against", str(saved)]) == 1
    assert "the answers are to other prompts, WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("status", 500, "HTTP Error 500"), ("logprobs", None, "answers without log-probabilities")],
)
def test_servers_that_do_not_answer(example, url, monkeypatch, capsys, tmp_path, attribute, value, message):
    monkeypatch.setattr(FakeServer, attribute, value)
    assert example.main(["url", url, "--max-tokens", "3", "--save", str(tmp_path / "answers.json")]) == 1
    assert message in capsys.readouterr().err


def test_no_server(example, capsys, tmp_path):
    assert example.main(["url", "http://127.0.0.1:9", "--save", str(tmp_path / "answers.json")]) == 1
    assert "error: http://127.0.0.1:9/v1/models: " in capsys.readouterr().err


# Frameworks

COMMON = """
import os
from types import SimpleNamespace

def decode():
    disabled = os.environ["FLASH_MLA_DISABLE_PLUGINS"] == "1"
    if not disabled and os.environ.get("FAKE") != "unused":
        print("INFO decodes with flash_mla 0.1.0")
    if disabled and os.environ.get("FAKE") == "always":
        print("INFO decodes with flash_mla 0.1.0")
    if os.environ.get("FAKE") == "broken":
        raise MemoryError("there is too little memory")
    wrong = 0.5 if not disabled and os.environ.get("FAKE") == "wrong" else 0.0
    return [5, 6, 7], [-0.1 - wrong, -0.2, -0.3]
"""
FAKE_VLLM = (
    COMMON
    + """
class SamplingParams:
    def __init__(self, temperature, max_tokens, logprobs):
        assert (temperature, max_tokens, logprobs) == (0, 3, 5)

class LLM:
    def __init__(self, model, attention_config, tensor_parallel_size):
        assert (model, attention_config, tensor_parallel_size) == ("some-model", {"backend": "FLASHMLA"}, 2)

    def generate(self, prompts, sampling):
        tokens, logprobs = decode()
        top = [{token: SimpleNamespace(logprob=logprob)} for token, logprob in zip(tokens, logprobs)]
        output = SimpleNamespace(token_ids=tokens, logprobs=top)
        return [SimpleNamespace(outputs=[output]) for _ in prompts]
"""
)
FAKE_SGLANG = (
    COMMON
    + """
class Engine:
    def __init__(self, model_path, attention_backend, log_level, tensor_parallel_size):
        assert (model_path, attention_backend, log_level) == ("some-model", "flashmla", "info")

    def generate(self, prompts, sampling, return_logprob, top_logprobs_num):
        assert (sampling, return_logprob, top_logprobs_num) == ({"temperature": 0, "max_new_tokens": 3}, True, 5)
        entries = [(logprob, token, None) for token, logprob in zip(*decode())]
        info = {"output_token_logprobs": entries, "output_top_logprobs": [[entry] for entry in entries]}
        return [{"meta_info": info} for _ in prompts]

    def shutdown(self):
        pass
"""
)


@pytest.fixture(params=["vllm", "sglang"])
def framework(request, tmp_path, monkeypatch) -> list[str]:
    """Arguments for a framework that is found before any that is installed."""
    (tmp_path / f"{request.param}.py").write_text({"vllm": FAKE_VLLM, "sglang": FAKE_SGLANG}[request.param])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return [request.param, "--model", "some-model", "--max-tokens", "3", "--engine", '{"tensor_parallel_size": 2}']


def test_framework_with_and_without(example, framework, capsys):
    assert example.main(framework) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:2]] == ["without", "with"]
    assert all(line.endswith("0  ok") for line in lines[3:]) and len(lines) == 3 + len(example.PROMPTS)


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ("wrong", "0.5  WRONG"),
        ("unused", "the log does not say that it decodes with flash_mla, but:\nnothing about flash_mla"),
        ("always", "the log says that it decodes with flash_mla, but:\nINFO decodes with flash_mla 0.1.0"),
        ("broken", "MemoryError: there is too little memory"),
    ],
)
def test_framework_that_goes_wrong(example, framework, monkeypatch, capsys, fake, message):
    monkeypatch.setenv("FAKE", fake)
    assert example.main(framework) == 1
    printed = capsys.readouterr()
    assert message in printed.out + printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["url", "--save", "x"], "the URL of the server is missing"),
        (["url", "http://localhost"], "one of --save and --against must be given"),
        (["url", "http://localhost", "--save", "x", "--against", "y"], "one of --save and --against must be given"),
        (["vllm"], "argument --model: vllm needs one"),
        (["sglang", "--model", "m", "--save", "x"], "are for servers, not for sglang"),
        (["vllm", "--model", "m", "--max-tokens", "0"], "--max-tokens: must be at least 1, got 0"),
        (["vllm", "--model", "m", "--engine", "[1]"], "--engine: must be a JSON object, got [1]"),
        (["vllm", "--model", "m", "--engine", "{"], "--engine: must be a JSON object, got {"),
    ],
)
def test_bad_arguments(example, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        example.main(arguments)
    assert message in capsys.readouterr().err


def test_help_shows_the_commands(example, capsys):
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    printed = capsys.readouterr().out
    for command in ("vllm --model", "sglang --model", "url http://localhost:8000 --save", "--against without.json"):
        assert command in printed
    assert "--answers-to" not in printed
