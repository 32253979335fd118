"""Where features come from: one vector for each label of a batch, by source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_logme.channels import FIRST, LAST, CallTrace, find_channel_axis, modules_compiled
from lightning_logme.moments import Task, is_exclusive, is_token_level
from lightning_logme.pooling import MaskError, Pooling, describe_pooling, needs_channel_axis, pool, pool_nested
from lightning_logme.taps import NotCalledError, Tap, first_tensor

Features = Callable[[Any, Any], Any]

HEAD = ""  # the source that is the head's input; every other source is the name of a layer
LAYER_MEAN = "layer_mean"
HEAD_KEY = "head"  # what a mapping of poolings calls the head's input


class Source:
    """One origin of features: the input of one or several heads, the output of a layer, or a callable.

    Args:
        name: :data:`HEAD`, or the name of a layer.
        taps: hooks; the features of several are concatenated.
        features: callable(module, batch), in place of taps.
        pooling: how its tokens and maps become vectors.
        guess: the name of the module, where it was found and not named by the user.
        outputs: number of outputs of the head, where it is known.
        label: how messages name it.
        pooling_key: what a mapping of poolings calls it.
    """

    def __init__(
        self,
        name: str,
        taps: Sequence[Tap] = (),
        *,
        features: Features | None = None,
        pooling: Pooling = "auto",
        guess: str | None = None,
        outputs: int | None = None,
        label: str = "features=callable",
        pooling_key: str | None = None,
    ) -> None:
        self.name = name
        self.taps = tuple(taps)
        self.features = features
        self.pooling: Pooling = pooling
        self.guess = guess
        self.outputs = outputs
        self.settled = False  # whether a batch has shown where its channels are
        self.pooled: list[str] = []  # how the tokens and maps of the last batch were pooled
        self._label = label
        self._pooling_key = pooling_key or name or HEAD_KEY
        self._axes: dict[tuple[int, int], int | None] = {}

    def __str__(self) -> str:
        return " and ".join(tap.name for tap in self.taps) if self.taps else self._label

    def rows(
        self, module: nn.Module, batch: Any, target: Tensor, mask: Tensor | None, task: Task, trace: CallTrace
    ) -> Tensor:
        """Return one vector for each label of the last batch: (N, D), or (N, T, D) for labels (N, T).

        Raises:
            NotCalledError: a module was not called.
            ValueError: a module was called several times, or the shapes do not fit.
        """
        self.pooled = []
        if self.features is not None:
            position = trace.position
            tensor = first_tensor(self.features(module, batch))
            if tensor is None:
                raise ValueError("features=callable(module, batch) returned no tensor; it must return (N, D) features.")
            # On the device of the run, as a layer's would be: a collective takes no other.
            tensor = tensor.to(getattr(module, "device", tensor.device))
            self.settled = True
            return self._pool(0, tensor, target, mask, task, partial(find_channel_axis, *trace.since(position)))
        parts = []
        for index, tap in enumerate(self.taps):
            tensor = self._take(tap)
            parts.append(self._pool(index, tensor, target, mask, task, partial(_axis_at, tap, trace)))
        self.settled = True
        return parts[0] if len(parts) == 1 else _concatenated(parts)

    def _take(self, tap: Tap) -> Tensor:
        try:
            return tap.take()
        except NotCalledError as error:
            if self.guess is None:
                raise
            raise NotCalledError(
                f"'{self.guess}' was taken for the classifier head, but it was not called for this batch; name "
                "the head with head=, or write head=None for what the module's forward returns, or give "
                "features=callable(module, batch). Probe(forward=callable(module, batch)) says how a probe runs the "
                "module. If the model was compiled and run before, its hooks are not seen: call "
                'torch.compiler.set_stance("force_eager") or compile it anew.'
            ) from error

    def _pool(
        self,
        index: int,
        tensor: Tensor,
        target: Tensor,
        mask: Tensor | None,
        task: Task,
        find_axis: Callable[[Sequence[int]], int | None],
    ) -> Tensor:
        if tensor.is_nested:
            tensor = pool_nested(tensor, self.pooling)
        shape = tuple(tensor.shape)
        if tensor.ndim == 1 and len(target) == 1:  # a squeezed batch of one
            tensor = tensor[None]
        if is_exclusive(task) and target.ndim == 2 and tensor.ndim == 2 and len(tensor) == target.numel():
            tensor = tensor.unflatten(0, target.shape)  # a head that takes all tokens in one row
        if not is_token_level(tensor, target, task):
            axis = self._axis(index, tensor, find_axis) if needs_channel_axis(tensor, self.pooling) else None
            try:
                pooled = pool(tensor, self.pooling, mask, axis)
            except MaskError as error:
                raise ValueError(
                    f"{self}: {error}; say how to pool them, as in "
                    f"pooling={{{self._pooling_key!r}: lambda tokens: tokens.mean(1)}}."
                ) from error
            except ValueError as error:
                raise ValueError(f"{self}: {error}") from error
            if tensor.ndim > 2:
                self.pooled.append(f"{shape} {describe_pooling(shape, self.pooling, axis, mask)}")
            tensor = pooled
        if len(tensor) != len(target):
            raise ValueError(
                f"{self} gave {len(tensor)} features for {len(target)} labels, "
                f"shapes {shape} and {tuple(target.shape)}; name a module that gives one "
                "feature a label, or let pooling=callable make it one."
            )
        return tensor

    def _axis(self, index: int, tensor: Tensor, find: Callable[[Sequence[int]], int | None]) -> int | None:
        key = index, tensor.ndim
        if key not in self._axes:
            axis = find(tensor.shape)
            if axis is None:
                self.settled = False
                raise ValueError(
                    f"pooling: {self} has shape {tuple(tensor.shape)}, and no layer shows whether its channels are on "
                    f"the second axis ({tensor.shape[1]}) or on the last ({tensor.shape[-1]}); write "
                    f"pooling={{{self._pooling_key!r}: 'channels_first'}} or 'channels_last'."
                )
            self._axes[key] = axis
        return self._axes[key]


class Sources:
    """The sources of one network.

    Args:
        root: the network.
        sources: in the order in which they are logged.
        layer_mean: whether the mean of the layers is a source as well.
        num_outputs: K, where it is known before the first batch.
        announcement: which module was taken for the head, if any.
        obstacle: why the network's own validation set cannot be scored, if so.
    """

    def __init__(
        self,
        root: nn.Module | None = None,
        sources: Iterable[Source] = (),
        *,
        layer_mean: bool = False,
        num_outputs: int | None = None,
        announcement: str | None = None,
        obstacle: str | None = None,
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self.layer_mean = layer_mean
        self.num_outputs = num_outputs
        self.announcement = announcement
        self.obstacle = obstacle
        self._trace = CallTrace(nn.Module() if root is None else root, {tap: tap.module for tap in self.taps})

    @property
    def taps(self) -> list[Tap]:
        return [tap for source in self._sources.values() for tap in source.taps]

    @property
    def head(self) -> Source | None:
        """The source that is the head's input, if there is one."""
        return self._sources.get(HEAD)

    @property
    def names(self) -> list[str]:
        """Names of all sources: the head, the layers in their order, their mean."""
        return [*self._sources, *([LAYER_MEAN] if self.layer_mean else [])]

    @property
    def layers(self) -> list[str]:
        return [name for name in self._sources if name != HEAD]

    @property
    def is_head_guessed(self) -> bool:
        """Whether there is a head that was found and not named by the user."""
        return self.head is not None and self.head.guess is not None

    def drop_guess(self) -> None:
        """Leave out a head that was guessed, where there are layers to be scored in its place."""
        if self.is_head_guessed and self.layers:
            for tap in self._sources.pop(HEAD).taps:
                tap.remove()

    @property
    def is_compiled(self) -> bool:
        """Whether a module that is listened to is inside one that ``torch.compile`` compiles."""
        compiled = modules_compiled(self._trace.root)
        return any(tap.module in compiled for tap in self.taps)

    def start(self) -> None:
        """Listen to a batch."""
        for tap in self.taps:
            tap.start()
        if not all(source.settled for source in self._sources.values()):
            self._trace.open()

    @property
    def called(self) -> bool:
        """Whether a module was called since the start, or a callable gives features."""
        return any(tap.called for tap in self.taps) or any(source.features for source in self._sources.values())

    def stop(self) -> None:
        """Listen no more, and forget."""
        self._trace.close()
        for tap in self.taps:
            tap.stop()

    def remove(self) -> None:
        """Leave the network as it was."""
        self._trace.close()
        for tap in self.taps:
            tap.remove()

    def rows(
        self, module: nn.Module, batch: Any, target: Tensor, mask: Tensor | None, task: Task
    ) -> tuple[dict[str, Tensor], dict[str | None, Exception]]:
        """Return by source one vector for each label of the last batch, and the errors of the sources that failed.

        Args:
            module: the network, which has just run.
            batch: the batch that it was given.
            target: its labels.
            mask: (N, T), non-zero where a token counts.
            task: of the labels.
        """
        rows: dict[str, Tensor] = {}
        errors: dict[str | None, Exception] = {}
        # Hooks first: features=callable may call the same modules again.
        for name, source in sorted(self._sources.items(), key=lambda item: not item[1].taps):
            try:
                rows[name] = source.rows(module, batch, target, mask, task, self._trace)
            except Exception as error:
                errors[name] = error
        if self.layer_mean:
            missing = [name for name in self.layers if name in errors]
            try:
                if missing:
                    raise errors[missing[0]]
                rows[LAYER_MEAN] = _mean({layer: rows[layer] for layer in self.layers})
            except Exception as error:
                errors[LAYER_MEAN] = error
        return rows, errors

    def poolings(self) -> list[str]:
        """Describe by source how the tokens and maps of the last batch were pooled."""
        return [f"{source}: {text}" for source in self._sources.values() for text in source.pooled]


def _axis_at(tap: Tap, trace: CallTrace, shape: Sequence[int]) -> int | None:
    """Return the axis that holds the channels of what a tap has seen."""
    if tap.side == "output":
        return find_channel_axis(*trace.around(tap), shape)
    if hasattr(tap.module, "in_channels"):
        return FIRST
    if hasattr(tap.module, "in_features"):
        return LAST
    return find_channel_axis([], trace.before(tap), shape)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """The features of several heads as one."""
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in parts], -1)


def _mean(rows: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the features of several layers."""
    shapes = {tuple(tensor.shape) for tensor in rows.values()}
    if len(shapes) > 1:
        listed = ", ".join(f"'{layer}' {tuple(tensor.shape)}" for layer, tensor in rows.items())
        raise ValueError(f"layer_mean needs layers of one length, got {listed}; name layers that have it.")
    tensors = list(rows.values())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.to(dtype) for tensor in tensors]).mean(0)
