"""The plugin for vLLM: against stand-ins for its modules, and against vLLM itself where that is installed.

vLLM does not have to see a GPU: its classes are asked and run on CPU tensors. A live server is checked by
examples/check_server.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import serving_standins
import torch
from cases import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, Case, make_case
from gpu_cases import capture
from reference import assert_close, reference

import flash_mla
from flash_mla import extension
from flash_mla.integrations import plugin
from flash_mla.integrations import vllm as vllm_plugin

BACKEND_MODULE = "flash_mla.integrations.vllm_backend"
SCALE = 192**-0.5
BF16 = torch.bfloat16


@pytest.fixture(params=["stand-in", "published"])
def vllm(request, monkeypatch) -> Iterator[ModuleType]:
    if request.param == "stand-in":
        serving_standins.install(monkeypatch, serving_standins.vllm_modules(), "vllm")
    elif importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    monkeypatch.delitem(sys.modules, BACKEND_MODULE, raising=False)
    importlib.import_module("vllm.v1.attention.backends.mla.flashmla")
    yield importlib.import_module("vllm")
    flashmla_member().clear_override()
    sys.modules.pop(BACKEND_MODULE, None)


@pytest.fixture
def on_hopper(vllm, monkeypatch) -> ModuleType:
    """vLLM, and what the plugin asks as it is on a Hopper GPU with the kernels built."""
    platforms = importlib.import_module("vllm.platforms")
    monkeypatch.setattr(platforms, "current_platform", serving_standins.Platform(), raising=False)
    monkeypatch.setattr(extension, "_extension", extension.Extension(SimpleNamespace(), None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(plugin.is_disabled, "__defaults__", ({},))
    return vllm


def flashmla_member() -> Any:
    return importlib.import_module("vllm.v1.attention.backends.registry").AttentionBackendEnum.FLASHMLA


def backend_class() -> Any:
    return importlib.import_module(BACKEND_MODULE).FlashMLABackend


def is_real(vllm: ModuleType) -> bool:
    return hasattr(vllm, "__file__")


@contextlib.contextmanager
def current_config(vllm: ModuleType) -> Iterator[None]:
    """vLLM's layers look for a configuration when they are made."""
    if not is_real(vllm):
        yield
        return
    config = importlib.import_module("vllm.config")
    with config.set_current_vllm_config(config.VllmConfig(device_config=config.DeviceConfig("cpu"))):
        yield


def make_impl(vllm: ModuleType, **changes: Any) -> Any:
    arguments = {
        "num_heads": 16,
        "head_size": HEAD_DIM,
        "scale": SCALE,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "logits_soft_cap": None,
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "qk_head_dim": 192,
        "v_head_dim": 128,
        "kv_b_proj": None,
        "indexer": None,
    }
    with current_config(vllm):
        return backend_class().get_impl_cls()(**{**arguments, **changes})


def make_builder(dtype: torch.dtype) -> Any:
    """A builder that has of a configuration what the plan of a decode needs."""
    cls = backend_class().get_builder_cls()
    builder = cls.__new__(cls)
    builder.kv_cache_spec = SimpleNamespace(dtype=dtype)
    return builder


def build_decode(builder: Any, case: Case) -> Any:
    """The metadata of a step, as vLLM's builder asks for it."""
    batch_size, seqlen_q, *_ = case.q.shape
    query_start_loc = torch.arange(batch_size + 1, dtype=torch.int32) * seqlen_q
    return builder._build_decode(
        block_table_tensor=case.block_table,
        seq_lens_device=case.cache_seqlens,
        max_seq_len=4096,
        query_start_loc_cpu=query_start_loc,
        query_start_loc_device=query_start_loc.to(case.q.device),
        num_decode_tokens=batch_size * seqlen_q,
        max_query_len=seqlen_q,
        dcp_tot_seq_lens_device=None,
    )


def step_metadata(case: Case, decode: Any) -> Any:
    return SimpleNamespace(num_decodes=case.q.shape[0], decode=decode)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What the plugin logs. The loggers of vLLM pass nothing on, so that pytest would not see it."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = vllm_plugin.log.level
    vllm_plugin.log.addHandler(handler)
    vllm_plugin.log.setLevel(logging.INFO)
    yield messages
    vllm_plugin.log.removeHandler(handler)
    vllm_plugin.log.setLevel(level)


# Registration


