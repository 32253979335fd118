"""Which module of a network is its classifier head."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import pairwise

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


def find_head(root: nn.Module, num_outputs: int | None = None) -> str:
    """The dotted name of the linear layer that makes the outputs.

    The module tree is followed from the top: into the only branch that has linear layers, into the branch with the
    name of a head ("head", "classifier", "fc", …), to the end of a chain of layers. What is left open after that is
    decided by the number of outputs, by what is being trained, and by a head's name further down.

    Args:
        root: the network.
        num_outputs: what the head must put out, if known.

    Raises:
        ValueError: there is no linear layer, or more than one candidate; the message lists them.
    """
    candidates = list(_ends(root, ""))
    for criterion in (
        lambda name, linear: num_outputs is None or linear.out_features == num_outputs,
        lambda name, linear: linear.weight.requires_grad,
        lambda name, linear: not _HEAD_WORDS.isdisjoint(name.split(".")),
    ):
        if len(candidates) > 1:
            candidates = [candidate for candidate in candidates if criterion(*candidate)] or candidates
    if len(candidates) == 1:
        return candidates[0][0]
    model = type(root).__name__
    if not candidates:
        raise ValueError(
            f"head: {model} has no torch.nn.Linear that could be its classifier head. Name the module whose input is "
            "the feature, as in "
            f"head='{_last_name(root)}', or modules whose output is to be scored, as in "
            "LogMECallback(layers=['…']), or give features=callable(module, batch)."
        )
    listed = ", ".join(f"'{name}' ({linear.in_features} → {linear.out_features})" for name, linear in candidates)
    raise ValueError(
        f"head: {model} has several layers that could be its classifier head: {listed}. "
        f"Name the one whose input is the feature: head='{candidates[-1][0]}'."
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


def _ends(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that may be the last of this module."""
    if isinstance(module, nn.Linear):
        yield name, module
        return
    branches = [(child_name, child) for child_name, child in module.named_children() if _has_linear(child)]
    if isinstance(module, nn.Sequential):
        branches = branches[-1:]
    if len(branches) > 1:
        best = max(_likeness(child_name, child) for child_name, child in branches)
        branches = [branch for branch in branches if _likeness(*branch) == best]
    if _is_chain([child for _, child in branches]):
        branches = branches[-1:]
    for child_name, child in branches:
        yield from _ends(child, f"{name}.{child_name}" if name else child_name)


def _has_linear(module: nn.Module) -> bool:
    # Metrics may hold whole networks (FID, BERTScore) that are no part of this one.
    return not isinstance(module, Metric) and any(isinstance(child, nn.Linear) for child in module.modules())


def _likeness(name: str, module: nn.Module) -> tuple[int, bool]:
    """How much a branch looks like a head: by its name first, then by being a single layer beside whole networks."""
    name = name.lower().strip("_")
    words = set(re.split(r"[_\d]+", name))
    return (2 if name in _HEAD_WORDS else 1 if words & _HEAD_WORDS else 0), isinstance(module, nn.Linear)


def _is_chain(modules: list[nn.Module]) -> bool:
    """Whether each is a linear layer that takes what the one before puts out."""
    if not all(isinstance(module, nn.Linear) for module in modules):
        return False
    return all(before.out_features == after.in_features for before, after in pairwise(modules))


def _last_name(root: nn.Module) -> str:
    """The last module with weights of its own."""
    names = [name for name, module in root.named_modules() if name and any(True for _ in module.parameters(False))]
    return names[-1] if names else "…"
