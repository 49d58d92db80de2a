"""Entry point of the group sglang.srt.plugins: the dense decode of SGLang's attention backend flashmla.

SGLang plans and decodes through two functions, get_mla_metadata and flash_mla_with_kvcache, for dense and sparse
attention and for fp8 caches alike. `register` wraps both: what is dense in bfloat16 or float16 comes here, the rest
goes to the functions that were there. It is for `--attention-backend flashmla`: SGLang itself prefers another backend
on Hopper GPUs.

Up to 0.5.22 the functions are in sgl_kernel. 0.5.23 has them in the distribution sgl-flash-mla, whose import name is
flash_mla too. Whichever of the two was installed last is what `import flash_mla` gives, so only modules that the other
one does not have are imported here: they are this package's in either case.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor

from flash_mla import extension, interface
from flash_mla._version import __version__
from flash_mla.checks import DTYPES
from flash_mla.integrations import plugin

# Where SGLang has its functions: from 0.5.23 on, and before.
WRAPPER_MODULE = "sglang.kernels.ops.attention.flash_mla_interface"
KERNEL_MODULE = "sgl_kernel.flash_mla"
# A module of sgl-flash-mla, which WRAPPER_MODULE imports.
MEGA_ATTENTION_MODULE = "flash_mla.fused_norm_rope_attn_rope_cast"

_PLAN_ARGUMENTS = ("cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k", "num_heads_q", "is_fp8_kvcache", "topk")
_DECODE_ARGUMENTS = (
    "q",
    "k_cache",
    "block_table",
    "cache_seqlens",
    "head_dim_v",
    "tile_scheduler_metadata",
    "num_splits",
    "softmax_scale",
    "causal",
    "descale_q",
    "descale_k",
    "is_fp8_kvcache",
    "indices",
    "attn_sink",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "topk_length",
    "extra_topk_length",
    "kv_format",
)

_DISPLACED = (
    "fp8 caches and sparse attention need sgl-flash-mla, whose import name is flash_mla too: install it again, after "
    "this package"
)

log = logging.getLogger(__name__)


def register() -> None:
    """Wrap SGLang's functions, or log in one line why not."""
    plugin.run("SGLang", log, _register)


def _register() -> str:
    if (reason := extension.unavailable_reason()) is not None:
        raise plugin.Refusal(reason)
    import sglang

    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    except ImportError as error:
        raise plugin.Refusal(f"it needs SGLang 0.5.11 or newer, this is {sglang.__version__}") from error

    target = _find_target(sglang.__version__)
    HookRegistry.register(f"{target}.get_mla_metadata", plan, HookType.AROUND)
    HookRegistry.register(f"{target}.flash_mla_with_kvcache", decode, HookType.AROUND)
    rest = "; fp8 caches and sparse attention stay with SGLang" if _has_other_kernels(target) else f", but {_DISPLACED}"
    return (
        f"flash_mla {__version__} does the dense decode of the attention backend flashmla of "
        f"SGLang {sglang.__version__}{rest}"
    )


def _find_target(version: str) -> str:
    """The module whose functions this SGLang calls."""
    target = KERNEL_MODULE
    if _exists(WRAPPER_MODULE):
        target = WRAPPER_MODULE
        _complete_import_name()
    module = importlib.import_module(target)
    for name in ("get_mla_metadata", "flash_mla_with_kvcache"):
        if not callable(getattr(module, name, None)):
            raise plugin.Refusal(f"it does not fit SGLang {version}: {target} has no function {name}")
    return target


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor its parent
        return False


def _complete_import_name() -> None:
    """Without sgl-flash-mla, define what SGLang imports from it: else its backend flashmla could not be imported."""
    if _exists(MEGA_ATTENTION_MODULE):
        return
    parent, _, name = MEGA_ATTENTION_MODULE.rpartition(".")
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(MEGA_ATTENTION_MODULE, None))
    for function in ("prefill", "decode"):
        setattr(module, function, _no_mega_attention)
    sys.modules[MEGA_ATTENTION_MODULE] = module
    setattr(sys.modules[parent], name, module)


def _no_mega_attention(*args: object, **kwargs: object) -> NoReturn:
    raise NotImplementedError(_DISPLACED)


def _has_other_kernels(target: str) -> bool:
    """Whether fp8 caches and sparse attention have kernels: not where SGLang's functions would call this package."""
    flash_mla = sys.modules["flash_mla"]
    return target == KERNEL_MODULE or flash_mla.flash_mla_with_kvcache is not interface.flash_mla_with_kvcache


def _leave_to(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not _has_other_kernels(original.__module__):
        raise NotImplementedError(_DISPLACED)
    return original(*args, **kwargs)


def plan(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Around get_mla_metadata: for lengths and dense attention in bfloat16 or float16, the tensors of this package.

    SGLang copies them into buffers that its CUDA graphs read, (number of SMs, 8) and (max_batch_size + 1,) int32.
    """
    given = {**dict(zip(_PLAN_ARGUMENTS, args, strict=False)), **kwargs}
    if given.get("cache_seqlens") is None or given.get("is_fp8_kvcache") or given.get("topk") is not None:
        return _leave_to(original, args, kwargs)
    return interface.get_mla_decoding_metadata(**given)


def decode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Around flash_mla_with_kvcache: dense attention in bfloat16 or float16 is done here.

    The arguments are those of SGLang, q (batch_size, seqlen_q, num_heads, 576), k_cache (num_blocks, 64, 1, 576), the
    plan of `plan`; block tables may have anything behind the last page of a request.
    """
    given = {**dict(zip(_DECODE_ARGUMENTS, args, strict=False)), **kwargs}
    if not _is_dense(given):
        return _leave_to(original, args, kwargs)
    plugin.log_first_use("SGLang", log)
    given.pop("use_legacy", None)  # which of the kernels in sgl-flash-mla
    return interface.flash_mla_with_kvcache(**given)


def _is_dense(given: Mapping[str, Any]) -> bool:
    return (
        given.get("indices") is None
        and not given.get("is_fp8_kvcache")
        and given["q"].dtype in DTYPES
        and given["k_cache"].dtype == given["q"].dtype
    )