def test_registers_as_often_as_it_is_called(on_hopper, log):
    for _ in range(2):
        vllm_plugin.register()
        assert flashmla_member().get_path() == vllm_plugin.BACKEND
    cls = flashmla_member().get_class()
    assert cls is backend_class() and cls.get_name() == "FLASHMLA"
    expected = f"flash_mla {flash_mla.__version__} is the attention backend FLASHMLA of vLLM {on_hopper.__version__}"
    assert log == [expected] * 2


def test_is_loaded_through_its_entry_point(on_hopper, monkeypatch):
    if not is_real(on_hopper):
        pytest.skip("vLLM is not installed")
    plugins = importlib.import_module("vllm.plugins")
    point = importlib.metadata.EntryPoint("flash_mla", "flash_mla.integrations.vllm:register", "vllm.general_plugins")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    plugins.load_general_plugins()
    assert flashmla_member().get_path() == vllm_plugin.BACKEND


def assert_not_registered(log: list[str], reason: str) -> None:
    original = flashmla_member().get_path()
    vllm_plugin.register()
    assert flashmla_member().get_path() == original != vllm_plugin.BACKEND
    assert set(log) == {f"vLLM does without flash_mla: {reason}"}


def test_not_without_kernels(on_hopper, log, monkeypatch):
    monkeypatch.setattr(extension, "_extension", extension.Extension(None, "the kernels were not built"))
    assert not flash_mla.is_available()
    assert_not_registered(log, "the kernels were not built")


def test_not_without_a_gpu(on_hopper, log, monkeypatch):
    monkeypatch.setattr(serving_standins.Platform, "capability", None)
    assert_not_registered(log, "vLLM finds no CUDA GPU")


def test_not_on_another_gpu(on_hopper, log, monkeypatch):
    monkeypatch.setattr(serving_standins.Platform, "capability", serving_standins.DeviceCapability(10, 0))
    assert_not_registered(log, "the CUDA kernels need an sm_90 GPU (H100, H200, H800, H20), this is sm_100")


def test_not_where_it_is_disabled(on_hopper, log, monkeypatch):
    monkeypatch.setattr(plugin.is_disabled, "__defaults__", ({"FLASH_MLA_DISABLE_PLUGINS": "1"},))
    assert_not_registered(log, "FLASH_MLA_DISABLE_PLUGINS is set")


def test_not_with_an_older_vllm(on_hopper, log, monkeypatch):
    monkeypatch.setattr(on_hopper, "__version__", "0.9.2")
    assert_not_registered(log, "it needs vLLM 0.33 or newer, this is 0.9.2")


@pytest.mark.parametrize("version", ["0.34.1", "1.0.0rc1", "dev"])
def test_says_that_a_newer_vllm_is_untried(on_hopper, log, monkeypatch, version):
    monkeypatch.setattr(on_hopper, "__version__", version)
    vllm_plugin.register()
    assert flashmla_member().get_path() == vllm_plugin.BACKEND
    assert log[0].endswith(f"vLLM {version}, which it was not tried with: it was written for 0.33")


def test_cuda_is_not_initialized(on_hopper, log, monkeypatch):
    """vLLM could not fork its workers any more."""
    for name in ("is_available", "device_count", "get_device_capability", "init", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: pytest.fail("CUDA is asked"))
    vllm_plugin.register()
    assert flashmla_member().get_path() == vllm_plugin.BACKEND


# A vLLM that has changed: it reports an ImportError as the reason why a backend cannot be chosen.


def test_moved_classes_are_named(vllm, monkeypatch):
    utils = importlib.import_module("vllm.v1.attention.backends.utils")
    monkeypatch.delattr(utils, "reshape_query_for_spec_decode")
    with pytest.raises(ImportError, match=r"flash_mla does not fit vLLM \S+ \(cannot import name 'reshape_query") as e:
        backend_class()
    assert "FLASH_MLA_DISABLE_PLUGINS=1 keeps vLLM's own" in str(e.value)


def test_changed_parameters_are_named(vllm, monkeypatch):
    flashmla = importlib.import_module("vllm.v1.attention.backends.mla.flashmla")
    monkeypatch.setattr(flashmla.FlashMLAImpl, "forward_mqa", lambda self, query, kv_cache, attn_metadata, layer: None)
    with pytest.raises(ImportError, match="has no parameter q, kv_c_and_k_pe_cache"):
        backend_class()


# What vLLM asks the backend


def test_what_the_backend_supports(vllm):
    backend = backend_class()
    assert backend.get_supported_kernel_block_sizes() == [PAGE_SIZE]
    assert backend.get_supported_head_sizes() == [HEAD_DIM]
    assert set(backend.supported_dtypes) == {torch.float16, BF16}
    assert not backend.supports_batch_invariance()
    for capability, supported in (((9, 0), True), ((8, 0), False), ((10, 0), False), ((9, 1), False)):
        capability = serving_standins.DeviceCapability(*capability)
        assert backend.supports_compute_capability(capability) is supported


