"""Modules that stand in for vLLM 0.33 and SGLang 0.5.11 and 0.5.23, with the names and signatures that those publish.

Only what the plugins touch is there. What would launch other kernels returns or raises a mark instead. The tests that
use them run against the published packages too, where those are installed, which is what keeps them faithful.
"""

from __future__ import annotations

import enum
import importlib
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

THEIR_RESULT = ("their out", "their lse")
THEIR_PLAN = ("their metadata", "their num_splits")


def make_modules(contents: dict[str, dict[str, Any]]) -> dict[str, ModuleType]:
    """Modules with these attributes, by full name, and the packages above them."""
    modules: dict[str, ModuleType] = {}
    for name, attributes in contents.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in modules:
                module = ModuleType(path)
                module.__path__ = []
                module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
                modules[path] = module
                if depth > 1:
                    setattr(modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
        for attribute, value in attributes.items():
            setattr(modules[name], attribute, value)
    return modules


# vLLM


class DeviceCapability(NamedTuple):
    major: int
    minor: int


class Platform:
    capability: DeviceCapability | None = DeviceCapability(9, 0)

    def is_cuda(self) -> bool:
        return self.capability is not None

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability | None:
        return self.capability


class AttentionType(str, enum.Enum):
    DECODER = "decoder"
    ENCODER = "encoder"


class AttentionBackendEnum(enum.Enum):
    FLASHMLA = "vllm.v1.attention.backends.mla.flashmla.FlashMLABackend"

    def get_path(self, include_classname: bool = True) -> str:
        return overrides.get(self, self.value)

    def get_class(self) -> type:
        module, _, name = self.get_path().rpartition(".")
        return getattr(importlib.import_module(module), name)

    def clear_override(self) -> None:
        overrides.pop(self, None)


overrides: dict[AttentionBackendEnum, str] = {}


def register_backend(
    backend: AttentionBackendEnum, class_path: str | None = None, is_mamba: bool = False
) -> Callable[[type], type]:
    assert class_path is not None and not is_mamba
    overrides[backend] = class_path
    return lambda cls: cls


class FlashMLABackend:
    supported_dtypes = (torch.float16, torch.bfloat16)
    supported_kv_cache_dtypes = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [64]

    @staticmethod
    def get_name() -> str:
        return "FLASHMLA"

    @staticmethod
    def get_builder_cls() -> type:
        return FlashMLAMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type:
        return FlashMLAImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [320, 512, 576]

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability.major in (9, 10)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability,
    ) -> str | None:
        return "vllm._flashmla_C is not available"


@dataclass
class FlashMLADecodeMetadata:
    block_table: Tensor
    seq_lens: Tensor
    dcp_tot_seq_lens: Tensor | None
    scheduler_metadata: Any


@dataclass
class FlashMLAMetadata:
    num_reqs: int
    max_query_len: int
    max_seq_len: int
    num_actual_tokens: int
    query_start_loc: Tensor
    slot_mapping: Tensor
    num_decodes: int
    num_decode_tokens: int
    num_prefills: int
    causal: bool = True
    head_dim: int | None = None
    prefill: Any = None
    decode: FlashMLADecodeMetadata | None = None


class FlashMLAMetadataBuilder:
    reorder_batch_threshold = 128
    kv_cache_spec: Any

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: Tensor | None,
    ) -> FlashMLADecodeMetadata:
        raise RuntimeError("vllm._flashmla_C is not available")


class MLACommonImpl:
    need_to_return_lse_for_decode = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        qk_head_dim: int,
        v_head_dim: int,
        kv_b_proj: Any,
        indexer: object | None = None,
        q_pad_num_heads: int | None = None,
    ) -> None:
        self.num_heads, self.scale, self.kv_lora_rank = num_heads, scale, kv_lora_rank
        self.kv_cache_dtype = kv_cache_dtype


