"""What GPUs of several sizes run at once, and plans that the scheduler does not make but the kernels have to follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_mla import schedule
from flash_mla.schedule import CPU_CAPACITY, ClusterCapacity

# By the number of SMs.
CAPACITIES = {
    132: CPU_CAPACITY,
    114: ClusterCapacity((0, 114, 57, 36, 26, 20, 16, 14, 12, 10, 9, 8, 7, 7, 6, 6, 6)),
    78: ClusterCapacity((0, 78, 39, 24, 18, 14, 12, 10, 9, 7, 6, 5, 5, 5, 4, 4, 4)),
}
# Without large clusters, and with few SMs.
UNUSUAL_CLUSTERS = tuple(
    (*clusters, *[0] * (schedule.MAX_SPLIT_CTAS + 1 - len(clusters)))
    for clusters in (
        (0, 132, 66, 0, 30),
        (0, 78),
        (0, 8, 4, 2, 2, 1, 1, 1, 1),
        (0, 7, 3, 2, 1, 1, 1, 1),
        (0, 4, 2, 1, 1),
        (0, 3, 1, 1),
        (0, 1),
    )
)


def plan_for_few_workers(
    lengths: Sequence[int],
    num_rows_per_head_kv: int,
    num_heads_kv: int,
    num_workers: int,
    device: str | torch.device = "cpu",
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """All of the work for the first workers, none for the others: few requests then make long lists of pieces.

    Args:
        lengths: tokens of each request.
        num_workers: how many have work; no more than there are.

    Returns:
        tile_scheduler_metadata and num_splits of the shapes that a plan for this device has.
    """
    device = torch.device(device)
    capacity, counts = schedule.capacity_of(device), (num_rows_per_head_kv, num_heads_kv)
    grid = schedule.decode_grid(len(lengths), *counts, capacity, batch_invariant)
    grid = grid._replace(num_workers=min(num_workers, grid.num_workers))
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    metadata, num_splits = schedule.divide_work(seqlens, grid, schedule.num_plan_rows(*counts, capacity.num_sms))
    return metadata.to(device), num_splits.to(device)
