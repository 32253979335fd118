"""A candidate of a ranking: build, run and restore its network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_logme.features.calling import Forward, call, copied
from lightning_logme.features.extractor import HEAD
from lightning_logme.features.heads import find_head, get_module
from lightning_logme.features.hooks import first_tensor
from lightning_logme.features.isolation import seed_generators
from lightning_logme.features.labels import Labels, Target, TargetSpec, find_mask
from lightning_logme.features.output_layer import OutputLayer
from lightning_logme.features.pooling import Pooler
from lightning_logme.features.selection import Selection, attach
from lightning_logme.ranking.result import in_words
from lightning_logme.utilities.compat import Fabric, uncompiled
from lightning_logme.utilities.distributed import reason_of

Transform = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network of a ranking, and how its features are extracted.

    Attributes:
        source: the module, or a factory that builds it.
        selection: which features to extract.
        forward: (module, batch) -> output; None calls the module with the inputs of the batch.
        transform: preprocessing of the loader's batches, on the CPU.
        target: where the labels are in a batch; the module does not get them.
    """

    name: str
    source: nn.Module | Callable[[], nn.Module]
    selection: Selection
    forward: Forward | None = None
    transform: Transform | None = None
    target: TargetSpec = None

    @property
    def is_rebuilt(self) -> bool:
        """Whether a factory builds the module again each time it is needed."""
        return not isinstance(self.source, nn.Module)

    def build(self, seed: int) -> nn.Module:
        """Return a new module from the factory, or a copy of the module."""
        if isinstance(self.source, nn.Module):
            return uncompiled_copy(self.source)
        seed_generators(seed)
        built = self.source()
        if not isinstance(built, nn.Module):
            raise TypeError(f"the factory must return a torch.nn.Module, got {type(built).__name__}.")
        return built

    @contextmanager
    def on_device(self, fabric: Fabric, seed: int, heads: Sequence[str] | None) -> Iterator[Backbone]:
        """Yield the network, ready to run. Afterwards, restore a module that the user passed in.

        Args:
            seed: seed of random weights, so that each build of the module has the same weights.
            heads: names of the modules whose input is the feature; None if they are unknown.
        """
        if not isinstance(self.source, nn.Module):
            built = self.build(seed)
            with Backbone(self, fabric.to_device(_converted(built, fabric)), heads) as backbone:
                yield backbone
            return
        module = self.source
        devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
        training = {submodule: submodule.training for submodule in module.modules()}
        try:
            in_precision = _converted(module, fabric, keep=True)
            # A module that is spread over several devices stays there.
            moved = in_precision if len(devices) > 1 else fabric.to_device(in_precision)
            with Backbone(self, moved, heads) as backbone:
                yield backbone
        finally:
            if len(devices) == 1:
                module.to(devices.pop())
            for submodule, mode in training.items():
                submodule.training = mode


