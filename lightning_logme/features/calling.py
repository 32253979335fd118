"""Call a module with the inputs of a batch, without the labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_logme.features.labels import LABEL_KEYS, TargetSpec, inputs_of
from lightning_logme.utilities.compat import original

Forward = Callable[[Any, Any], Any]


def call(module: nn.Module, batch: Any, target: TargetSpec = None) -> Any:
    """Run a module on the inputs of a batch, and return its output.

    Args:
        module: the network. Tuples and lists of inputs become positional arguments, and mappings become keyword
            arguments as far as ``forward`` accepts them.
        batch: (inputs, labels), or a mapping.
        target: the key of the labels. The module gets neither this key nor the usual names of labels.

    Raises:
        ValueError: ``forward`` accepts no key of the mapping.
    """
    inputs = inputs_of(batch)
    if not isinstance(inputs, Mapping):
        return module(*inputs) if isinstance(inputs, (tuple, list)) else module(inputs)
    named = {key: value for key, value in inputs.items() if key not in LABEL_KEYS and key != target}
    plain = original(module)
    parameters = inspect.signature(plain.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return module(**named)
    accepted = {key: value for key, value in named.items() if key in parameters}
    if not accepted and len(named) == 1:  # one entry, such as {"image": …}, for forward(x)
        return module(*named.values())
    if not accepted:
        raise ValueError(
            f"forward: the batch has the keys {', '.join(map(repr, named))}, but {type(module).__name__}.forward "
            f"accepts only {', '.join(map(repr, parameters))}; give forward=callable(model, batch)."
        )
    return module(**accepted)


def copied(batch: Any) -> Any:
    """Return a copy of a batch, because a module may write to its inputs."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if type(batch) in (tuple, list):
        return type(batch)(map(copied, batch))
    return {key: copied(value) for key, value in batch.items()} if type(batch) is dict else batch
