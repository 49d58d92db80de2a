"""Decoding inside CUDA graphs, on several streams and through torch.compile."""

from __future__ import annotations

import pytest
import torch
from cases import DEFAULT_SCALE, HEAD_DIM_V
from gpu_cases import PagedCache, capture, check, decode, make_cache, make_queries, mismatch, random_lengths, reference
from torch import Tensor

import flash_mla

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
BATCH_SIZE = 6
MAX_PAGES = 80  # per request
POOL_PAGES = 300
ROUNDS = [
    [64, 1, 0, 140, 4096, 20],
    [65, 2, 1, 141, 4097, 21],
    [0, 0, 0, 0, 0, 0],
    [5000, 5000, 0, 0, 5000, 0],
    [700, 63, 64, 65, 128, 1],
]
PLANS = pytest.mark.parametrize("plan", ["lazy-in-graph", "eager-in-graph", "refreshed-outside", "stale"])
SHAPES = pytest.mark.parametrize(("seqlen_q", "num_heads_q"), [(1, 16), (2, 128)], ids=["q1-h16", "q2-h128"])


class StaticBuffers:
    """Tensors at fixed addresses, as a captured graph needs them, filled anew for every round."""

    def __init__(self, seqlen_q: int, num_heads_q: int, table_width: int = MAX_PAGES):
        self.seqlen_q, self.num_heads_q = seqlen_q, num_heads_q
        self.q = make_queries(BATCH_SIZE, seqlen_q, num_heads_q, BF16).clone()
        self.pages = torch.full((POOL_PAGES, 64, 1, 576), float("nan"), dtype=BF16, device="cuda")
        self.whole_table = torch.full((BATCH_SIZE, MAX_PAGES), -1, dtype=torch.int32, device="cuda")
        self.block_table = self.whole_table[:, :table_width]
        self.cache_seqlens = torch.zeros(BATCH_SIZE, dtype=torch.int32, device="cuda")

    def fill(self, lengths: list[int], seed: int) -> PagedCache:
        """Other tokens, pages and queries in place; returns what the reference needs."""
        cache = make_cache(lengths, 1, BF16, seed=seed, invalid_page=2147480000)
        self.q.copy_(make_queries(BATCH_SIZE, self.seqlen_q, self.num_heads_q, BF16, seed=seed))
        self.pages.fill_(float("nan"))
        self.pages[: cache.pages.shape[0]].copy_(cache.pages)
        self.whole_table.fill_(2147480000)
        self.whole_table[:, : cache.block_table.shape[1]].copy_(cache.block_table)
        self.cache_seqlens.copy_(cache.cache_seqlens)
        return PagedCache(cache.lengths, self.cache_seqlens, self.pages, self.whole_table, cache.keys)

    def eager_plan(self) -> tuple[Tensor, Tensor]:
        return flash_mla.get_mla_decoding_metadata(self.cache_seqlens, self.seqlen_q * self.num_heads_q, 1)

    def decode(self, metadata: object, num_splits: Tensor | None) -> tuple[Tensor, Tensor]:
        return flash_mla.flash_mla_with_kvcache(
            self.q,
            self.pages,
            self.block_table,
            self.cache_seqlens,
            HEAD_DIM_V,
            metadata,
            num_splits,
            DEFAULT_SCALE,
            causal=True,
        )


def replay(graph: torch.cuda.CUDAGraph, result: tuple[Tensor, Tensor]) -> None:
    for tensor in result:
        tensor.fill_(float("nan"))
    graph.replay()


@PLANS
@SHAPES
@pytest.mark.parametrize("captured_with", [0, 2], ids=["captured-with-tokens", "captured-empty"])
def test_replay_with_changed_inputs(seqlen_q, num_heads_q, plan, captured_with):
    buffers = StaticBuffers(seqlen_q, num_heads_q)
    buffers.fill(ROUNDS[captured_with], seed=captured_with)
    persistent = tuple(tensor.clone() for tensor in buffers.eager_plan())

    def step() -> tuple[Tensor, Tensor]:
        if plan == "lazy-in-graph":
            return buffers.decode(*flash_mla.get_mla_metadata())
        if plan == "eager-in-graph":
            return buffers.decode(*buffers.eager_plan())
        return buffers.decode(*persistent)

    graph, result = capture(step)
    for seed, lengths in enumerate(ROUNDS * 2):
        cache = buffers.fill(lengths, seed)
        if plan == "refreshed-outside":
            for tensor, fresh in zip(persistent, buffers.eager_plan(), strict=True):
                tensor.copy_(fresh)
        replay(graph, result)
        problem = mismatch(*result, reference(buffers.q, cache, True))
        assert problem is None, f"replay {seed} with lengths {lengths}: {problem}"
        if plan != "stale":
            eager = decode(buffers.q, cache, True)
            assert all(torch.equal(a, b) for a, b in zip(result, eager, strict=True)), (
                f"replay {seed} differs from eager"
            )


