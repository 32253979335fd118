"""Which axis of a tensor holds the channels: the layers that made it show it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

FIRST, LAST = 1, -1  # the axes that may hold the channels

# Attributes that give the number of channels that a layer puts out.
_WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "normalized_shape")
_CONVOLUTIONAL = (_ConvNd, _BatchNorm)


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        width: the number of channels that the layer puts out.
        shape: of its output; None if it was not seen.
        convolutional: whether it is a convolution or a batch norm.
    """

    width: int
    shape: tuple[int, ...] | None
    convolutional: bool = False


def find_channel_axis(inside: Sequence[Call], before: Sequence[Call], shape: Sequence[int]) -> int | None:
    """Return the axis of the channels, 1 or -1, of a tensor that a module put out; None if nothing decides it.

    The last layers that ran inside the module decide: first those whose width is the size of exactly one of the two
    axes, then those whose own output has its width on exactly one of them. The kind of a layer is no guide, as there
    are layer norms for channels first, and linear layers between permutations. A module without such layers, such as an
    activation, keeps the layout of what ran before it. Where all sizes are equal, a network whose layers are all
    convolutions has channels first.

    Args:
        inside: calls of the layers inside the module, in order.
        before: calls of the layers that ran before it.
        shape: of the tensor, of three dimensions or more.
    """
    by_size = (_axis_of(call.width, shape) for call in reversed(inside))
    by_layout = (_axis_of(call.width, call.shape) for call in reversed(inside) if _are_alike(call.shape, shape))
    by_origin = (
        _axis_of(call.width, call.shape if _is_kept(call.shape, shape) else shape) for call in reversed(before)
    )
    found = next((axis for axis in itertools.chain(by_size, by_layout, by_origin) if axis is not None), None)
    convolutional = [call.convolutional for call in itertools.chain(inside, before)]
    return FIRST if found is None and convolutional and all(convolutional) else found


def _are_alike(made: Sequence[int] | None, shape: Sequence[int]) -> TypeGuard[Sequence[int]]:
    """Whether the output of a layer is known, and has as many axes."""
    return made is not None and len(made) == len(shape)


def _is_kept(made: Sequence[int] | None, shape: Sequence[int]) -> TypeGuard[Sequence[int]]:
    """Whether a tensor can have the layout of what a layer has made: other sizes, and not its axes in another order."""
    return _are_alike(made, shape) and sorted(made) != sorted(shape)


def _axis_of(width: int, shape: Sequence[int]) -> int | None:
    first, last = shape[FIRST] == width, shape[LAST] == width
    return None if first == last else FIRST if first else LAST


class CallTrace:
    """Records which layers run, and when the watched modules begin and end, while it is open.

    Hooks are there only while it is open. Modules compiled by ``torch.compile`` are left alone, as hooks that come and
    go would be compiled in: their layers count in the order in which they are registered.

    Args:
        root: the network.
        watched: modules to watch, by any key.
    """

    def __init__(self, root: nn.Module, watched: Mapping[Any, nn.Module]) -> None:
        self.root = root
        self._watched = dict(watched)
        self._recording = False
        self._calls: list[Call] = []
        self._spans: dict[Any, tuple[int, int]] = {}
        self._handles: list[Any] = []

    def open(self) -> None:
        """Forget what was recorded, and record."""
        self.close()
        self._calls, self._spans, self._recording = [], {}, True
        compiled = modules_compiled(self.root)  # or scripted
        for module in self.root.modules():
            if module not in compiled and layer_width(module) is not None:
                self._handles.append(module.register_forward_hook(self._on_layer))
        for key, module in self._watched.items():
            if module not in compiled:
                watch = _Watch(self, key)
                self._handles.append(module.register_forward_pre_hook(watch.begin))
                self._handles.append(module.register_forward_hook(watch.end))

    def close(self) -> None:
        """Remove the hooks; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._recording = [], False

    @property
    def position(self) -> int:
        """The number of calls so far."""
        return len(self._calls)

    def since(self, position: int) -> tuple[list[Call], list[Call]]:
        """The calls after a position, and those before it."""
        return self._calls[position:], self._calls[:position]

    def around(self, key: Any) -> tuple[list[Call], list[Call]]:
        """The calls inside a watched module, and those before it began."""
        if key in self._spans:
            begin, end = self._spans[key]
            return self._calls[begin:end], self._calls[:begin]
        module = self._watched[key]
        before = itertools.takewhile(lambda part: part is not module, self.root.modules())
        return _registered(module.modules()), _registered(before)

    def before(self, key: Any) -> list[Call]:
        """The calls before a watched module began."""
        return self.around(key)[1]

    def _on_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        width = layer_width(module)
        if self._recording and width is not None and isinstance(output, Tensor) and not output.is_nested:
            self._calls.append(Call(width, tuple(output.shape), isinstance(module, _CONVOLUTIONAL)))

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the user's module takes this along: idle, without what was recorded.
        idle: dict[str, Any] = {
            "root": None,
            "_watched": {},
            "_calls": [],
            "_spans": {},
            "_handles": [],
            "_recording": False,
        }
        return idle


class _Watch:
    """Notes where in a trace a module begins and ends. A class and not a closure, so that modules can be pickled."""

    def __init__(self, trace: CallTrace, key: Any) -> None:
        self._trace, self._key = trace, key

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        position = self._trace.position
        self._trace._spans[self._key] = position, position

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        begin, _ = self._trace._spans.get(self._key, (0, 0))
        self._trace._spans[self._key] = begin, self._trace.position


def _registered(modules: Iterable[nn.Module]) -> list[Call]:
    """The layers among modules as if each was called once, in this order."""
    widths = ((module, layer_width(module)) for module in modules)
    return [Call(width, None, isinstance(module, _CONVOLUTIONAL)) for module, width in widths if width is not None]


def layer_width(module: nn.Module) -> int | None:
    """The number of channels that a layer with parameters of its own puts out; None for other modules."""
    if next(module.parameters(recurse=False), None) is None:
        return None
    if any(next(child.parameters(), None) is not None for child in module.children()):
        return None
    for name in _WIDTHS:
        value = getattr(module, name, None)
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        if isinstance(value, int):
            return value
    return None


def modules_compiled(root: nn.Module) -> set[nn.Module]:
    """The modules that ``torch.compile`` compiles, those of TorchScript, and all inside them."""
    compiled: Iterable[nn.Module] = (
        module
        for module in root.modules()
        if isinstance(module, torch.jit.ScriptModule)
        or hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
    )
    return {part for module in compiled for part in module.modules()}
