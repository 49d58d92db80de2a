"""The benchmark's own arithmetic: shapes, the model of work, the timer's plan, checks, tables and plots."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
import torch

import flash_mla
from benchmarks import append, decode, machine, peers, plot, report
from benchmarks.__main__ import COMMANDS
from benchmarks.ceilings import READ_BYTES, WORDS_PER_PROGRAM, Ceilings
from benchmarks.inputs import CachePool, check_result, compare_results, expected_result, sampled_requests
from benchmarks.model import Rates, decode_work, geometric_mean, num_cache_copies, visible_pairs
from benchmarks.shapes import NORMAL, ONE_LONG, PRESETS, Shape, parse_shape, select_shapes
from benchmarks.timer import TimerSettings, Timing, calls_per_graph, host_batch_size, idle_seconds

SMALL_SHAPES = [
    Shape(2, 1, 4, 100),
    Shape(3, 2, 4, 150, causal=True),
    Shape(4, 2, 3, 200, lengths=NORMAL),
    Shape(1, 1, 16, 64, dtype="fp16"),
]


def names(shapes):
    return [shape.name for shape in shapes]


def short_inputs(shape):
    """Values of order 0.2: over so few tokens, rounded weights of larger ones show more than the error bound allows."""
    torch.manual_seed(0)
    inputs = CachePool(torch.device("cpu"), 1 << 19).inputs(shape)
    for cache in inputs.caches:
        cache.mul_(0.2)
    return inputs


class TestShapes:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets_hold_different_shapes_that_their_names_give_back(self, preset):
        shapes = PRESETS[preset]
        assert len(set(shapes)) == len(shapes) > 0
        assert [parse_shape(shape.name) for shape in shapes] == shapes
        assert [Shape.from_json(json.loads(json.dumps(shape.to_json()))) for shape in shapes] == shapes

    def test_first_preset(self):
        assert names(PRESETS["first"]) == ["b=128,q=1,h=16,k=4096", "b=128,q=1,h=128,k=4096"]

    def test_large_covers_every_regime(self):
        large = set(PRESETS["large"])
        assert all(large >= set(PRESETS[part]) for part in ("compute", "memory", "queries", "fp16"))
        assert {shape.batch_size for shape in PRESETS["compute"]} == {64, 128, 132}
        assert all(shape.batch_size * shape.seqlen_k >= 512 * 1024 for shape in PRESETS["memory"])

    @pytest.mark.parametrize(("seqlen_k", "total"), [(4096, 493833), (8192, 987728)])
    def test_varlen_lengths_are_the_same_everywhere_and_scale_with_the_mean(self, seqlen_k, total):
        assert sum(Shape(128, 1, 16, seqlen_k, lengths=NORMAL).cache_seqlens()) == total

    def test_no_request_is_shorter_than_its_queries(self):
        assert min(Shape(512, 8, 16, 256, lengths=NORMAL).cache_seqlens()) == 8

    def test_one_long_request(self):
        assert Shape(4, 1, 16, 131072, lengths=ONE_LONG).cache_seqlens() == [131072, 1024, 1024, 1024]

    def test_selection_keeps_order_and_drops_repeats(self):
        selected = select_shapes(["b=1,h=16,k=64", "first", "b=128,h=16,k=4096"])
        assert names(selected) == ["b=1,q=1,h=16,k=64", *names(PRESETS["first"])]

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("b=1,h=16", "lacks k"),
            ("b=1,h=16,k=64,fast", "'fast'"),
            ("b=1,h=16,k=many", "'k=many'"),
            ("b=0,h=16,k=64", "batch_size must be at least 1, got 0"),
            ("b=1,h=16,hkv=3,k=64", "num_heads_q=16 is not a multiple of num_heads_kv=3"),
            ("largest", "neither a preset"),
        ],
    )
    def test_bad_selection(self, spec, message):
        with pytest.raises(ValueError, match=message):
            select_shapes([spec])


class TestModel:
    # Bytes and floating-point operations of shapes whose work was worked out independently.
    @pytest.mark.parametrize(
        ("spec", "num_bytes", "num_flops"),
        [
            ("b=1,h=16,k=1024", 1214464, 35651584),
            ("b=128,h=128,k=8192,varlen", 1173514240, 275109904384),
            ("b=128,q=2,h=128,k=32768,varlen", 4622953088, 2200975605760),
            ("b=132,h=128,k=4096", 659619840, 150592290816),
        ],
    )
    def test_work(self, spec, num_bytes, num_flops):
        assert dataclasses.astuple(decode_work(parse_shape(spec))) == (num_bytes, num_flops)

    @pytest.mark.parametrize("length", [0, 1, 2, 3, 64, 100])
    @pytest.mark.parametrize("seqlen_q", [1, 2, 4, 80])
    def test_visible_pairs(self, length, seqlen_q):
        counted = sum(j <= length - seqlen_q + i for i in range(seqlen_q) for j in range(length))
        assert visible_pairs(length, seqlen_q, causal=True) == counted
        assert visible_pairs(length, seqlen_q, causal=False) == length * seqlen_q

    def test_floor_is_the_larger_term(self):
        work = decode_work(parse_shape("b=128,h=128,k=4096"))
        fast_math, fast_memory = Rates(4e12, 1e18), Rates(1e18, 8e14)
        assert work.floor_us(fast_math) == pytest.approx(work.num_bytes / 4e6)
        assert work.floor_us(fast_memory) == pytest.approx(work.num_flops / 8e8)
        assert work.is_memory_bound(fast_math) and not work.is_memory_bound(fast_memory)
        assert work.tflops_per_s(200.0) == pytest.approx(work.num_flops / 200e-6 / 1e12)
        assert work.gbytes_per_s(200.0) == pytest.approx(work.num_bytes / 200e-6 / 1e9)

    def test_copies_exceed_the_l2_cache(self):
        l2_bytes = 60 << 20
        for cache_bytes in (1 << 20, 7 << 20, 75 << 20, 600 << 20):
            copies = num_cache_copies(cache_bytes, l2_bytes)
            assert copies * cache_bytes >= 3 * l2_bytes > (copies - 1) * cache_bytes

    def test_geometric_mean(self):
        assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
        with pytest.raises(ValueError, match="undefined"):
            geometric_mean([])

    def test_read_kernel_takes_whole_programs(self):
        assert READ_BYTES % (4 * WORDS_PER_PROGRAM) == 0


class TestTimer:
    @pytest.mark.parametrize("call_us", [1.0, 12.3, 150.0, 3000.0])
    @pytest.mark.parametrize("num_copies", [1, 2, 3, 153, 700])
    def test_graph_holds_whole_rounds_of_copies(self, call_us, num_copies):
        settings = TimerSettings()
        calls = calls_per_graph(call_us, num_copies, settings)
        assert calls % num_copies == 0 and calls >= 2
        assert calls <= max(settings.max_calls, num_copies)
        long_enough = calls * call_us >= settings.graph_us or calls > settings.max_calls - num_copies
        assert long_enough
        # No longer than it must be: one round fewer falls short of the wanted length, or of a round or two calls.
        assert (calls - num_copies) * call_us < settings.graph_us or calls == 2

    def test_long_graphs_wait_longer(self):
        settings = TimerSettings()
        assert idle_seconds(1500.0, settings) == pytest.approx(0.005)
        assert idle_seconds(10_000.0, settings) == pytest.approx(0.03)

    def test_host_batches_do_not_fill_the_queue(self):
        assert [host_batch_size(us) for us in (5.0, 1000.0, 4000.0)] == [50, 20, 10]


class TestInputs:
    @pytest.fixture
    def pool(self):
        torch.manual_seed(0)
        return CachePool(torch.device("cpu"), l2_bytes=1 << 19)

    @pytest.mark.parametrize("shape", SMALL_SHAPES, ids=names(SMALL_SHAPES))
    def test_tables_are_permutations_of_all_pages(self, pool, shape):
        inputs = pool.inputs(shape)
        pages = torch.cat([row[:count] for row, count in zip(inputs.block_table, shape.num_pages(), strict=True)])
        assert torch.equal(pages, inputs.page_indices)
        assert torch.equal(pages.sort().values, torch.arange(sum(shape.num_pages()), dtype=torch.int32))
        assert inputs.page_offsets.tolist()[-1] == pages.numel()
        assert sum(cache.numel() * cache.element_size() for cache in inputs.caches) >= 3 * pool.l2_bytes
        assert inputs.cache_seqlens.tolist() == inputs.lengths == shape.cache_seqlens()

    def test_caches_share_one_pool_and_copies_differ(self, pool):
        pool.reserve(SMALL_SHAPES)
        bf16 = [pool.inputs(shape) for shape in SMALL_SHAPES if shape.dtype == "bf16"]
        assert len({inputs.caches[0].data_ptr() for inputs in bf16}) == 1
        first, second = bf16[0].caches[:2]
        assert not torch.equal(first, second)

    def test_sampled_requests(self):
        assert sampled_requests([5]) == [0]
        assert sampled_requests([5, 9, 1, 7, 6]) == [0, 1, 2, 4]

    @pytest.mark.parametrize(
        "shape", [*SMALL_SHAPES, Shape(2, 2, 4, 70, num_heads_kv=2, causal=True)], ids=lambda s: s.name
    )
    def test_expected_result_against_a_loop(self, pool, shape):
        inputs = pool.inputs(shape)
        request = shape.batch_size - 1
        out, lse = expected_result(inputs, request)
        length, group = inputs.lengths[request], shape.num_heads_q // shape.num_heads_kv
        table = inputs.block_table[request].tolist()
        keys = torch.stack([inputs.caches[0][table[j // 64], j % 64].double() for j in range(length)])
        for i in range(shape.seqlen_q):
            seen = length - shape.seqlen_q + i + 1 if shape.causal else length
            for head in range(shape.num_heads_q):
                own_keys = keys[:seen, head // group]
                scores = own_keys @ inputs.q[request, i, head].double() / 24
                torch.testing.assert_close(lse[head, i], scores.logsumexp(0))
                torch.testing.assert_close(out[i, head], scores.softmax(0) @ own_keys[:, :512])

    def test_check_finds_wrong_values(self, pool):
        inputs = pool.inputs(SMALL_SHAPES[0])
        results = [expected_result(inputs, request) for request in range(2)]
        out, lse = (torch.stack(parts) for parts in zip(*results, strict=True))
        out = out.to(torch.bfloat16)
        max_error, wrong = check_result(inputs, out, lse.float())
        assert wrong is None and 0 < max_error < 0.01
        assert compare_results(out, out.clone()) is None
        bad_lse = lse.float().clone()
        bad_lse[1, 2, 0] *= 1.001
        assert "lse of request 1" in str(check_result(inputs, out, bad_lse)[1])
        for value in (float("nan"), 3.0):
            bad = out.clone()
            bad[1, 0, 3, 511] = value
            assert "out of request 1" in str(check_result(inputs, bad, lse.float())[1])
            assert "differ" in str(compare_results(out, bad))


class FakeTimer:
    """Gives times without a GPU; the calls are made once so that failures show."""

    settings = TimerSettings()

    def __init__(self, times):
        self.times = iter(times)
        self.copies = []

    def measure(self, call, num_copies=1, sustained=True):
        call(num_copies - 1)
        self.copies.append(num_copies)
        time = next(self.times)
        return Timing(time, 0.9 * time, 1.1 * time, 1.2 * time if sustained else None, 2 * num_copies)

    def host_us(self, call, num_copies, call_us):
        return 10.0


class Slow(peers.PlainTorch):
    name = "flashinfer"


class Wrong(peers.PlainTorch):
    name = "flashmla"

    def prepare(self, inputs):
        decoder = super().prepare(inputs)
        return dataclasses.replace(decoder, result=lambda values: (decoder.result(values)[0] * 1.1, None))


class Broken(peers.PlainTorch):
    name = "fa3"

    def prepare(self, inputs):
        raise RuntimeError("no kernel for this\nand more")


class Ours(peers.PlainTorch):
    name = "flash_mla"


@pytest.fixture
def options():
    return argparse.Namespace(shapes=["test"], budget=None, sustained=0.3, eager=True, plan=False)


@pytest.fixture
def record(options, monkeypatch):
    """A record as a run on a GPU gives it, with invented times: this package 10 and 20 µs, the other 15 and 40."""
    monkeypatch.setenv("FLASH_MLA_COMMIT", "0123456789ab")
    contestants = [Ours(), Slow(), Wrong(), Broken()]
    record = decode.new_record(options, contestants, {"torch": "left out"})
    record["gpu"] = {"name": "Some GPU"}
    record["ceilings"] = Ceilings(4000.0, 3900.0, "torch.sum", 800.0, 700.0).to_json()
    pool = CachePool(torch.device("cpu"), 1 << 19)
    times = FakeTimer([10.0, 15.0, 20.0, 40.0])
    decode.run_benchmark(SMALL_SHAPES[:2], contestants, pool, times, record, lambda: None, options)
    return record


class TestDecode:
    def test_record(self, record):
        assert record["commit"] == "0123456789ab"
        ours, slow, wrong, broken = record["results"][1]["peers"].values()
        assert (ours["short_us"], ours["sustained_us"], ours["eager_us"]) == (20.0, 24.0, 10.0)
        assert slow["short_us"] == 40.0 and slow["max_error"] < 0.02
        assert "error bound" in wrong["error"] and "short_us" not in wrong
        assert broken == {"error": "RuntimeError: no kernel for this"}
        assert json.loads(json.dumps(record)) == record

    def test_saves_after_every_measurement(self, options, tmp_path):
        record = decode.new_record(options, [], {})
        path = tmp_path / "deep" / "result.json"
        seen = []

        def save():
            decode.save_json(record, path)
            seen.append(sum(len(result["peers"]) for result in json.loads(path.read_text())["results"]))

        pool = CachePool(torch.device("cpu"), 1 << 19)
        timer = FakeTimer([1.0] * 4)
        decode.run_benchmark(SMALL_SHAPES[:2], [Ours(), Slow()], pool, timer, record, save, options)
        assert seen == [1, 2, 3, 4, 4]
        assert timer.copies == [pool.num_copies(shape) for shape in SMALL_SHAPES[:2] for _ in range(2)]
        assert list(path.parent.iterdir()) == [path]

    def test_budget_takes_no_new_shape(self, options):
        options.budget = -1.0
        record = decode.new_record(options, [], {})
        pool = CachePool(torch.device("cpu"), 1 << 19)
        decode.run_benchmark(SMALL_SHAPES, [Ours()], pool, FakeTimer([]), record, lambda: None, options)
        assert record["not_run"] == names(SMALL_SHAPES) and record["results"] == []
        assert any("No time was left for 4 shapes" in line for line in report.problem_lines(record))

    @pytest.mark.parametrize("shape", SMALL_SHAPES, ids=names(SMALL_SHAPES))
    def test_plain_torch_is_right(self, shape):
        inputs = short_inputs(shape)
        decoder = peers.PlainTorch().prepare(inputs)
        assert check_result(inputs, *decoder.result(decoder.run(0)))[1] is None

    @pytest.mark.parametrize("shape", SMALL_SHAPES, ids=names(SMALL_SHAPES))
    def test_this_package_is_right(self, shape):
        inputs = short_inputs(shape)
        decoder = peers.ThisPackage().prepare(inputs)
        out, lse = decoder.result(decoder.run(len(inputs.caches) - 1))
        assert out.shape == (shape.batch_size, shape.seqlen_q, shape.num_heads_q, 512) and lse is not None
        assert check_result(inputs, *decoder.result(decoder.run(0)))[1] is None

    @pytest.mark.parametrize("shape", SMALL_SHAPES, ids=names(SMALL_SHAPES))
    def test_batch_invariant_calls_are_right(self, shape):
        inputs = short_inputs(shape)
        decoder = peers.BatchInvariant().prepare(inputs)
        assert check_result(inputs, *decoder.result(decoder.run(0)))[1] is None
        assert not torch.equal(decoder.plan()[0], peers.ThisPackage().prepare(inputs).plan()[0])

    def test_batch_invariant_calls_are_timed_right_after_the_others(self):
        assert decode.parse_options(["--batch-invariant"]).peers[:3] == [
            "flash_mla",
            "flash_mla_batch_invariant",
            "flashmla",
        ]
        assert "flash_mla_batch_invariant" not in decode.parse_options([]).peers
        assert decode.parse_options(["--batch-invariant", "--peers", "torch"]).peers[0] == "flash_mla_batch_invariant"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shapes", "huge"], "neither a preset"),
            (["--peers", "nobody"], "invalid choice"),
            (["--rounds", "0"], "at least 1"),
            (["--sustained", "-1"], "between 0 and 60"),
        ],
    )
    def test_bad_arguments(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            decode.parse_options(arguments)
        assert message in capsys.readouterr().err

    def test_needs_a_gpu(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert decode.main([]) == 1
        assert "needs a CUDA GPU" in capsys.readouterr().err

    def test_commands(self):
        assert set(COMMANDS) == {"append", "decode", "plot", "report"}

    def test_missing_libraries_say_why(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FLASH_MLA_PEERS", str(tmp_path))
        (tmp_path / "flashmla_ops.abi3.so").write_text("no library")
        loaded, reasons = peers.load_peers(["flashmla", "fa3", "torch"])
        assert [peer.name for peer in loaded] == ["torch"]
        assert "flashmla_ops.abi3.so" in reasons["flashmla"] and "flash_attn_interface" in reasons["fa3"]
        with pytest.raises(ValueError, match="unknown peer 'nobody'"):
            peers.load_peers(["nobody"])

    def test_commit_of_this_checkout(self, monkeypatch):
        monkeypatch.delenv("FLASH_MLA_COMMIT", raising=False)
        commit = machine.current_commit()
        assert commit == "unknown" or len(commit.rstrip("+")) == 12


class TestAppend:
    def test_record(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("FLASH_MLA_COMMIT", "0123456789ab")
        record, path, seen = append.new_record(), tmp_path / "deep" / "result.json", []
        record["ceilings"] = {"copy_gbytes_per_s": 4.608}
        timer = FakeTimer([2.0, 4.0])

        def save():
            decode.save_json(record, path)
            seen.append(len(json.loads(path.read_text())["results"]))

        append.run_benchmark([2, 3], record, save, lambda tokens: append.measure_append(timer, tokens, 1 << 12, "cpu"))
        assert seen == [1, 2] and json.loads(path.read_text()) == record
        assert record["commit"] == "0123456789ab" and record["versions"]["torch"] == torch.__version__
        first, second = record["results"]
        # A token has 1152 bytes, which are read and written.
        assert (first["num_tokens"], first["short_us"]) == (2, 2.0) and first["gbytes_per_s"] == pytest.approx(2.304)
        assert second["gbytes_per_s"] == pytest.approx(1.728) and second["sustained_us"] is None
        assert capsys.readouterr().out.splitlines()[1:] == [
            "     2    2.00       2          50%",
            "     3    4.00       2          38%",
        ]

    def test_needs_the_kernels(self, monkeypatch, capsys):
        monkeypatch.setattr(flash_mla, "unavailable_reason", lambda: "there is no GPU")
        assert append.main([]) == 2
        assert capsys.readouterr().err == "error: there is no GPU\n"


class TestReport:
    def test_rows(self, record):
        first, second = report.read_rows(record)
        assert first.speedup("flashinfer") == pytest.approx(1.5) and second.speedup(None) == pytest.approx(2.0)
        assert second.speedup("flashmla") is None and second.best_other_us("sustained_us") == pytest.approx(48.0)
        assert report.peers_in([first, second]) == ["flash_mla", "flashinfer"]

    def test_table(self, record):
        header, first, second = report.result_table(record)
        assert header[0] == "shape" and "× FlashInfer" in header and len(header) == len(first) == len(second)
        assert first[0] == "b=2,q=1,h=4,k=100" and first[2] == "10.0 / 12.0"
        assert second[header.index("× FlashInfer")] == "2.00 / 2.00"
        work = decode_work(SMALL_SHAPES[0])
        assert first[4] == f"{work.gbytes_per_s(10.0):.0f}"
        assert report.result_table(record, [SMALL_SHAPES[1]])[1:] == [second]

    def test_summary(self, record):
        (line,) = report.summary_lines(record)
        assert line.startswith(
            f"Geometric mean against FlashInfer: short ×{3**0.5:.2f} (least ×1.50 at b=2,q=1,h=4,k=100"
        )

    def test_problems_are_listed(self, record):
        lines = report.problem_lines(record)
        assert "plain torch not measured: left out" in lines
        assert sum("no kernel for this" in line for line in lines) == 2

    def test_command(self, record, tmp_path, capsys):
        path = tmp_path / "result.json"
        decode.save_json(record, path)
        assert report.main([str(path)]) == 0
        printed = capsys.readouterr().out
        assert "Some GPU" in printed and "commit 0123456789ab" in printed
        assert "reads 4000 / 3900 GB/s (torch.sum)" in printed
        assert printed.count("\n| ") == 4
        assert report.main([str(path), "--text", "--shapes", "b=2,h=4,k=100"]) == 0
        assert "b=3" not in capsys.readouterr().out.split("Geometric")[0]

    def test_run_without_this_package(self, record):
        for result in record["results"]:
            del result["peers"]["flash_mla"]
        header, first, _ = report.result_table(record)
        assert header[2] == "FlashInfer µs" and first[2] == "15.0 / 18.0"
        assert report.summary_lines(record) == []


class TestPlot:
    @pytest.fixture
    def sweep(self, record):
        """Invented results for enough shapes to draw every plot."""
        record["results"] = [
            {
                "shape": shape.to_json(),
                "peers": {
                    "flash_mla": {"short_us": 5.0 + shape.batch_size, "sustained_us": 6.0 + shape.batch_size},
                    "flashinfer": {"short_us": 9.0 + shape.batch_size},
                    "flashmla": {"error": "wrong"},
                },
            }
            for shape in PRESETS["sweep"]
        ]
        return record

    def test_groups_differ_in_one_field(self, sweep):
        groups = plot.group_rows(report.read_rows(sweep), "batch_size")
        assert [len(rows) for _, rows in groups] == [9, 9]
        assert [title for title, _ in groups] == ["16 heads, 4096 cached tokens", "128 heads, 4096 cached tokens"]
        for _, rows in groups:
            sizes = [row.shape.batch_size for row in rows]
            assert sizes == sorted(sizes) and len({row.shape.num_heads_q for row in rows}) == 1

    def test_command(self, sweep, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        path = tmp_path / "result.json"
        decode.save_json(sweep, path)
        assert plot.main([str(path), "--out", str(tmp_path / "plots")]) == 0
        drawn = {file.name for file in (tmp_path / "plots").iterdir()}
        assert drawn == {"roofline.svg", "time-vs-batch.svg", "time-vs-context.svg"}
        assert "FlashInfer" in (tmp_path / "plots" / "roofline.svg").read_text()
        assert "roofline.svg" in capsys.readouterr().out

    def test_few_shapes_leave_the_series_out(self, record, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        path = tmp_path / "result.json"
        decode.save_json(record, path)
        assert plot.main([str(path), "--out", str(tmp_path / "plots"), "--format", "png"]) == 0
        assert [file.name for file in (tmp_path / "plots").iterdir()] == ["roofline.png"]
        assert "time-vs-batch is left out" in capsys.readouterr().err
