"""The modules of a network that features are taken from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_logme.heads import find_head, get_module
from lightning_logme.moments import Task
from lightning_logme.taps import Tap

HEAD = ""  # the source that is the head's input; every other source is the name of a layer


@dataclass(frozen=True)
class Sources:
    """Taps on a network, and what it tells of itself.

    Attributes:
        taps: by source, the head's input first.
        num_features: D of the head's input, where the head tells.
        num_outputs: K, where it is known before the first batch.
        announcement: which module was taken for the head, if any.
    """

    taps: dict[str, Tap] = field(default_factory=dict)
    num_features: int | None = None
    num_outputs: int | None = None
    announcement: str | None = None


def attach(root: nn.Module, head: str | None, layers: Sequence[str], task: Task, num_classes: int | None) -> Sources:
    """Find the modules and listen to them.

    Args:
        root: the network.
        head: dotted name of the module whose input is the feature; None finds it, and does without it if there are
            layers.
        layers: dotted names of modules whose output is scored as well.
        task: of the head.
        num_classes: K of "multiclass" and "multilabel"; None reads it off the head.

    Raises:
        ValueError: a module is not found, the head cannot be told, or the number of classes is not known.
    """
    if head is None:
        try:
            head = find_head(root, num_classes)
        except ValueError:
            if not layers:
                raise
    module = None if head is None else get_module(root, head, "head")
    outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
    num_outputs = 2 if task == "binary" else num_classes
    if task == "multiclass" and num_outputs is None:
        if outputs is None or outputs < 2:
            says = (
                "there is none"
                if head is None
                else f"'{head}' puts out {outputs}"
                if outputs
                else f"'{head}' does not tell"
            )
            raise ValueError(
                f"num_classes: the number of classes is read off the head, but {says}; give "
                "LogMECallback(num_classes=…), "
                "or task='binary' or task='regression' if that is what the network does."
            )
        num_outputs = outputs
    num_features = getattr(module, "in_features", getattr(module, "in_channels", None))

    modules = {name: get_module(root, name, "layers") for name in layers}  # all are found before any gets a hook
    taps = {} if module is None else {HEAD: Tap(module, "input", f"the head '{head}'")}
    taps.update((name, Tap(layer, "output", f"layer '{name}'")) for name, layer in modules.items())
    announcement = None
    if module is not None:
        sizes = f"D = {num_features or '?'}, K = {num_outputs or outputs or '?'}"
        announcement = f"the feature is the input of '{head}' ({type(module).__name__}), {sizes}"
    return Sources(taps, num_features, num_outputs, announcement)