def combination(dtype: torch.dtype, kv_cache_dtype: str | None) -> str | None:
    gpu = serving_standins.DeviceCapability(9, 0)
    return backend_class().supports_combination(
        HEAD_DIM, dtype, kv_cache_dtype, PAGE_SIZE, True, False, False, False, gpu
    )


def test_combinations(vllm):
    for kv_cache_dtype in (None, "auto", "bfloat16"):
        assert combination(BF16, kv_cache_dtype) is None
    assert combination(torch.float16, "float16") is None
    expected = "kv_cache_dtype must be that of the model, torch.float16, got bfloat16"
    assert combination(torch.float16, "bfloat16") == expected
    # vLLM's own kernels, which are not there.
    assert "vllm._flashmla_C is not available" in combination(BF16, "fp8")


def test_vllm_accepts_the_backend(vllm):
    if not is_real(vllm):
        pytest.skip("vLLM is not installed")
    capability = importlib.import_module("vllm.platforms.interface").DeviceCapability(9, 0)
    selector = importlib.import_module("vllm.v1.attention.selector")

    def reasons(**changes: Any) -> list[str]:
        config = {"head_size": HEAD_DIM, "dtype": BF16, "kv_cache_dtype": "auto", "block_size": 64, "use_mla": True}
        asked = selector.AttentionSelectorConfig(**{**config, **changes})
        return backend_class().validate_configuration(device_capability=capability, **asked._asdict())

    assert reasons() == reasons(dtype=torch.float16) == reasons(block_size=128) == reasons(use_dcp=True) == []
    assert reasons(head_size=320) == ["head_size not supported"]
    assert reasons(use_sparse=True) == ["sparse not supported"]
    assert reasons(use_batch_invariant=True) == ["batch invariance not supported"]
    assert reasons(has_sink=True) == ["attention sinks not supported"]
    assert "is not available" in reasons(kv_cache_dtype="fp8")[0]


# Layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi_slopes": [0.5]}, "alibi_slopes must be None: FLASHMLA has full attention only"),
        ({"sliding_window": 128}, "sliding_window must be None"),
        ({"logits_soft_cap": 30.0}, "logits_soft_cap must be None"),
        ({"attn_type": "encoder"}, "attn_type must be .*got encoder"),
    ],
)
def test_unsupported_layers(vllm, change, message):
    with pytest.raises(NotImplementedError, match=message):
        make_impl(vllm, **change)


def test_layers_of_an_fp8_cache_are_vllms(vllm, monkeypatch):
    with pytest.raises(AssertionError, match=r"vllm\._flashmla_C is not available"):
        make_impl(vllm, kv_cache_dtype="fp8")
    flashmla = importlib.import_module("vllm.v1.attention.backends.mla.flashmla")
    monkeypatch.setattr(flashmla.FlashMLAImpl, "forward_mqa", lambda *args: serving_standins.THEIR_RESULT)
    impl = make_impl(vllm)
    impl.is_dense = False
    assert impl.forward_mqa(None, None, None, None) == serving_standins.THEIR_RESULT


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_plans_for_an_fp8_cache_are_vllms(vllm, monkeypatch, dtype):
    builder = make_builder(dtype)
    flashmla = importlib.import_module("vllm.v1.attention.backends.mla.flashmla")
    monkeypatch.setattr(flashmla.FlashMLAMetadataBuilder, "_build_decode", lambda self, **arguments: arguments)
    assert {"block_table_tensor", "max_seq_len", "max_query_len"} <= set(build_decode(builder, make_case(batch=1)))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("split_query", [False, True], ids=["whole-q", "split-q"])
def test_decode(vllm, device, dtype, seqlen_q, split_query):
    """Padding requests have no tokens, block tables have anything behind a request's pages, pages lie apart."""
    case = make_case(
        batch=4,
        seqlen_q=seqlen_q,
        seqlens=[100, 0, 3, 200],
        dtype=dtype,
        device=device,
        causal=True,
        softmax_scale=SCALE,
        invalid_page=2147480000,
        strided_cache=True,
    )
    impl = make_impl(vllm)
    q = case.q.flatten(0, 1)
    given = tuple(q.split([HEAD_DIM_V, HEAD_DIM - HEAD_DIM_V], dim=-1)) if split_query else q
    metadata = step_metadata(case, build_decode(make_builder(dtype), case))
    out, lse = impl.forward_mqa(given, case.k_cache.squeeze(2), metadata, None)
    assert out.shape == (4 * seqlen_q, 16, HEAD_DIM_V) and out.is_contiguous() and out.dtype == dtype
    assert_close(out.unflatten(0, (4, seqlen_q)), lse, *reference(case))
    assert (out[seqlen_q : 2 * seqlen_q] == 0).all()


