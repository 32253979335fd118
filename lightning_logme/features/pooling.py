"""Pool tokens and maps to one vector per sample, and find the axis that holds their channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import torch
from torch import Tensor

from lightning_logme.features.labels import Labels
from lightning_logme.utilities.checks import EXCLUSIVE

PoolingName = Literal["auto", "mean", "cls", "last", "channels_first", "channels_last"]
Pooling = PoolingName | Callable[[Tensor], Tensor]

FIRST, LAST = 1, -1  # the axes that may hold the channels


class MaskError(ValueError):
    """Raised if an attention mask does not fit the tokens."""


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        width: the number of output channels of the layer.
        shape: the shape of the output; None if it is not known.
        convolutional: whether the layer is a convolution or a batch norm.
    """

    width: int
    shape: tuple[int, ...] | None
    convolutional: bool = False


Calls = tuple[Sequence[Call], Sequence[Call]]  # the calls inside a module, and those before it


class Pooler:
    """The pooling of one source of features to one vector for each label of a batch.

    Args:
        pooling: see :func:`pool`.
        name: the name in messages.
        key: the key in a mapping of poolings.
        axis: the axis of the channels, if the class of the module shows it.

    Attributes:
        settled: whether a batch has shown the axis of the channels.
        description: how the tokens or maps of the last batch were pooled.
    """

    def __init__(self, pooling: Pooling, name: str, key: str, axis: int | None = None) -> None:
        self.pooling: Pooling = pooling
        self.name = name
        self.settled = False
        self.description: str | None = None
        self.key = key
        self._axis_of_module = axis
        self._axes: dict[int, int] = {}  # the axis of the channels, by number of dimensions

    def rows(self, tensor: Tensor, labels: Labels, calls: Calls) -> Tensor:
        """Return the features pooled to (N, D), or (N, T, D) for labels (N, T).

        Args:
            tensor: the features of a batch.
            labels: its labels.
            calls: the calls inside the module that made the features, and the calls before it.

        Raises:
            ValueError: the shapes do not fit, or the axis of the channels is not known.
        """
        shape, (number, *tokens) = tuple(tensor.shape) if not tensor.is_nested else (), labels.target.shape
        by_token = bool(tokens) and labels.target.task in EXCLUSIVE
        self.description = None
        if tensor.is_nested:
            tensor = pool_nested(tensor, self.pooling)
            shape = tuple(tensor.shape)
        if tensor.ndim == 1 and number == 1:  # It is a squeezed batch of one sample.
            tensor = tensor[None]
        if by_token and tensor.ndim == 2 and len(tensor) == number * tokens[0]:
            tensor = tensor.unflatten(0, (number, tokens[0]))  # The head got the tokens of all samples in one matrix.
        if not (by_token and tensor.ndim == 3 and tensor.shape[:2] == labels.target.shape):
            tensor = self.pooled(tensor, labels.mask, calls)
        if len(tensor) != number:
            raise ValueError(
                f"{self.name} gave {len(tensor)} features for {number} labels, shapes {shape} and "
                f"{tuple(labels.target.shape)}; name a module that gives one feature per label, or pool to one with "
                "pooling=callable."
            )
        self.settled = True
        return tensor

    def pooled(self, tensor: Tensor, mask: Tensor | None, calls: Calls = ((), ())) -> Tensor:
        """Return the features pooled to (N, D). Without ``calls``, the axis of the channels must be known."""
        axis = None
        if tensor.ndim > 2 and not callable(self.pooling) and _given_axis(self.pooling) is None:
            axis = self._axis(tensor, calls)
        try:
            pooled = pool(tensor, self.pooling, mask, axis)
        except MaskError as error:
            raise ValueError(
                f"{self.name}: {error}; choose how to pool them, as in "
                f"pooling={{{self.key!r}: lambda tokens: tokens.mean(1)}}."
            ) from error
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if tensor.ndim > 2:
            shape = tuple(tensor.shape)
            self.description = f"{self.name}: {shape} {describe_pooling(shape, self.pooling, axis, mask)}"
        return pooled

    def _axis(self, tensor: Tensor, calls: Calls) -> int:
        if tensor.ndim not in self._axes:
            axis = self._axis_of_module or find_channel_axis(*calls, tensor.shape)
            if axis is None:
                raise ValueError(
                    f"pooling: {self.name} has shape {tuple(tensor.shape)}, and no layer shows whether its channels "
                    f"are on the second axis ({tensor.shape[1]}) or on the last ({tensor.shape[-1]}); write "
                    f"pooling={{{self.key!r}: 'channels_first'}} or 'channels_last'."
                )
            self._axes[tensor.ndim] = axis
        return self._axes[tensor.ndim]


def check_poolings(pooling: Any) -> None:
    """Raise ``ValueError`` unless ``pooling`` is a pooling, or a mapping from layers to poolings."""
    for value in pooling.values() if isinstance(pooling, Mapping) else [pooling]:
        if not callable(value) and not (isinstance(value, str) and value in get_args(PoolingName)):
            raise ValueError(
                f"pooling must be {', '.join(map(repr, get_args(PoolingName)))} or a callable(Tensor) -> Tensor, got "
                f"{value!r}."
            )


