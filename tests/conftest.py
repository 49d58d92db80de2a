"""Skips the tests marked `gpu` where there is no sm_90 GPU or no kernels, and says which of the two at the top."""

from __future__ import annotations

import pytest
import torch

import flash_mla


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rejected-calls", type=int, default=20_000, help="wrong calls in a row, after which no memory may be missing"
    )

    parser.addoption("--fuzz-cases", type=int, help="random cases per device (300 on the CPU, 20000 on the GPU)")
    parser.addoption("--fuzz-seed", type=int, default=0, help="another seed gives other random cases (0)")


def pytest_configure() -> None:
    # What several threads gain in tensors of this size, they lose in waiting for each other.
    torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> list[str]:
    reason = flash_mla.unavailable_reason()
    return [
        f"GPU tests: {'run' if reason is None else f'skipped, {reason}'}",
        f"random cases: --fuzz-seed {config.getoption('--fuzz-seed')}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if gpu_items and (reason := flash_mla.unavailable_reason()) is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
