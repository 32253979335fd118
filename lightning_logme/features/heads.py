"""Find the classifier head of a network in its module tree."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torchmetrics import Metric

_SURE_WORDS = frozenset(("head", "heads", "classifier", "classification", "score", "logits"))
_HEAD_WORDS = _SURE_WORDS | {"fc", "regressor", "predictor"}
_LAYER_WORDS = frozenset(("output", "out"))  # only for layers: transformers gives whole networks these names
_INNER_WORDS = frozenset(("embed", "embedding", "embeddings", "proj", "projection", "projector", "merger", "pooler"))
_INNER_WORDS |= {"key", "pos", "position", "query", "reference", "value"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GLOBAL_POOLINGS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_PREDICTIONS = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)  # turn logits into predictions


def find_head(root: nn.Module, num_outputs: int | None = None) -> str:
    """Find the layer that makes the output of a module, from the module tree alone.

    The head is a linear layer or a 1 × 1 convolution, also inside an adapter such as LoRA. Nothing is run, so the
    weights may be on the meta device. A timm model names its head. In other modules, names ("head", "classifier",
    "fc", …), the order of a `torch.nn.Sequential` and the sizes of the layers decide. The head is not inside repeated
    blocks, and no other layer takes its output.

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
    candidates = _Search(root, num_outputs).candidates()
    if num_outputs is not None and len(candidates) > 1:
        candidates = [candidate for candidate in candidates if candidate.outputs == num_outputs] or candidates
    candidates = _without_frozen_copies(candidates)
    if len(candidates) > 1:
        candidates = [c for c in candidates if c.path.likeness == 2 and not c.is_taken] or candidates
    if len(candidates) == 1:
        return candidates[0].path.name
    model = type(root).__name__
    if not candidates:
        raise ValueError(
            f"head: {model} has no torch.nn.Linear or 1 × 1 convolution that can make its output; give head=None to "
            "score its output, layers=['…'] to score the outputs of its modules, features=callable(module, batch), or "
            "the name of its head."
        )
    listed = ", ".join(f"'{c.path.name}' ({c.inputs} → {c.outputs})" for c in candidates)
    names = [candidate.path.name for candidate in candidates]
    raise ValueError(
        f"head: {model} has several layers that could be its classifier head: {listed}; give head={names} to score "
        "their inputs together, or one of the names."
    )


def get_module(root: nn.Module, name: str, argument: str) -> nn.Module:
    """Return the submodule with a dotted name.

    Raises:
        ValueError: It does not exist. The message names ``argument`` and similar names.
    """
    try:
        if name:
            return root.get_submodule(name)
    except AttributeError:
        pass
    names = [known for known, _ in root.named_modules() if known]
    if not names:
        raise ValueError(f"{argument}: {type(root).__name__} has no module named {name!r}: it contains no modules.")
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[-5:]
    raise ValueError(
        f"{argument}: {type(root).__name__} has no module named {name!r}; did you mean one of "
        f"{', '.join(map(repr, close))}?"
    )


class _Path(NamedTuple):
    """The way from the root to a module.

    Attributes:
        name: The dotted name of the module.
        likeness: The `_likeness` of this name.
        last: Whether no module with weights can come after this one.
    """

    name: str = ""
    likeness: int = 0
    last: bool = True

    def child(self, name: str, likeness: int, last: bool = True) -> _Path:
        dotted = f"{self.name}.{name}" if self.name else name
        return _Path(dotted, likeness, self.last and last)


class _Candidate(NamedTuple):
    """A layer that may be the head.

    Attributes:
        path: The way from the root to the layer.
        module: The layer, or the adapter around it.
        inputs: The number of inputs.
        outputs: The number of outputs.
        is_taken: Whether another layer has as many inputs as this one has outputs, and so may take them.
        is_fed: Whether another layer has as many outputs as this one has inputs, and so may feed it.
    """

    path: _Path
    module: nn.Module
    inputs: int
    outputs: int
    is_taken: bool = False
    is_fed: bool = False

    @property
    def trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.module.parameters())


