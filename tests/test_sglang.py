"""The plugin for SGLang: against stand-ins for its modules, and against SGLang itself where that is installed.

SGLang's kernels do not have to be there: sgl_kernel is always a stand-in, and SGLang's attention backend runs on CPU
tensors. A live server is checked by examples/check_server.py.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import serving_standins
import torch
from cases import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, Case, make_case
from reference import assert_close, reference
from serving_standins import THEIR_PLAN, THEIR_RESULT

import flash_mla
from flash_mla import extension
from flash_mla.integrations import plugin
from flash_mla.integrations import sglang as sglang_plugin

SCALE = 192**-0.5
BF16 = torch.bfloat16
NUM_SMS = 132


@pytest.fixture(params=["stand-in 0.5.11", "stand-in 0.5.22", "stand-in 0.5.23", "published"])
def sglang(request, monkeypatch) -> Iterator[ModuleType]:
    """SGLang on a Hopper GPU that is not there."""
    monkeypatch.setattr(extension, "_extension", extension.Extension(SimpleNamespace(), None))
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(plugin.is_disabled, "__defaults__", ({},))
    # Set and deleted, so that what the plugin puts there is gone after the test.
    monkeypatch.setattr(flash_mla, "fused_norm_rope_attn_rope_cast", None, raising=False)
    monkeypatch.delattr(flash_mla, "fused_norm_rope_attn_rope_cast")
    monkeypatch.setitem(sys.modules, sglang_plugin.MEGA_ATTENTION_MODULE, None)
    monkeypatch.delitem(sys.modules, sglang_plugin.MEGA_ATTENTION_MODULE)
    kind, _, version = request.param.partition(" ")
    if kind == "stand-in":
        serving_standins.install(monkeypatch, serving_standins.sglang_modules(version), "sglang", "sgl_kernel")
    elif importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    else:
        install_kernel_standin(monkeypatch)
        # Modules that the hooks change.
        for name in (sglang_plugin.WRAPPER_MODULE, "sglang.srt.layers.attention.flashmla_backend"):
            monkeypatch.delitem(sys.modules, name, raising=False)
    hooks = registry()
    yield importlib.import_module("sglang")
    hooks.reset()


def install_kernel_standin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any name can be imported from sgl_kernel, and its flash_mla has functions to replace."""

    class KernelModule(ModuleType):
        __path__: tuple[str, ...] = ()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return MagicMock(name=f"{self.__name__}.{name}")

    class KernelFinder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            if name.partition(".")[0] == "sgl_kernel":
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
            return None

        def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
            module = KernelModule(spec.name)
            if spec.name == sglang_plugin.KERNEL_MODULE:
                vars(module).update(serving_standins.kernel_functions(spec.name))
            return module

        def exec_module(self, module: ModuleType) -> None:
            pass

    for name in list(sys.modules):
        if name.partition(".")[0] == "sgl_kernel":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [KernelFinder(), *sys.meta_path])


def has_wrappers(sglang: ModuleType) -> bool:
    """Whether SGLang calls the import name flash_mla, which sgl-flash-mla has beside this package."""
    return tuple(int(part) for part in sglang.__version__.split(".")[:3]) >= (0, 5, 23)


def is_real(sglang: ModuleType) -> bool:
    return hasattr(sglang, "__file__")


def target(sglang: ModuleType) -> ModuleType:
    name = sglang_plugin.WRAPPER_MODULE if has_wrappers(sglang) else sglang_plugin.KERNEL_MODULE
    return importlib.import_module(name)


def registry() -> Any:
    return importlib.import_module("sglang.srt.plugins.hook_registry").HookRegistry


@pytest.fixture
def hooked(sglang) -> ModuleType:
    """The module of SGLang's functions after the plugin was loaded as SGLang loads it."""
    sglang_plugin.register()
    registry().apply_hooks()
    return target(sglang)


class TheirSchedule(SimpleNamespace):
    pass


