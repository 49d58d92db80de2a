"""examples/deepseek_v3.py: its logits are those of the model's own attention, and it compiles without graph breaks."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import deepseek_v3 as example
import pytest
import torch
from paged_mla import DecodeStep, OutOfPagesError, PagedDecoder, route_attention
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DeepseekV3ForCausalLM

import flash_mla
from build_tools.requirements import requirements

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "deepseek-v3.md"
PAGE_SIZE = 64
# Within a page, up to its end, from its end on, and over it; each crosses at least one boundary in so many steps.
PROMPT_LENGTHS = [1, 60, 64, 130]
NUM_STEPS = 64
SECONDS = 120  # for a process that hangs; it takes some 10


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For operations this small, threads that wait for each other cost more than they bring on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_own_model(seed: int) -> DeepseekV3ForCausalLM:
    """In float32, with weights that bfloat16 has too, and with the eager attention of transformers."""
    torch.manual_seed(seed)
    model = example.make_model(num_layers=3, num_heads=4).bfloat16().float()
    model.set_attn_implementation("eager")
    return model


def make_sequences(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(512, (length + NUM_STEPS,), generator=generator) for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def own_model() -> DeepseekV3ForCausalLM:
    return make_own_model(0)


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    return make_sequences(0)


@pytest.fixture(scope="module")
def expected(own_model, sequences) -> Tensor:
    return logits_of(own_model, sequences)


@torch.no_grad()
def logits_of(model: DeepseekV3ForCausalLM, sequences: list[Tensor]) -> Tensor:
    """The model's logits after each prompt and each of the steps: (num_requests, NUM_STEPS + 1, vocab_size) float32."""
    options = {"use_cache": False, "logits_to_keep": NUM_STEPS + 1}
    return (
        torch.cat([model(input_ids=each[None].to(model.device), **options).logits for each in sequences]).float().cpu()
    )


def routed(model: DeepseekV3ForCausalLM, device: str = "cpu", dtype: torch.dtype = torch.float32):
    model = copy.deepcopy(model).to(device, dtype)
    route_attention(model)
    return model


def teacher_forced(decoder: PagedDecoder, sequences: list[Tensor]) -> Tensor:
    """The same from prefill and decode steps that are given the tokens of the sequences."""
    logits = []
    for row, (sequence, length) in enumerate(zip(sequences, PROMPT_LENGTHS, strict=True)):
        got_row, after_prompt = decoder.add_request(sequence[:length])
        assert got_row == row
        logits.append(after_prompt)
    logits = [torch.stack(logits)]
    for step in range(NUM_STEPS):
        tokens = [sequence[length + step] for sequence, length in zip(sequences, PROMPT_LENGTHS, strict=True)]
        logits.append(decoder.step(torch.stack(tokens)).clone())
    return torch.stack(logits, dim=1).float().cpu()


def make_decoder(model: DeepseekV3ForCausalLM, **options) -> PagedDecoder:
    return PagedDecoder(model, len(PROMPT_LENGTHS), max(PROMPT_LENGTHS) + NUM_STEPS, **options)


