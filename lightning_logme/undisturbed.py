"""Forward passes beside a run, which leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric


@contextmanager
def same_generators() -> Iterator[None]:
    """The random generators as they were, afterwards."""
    isolated = isolate_rng()
    isolated.__enter__()
    try:
        yield
    finally:
        isolated.__exit__(None, None, None)  # which forgets them where it is told of an exception


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """A module in eval mode and without gradients; afterwards all is as it was.

    That is the modes of its parts, its buffers, the states of its metrics, and the random generators. What it logs
    meanwhile is dropped.
    """
    parts = list(module.modules())
    modes = [part.training for part in parts]
    buffers = [(part, dict(part._buffers), _copies(part._buffers)) for part in parts if part._buffers]
    metrics = [
        (part, {"_update_count": part._update_count, "_computed": part._computed, **part.metric_state})
        for part in parts
        if isinstance(part, Metric)
    ]
    for metric, states in metrics:
        for name, copied in _copies(states).items():
            setattr(metric, name, copied)
    module.eval()
    attributes = vars(module)
    log = {"log": attributes["log"]} if "log" in attributes else {}
    attributes["log"] = _drop  # a forward that logs would log these batches as the user's
    try:
        with same_generators(), torch.no_grad():
            yield
    finally:
        del attributes["log"]
        attributes.update(log)
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
        with torch.no_grad():
            for part, tensors, copies in buffers:
                for name, tensor in tensors.items():
                    if tensor is not None and not torch.equal(tensor, copies[name]):
                        tensor.copy_(copies[name])
                part._buffers.update(tensors)
        # The objects of before: copies made in inference mode could not be written to in training.
        for metric, states in metrics:
            for name, state in states.items():
                setattr(metric, name, state)


def _copies(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else copy(value) for name, value in values.items()}


def _drop(*_: Any, **__: Any) -> None:
    pass
