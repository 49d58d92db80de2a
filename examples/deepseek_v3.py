"""Generate with a DeepSeek-V3 of Hugging Face transformers whose attention goes through flash_mla.

The model is small and its weights are random, so its tokens mean nothing: what the example shows is the paged cache,
the calls, and that the logits are those of the model's own attention. paged_mla/ beside this file has all that another
program would need. Prompts wait until a row of the batch is free; their tokens are printed as they come.

    python examples/deepseek_v3.py --help
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from decode_demo import choose_device, count
from paged_mla import PagedDecoder, route_attention
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What the logits, which are of the order 1, may differ from those of the model's own attention: in float32 any of them,
MAX_DIFFERENCE = 1e-4
# in bfloat16 the error of the median token against float32, as a multiple of the other's. The median, since now and
# then rounding chooses another expert, for the one or the other; and more than 1, since with few tokens chance counts.
MAX_ERROR_RATIO = 1.25


@dataclass
class Request:
    """A prompt and what has been generated."""

    number: int
    prompt: Tensor  # (num_tokens,) int64
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # that each of the tokens was taken from, (vocab_size,)


def make_model(num_layers: int, num_heads: int) -> DeepseekV3ForCausalLM:
    """A DeepSeek-V3 with latents, heads, YaRN and kinds of layers as in the large one, but few and narrow layers."""
    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        first_k_dense_replace=1,  # the other layers are mixtures of experts
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        q_lora_rank=192,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=163840,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        # Narrow layers need larger weights for logits of the order 1.
        initializer_range=0.05,
    )
    return DeepseekV3ForCausalLM(config).eval()


def generate(decoder: PagedDecoder, requests: Sequence[Request], num_steps: int) -> Iterator[list[Request]]:
    """Append num_steps tokens to every request, the likeliest each time; yields the requests that got one."""
    waiting, running = deque(requests), dict[int, Request]()
    tokens = torch.zeros(len(decoder.cache.lengths), dtype=torch.int64, device=decoder.model.device)

    def take(row: int, logits: Tensor) -> None:
        tokens[row] = logits.argmax()
        running[row].tokens.append(int(tokens[row]))
        running[row].logits.append(logits.clone())

    while waiting or running:
        if running:
            logits = decoder.step(tokens)
            for row in running:
                take(row, logits[row])
        while waiting and len(running) < len(tokens):
            request = waiting.popleft()
            row, prompt_logits = decoder.add_request(request.prompt)
            running[row] = request
            take(row, prompt_logits)
        yield sorted(running.values(), key=lambda request: request.number)
        for row in [row for row, request in running.items() if len(request.tokens) == num_steps]:
            decoder.remove_request(row)
            del running[row]


@torch.no_grad()
def own_logits(model: DeepseekV3ForCausalLM, requests: Sequence[Request]) -> Tensor:
    """The logits that a model has for every generated token, all at once: (num_tokens, vocab_size) float32."""
    logits = []
    for request in requests:
        generated = torch.tensor(request.tokens[:-1], dtype=torch.int64)
        input_ids = torch.cat([request.prompt, generated])[None]
        logits.append(model(input_ids=input_ids, use_cache=False, logits_to_keep=len(request.tokens)).logits[0])
    return torch.cat(logits).float()


def error_per_token(logits: Tensor, expected: Tensor) -> Tensor:
    """Root mean square over the vocabulary: (..., vocab_size) -> (num_tokens,)."""
    return (logits - expected).square().mean(-1).sqrt().flatten()


def judge(model: DeepseekV3ForCausalLM, requests: Sequence[Request]) -> tuple[str, bool]:
    """Compare the logits with those of the model's own attention; returns what was found, and whether it is right.

    Args:
        model: before `route_attention`, on the CPU; afterwards it is in float32.
    """
    model.set_attn_implementation("eager")
    actual = torch.cat([torch.stack(request.logits) for request in requests]).float().cpu()
    own = own_logits(model, requests)
    if model.dtype == torch.float32:
        difference = (actual - own).abs().max().item()
        found = f"differ from those of the model's own attention by {difference:.2g} at most"
        return found, difference <= MAX_DIFFERENCE
    expected = own_logits(model.float(), requests)
    error, own_error = (error_per_token(logits, expected).median().item() for logits in (actual, own))
    found = f"are off from float32 by {error:.2g} (median), those of the model's own attention by {own_error:.2g}"
    return found, error <= MAX_ERROR_RATIO * own_error


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: an sm_90 GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 7, 64, 190, 33], help="their numbers of tokens")
    parser.add_argument("--steps", type=int, default=32, help="tokens to generate for each prompt (32)")
    parser.add_argument("--batch", type=int, default=4, help="requests that are decoded together (4)")
    parser.add_argument("--layers", type=int, default=3, help="of the model, the first without experts (3)")
    parser.add_argument("--heads", type=int, default=16, help="query heads (16)")
    parser.add_argument("--no-graph", action="store_true", help="on a GPU: decode without CUDA graph")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "layers", "heads"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(options, name)}")
    if min(options.prompts) < 1:
        parser.error(f"argument --prompts: must be at least 1, got {min(options.prompts)}")
    try:
        options.device = choose_device(options.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    on_gpu = options.device.type == "cuda"
    if options.dtype is None:
        options.dtype = "bf16" if on_gpu else "fp32"
    if on_gpu and options.dtype == "fp32":
        parser.error("argument --dtype: must be bf16 on a GPU, got fp32")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.manual_seed(0)
    model = make_model(options.layers, options.heads).to(DTYPES[options.dtype])
    own_model = copy.deepcopy(model)
    model.to(options.device)
    route_attention(model)
    use_graph = options.device.type == "cuda" and not options.no_graph
    max_tokens = max(options.prompts) + options.steps
    decoder = PagedDecoder(model, options.batch, max_tokens, use_graph=use_graph)
    requests = [
        Request(number, torch.randint(model.config.vocab_size, (length,)))
        for number, length in enumerate(options.prompts)
    ]

    print(f"{count(len(requests), 'prompt')} of {', '.join(map(str, options.prompts))} tokens, {options.dtype}")
    print()
    print("step", *(f"{f'request {request.number}':>9}" for request in requests), sep="  ", flush=True)
    for step, running in enumerate(generate(decoder, requests, options.steps)):
        cells = [str(request.tokens[-1]) if request in running else "" for request in requests]
        print(f"{step:4}", *(f"{cell:>9}" for cell in cells), sep="  ", flush=True)

    allocator = decoder.cache.allocator
    found, is_right = judge(own_model, requests)
    print()
    print(f"pages   {allocator.num_free} of {allocator.num_pages} are free again")
    print(f"logits  {found}, {'ok' if is_right else 'WRONG'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
