"""Where features come from: hooks that remember what passes a module, and pooling to one vector a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Pooling = Literal["auto", "mean", "cls", "last"] | Callable[[Tensor], Tensor]

_BEFORE_SCRIPT = "__prepare_scriptable__"


class Tap:
    """Remembers the input, or the output, of a module while it is open.

    Hooks stay attached for a whole run, and a plain flag opens them: hooks that come and go are not seen by code that
    torch.compile has compiled before. A class and not a closure, so that the user's module can still be pickled and
    copied.

    Args:
        module: what to listen to.
        side: "input" or "output".
        name: what errors call the module.
    """

    def __init__(self, module: nn.Module, side: Literal["input", "output"], name: str) -> None:
        self.name = name
        self.open = False
        self._module = module
        self._side = side
        self._seen: list[Tensor | None] = []
        self._error: Exception | None = None
        self._handle: RemovableHandle | None = None
        self._attach()

    def _attach(self) -> None:
        if self._side == "input":
            self._handle = self._module.register_forward_pre_hook(self._on_input, with_kwargs=True)
        else:
            self._handle = self._module.register_forward_hook(self._on_output)
        # torch.jit.script calls this before it compiles the module, and all of its hooks.
        vars(self._module)[_BEFORE_SCRIPT] = partial(_without_taps, self._module)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._remember((args, kwargs))

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._remember(output)

    def _remember(self, value: Any) -> None:
        if self.open:
            try:
                tensor = first_tensor(value)
                # A copy, for what comes after may work in place.
                self._seen.append(None if tensor is None else tensor.detach().clone())
            except Exception as error:  # which must not end the user's forward pass
                self._error = error

    def start(self) -> None:
        """Forget what was seen, and listen."""
        if self._handle is not None and self._handle.id not in (self._handle.hooks_dict_ref() or ()):
            self._handle.remove()  # what torch.jit.script has left of it
            self._attach()
        self._seen, self._error = [], None
        self.open = True

    @property
    def called(self) -> bool:
        """Whether the module was called since the start."""
        return bool(self._seen)

    def take(self) -> Tensor:
        """What the module was called with, or returned, since the start; listen no more.

        Raises:
            ValueError: it was not called, or more than once, or there was no tensor. What else went wrong in a call.
        """
        seen, error = self._seen, self._error
        self.stop()
        if error is not None:
            raise error
        if len(seen) == 0:
            raise ValueError(
                f"{self.name} was not called for this batch. Name a module that is; or, if the model was compiled and "
                'run before the hooks were attached, call torch.compiler.set_stance("force_eager") or compile it anew, '
                "so that its hooks are seen."
            )
        if len(seen) > 1:
            raise ValueError(
                f"{self.name} was called {len(seen)} times for one batch, so its features cannot be matched with the "
                "labels; name a module that is called once."
            )
        if seen[0] is None:
            raise ValueError(f"{self.name} was called without a tensor; name a module that takes and returns tensors.")
        return seen[0]

    def stop(self) -> None:
        """Forget what was seen, and listen no more."""
        self.open = False
        self._seen, self._error = [], None

    def remove(self) -> None:
        """Leave the module as it was."""
        self.stop()
        if self._handle is not None:
            self._handle.remove()
            if not any(_taps(self._module)):
                vars(self._module).pop(_BEFORE_SCRIPT, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the user's module takes this along: idle, without the features.
        return {"name": self.name, "open": False, "_seen": [], "_error": None, "_handle": None}


def _taps(module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """The hooks of a module that belong to taps: the dict that holds each, and its key."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Tap):
                yield hooks, key


def _without_taps(module: nn.Module) -> nn.Module:
    """What torch.jit.script compiles in place of the module: itself without the hooks, until the next batch starts."""
    for hooks, key in _taps(module):
        del hooks[key]
    prepare = getattr(type(module), _BEFORE_SCRIPT, None)
    return module if prepare is None else prepare(module)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and mappings; the last hidden state of a Hugging Face output."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = (value.get("last_hidden_state"), *value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            tensor = first_tensor(item)
            if tensor is not None:
                return tensor
    return None


def check_pooling(pooling: Any) -> None:
    """Raise ``ValueError`` unless ``pooling`` is one of its values."""
    if not callable(pooling) and not (isinstance(pooling, str) and pooling in ("auto", "mean", "cls", "last")):
        raise ValueError(
            f"pooling must be 'auto', 'mean', 'cls', 'last' or a callable(Tensor) -> Tensor, got {pooling!r}."
        )


def pool(
    features: Tensor, pooling: Pooling = "auto", num_features: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Reduce a batch of features to one vector a sample.

    Args:
        features: (N, D), tokens (N, T, D), or a map (N, C, H, W) of any number of dimensions.
        pooling: "auto" and "mean" average over tokens or positions, "cls" takes the first token, "last" the last one
            that is not masked; a callable does what it does.
        num_features: D, if known: tells maps with channels last (N, H, W, C) from maps with channels first.
        mask: (N, T), non-zero where a token counts.

    Returns:
        (N, D), averages of half precision in float32.

    Raises:
        ValueError: the shape does not allow it, or a callable returns something else than (N, D).
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
    if mask is not None and mask.shape != features.shape[:2]:
        mask = None  # of something else
    if pooling in ("cls", "last"):
        if features.ndim != 3:
            raise ValueError(
                f"pooling={pooling!r} needs tokens of shape (N, T, D), got {tuple(features.shape)}; "
                "use 'mean' or a callable."
            )
        if pooling == "cls":
            return features[:, 0]
        if mask is None:
            return features[:, -1]
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask != 0, positions, 0).amax(1).to(features.device)
        return features[torch.arange(len(features), device=features.device), last]
    dtype = torch.promote_types(features.dtype, torch.float32)
    if features.ndim == 3:
        if mask is None:
            return features.mean(1, dtype=dtype)
        weight = (mask != 0).to(features.device, dtype)[:, :, None]
        # Padding may hold anything, NaN too: selected, not multiplied away.
        total = torch.where(weight > 0, features.to(dtype), 0.0).sum(1)
        return total / weight.sum(1).clamp(min=1)
    channels_last = (
        num_features is not None and features.shape[1] != num_features and features.shape[-1] == num_features
    )
    places = range(1, features.ndim - 1) if channels_last else range(2, features.ndim)
    return features.mean(tuple(places), dtype=dtype)