@pytest.fixture
def rival(sglang, monkeypatch) -> None:
    """sgl-flash-mla was installed after this package: `import flash_mla` gives its functions."""
    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", lambda **arguments: THEIR_RESULT)
    monkeypatch.setattr(flash_mla, "get_mla_decoding_metadata", lambda *args, **kwargs: THEIR_PLAN)
    # SGLang wraps tensors in one, which this package's does not take.
    monkeypatch.setattr(importlib.import_module("flash_mla.flash_mla_interface"), "FlashMLASchedMeta", TheirSchedule)
    mega_attention = importlib.util.module_from_spec(
        importlib.machinery.ModuleSpec(sglang_plugin.MEGA_ATTENTION_MODULE, None)
    )
    monkeypatch.setitem(sys.modules, sglang_plugin.MEGA_ATTENTION_MODULE, mega_attention)
    monkeypatch.setattr(flash_mla, "fused_norm_rope_attn_rope_cast", mega_attention, raising=False)


def registrations(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == sglang_plugin.log.name]


# Registration


def test_wraps_the_functions_that_sglang_calls(sglang, caplog):
    with caplog.at_level(logging.INFO):
        sglang_plugin.register()
    module = sglang_plugin.WRAPPER_MODULE if has_wrappers(sglang) else sglang_plugin.KERNEL_MODULE
    assert set(registry()._hooks) == {f"{module}.get_mla_metadata", f"{module}.flash_mla_with_kvcache"}
    (message,) = registrations(caplog)
    expected = f"flash_mla {flash_mla.__version__} does the dense decode of the attention backend flashmla of "
    assert message.startswith(f"{expected}SGLang {sglang.__version__}")
    ending = "after this package" if has_wrappers(sglang) else "; fp8 caches and sparse attention stay with SGLang"
    assert message.endswith(ending)


def test_rest_stays_with_sgl_flash_mla(sglang, rival, caplog):
    with caplog.at_level(logging.INFO):
        sglang_plugin.register()
    assert registrations(caplog)[0].endswith("; fp8 caches and sparse attention stay with SGLang")


def test_is_loaded_through_its_entry_point(sglang, monkeypatch):
    if not is_real(sglang):
        pytest.skip("SGLang is not installed")
    plugins = importlib.import_module("sglang.srt.plugins")
    point = importlib.metadata.EntryPoint("flash_mla", "flash_mla.integrations.sglang:register", "sglang.srt.plugins")
    # As one that belongs to a distribution.
    vars(point)["dist"] = SimpleNamespace(name="flash_mla")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    original = target_function = None
    if not has_wrappers(sglang):
        original = target(sglang).flash_mla_with_kvcache
    plugins.load_plugins()
    target_function = target(sglang).flash_mla_with_kvcache
    assert target_function is not original and target_function.__wrapped__.__name__ == "flash_mla_with_kvcache"
    assert registry()._patched == {
        f"{target(sglang).__name__}.{name}" for name in ("get_mla_metadata", "flash_mla_with_kvcache")
    }