@SHAPES
def test_table_captured_narrow_is_replayed_deep(seqlen_q, num_heads_q):
    """The width of the table in the graph says nothing: SGLang captures with one column and replays with more pages."""
    buffers = StaticBuffers(seqlen_q, num_heads_q, table_width=1)
    buffers.fill(ROUNDS[2], seed=0)
    graph, result = capture(lambda: buffers.decode(*flash_mla.get_mla_metadata()))
    cache = buffers.fill(ROUNDS[0], seed=1)
    replay(graph, result)
    assert (problem := mismatch(*result, reference(buffers.q, cache, True))) is None, problem


def test_layers_share_one_plan_in_a_graph():
    """One lazy schedule for all layers is planned once inside the graph, and again at every replay."""
    buffers = StaticBuffers(1, 16)
    layers = [buffers.pages] + [torch.empty_like(buffers.pages) for _ in range(2)]
    buffers.fill(ROUNDS[0], seed=0)

    def step() -> list[tuple[Tensor, Tensor]]:
        metadata, num_splits = flash_mla.get_mla_metadata()
        results = []
        for pages in layers:
            results.append(
                flash_mla.flash_mla_with_kvcache(
                    buffers.q,
                    pages,
                    buffers.block_table,
                    buffers.cache_seqlens,
                    HEAD_DIM_V,
                    metadata,
                    num_splits,
                    DEFAULT_SCALE,
                )
            )
        return results

    for other in layers[1:]:
        other.copy_(buffers.pages)
    graph, results = capture(step)
    for seed, lengths in enumerate(ROUNDS):
        cache = buffers.fill(lengths, seed)
        for number, other in enumerate(layers[1:], start=2):
            torch.mul(buffers.pages, 1 / number, out=other)
        graph.replay()
        for number, (pages, result) in enumerate(zip(layers, results, strict=True), start=1):
            # Halves are exact in bf16; a third is not, so that the keys are taken from what was written.
            keys = cache.keys if number == 1 else (cache.keys.to(BF16) * (1 / number)).double()
            own = PagedCache(cache.lengths, cache.cache_seqlens, pages, cache.block_table, keys)
            problem = mismatch(*result, reference(buffers.q, own, False))
            assert problem is None, f"layer {number}, lengths {lengths}: {problem}"


def test_replays_give_the_same_bits():
    buffers = StaticBuffers(2, 128)
    buffers.fill(ROUNDS[0], seed=0)
    graph, result = capture(lambda: buffers.decode(*flash_mla.get_mla_metadata()))
    replay(graph, result)
    first = [tensor.clone() for tensor in result]
    for _ in range(20):
        replay(graph, result)
        assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


def test_two_graphs_replay_at_once():
    """Graphs that share no memory pool run on two streams without disturbing each other."""
    buffers = [StaticBuffers(1, 16), StaticBuffers(2, 128)]
    caches = [each.fill(lengths, seed) for seed, (each, lengths) in enumerate(zip(buffers, ROUNDS, strict=False))]
    captured = [capture(lambda each=each: each.decode(*flash_mla.get_mla_metadata())) for each in buffers]
    streams = [torch.cuda.Stream() for _ in captured]
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, (graph, _) in zip(streams, captured, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for each, cache, (_, result) in zip(buffers, caches, captured, strict=True):
        assert (problem := mismatch(*result, reference(each.q, cache, True))) is None, problem


def test_several_streams():
    """Calls in flight at once on several streams do not share scratch memory."""
    num_streams = 4
    streams = [torch.cuda.Stream() for _ in range(num_streams)]
    caches = [make_cache(random_lengths(7, 6000, seed), 1, BF16, seed=seed) for seed in range(num_streams)]
    queries = [make_queries(7, 1 + seed % 2, 16 << seed % 4, BF16, seed=seed) for seed in range(num_streams)]
    expected = [check(q, cache, True) for q, cache in zip(queries, caches, strict=True)]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, Tensor]]] = [[] for _ in streams]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(decode(queries[index], caches[index], True))
    torch.cuda.synchronize()
    for index, (out, lse) in enumerate(expected):
        for repeat, (other_out, other_lse) in enumerate(results[index]):
            same = torch.equal(other_out, out) and torch.equal(other_lse, lse)
            assert same, f"stream {index}, repeat {repeat}"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("planned", ["lazy", "eager"])
def test_compile(planned, backend):
    """A function around the public API compiles without graph breaks and gives the bits of the uncompiled one."""

    def step(q: Tensor, pages: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        if planned == "lazy":
            metadata, num_splits = flash_mla.get_mla_metadata()
        else:
            metadata, num_splits = flash_mla.get_mla_decoding_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1)
        out, lse = flash_mla.flash_mla_with_kvcache(
            q, pages, block_table, cache_seqlens, HEAD_DIM_V, metadata, num_splits, DEFAULT_SCALE, causal=True
        )
        return out, lse.exp()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for batch_size in (5, 9):
        cache = make_cache(random_lengths(batch_size, 1000, seed=batch_size), 1, BF16, seed=batch_size)
        q = make_queries(batch_size, 2, 16, BF16, seed=batch_size)
        out, lse = check(q, cache, True)
        compiled_out, compiled_exp = compiled(q, cache.pages, cache.block_table, cache.cache_seqlens)
        assert torch.equal(compiled_out, out)
        torch.testing.assert_close(compiled_exp, lse.exp(), rtol=1e-5, atol=0)
