"""Decode requests whose paged cache is divided among ranks, and compare with one rank that has all of it.

Page j of a request belongs to rank j modulo the number of ranks, so that a request that grows by a token writes to one
rank, and all ranks read equally much. Each rank decodes the pages it has; the results and their log-sum-exps go to all
ranks, which merge them. The queries are the same on all ranks, and random, as are the cached latents.

    python examples/context_parallel.py --ranks 2
    torchrun --nproc-per-node 2 examples/context_parallel.py

One rank per GPU, with NCCL, where there are as many sm_90 GPUs as ranks; on CPUs, with gloo, otherwise.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing

import flash_mla

PAGE_SIZE = 64
LATENT_DIM = 512  # also the size of the values, which are the latent part of the keys
ROPE_DIM = 64
KEY_DIM = LATENT_DIM + ROPE_DIM
SOFTMAX_SCALE = (128 + ROPE_DIM) ** -0.5  # from the head size before the projections are absorbed
KEY_STD = 0.1  # as in decode_demo.py

# What the merged result may be off from that of one rank: |actual - expected| <= ATOL + RTOL * |expected|.
OUT_ATOL, OUT_RTOL = 8e-4, 2.01 / 128
LSE_ATOL, LSE_RTOL = 1e-6, 8.01 / 65536

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TIMEOUT = timedelta(minutes=2)  # of every collective, for ranks that do not come


@dataclass
class Shard:
    """The part of a batch's cache that one rank has."""

    pages: torch.Tensor  # (num_pages, 64, 1, 576)
    block_table: torch.Tensor  # (batch_size, max_pages) int32
    cache_seqlens: torch.Tensor  # (batch_size,) int32, the tokens that are here


def random_page(request: int, index: int) -> torch.Tensor:
    """The latents of one page, (64, 1, 576) float32: the same on whichever rank asks for them."""
    generator = torch.Generator().manual_seed(request * 2**24 + index + 1)
    return torch.randn(PAGE_SIZE, 1, KEY_DIM, generator=generator) * KEY_STD


def random_queries(batch_size: int, num_heads: int) -> torch.Tensor:
    return torch.randn(batch_size, 1, num_heads, KEY_DIM, generator=torch.Generator().manual_seed(0))


def make_shard(lengths: Sequence[int], rank: int, num_ranks: int, dtype: torch.dtype, device: torch.device) -> Shard:
    """What a rank has of the requests with these lengths. A page that is not full is the last one where it is, too."""
    own = [range(rank, math.ceil(length / PAGE_SIZE), num_ranks) for length in lengths]
    # A cache has at least one page. Memory without a token is NaN, so that reading it could not go unnoticed.
    num_pages = max(1, sum(map(len, own)))
    pages = torch.full((num_pages, PAGE_SIZE, 1, KEY_DIM), float("nan"), dtype=dtype)
    block_table = torch.full((len(lengths), max(1, *map(len, own))), -1, dtype=torch.int32)
    cache_seqlens = torch.zeros(len(lengths), dtype=torch.int32)
    free_pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(rank)).tolist()
    for request, (length, indices) in enumerate(zip(lengths, own, strict=True)):
        for column, index in enumerate(indices):
            num_tokens = min(PAGE_SIZE, length - index * PAGE_SIZE)
            page = free_pages.pop()
            pages[page, :num_tokens] = random_page(request, index)[:num_tokens]
            block_table[request, column] = page
            cache_seqlens[request] += num_tokens
    return Shard(pages.to(device), block_table.to(device), cache_seqlens.to(device))