def test_float32_logits_are_those_of_the_own_attention(own_model, sequences, expected):
    decoder = make_decoder(routed(own_model))
    actual = teacher_forced(decoder, sequences)
    assert (actual - expected).abs().max() <= 1e-4
    assert expected.std() > 0.5  # so that the bound means something
    assert decoder.cache.lengths == [length + NUM_STEPS for length in PROMPT_LENGTHS]
    pages = sum(-(-length // PAGE_SIZE) for length in decoder.cache.lengths)
    assert decoder.cache.allocator.num_free == decoder.cache.allocator.num_pages - pages


def test_bfloat16_error_is_not_larger_than_that_of_the_own_attention(device):
    """By the error of the median token: where rounding chooses another expert, errors are forty times as large, for
    the one attention as for the other, and would hide all others in a mean."""
    errors, own_errors = [], []
    for seed in range(3):
        model, sequences = make_own_model(seed), make_sequences(seed)
        expected = logits_of(model, sequences)
        actual = teacher_forced(make_decoder(routed(model, device, torch.bfloat16)), sequences)
        own = logits_of(model.to(device, torch.bfloat16), sequences)
        errors.append(example.error_per_token(actual, expected))
        own_errors.append(example.error_per_token(own, expected))
    error, own_error = (torch.cat(each).median() for each in (errors, own_errors))
    assert 0 < error <= own_error


@pytest.mark.parametrize("wrong", ["scale", "length", "page"])
def test_float32_logits_show_what_is_wrong(own_model, sequences, expected, monkeypatch, wrong):
    right = flash_mla.flash_mla_with_kvcache

    def decode(q, k_cache, block_table, cache_seqlens, *arguments, softmax_scale, **options):
        if wrong == "scale":
            softmax_scale = 576**-0.5
        elif wrong == "length":
            cache_seqlens = (cache_seqlens - 1).clamp(min=0)
        else:
            block_table = block_table.flip(0)
            cache_seqlens = cache_seqlens.minimum((block_table >= 0).sum(1, dtype=torch.int32) * PAGE_SIZE)
        return right(q, k_cache.nan_to_num(), block_table, cache_seqlens, *arguments, softmax_scale=softmax_scale)

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", decode)
    actual = teacher_forced(make_decoder(routed(own_model)), sequences)
    assert (actual - expected).abs().max() > 1e-2


@torch.no_grad()
def test_requests_come_and_go(own_model):
    """Each gets what it would get alone, in pages that others have left, beside rows without a request."""
    decoder = PagedDecoder(routed(own_model), max_requests=3, max_tokens=150, num_pages=4)
    generator = torch.Generator().manual_seed(1)
    tokens: dict[int, Tensor] = {}

    def add(length: int) -> None:
        prompt = torch.randint(512, (length,), generator=generator)
        row, logits = decoder.add_request(prompt)
        tokens[row] = prompt
        check(row, logits)

    def remove(row: int) -> None:
        decoder.remove_request(row)
        del tokens[row]

    def step() -> None:
        new = torch.randint(512, (3,), generator=generator)
        logits = decoder.step(new)
        assert logits.isfinite().all()
        for row in tokens:
            tokens[row] = torch.cat([tokens[row], new[row : row + 1]])
            check(row, logits[row])

    def check(row: int, logits: Tensor) -> None:
        expected = own_model(input_ids=tokens[row][None], use_cache=False, logits_to_keep=1).logits[0, -1]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)

    step()  # of nothing
    add(63)
    add(1)
    step()
    add(62)
    step()
    assert decoder.cache.lengths == [65, 3, 63] and decoder.cache.allocator.num_free == 0
    step()
    with pytest.raises(OutOfPagesError):
        decoder.step(torch.zeros(3, dtype=torch.int64))  # row 2 has 64 tokens
    remove(0)
    step()
    add(20)
    step()
    remove(1)
    remove(2)
    step()
    assert decoder.cache.lengths == [22, 0, 0] and decoder.cache.allocator.num_free == 3


def layer_step(layer, hidden_states, position_embeddings, caches, slots, block_table, cache_seqlens) -> Tensor:
    """A decoder layer of transformers in a decode step: appends to its cache, plans and attends."""
    schedule, _ = flash_mla.get_mla_metadata()
    step = DecodeStep(caches, slots, block_table, cache_seqlens, schedule)
    return layer(
        hidden_states,
        position_embeddings=position_embeddings,
        attention_mask=None,
        use_cache=False,
        paged_step=step,
    )


LAYERS = pytest.mark.parametrize("index", [0, 1], ids=["dense", "experts"])


def layer_arguments(model: DeepseekV3ForCausalLM, index: int) -> tuple[PagedDecoder, list]:
    """What `layer_step` takes, from a decoder after a step, whose cache the layer may write to again."""
    decoder = PagedDecoder(model, max_requests=3, max_tokens=200, use_graph=False)
    for length in (63, 5, 130):
        decoder.add_request(torch.arange(length))
    decoder.step(torch.arange(3))
    cache = decoder.cache
    positions = cache.cache_seqlens.long() - 1
    slots = torch.stack([cache.slots(row)[-1] for row in range(3)])
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(3, 1, model.config.hidden_size, generator=generator).to(model.device, model.dtype)
    embeddings = model.model.rotary_emb(hidden_states, positions[:, None])
    layer = model.model.layers[index]
    return decoder, [layer, hidden_states, embeddings, cache.layers, slots, cache.block_table, cache.cache_seqlens]


@LAYERS
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_layer_compiles_without_graph_breaks(own_model, index):
    decoder, arguments = layer_arguments(routed(own_model), index)
    expected = layer_step(*arguments)
    written, slots = decoder.cache.layers[index].flatten(0, 2), arguments[4]
    expected_latents = written[slots].clone()
    written[slots] = float("nan")
    actual = torch.compile(layer_step, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(actual, expected)
    assert torch.equal(written[slots], expected_latents) and expected_latents.isfinite().all()


@pytest.mark.gpu
@LAYERS
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_layer_compiled_to_graphs_gives_what_it_gives_eagerly(own_model, index):
    decoder, arguments = layer_arguments(routed(own_model, "cuda", torch.bfloat16), index)
    cache, slots = decoder.cache.layers[index], arguments[4]
    # A graph may write to memory that it is told stays where it is; else torch does without a graph.
    torch._dynamo.mark_static_address(cache)
    skipped = counters["inductor"]["cudagraph_skips"]
    compiled = torch.compile(layer_step, fullgraph=True, mode="reduce-overhead")
    written = cache.flatten(0, 2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):  # the first calls warm up and record
        arguments[1] = torch.randn(arguments[1].shape, generator=generator).to(arguments[1])
        expected = layer_step(*arguments)
        expected_latents = written[slots].clone()
        written[slots] = float("nan")
        actual = compiled(*arguments).clone()
        torch.testing.assert_close(written[slots], expected_latents, rtol=0.02, atol=0.02)
        # Fused operations round less, which now and then chooses another expert for a token.
        errors = example.error_per_token(actual.float(), expected.float())
        assert errors.median() <= 0.02 * expected.float().square().mean().sqrt()
    assert counters["inductor"]["cudagraph_skips"] == skipped


@pytest.mark.gpu
def test_graph_step_is_the_eager_step(own_model):
    """The same bits, while requests come, grow over pages and go."""
    model = routed(own_model, "cuda", torch.bfloat16)
    decoders = [PagedDecoder(model, max_requests=4, max_tokens=300, use_graph=use_graph) for use_graph in (True, False)]
    generator = torch.Generator().manual_seed(2)

    def on_both(function) -> None:
        for results in zip(*(function(decoder) for decoder in decoders), strict=True):
            assert torch.equal(*results)

    def step(decoder: PagedDecoder, tokens: Tensor) -> Tensor:
        # Rows without a request have no meaning.
        return decoder.step(tokens)[decoder.cache.rows_in_use].clone()

    for length in (1, 64, 130, 200):
        prompt = torch.randint(512, (length,), generator=generator)
        on_both(lambda decoder, prompt=prompt: [decoder.add_request(prompt)[1]])
        for _ in range(20):
            tokens = torch.randint(512, (4,), generator=generator)
            on_both(lambda decoder, tokens=tokens: [step(decoder, tokens)])
        if length == 130:
            for decoder in decoders:
                decoder.remove_request(0)
    caches = [decoder.cache for decoder in decoders]
    assert caches[0].lengths == caches[1].lengths == [220, 124, 170, 0]
    for name in ("cache_seqlens", "block_table"):
        assert torch.equal(*(getattr(cache, name) for cache in caches))


def test_a_model_of_other_sizes():
    model = example.make_model(num_layers=1, num_heads=2)
    model.config.qk_rope_head_dim = 32
    with pytest.raises(ValueError, match=r"^model.config.qk_rope_head_dim must be 64, got 32"):
        route_attention(model)


def test_bad_input_of_the_decoder(own_model):
    model = routed(own_model)
    with pytest.raises(ValueError, match=r"^use_graph must be False for a model that is not on a GPU, got True .*cpu"):
        PagedDecoder(model, 1, 10, use_graph=True)
    decoder = PagedDecoder(model, 1, 10)
    for prompt, message in (
        (torch.zeros(1, 5, dtype=torch.int64), r"^prompt must have shape \(num_tokens,\), got \[1, 5\]"),
        (torch.zeros(0, dtype=torch.int64), r"^num_tokens must be from 1 to max_tokens = 10, got 0"),
        (torch.zeros(11, dtype=torch.int64), r"^num_tokens must be from 1 to max_tokens = 10, got 11"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.add_request(prompt)
    with pytest.raises(ValueError, match=r"^tokens must have shape \(max_requests,\) = \[1\], got \[2\]"):
        decoder.step(torch.zeros(2, dtype=torch.int64))


def check_printed(printed: str, prompts: list[int], steps: int, dtype: str) -> None:
    where, table, verdicts = printed.split("\n\n")
    assert where.endswith(f" tokens, {dtype}")
    header, *lines = table.splitlines()
    assert re.split(r" {2,}", header) == ["step", *(f"request {number}" for number in range(len(prompts)))]
    columns = [[line[6 + 11 * number :][:9].strip() for line in lines] for number in range(len(prompts))]
    for column in columns:
        tokens = [int(cell) for cell in column if cell]
        assert len(tokens) == steps and all(0 <= token < 512 for token in tokens)
    pages, logits = verdicts.splitlines()
    free, total = re.fullmatch(r"pages +(\d+) of (\d+) are free again", pages).groups()
    assert free == total
    assert logits.startswith("logits  ") and logits.endswith(", ok")


@pytest.mark.timeout(SECONDS + 10)
def test_script_runs():
    command = [sys.executable, "examples/deepseek_v3.py", "--steps", "8", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert process.returncode == 0, process.stderr
    check_printed(process.stdout, [100, 7, 64, 190, 33], 8, "fp32")


SMALL = ["--prompts", "3", "70", "64", "--batch", "2", "--steps", "5", "--layers", "2", "--heads", "4"]


def test_script_in_bfloat16(device, capsys):
    assert example.main([*SMALL, "--device", device, "--dtype", "bf16"]) == 0
    check_printed(capsys.readouterr().out, [3, 70, 64], 5, "bf16")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_script_finds_wrong_results(monkeypatch, capsys, dtype):
    right = flash_mla.flash_mla_with_kvcache

    def decode(*arguments, **options):
        out, lse = right(*arguments, **options)
        return out * 1.05, lse

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", decode)
    assert example.main([*SMALL, "--device", "cpu", "--dtype", dtype]) == 1
    assert capsys.readouterr().out.endswith(", WRONG\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--prompts", "5", "0"], "--prompts: must be at least 1, got 0"),
        (["--device", "tpu"], "--device: must be auto, cpu or cuda, got 'tpu'"),
        (["--device", "cuda", "--dtype", "fp32"], "--dtype: must be bf16 on a GPU, got fp32"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(flash_mla, "unavailable_reason", lambda: None)
    monkeypatch.setattr("decode_demo.find_gpu", lambda: torch.device("cuda", 0))
    with pytest.raises(SystemExit, match="2"):
        example.main(arguments)
    assert message in capsys.readouterr().err


def test_code_of_the_page_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(code, {})
    (promised,) = re.findall(r"^print\(.*# (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out == f"{promised}\n"


def test_tests_and_examples_want_the_same_transformers():
    wanted = {
        extra: [each for each in requirements([extra]) if "transformers" in each] for extra in ("test", "examples")
    }
    assert len(wanted["test"]) == 1 and wanted["test"] == wanted["examples"]
