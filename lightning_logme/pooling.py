"""From tokens and maps to one vector a sample, and which of their axes holds the channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

PoolingName = Literal["auto", "mean", "cls", "last", "channels_first", "channels_last"]
Pooling = PoolingName | Callable[[Tensor], Tensor]

FIRST, LAST = 1, -1  # the axes that may hold the channels

# Attributes that give the number of channels that a layer puts out.
_WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "normalized_shape")

_CONVOLUTIONAL = (_ConvNd, _BatchNorm)


def check_pooling(pooling: Any) -> None:
    """Raise ``ValueError`` unless ``pooling`` is one of its values."""
    if not callable(pooling) and not (isinstance(pooling, str) and pooling in get_args(PoolingName)):
        raise ValueError(
            f"pooling must be {', '.join(map(repr, get_args(PoolingName)))} or a callable(Tensor) -> Tensor, "
            f"got {pooling!r}."
        )


def pool(
    features: Tensor, pooling: Pooling = "auto", mask: Tensor | None = None, channel_axis: int | None = None
) -> Tensor:
    """Reduce a batch of features to one vector a sample.

    Args:
        features: (N, D), tokens (N, T, D), or a map of any number of dimensions: (N, C, H, W), (N, H, W, C), (N, C, T).
        pooling: "auto" and "mean" average over tokens or positions; so do "channels_first" and "channels_last", which
            say where the channels are; "cls" takes the first token and "last" the last one that are not masked; a
            callable gets ``features`` as they are.
        mask: (N, T), non-zero where a token counts. Maps of more than three dimensions have no tokens.
        channel_axis: 1 or -1, see :func:`find_channel_axis`; None takes the last axis of three, the second of more.

    Returns:
        (N, D), averages of half precision in float32.

    Raises:
        ValueError: the shape or the mask does not fit, or a callable does not return (N, D).
    """
    if callable(pooling):
        pooled = pooling(features)
        if not isinstance(pooled, Tensor) or pooled.ndim != 2:
            shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ValueError(f"pooling must return a tensor of shape (N, D), got {shape} from {tuple(features.shape)}.")
        return pooled
    if features.ndim == 2:
        return features
    if features.ndim < 2:
        raise ValueError(
            f"pooling={pooling!r} needs features of shape (N, D), (N, T, D) or (N, C, H, W), got "
            f"{tuple(features.shape)}."
        )
    axis = _given_axis(pooling) or channel_axis or (LAST if features.ndim == 3 else FIRST)
    if features.ndim == 3:
        return _pool_tokens(features if axis == LAST else features.transpose(1, 2), pooling, mask)
    if pooling in ("cls", "last"):
        raise ValueError(
            f"pooling={pooling!r} needs tokens of shape (N, T, D), got {tuple(features.shape)}; "
            "use 'mean' or a callable."
        )
    positions = range(1, features.ndim - 1) if axis == LAST else range(2, features.ndim)
    return features.mean(tuple(positions), dtype=_average_dtype(features))


def _pool_tokens(tokens: Tensor, pooling: Pooling, mask: Tensor | None) -> Tensor:
    """Reduce tokens (N, T, D) under a mask (N, T)."""
    if mask is not None and mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"pooling: the batch's attention_mask has shape {tuple(mask.shape)}, but there are {tokens.shape[1]} "
            f"tokens (features of shape {tuple(tokens.shape)}); say how to pool them, as in "
            "pooling=lambda tokens: tokens.mean(1)."
        )
    if pooling in ("cls", "last"):
        if mask is None:
            return tokens[:, 0 if pooling == "cls" else -1]
        places = torch.arange(tokens.shape[1], device=mask.device)
        counted = mask != 0
        if pooling == "cls":  # under left padding the first token is not at 0
            place = torch.where(counted, places, len(places) - 1).amin(1)
        else:
            place = torch.where(counted, places, 0).amax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), place.to(tokens.device)]
    dtype = _average_dtype(tokens)
    if mask is None:
        return tokens.mean(1, dtype=dtype)
    weight = (mask != 0).to(tokens.device, dtype)[:, :, None]
    # Padding may hold anything, NaN too: selected, not multiplied away.
    total = torch.where(weight > 0, tokens.to(dtype), 0.0).sum(1)
    return total / weight.sum(1).clamp(min=1)


def _average_dtype(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _given_axis(pooling: Pooling) -> int | None:
    """Return the axis that ``pooling`` itself names: the first and last token are those of (N, T, D)."""
    if callable(pooling):
        return None
    return {"channels_first": FIRST, "channels_last": LAST, "cls": LAST, "last": LAST}.get(pooling)


def needs_channel_axis(features: Tensor, pooling: Pooling) -> bool:
    """Whether pooling depends on which axis holds the channels, and ``pooling`` does not say it."""
    return features.ndim > 2 and not callable(pooling) and _given_axis(pooling) is None


def describe_pooling(shape: Sequence[int], pooling: Pooling, channel_axis: int | None, mask: Tensor | None) -> str:
    """Say in words what :func:`pool` did with a tensor of this shape."""
    if callable(pooling):
        return "pooled by the callable"
    under = "" if mask is None or len(shape) != 3 else " under attention_mask"
    if pooling in ("cls", "last"):
        return f"its {'first' if pooling == 'cls' else 'last'} token{under}"
    axis = _given_axis(pooling) or channel_axis or (LAST if len(shape) == 3 else FIRST)
    what = "tokens" if len(shape) == 3 and axis == LAST else "positions"
    return f"averaged over {what}{under}, {shape[axis]} channels on the {'last' if axis == LAST else 'second'} axis"


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


def find_channel_axis(shape: Sequence[int], inside: Sequence[Call], before: Sequence[Call]) -> int | None:
    """Return the axis of the channels, 1 or -1, of a tensor that a module put out; None if nothing decides it.

    The last layers that ran inside the module decide: first those whose width is the size of exactly one of the two
    axes, then those whose own output has its width on exactly one of them. The kind of a layer is no guide, as there
    are layer norms for channels first, and linear layers between permutations. A module without such layers, such as an
    activation, keeps the layout of what ran before it. Where all sizes are equal, a network whose layers are all
    convolutions has channels first.

    Args:
        shape: of the tensor, of three dimensions or more.
        inside: calls of the layers inside the module, in order.
        before: calls of the layers that ran before it.
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
        compiled = modules_compiled(self.root)
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
        if self._recording and width is not None and isinstance(output, Tensor):
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
    """The modules that ``torch.compile`` compiles, and all inside them."""
    compiled: Iterable[nn.Module] = (
        module
        for module in root.modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    )
    return {part for module in compiled for part in module.modules()}