def pool(
    features: Tensor, pooling: Pooling = "auto", mask: Tensor | None = None, channel_axis: int | None = None
) -> Tensor:
    """Pool a batch of features to one vector per sample.

    Args:
        features: (N, D), tokens (N, T, D), or a map of any number of dimensions: (N, C, H, W), (N, H, W, C), (N, C, T).
        pooling: "auto" and "mean" average over tokens or positions; so do "channels_first" and "channels_last", which
            name the axis of the channels. "cls" takes the first token that is not masked, "last" takes the last such
            token. A callable gets ``features`` unchanged.
        mask: (N, T), non-zero for tokens that count. Only features of three dimensions use it.
        channel_axis: 1 or -1, see :func:`find_channel_axis`. None takes the last of three axes, or the second of
            four or more.

    Returns:
        (N, D). Averages of half precision are in float32.

    Raises:
        ValueError: the shape or the mask does not fit, or the callable does not return (N, D).
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
            f"pooling={pooling!r} needs tokens of shape (N, T, D), got {tuple(features.shape)}; use 'mean' or a "
            "callable."
        )
    positions = range(1, features.ndim - 1) if axis == LAST else range(2, features.ndim)
    return features.mean(tuple(positions), dtype=_average_dtype(features))


def pool_nested(tokens: Tensor, pooling: Pooling) -> Tensor:
    """Pool a nested tensor, the output of torch's encoder for masked tokens, to (N, D). It holds no padding."""
    if callable(pooling):
        return pool(tokens, pooling)
    return torch.cat([pool(one[None], pooling) for one in tokens.unbind()])


def _pool_tokens(tokens: Tensor, pooling: Pooling, mask: Tensor | None) -> Tensor:
    """Pool tokens (N, T, D) under a mask (N, T)."""
    if mask is not None and mask.shape != tokens.shape[:2]:
        raise MaskError(
            f"pooling: the batch's attention_mask has shape {tuple(mask.shape)}, but there are {tokens.shape[1]} "
            f"tokens (features of shape {tuple(tokens.shape)})"
        )
    if pooling in ("cls", "last"):
        if mask is None:
            return tokens[:, 0 if pooling == "cls" else -1]
        positions = torch.arange(tokens.shape[1], device=mask.device)
        counted = mask != 0
        if pooling == "cls":  # With left padding, the first token is not at position 0.
            chosen = torch.where(counted, positions, len(positions) - 1).amin(1)
        else:
            chosen = torch.where(counted, positions, 0).amax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), chosen.to(tokens.device)]
    dtype = _average_dtype(tokens)
    if mask is None:
        return tokens.mean(1, dtype=dtype)
    weight = (mask != 0).to(tokens.device, dtype)[:, :, None]
    # Padding may hold NaN, which a product with zero would keep.
    total = torch.where(weight > 0, tokens.to(dtype), 0.0).sum(1)
    return total / weight.sum(1).clamp(min=1)


def _average_dtype(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def _given_axis(pooling: Pooling) -> int | None:
    """Return the axis of the channels that ``pooling`` implies, or None. "cls" and "last" need tokens (N, T, D)."""
    if callable(pooling):
        return None
    return {"channels_first": FIRST, "channels_last": LAST, "cls": LAST, "last": LAST}.get(pooling)


def describe_pooling(shape: Sequence[int], pooling: Pooling, channel_axis: int | None, mask: Tensor | None) -> str:
    """Return a description of what :func:`pool` does with features of this shape."""
    if callable(pooling):
        return "pooled by the callable"
    under = "" if mask is None or len(shape) != 3 else " under attention_mask"
    if pooling in ("cls", "last"):
        return f"its {'first' if pooling == 'cls' else 'last'} token{under}"
    axis = _given_axis(pooling) or channel_axis or (LAST if len(shape) == 3 else FIRST)
    what = "tokens" if len(shape) == 3 and axis == LAST else "positions"
    return f"averaged over {what}{under}, {shape[axis]} channels on the {'last' if axis == LAST else 'second'} axis"


def find_channel_axis(inside: Sequence[Call], before: Sequence[Call], shape: Sequence[int]) -> int | None:
    """Return the axis of the channels, 1 or -1, in the output of a module; None if nothing decides it.

    The layers that ran inside the module decide, starting with the last one. A layer decides if its width is the size
    of exactly one of the two axes of ``shape``. If no layer does, the same is tried with the shape of each layer's own
    output. A module in which no layer decides, such as an activation, keeps the layout of the layers before it. If
    nothing has decided and all layers are convolutions, the channels are first. In all other cases the kind of a layer
    does not decide, because there are layer norms for channels first, and linear layers between permutations.

    Args:
        inside: the calls inside the module, in order.
        before: the calls before it.
        shape: the shape of the output, with three dimensions or more.
    """
    by_size = (_axis_of(call.width, shape) for call in reversed(inside))
    by_layout = (_axis_of(call.width, call.shape) for call in reversed(inside) if _has_as_many_axes(call.shape, shape))
    by_previous = (
        _axis_of(call.width, call.shape if _has_other_sizes(call.shape, shape) else shape) for call in reversed(before)
    )
    found = next((axis for axis in itertools.chain(by_size, by_layout, by_previous) if axis is not None), None)
    convolutional = [call.convolutional for call in itertools.chain(inside, before)]
    return FIRST if found is None and convolutional and all(convolutional) else found


def _has_as_many_axes(made: Sequence[int] | None, shape: Sequence[int]) -> TypeGuard[Sequence[int]]:
    """Return whether the shape of a layer's output is known, and has the same number of axes."""
    return made is not None and len(made) == len(shape)


def _has_other_sizes(made: Sequence[int] | None, shape: Sequence[int]) -> TypeGuard[Sequence[int]]:
    """Return whether two shapes have the same number of axes, and are not permutations of each other."""
    return _has_as_many_axes(made, shape) and sorted(made) != sorted(shape)


def _axis_of(width: int, shape: Sequence[int]) -> int | None:
    """Return the only axis that has this width, or None if both axes or neither have it."""
    first, last = shape[FIRST] == width, shape[LAST] == width
    return None if first == last else FIRST if first else LAST
