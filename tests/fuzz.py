"""Random decodes: the cases that hypothesis draws and shrinks, their inputs, and the ways in which they are run.

Everything that a case consists of is in its fields, so that its text is enough to run it again. Inputs are made on
their device from pools of random values, so that a case takes milliseconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from cases import DEFAULT_SCALE, HEAD_DIM, HEAD_DIM_V, INVALID_PAGES, PAGE_SIZE
from gpu_cases import PagedCache, cut, make_queries, mismatch, random_key_pool, reference
from hypothesis import strategies as st
from plans import plan_for_few_workers
from reference import LSE_ATOL
from torch import Tensor

import flash_mla

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Rounding of the scores grows with the scale.
LSE_ATOL_PER_SCALE = 2e-6 / DEFAULT_SCALE
LATENT, ROPE = slice(0, HEAD_DIM_V), slice(HEAD_DIM_V, HEAD_DIM)


class Limits(NamedTuple):
    """What keeps a case small."""

    num_rows: int  # query rows of all requests, heads and tokens
    num_scores: int  # pairs of a row and a key
    num_tokens: int  # of all requests, times KV heads
    length: int  # tokens of a request


CPU_LIMITS = Limits(num_rows=1500, num_scores=100_000, num_tokens=4000, length=700)
GPU_LIMITS = Limits(num_rows=20_000, num_scores=8_000_000, num_tokens=60_000, length=5000)

Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FuzzCase:
    """The first choice of every field is the simplest one: cases shrink towards it."""

    lengths: tuple[int, ...]
    seqlen_q: int = 1
    num_heads_kv: int = 1
    heads_per_group: int = 1
    dtype: Literal["bf16", "fp16"] = "bf16"
    causal: bool = False
    softmax_scale: float = DEFAULT_SCALE
    # The queries see random keys, keys of equal scores, or one key that outweighs the others.
    scores: Literal["random", "equal", "dominant"] = "random"
    seed: int = 0
    q_layout: Literal["contiguous", "padded", "expanded"] = "contiguous"
    cache_layout: Literal["contiguous", "padded", "heads-first"] = "contiguous"
    table_gap: int = 0  # columns between the rows
    permute_pages: bool = False
    share_prefix: bool = False  # whole pages that requests have in common with the first one
    spare_pages: int = 0  # beside page 0, which nobody has
    garbage: float = float("nan")  # wherever no request has a token
    invalid_page: int = -1  # behind the pages of a request
    out: Literal["new", "given", "strided"] = "new"
    plan: Literal["lazy", "eager", "copied", "stale", "few-workers"] = "lazy"
    planned_lengths: tuple[int, ...] = ()  # of a stale plan, and of the capture of a graph
    num_workers: int = 1  # of a plan for few workers
    batch_invariant: bool = False
    run: Literal["eager", "stream", "graph"] = "eager"

    @property
    def num_heads_q(self) -> int:
        return self.num_heads_kv * self.heads_per_group

    @property
    def num_rows_per_head_kv(self) -> int:
        return self.seqlen_q * self.heads_per_group

    def __str__(self) -> str:
        """The fields that are not the simplest."""
        fields = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if repr(getattr(self, field.name)) != repr(field.default)
        ]
        return f"FuzzCase({', '.join(fields)})".replace("=nan", "=float('nan')").replace("inf,", "float('inf'),")


def length_from(number: int, longest: int) -> int:
    """Any length up to the longest, and for numbers beyond that, one beside the end of one of the first pages."""
    if number <= longest:
        return number
    pages, offset = divmod(number - longest, 3)
    return min(pages % 6 * PAGE_SIZE + (0, 1, PAGE_SIZE - 1)[offset], longest)


@st.composite
def fuzz_cases(draw: st.DrawFn, limits: Limits) -> FuzzCase:
    pick = st.sampled_from
    num_heads_kv = draw(pick([1, 1, 2, 3]))
    heads_per_group = draw(st.one_of(pick([1, 16, 64, 128]), st.integers(1, 130)))
    num_heads_q = num_heads_kv * heads_per_group
    seqlen_q = draw(st.one_of(st.integers(1, 4), st.integers(1, 70)))
    # Many rows leave room for few requests, and for few keys.
    seqlen_q = max(1, min(seqlen_q, limits.num_rows // num_heads_q))
    num_rows = seqlen_q * num_heads_q
    max_batch = max(1, min(draw(pick([4, 40])), limits.num_rows // num_rows))
    batch_size = draw(st.integers(1, max_batch)) if draw(st.integers(0, 19)) < 19 else 0
    longest = limits.length
    for most, times in ((limits.num_scores, num_rows), (limits.num_tokens, num_heads_kv)):
        longest = min(longest, most // (times * max(1, batch_size)))
    longest = max(longest, 70)
    seed = draw(st.integers(0, 2**31))
    # One draw per request: of all that is drawn they are the most.
    numbers = st.integers(-2, longest + max(longest, 200))
    lengths = tuple(length_from(draw(numbers), longest) for _ in range(batch_size))
    plan = draw(pick(["lazy", "eager", "copied", "stale", "few-workers"]))
    run = draw(pick(["eager", "eager", "stream", "graph"]))
    planned_lengths: tuple[int, ...] = ()
    if plan == "stale" or run == "graph":
        generator = random.Random(seed)
        planned_lengths = tuple(length_from(generator.randint(-2, 12000), 6000) for _ in range(batch_size))
    return FuzzCase(
        lengths=lengths,
        seqlen_q=seqlen_q,
        num_heads_kv=num_heads_kv,
        heads_per_group=heads_per_group,
        dtype=draw(pick(["bf16", "fp16"])),
        causal=draw(st.booleans()),
        softmax_scale=draw(pick([DEFAULT_SCALE, 192**-0.5, 0.0, 1.0])),
        scores=draw(pick(["random", "random", "equal", "dominant"])),
        seed=seed,
        q_layout=draw(pick(["contiguous", "padded", "expanded"])),
        cache_layout=draw(pick(["contiguous", "padded", "heads-first"])),
        table_gap=draw(pick([0, 1, 5])),
        permute_pages=draw(st.booleans()),
        share_prefix=draw(st.booleans()),
        spare_pages=draw(st.integers(0, 3)),
        garbage=draw(pick([float("nan"), float("inf"), float("-inf"), 60000.0])),
        invalid_page=draw(pick([*INVALID_PAGES, -(2**31), 2**31 - 1])),
        out=draw(pick(["new", "given", "strided"])),
        plan=plan,
        planned_lengths=planned_lengths,
        num_workers=draw(st.integers(1, 6)) if plan == "few-workers" else 1,
        batch_invariant=draw(st.booleans()),
        run=run,
    )


@dataclass
class Inputs:
    q: Tensor
    cache: PagedCache
    planned_seqlens: Tensor  # (batch_size,) int32, or empty


def make_inputs(case: FuzzCase, device: str) -> Inputs:
    dtype = DTYPES[case.dtype]
    batch_size, num_heads_kv = len(case.lengths), case.num_heads_kv
    lengths = [max(length, 0) for length in case.lengths]
    num_pages = [-(-length // PAGE_SIZE) for length in lengths]
    longest, columns, pool_pages = max([1, *lengths]), max([1, *num_pages]), 1 + sum(num_pages) + case.spare_pages

    # Tables on the CPU; they come to the device in one piece.
    generator = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(pool_pages - 1, generator=generator) if case.permute_pages else torch.arange(pool_pages - 1)
    own_pages = list((order[: sum(num_pages)] + 1).split(num_pages))
    if case.share_prefix:
        for pages, length in zip(own_pages, lengths, strict=True):
            shared = min(length, lengths[0]) // PAGE_SIZE
            pages[:shared] = own_pages[0][:shared]
    table = torch.full((batch_size, columns + case.table_gap), case.invalid_page, dtype=torch.int64)
    slots, places = [], []
    for request, (length, pages) in enumerate(zip(lengths, own_pages, strict=True)):
        table[request, : len(pages)] = pages
        position = torch.arange(length)
        slots.append(pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
        places.append(position + request * longest)
    parts = [torch.tensor([*case.lengths, *case.planned_lengths], dtype=torch.int64), table.flatten(), *slots, *places]
    packed = torch.cat(parts).to(device)
    seqlens, planned, table, slot, place = packed.split(
        [batch_size, len(case.planned_lengths), table.numel(), sum(lengths), sum(lengths)]
    )

    q = make_queries(batch_size, case.seqlen_q, case.num_heads_q, dtype, case.seed, device)
    values = cut(random_key_pool(dtype, device), (pool_pages * PAGE_SIZE, num_heads_kv, HEAD_DIM), case.seed // 7)
    if case.scores != "random":
        q = q.clone()
        q[..., ROPE] = 1
    if case.scores == "equal":
        q.zero_()
    if case.scores == "dominant" and sum(lengths) > 0:
        values = values.clone()
        ends = torch.cat([own[-1:] for own in slots]).to(device)
        values[ends, :, ROPE] = 4
    tokens = values[slot]

    if case.q_layout == "expanded" and batch_size > 0:
        q = q[:1].expand(q.shape)
    elif case.q_layout == "padded":
        wide = torch.full((batch_size, case.seqlen_q + 1, case.num_heads_q + 2, HEAD_DIM + 64), case.garbage)
        wide = wide.to(device=device, dtype=dtype)
        wide[:, 1:, 1:-1, 32 : 32 + HEAD_DIM] = q
        q = wide[:, 1:, 1:-1, 32 : 32 + HEAD_DIM]

    if case.cache_layout == "padded":
        shape: tuple[int, ...] = (pool_pages, 2, PAGE_SIZE, num_heads_kv, HEAD_DIM + 80)
        pages = torch.full(shape, case.garbage, dtype=dtype, device=device)[:, 1, :, :, 8 : 8 + HEAD_DIM]
    elif case.cache_layout == "heads-first":
        shape = (pool_pages, num_heads_kv, PAGE_SIZE, HEAD_DIM)
        pages = torch.full(shape, case.garbage, dtype=dtype, device=device).transpose(1, 2)
    else:
        pages = torch.full((pool_pages, PAGE_SIZE, num_heads_kv, HEAD_DIM), case.garbage, dtype=dtype, device=device)
    pages[slot // PAGE_SIZE, slot % PAGE_SIZE] = tokens

    keys = torch.zeros(batch_size * longest, num_heads_kv, HEAD_DIM, dtype=torch.float64, device=device)
    keys[place] = tokens.double()
    block_table = table.view(batch_size, columns + case.table_gap).to(torch.int32)[:, :columns]
    keys = keys.view(batch_size, longest, num_heads_kv, HEAD_DIM).transpose(1, 2)
    cache = PagedCache(list(case.lengths), seqlens.to(torch.int32), pages, block_table, keys)
    return Inputs(q, cache, planned.to(torch.int32))


class Decode:
    """One way to call the decode; memory that it writes to held NaN before."""

    def __init__(self, case: FuzzCase, inputs: Inputs):
        self.case, self.inputs = case, inputs
        q = inputs.q
        shape = (*q.shape[:3], HEAD_DIM_V)
        self.memory: Tensor | None = None
        self.out: Tensor | None = None
        if case.out == "given":
            self.out = torch.full(shape, float("nan"), dtype=q.dtype, device=q.device)
        elif case.out == "strided":
            wide = (shape[0], shape[1] + 1, shape[2] + 1, HEAD_DIM_V + 24)
            self.memory = torch.full(wide, float("nan"), dtype=q.dtype, device=q.device)
            self.out = self.memory[:, :-1, 1:, 16 : 16 + HEAD_DIM_V]
        # What cannot be part of a graph.
        self.plan_from_outside: Result | None = None
        if case.plan == "stale":
            self.plan_from_outside = self.plan_eagerly(inputs.planned_seqlens)
        elif case.plan == "few-workers":
            self.plan_from_outside = plan_for_few_workers(
                case.lengths,
                case.num_rows_per_head_kv,
                case.num_heads_kv,
                case.num_workers,
                q.device,
                case.batch_invariant,
            )
        elif case.plan == "copied":
            self.plan_from_outside = self.copy_plan(*self.plan_eagerly(inputs.cache.cache_seqlens))

    def plan_eagerly(self, seqlens: Tensor) -> Result:
        counts = self.case.num_rows_per_head_kv, self.case.num_heads_kv
        return flash_mla.get_mla_decoding_metadata(seqlens, *counts, enable_batch_invariant=self.case.batch_invariant)

    @staticmethod
    def copy_plan(*parts: Tensor) -> Result:
        """Into the first rows of larger buffers."""
        metadata, num_splits = (
            torch.full((part.shape[0] + 9, *part.shape[1:]), -7, dtype=torch.int32, device=part.device)[: part.shape[0]]
            for part in parts
        )
        return metadata.copy_(parts[0]), num_splits.copy_(parts[1])

    def __call__(self) -> Result:
        case, cache = self.case, self.inputs.cache
        plan: tuple[object, Tensor | None]
        if self.plan_from_outside is not None:
            plan = self.plan_from_outside
        elif case.plan == "eager":
            plan = self.plan_eagerly(cache.cache_seqlens)
        else:
            plan = flash_mla.get_mla_metadata()
        return flash_mla.flash_mla_with_kvcache(
            self.inputs.q,
            cache.pages,
            cache.block_table,
            cache.cache_seqlens,
            HEAD_DIM_V,
            *plan,
            softmax_scale=case.softmax_scale,
            causal=case.causal,
            out=self.out,
            enable_batch_invariant=case.batch_invariant,
        )

    def problem_beside_out(self) -> str | None:
        """Called when out has been looked at: there it leaves NaN."""
        if self.memory is None or self.out is None:
            return None
        self.out.fill_(float("nan"))
        return None if bool(self.memory.isnan().all()) else "something beside out was written to"


def poison_free_memory(case: FuzzCase, q: Tensor) -> None:
    """Leave NaN in memory that torch most likely hands out next: for out, the log-sum-exps and the scratch."""
    if not q.is_cuda:
        return
    workspace = flash_mla.decode_workspace_bytes(
        case.num_rows_per_head_kv,
        case.num_heads_kv,
        device=q.device,
        batch_size=q.shape[0],
        enable_batch_invariant=case.batch_invariant,
    )
    sizes = (workspace, 2 * q.numel() // HEAD_DIM * HEAD_DIM_V, 4 * q.numel() // HEAD_DIM)
    held = [torch.full((size // 4,), float("nan"), dtype=torch.float32, device=q.device) for size in sizes]
    del held


@contextlib.contextmanager
def other_stream() -> Iterator[torch.cuda.Stream]:
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@functools.cache
def graph_pool() -> torch.cuda.CUDAGraph:
    """A graph that keeps the memory pool of all the others alive, so that it is not made anew for each."""
    graph = torch.cuda.CUDAGraph()
    with other_stream():
        graph.capture_begin()
        torch.zeros(1, device="cuda")
        graph.capture_end()
    return graph


def replay_of(call: Callable[[], Result], case: FuzzCase, inputs: Inputs) -> Result:
    """Capture the call while the lengths are others, then replay it with these, into memory that holds NaN."""
    seqlens = inputs.cache.cache_seqlens
    lengths = seqlens.clone()
    pool = graph_pool().pool()
    seqlens.copy_(inputs.planned_seqlens)
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph: it empties the caches of the allocator, which takes longer than all the rest.
    with other_stream():
        graph.capture_begin(pool)
        result = call()
        graph.capture_end()
    seqlens.copy_(lengths)
    for part in result:
        part.fill_(float("nan"))
    graph.replay()
    # Copies, as the pool is used again when the graph is gone.
    return result[0].clone(), result[1].clone()


def find_problem(case: FuzzCase, device: str) -> str | None:
    """What is wrong with the result of a case, None if nothing is."""
    inputs = make_inputs(case, device)
    expected = reference(inputs.q, inputs.cache, case.causal, case.softmax_scale)
    call = Decode(case, inputs)
    poison_free_memory(case, inputs.q)
    run = case.run if device == "cuda" else "eager"
    if run == "stream":
        with other_stream():
            result = call()
    else:
        result = call()
    if run == "graph":
        eager = result[0].clone(), result[1].clone()
        result = replay_of(call, case, inputs)
        if not all(torch.equal(a, b) for a, b in zip(result, eager, strict=True)):
            return "a replay gave other bits than the call"
    out, lse = result
    if out.shape != (*inputs.q.shape[:3], HEAD_DIM_V) or lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
        return f"out has shape {list(out.shape)}, lse {list(lse.shape)}"
    if out.numel() == 0:
        return None
    lse_atol = LSE_ATOL + LSE_ATOL_PER_SCALE * case.softmax_scale
    return mismatch(out, lse, expected, lse_atol) or call.problem_beside_out()
