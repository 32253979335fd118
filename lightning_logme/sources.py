"""The modules of a network that features are taken from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_logme.heads import find_head, get_module
from lightning_logme.moments import Task, is_exclusive, is_token_level
from lightning_logme.pooling import (
    FIRST,
    LAST,
    CallTrace,
    Pooling,
    check_pooling,
    describe_pooling,
    find_channel_axis,
    modules_compiled,
    needs_channel_axis,
    pool,
)
from lightning_logme.taps import NotCalledError, Tap, first_tensor

Features = Callable[[Any, Any], Any]
Head = str | Sequence[str] | None

AUTO = "auto"
HEAD = ""  # the source that is the head's input; every other source is the name of a layer
LAYER_MEAN = "layer_mean"
_HEAD_KEY = "head"  # what a mapping of poolings calls the head's input

# Parts that wrappers insert into the names of modules.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


class Source:
    """One origin of features: the input of one or several heads, the output of a layer, or a callable.

    Args:
        name: :data:`HEAD`, or the name of a layer.
        taps: hooks; the features of several are concatenated.
        features: callable(module, batch), in place of taps.
        pooling: how its tokens and maps become vectors.
        guess: the name of the module, where it was found and not named by the user.
        outputs: number of outputs of the head, where it is known.
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
    ) -> None:
        self.name = name
        self.taps = tuple(taps)
        self.features = features
        self.pooling: Pooling = pooling
        self.guess = guess
        self.outputs = outputs
        self.settled = False  # whether a batch has shown where its channels are
        self.pooled: list[str] = []  # how the tokens and maps of the last batch were pooled
        self._axes: dict[tuple[int, int], int | None] = {}

    def __str__(self) -> str:
        return " and ".join(tap.name for tap in self.taps) if self.taps else "features=callable"

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
            inside, before = trace.since(position)
            self.settled = True
            find_axis = partial(find_channel_axis, tensor.shape, inside, before)
            return self._pool(0, tensor, target, mask, task, find_axis)
        parts = []
        for index, tap in enumerate(self.taps):
            tensor = self._take(tap)
            find_axis = partial(_axis_at, tap, tensor.shape, trace)
            parts.append(self._pool(index, tensor, target, mask, task, find_axis))
        self.settled = True
        return parts[0] if len(parts) == 1 else _concatenated(parts)

    def _take(self, tap: Tap) -> Tensor:
        try:
            return tap.take()
        except NotCalledError as error:
            if self.guess is None:
                raise
            raise NotCalledError(
                f"'{self.guess}' was taken for the classifier head, but it was not called for this batch; write "
                "head=None to score the module's output, or name layers=[…], or give features=callable(module, batch) "
                "or Probe(forward=callable(module, batch)). If the model was compiled and run before, its hooks are "
                'not seen: call torch.compiler.set_stance("force_eager") or compile it anew.'
            ) from error

    def _pool(
        self,
        index: int,
        tensor: Tensor,
        target: Tensor,
        mask: Tensor | None,
        task: Task,
        find_axis: Callable[[], int | None],
    ) -> Tensor:
        shape = tuple(tensor.shape)
        if tensor.ndim == 1 and len(target) == 1:  # a squeezed batch of one
            tensor = tensor[None]
        if is_exclusive(task) and target.ndim == 2 and tensor.ndim == 2 and len(tensor) == target.numel():
            tensor = tensor.unflatten(0, target.shape)  # a head that takes all tokens in one row
        if not is_token_level(tensor, target, task):
            axis = self._axis(index, tensor, find_axis) if needs_channel_axis(tensor, self.pooling) else None
            if tensor.ndim > 2:
                self.pooled.append(f"{shape} {describe_pooling(tensor.shape, self.pooling, axis, mask)}")
            try:
                tensor = pool(tensor, self.pooling, mask, axis)
            except ValueError as error:
                raise ValueError(f"{self}: {error}") from error
        if len(tensor) != len(target):
            raise ValueError(
                f"{self} gave {len(tensor)} features for {len(target)} labels, "
                f"shapes {shape} and {tuple(target.shape)}; name a module that gives one "
                "feature a label, or let pooling=callable make it one."
            )
        return tensor

    def _axis(self, index: int, tensor: Tensor, find: Callable[[], int | None]) -> int | None:
        key = index, tensor.ndim
        if key not in self._axes:
            axis = find()
            if axis is None:
                self.settled = False
                key_of_layer = self.name or _HEAD_KEY
                raise ValueError(
                    f"pooling: {self} has shape {tuple(tensor.shape)}, and no layer shows whether its channels are on "
                    f"the second axis ({tensor.shape[1]}) or on the last ({tensor.shape[-1]}); write "
                    f"pooling={{{key_of_layer!r}: 'channels_first'}} or 'channels_last'."
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
        for name, source in self._sources.items():
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


def attach(
    root: nn.Module,
    head: Head,
    layers: Sequence[str],
    task: Task,
    num_classes: int | None,
    *,
    features: Features | None = None,
    layer_mean: bool = False,
    pooling: Pooling | Mapping[str, Pooling] = "auto",
    optional: bool = False,
    validated: bool = True,
) -> Sources:
    """Find the modules and listen to them.

    Args:
        root: the network.
        head: dotted names of the modules whose input is the feature; "auto" finds the classifier head, and does without
            it if there are layers; None takes the output of the network.
        layers: dotted names of modules whose output is scored as well, or glob patterns of them.
        task: of the head.
        num_classes: K of "multiclass" and "multilabel"; None reads it off the head.
        features: in place of a head.
        layer_mean: whether the mean of the layers is wanted.
        pooling: of all sources, or by layer.
        optional: whether K may stay unknown, as there are probes.
        validated: whether the network's own validation set is scored. If not, no head is guessed beside layers.

    Raises:
        ValueError: a module or the head is not found, or the number of classes is not known.
    """
    guess = None
    if features is None and head == AUTO:
        try:
            guess = find_head(root, num_classes) if validated or not layers else None
        except ValueError:
            if not layers:
                raise
        heads = [] if guess is None else [guess]
    else:
        heads = [] if features is not None or head is None else [head] if isinstance(head, str) else list(head)
    modules = {name: get_module(root, name, "head") for name in heads}
    outputs = [getattr(module, "out_features", getattr(module, "out_channels", None)) for module in modules.values()]
    num_outputs, obstacle = _number_of_outputs(task, num_classes, heads, outputs[0] if outputs else None)
    if obstacle is not None and not optional:
        raise ValueError(obstacle)

    names = _matching(root, layers)
    if layer_mean and len(names) < 2:
        raise ValueError(f"layer_mean is the mean of several layers, and layers={tuple(layers)!r} names {len(names)}.")
    found = {name: get_module(root, name, "layers") for name in names}  # all are found before any gets a hook
    poolings = _poolings(pooling, names)

    sources = []
    if features is not None:
        sources.append(Source(HEAD, features=features, pooling=poolings[HEAD]))
    elif modules:
        taps = [Tap(module, "input", f"the head '{name}'") for name, module in modules.items()]
        sources.append(Source(HEAD, taps, pooling=poolings[HEAD], guess=guess, outputs=outputs[0]))
    elif head is None:
        taps = [Tap(root, "output", f"the output of {type(root).__name__}")]
        sources.append(Source(HEAD, taps, pooling=poolings[HEAD]))
    for name, layer in found.items():
        sources.append(Source(name, [Tap(layer, "output", f"layer '{name}'")], pooling=poolings[name]))
    announcement = None
    if modules:
        widths = [getattr(module, "in_features", getattr(module, "in_channels", None)) for module in modules.values()]
        width = sum(known) if len(known := [width for width in widths if width]) == len(widths) else "?"
        listed = " and ".join(f"'{name}' ({type(module).__name__})" for name, module in modules.items())
        announcement = f"the feature is the input of {listed}, D = {width}, K = {num_outputs or outputs[0] or '?'}"
    elif head is None and features is None:
        announcement = f"the feature is the output of {type(root).__name__}"
    return Sources(
        root, sources, layer_mean=layer_mean, num_outputs=num_outputs, announcement=announcement, obstacle=obstacle
    )


def _number_of_outputs(
    task: Task, num_classes: int | None, heads: Sequence[str], outputs: int | None
) -> tuple[int | None, str | None]:
    """K where it is known before the first batch, and what is missing to know it."""
    if task == "binary":
        return 2, None
    if task != "multiclass" or num_classes is not None:
        return num_classes, None
    if outputs is not None and outputs >= 2:
        return outputs, None
    says = (
        "there is none"
        if not heads
        else f"'{heads[0]}' puts out {outputs}"
        if outputs
        else f"'{heads[0]}' does not tell"
    )
    return None, (
        f"num_classes: the number of classes is read off the head, but {says}; give LogMECallback(num_classes=…), "
        "or task='binary' or task='regression' if that is what the network does."
    )


def _poolings(pooling: Pooling | Mapping[str, Pooling], layers: Sequence[str]) -> dict[str, Pooling]:
    """The pooling of the head and of every layer."""
    if not isinstance(pooling, Mapping):
        return dict.fromkeys([HEAD, *layers], pooling)
    found: dict[str, Pooling] = dict.fromkeys([HEAD, *layers], "auto")
    for key, value in pooling.items():
        names = [name for name in layers if name == key or _matches(name.split("."), key.split("."))]
        if key == _HEAD_KEY and not names:
            names = [HEAD]
        if not names:
            listed = ", ".join(map(repr, [_HEAD_KEY, *layers]))
            raise ValueError(f"pooling names {key!r}, which is not scored; use a layer or pattern of {listed}.")
        found.update(dict.fromkeys(names, value))
    return found


def check_poolings(pooling: Any) -> None:
    """Raise ``ValueError`` unless ``pooling`` is a pooling, or a mapping of them by layer."""
    for value in pooling.values() if isinstance(pooling, Mapping) else [pooling]:
        check_pooling(value)


def checked_head(head: Any) -> Head:
    """Return ``head`` with several names as a tuple.

    Raises:
        ValueError: it is no name, no names and not None.
    """
    if head is None or (isinstance(head, str) and head):
        return head
    if isinstance(head, (list, tuple)) and head and all(isinstance(name, str) and name for name in head):
        return tuple(head)
    raise ValueError(
        "head must be 'auto', the dotted name of a module such as 'model.fc', a list of names, or None for the "
        f"module's output, got {head!r:.60}."
    )


def _axis_at(tap: Tap, shape: Sequence[int], trace: CallTrace) -> int | None:
    """Which axis of what a tap has seen holds the channels."""
    if tap.side == "output":
        return find_channel_axis(shape, *trace.around(tap))
    if hasattr(tap.module, "in_channels"):
        return FIRST
    if hasattr(tap.module, "in_features"):
        return LAST
    return find_channel_axis(shape, [], trace.before(tap))


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    """The features of several heads as one."""
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in parts], -1)


