"""Find the modules that features are taken from, by name or by pattern, and listen to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from lightning_logme.heads import find_head, get_module
from lightning_logme.moments import Task
from lightning_logme.pooling import Pooling, check_pooling
from lightning_logme.sources import HEAD, HEAD_KEY, Features, Source, Sources
from lightning_logme.taps import Tap

Head = str | Sequence[str] | None

AUTO = "auto"
# Parts that wrappers insert into the names of modules.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


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
    guess, why_not = None, "there is none"
    if features is None and head == AUTO:
        try:
            guess = find_head(root, num_classes) if validated or not layers else None
        except ValueError as error:
            if not layers:
                raise
            why_not = f"it was not found ({str(error).rstrip('.')})"
        heads = [] if guess is None else [guess]
    else:
        heads = [] if features is not None or head is None else [head] if isinstance(head, str) else list(head)
    modules = {name: get_module(root, name, "head") for name in heads}
    outputs = [getattr(module, "out_features", getattr(module, "out_channels", None)) for module in modules.values()]
    num_outputs, is_missing = _number_of_outputs(task, num_classes, outputs[0] if outputs else None)
    obstacle = None
    if is_missing:
        says = why_not
        if heads:
            says = f"'{heads[0]}' puts out {outputs[0]}" if outputs[0] else f"'{heads[0]}' does not tell"
        obstacle = (
            f"num_classes: the number of classes is read off the head, but {says}; give "
            "LogMECallback(num_classes=…), or task='binary' or task='regression' if that is what the network does."
        )
        if not optional:
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
        remedy = "call self(…) in validation_step, or name layers=[…], or give features=callable(module, batch)"
        taps = [Tap(root, "output", f"forward of {type(root).__name__}", remedy)]
        sources.append(Source(HEAD, taps, pooling=poolings[HEAD]))
    for name, layer in found.items():
        sources.append(Source(name, [Tap(layer, "output", f"layer '{name}'")], pooling=poolings[name]))
    announcement = None
    if modules:
        widths = [getattr(module, "in_features", getattr(module, "in_channels", None)) for module in modules.values()]
        width = sum(known) if len(known := [width for width in widths if width]) == len(widths) else "?"
        listed = " and ".join(f"'{name}' ({type(module).__name__})" for name, module in modules.items())
        announcement = f"the feature is the input of {listed}, D = {width}, K = {num_outputs or outputs[0] or '?'}"
        if guess is not None and num_classes is not None and outputs[0] not in (None, num_classes):
            announcement += f"; its {outputs[0]} outputs are not num_classes: if it is not the classifier, give head="
    elif head is None and features is None:
        announcement = f"the feature is the output of {type(root).__name__}"
    return Sources(
        root, sources, layer_mean=layer_mean, num_outputs=num_outputs, announcement=announcement, obstacle=obstacle
    )


def _number_of_outputs(task: Task, num_classes: int | None, outputs: int | None) -> tuple[int | None, bool]:
    """Return K where it is known before the first batch, and whether it is missing."""
    if task == "binary":
        return 2, False
    if task != "multiclass" or num_classes is not None:
        return num_classes, False
    if outputs is not None and outputs >= 2:
        return outputs, False
    return None, True


def _poolings(pooling: Pooling | Mapping[str, Pooling], layers: Sequence[str]) -> dict[str, Pooling]:
    """The pooling of the head and of every layer."""
    if not isinstance(pooling, Mapping):
        return dict.fromkeys([HEAD, *layers], pooling)
    found: dict[str, Pooling] = dict.fromkeys([HEAD, *layers], "auto")
    for key, value in pooling.items():
        names = [name for name in layers if name == key or _matches(name.split("."), key.split("."))]
        if key == HEAD_KEY and not names:
            names = [HEAD]
        if not names:
            listed = ", ".join(map(repr, [HEAD_KEY, *layers]))
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
    forward = getattr(type(module), "forward", None)
    return forward is not nn.Module.forward and not isinstance(module, (Metric, torch.jit.ScriptModule))


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))
