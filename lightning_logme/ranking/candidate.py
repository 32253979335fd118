"""A backbone under test: how it is made, how it is called, and what tells it from others."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_logme.batch import TargetSpec, find_mask
from lightning_logme.forward import Forward, call, copied
from lightning_logme.heads import find_head, get_module
from lightning_logme.packages import Fabric
from lightning_logme.samples import seed_generators
from lightning_logme.taps import Pooling, Tap, first_tensor, pool

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class Candidate:
    """A backbone and how to have features from it.

    Attributes:
        name: of the row.
        source: the module, or a factory that makes it.
        head: dotted name of the module whose input is the feature, "auto" to find the classifier head, None for the
            output; with ``forward``, "auto" is the output where no such head is called.
        pooling: to one vector a sample.
        forward: (module, batch) -> features; None calls the module on the inputs of the batch.
        transform: of the loader's batches, on the CPU.
        normalize: whether each sample's features are scaled to length 1.
        target: key of the labels, which are no input.
    """

    name: str
    source: nn.Module | Callable[[], nn.Module]
    head: str | None
    pooling: Pooling
    forward: Forward | None
    transform: Transform | None
    normalize: bool
    target: TargetSpec

    @contextmanager
    def on_device(self, fabric: Fabric, seed: int, num_outputs: int | None) -> Iterator[Backbone]:
        """The backbone, ready to be called; afterwards a module that was passed in is as it was before."""
        if not isinstance(self.source, nn.Module):
            module = _converted(self._made(seed), fabric)
            with Backbone(self, fabric.to_device(module), num_outputs) as backbone:
                yield backbone
            return
        module, devices = self.source, {tensor.device for tensor in self.source.parameters()}
        training = {part: part.training for part in module.modules()}
        try:
            in_precision = _converted(module, fabric, keep=True)
            # A module that somebody has spread over several devices stays there.
            moved = in_precision if len(devices) > 1 else fabric.to_device(in_precision)
            with Backbone(self, moved, num_outputs) as backbone:
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

    Attributes:
        num_parameters: of the module.
        fingerprint: of its weights and its class.
    """

    def __init__(self, candidate: Candidate, module: nn.Module, num_outputs: int | None) -> None:
        self._candidate = candidate
        self._module = module.eval()
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        self.fingerprint = _digest(module)
        self._tap: Tap | None = None
        self._num_features: int | None = None
        self._optional = candidate.head == "auto" and candidate.forward is not None
        name = self._name_of_head(num_outputs)
        if name is not None:
            head = get_module(module, name, "head")
            self._num_features = getattr(head, "in_features", None)
            self._tap = Tap(head, "input", f"the head '{name}'")

    def __enter__(self) -> Backbone:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tap is not None:
            self._tap.remove()

    @torch.no_grad()  # not inference mode, whose tensors a module may keep, and could not be trained with
    def features(self, batch: Any, fabric: Fabric) -> Tensor:
        """Pooled features (n, D) of a batch as the loader made it."""
        batch = copied(batch)
        if self._candidate.transform is not None:
            batch = self._candidate.transform(batch)
        batch = fabric.to_device(fabric.strategy.precision.convert_input(batch))
        if self._tap is not None:
            self._tap.start()
        with fabric.autocast():
            output = self._output(batch)
        if self._tap is None or (self._optional and not self._tap.called):
            seen = first_tensor(output)
        else:
            seen = self._tap.take()
        if seen is None:
            by = "the module" if self._candidate.forward is None else "forward"
            raise ValueError(
                f"{by} returned {type(output).__name__} without a tensor in it; give forward=callable(model, batch) "
                "that returns features as a torch.Tensor."
            )
        pooled = pool(seen, self._candidate.pooling, self._num_features, find_mask(batch))
        if self._candidate.normalize:
            pooled = nn.functional.normalize(pooled.to(torch.promote_types(pooled.dtype, torch.float32)))
        return pooled

    def _name_of_head(self, num_outputs: int | None) -> str | None:
        if self._candidate.head != "auto":
            return self._candidate.head
        try:
            return find_head(self._module, num_outputs)
        except ValueError:
            if not self._optional:
                raise
            return None

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
