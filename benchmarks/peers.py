"""One adaptor per library. Each is looked for at run time; one that cannot be loaded says why.

FLASH_MLA_PEERS may name a folder with libraries that are not installed:
    flashmla_ops*.so with flash_mla.py    FlashMLA as sglang-kernel packages it; flashmla.version may say which
    flashinfer/, flashinfer_mla_sm90.so   FlashInfer as a folder of packages, and its compiled bf16 MLA module
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.inputs import DTYPES, Inputs
from benchmarks.machine import ROOT, package_version
from benchmarks.shapes import HEAD_DIM_K, HEAD_DIM_V, PAGE_SIZE, Shape

ROPE_DIM = HEAD_DIM_K - HEAD_DIM_V


class Unavailable(Exception):
    """The library cannot be used here; the message says why."""


@dataclass(frozen=True)
class Decoder:
    """A library made ready for one set of inputs; what a serving loop does once per step is done already."""

    run: Callable[[int], Any]  # decodes with the cache copy of this number
    result: Callable[[Any], tuple[Tensor, Tensor | None]]  # what run returned -> out, natural-log lse if there is one
    plan: Callable[[], Any] | None = None  # makes the schedule anew, on the device alone


class Peer:
    """A library that decodes. Making one loads the library, or raises Unavailable."""

    name = ""
    title = ""
    version = ""

    def unsupported(self, shape: Shape) -> str | None:
        """Why this shape cannot be measured, or None."""
        raise NotImplementedError

    def prepare(self, inputs: Inputs) -> Decoder:
        raise NotImplementedError


def _peers_dir() -> Path | None:
    folder = os.environ.get("FLASH_MLA_PEERS")
    return Path(folder).resolve() if folder else None


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        # A library built for another torch fails with anything from OSError to AttributeError.
        raise Unavailable(f"import {name}: {type(error).__name__}: {error}") from error


def _calls_of(
    module: types.ModuleType, inputs: Inputs, metadata: Any, num_splits: Tensor | None, **options: Any
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """The decode under the name and with the arguments that FlashMLA and this package have in common."""

    def run(copy: int) -> tuple[Tensor, Tensor]:
        return module.flash_mla_with_kvcache(
            inputs.q,
            inputs.caches[copy],
            inputs.block_table,
            inputs.cache_seqlens,
            HEAD_DIM_V,
            metadata,
            num_splits,
            inputs.softmax_scale,
            inputs.shape.causal,
            **options,
        )

    return run


class ThisPackage(Peer):
    name = "flash_mla"
    title = "this package"
    options: ClassVar[dict[str, Any]] = {}  # of its calls and plans

    def __init__(self) -> None:
        self.module = _import("flash_mla")
        origin = Path(str(self.module.__file__)).resolve()
        if not hasattr(self.module, "unavailable_reason"):
            raise Unavailable(f"{origin} is another package with the same import name (ours is in {ROOT})")
        if torch.cuda.is_available() and not self.module.is_available():
            raise Unavailable(self.module.unavailable_reason())
        self.version = self.module.__version__

    def unsupported(self, shape: Shape) -> str | None:
        return None

    def prepare(self, inputs: Inputs) -> Decoder:
        shape = inputs.shape
        rows = shape.seqlen_q * shape.num_heads_q // shape.num_heads_kv

        def plan() -> tuple[Tensor, Tensor]:
            return self.module.get_mla_decoding_metadata(inputs.cache_seqlens, rows, shape.num_heads_kv, **self.options)

        metadata, num_splits = plan()

        return Decoder(
            _calls_of(self.module, inputs, metadata, num_splits, **self.options), lambda result: result, plan
        )


class BatchInvariant(ThisPackage):
    name = "flash_mla_batch_invariant"
    title = "batch-invariant"
    options: ClassVar[dict[str, Any]] = {"enable_batch_invariant": True}


class FlashMla(Peer):
    name = "flashmla"
    title = "FlashMLA"

    def __init__(self) -> None:
        self.module, self.version = self._load()

    @staticmethod
    def _load() -> tuple[types.ModuleType, str]:
        folder = _peers_dir()
        libraries = sorted(folder.glob("flashmla_ops*.so")) if folder else []
        if folder and libraries:
            try:
                torch.ops.load_library(str(libraries[0]))
            except OSError as error:
                raise Unavailable(f"{libraries[0].name}: {error.__cause__ or error}") from error
            note = folder / "flashmla.version"
            version = note.read_text().strip() if note.is_file() else f"from {libraries[0].name}"
            return _load_beside_its_library(folder / "flash_mla.py"), version
        return _import("sgl_kernel.flash_mla"), f"sglang-kernel {package_version('sglang-kernel', 'sgl-kernel')}"

    def unsupported(self, shape: Shape) -> str | None:
        return None

    def prepare(self, inputs: Inputs) -> Decoder:
        shape = inputs.shape
        try:
            metadata, num_splits = self.module.get_mla_metadata()
        except TypeError:  # releases that plan only eagerly
            rows = shape.seqlen_q * shape.num_heads_q // shape.num_heads_kv
            metadata, num_splits = self.module.get_mla_metadata(inputs.cache_seqlens, rows, shape.num_heads_kv)

        return Decoder(_calls_of(self.module, inputs, metadata, num_splits), lambda result: result)


def _load_beside_its_library(path: Path) -> types.ModuleType:
    """sgl_kernel/flash_mla.py without the rest of its package, whose one use is to load the library."""
    if not path.is_file():
        raise Unavailable(f"{path} is missing")
    package = types.ModuleType("sgl_kernel")
    package.flashmla_ops = types.ModuleType("sgl_kernel.flashmla_ops")  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("benchmarks_sgl_flash_mla", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up while the file runs.
    sys.modules[spec.name] = module
    displaced = sys.modules.get("sgl_kernel")
    sys.modules["sgl_kernel"] = package
    try:
        spec.loader.exec_module(module)
    finally:
        if displaced is None:
            del sys.modules["sgl_kernel"]
        else:
            sys.modules["sgl_kernel"] = displaced
    return module


class FlashInfer(Peer):
    name = "flashinfer"
    title = "FlashInfer"
    WORKSPACE_BYTES = 128 << 20

    def __init__(self) -> None:
        folder = _peers_dir()
        if folder and (folder / "flashinfer").is_dir():
            # At the end: what is installed comes first, this folder adds only what is missing.
            sys.path.append(str(folder / "flashinfer"))
        self.mla = _import("flashinfer.mla")
        self.version = getattr(_import("flashinfer"), "__version__", "unknown version")
        self.compiled = folder / "flashinfer_mla_sm90.so" if folder else None
        if self.compiled is not None and self.compiled.is_file():
            self._use_compiled(self.compiled)
        else:
            self.compiled = None
        self.workspace: Tensor | None = None

    @staticmethod
    def _use_compiled(library: Path) -> None:
        tvm_ffi = _import("tvm_ffi")
        core = _import("flashinfer.jit.core")
        core.JitSpec.build_and_load = lambda spec, *arguments, **options: tvm_ffi.load_module(str(library))

    def unsupported(self, shape: Shape) -> str | None:
        if shape.num_heads_kv != 1:
            return "takes one KV head"
        if self.compiled is not None and shape.dtype != "bf16":
            return f"{self.compiled.name} is for bf16"
        return None

    def prepare(self, inputs: Inputs) -> Decoder:
        shape = inputs.shape
        if self.workspace is None:
            self.workspace = torch.empty(self.WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)
        wrapper = self.mla.BatchMLAPagedAttentionWrapper(self.workspace, backend="fa3")
        rows = torch.arange(shape.batch_size + 1, dtype=torch.int32, device=inputs.q.device) * shape.seqlen_q
        dtype = DTYPES[shape.dtype]
        wrapper.plan(
            rows,
            inputs.page_offsets,
            inputs.page_indices,
            inputs.cache_seqlens,
            shape.num_heads_q,
            HEAD_DIM_V,
            ROPE_DIM,
            PAGE_SIZE,
            shape.causal,
            inputs.softmax_scale,
            dtype,
            dtype,
        )
        # A model has the two parts of q apart; the two parts of the cache are views of the same pages.
        q = inputs.q.flatten(0, 1)
        q_latent, q_rope = q[..., :HEAD_DIM_V].contiguous(), q[..., HEAD_DIM_V:].contiguous()
        caches = [(cache[:, :, 0, :HEAD_DIM_V], cache[:, :, 0, HEAD_DIM_V:]) for cache in inputs.caches]

        def run(copy: int) -> Tensor:
            return wrapper.run(q_latent, q_rope, *caches[copy])

        return Decoder(run, lambda out: (out.unflatten(0, (shape.batch_size, shape.seqlen_q)), None))


class FlashAttention3(Peer):
    name = "fa3"
    title = "FlashAttention-3"
    MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface")

    def __init__(self) -> None:
        reasons = []
        for module in self.MODULES:
            try:
                self.module = _import(module)
                break
            except Unavailable as error:
                reasons.append(str(error))
        else:
            raise Unavailable("; ".join(reasons))
        self.version = package_version("flash_attn_3", "flash-attn-3")

    def unsupported(self, shape: Shape) -> str | None:
        return None

    def prepare(self, inputs: Inputs) -> Decoder:
        shape = inputs.shape
        schedule = self.module.get_scheduler_metadata(
            batch_size=shape.batch_size,
            max_seqlen_q=shape.seqlen_q,
            max_seqlen_k=max(inputs.lengths),
            num_heads_q=shape.num_heads_q,
            num_heads_kv=shape.num_heads_kv,
            headdim=ROPE_DIM,
            cache_seqlens=inputs.cache_seqlens,
            qkv_dtype=DTYPES[shape.dtype],
            headdim_v=HEAD_DIM_V,
            page_size=PAGE_SIZE,
            causal=shape.causal,
        )
        q_latent, q_rope = inputs.q[..., :HEAD_DIM_V].contiguous(), inputs.q[..., HEAD_DIM_V:].contiguous()
        caches = [(cache[..., HEAD_DIM_V:], cache[..., :HEAD_DIM_V]) for cache in inputs.caches]

        def run(copy: int) -> Tensor:
            k_cache, v_cache = caches[copy]
            return self.module.flash_attn_with_kvcache(
                q=q_rope,
                k_cache=k_cache,
                v_cache=v_cache,
                qv=q_latent,
                cache_seqlens=inputs.cache_seqlens,
                page_table=inputs.block_table,
                softmax_scale=inputs.softmax_scale,
                causal=shape.causal,
                scheduler_metadata=schedule,
            )

        return Decoder(run, lambda out: (out, None))


class PlainTorch(Peer):
    """Gather the pages, two batched matrix products and a softmax: what one writes without a kernel."""

    name = "torch"
    title = "plain torch"
    MAX_TEMPORARY_BYTES = 24 << 30

    def __init__(self) -> None:
        self.version = torch.__version__

    def unsupported(self, shape: Shape) -> str | None:
        if shape.num_heads_kv != 1:
            return "written for one KV head"
        tokens = shape.batch_size * max(shape.num_pages()) * PAGE_SIZE
        temporary = tokens * (2 * HEAD_DIM_K + 10 * shape.seqlen_q * shape.num_heads_q)
        if temporary > self.MAX_TEMPORARY_BYTES:
            return f"needs {temporary / (1 << 30):.0f} GiB for padded scores"
        return None

    def prepare(self, inputs: Inputs) -> Decoder:
        shape = inputs.shape
        table = inputs.block_table.long()
        q = inputs.q.flatten(1, 2)  # (batch_size, rows, 576)
        position = torch.arange(table.shape[1] * PAGE_SIZE, device=q.device)
        last = inputs.cache_seqlens[:, None].expand(-1, shape.seqlen_q) - 1
        if shape.causal:
            last = last - torch.arange(shape.seqlen_q - 1, -1, -1, device=q.device)
        last = last.repeat_interleave(shape.num_heads_q, dim=1)[..., None]
        hidden = None
        if shape.causal or any(length != position.numel() for length in inputs.lengths):
            hidden = position > last

        def run(copy: int) -> tuple[Tensor, Tensor]:
            keys = inputs.caches[copy].flatten(1)[table].view(shape.batch_size, -1, HEAD_DIM_K)
            if q.is_cuda:
                scores = torch.bmm(q, keys.transpose(1, 2), out_dtype=torch.float32)
            else:
                scores = torch.bmm(q.float(), keys.transpose(1, 2).float())
            scores.mul_(inputs.softmax_scale)
            if hidden is not None:
                scores.masked_fill_(hidden, float("-inf"))
            lse = torch.logsumexp(scores, dim=-1, keepdim=True)
            weights = scores.sub_(lse).exp_().to(q.dtype)
            return torch.bmm(weights, keys[..., :HEAD_DIM_V]), lse

        def result(values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            out, lse = (value.unflatten(1, (shape.seqlen_q, shape.num_heads_q)) for value in values)
            return out, lse[..., 0].transpose(1, 2)

        return Decoder(run, result)


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (ThisPackage, BatchInvariant, FlashMla, FlashInfer, FlashAttention3, PlainTorch)
}
DEFAULT_PEERS = [name for name in PEERS if name not in (PlainTorch.name, BatchInvariant.name)]


def load_peers(names: Iterable[str]) -> tuple[list[Peer], dict[str, str]]:
    """The peers that work here, in order, and why the others do not."""
    loaded: list[Peer] = []
    reasons: dict[str, str] = {}
    for name in names:
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}; there are {', '.join(PEERS)}")
        try:
            loaded.append(PEERS[name]())
        except Unavailable as error:
            reasons[name] = str(error)
    return loaded, reasons