def assert_not_registered(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    with caplog.at_level(logging.INFO):
        sglang_plugin.register()
    assert registrations(caplog) == [f"SGLang does without flash_mla: {reason}"]


def test_not_where_it_is_unavailable(sglang, caplog, monkeypatch):
    monkeypatch.setattr(extension, "unavailable_reason", lambda: "torch sees no CUDA GPU")
    assert not flash_mla.is_available()
    assert_not_registered(caplog, "torch sees no CUDA GPU")
    assert not registry()._hooks


def test_not_where_it_is_disabled(sglang, caplog, monkeypatch):
    monkeypatch.setattr(plugin.is_disabled, "__defaults__", ({"FLASH_MLA_DISABLE_PLUGINS": "1"},))
    assert_not_registered(caplog, "FLASH_MLA_DISABLE_PLUGINS is set")


def test_not_without_hooks(sglang, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    assert_not_registered(caplog, f"it needs SGLang 0.5.11 or newer, this is {sglang.__version__}")


def test_not_without_the_functions(sglang, caplog, monkeypatch):
    sglang_plugin.register()  # so that the module can be imported
    caplog.clear()
    module = target(sglang)
    monkeypatch.setattr(module, "get_mla_metadata", None)
    reason = f"it does not fit SGLang {sglang.__version__}: {module.__name__} has no function get_mla_metadata"
    assert_not_registered(caplog, reason)


def test_without_sgl_flash_mla_sglang_can_be_imported(hooked, sglang):
    """It imports MegaAttention from there beside the dense functions."""
    if not has_wrappers(sglang):
        pytest.skip("this SGLang does not import flash_mla")
    from flash_mla import fused_norm_rope_attn_rope_cast as mega_attention

    for function in (mega_attention.prefill, mega_attention.decode):
        with pytest.raises(NotImplementedError, match="need sgl-flash-mla, whose import name is flash_mla too"):
            function(q=None, use_legacy=True)
    sglang_plugin._complete_import_name()
    assert flash_mla.fused_norm_rope_attn_rope_cast is mega_attention


# Plans


@pytest.fixture
def case(device) -> Case:
    return make_case(batch=3, seqlens=[100, 0, 70], causal=True, softmax_scale=SCALE, device=device)


def assert_same(actual: Any, expected: Any) -> None:
    for actual_part, expected_part in zip(actual, expected, strict=True):
        assert torch.equal(actual_part, expected_part)


def test_dense_plans_are_made_here(hooked, case):
    lengths = case.cache_seqlens
    assert_same(hooked.get_mla_metadata(lengths, 16, 1, is_fp8_kvcache=False), case.plan())
    assert_same(hooked.get_mla_metadata(lengths, 16, 1, 16, False, None), case.plan())
    assert_same(hooked.get_mla_metadata(num_heads_k=1, num_q_tokens_per_head_k=16, cache_seqlens=lengths), case.plan())


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_fp8_kvcache": True},
        {"num_heads_q": 16, "is_fp8_kvcache": True, "topk": 2048},
        {"num_heads_q": 16, "topk": 2048},
    ],
)
def test_other_plans_are_theirs(rival, hooked, case, arguments):
    assert hooked.get_mla_metadata(case.cache_seqlens, 16, 1, **arguments) == THEIR_PLAN


@pytest.mark.parametrize("batch_size", [1, 5, 160])
@pytest.mark.parametrize("num_rows", [16, 32, 128, 512])
def test_plans_fit_into_the_buffers_of_graphs(hooked, batch_size, num_rows):
    """Graphs are captured with a view of as many rows as the plan had, which another batch must fill exactly."""
    plans = [
        hooked.get_mla_metadata(torch.full((batch_size,), length, dtype=torch.int32), num_rows, 1)
        for length in (0, 1, 64, 5000, 100_000)
    ]
    assert len({metadata.shape for metadata, _ in plans}) == 1
    other_batch, _ = hooked.get_mla_metadata(torch.ones(7, dtype=torch.int32), num_rows, 1)
    for metadata, num_splits in plans:
        assert metadata.shape == other_batch.shape and metadata.shape[0] <= NUM_SMS and metadata.shape[1] == 8
        assert num_splits.shape == (batch_size + 1,)
        assert metadata.dtype == num_splits.dtype == torch.int32


# Decoding


def decode_arguments(case: Case) -> dict[str, Any]:
    metadata, num_splits = case.plan()
    return {
        "q": case.q,
        "k_cache": case.k_cache,
        "block_table": case.block_table,
        "cache_seqlens": case.cache_seqlens,
        "head_dim_v": HEAD_DIM_V,
        "tile_scheduler_metadata": metadata,
        "num_splits": num_splits,
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
    }


@pytest.mark.parametrize("more", [{}, {"descale_q": None, "descale_k": None, "is_fp8_kvcache": False}])
def test_dense_decode_is_done_here(hooked, case, more):
    expected = reference(case)
    assert_close(*hooked.flash_mla_with_kvcache(**decode_arguments(case), **more), *expected)
    # In SGLang's order descale_q and descale_k stand before is_fp8_kvcache.
    assert_close(*hooked.flash_mla_with_kvcache(*decode_arguments(case).values(), *more.values()), *expected)


