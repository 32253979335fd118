"""Find the classifier head of a network by its module tree."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torchmetrics import Metric

_HEAD_WORDS = frozenset(
    (
        "head",
        "heads",
        "classifier",
        "classification",
        "fc",
        "score",
        "logits",
        "regressor",
        "predictor",
        "output",
        "out",
    )
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GLOBAL_POOLINGS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_LINKS = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)  # from logits to predictions


def find_head(root: nn.Module, num_outputs: int | None = None) -> str:
    """Find the layer that makes a module's output, by the module tree alone.

    The head is a linear layer or a 1 × 1 convolution, also inside an adapter such as LoRA. Nothing is run, so the
    weights may lie on the meta device. A model of timm names its head itself. In any other module, names ("head",
    "classifier", "fc", …), the order of a `torch.nn.Sequential` and the sizes of the layers decide. Repeated blocks
    and layers whose output another layer takes hold no head.

    Args:
        root: The network, for example a LightningModule.
        num_outputs: The number of outputs of the head, if known. It decides between several candidates.

    Returns:
        The dotted name of the head, for `root.get_submodule`.

    Raises:
        ValueError: No layer can be the head, as in an encoder, or several layers can. The message lists them.

    >>> from torch import nn
    >>> find_head(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    '2'
    """
    candidates = _Search(root).candidates()
    if num_outputs is not None and len(candidates) > 1:
        candidates = [candidate for candidate in candidates if candidate.outputs == num_outputs] or candidates
    candidates = _without_frozen_copies(candidates)
    if len(candidates) > 1:
        named = [candidate for candidate in candidates if not _HEAD_WORDS.isdisjoint(candidate.name.split("."))]
        candidates = named or candidates
    if len(candidates) == 1:
        return candidates[0].name
    model = type(root).__name__
    if not candidates:
        raise ValueError(
            f"head: {model} has no linear layer that surely makes its output; give head=None to score its output, "
            "layers=['…'] to score the output of modules, features=callable(module, batch), or the name of its head."
        )
    listed = ", ".join(f"'{name}' ({inputs} → {outputs})" for name, _, inputs, outputs in candidates)
    names = [candidate.name for candidate in candidates]
    raise ValueError(
        f"head: {model} has several layers that could be its classifier head: {listed}; give head={names} to score "
        "their inputs together, or one of the names."
    )


def get_module(root: nn.Module, name: str, argument: str) -> nn.Module:
    """The submodule of that dotted name.

    Raises:
        ValueError: there is none; the message names ``argument`` and the closest names there are.
    """
    try:
        if name:
            return root.get_submodule(name)
    except AttributeError:
        pass
    names = [known for known, _ in root.named_modules() if known]
    if not names:
        raise ValueError(f"{argument}: {type(root).__name__} has no module named {name!r}, nor any other inside it.")
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[-5:]
    raise ValueError(
        f"{argument}: {type(root).__name__} has no module named {name!r}; did you mean one of "
        f"{', '.join(map(repr, close))}?"
    )


class _Candidate(NamedTuple):
    """A layer that may be the head."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int

    @property
    def trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.module.parameters())


class _Path(NamedTuple):
    """How a module is reached from the root.

    Attributes:
        name: its dotted name.
        named: whether that name has the word of a head.
        last: whether no other weights can come after its output.
    """

    name: str = ""
    named: bool = False
    last: bool = True

    def child(self, name: str, last: bool) -> _Path:
        dotted = f"{self.name}.{name}" if self.name else name
        return _Path(dotted, self.named or _likeness(name) == 2, self.last and last)


