"""The modules of a network that features are taken from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_logme.heads import find_head, get_module
from lightning_logme.moments import Task, is_exclusive, is_token_level
from lightning_logme.taps import Pooling, Tap, first_tensor, pool

Features = Callable[[Any, Any], Any]

HEAD = ""  # the source that is the head's input; every other source is the name of a layer
LAYER_MEAN = "layer_mean"

# What wrappers put into the names of modules.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


@dataclass(frozen=True)
class Sources:
    """Taps on a network, and what it tells of itself.

    Attributes:
        taps: by source, the head's input first.
        features: callable(module, batch) that gives the feature in place of a head's input.
        layer_mean: whether the mean of the layers is a source as well.
        num_features: D of the head's input, where the head tells.
        num_outputs: K, where it is known before the first batch.
        announcement: which module was taken for the head, if any.
        obstacle: why the network's own validation set cannot be scored, if so.
    """

    taps: dict[str, Tap] = field(default_factory=dict)
    features: Features | None = None
    layer_mean: bool = False
    num_features: int | None = None
    num_outputs: int | None = None
    announcement: str | None = None
    obstacle: str | None = None

    @property
    def names(self) -> list[str]:
        """Of all sources: the head, the layers in their order, their mean."""
        first = [] if self.features is None else [HEAD]
        return [*first, *self.taps, *([LAYER_MEAN] if self.layer_mean else [])]

    @property
    def layers(self) -> list[str]:
        return [source for source in self.taps if source != HEAD]

    def start(self) -> None:
        """Listen to a batch."""
        for tap in self.taps.values():
            tap.start()

    def stop(self) -> None:
        """Listen no more, and forget."""
        for tap in self.taps.values():
            tap.stop()

    def remove(self) -> None:
        """Leave the network as it was."""
        for tap in self.taps.values():
            tap.remove()

    def seen(self, module: nn.Module, batch: Any) -> dict[str, Tensor]:
        """By source, what has passed since the start; ``features`` is called now.

        Raises:
            ValueError: a module was not called, or several times, or there was no tensor.
        """
        tensors = {source: tap.take() for source, tap in self.taps.items()}
        if self.features is None:
            return tensors
        feature = first_tensor(self.features(module, batch))
        if feature is None:
            raise ValueError("features=callable(module, batch) returned no tensor; it must return (N, D) features.")
        # On the device of the run, as a layer's would be: a collective takes no other.
        return {HEAD: feature.to(getattr(module, "device", feature.device)), **tensors}

    def pooled(
        self, seen: Mapping[str, Tensor], target: Tensor, mask: Tensor | None, pooling: Pooling, task: Task
    ) -> dict[str, Tensor]:
        """By source, one vector a label: (N, D), or (N, T, D) for labels (N, T).

        Raises:
            ValueError: the shapes do not allow it.
        """
        rows = {}
        for source, tensor in seen.items():
            if tensor.ndim == 1 and len(target) == 1:  # a squeezed batch of one
                tensor = tensor[None]
            if is_exclusive(task) and target.ndim == 2 and tensor.ndim == 2 and len(tensor) == target.numel():
                tensor = tensor.unflatten(0, target.shape)  # a head that takes all tokens in one row
            if not is_token_level(tensor, target, task):
                tensor = pool(tensor, pooling, None if source else self.num_features, mask)
            if len(tensor) != len(target):
                raise ValueError(
                    f"{self.describe(source)} gave {len(tensor)} features for {len(target)} labels, "
                    f"shapes {tuple(seen[source].shape)} and {tuple(target.shape)}; name a module that gives one "
                    "feature a label, or let pooling=callable make it one."
                )
            rows[source] = tensor
        if self.layer_mean:
            rows[LAYER_MEAN] = _mean({layer: rows[layer] for layer in self.layers})
        return rows

    def describe(self, source: str) -> str:
        """What messages call a source."""
        return self.taps[source].name if source in self.taps else "features=callable"


def attach(
    root: nn.Module,
    head: str | None,
    layers: Sequence[str],
    task: Task,
    num_classes: int | None,
    *,
    features: Features | None = None,
    layer_mean: bool = False,
    optional: bool = False,
) -> Sources:
    """Find the modules and listen to them.

    Args:
        root: the network.
        head: dotted name of the module whose input is the feature; None finds it, and does without it if there are
            layers.
        layers: dotted names of modules whose output is scored as well, or glob patterns of them.
        task: of the head.
        num_classes: K of "multiclass" and "multilabel"; None reads it off the head.
        features: in place of a head.
        layer_mean: whether the mean of the layers is wanted.
        optional: whether K may stay unknown, as there are probes.

    Raises:
        ValueError: a module is not found, the head cannot be told, or the number of classes is not known.
    """
    if head is None and features is None:
        try:
            head = find_head(root, num_classes)
        except ValueError:
            if not layers:
                raise
    module = None if head is None else get_module(root, head, "head")
    outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
    num_outputs = 2 if task == "binary" else num_classes
    obstacle = None
    if task == "multiclass" and num_outputs is None:
        if outputs is None or outputs < 2:
            says = (
                "there is none"
                if head is None
                else f"'{head}' puts out {outputs}"
                if outputs
                else f"'{head}' does not tell"
            )
            obstacle = (
                f"num_classes: the number of classes is read off the head, but {says}; give "
                "LogMECallback(num_classes=…), "
                "or task='binary' or task='regression' if that is what the network does."
            )
            if not optional:
                raise ValueError(obstacle)
        num_outputs = outputs if obstacle is None else None
    num_features = getattr(module, "in_features", getattr(module, "in_channels", None))

    names = _matching(root, layers)
    if layer_mean and len(names) < 2:
        raise ValueError(f"layer_mean is the mean of several layers, and layers={tuple(layers)!r} names {len(names)}.")
    modules = {name: get_module(root, name, "layers") for name in names}  # all are found before any gets a hook
    taps = {} if module is None else {HEAD: Tap(module, "input", f"the head '{head}'")}
    taps.update((name, Tap(layer, "output", f"layer '{name}'")) for name, layer in modules.items())
    announcement = None
    if module is not None:
        sizes = f"D = {num_features or '?'}, K = {num_outputs or outputs or '?'}"
        announcement = f"the feature is the input of '{head}' ({type(module).__name__}), {sizes}"
    return Sources(taps, features, layer_mean, num_features, num_outputs, announcement, obstacle)


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
    """Of the features of several layers."""
    shapes = {tuple(tensor.shape) for tensor in rows.values()}
    if len(shapes) > 1:
        listed = ", ".join(f"'{layer}' {tuple(tensor.shape)}" for layer, tensor in rows.items())
        raise ValueError(f"layer_mean needs layers of one length, got {listed}; name layers that have it.")
    tensors = list(rows.values())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.to(dtype) for tensor in tensors]).mean(0)