class _Branch(NamedTuple):
    """A child of a module, with the candidates inside it."""

    name: str
    module: nn.Module
    likeness: int
    is_layer: bool
    candidates: list[_Candidate]

    @property
    def priority(self) -> tuple[int, bool]:
        return self.likeness, self.is_layer

    @property
    def is_idle(self) -> bool:
        """Whether the branch is a network without a head."""
        return not self.candidates and len(_layers(self.module.modules())) > 1

    @property
    def had_head(self) -> bool:
        """Whether the name says that the head is or was in this branch, and so in no other."""
        if _has_linear(self.module):
            return self.likeness == 2
        return self.likeness > 0 and any(isinstance(child, nn.Identity) for child in self.module.modules())


class _Search:
    """The search for layers that may be the head."""

    def __init__(self, root: nn.Module, num_outputs: int | None) -> None:
        self._root = root
        self._num_outputs = num_outputs
        self._inputs = _count_inputs(root.modules())
        self._outputs = set(_output_lengths(root.modules()))

    def candidates(self) -> list[_Candidate]:
        return list(self._ends(self._root, _Path(), ()))

    def _ends(self, module: nn.Module, path: _Path, siblings: Sequence[nn.Module]) -> Iterator[_Candidate]:
        """Yield the layers that may make the output of a module."""
        if isinstance(module, (Metric, nn.MultiheadAttention)):
            return  # A network in a metric is not part of the model, and attention never calls its `out_proj`.
        linear = _linear(module)
        if linear is not None:
            inputs, outputs = _sizes(linear)
            # Siblings do not count here, because `_ends_of_chain` compares them in their order.
            is_taken = self._inputs[outputs] > _count_inputs({linear, *siblings})[outputs]
            candidate = _Candidate(path, module, inputs, outputs, is_taken, inputs in self._outputs)
            if _may_be_last(candidate, isinstance(linear, nn.Linear)):
                yield candidate
        elif hasattr(type(module), "adapter_layer_names"):
            yield from self._ends_of_adapter(module, path)
        elif (names := _classifiers(module)) is not None:
            for name in names:
                child, name = _resolve(module, name)
                if name:
                    yield from self._ends(child, path.child(name, 2), ())
        elif isinstance(module, nn.Sequential):
            yield from self._ends_of_sequence(module, path)
        else:
            yield from self._ends_of_branches(module, path)

    def _ends_of_adapter(self, module: Any, path: _Path) -> Iterator[_Candidate]:
        """Yield the candidates in the module that a PEFT wrapper calls: a trained copy, or the original."""
        copies = getattr(module, "modules_to_save", None)
        if not isinstance(copies, nn.ModuleDict):
            return
        active = [] if module.disable_adapters else module.active_adapter
        called = [name for name in ([active] if isinstance(active, str) else active) if name in copies]
        name = f"modules_to_save.{called[0]}" if called else "original_module"
        yield from self._ends(module.get_submodule(name), path.child(name, path.likeness), ())

    def _ends_of_sequence(self, module: nn.Sequential, path: _Path) -> Iterator[_Candidate]:
        """Yield the candidates in the last child that has a linear layer."""
        children = list(module.named_children())
        siblings = _layers(child for _, child in children)
        pooled = False
        for name, child in reversed(children):
            if _has_linear(child):
                # Blocks of one kind are hidden layers. Plain sequences may hold the head if nothing comes after them.
                is_block = _are_blocks(module, type(child)) and not (path.last and isinstance(child, nn.Sequential))
                if _linear(child) is not None or not is_block:
                    below = path.child(name, max(path.likeness, _likeness(name, child)))
                    yield from self._ends(child, below, siblings)
                return
            # The classifier of SqueezeNet is a convolution, a ReLU and a pooling.
            if not _keeps_logits(child) and not (pooled and path.likeness == 2 and isinstance(child, nn.ReLU)):
                return
            pooled = pooled or isinstance(child, _GLOBAL_POOLINGS)

    def _fits(self, candidate: _Candidate) -> bool:
        return candidate.outputs == self._num_outputs and not candidate.is_taken

    def _ends_of_branches(self, module: nn.Module, path: _Path) -> Iterator[_Candidate]:
        """Yield the candidates in the most likely children of a module."""
        branches = [branch for branch in self._branches(module, path) if branch.candidates or branch.had_head]
        if not branches:
            return
        # A layer with the right number of outputs beats a name, unless another layer may take its outputs.
        fitting = [branch for branch in branches if any(map(self._fits, branch.candidates))]
        branches = fitting or branches
        best = max(branch.priority for branch in branches)
        found = [candidate for branch in branches if branch.priority == best for candidate in branch.candidates]
        if best[0] == 2:  # "head" and "head_dist" with equal sizes are two heads.
            sizes = {candidate[2:4] for candidate in found}
            found += [
                twin for branch in branches if branch.likeness == 1 for twin in branch.candidates if twin[2:4] in sizes
            ]
            found = [candidate._replace(path=candidate.path._replace(likeness=2)) for candidate in found]
        yield from found

    def _branches(self, module: nn.Module, path: _Path) -> list[_Branch]:
        """Return the children of a module that is not a sequence, without candidates that are hidden layers."""
        children = dict(module.named_children())
        has_tensors = any(True for _ in (*module.parameters(False), *module.buffers(False)))
        if path.likeness == 2 and has_tensors and all(_likeness(*child) < 2 for child in children.items()):
            return []  # A head with tensors of its own computes more than its layers do.
        siblings = _layers(children.values())
        ends = _ends_of_chain(children)
        beside_blocks = any(isinstance(child, nn.ModuleList) and _are_blocks(child) for child in children.values())
        is_last = sum(map(_has_weights, children.values())) == 1
        is_only = sum(map(_has_linear, children.values())) == 1
        branches = []
        for name, child in children.items():
            branch = _Branch(name, child, _likeness(name, child), _linear(child) is not None, [])
            branches.append(branch)
            if branch.is_layer:
                is_inner = name not in ends
            elif isinstance(module, nn.ModuleList):
                is_inner = path.likeness < 2  # It is a block of an encoder.
            else:
                is_inner = beside_blocks and branch.likeness < 2 and not isinstance(child, nn.Sequential)
            if is_inner or (branch.likeness == 0 and not is_last and _words(name) & _INNER_WORDS):
                continue
            is_alone = is_last if isinstance(child, _CONVOLUTIONS) else is_only
            inherited = path.likeness if is_alone or branch.likeness or isinstance(module, nn.ModuleList) else 0
            below = path.child(name, max(branch.likeness, inherited), is_last)
            branch.candidates.extend(self._ends(child, below, siblings))
        return _without_inner_layers(branches)