@pytest.mark.parametrize("seqlen_q", [1, 2])
def test_lse_for_context_parallelism(vllm, device, seqlen_q):
    case = make_case(batch=3, seqlen_q=seqlen_q, seqlens=[70, 0, 5], causal=True, softmax_scale=SCALE, device=device)
    impl = make_impl(vllm)
    impl.need_to_return_lse_for_decode = True
    metadata = step_metadata(case, build_decode(make_builder(BF16), case))
    _, lse = impl.forward_mqa(case.q.flatten(0, 1), case.k_cache.squeeze(2), metadata, None)
    assert lse.shape == (3 * seqlen_q, 16) and lse.is_contiguous() and lse.dtype == torch.float32
    _, expected = reference(case)
    torch.testing.assert_close(lse.double(), expected.transpose(1, 2).flatten(0, 1), atol=1e-5, rtol=1e-3)


def test_layers_of_a_step_share_its_plan(vllm, device):
    case = make_case(batch=3, seqlens=[70, 0, 5], device=device)
    decode = build_decode(make_builder(BF16), case)
    schedule = decode.scheduler_metadata
    assert type(schedule) is flash_mla.FlashMLASchedMeta and not schedule.have_initialized
    plans = set()
    for _ in range(3):
        make_impl(vllm).forward_mqa(case.q.flatten(0, 1), case.k_cache.squeeze(2), step_metadata(case, decode), None)
        plans.add(id(schedule.tile_scheduler_metadata))
    assert schedule.have_initialized and len(plans) == 1
    assert build_decode(make_builder(BF16), case).scheduler_metadata is not schedule


def test_first_layer_is_logged(vllm, log):
    plugin.log_first_use.cache_clear()
    for _ in range(2):
        make_impl(vllm)
    assert log == [f"vLLM decodes with flash_mla {flash_mla.__version__}"]


@pytest.mark.gpu
def test_captured_step_follows_the_lengths(vllm):
    """As vLLM captures: one metadata object for warm-up and capture, lengths and tables changed in place after it."""
    first = make_case(batch=3, seqlens=[100, 0, 64], causal=True, softmax_scale=SCALE, device="cuda")
    second = make_case(batch=3, seqlens=[30, 120, 0], causal=True, softmax_scale=SCALE, device="cuda")
    impl = make_impl(vllm)
    metadata = step_metadata(first, build_decode(make_builder(BF16), first))
    graph, (out, _) = capture(lambda: impl.forward_mqa(first.q.flatten(0, 1), first.k_cache.squeeze(2), metadata, None))
    first.k_cache.copy_(second.k_cache)
    first.block_table.copy_(second.block_table)
    first.cache_seqlens.copy_(second.cache_seqlens)
    graph.replay()
    expected_out, expected_lse = reference(first)
    assert_close(out.unflatten(0, (3, 1)), expected_lse, expected_out, expected_lse)


# A layer of vLLM, which only vLLM itself has.

MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


class NoPrefill:
    """In place of a prefill backend, which needs kernels."""

    def __init__(self, **arguments: Any):
        pass

    def clone(self) -> NoPrefill:
        return self


@pytest.fixture
def vllm_config(vllm, tmp_path, monkeypatch) -> Iterator[Any]:
    """vLLM's configuration for a small model with the head sizes of DeepSeek."""
    if not is_real(vllm):
        pytest.skip("vLLM is not installed")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    config = importlib.import_module("vllm.config")
    made = config.VllmConfig(
        model_config=config.ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, dtype="bfloat16"),
        cache_config=config.CacheConfig(block_size=PAGE_SIZE),
        device_config=config.DeviceConfig("cpu"),
    )
    flashmla = importlib.import_module("vllm.v1.attention.backends.mla.flashmla")
    monkeypatch.setattr(flashmla, "num_compute_units", lambda index: 132)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    with config.set_current_vllm_config(made):
        yield made
    torch.set_default_dtype(default_dtype)


