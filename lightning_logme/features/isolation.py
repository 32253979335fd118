"""Isolate forward passes from a run, so that they leave no trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_logme.utilities.compat import isolate_rng, kept_buffers


@contextmanager
def same_generators() -> Iterator[None]:
    """Restore the global random generators on exit, also after an exception."""
    isolated = isolate_rng()
    isolated.__enter__()
    try:
        yield
    finally:
        isolated.__exit__(None, None, None)  # Lightning restores nothing if it gets an exception.


def seed_generators(seed: int) -> None:
    """Seed every global generator that a factory or a data set may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def undisturbed(module: nn.Module, datamodule: object = None) -> Iterator[None]:
    """Set a module to eval mode without gradients, and restore its state on exit.

    The state consists of the attributes of the module and its submodules (modes, counters, caches, metric states), its
    buffers, the torch generators among its attributes, the global random generators, and the attributes of the data
    module, whose hooks prepare batches. Values that the module logs meanwhile are dropped. Items that it adds to its
    own lists and dicts stay.
    """
    scripted = {
        submodule: submodule.training for submodule in module.modules() if isinstance(submodule, torch.jit.ScriptModule)
    }
    submodules = [submodule for submodule in module.modules() if submodule not in scripted]
    kept = [(owner, dict(vars(owner))) for owner in (*submodules, datamodule) if owner is not None]
    attributes = (value for _, held in kept for value in held.values())
    generators = [(value, value.get_state()) for value in attributes if isinstance(value, torch.Generator)]
    try:
        for submodule in submodules:
            if isinstance(submodule, Metric):  # A metric may write to its states, so it gets copies of them.
                for name, state in submodule.metric_state.items():
                    setattr(submodule, name, state.clone() if isinstance(state, Tensor) else list(state))
        vars(module)["log"] = _drop  # A forward that logs would mix these batches into the user's metrics.
        with kept_buffers(module), same_generators(), torch.no_grad():
            module.eval()
            yield
    finally:
        for owner, held in kept:
            vars(owner).clear()
            vars(owner).update(held)
        for generator, state in generators:
            generator.set_state(state)
        for submodule, training in scripted.items():  # vars(submodule) lacks the attributes of TorchScript.
            submodule.train(training)


def _drop(*_: Any, **__: Any) -> None:
    pass