def _may_be_last(candidate: _Candidate, is_linear: bool) -> bool:
    """Return whether a layer may make the output of the network, by its path and the sizes of all layers."""
    path = candidate.path
    if path.last:
        return True
    if not is_linear:
        return path.likeness == 2  # 1 × 1 convolutions occur everywhere: only a name helps.
    if not candidate.is_taken:
        return True
    word = path.name.rstrip("0123456789.").rpartition(".")[2]
    return path.likeness == 2 and (candidate.inputs != candidate.outputs or word in _SURE_WORDS)


def _without_inner_layers(branches: list[_Branch]) -> list[_Branch]:
    """Drop the candidates whose output a later network may take, unless their name says "head"."""
    idle = [index for index, branch in enumerate(branches) if branch.is_idle]
    kept = []
    is_first = True
    for index, branch in enumerate(branches):
        is_inner = bool(idle) and index < idle[-1]
        if branch.is_layer:
            is_inner = is_inner and not is_first
        elif idle and branch.likeness < 2:
            # The head takes the output of an encoder. ESM's `contact_head` does not: it takes attention maps.
            is_inner = (
                is_inner
                or any(map(_are_blocks, branch.module.modules()))
                or not all(candidate.is_fed for candidate in branch.candidates)
            )
        is_first = is_first and not _has_weights(branch.module)
        kept.append(branch._replace(candidates=[]) if is_inner and branch.likeness < 2 else branch)
    return kept


def _linear(module: nn.Module) -> nn.Module | None:
    """Return a module that is a linear layer or 1 × 1 convolution, or the one inside an adapter, else None."""
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


def _count_inputs(modules: Iterable[nn.Module]) -> Counter[int]:
    """Count the layers that take vectors, by the length of the vectors."""
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