def decode(q: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the tokens of the shard; requests that have none here get out 0 and lse +inf.

    Not causal: the one query of a request is its newest token and sees all others. Several queries would have to know
    which of the tokens here come after them.
    """
    metadata, num_splits = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(
        q,
        shard.pages,
        shard.block_table,
        shard.cache_seqlens,
        LATENT_DIM,
        metadata,
        num_splits,
        SOFTMAX_SCALE,
        causal=False,
    )


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks, one behind the other in a new first dimension."""
    # gloo takes them one behind the other in the first dimension that there is.
    gathered = tensor.new_empty(dist.get_world_size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor)
    return gathered.view(-1, *tensor.shape)


def context_parallel_decode(q: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the tokens of all ranks' shards, the same bits on all ranks."""
    out, lse = decode(q, shard)
    return flash_mla.merge_attention_states(all_gather(out), all_gather(lse))


def compare(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> tuple[float, bool]:
    """The largest error, and whether all are within the bound; equal infinities are right."""
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).abs().masked_fill(actual == expected, 0)
    return error.max().item(), bool(((error <= atol + rtol * expected.abs()) | (actual == expected)).all())


def all_ranks_have(tensor: torch.Tensor) -> bool:
    """Whether the tensor has the same bits on all ranks."""
    bits = all_gather(tensor.contiguous().view(torch.uint8))
    return bool((bits == bits[0]).all())


def run_rank(options: argparse.Namespace) -> bool:
    """What each rank does once the process group is there; returns whether the result is right, to all ranks."""
    rank, num_ranks, device, dtype = dist.get_rank(), dist.get_world_size(), options.device, DTYPES[options.dtype]
    q = random_queries(len(options.tokens), options.heads).to(device, dtype)
    shard = make_shard(options.tokens, rank, num_ranks, dtype, device)
    out, lse = context_parallel_decode(q, shard)

    same_bits = all_ranks_have(out) and all_ranks_have(lse)
    shard_lengths = all_gather(shard.cache_seqlens).tolist()
    verdict = torch.zeros(1, dtype=torch.int32, device=device)
    if rank == 0:
        expected_out, expected_lse = decode(q, make_shard(options.tokens, 0, 1, dtype, device))
        out_error, out_is_right = compare(out, expected_out, OUT_ATOL, OUT_RTOL)
        lse_error, lse_is_right = compare(lse, expected_lse, LSE_ATOL, LSE_RTOL)
        print_table(options, shard_lengths)
        print()
        print(f"out    differs from one rank's by {out_error:.2g} at most, {'ok' if out_is_right else 'WRONG'}")
        print(f"lse    differs from one rank's by {lse_error:.2g} at most, {'ok' if lse_is_right else 'WRONG'}")
        print(f"ranks  have {'the same bits, ok' if same_bits else 'different bits, WRONG'}", flush=True)
        verdict.fill_(out_is_right and lse_is_right and same_bits)
    dist.broadcast(verdict, src=0)
    return bool(verdict.item())


def print_table(options: argparse.Namespace, shard_lengths: list[list[int]]) -> None:
    """Tokens of every request on every rank, and what their latents take in memory."""
    where = "CPU, gloo" if options.device.type == "cpu" else f"{torch.cuda.get_device_name(options.device)}, NCCL"
    ranks = "1 rank" if options.ranks == 1 else f"{options.ranks} ranks"
    print(f"{ranks} ({where}), {options.heads} heads, {options.dtype}: tokens per request and rank")
    print()
    header = [f"request {request}" for request in range(len(options.tokens))]
    lines = [("rank", header, "MB")]
    totals = [sum(column) for column in zip(*shard_lengths, strict=True)]
    for name, lengths in [*((str(rank), lengths) for rank, lengths in enumerate(shard_lengths)), ("all", totals)]:
        num_bytes = sum(lengths) * KEY_DIM * DTYPES[options.dtype].itemsize
        lines.append((name, [str(length) for length in lengths], f"{num_bytes / 1e6:.2f}"))
    for name, cells, megabytes in lines:
        print(f"{name:<4}", *(f"{cell:>10}" for cell in cells), f"{megabytes:>8}", sep="  ")


def rank_main(rank: int, num_ranks: int, local_rank: int, store: dist.Store | None, options: argparse.Namespace) -> int:
    """Join the process group, through the store or else the environment of torchrun; returns the exit status."""
    if options.device.type == "cuda":
        options.device = find_gpus()[local_rank]
        torch.cuda.set_device(options.device)
    backend = "nccl" if options.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=TIMEOUT)
    try:
        return 0 if run_rank(options) else 1
    finally:
        dist.destroy_process_group()


def spawned_main(rank: int, num_ranks: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=False, timeout=TIMEOUT)
    sys.exit(rank_main(rank, num_ranks, rank, store, options))


def spawn(num_ranks: int, options: argparse.Namespace) -> int:
    """Run the ranks in processes of their own; returns the exit status."""
    # Port 0: a free one, which nobody else can take in between.
    store = dist.TCPStore("127.0.0.1", 0, num_ranks, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    try:
        torch.multiprocessing.spawn(spawned_main, (num_ranks, store.port, options), nprocs=num_ranks)
    except torch.multiprocessing.ProcessExitedException as error:
        return error.exit_code
    return 0


def find_gpus() -> list[torch.device]:
    """Those that the kernels run on."""
    indices = range(torch.cuda.device_count())
    return [torch.device("cuda", index) for index in indices if torch.cuda.get_device_capability(index) == (9, 0)]


def choose_device(requested: str, ranks_on_this_host: int) -> torch.device:
    """The kind of device to decode on. Raises ValueError for one that cannot be used."""
    reason = flash_mla.unavailable_reason()
    if reason is None and len(find_gpus()) < ranks_on_this_host:
        reason = f"{ranks_on_this_host} ranks need as many sm_90 GPUs, torch sees {len(find_gpus())}"
    if requested == "cuda" and reason is not None:
        raise ValueError(f"cannot be cuda: {reason}")
    return torch.device("cpu" if requested == "cpu" or reason is not None else "cuda")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="processes to start (2); under torchrun its own number of them")
    parser.add_argument("--tokens", type=int, nargs="+", default=[20_000, 3001, 64, 0], help="of each request")
    parser.add_argument("--heads", type=int, default=16, help="query heads (16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args(arguments)
    under_torchrun = dist.is_torchelastic_launched()
    if under_torchrun and options.ranks is not None:
        parser.error("argument --ranks: torchrun has started the ranks")
    if options.ranks is None:
        options.ranks = int(os.environ["WORLD_SIZE"]) if under_torchrun else 2
    for name in ("ranks", "heads"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: must be at least 1, got {getattr(options, name)}")
    if min(options.tokens) < 0:
        parser.error(f"argument --tokens: must not be negative, got {min(options.tokens)}")
    try:
        on_this_host = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun else options.ranks
        options.device = choose_device(options.device, on_this_host)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if dist.is_torchelastic_launched():
        return rank_main(int(os.environ["RANK"]), options.ranks, int(os.environ["LOCAL_RANK"]), None, options)
    if options.ranks == 1:
        return rank_main(0, 1, 0, dist.HashStore(), options)
    return spawn(options.ranks, options)


if __name__ == "__main__":
    sys.exit(main())
