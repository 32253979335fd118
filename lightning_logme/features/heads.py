"""Find the classifier head of a network by its module tree."""

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
_LAYER_WORDS = frozenset(("output", "out"))  # Only layers count: transformers have whole networks of these names.
_INNER_WORDS = frozenset(("embed", "embedding", "embeddings", "proj", "projection", "projector", "merger", "pooler"))
_INNER_WORDS |= {"key", "pos", "position", "query", "reference", "value"}
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
            "score its output, layers=['…'] to score the output of modules, features=callable(module, batch), or the "
            "name of its head."
        )
    listed = ", ".join(f"'{c.path.name}' ({c.inputs} → {c.outputs})" for c in candidates)
    names = [candidate.path.name for candidate in candidates]
    raise ValueError(
        f"head: {model} has several layers that could be its classifier head: {listed}; give head={names} to score "
        "their inputs together, or one of the names."
    )


def get_module(root: nn.Module, name: str, argument: str) -> nn.Module:
    """Return the submodule of that dotted name.

    Raises:
        ValueError: It does not exist. The message names ``argument`` and the closest names that do.
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


class _Path(NamedTuple):
    """How a module is reached from the root.

    Attributes:
        name: Its dotted name.
        likeness: How much that name says "head"; 2 for the very word.
        last: Whether no other weights can come after its output.
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
        path: How it is reached.
        module: The layer, or the adapter around it.
        inputs: The number of its inputs.
        outputs: The number of its outputs.
        is_taken: Whether a layer elsewhere takes as many inputs as this one gives outputs.
        is_fed: Whether a layer elsewhere gives as many outputs as this one takes inputs.
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
    """A child of a module, and the candidates in it."""

    name: str
    module: nn.Module
    likeness: int
    is_layer: bool
    candidates: list[_Candidate]

    @property
    def rank(self) -> tuple[int, bool]:
        return self.likeness, self.is_layer

    @property
    def is_idle(self) -> bool:
        """Whether it is a network without a head."""
        return not self.candidates and len(_layers(self.module.modules())) > 1

    @property
    def had_head(self) -> bool:
        """Whether it stands where the head was, so that no other branch holds the head."""
        if _has_linear(self.module):
            return self.likeness == 2
        return self.likeness > 0 and any(isinstance(child, nn.Identity) for child in self.module.modules())


class _Search:
    """The search for the candidates of a network."""

    def __init__(self, root: nn.Module, num_outputs: int | None) -> None:
        self._root = root
        self._num_outputs = num_outputs
        self._inputs = _inputs(root.modules())
        self._outputs = set(_outputs(root.modules()))

    def candidates(self) -> list[_Candidate]:
        return list(self._ends(self._root, _Path(), ()))

    def _ends(self, module: nn.Module, path: _Path, siblings: Sequence[nn.Module]) -> Iterator[_Candidate]:
        """Yield the layers that may make a module's output."""
        if isinstance(module, (Metric, nn.MultiheadAttention)):
            return  # A metric's network is not part of the model. An attention never calls its `out_proj`.
        linear = _linear(module)
        if linear is not None:
            inputs, outputs = _sizes(linear)
            # Siblings are compared as a chain.
            is_taken = self._inputs[outputs] > _inputs({linear, *siblings})[outputs]
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
        """PEFT keeps a frozen original beside trained copies, and calls one of them."""
        copies = getattr(module, "modules_to_save", None)
        if not isinstance(copies, nn.ModuleDict):
            return
        active = [] if module.disable_adapters else module.active_adapter
        called = [name for name in ([active] if isinstance(active, str) else active) if name in copies]
        name = f"modules_to_save.{called[0]}" if called else "original_module"
        yield from self._ends(module.get_submodule(name), path.child(name, path.likeness), ())

    def _ends_of_sequence(self, module: nn.Sequential, path: _Path) -> Iterator[_Candidate]:
        children = list(module.named_children())
        siblings = _layers(child for _, child in children)
        pooled = False
        for name, child in reversed(children):
            if _has_linear(child):
                # Blocks of one kind are hidden layers, unless plain sequences are all there is.
                is_block = _are_blocks(module, type(child)) and not (path.last and isinstance(child, nn.Sequential))
                if _linear(child) is not None or not is_block:
                    below = path.child(name, max(path.likeness, _likeness(name, child)))
                    yield from self._ends(child, below, siblings)
                return
            # SqueezeNet's classifier pools relu(convolution).
            if not _keeps_logits(child) and not (pooled and path.likeness == 2 and isinstance(child, nn.ReLU)):
                return
            pooled = pooled or isinstance(child, _GLOBAL_POOLINGS)

    def _fits(self, candidate: _Candidate) -> bool:
        return candidate.outputs == self._num_outputs and not candidate.is_taken

    def _ends_of_branches(self, module: nn.Module, path: _Path) -> Iterator[_Candidate]:
        branches = [branch for branch in self._branches(module, path) if branch.candidates or branch.had_head]
        if not branches:
            return
        # A known number of outputs says more than a name, unless another layer takes as many inputs.
        fitting = [branch for branch in branches if any(map(self._fits, branch.candidates))]
        branches = fitting or branches
        best = max(branch.rank for branch in branches)
        found = [candidate for branch in branches if branch.rank == best for candidate in branch.candidates]
        if best[0] == 2:  # "head" and "head_dist" of equal sizes are two heads.
            sizes = {candidate[2:4] for candidate in found}
            found += [
                twin for branch in branches if branch.likeness == 1 for twin in branch.candidates if twin[2:4] in sizes
            ]
            found = [candidate._replace(path=candidate.path._replace(likeness=2)) for candidate in found]
        yield from found

    def _branches(self, module: nn.Module, path: _Path) -> list[_Branch]:
        """Return the children of a module that is no sequence, without the candidates that are hidden layers."""
        children = dict(module.named_children())
        has_tensors = any(True for _ in (*module.parameters(False), *module.buffers(False)))
        if path.likeness == 2 and has_tensors and all(_likeness(*child) < 2 for child in children.items()):
            return []  # This head computes more than its layers do.
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
                is_inner = path.likeness < 2  # a block of an encoder
            else:
                is_inner = beside_blocks and branch.likeness < 2 and not isinstance(child, nn.Sequential)
            if is_inner or (branch.likeness == 0 and not is_last and _words(name) & _INNER_WORDS):
                continue
            is_alone = is_last if isinstance(child, _CONVOLUTIONS) else is_only
            inherited = path.likeness if is_alone or branch.likeness or isinstance(module, nn.ModuleList) else 0
            below = path.child(name, max(branch.likeness, inherited), is_last)
            branch.candidates.extend(self._ends(child, below, siblings))
        return _in_last_place(branches)


