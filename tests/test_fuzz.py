"""Random decodes against float64, on both devices; hypothesis shrinks a case that fails.

Other cases, and more or fewer of them: pytest tests/test_fuzz.py --fuzz-cases 5000 --fuzz-seed 7
"""

from __future__ import annotations

import time

import pytest
from fuzz import CPU_LIMITS, GPU_LIMITS, FuzzCase, find_problem, fuzz_cases
from hypothesis import HealthCheck, Phase, given, seed, settings

from flash_mla import cpu

DEFAULT_NUM_CASES = {"cpu": 300, "cuda": 20_000}
ALL_PHASES = (Phase.generate, Phase.shrink)


def fuzz(device: str, num_cases: int, random_seed: int, phases: tuple[Phase, ...] = ALL_PHASES) -> int:
    """Run that many cases; raise AssertionError for the simplest that fails. Returns how many ran."""
    limits = GPU_LIMITS if device == "cuda" else CPU_LIMITS
    num_ran = 0

    @seed(random_seed)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=fuzz_cases(limits))
    def check(case: FuzzCase) -> None:
        nonlocal num_ran
        num_ran += 1
        problem = find_problem(case, device)
        if problem is not None:
            raise AssertionError(f"{problem}\n{case}\n--fuzz-seed {random_seed}")

    check()
    return num_ran


def test_random_cases(device, request, capsys):
    num_cases = request.config.getoption("--fuzz-cases") or DEFAULT_NUM_CASES[device]
    random_seed = request.config.getoption("--fuzz-seed")
    begin = time.monotonic()
    num_ran = fuzz(device, num_cases, random_seed)
    with capsys.disabled():
        print(f" [{num_ran} cases on {device}, --fuzz-seed {random_seed}, {time.monotonic() - begin:.0f} s] ", end="")
    assert num_ran >= num_cases


def test_simplest_case(device):
    assert find_problem(FuzzCase(lengths=()), device) is None
    assert find_problem(FuzzCase(lengths=(1,)), device) is None


# Mistakes of the kind that kernels make, put into the CPU implementation.
def reads_one_token_too_many(decode_request):
    def spoiled(q, k_cache, pages, length, softmax_scale, causal):
        more = length + 1 if length % 64 else length
        return decode_request(q, k_cache, pages, more, softmax_scale, causal)

    return spoiled


def misses_the_last_page(decode_request):
    def spoiled(q, k_cache, pages, length, softmax_scale, causal):
        if length > 64 and length % 64 == 1:
            pages, length = pages[:-1], length - 1
        return decode_request(q, k_cache, pages, length, softmax_scale, causal)

    return spoiled


def is_causal_to_the_top_left(decode_request):
    def spoiled(q, k_cache, pages, length, softmax_scale, causal):
        if causal and length > q.shape[0]:
            length = q.shape[0]
            pages = pages[: -(-length // 64)]
        return decode_request(q, k_cache, pages, length, softmax_scale, causal)

    return spoiled


def leaves_empty_requests_unwritten(decode_request):
    def spoiled(q, k_cache, pages, length, softmax_scale, causal):
        out, lse = decode_request(q, k_cache, pages, length, softmax_scale, causal)
        return (out, lse) if length > 0 else (out * float("nan"), lse)

    return spoiled


@pytest.mark.parametrize(
    "mistake",
    [reads_one_token_too_many, misses_the_last_page, is_causal_to_the_top_left, leaves_empty_requests_unwritten],
)
def test_mistakes_are_found(mistake, monkeypatch):
    """Within the number of cases that continuous integration runs."""
    monkeypatch.setattr(cpu, "_decode_request", mistake(cpu._decode_request))
    with pytest.raises(AssertionError, match=r"is .* times its bound\nFuzzCase\(lengths="):
        fuzz("cpu", DEFAULT_NUM_CASES["cpu"], random_seed=0, phases=(Phase.generate,))


def test_failing_case_is_shrunk(monkeypatch):
    monkeypatch.setattr(cpu, "_decode_request", reads_one_token_too_many(cpu._decode_request))
    with pytest.raises(AssertionError, match=r"\nFuzzCase\(lengths=\(1,\)\)\n--fuzz-seed 0"):
        fuzz("cpu", 50, random_seed=0)