class _Search:
    """The candidates of a network."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._inputs = _inputs(root.modules())

    def candidates(self) -> list[_Candidate]:
        return list(self._ends(self._root, _Path(), ()))

    def _ends(self, module: nn.Module, path: _Path, siblings: Sequence[nn.Module]) -> Iterator[_Candidate]:
        """Yield the layers that may make a module's output."""
        if isinstance(module, (Metric, nn.MultiheadAttention)):
            return  # A metric's network is not part of the model. An attention never calls its `out_proj`.
        linear = _linear(module)
        children = dict(module.named_children())
        if linear is not None:
            if path.named or path.last or (isinstance(linear, nn.Linear) and not self._is_taken(linear, siblings)):
                yield _Candidate(path.name, module, *_sizes(linear))
        elif hasattr(type(module), "adapter_layer_names"):
            yield from self._ends_of_adapter(module, path, children)
        elif (names := _classifiers(module)) is not None:
            for name in names:
                child, name = _resolve(module, name)
                if name:
                    yield from self._ends(child, path.child(name, True)._replace(named=True), ())
        elif isinstance(module, nn.Sequential):
            yield from self._ends_of_sequence(path, children)
        else:
            yield from self._ends_of_branches(module, path, children)

    def _ends_of_adapter(self, module: Any, path: _Path, children: Mapping[str, nn.Module]) -> Iterator[_Candidate]:
        """PEFT keeps a frozen original beside trained copies, and calls one of them."""
        copies = children.get("modules_to_save")
        if not isinstance(copies, nn.ModuleDict):
            return
        active = [] if module.disable_adapters else module.active_adapter
        called = [name for name in ([active] if isinstance(active, str) else active) if name in copies]
        name = f"modules_to_save.{called[0]}" if called else "original_module"
        yield from self._ends(module.get_submodule(name), path.child(name, True), ())

    def _ends_of_sequence(self, path: _Path, children: Mapping[str, nn.Module]) -> Iterator[_Candidate]:
        siblings = _layers(children.values())
        kinds = Counter(map(_kind, children.values()))
        pooled = False
        for name, child in reversed(list(children.items())):
            if _has_linear(child):
                # Blocks of one kind are hidden layers, unless plain sequences are all there is.
                is_block = kinds[_kind(child)] > 1 and not (path.last and isinstance(child, nn.Sequential))
                if _linear(child) is not None or not is_block:
                    yield from self._ends(child, path.child(name, True), siblings)
                return
            # SqueezeNet's classifier pools relu(convolution).
            if not _keeps_logits(child) and not (pooled and path.named and isinstance(child, nn.ReLU)):
                return
            pooled = pooled or isinstance(child, _GLOBAL_POOLINGS)

    def _ends_of_branches(
        self, module: nn.Module, path: _Path, children: Mapping[str, nn.Module]
    ) -> Iterator[_Candidate]:
        siblings = _layers(children.values())
        is_last = sum(_has_weights(child) for child in children.values()) == 1
        best: tuple[int, bool] = (0, False)
        found: list[_Candidate] = []
        for name, child in children.items():
            is_layer = _linear(child) is not None
            if isinstance(module, nn.ModuleList) and not is_layer and not path.named:
                continue  # blocks of an encoder
            candidates = list(self._ends(child, path.child(name, is_last), siblings))
            likeness = _likeness(name), is_layer
            if not candidates and not _had_head(child, likeness[0]):
                continue
            if likeness > best:
                best, found = likeness, []
            if likeness == best:
                found += candidates
        yield from _ends_of_chain(found) if best[1] else found

    def _is_taken(self, linear: nn.Module, siblings: Sequence[nn.Module]) -> bool:
        """Whether a layer elsewhere takes as many inputs as this one gives outputs. Siblings are compared later."""
        outputs = _sizes(linear)[1]
        return self._inputs[outputs] > _inputs({linear, *siblings})[outputs]


def _linear(module: nn.Module) -> nn.Module | None:
    """Return the linear layer or 1 × 1 convolution that a module is, also inside an adapter."""
    while hasattr(type(module), "adapter_layer_names"):
        base = dict(module.named_children()).get("base_layer")
        if base is None:
            return None
        module = base
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, _CONVOLUTIONS) and set(module.kernel_size) == {1} and module.groups == 1:
        return module
    return None


