"""Forward passes beside a run, which leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

    That is the attributes of its parts (modes, counters, caches, the states of metrics), its buffers, and the random
    generators. What it logs meanwhile is dropped. Lists and dicts of its own that it adds to keep what was added.
    """
    parts = list(module.modules())
    kept = [(part, dict(vars(part)), dict(part._buffers), set(part._non_persistent_buffers_set)) for part in parts]
    contents = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        for part in parts:
            if isinstance(part, Metric):  # which may write to its states: to copies of them
                for name, state in part.metric_state.items():
                    setattr(part, name, state.clone() if isinstance(state, Tensor) else list(state))
        vars(module)["log"] = _drop  # a forward that logs would log these batches as the user's
        module.eval()
        with same_generators(), torch.no_grad():
            yield
    finally:
        for part, attributes, buffers, transient in kept:
            for now, before in ((vars(part), attributes), (part._buffers, buffers)):
                now.clear()
                now.update(before)
            part._non_persistent_buffers_set.clear()
            part._non_persistent_buffers_set.update(transient)
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)


def _drop(*_: Any, **__: Any) -> None:
    pass