class Backbone:
    """The network of a candidate with hooks that capture its features, as a context manager.

    Args:
        heads: names of the modules whose input is the feature, if an earlier round has found them.

    Attributes:
        num_parameters: number of parameters of the module.
        heads: names of the modules whose input is the feature; empty if it is the output; None before the first batch.
    """

    def __init__(self, candidate: Candidate, module: nn.Module, heads: Sequence[str] | None) -> None:
        named = candidate.selection.named_heads
        self._candidate = candidate
        self._module = module.eval()
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        self.heads: Sequence[str] | None = heads if named is None else named
        self._extractor = attach(
            module, candidate.selection, self.heads or (), is_output_given=True, key=candidate.name
        )

    def __enter__(self) -> Backbone:
        return self

    def __exit__(self, *_: object) -> None:
        self._extractor.remove()

    @property
    def pooler(self) -> Pooler:
        """The pooling of the head's input, or of the output."""
        return self._extractor.sources[HEAD].poolers[0]

    @torch.no_grad()  # not inference mode: a module may keep a tensor, and training cannot use inference tensors
    def rows(self, batch: Any, target: Target, fabric: Fabric) -> dict[str, Tensor]:
        """Return one feature vector for each label of a batch, by source.

        Raises:
            ValueError: the module gives no features, or not one vector for each label.
        """
        try:
            is_unknown = self.heads is None
            prepared, labels = self._run(batch, target, fabric)
            head = self._extractor.head
            if is_unknown and head is not None and not all(capture.seen for capture in head.captures):
                # The first run found the head, but did not capture its input.
                prepared, labels = self._run(batch, target, fabric)
            rows, errors = self._extractor.rows(prepared, labels)
        finally:
            self._extractor.stop()
        for source, error in errors.items():
            with errors_naming(source or ""):
                raise error
        return rows

    def _run(self, batch: Any, target: Target, fabric: Fabric) -> tuple[Any, Labels]:
        """Run the module. On the first batch, find the layer that makes its output."""
        batch = copied(batch)  # the module may write to it
        if self._candidate.transform is not None:
            batch = self._candidate.transform(batch)
        prepared = fabric.to_device(fabric.strategy.precision.convert_input(batch))
        labels = Labels(target, find_mask(prepared))
        self._extractor.start(labels)
        with OutputLayer(self._module) if self.heads is None else nullcontext() as layers, fabric.autocast():
            if self._candidate.forward is not None:
                output = self._candidate.forward(self._module, prepared)
            else:
                output = call(self._module, prepared, self._candidate.target)
        if layers is not None:
            self._find_head(layers, output)
        if not self.heads and first_tensor(output) is None:
            by = "the module" if self._candidate.forward is None else "forward"
            raise ValueError(
                f"{by} returned {type(output).__name__} without a tensor in it; give forward=callable(model, batch) "
                "that returns features as a torch.Tensor."
            )
        self._extractor.give(output)
        return prepared, labels

    def _find_head(self, layers: OutputLayer, output: Any) -> None:
        """Find the layer that makes the output, and use its input as the feature."""
        if layers.is_blind and self._candidate.forward is None:
            raise ValueError(
                f"head='auto': no layer of {type(self._module).__name__} called its hooks, as happens in compiled and "
                "scripted networks; name the head, or write head=None to score the output."
            )
        tensor = first_tensor(output)
        name = None if tensor is None else layers.find(tensor)
        if self._candidate.forward is not None and name != self._classifier():
            name = None  # a forward of the user returns features, unless it ends in the classifier
        self.heads = () if name is None else (name,)
        if name is not None:
            layers.replay(name, self._extractor.replace_head(get_module(self._module, name, "head"), name))

    def _classifier(self) -> str | None:
        try:
            return find_head(self._module)
        except ValueError:
            return None


def _converted(module: nn.Module, fabric: Fabric, keep: bool = False) -> nn.Module:
    """Return the module in the requested precision. With ``keep``, the module itself is not changed."""
    precision = fabric.strategy.precision
    is_changed = str(precision.precision).endswith("-true") and precision.precision != "32-true"
    return precision.convert_module(copy.deepcopy(module) if keep and is_changed else module)


@contextmanager
def errors_naming(source: str) -> Iterator[None]:
    """Add the source to the message of an error, unless the message names it."""
    try:
        yield
    except Exception as error:
        if not source or repr(source) in str(error):
            raise
        raise ValueError(f"{in_words(source)}: {reason_of(error)}") from error


def uncompiled_copy(module: nn.Module) -> nn.Module:
    """Return an uncompiled copy: compiled code would keep the weights of the original."""
    copied = uncompiled(module, copy.deepcopy)
    for name, submodule in copied.named_modules():
        if getattr(vars(submodule).get("forward"), "__closure__", None):
            raise ValueError(
                f"{name or 'the module'} has a forward function set on the instance, so a copy would use the "
                "original's weights; pass a module without it, and give forward=callable(model, batch)."
            )
    return copied
