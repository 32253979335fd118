"""Put the linear head of a ranking into a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_logme.features.calling import call
from lightning_logme.features.extractor import HEAD
from lightning_logme.features.heads import get_module
from lightning_logme.features.hooks import first_tensor
from lightning_logme.features.isolation import same_generators
from lightning_logme.features.labels import find_mask
from lightning_logme.features.pooling import Pooler
from lightning_logme.features.sampling import Portion
from lightning_logme.features.selection import Selection
from lightning_logme.ranking.candidate import Candidate
from lightning_logme.ranking.collect import Rules
from lightning_logme.scores.moments import unit_vectors
from lightning_logme.utilities.compat import Fabric
from lightning_logme.utilities.distributed import reason_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_REMEDY = "ranking.head(name) gives the linear layer, to be put in by hand"


class PooledLinear(nn.Module):
    """A linear layer on features that are pooled, and scaled to length 1, as in the ranking.

    Args:
        linear: the linear layer.
        pooler: the pooling; None if the features were not pooled.
        normalize: whether to scale the features to length 1.
    """

    def __init__(self, linear: nn.Linear, pooler: Pooler | None, normalize: bool) -> None:
        super().__init__()
        self.linear = linear
        self.pooler = pooler
        self.normalize = normalize

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.pooler is not None:
            features = self.pooler.pooled(features, mask)
        if self.normalize:
            features = unit_vectors(features)
        logits: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return logits


class Classifier(nn.Module):
    """An encoder without a head, followed by a linear layer.

    Args:
        encoder: takes the inputs of a batch, also as keyword arguments; those that it does not accept are dropped.
        head: takes the output of the encoder, and the attention mask among the keyword arguments.
    """

    def __init__(self, encoder: nn.Module, head: PooledLinear) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        output = call(self.encoder, inputs) if inputs and not args else self.encoder(*args, **inputs)
        logits: Tensor = self.head(first_tensor(output), find_mask(inputs))
        return logits


def with_head(
    candidate: Candidate, heads: Sequence[str], first: Portion, rules: Rules, ranked_with: Fabric, linear: nn.Linear
) -> nn.Module:
    """Return a candidate with a linear layer in place of its head, or after its output if it has none.

    The first batch is run through the candidate and through the result, to check that the outputs of the result are
    those of the linear layer on the scored features.

    Args:
        candidate: the candidate. A module is copied, and a factory builds a new one.
        heads: names of the modules whose input was scored; empty for the output.
        first: the first batch of the ranking.
        rules: the settings of the ranking.
        ranked_with: the Fabric of the ranking. The batch is run on its device.
        linear: the linear layer, float64 on the CPU, with D inputs and K outputs.

    Raises:
        ValueError: the result cannot be built or run, or its outputs differ. The message says what to do.
    """
    whose = f"model: {candidate.name!r}"
    if len(heads) > 1:
        raise ValueError(f"{whose} was scored at the inputs of {len(heads)} heads together; {_REMEDY}.")
    if not heads and candidate.forward is not None:
        raise ValueError(f"{whose} was scored at the output of forward=, which is no part of the module; {_REMEDY}.")
    device = ranked_with.device
    fabric = Fabric(accelerator=device.type, devices=1 if device.index is None else [device.index])
    with same_generators():
        module = candidate.build(rules.seed)
        features, pooler = _rows(replace(candidate, source=module), heads, first, rules, fabric)
        features = unit_vectors(features) if rules.scoring.normalize else features
        expected = linear(features.double()).detach()
        dtype = next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.float32)
        device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
        model = _joined(module, heads, linear.to(device, dtype), pooler, rules.scoring.normalize)
        try:
            # A pooling that changes nothing: the output must have one row for each label.
            selection = Selection(head=None, pooling=lambda output: output)
            output, _ = _rows(replace(candidate, source=model, selection=selection), (), first, rules, fabric)
        except Exception as error:
            raise ValueError(f"{whose} does not run with another head ({reason_of(error)}); {_REMEDY}.") from error
    if not _is_same(output, expected, dtype):
        raise ValueError(
            f"{whose} gives outputs that differ from those of its head on the scored features, because it pools or "
            f"uses the head in another way; {_REMEDY}."
        )
    return model


def _rows(
    candidate: Candidate, heads: Sequence[str], first: Portion, rules: Rules, fabric: Fabric
) -> tuple[Tensor, Pooler]:
    """Return the features of the first batch, on the CPU, because MPS has no float64, and their pooling."""
    target = rules.target(first.target)
    with candidate.on_device(fabric, rules.seed, heads) as backbone:
        rows = backbone.rows(first.batch, target, fabric)[HEAD]
        return target.rows(rows).features.cpu(), backbone.pooler


def _joined(module: nn.Module, heads: Sequence[str], linear: nn.Linear, pooler: Pooler, normalize: bool) -> nn.Module:
    is_pooled = pooler.description is not None or callable(pooler.pooling)
    if not heads:
        return Classifier(module, PooledLinear(linear, pooler if is_pooled else None, normalize))
    old = get_module(module, heads[0], "head")
    new: nn.Module = linear
    if isinstance(old, _CONVOLUTIONS):
        new = _convolution(old, linear)
    elif normalize or (is_pooled and not hasattr(old, "in_features")):
        new = PooledLinear(linear, pooler if is_pooled else None, normalize)
    *parents, name = heads[0].split(".")
    setattr(module.get_submodule(".".join(parents)), name, new)
    for depth in range(len(parents) + 1):  # transformers' models use num_labels in their loss
        owner = module.get_submodule(".".join(parents[:depth]))
        holder: Any
        for holder in (owner, getattr(owner, "config", None)):
            if isinstance(getattr(holder, "num_labels", None), int):
                holder.num_labels = linear.out_features
    return module


def _convolution(old: nn.Conv1d | nn.Conv2d | nn.Conv3d, linear: nn.Linear) -> nn.Module:
    """Return a linear layer as a 1 × 1 convolution."""
    kind: Any = next(kind for kind in _CONVOLUTIONS if isinstance(old, kind))
    new: nn.Module = kind(linear.in_features, linear.out_features, 1, stride=old.stride, bias=linear.bias is not None)
    new.weight = nn.Parameter(linear.weight.detach().view(linear.out_features, *old.weight.shape[1:]))
    new.bias = linear.bias
    return new


def _is_same(output: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the outputs are as expected: the logits, or their probabilities or log-probabilities."""
    tolerance = torch.finfo(dtype).eps ** 0.5
    for values in (expected, expected.softmax(1), expected.log_softmax(1), expected.sigmoid()):
        atol = tolerance * float(values.abs().max()) if values.numel() else 0.0
        if output.shape == values.shape and torch.allclose(output.to(values), values, tolerance, atol):
            return True
    return False
