"""Select the features of a network, and attach hooks to the modules that give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from lightning_logme.features.extractor import HEAD, HEAD_KEY, Extractor, Features, Source
from lightning_logme.features.heads import find_head, get_module
from lightning_logme.features.hooks import CallTrace, Capture, Window
from lightning_logme.features.outputs import decide_num_outputs, num_outputs_of
from lightning_logme.features.pooling import Pooling, check_poolings
from lightning_logme.utilities.checks import Task, check_flags, names
from lightning_logme.utilities.compat import plain_name

Head = str | Sequence[str] | None

AUTO = "auto"


@dataclass(frozen=True, eq=False)
class Selection:
    """The features that the user selects.

    Attributes:
        head: the dotted names of the modules whose inputs are the features, :data:`AUTO`, or None for the output.
        layers: dotted names, or glob patterns, of modules whose outputs are scored as well.
        layer_mean: whether the mean of the layers is scored as well.
        features: a callable(module, batch) that replaces ``head``.
        pooling: the pooling of all sources, or of each layer.

    Raises:
        ValueError: an argument is wrong.
    """

    head: Head = AUTO
    layers: Sequence[str] = ()
    layer_mean: bool = False
    features: Features | None = None
    pooling: Pooling | Mapping[str, Pooling] = "auto"

    def __post_init__(self) -> None:
        """Check the arguments, and convert them to one form."""
        check_poolings(self.pooling)
        check_flags(layer_mean=self.layer_mean)
        object.__setattr__(self, "head", _checked_head(self.head))
        object.__setattr__(self, "layers", names("layers", self.layers))
        if self.layer_mean and not self.layers:
            raise ValueError("layer_mean is the mean of layers: name them, as in layers=['encoder.layer.*'].")
        if self.features is not None and (self.head != AUTO or not callable(self.features)):
            raise ValueError(
                f"features must be a callable(module, batch), and replaces head; got features={self.features!r} and "
                f"head={self.head!r}."
            )

    @property
    def named_heads(self) -> list[str] | None:
        """The heads that the user named: empty for the output of the network, None if the head must be found."""
        if self.head == AUTO:
            return None
        return [] if self.head is None else [self.head] if isinstance(self.head, str) else list(self.head)


def attach(
    module: nn.Module,
    selection: Selection,
    heads: Sequence[str] | None,
    *,
    guess: str | None = None,
    is_output_given: bool = False,
    num_outputs: int | None = None,
    key: str = HEAD_KEY,
) -> Extractor:
    """Attach hooks to the modules that give the features, and return the extractor.

    Args:
        module: the network.
        selection: the features to extract.
        heads: the dotted names of the heads; empty for the output of the network; None if the head is not scored, or
            ``selection.features`` replaces it.
        guess: the name of the head, if it was found and not named by the user.
        is_output_given: whether the caller passes the output of the network to the capture, so that it needs no hook.
        num_outputs: K, if known.
        key: the key of the head in a mapping of poolings.

    Raises:
        ValueError: a module is not found, or cannot have hooks.
    """
    window = Window(CallTrace(module))
    layers = _matching(module, selection.layers)
    if selection.layer_mean and len(layers) < 2:
        raise ValueError(
            f"layer_mean is the mean of several layers, but layers={tuple(selection.layers)!r} names {len(layers)}."
        )
    head_modules = {name: get_module(module, name, "head") for name in heads or ()}
    found = {name: get_module(module, name, "layers") for name in layers}
    for kind, modules in (("the head", head_modules), ("layer", found)):
        for name, submodule in modules.items():
            if isinstance(submodule, torch.jit.ScriptModule):
                raise ValueError(
                    f"{kind} '{name}' is a TorchScript module, which cannot have hooks; name another module."
                )
    poolings = _poolings(selection.pooling, layers)  # This may raise, so it comes before the first hook.
    sources = []
    if selection.features is not None:
        sources.append(Source(HEAD, features=selection.features, pooling=poolings[HEAD]))
    elif heads is not None:
        captures = [
            Capture(head, "input", f"the head '{name}'", window, poolings[HEAD], key)
            for name, head in head_modules.items()
        ]
        if not head_modules and is_output_given:
            captures = [Capture(None, "output", "the output", window, poolings[HEAD], key)]
        elif not head_modules:
            name = f"forward of {type(module).__name__}"
            remedy = "call self(…) in validation_step, or name layers=[…], or give features=callable(module, batch)"
            captures = [Capture(module, "output", name, window, poolings[HEAD], key, remedy)]
        outputs = num_outputs_of(next(iter(head_modules.values()), None))
        sources.append(Source(HEAD, captures, guess=guess, outputs=outputs))
    for name, layer in found.items():
        sources.append(Source(name, [Capture(layer, "output", f"layer '{name}'", window, poolings[name], name)]))
    return Extractor(module, sources, window, layer_mean=selection.layer_mean, num_outputs=num_outputs)


def attach_by_tree(
    module: nn.Module, selection: Selection, task: Task, num_classes: int | None, is_scored: bool
) -> tuple[Extractor, str | None]:
    """Attach hooks before the network has run. A head that the user has not named is found in the module tree.

    Args:
        module: the network.
        selection: the features to extract.
        task: the task of the head.
        num_classes: K of "multiclass" and "multilabel". None takes the number of outputs of the head.
        is_scored: whether the validation set is scored. If not, K may stay unknown, and a head is looked for only if
            there are no layers.

    Returns:
        The extractor, and a text that names the head, or None without a head.

    Raises:
        ValueError: a module or the head is not found, or the number of classes is not known.
    """
    guess, why_not, heads = None, "there is no head", selection.named_heads
    if selection.features is not None:
        heads = None
    elif heads is None:
        try:
            guess = find_head(module, num_classes) if is_scored or not selection.layers else None
        except ValueError as error:
            if not selection.layers:
                raise
            why_not = f"it was not found ({str(error).rstrip('.')})"
        heads = None if guess is None else [guess]
    modules = {name: get_module(module, name, "head") for name in heads or ()}
    outputs = num_outputs_of(next(iter(modules.values()), None))
    num_outputs = decide_num_outputs(task, num_classes, head_outputs=outputs)
    if task == "multiclass" and num_outputs is None and is_scored:
        if modules:
            why_not = f"the number of outputs of '{next(iter(modules))}' is {outputs or 'not known'}"
        raise ValueError(
            f"num_classes: the number of classes is taken from the head, but {why_not}; give "
            "LogMECallback(num_classes=…), or task='binary' or task='regression' if that is the task, or "
            "validation=False to score only probes."
        )
    extractor = attach(module, selection, heads, guess=guess, num_outputs=num_outputs)
    if heads is None:
        return extractor, None
    if not modules:
        return extractor, f"the feature is the output of {type(module).__name__}"
    widths = [getattr(head, "in_features", getattr(head, "in_channels", None)) for head in modules.values()]
    width = sum(known) if len(known := [width for width in widths if width]) == len(widths) else "?"
    listed = " and ".join(f"'{name}' ({type(head).__name__})" for name, head in modules.items())
    text = f"the feature is the input of {listed}, D = {width}, K = {num_outputs or outputs or '?'}"
    if guess is not None and num_classes is not None and outputs not in (None, num_classes):
        text += f"; it has {outputs} outputs, but num_classes={num_classes}: if it is not the classifier, give head="
    return extractor, text


def _poolings(pooling: Pooling | Mapping[str, Pooling], layers: Sequence[str]) -> dict[str, Pooling]:
    """Return the pooling of the head and of each layer, by source."""
    if not isinstance(pooling, Mapping):
        return dict.fromkeys([HEAD, *layers], pooling)
    found: dict[str, Pooling] = dict.fromkeys([HEAD, *layers], "auto")
    for key, value in pooling.items():
        matches = [name for name in layers if name == key or _matches(name.split("."), key.split("."))]
        if key == HEAD_KEY and not matches:
            matches = [HEAD]
        if not matches:
            listed = ", ".join(map(repr, [HEAD_KEY, *layers]))
            raise ValueError(f"pooling names {key!r}, which is not scored; name one of {listed}, or a pattern of them.")
        found.update(dict.fromkeys(matches, value))
    return found


def _checked_head(head: Any) -> Head:
    """Return ``head``, with several names as a tuple."""
    if head is None or (isinstance(head, str) and head):
        return head
    if isinstance(head, (list, tuple)) and head and all(isinstance(name, str) and name for name in head):
        return tuple(head)
    raise ValueError(
        "head must be 'auto', the dotted name of a module such as 'model.fc', a list of names, or None for the "
        f"module's output, got {head!r:.60}."
    )


def _matching(root: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names that match patterns, each once, in the order of the patterns and then of the network."""
    known = [plain_name(name) for name, module in root.named_modules() if name and _is_called(module)]
    found: dict[str, None] = {}
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            found[pattern] = None
            continue
        words = pattern.split(".")
        matches = [name for name in known if _matches(name.split("."), words)]
        if not matches:
            ends = [name.split(".") for name in known]
            meant = {".".join([*end[: -len(words)], pattern]) for end in ends if _matches(end[-len(words) :], words)}
            listed = ", ".join(map(repr, known[:8])) + (", …" if len(known) > 8 else "")
            raise ValueError(
                f"layers: no module of {type(root).__name__} matches {pattern!r}, in which * matches one part of a "
                f"dotted name; {f'write {sorted(meant)[0]!r}' if meant else f'its modules are {listed}'}."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _is_called(module: nn.Module) -> bool:
    """Return whether a module has a forward and can have hooks, and is not a metric."""
    forward = getattr(type(module), "forward", None)
    return forward is not nn.Module.forward and not isinstance(module, (Metric, torch.jit.ScriptModule))


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatchcase, name, pattern))