def _matching(root: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names that patterns match, each once, in the order of the patterns and of the network."""
    known = [plain_name(name) for name, module in root.named_modules() if name and _is_called(module)]
    found: dict[str, None] = {}
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            found[pattern] = None
            continue
        parts = pattern.split(".")
        matches = [name for name in known if _matches(name.split("."), parts)]
        if not matches:
            ends = [name.split(".") for name in known]
            meant = {".".join([*end[: -len(parts)], pattern]) for end in ends if _matches(end[-len(parts) :], parts)}
            listed = ", ".join(map(repr, known[:8])) + (", …" if len(known) > 8 else "")
            raise ValueError(
                f"layers: no module of {type(root).__name__} matches {pattern!r}, in which * stands for one part of a "
                f"dotted name; {f'write {sorted(meant)[0]!r}' if meant else f'its modules are {listed}'}."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def plain_name(name: str) -> str:
    """Without the parts that wrappers put in: compilation, checkpointing, FSDP."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_called(module: nn.Module) -> bool:
    """Containers without a forward, and metrics, are no layers."""
    return type(module).forward is not nn.Module.forward and not isinstance(module, Metric)


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))


def _mean(rows: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the features of several layers."""
    shapes = {tuple(tensor.shape) for tensor in rows.values()}
    if len(shapes) > 1:
        listed = ", ".join(f"'{layer}' {tuple(tensor.shape)}" for layer, tensor in rows.items())
        raise ValueError(f"layer_mean needs layers of one length, got {listed}; name layers that have it.")
    tensors = list(rows.values())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.to(dtype) for tensor in tensors]).mean(0)