def unabsorbed_attention(q: torch.Tensor, latents: torch.Tensor, kv_b_proj: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens with keys and values of every head, in float64.

    Args:
        q: (seqlen_q, num_heads, 192).
        latents: (seqlen, 576).
        kv_b_proj: (num_heads * 256, 512).

    Returns:
        (seqlen_q, num_heads, 128)
    """
    q, latents, weights = q.double(), latents.double(), kv_b_proj.double().unflatten(0, (q.shape[1], 256))
    compressed, k_pe = latents.split([512, 64], dim=1)
    keys_and_values = torch.einsum("hdc,kc->hkd", weights, compressed)
    k_nope, v = keys_and_values.split([128, 128], dim=2)
    k = torch.cat([k_nope, k_pe.expand(q.shape[1], -1, -1)], dim=2)
    scores = torch.einsum("qhd,hkd->hqk", q, k) * SCALE
    position = torch.arange(latents.shape[0])
    hidden = position > latents.shape[0] - q.shape[0] + torch.arange(q.shape[0])[:, None]
    return torch.einsum("hqk,hkd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("for_capture", [False, True], ids=["step", "capture"])
def test_layer_decodes_as_unabsorbed_attention_does(vllm, vllm_config, seqlen_q, for_capture):
    torch.manual_seed(0)
    lengths, num_heads = [70, 5, 130], 16
    kv_b_proj = torch.nn.Linear(512, num_heads * 256, bias=False)
    kv_b_proj.weight.data = torch.randn(num_heads * 256, 512) * 0.05
    kv_b_proj.quant_method = None
    mla = importlib.import_module("vllm.model_executor.layers.attention.mla_attention")
    layer = mla.MLAAttention(
        num_heads=num_heads,
        scale=SCALE,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        q_lora_rank=None,
        kv_lora_rank=512,
        kv_b_proj=kv_b_proj,
        cache_config=vllm_config.cache_config,
        prefix="model.layers.0.self_attn.attn",
        attn_backend=backend_class(),
        prefill_backend_cls=NoPrefill,
    )
    layer.process_weights_after_loading(BF16)
    spec = layer.get_kv_cache_spec(vllm_config)
    assert (spec.block_size, spec.num_kv_heads, spec.head_size, spec.dtype) == (PAGE_SIZE, 1, HEAD_DIM, BF16)
    builder = backend_class().get_builder_cls()(spec, [layer.layer_name], vllm_config, torch.device("cpu"))

    # A step of all requests, and a padding request without tokens.
    batch_size, num_tokens = len(lengths) + 1, (len(lengths) + 1) * seqlen_q
    block_table = torch.tensor([[1, 2, -1], [3, -1, -1], [4, 5, 6], [-1, -1, -1]], dtype=torch.int32)
    query_start_loc = torch.arange(batch_size + 1, dtype=torch.int32) * seqlen_q
    common = importlib.import_module("vllm.v1.attention.backend").CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=torch.tensor([*lengths, 0], dtype=torch.int32),
        num_reqs=batch_size,
        num_actual_tokens=num_tokens,
        max_query_len=seqlen_q,
        max_seq_len=max(lengths),
        block_table_tensor=block_table,
        slot_mapping=torch.zeros(num_tokens, dtype=torch.int64),
    )
    metadata = builder.build_for_cudagraph_capture(common) if for_capture else builder.build(0, common)
    assert (metadata.num_decodes, metadata.num_prefills) == (batch_size, 0)
    assert type(metadata.decode.scheduler_metadata) is flash_mla.FlashMLASchedMeta

    cache = torch.full((8, 2, PAGE_SIZE, HEAD_DIM), float("nan"))[:, 1]  # of one of two layers
    latents = [torch.randn(length, HEAD_DIM) * 0.3 for length in lengths]
    for pages, tokens in zip(block_table, latents, strict=False):
        position = torch.arange(tokens.shape[0])
        slots = pages[position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
        flash_mla.append_mla_kv(tokens[:, :512], tokens[:, 512:], cache.unsqueeze(2), slots)
    q = torch.randn(num_tokens, num_heads, 192) * 0.3
    output = torch.empty(num_tokens, num_heads * 128)
    new_token = torch.zeros(num_tokens, HEAD_DIM)
    layer.forward_impl(q, new_token[:, :512], new_token[:, None, 512:], cache, metadata, output)

    per_request = output.view(batch_size, seqlen_q, num_heads, 128)
    for actual, queries, tokens in zip(
        per_request, q.view(batch_size, seqlen_q, num_heads, 192), latents, strict=False
    ):
        expected = unabsorbed_attention(queries, tokens, kv_b_proj.weight.data)
        torch.testing.assert_close(actual.double(), expected, atol=4e-3, rtol=2e-2)
    assert (per_request[-1] == 0).all()
