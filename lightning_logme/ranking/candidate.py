"""A backbone under test: how it is made, how it is called, and what tells it from others."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_logme.attach import AUTO, Head
from lightning_logme.batch import TargetSpec, find_mask
from lightning_logme.forward import Forward, call, copied
from lightning_logme.heads import find_head, get_module
from lightning_logme.moments import Task
from lightning_logme.output_layer import OutputLayer
from lightning_logme.packages import Fabric
from lightning_logme.pooling import Pooling
from lightning_logme.samples import seed_generators
from lightning_logme.sources import HEAD, Source, Sources
from lightning_logme.taps import Tap, first_tensor

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class Candidate:
    """A backbone and how to have features from it.

    Attributes:
        name: of the row.
        source: the module, or a factory that makes it.
        head: dotted names of the modules whose input is the feature; "auto" for the layer that makes the output, if
            there is one; None for the output.
        pooling: to one vector a sample.
        forward: (module, batch) -> features; None calls the module on the inputs of the batch.
        transform: of the loader's batches, on the CPU.
        normalize: whether each sample's features are scaled to length 1.
        target: key of the labels, which are no input.
    """

    name: str
    source: nn.Module | Callable[[], nn.Module]
    head: Head
    pooling: Pooling
    forward: Forward | None
    transform: Transform | None
    normalize: bool
    target: TargetSpec

    @contextmanager
    def on_device(self, fabric: Fabric, seed: int, task: Task, heads: Sequence[str] | None) -> Iterator[Backbone]:
        """The backbone, ready to be called; afterwards a module that was passed in is as it was before."""
        if not isinstance(self.source, nn.Module):
            module = _converted(self._made(seed), fabric)
            with Backbone(self, fabric.to_device(module), task, heads) as backbone:
                yield backbone
            return
        module, devices = self.source, {tensor.device for tensor in self.source.parameters()}
        training = {part: part.training for part in module.modules()}
        try:
            in_precision = _converted(module, fabric, keep=True)
            # A module that somebody has spread over several devices stays there.
            moved = in_precision if len(devices) > 1 else fabric.to_device(in_precision)
            with Backbone(self, moved, task, heads) as backbone:
                yield backbone
        finally:
            if len(devices) == 1:
                module.to(devices.pop())
            for part, mode in training.items():
                part.training = mode

    def _made(self, seed: int) -> nn.Module:
        # Made anew every round, random weights must be the same ones.
        seed_generators(seed)
        module = self.source()
        if not isinstance(module, nn.Module):
            raise TypeError(f"the factory must return a torch.nn.Module, got {type(module).__name__}.")
        return module


class Backbone:
    """A module that gives features (n, D) of batches while it lasts.

    Args:
        candidate: what it is made of.
        module: ready to be called.
        task: of the labels.
        heads: the modules whose input is the feature, where an earlier round has found them.

    Attributes:
        num_parameters: of the module.
        fingerprint: of its weights and its class.
        heads: the modules whose input is the feature, empty for the output; None until the first batch shows it.
    """

    def __init__(self, candidate: Candidate, module: nn.Module, task: Task, heads: Sequence[str] | None) -> None:
        self._candidate = candidate
        self._module = module.eval()
        self._task: Task = task
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        self.fingerprint = _digest(module)
        self.heads: Sequence[str] | None = heads
        if candidate.head != AUTO:
            named = () if candidate.head is None else candidate.head
            self.heads = (named,) if isinstance(named, str) else named
        self._made: Any = None  # the output of the last batch
        self._sources = Sources() if self.heads is None else self._listen(self.heads)

    def __enter__(self) -> Backbone:
        return self

    def __exit__(self, *_: object) -> None:
        self._sources.remove()

    @torch.no_grad()  # not inference mode, whose tensors a module may keep, and could not be trained with
    def features(self, batch: Any, target: Tensor, fabric: Fabric) -> Tensor:
        """Pooled features (n, D) of a batch as the loader made it, with labels (n, …).

        Raises:
            ValueError: the module gives no features, or not one for each label.
        """
        prepared = self._prepared(batch, fabric)
        try:
            if self.heads is None:
                self._find_heads(prepared, fabric)
                if not self._sources.called:  # the input of the layer that was found is not at hand
                    self._run(self._prepared(batch, fabric), fabric)
            else:
                self._run(prepared, fabric)
            with fabric.autocast():
                rows, errors = self._sources.rows(self._module, prepared, target, find_mask(prepared), self._task)
        finally:
            self._sources.stop()
            self._made = None
        for error in errors.values():
            raise error
        pooled = rows[HEAD]
        if self._candidate.normalize:
            pooled = nn.functional.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)))
        return pooled

    def _run(self, prepared: Any, fabric: Fabric) -> None:
        self._sources.start()
        with fabric.autocast():
            self._made = self._output(prepared)

    def _find_heads(self, prepared: Any, fabric: Fabric) -> None:
        """Run the first batch, and find which layer makes the output."""
        self._sources = self._listen(())
        with OutputLayer(self._module) as layers:
            self._run(prepared, fabric)
        if layers.is_blind and self._candidate.forward is None:
            raise ValueError(
                f"head='auto': no layer of {type(self._module).__name__} was seen while it ran, as of a compiled or "
                "scripted network; name the head, or write head=None to score the output."
            )
        made = first_tensor(self._made)
        name = None if made is None else layers.find(made)
        if self._candidate.forward is not None and name != self._classifier():
            name = None  # a forward of the user's own returns features, unless it runs the classifier
        self.heads = () if name is None else (name,)
        if name is not None:
            self._sources.stop()
            self._sources = self._listen(self.heads)
            for tap in self._sources.taps:
                tap.start()
                layers.replay(name, tap)

    def _classifier(self) -> str | None:
        try:
            return find_head(self._module)
        except ValueError:
            return None

    def _listen(self, heads: Sequence[str]) -> Sources:
        pooling = self._candidate.pooling
        if not heads:
            label, key = "the output", self._candidate.name
            source = Source(HEAD, features=self._feature_made, pooling=pooling, label=label, pooling_key=key)
            return Sources(self._module, [source])
        modules = {name: get_module(self._module, name, "head") for name in heads}
        taps = [Tap(module, "input", f"the head '{name}'") for name, module in modules.items()]
        return Sources(self._module, [Source(HEAD, taps, pooling=pooling, pooling_key=self._candidate.name)])

    def _prepared(self, batch: Any, fabric: Fabric) -> Any:
        batch = copied(batch)  # the module may write to it
        if self._candidate.transform is not None:
            batch = self._candidate.transform(batch)
        return fabric.to_device(fabric.strategy.precision.convert_input(batch))

    def _feature_made(self, *_: Any) -> Tensor:
        """The output of the batch that has been run, as a feature."""
        tensor = first_tensor(self._made)
        if tensor is None:
            by = "the module" if self._candidate.forward is None else "forward"
            raise ValueError(
                f"{by} returned {type(self._made).__name__} without a tensor in it; give "
                "forward=callable(model, batch) that returns features as a torch.Tensor."
            )
        return tensor

    def _output(self, batch: Any) -> Any:
        if self._candidate.forward is not None:
            return self._candidate.forward(self._module, batch)
        return call(self._module, batch, self._candidate.target)


def _converted(module: nn.Module, fabric: Fabric, keep: bool = False) -> nn.Module:
    """In the precision that was asked for; a copy where the module itself is to be kept as it is."""
    precision = fabric.strategy.precision
    changes = str(precision.precision).endswith("-true") and precision.precision != "32-true"
    return precision.convert_module(copy.deepcopy(module) if keep and changes else module)


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha1(type(module).__qualname__.encode())
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
