"""Which layer makes the output of a module, found by running one batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_logme.features.hooks import Capture

_SAMPLES = 2  # whose numbers are compared: all of a batch would keep the activations of the whole network
_INPUTS = 4  # of the last layers that ran are kept: a head is nearly always one of them


class OutputLayer:
    """Finds the linear layer, or 1 × 1 convolution, whose output is a module's output, while one batch runs.

    It counts as the output where the numbers are the same, also in another shape or for one token of several. If it is
    the last layer with parameters to run, it also counts where the output is its average over positions (after a ReLU
    too), a multiple of it, or its softmax, log-softmax or sigmoid.

    Args:
        module: the network. Its layers have hooks inside the ``with`` block.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._names = {part: name for name, part in module.named_modules() if _is_linear(part) and _takes_hooks(part)}
        self._calls: list[tuple[str, tuple[int, ...], Tensor]] = []
        self._inputs: deque[tuple[str, Tensor]] = deque(maxlen=_INPUTS)
        self._last: nn.Module | None = None  # of the layers with parameters, the last that ran
        self._handles: list[Any] = []

    def __enter__(self) -> OutputLayer:
        for part in self._names:
            self._handles.append(part.register_forward_pre_hook(self._on_input))
            self._handles.append(part.register_forward_hook(self._on_output))
        for part in self._module.modules():
            if _takes_hooks(part) and next(part.parameters(recurse=False), None) is not None:
                self._handles.append(part.register_forward_hook(self._on_layer))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_input(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and not args[0].is_nested:
            self._inputs.append((self._names[part], args[0].detach().clone()))

    def _on_output(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim and not output.is_nested:
            few = output.detach()[:_SAMPLES].float().clone()
            self._calls.append((self._names[part], tuple(output.shape), few))

    def _on_layer(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = part

    @property
    def is_blind(self) -> bool:
        """Whether the hooks have seen nothing of a network that has layers: it may be compiled, or scripted."""
        parts = self._module.modules()
        return self._last is None and any(next(part.parameters(recurse=False), None) is not None for part in parts)

    def find(self, output: Tensor) -> str | None:
        """Return the dotted name of the layer, or None if no layer makes the output, as in an encoder without a head.

        Raises:
            ValueError: the output is the mean of several heads.
        """
        if output.is_nested or output.ndim < 2:
            return None
        shape, numbers = tuple(output.shape), output.detach()[:_SAMPLES].float()
        for name, made, seen in reversed(self._calls):  # an adapter's wrapper comes after the layer in it
            if name and any(torch.equal(same, numbers) for same in _same(made, seen, shape, numbers)):
                return name
        last = None if self._last is None else self._names.get(self._last)
        for name, made, seen in self._calls:
            if name and name == last and any(_are_close(one, numbers) for one in _maps(made, seen, shape, numbers)):
                return name
        heads = _several(self._module, self._calls, shape, numbers)
        if heads:
            raise ValueError(
                f"head: the output of {type(self._module).__name__} is made by several heads, "
                f"{', '.join(map(repr, heads))}; name one of them, or all to score their inputs together: "
                f"head={heads!r}."
            )
        return None

    def replay(self, name: str, capture: Capture) -> None:
        """Give a capture the inputs of a layer in the batch, as far as they are at hand."""
        for layer, seen in self._inputs:
            if layer == name:
                capture.receive(seen)


def _takes_hooks(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


def _is_linear(module: nn.Module) -> bool:
    """Whether it maps features linearly to outputs: adapters around a linear layer do, too."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and all(size == 1 for size in module.kernel_size)
    widths = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(width, int) for width in widths)


def _same(made: tuple[int, ...], seen: Tensor, shape: tuple[int, ...], numbers: Tensor) -> Iterator[Tensor]:
    """The output if it were the output of a layer, in another shape, or one of its tokens.

    Args:
        made: shape of the layer's output.
        seen: its first samples.
        shape: of the module's output.
        numbers: its first samples.
    """
    if seen.numel() >= numbers.numel() and math.prod(made) == math.prod(shape):
        yield seen.flatten()[: numbers.numel()].view_as(numbers)
    if seen.ndim == 3 and made[::2] == shape:
        distance = (seen - numbers[:, None]).square().sum(2)
        yield seen[torch.arange(len(seen), device=seen.device), distance.argmin(1)]


def _maps(made: tuple[int, ...], seen: Tensor, shape: tuple[int, ...], numbers: Tensor) -> Iterator[Tensor]:
    """The output if it were made of the output of a layer by a map without parameters."""
    if made == shape:
        dim = -1 if numbers.ndim == 2 else 1
        yield from (seen.softmax(dim), seen.log_softmax(dim), seen.sigmoid())
        square = seen.square().sum()
        if square > 0 and numbers.numel() > _SAMPLES:  # one number is a multiple of any other
            yield seen * ((seen * numbers).sum() / square)
    if seen.ndim > 2 == numbers.ndim and made[0] == shape[0]:
        for axis in (1, -1):
            if made[axis] == shape[1]:
                maps = seen.movedim(axis, 1).flatten(2)
                yield from (maps.mean(2), maps.relu().mean(2))


def _several(
    module: nn.Module, calls: list[tuple[str, tuple[int, ...], Tensor]], shape: tuple[int, ...], numbers: Tensor
) -> list[str]:
    """The heads whose mean is the output, or which timm's convention names."""
    alike = [(name, seen) for name, made, seen in calls if made == shape]
    total = torch.zeros_like(numbers)
    for number, (_, seen) in enumerate(reversed(alike), 1):
        total += seen
        if number > 1 and _are_close(total / number, numbers):
            return [name for name, _ in alike[-number:]]
    called = {name for name, _, _ in calls}
    for prefix, part in module.named_modules():
        config = getattr(part, "default_cfg", None)
        named = config.get("classifier") if isinstance(config, dict) else None
        if isinstance(named, (list, tuple)):
            heads = [f"{prefix}.{name}" if prefix else name for name in named]
            if len(heads) > 1 and called.issuperset(heads):
                return heads
    return []


def _are_close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-2, atol=1e-6)  # of half precision, too