class FlashMLAImpl(MLACommonImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("vllm._flashmla_C is not available")

    def forward_mqa(
        self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> Any:
        return THEIR_RESULT


def reshape_query_for_spec_decode(query: Tensor, batch_size: int) -> Tensor:
    return query.view(batch_size, -1, *query.shape[1:])


def reshape_attn_output_for_spec_decode(attn_output: Tensor) -> Tensor:
    return attn_output.view(-1, *attn_output.shape[2:])


def is_quantized_kv_cache(kv_cache_dtype: str) -> bool:
    return kv_cache_dtype.startswith("fp8")


def vllm_modules(version: str = "0.33.0") -> dict[str, ModuleType]:
    mla = {
        "FlashMLABackend": FlashMLABackend,
        "FlashMLADecodeMetadata": FlashMLADecodeMetadata,
        "FlashMLAImpl": FlashMLAImpl,
        "FlashMLAMetadata": FlashMLAMetadata,
        "FlashMLAMetadataBuilder": FlashMLAMetadataBuilder,
    }
    return make_modules(
        {
            "vllm": {"__version__": version},
            "vllm.platforms": {"current_platform": Platform()},
            "vllm.v1.attention.backend": {"AttentionType": AttentionType},
            "vllm.v1.attention.backends.registry": {
                "AttentionBackendEnum": AttentionBackendEnum,
                "register_backend": register_backend,
            },
            "vllm.v1.attention.backends.utils": {
                "reshape_attn_output_for_spec_decode": reshape_attn_output_for_spec_decode,
                "reshape_query_for_spec_decode": reshape_query_for_spec_decode,
            },
            "vllm.v1.attention.backends.mla.flashmla": mla,
            "vllm.v1.kv_cache_interface": {"is_quantized_kv_cache": is_quantized_kv_cache},
        }
    )


# SGLang


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


def make_hook_registry() -> type:
    class HookRegistry:
        _hooks: ClassVar[dict[str, list[Callable[..., Any]]]] = defaultdict(list)

        @classmethod
        def register(
            cls, target: str, hook: Callable[..., Any], hook_type: HookType = HookType.AFTER, *, source: Any = None
        ) -> None:
            assert hook_type is HookType.AROUND
            cls._hooks[target].append(hook)

        @classmethod
        def apply_hooks(cls) -> None:
            for target, hooks in cls._hooks.items():
                path, _, name = target.rpartition(".")
                owner = pkgutil.resolve_name(path)
                for hook in hooks:
                    cls.wrap(owner, name, hook)

        @classmethod
        def reset(cls) -> None:
            cls._hooks.clear()

        @staticmethod
        def wrap(owner: ModuleType, name: str, hook: Callable[..., Any]) -> None:
            original = getattr(owner, name)
            setattr(owner, name, lambda *args, **kwargs: hook(original, *args, **kwargs))

    return HookRegistry


def kernel_functions(module: str) -> dict[str, Callable[..., Any]]:
    """The functions of sgl_kernel 0.4.2 to 0.4.10, and from SGLang 0.5.23 on of SGLang itself."""

    def get_mla_metadata(
        cache_seqlens: Tensor | None = None,
        num_q_tokens_per_head_k: int | None = None,
        num_heads_k: int | None = None,
        num_heads_q: int | None = None,
        is_fp8_kvcache: bool = False,
        topk: int | None = None,
    ) -> Any:
        return THEIR_PLAN

    def flash_mla_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        block_table: Tensor | None,
        cache_seqlens: Tensor | None,
        head_dim_v: int,
        tile_scheduler_metadata: Any,
        num_splits: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        descale_q: Tensor | None = None,
        descale_k: Tensor | None = None,
        is_fp8_kvcache: bool = False,
        indices: Tensor | None = None,
        attn_sink: Tensor | None = None,
        extra_k_cache: Tensor | None = None,
        extra_indices_in_kvcache: Tensor | None = None,
        topk_length: Tensor | None = None,
        extra_topk_length: Tensor | None = None,
        kv_format: str | None = None,
    ) -> Any:
        return THEIR_RESULT

    functions = {"get_mla_metadata": get_mla_metadata, "flash_mla_with_kvcache": flash_mla_with_kvcache}
    for function in functions.values():
        function.__module__ = module
    return functions


def sglang_modules(version: str) -> dict[str, ModuleType]:
    contents: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": version},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": make_hook_registry(), "HookType": HookType},
    }
    if tuple(map(int, version.split("."))) < (0, 5, 23):
        contents["sgl_kernel.flash_mla"] = kernel_functions("sgl_kernel.flash_mla")
    else:
        name = "sglang.kernels.ops.attention.flash_mla_interface"
        contents[name] = kernel_functions(name)
    return make_modules(contents)


class Finder:
    """Finds nothing but the stand-ins below their top-level names, so that no installed package mixes in."""

    def __init__(self, modules: dict[str, ModuleType], *top_level_names: str):
        self.modules, self.top_level_names = modules, top_level_names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in self.top_level_names:
            return None
        if name in self.modules:
            return self.modules[name].__spec__
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def install(monkeypatch: Any, modules: dict[str, ModuleType], *top_level_names: str) -> None:
    """Put the stand-ins in place of whatever there is with these top-level names, for one test."""
    for name in list(sys.modules):
        if name.partition(".")[0] in top_level_names:
            monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "meta_path", [Finder(modules, *top_level_names), *sys.meta_path])