def _may_be_last(candidate: _Candidate, is_linear: bool) -> bool:
    """Whether a layer may make the output of the module, by its path and the sizes of all layers."""
    path = candidate.path
    if path.last:
        return True
    if not is_linear:
        return path.likeness == 2  # Convolutions of this size are in all parts of networks.
    if not candidate.is_taken:
        return True
    word = path.name.rstrip("0123456789.").rpartition(".")[2]
    return path.likeness == 2 and (candidate.inputs != candidate.outputs or word in _SURE_WORDS)


def _in_last_place(branches: list[_Branch]) -> list[_Branch]:
    """Drop the candidates whose output a later network may take, unless their name says "head"."""
    idle = [index for index, branch in enumerate(branches) if branch.is_idle]
    kept = []
    is_first = True
    for index, branch in enumerate(branches):
        is_inner = bool(idle) and index < idle[-1]
        if branch.is_layer:
            is_inner = is_inner and not is_first
        elif idle and branch.likeness < 2:
            # An encoder feeds its head. ESM's `contact_head` takes attention maps, and gives no output of its own.
            is_inner = (
                is_inner
                or any(map(_are_blocks, branch.module.modules()))
                or not all(candidate.is_fed for candidate in branch.candidates)
            )
        is_first = is_first and not _has_weights(branch.module)
        kept.append(branch._replace(candidates=[]) if is_inner and branch.likeness < 2 else branch)
    return kept


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


def _outputs(modules: Iterable[nn.Module]) -> Iterator[int]:
    """Yield the sizes of the vectors that layers give."""
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
    # Metrics may hold whole networks (FID, BERTScore) that are not part of the model.
    return not isinstance(module, Metric) and any(_linear(child) is not None for child in module.modules())


def _has_weights(module: nn.Module) -> bool:
    return not isinstance(module, Metric) and any(True for _ in module.parameters())


def _are_blocks(module: nn.Module, kind: type | None = None) -> bool:
    """Whether a module is a list of networks or a sequence of networks of one kind, as the blocks of an encoder."""
    networks = [child for child in module.children() if _linear(child) is None and any(True for _ in child.children())]
    if isinstance(module, nn.ModuleList):
        return bool(networks)
    kinds = Counter(map(_kind, networks)) if isinstance(module, nn.Sequential) else Counter()
    return any(number > 1 and kind in (None, shared[0]) for shared, number in kinds.items())


def _kind(module: nn.Module) -> tuple[type, ...]:
    """Return what blocks of one kind have in common. Plain sequences are of one kind where all their modules are."""
    return tuple(map(type, module.modules())) if isinstance(module, nn.Sequential) else (type(module),)


def _keeps_logits(module: nn.Module) -> bool:
    """Whether logits are still logits or predictions after this module, which has no linear layer."""
    if _has_weights(module):
        return False
    hidden = ("activation", "batchnorm", "instancenorm", "normalization")
    return all(
        isinstance(child, _LINKS) or type(child).__module__.rpartition(".")[2] not in hidden
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
    """Follow a dotted name as far as it leads: a user may have replaced `head`, so that `head.fc` is gone."""
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
    """Return how much a name says "head": 2 for the very word, 1 for a name that has the word."""
    is_layer = _linear(module) is not None or isinstance(module, nn.Identity)
    words = _HEAD_WORDS | _LAYER_WORDS if is_layer else _HEAD_WORDS
    return 2 if name.lower().strip("_") in words else 1 if words & _words(name) else 0


def _without_frozen_copies(candidates: list[_Candidate]) -> list[_Candidate]:
    """Drop what is frozen beside a trained layer with as many outputs: a teacher, a copy, a layer out of use."""
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
    if layer.outputs != later.inputs:
        return False
    if later.inputs != later.outputs:
        return True
    # A square layer fits behind any other one and beside any square one. Only numbers in the names give an order.
    numbered = re.sub(r"\d+", "", layer.path.name) == re.sub(r"\d+", "", later.path.name)
    return numbered and layer.inputs != layer.outputs