def _output_lengths(modules: Iterable[nn.Module]) -> Iterator[int]:
    """Yield the lengths of the vectors that layers give."""
    for module in modules:
        if isinstance(module, nn.Linear):
            yield module.out_features
        elif isinstance(module, nn.Embedding):
            yield module.embedding_dim
        elif isinstance(module, nn.RNNBase):
            yield from (module.hidden_size, 2 * module.hidden_size)
        elif isinstance(module, _CONVOLUTIONS):
            yield module.out_channels


def _has_linear(module: nn.Module) -> bool:
    return not isinstance(module, Metric) and any(_linear(child) is not None for child in module.modules())


def _has_weights(module: nn.Module) -> bool:
    return not isinstance(module, Metric) and any(True for _ in module.parameters())


def _are_blocks(module: nn.Module, kind: type | None = None) -> bool:
    """Return whether a module is a list of networks, or a sequence of networks of one kind, as in an encoder."""
    networks = [child for child in module.children() if _linear(child) is None and any(True for _ in child.children())]
    if isinstance(module, nn.ModuleList):
        return bool(networks)
    kinds = Counter(map(_kind, networks)) if isinstance(module, nn.Sequential) else Counter()
    return any(number > 1 and kind in (None, shared[0]) for shared, number in kinds.items())


def _kind(module: nn.Module) -> tuple[type, ...]:
    """Return the kind of a block: its class, or the classes of all its modules if it is a plain sequence."""
    return tuple(map(type, module.modules())) if isinstance(module, nn.Sequential) else (type(module),)


def _keeps_logits(module: nn.Module) -> bool:
    """Return whether a module without a linear layer keeps logits, or turns them into predictions."""
    if _has_weights(module):
        return False
    hidden = ("activation", "batchnorm", "instancenorm", "normalization")
    return all(
        isinstance(child, _PREDICTIONS) or type(child).__module__.rpartition(".")[2] not in hidden
        for child in module.modules()
    )


def _classifiers(module: Any) -> list[str] | None:
    """Return the names of the heads of a timm model, or None for any other module."""
    config = getattr(module, "default_cfg", None) if hasattr(type(module), "get_classifier") else None
    if not isinstance(config, Mapping):
        return None
    names = config.get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _resolve(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Follow a dotted name as far as it exists: if the user has replaced `head`, `head.fc` is gone."""
    found = []
    for word in name.split("."):
        child = dict(module.named_children()).get(word)
        if child is None:
            break
        module = child
        found.append(word)
    return module, ".".join(found)


def _words(name: str) -> set[str]:
    return set(re.split(r"[_\d]+", name.lower()))


def _likeness(name: str, module: nn.Module) -> int:
    """Return how clearly a name says "head": 2 if it is such a word, 1 if it contains one, else 0."""
    is_layer = _linear(module) is not None or isinstance(module, nn.Identity)
    words = _HEAD_WORDS | _LAYER_WORDS if is_layer else _HEAD_WORDS
    return 2 if name.lower().strip("_") in words else 1 if words & _words(name) else 0


def _without_frozen_copies(candidates: list[_Candidate]) -> list[_Candidate]:
    """Drop frozen layers beside a trained layer of equal output size: a teacher, a copy, or an unused layer."""
    trained = {candidate.outputs for candidate in candidates if candidate.trained}
    return [candidate for candidate in candidates if candidate.trained or candidate.outputs not in trained]


def _ends_of_chain(children: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of the layers whose output no later sibling takes."""
    layers = [
        _Candidate(_Path(name), child, *_sizes(linear))
        for name, child in children.items()
        if (linear := _linear(child)) is not None
    ]
    layers = _without_frozen_copies(layers)
    return {layer.path.name for i, layer in enumerate(layers) if not any(_feeds(layer, x) for x in layers[i + 1 :])}


def _feeds(layer: _Candidate, later: _Candidate) -> bool:
    """Return whether a later layer may take the output of a layer."""
    if layer.outputs != later.inputs:
        return False
    if later.inputs != later.outputs:
        return True
    # A square layer could follow any layer with as many outputs. Only numbers in the names show that it does.
    numbered = re.sub(r"\d+", "", layer.path.name) == re.sub(r"\d+", "", later.path.name)
    return numbered and layer.inputs != layer.outputs
