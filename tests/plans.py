"""Plans that the scheduler does not make, and that the kernels have to follow all the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_mla import schedule
from flash_mla.schedule import METADATA_COLUMNS


def plan_for_few_workers(
    lengths: Sequence[int],
    num_rows_per_head_kv: int,
    num_heads_kv: int,
    num_workers: int,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """All of the work for the first workers, none for the others: few requests then make long lists of pieces.

    Args:
        lengths: tokens of each request.
        num_workers: how many have work; no more than there are.

    Returns:
        tile_scheduler_metadata and num_splits of the shapes that a plan for this device has.
    """
    device = torch.device(device)
    grid = schedule.worker_grid(num_rows_per_head_kv, num_heads_kv, schedule.num_sms_of(device))
    num_workers = min(num_workers, grid.num_workers)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    busy, num_splits = schedule.divide_work(seqlens, grid.tiles_per_request, num_workers)
    # As the scheduler has it: from the end of the line to the end of the line.
    idle = torch.zeros(grid.num_workers, METADATA_COLUMNS, dtype=torch.int32)
    idle[:, [0, 3]] = len(lengths)
    idle[:, 7] = torch.arange(grid.num_workers)
    idle[:num_workers] = busy
    return idle.to(device), num_splits.to(device)