def _layers(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [linear for linear in map(_linear, modules) if linear is not None]


def _sizes(linear: Any) -> tuple[int, int]:
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return linear.in_channels, linear.out_channels


def _inputs(modules: Iterable[nn.Module]) -> Counter[int]:
    """Count the layers that take vectors, by the size of the vectors."""
    counts: Counter[int] = Counter()
    for module in modules:
        if isinstance(module, nn.Linear):
            counts[module.in_features] += 1
        elif isinstance(module, nn.LayerNorm):
            counts[module.normalized_shape[-1]] += 1
        elif isinstance(module, nn.MultiheadAttention):
            counts[module.embed_dim] += 1
        elif isinstance(module, nn.RNNBase):
            counts[module.input_size] += 1
    return counts


def _has_linear(module: nn.Module) -> bool:
    # Metrics may hold whole networks (FID, BERTScore) that are not part of the model.
    return not isinstance(module, Metric) and any(_linear(child) is not None for child in module.modules())


def _has_weights(module: nn.Module) -> bool:
    return not isinstance(module, Metric) and any(True for _ in module.parameters())


def _had_head(module: nn.Module, likeness: int) -> bool:
    """Whether a module without candidates stands where the head was, so that no other branch holds the head."""
    if _has_linear(module):
        return likeness == 2
    return likeness > 0 and any(isinstance(child, nn.Identity) for child in module.modules())


def _keeps_logits(module: nn.Module) -> bool:
    """Whether logits are still logits or predictions after this module, which has no linear layer."""
    if _has_weights(module):
        return False
    hidden = ("activation", "batchnorm", "instancenorm", "normalization")
    return all(
        isinstance(child, _LINKS) or type(child).__module__.rpartition(".")[2] not in hidden
        for child in module.modules()
    )


def _kind(module: nn.Module) -> Any:
    """Return what blocks of one kind have in common."""
    return tuple(map(type, module.modules())) if isinstance(module, nn.Sequential) else type(module)


def _classifiers(module: Any) -> list[str] | None:
    """Return the names of the heads of a timm model, or None for any other module."""
    config = getattr(module, "default_cfg", None) if hasattr(type(module), "get_classifier") else None
    if not isinstance(config, Mapping):
        return None
    names = config.get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _resolve(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Follow a dotted name as far as it leads: a user may have replaced `head`, so that `head.fc` is gone."""
    found = []
    for word in name.split("."):
        child = dict(module.named_children()).get(word)
        if child is None:
            break
        module = child
        found.append(word)
    return module, ".".join(found)


def _likeness(name: str) -> int:
    """Return how much a name says "head"."""
    name = name.lower().strip("_")
    words = set(re.split(r"[_\d]+", name))
    return 2 if name in _HEAD_WORDS else 1 if words & _HEAD_WORDS else 0


def _without_frozen_copies(candidates: list[_Candidate]) -> list[_Candidate]:
    trained = {candidate.outputs for candidate in candidates if candidate.trained}
    return [candidate for candidate in candidates if candidate.trained or candidate.outputs not in trained]


def _ends_of_chain(layers: list[_Candidate]) -> list[_Candidate]:
    """Return the layers whose output no later one takes."""
    layers = _without_frozen_copies(layers)
    return [layer for i, layer in enumerate(layers) if not any(_feeds(layer, later) for later in layers[i + 1 :])]


def _feeds(layer: _Candidate, later: _Candidate) -> bool:
    if layer.outputs != later.inputs:
        return False
    if later.inputs != later.outputs:
        return True
    # A square layer fits behind any other one and beside any square one. Only numbers in the names give an order.
    numbered = re.sub(r"\d+", "", layer.name) == re.sub(r"\d+", "", later.name)
    return numbered and layer.inputs != layer.outputs
