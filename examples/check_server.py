"""Check that a serving framework gives the same answers with this package as without it.

    python examples/check_server.py vllm --model deepseek-ai/DeepSeek-V2-Lite
    python examples/check_server.py sglang --model deepseek-ai/DeepSeek-V2-Lite
    python examples/check_server.py vllm --model deepseek-ai/DeepSeek-V3 --engine '{"tensor_parallel_size": 8}'

start vLLM or SGLang twice on the GPUs of this machine, with its FlashMLA attention backend: first with its own kernels
(FLASH_MLA_DISABLE_PLUGINS=1), then with the plugin of this package. Servers that are running already are asked with

    python examples/check_server.py url http://localhost:8000 --save without.json     # started without the plugin
    python examples/check_server.py url http://localhost:8000 --against without.json  # started with it

Prompts of different lengths are decoded together, greedily. Two kernels round differently, so that a near tie may go
either way and the texts differ from there on. What has to agree is the log-probability of every token up to the first
different one, and there the two tokens have to be nearly tied. The exit status is 1 where they are not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DISABLING_VARIABLE = "FLASH_MLA_DISABLE_PLUGINS"
USE_IS_LOGGED_AS = "decodes with flash_mla"
TOP_LOGPROBS = 5  # per token
SECONDS = 600  # for an answer of a server
LINES_OF_LOG = 30  # shown of a framework that fails

WORDS = ["north", "east", "south", "west", "up", "down", "left", "right"]
# A few tokens, one page of the cache, and several hundred pages: divided among few and among many workers.
PROMPTS = [
    "The capital of France is",
    "Count: " + ", ".join(map(str, range(1, 25))) + ",",
    " ".join(f"Room {number} is {WORDS[number * 7 % 8]} of room {number * 5 % 97}." for number in range(60)),
    " ".join(f"Step {number}: go {WORDS[number * 3 % 8]}, then {WORDS[number * 5 % 8]}." for number in range(1500)),
]


@dataclass
class Answer:
    """What was decoded for a prompt: per token itself, its log-probability, and those of the most likely ones."""

    prompt: str
    tokens: list[str]
    logprobs: list[float]
    top: list[dict[str, float]]


@dataclass
class Comparison:
    compared: int  # tokens
    first_difference: int | None  # index of the token, None where all are the same
    largest_error: float  # of a log-probability; inf where a token was not among the most likely ones


def compare(expected: Answer, actual: Answer) -> Comparison:
    """Compare up to the first different token, before which both have seen the same."""
    errors: list[float] = []
    for index, (token, other) in enumerate(zip(expected.tokens, actual.tokens, strict=False)):
        if token != other:
            # How far the other's token is behind the own one.
            gaps = (
                expected.logprobs[index] - expected.top[index].get(other, float("-inf")),
                actual.logprobs[index] - actual.top[index].get(token, float("-inf")),
            )
            return Comparison(index + 1, index, max([*errors, *gaps]))
        errors.append(abs(expected.logprobs[index] - actual.logprobs[index]))
    shorter = min(len(expected.tokens), len(actual.tokens))
    if len(expected.tokens) != len(actual.tokens):
        return Comparison(shorter, shorter, float("inf"))
    return Comparison(shorter, None, max(errors, default=0.0))


def report(expected: Sequence[Answer], actual: Sequence[Answer], tolerance: float) -> bool:
    """Print a line per prompt; returns whether all agree."""
    if [answer.prompt for answer in expected] != [answer.prompt for answer in actual]:
        print("the answers are to other prompts, WRONG")
        return False
    all_agree = True
    print(f"{'prompt':<32}  {'tokens':>6}  {'first difference':>16}  {'largest error':>13}")
    for one, other in zip(expected, actual, strict=True):
        result = compare(one, other)
        agrees = result.compared > 0 and result.largest_error <= tolerance
        all_agree &= agrees
        where = "none" if result.first_difference is None else f"token {result.first_difference}"
        error = f"{result.largest_error:.3g}"
        verdict = "ok" if agrees else "WRONG"
        print(f"{shorten(one.prompt):<32}  {result.compared:>6}  {where:>16}  {error:>13}  {verdict}")
    return all_agree


def shorten(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:29]}..."


# Engines on this machine, each in a process of its own


def answers_of_vllm(model: str, prompts: list[str], max_tokens: int, engine: dict[str, Any]) -> list[Answer]:
    vllm = importlib.import_module("vllm")
    llm = vllm.LLM(model=model, **{"attention_config": {"backend": "FLASHMLA"}, **engine})
    sampling = vllm.SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=TOP_LOGPROBS)
    answers = []
    for prompt, request in zip(prompts, llm.generate(prompts, sampling), strict=True):
        output = request.outputs[0]
        top = [{str(token): entry.logprob for token, entry in each.items()} for each in output.logprobs]
        tokens = [str(token) for token in output.token_ids]
        answers.append(Answer(prompt, tokens, [each[token] for each, token in zip(top, tokens, strict=True)], top))
    return answers


def answers_of_sglang(model: str, prompts: list[str], max_tokens: int, engine: dict[str, Any]) -> list[Answer]:
    sglang = importlib.import_module("sglang")
    # By default an engine logs errors only.
    running = sglang.Engine(model_path=model, **{"attention_backend": "flashmla", "log_level": "info", **engine})
    try:
        outputs = running.generate(
            prompts,
            {"temperature": 0, "max_new_tokens": max_tokens},
            return_logprob=True,
            top_logprobs_num=TOP_LOGPROBS,
        )
    finally:
        running.shutdown()
    answers = []
    for prompt, output in zip(prompts, outputs, strict=True):
        info = output["meta_info"]
        tokens = [str(token) for _, token, _ in info["output_token_logprobs"]]
        logprobs = [logprob for logprob, _, _ in info["output_token_logprobs"]]
        top = [{str(token): logprob for logprob, token, _ in each} for each in info["output_top_logprobs"]]
        answers.append(Answer(prompt, tokens, logprobs, top))
    return answers


FRAMEWORKS = {"vllm": answers_of_vllm, "sglang": answers_of_sglang}


def run_framework(options: argparse.Namespace, with_plugin: bool, folder: Path) -> list[Answer]:
    """The answers of a framework that this starts and ends. Raises RuntimeError for one that does not do as told."""
    name = "with" if with_plugin else "without"
    log, answers = folder / f"{name}.log", folder / f"{name}.json"
    print(f"Starting {options.source} {name} the plugin, log in {log}", flush=True)
    environ = {**os.environ, DISABLING_VARIABLE: "0" if with_plugin else "1"}
    command = [sys.executable, __file__, *options.given, "--answers-to", str(answers)]
    with log.open("w") as opened:
        process = subprocess.run(command, env=environ, stdout=opened, stderr=subprocess.STDOUT, check=False)
    text = log.read_text(errors="replace")
    if process.returncode != 0 or not answers.exists():
        tail = "\n".join(text.splitlines()[-LINES_OF_LOG:])
        raise RuntimeError(f"{options.source} ended with status {process.returncode}:\n{tail}")
    if (USE_IS_LOGGED_AS in text) is not with_plugin:
        mentions = [line for line in text.splitlines() if "flash_mla" in line] or ["nothing about flash_mla"]
        expected = "does not say" if with_plugin else "says"
        raise RuntimeError(f"the log {expected} that it {USE_IS_LOGGED_AS}, but:\n" + "\n".join(mentions))
    return read_answers(answers)


# Servers that are running


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{request.full_url}: {error}: {error.read().decode(errors='replace')}") from error
    except OSError as error:
        raise RuntimeError(f"{request.full_url}: {error}") from error


def answers_of_server(url: str, model: str | None, prompts: list[str], max_tokens: int) -> list[Answer]:
    """Ask an OpenAI-compatible server for all prompts at once, so that it decodes them as one batch."""
    served = model or ask(url, "models")["data"][0]["id"]

    def answer(prompt: str) -> Answer:
        body = {"model": served, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "logprobs": TOP_LOGPROBS}
        logprobs = ask(url, "completions", body)["choices"][0]["logprobs"]
        if not logprobs:
            raise RuntimeError(f"{url} answers without log-probabilities")
        return Answer(prompt, logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(answer, prompts))


# Files of answers


def write_answers(path: Path, answers: Sequence[Answer]) -> None:
    path.write_text(json.dumps([asdict(answer) for answer in answers], indent=1) + "\n")


def read_answers(path: Path) -> list[Answer]:
    return [Answer(**each) for each in json.loads(path.read_text())]


def check(options: argparse.Namespace) -> bool:
    prompts = options.prompts.read_text().splitlines() if options.prompts else PROMPTS
    if options.source == "url":
        actual = answers_of_server(options.where, options.model, prompts, options.max_tokens)
        if options.save:
            write_answers(options.save, actual)
            print(f"Answers to {len(actual)} prompts are in {options.save}")
            return True
        return report(read_answers(options.against), actual, options.tolerance)
    folder = Path(tempfile.mkdtemp(prefix="check_server-"))
    expected, actual = (run_framework(options, with_plugin, folder) for with_plugin in (False, True))
    return report(expected, actual, options.tolerance)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return value


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=[*FRAMEWORKS, "url"], help="what to start, or to ask the server at a URL")
    parser.add_argument("where", nargs="?", help="URL of the server, without /v1")
    parser.add_argument("--model", help="name or folder; of a server, the first one it serves")
    parser.add_argument("--engine", type=json_object, default={}, help="more arguments of vllm.LLM or sglang.Engine")
    parser.add_argument("--prompts", type=Path, help="file with a prompt per line, instead of built-in ones")
    parser.add_argument("--max-tokens", type=int, default=64, help="to decode for each prompt (64)")
    parser.add_argument("--tolerance", type=float, default=0.2, help="of log-probabilities, natural logarithm (0.2)")
    parser.add_argument("--save", type=Path, help="write the answers of the server to this file")
    parser.add_argument("--against", type=Path, help="compare the answers of the server with those in this file")
    parser.add_argument("--answers-to", type=Path, help=argparse.SUPPRESS)  # in the process of a framework
    options = parser.parse_args(arguments)
    options.given = list(arguments)
    if options.source == "url":
        if options.where is None:
            parser.error("argument where: the URL of the server is missing")
        if (options.save is None) is (options.against is None):
            parser.error("one of --save and --against must be given")
    else:
        if options.model is None:
            parser.error(f"argument --model: {options.source} needs one")
        if options.where or options.save or options.against:
            parser.error(f"a URL, --save and --against are for servers, not for {options.source}")
    if options.max_tokens < 1:
        parser.error(f"argument --max-tokens: must be at least 1, got {options.max_tokens}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if options.answers_to:
        prompts = options.prompts.read_text().splitlines() if options.prompts else PROMPTS
        answers = FRAMEWORKS[options.source](options.model, prompts, options.max_tokens, options.engine)
        write_answers(options.answers_to, answers)
        return 0
    try:
        return 0 if check(options) else 1
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
