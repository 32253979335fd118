"""Find the layer that makes the output of a module by running one batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_logme.features.hooks import Capture

_SAMPLES = 2  # number of samples that are compared: a whole batch would keep all activations in memory
_INPUTS = 4  # keep the inputs of the last few linear layers: the head is nearly always among them


class OutputLayer:
    """A search for the linear layer or 1 × 1 convolution that makes the output of a module, while one batch runs.

    A layer makes the output if its own output, or one token of it, holds the same numbers as the module's output, in
    any shape. The last layer with parameters also makes the output if it is followed only by a factor, a softmax, a
    log-softmax, a sigmoid, or an average over positions (also after a ReLU).

    Args:
        module: the network. Its layers have hooks inside the ``with`` block.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = {
            layer: name for name, layer in module.named_modules() if _is_linear(layer) and _takes_hooks(layer)
        }
        self._calls: list[_Output] = []
        self._inputs: deque[tuple[str, Tensor]] = deque(maxlen=_INPUTS)
        self._last: nn.Module | None = None  # the last layer with parameters that ran
        self._handles: list[Any] = []

    def __enter__(self) -> OutputLayer:
        for layer in self._names:
            self._handles.append(layer.register_forward_pre_hook(self._on_input))
            self._handles.append(layer.register_forward_hook(self._on_output))
        for layer in self._module.modules():
            if _takes_hooks(layer) and next(layer.parameters(recurse=False), None) is not None:
                self._handles.append(layer.register_forward_hook(self._on_layer))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_input(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and not args[0].is_nested:
            self._inputs.append((self._names[layer], args[0].detach().clone()))

    def _on_output(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim and not output.is_nested:
            self._calls.append(_Output(self._names[layer], tuple(output.shape), _first_samples(output).clone()))

    def _on_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = layer

    @property
    def is_blind(self) -> bool:
        """Whether no hook ran although the network has layers: it may be compiled or scripted."""
        layers = self._module.modules()
        return self._last is None and any(next(layer.parameters(recurse=False), None) is not None for layer in layers)

    def find(self, output: Tensor) -> str | None:
        """Return the dotted name of the layer that makes the output, or None, as in an encoder without a head.

        Raises:
            ValueError: the output is the mean of several heads.
        """
        if output.is_nested or output.ndim < 2:
            return None
        wanted = _Output("", tuple(output.shape), _first_samples(output))
        for call in reversed(self._calls):  # An adapter, which returns after the layer inside it, comes first.
            if call.name and any(torch.equal(values, wanted.values) for values in _rearranged(call, wanted)):
                return call.name
        last = None if self._last is None else self._names.get(self._last)
        for call in self._calls:
            is_last = bool(call.name) and call.name == last
            if is_last and any(_are_close(values, wanted.values) for values in _transformed(call, wanted)):
                return call.name
        heads = _several_heads(self._module, self._calls, wanted)
        if heads:
            raise ValueError(
                f"head: the output of {type(self._module).__name__} is made by several heads, "
                f"{', '.join(map(repr, heads))}; name one of them, or score their inputs together with head={heads!r}."
            )
        return None

    def replay(self, name: str, capture: Capture) -> None:
        """Pass the recorded inputs of a layer to a capture."""
        for layer, value in self._inputs:
            if layer == name:
                capture.receive(value)


class _Output(NamedTuple):
    """The output of a layer, or of the whole module.

    Attributes:
        name: the dotted name of the layer.
        shape: the shape of the output.
        values: its first samples.
    """

    name: str
    shape: tuple[int, ...]
    values: Tensor


def _first_samples(output: Tensor) -> Tensor:
    return output.detach()[:_SAMPLES].float()


def _takes_hooks(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, a 1 × 1 convolution, or an adapter around one."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and all(size == 1 for size in module.kernel_size)
    widths = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(width, int) for width in widths)


def _rearranged(call: _Output, wanted: _Output) -> Iterator[Tensor]:
    """Yield the output of a layer in the shape of the wanted output, and its token closest to the wanted output."""
    values = call.values
    if values.numel() >= wanted.values.numel() and math.prod(call.shape) == math.prod(wanted.shape):
        yield values.flatten()[: wanted.values.numel()].view_as(wanted.values)
    if values.ndim == 3 and call.shape[::2] == wanted.shape:
        distance = (values - wanted.values[:, None]).square().sum(2)
        yield values[torch.arange(len(values), device=values.device), distance.argmin(1)]


def _transformed(call: _Output, wanted: _Output) -> Iterator[Tensor]:
    """Yield the output of a layer after functions without parameters, in the shape of the wanted output."""
    values = call.values
    if call.shape == wanted.shape:
        dim = -1 if wanted.values.ndim == 2 else 1
        yield from (values.softmax(dim), values.log_softmax(dim), values.sigmoid())
        square = values.square().sum()
        if square > 0 and wanted.values.numel() > _SAMPLES:  # A single number is a multiple of any other.
            yield values * ((values * wanted.values).sum() / square)
    if values.ndim > 2 == wanted.values.ndim and call.shape[0] == wanted.shape[0]:
        for axis in (1, -1):
            if call.shape[axis] == wanted.shape[1]:
                maps = values.movedim(axis, 1).flatten(2)
                yield from (maps.mean(2), maps.relu().mean(2))


def _several_heads(module: nn.Module, calls: list[_Output], wanted: _Output) -> list[str]:
    """Return the heads whose mean is the output, or the several heads that a timm model names, else an empty list."""
    same_shape = [call for call in calls if call.shape == wanted.shape]
    total = torch.zeros_like(wanted.values)
    for number, call in enumerate(reversed(same_shape), 1):
        total += call.values
        if number > 1 and _are_close(total / number, wanted.values):
            return [call.name for call in same_shape[-number:]]
    called = {call.name for call in calls}
    for prefix, submodule in module.named_modules():
        config = getattr(submodule, "default_cfg", None)
        named = config.get("classifier") if isinstance(config, dict) else None
        if isinstance(named, (list, tuple)):
            heads = [f"{prefix}.{name}" if prefix else name for name in named]
            if len(heads) > 1 and called.issuperset(heads):
                return heads
    return []


def _are_close(left: Tensor, right: Tensor) -> bool:
    # The tolerance allows for half precision.
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-2, atol=1e-6)