def test_first_use_is_logged(hooked, case, caplog):
    plugin.log_first_use.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            hooked.flash_mla_with_kvcache(**decode_arguments(case))
    assert registrations(caplog) == [f"SGLang decodes with flash_mla {flash_mla.__version__}"]


NOT_DENSE = [
    {"indices": torch.zeros(3, 1, 64, dtype=torch.int32)},
    {"indices": torch.zeros(3, 1, 64, dtype=torch.int32), "is_fp8_kvcache": True},
    {"q": torch.zeros(3, 1, 16, HEAD_DIM, dtype=torch.float8_e4m3fn)},
    {"k_cache": torch.zeros(2, PAGE_SIZE, 1, 656, dtype=torch.uint8)},
    {"is_fp8_kvcache": True},
]


@pytest.mark.parametrize("changes", NOT_DENSE, ids=lambda changes: "-".join(changes))
def test_other_decode_is_theirs(rival, hooked, changes):
    arguments = decode_arguments(make_case(batch=3, causal=True))
    assert hooked.flash_mla_with_kvcache(**{**arguments, **changes}) == THEIR_RESULT


def test_positions_are_those_of_sglang(sglang):
    sglang_plugin._complete_import_name()
    for name, expected in (
        ("get_mla_metadata", sglang_plugin._PLAN_ARGUMENTS),
        ("flash_mla_with_kvcache", sglang_plugin._DECODE_ARGUMENTS),
    ):
        parameters = inspect.signature(getattr(target(sglang), name)).parameters.values()
        assert tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD) == expected


def test_choice_among_their_kernels_is_no_argument_here(sglang, case):
    assert_close(*sglang_plugin.decode(None, **decode_arguments(case), use_legacy=True), *reference(case))


