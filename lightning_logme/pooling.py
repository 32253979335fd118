"""From tokens and maps to one vector a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_logme.channels import FIRST, LAST

PoolingName = Literal["auto", "mean", "cls", "last", "channels_first", "channels_last"]
Pooling = PoolingName | Callable[[Tensor], Tensor]


class MaskError(ValueError):
    """An attention mask does not fit the tokens."""


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


def pool_nested(tokens: Tensor, pooling: Pooling) -> Tensor:
    """Reduce a nested tensor, as torch's encoder makes of masked tokens, to (N, D): it holds no padding."""
    if callable(pooling):
        return pool(tokens, pooling)
    return torch.cat([pool(one[None], pooling) for one in tokens.unbind()])


def _pool_tokens(tokens: Tensor, pooling: Pooling, mask: Tensor | None) -> Tensor:
    """Reduce tokens (N, T, D) under a mask (N, T)."""
    if mask is not None and mask.shape != tokens.shape[:2]:
        raise MaskError(
            f"pooling: the batch's attention_mask has shape {tuple(mask.shape)}, but there are {tokens.shape[1]} "
            f"tokens (features of shape {tuple(tokens.shape)})"
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
