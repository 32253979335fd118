"""What several processes do in step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lightning_logme.distributed import gathered
from lightning_logme.moments import Moments, moments_device
from lightning_logme.packages import Fabric
from lightning_logme.samples import BLOCKS

T = TypeVar("T")
Info = TypeVar("Info")


class Failure(Exception):
    """What went wrong in one process, raised in all of them."""


def together(fabric: Fabric, step: Callable[[], T]) -> T:
    """Do a step in every process; if it fails in one, fail in all, so that none waits for another."""
    result, error = None, None
    try:
        result = step()
    except Exception as caught:
        # Only the text is kept: a traceback holds on to tensors, and memory may be what there was too little of.
        error = f"{type(caught).__name__}: {caught}"
    for rank, message in enumerate(everyone(fabric, error)):
        if message is not None:
            raise Failure(message if fabric.world_size == 1 else f"{message} (process {rank})")
    return result  # type: ignore[return-value]


def everyone(fabric: Fabric, mine: Info) -> list[Info]:
    """What each process has, by rank."""
    return gathered(fabric.world_size == 1, mine)


def summed(fabric: Fabric, blocks: list[Moments], num_outputs: int) -> list[Moments]:
    """The blocks of all processes, one of which may have had no samples; none if none had."""
    if fabric.world_size == 1:
        return blocks
    met = everyone(fabric, blocks[0].num_features if blocks else None)
    lengths = sorted({length for length in met if length is not None})
    if len(lengths) > 1:
        raise Failure(f"features of lengths {lengths} in different processes; pool them to one length.")
    if lengths and not blocks:
        blocks = [Moments.zeros(lengths[0], num_outputs) for _ in range(BLOCKS)]
    # Features may have been on another device, which the backend of the processes does not take.
    return [block.to(moments_device(fabric.device)).all_reduce() for block in blocks]