def test_all_positions_reach_them(sglang, monkeypatch):
    def original(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    original.__module__ = sglang_plugin.KERNEL_MODULE
    indices = torch.zeros(1)
    args = (*range(12), indices, *range(6))
    assert sglang_plugin.decode(original, *args, use_legacy=True) == (args, {"use_legacy": True})
    assert sglang_plugin.plan(original, None, 16) == ((None, 16), {})
    assert len(args) == len(sglang_plugin._DECODE_ARGUMENTS)


def test_displaced_kernels_are_named(hooked, sglang):
    if not has_wrappers(sglang):
        pytest.skip("this SGLang has these kernels in sgl_kernel")
    arguments = {**decode_arguments(make_case(batch=3)), "is_fp8_kvcache": True}
    for call in (
        lambda: hooked.flash_mla_with_kvcache(**arguments),
        lambda: hooked.get_mla_metadata(arguments["cache_seqlens"], 16, 1, is_fp8_kvcache=True),
        lambda: hooked.get_mla_metadata(),
    ):
        with pytest.raises(NotImplementedError, match="fp8 caches and sparse attention need sgl-flash-mla"):
            call()


# SGLang's attention backend, which only SGLang itself has.


class CpuForCuda(torch.overrides.TorchFunctionMode):
    """Tensors that are asked for on "cuda" come to lie on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class FillBlockTable:
    """What SGLang's Triton kernel does: the pages of each request, and nothing behind them."""

    def __getitem__(self, grid: Any) -> Any:
        return self.fill

    @staticmethod
    def fill(
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        lengths: torch.Tensor,
        start: None,
        block_table: torch.Tensor,
        req_to_token_stride: int,
        block_table_stride: int,
    ) -> None:
        assert block_table_stride == block_table.stride(0)
        for request, (index, length) in enumerate(zip(req_pool_indices.tolist(), lengths.tolist(), strict=True)):
            num_pages = -(-length // PAGE_SIZE)
            block_table[request, :num_pages] = req_to_token[index, : num_pages * PAGE_SIZE : PAGE_SIZE] // PAGE_SIZE


MAX_BATCH_SIZE, MAX_PAGES, NUM_HEADS, DRAFT_TOKENS = 4, 4, 16, 3


class Server:
    """SGLang's attention backend for one layer with a token pool, requests with pages, and no model around it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.module = importlib.import_module("sglang.srt.layers.attention.flashmla_backend")
        modes = importlib.import_module("sglang.srt.model_executor.forward_batch_info")
        self.modes = {1: modes.ForwardMode.DECODE, DRAFT_TOKENS: modes.ForwardMode.TARGET_VERIFY}
        monkeypatch.setattr(self.module, "create_flashmla_kv_indices_triton", FillBlockTable())
        if hasattr(self.module, "get_parallel"):
            monkeypatch.setattr(self.module, "get_parallel", lambda: SimpleNamespace(dcp_enabled=False))
        properties = SimpleNamespace(multi_processor_count=NUM_SMS)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

        self.pool = torch.full((MAX_BATCH_SIZE * MAX_PAGES + 1, PAGE_SIZE, HEAD_DIM), float("nan"), dtype=BF16)
        order = torch.randperm(MAX_BATCH_SIZE * MAX_PAGES, generator=torch.Generator().manual_seed(0)) + 1
        self.pages = order.view(MAX_BATCH_SIZE, MAX_PAGES)
        slots = self.pages[:, :, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
        token_pool = SimpleNamespace(get_key_buffer=lambda layer_id: self.pool.view(-1, 1, HEAD_DIM))
        self.common = {"token_to_kv_pool": token_pool, "kv_loc_plan": None, "out_cache_loc": None}
        self.layer = SimpleNamespace(
            layer_id=0, tp_q_head_num=NUM_HEADS, head_dim=HEAD_DIM, v_head_dim=HEAD_DIM_V, scaling=SCALE, k_scale=None
        )
        self.backend = self.module.FlashMLABackend.__new__(self.module.FlashMLABackend)
        vars(self.backend).update(
            cuda_graph_kv_indices=None,
            dcp_world_size=1,
            device="cpu",
            forward_metadata=None,
            is_draft_runner=False,
            is_fp8_kvcache=False,
            kv_cache_dim=HEAD_DIM,
            kv_index_translator=SimpleNamespace(reads_are_translated=False, is_translating=False),
            kv_lora_rank=HEAD_DIM_V,
            max_context_len=MAX_PAGES * PAGE_SIZE,
            num_draft_tokens=DRAFT_TOKENS,
            num_q_heads=NUM_HEADS,
            page_size=PAGE_SIZE,
            req_to_token=slots.flatten(1).to(torch.int32),
            skip_prefill=True,
            token_to_kv_pool=token_pool,
            _eager_kv_indices_buf=None,
            _verify_mask=None,
        )

    def step(self, lengths: list[int], seqlen_q: int, seed: int = 0) -> tuple[Any, Case]:
        """Tokens for requests of these lengths, those of the step included: SGLang's batch, and what it should see."""
        generator = torch.Generator().manual_seed(seed)
        self.pool.fill_(float("nan"))
        for request, length in enumerate(lengths):
            tokens = torch.randn(length, HEAD_DIM, generator=generator).mul_(0.1).to(BF16)
            for page, part in zip(self.pages[request].tolist(), tokens.split(PAGE_SIZE), strict=False):
                self.pool[page, : len(part)] = part
        before = torch.tensor(lengths) - (0 if seqlen_q == 1 else seqlen_q)  # drafts do not count in SGLang's lengths
        batch = SimpleNamespace(
            batch_size=len(lengths),
            forward_mode=self.modes[seqlen_q],
            req_pool_indices=torch.arange(len(lengths)),
            seq_lens=before,
            seq_lens_cpu=before,
            **self.common,
        )
        q = torch.randn(len(lengths), seqlen_q, NUM_HEADS, HEAD_DIM, generator=generator).mul_(0.1).to(BF16)
        case = Case(
            q=q,
            k_cache=self.pool.unsqueeze(2),
            block_table=self.pages[: len(lengths)].to(torch.int32),
            cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
            softmax_scale=SCALE,
            causal=True,
        )
        return batch, case

    def forward(self, batch: Any, case: Case) -> torch.Tensor:
        seqlen_q = case.q.shape[1]
        forward = self.backend.forward_decode if seqlen_q == 1 else self.backend.forward_extend
        out = forward(case.q.flatten(0, 1), None, None, self.layer, batch)
        return out.view(*case.q.shape[:3], HEAD_DIM_V)

    def prepare_capture(self, batch: Any, num_tokens: int) -> None:
        if hasattr(self.backend, "init_forward_metadata_capture_cuda_graph"):
            self.backend.init_forward_metadata_capture_cuda_graph(
                batch.batch_size, num_tokens, batch.req_pool_indices, batch.seq_lens, None, batch.forward_mode, None
            )
        else:
            self.backend.init_forward_metadata_out_graph(batch, in_capture=True)

    def prepare_replay(self, batch: Any) -> None:
        if hasattr(self.backend, "init_forward_metadata_replay_cuda_graph"):
            lengths = batch.seq_lens
            self.backend.init_forward_metadata_replay_cuda_graph(
                batch.batch_size, batch.req_pool_indices, lengths, -1, None, batch.forward_mode, None, lengths
            )
        else:
            self.backend.init_forward_metadata_out_graph(batch)


@pytest.fixture
def server(sglang, hooked, monkeypatch) -> Iterator[Server]:
    if not is_real(sglang):
        pytest.skip("SGLang is not installed")
    with CpuForCuda():
        yield Server(monkeypatch)


def check(out: torch.Tensor, case: Case) -> None:
    expected_out, expected_lse = reference(case)
    assert_close(out, expected_lse, expected_out, expected_lse)


@pytest.mark.parametrize("seqlen_q", [1, DRAFT_TOKENS], ids=["decode", "verify"])
def test_backend_decodes(server, seqlen_q):
    for seed, lengths in enumerate([[100, 5, 70], [101, 6, 71], [4]]):
        batch, case = server.step(lengths, seqlen_q, seed)
        server.backend.init_forward_metadata(batch)
        metadata = server.backend.forward_metadata
        assert_same((metadata.flashmla_metadata, metadata.num_splits), case.plan())
        check(server.forward(batch, case), case)


@pytest.mark.parametrize("seqlen_q", [1, DRAFT_TOKENS], ids=["decode", "verify"])
def test_backend_decodes_from_the_buffers_of_a_graph(server, seqlen_q):
    """What a graph was captured with holds what it needs at each replay: one request pads, tables get deeper."""
    backend = server.backend
    backend.init_cuda_graph_state(MAX_BATCH_SIZE, MAX_BATCH_SIZE * seqlen_q)
    fill = backend.get_cuda_graph_seq_len_fill_value() + (0 if seqlen_q == 1 else seqlen_q)
    batch, case = server.step([fill] * 3, seqlen_q)
    server.prepare_capture(batch, 3 * seqlen_q)
    captured = backend.forward_metadata
    in_graph = (captured.flashmla_metadata, captured.num_splits)
    assert [tensor.untyped_storage().data_ptr() for tensor in in_graph] == [
        buffer.untyped_storage().data_ptr()
        for buffer in (backend.cuda_graph_mla_metadata, backend.cuda_graph_num_splits)
    ]
    # The width of the table is not that of the capture: a graph reads the memory behind it.
    block_table = backend.cuda_graph_kv_indices[:3]
    assert captured.block_kv_indices.data_ptr() == block_table.data_ptr()
    for seed, lengths in enumerate([[200, 130, fill], [7, 64, 65], [fill] * 3]):
        batch, case = server.step(lengths, seqlen_q, seed)
        server.prepare_replay(batch)
        backend.forward_metadata = server.module.FlashMLADecodeMetadata(*in_graph, block_table)
        assert_same(in_graph, case.plan())
        check(server.forward(batch, case), case)
