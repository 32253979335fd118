"""Forward passes beside a run, which leave no trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_logme.packages import isolate_rng


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
def undisturbed(module: nn.Module, datamodule: object = None) -> Iterator[None]:
    """A module in eval mode and without gradients; afterwards all is as it was.

    That is the attributes of its parts (modes, counters, caches, the states of metrics), its buffers, and the random
    generators: the global ones, and those that are attributes of its parts. What it logs meanwhile is dropped. Lists
    and dicts of its own that it adds to keep what was added. The attributes of the data module, whose hooks prepare
    batches, are kept as well.
    """
    scripted = {part: part.training for part in module.modules() if isinstance(part, torch.jit.ScriptModule)}
    parts = [part for part in module.modules() if part not in scripted]
    kept = [(owner, dict(vars(owner))) for owner in (*parts, datamodule) if owner is not None]
    held = [(part, dict(part._buffers), set(part._non_persistent_buffers_set)) for part in parts]
    contents = [(buffer, buffer.clone()) for buffer in module.buffers()]
    generators = [(value, _state(value)) for _, attributes in kept for value in attributes.values()]
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
        for owner, attributes in kept:
            vars(owner).clear()
            vars(owner).update(attributes)
        for part, buffers, transient in held:
            part._buffers.clear()
            part._buffers.update(buffers)
            part._non_persistent_buffers_set.clear()
            part._non_persistent_buffers_set.update(transient)
        for part, training in scripted.items():  # whose attributes are not in Python
            part.train(training)
        for generator, state in generators:
            _set_state(generator, state)
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)


def _state(generator: Any) -> Any:
    """Of a random generator; None of anything else."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, (torch.Generator, np.random.RandomState)):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)


def _drop(*_: Any, **__: Any) -> None:
    pass
