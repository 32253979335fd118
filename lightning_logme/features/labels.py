"""The labels and the attention mask of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_logme.scores.rows import Target, Task, is_exclusive

TargetSpec = int | str | Callable[[Any], Tensor] | None

LABEL_KEYS = ("labels", "label", "targets", "target", "y")


class Labels(NamedTuple):
    """The labels of a batch, checked once for all sources of features.

    Attributes:
        target: of the samples that count.
        mask: (N, T) attention mask, non-zero where a token counts; None if there is none.
    """

    target: Target
    mask: Tensor | None


def read_labels(
    batch: Any, target: TargetSpec, task: Task, num_outputs: int | None = None, ignore_index: int | None = None
) -> Labels:
    """Return the labels and the mask of a batch.

    Raises:
        ValueError: there are no labels, or they do not fit the task.
    """
    # A copy, because validation_step may write to them: -100 is often replaced before tokens are decoded.
    found = conform_target(find_target(batch, target), task).clone()
    return Labels(Target.checked(found, task, num_outputs, ignore_index), find_mask(batch))


def check_target(target: Any) -> None:
    """Raise ``ValueError`` unless ``target`` can say where labels are."""
    if target is not None and (isinstance(target, bool) or not (isinstance(target, (int, str)) or callable(target))):
        raise ValueError(f"target must be a key, an index, a callable(batch) -> Tensor, or None, got {target!r}.")


def find_target(batch: Any, target: TargetSpec = None) -> Tensor:
    """The labels of a batch.

    Args:
        batch: as the loader made it: (inputs, labels, …), a mapping, or an object with attributes.
        target: a key, an index, or a callable(batch); None takes the second item of a tuple or list, or what has one
            of the usual names (labels, label, targets, target, y).

    Raises:
        ValueError: there are no labels where they were looked for, or they are no tensor; the message shows what to
            pass.
    """
    try:
        labels = _look_up(batch, target)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"target={target!r} does not lead to labels in a batch that is {_describe(batch)} ({type(error).__name__}: "
            f"{error})."
        ) from error
    if labels is None:
        raise ValueError(
            f"no labels found in a batch that is {_describe(batch)}; say where they are: target= takes a key, an "
            "index, or a callable(batch) -> Tensor."
        )
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"the labels (target={target!r}) must be a torch.Tensor, got {type(labels).__name__} from a batch that is "
            f"{_describe(batch)}; target=callable can convert them."
        )
    return labels


def describe_target(batch: Any, target: TargetSpec = None) -> tuple[str, str | None]:
    """Where :func:`find_target` looks in such a batch, and what else there could be taken for labels, if anything."""
    if target is not None:
        return f"target={target!r}", None
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        rivals = [f"batch[{index}]" for index, item in enumerate(batch) if index > 1 and _looks_like(item, batch[1])]
        return "batch[1]", ", ".join(rivals) or None
    present = [key for key in LABEL_KEYS if _get(batch, key) is not None]
    if not present:
        return "batch[1]", None
    return f"batch[{present[0]!r}]", ", ".join(f"batch[{key!r}]" for key in present[1:]) or None


def conform_target(target: Tensor, task: Task) -> Tensor:
    """Bring labels to the metric's form where only the form differs.

    That is (N, 1) to (N,) for classes, a squeezed batch of one, and the 0.0 and 1.0 of a binary loss to integers.
    """
    if target.ndim == 0:  # a squeezed batch of one
        target = target[None]
    if is_exclusive(task) and target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if task == "binary" and target.is_floating_point() and bool((target == target.round()).all()):
        target = target.long()
    return target


def find_mask(batch: Any) -> Tensor | None:
    """The attention mask of a Hugging Face batch, or of the inputs in (inputs, labels)."""
    inputs = inputs_of(batch)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) else None


def inputs_of(batch: Any) -> Any:
    """What a module is called with: the first item of (inputs, labels), or the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch


def _look_up(batch: Any, target: TargetSpec) -> Any:
    if callable(target):
        return target(batch)
    if isinstance(target, str) and not isinstance(batch, Mapping):
        return getattr(batch, target)
    if target is not None:
        return batch[target]
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return batch[1] if len(batch) > 1 else None
    if isinstance(batch, Tensor):
        return None
    found = (_get(batch, key) for key in LABEL_KEYS)
    named = next((labels for labels in found if labels is not None), None)
    return batch[1] if named is None and isinstance(batch, tuple) and len(batch) > 1 else named


def _get(batch: Any, key: str) -> Any:
    return batch.get(key) if isinstance(batch, Mapping) else getattr(batch, key, None)


def _looks_like(item: Any, labels: Any) -> bool:
    both = isinstance(item, Tensor) and isinstance(labels, Tensor)
    return both and item.shape == labels.shape and item.is_floating_point() == labels.is_floating_point()


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with keys {', '.join(map(repr, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(item).__name__ for item in batch)})"
    return f"a {type(batch).__name__}"


def decide_num_outputs(
    task: Task, num_classes: int | None, *, head_outputs: int | None = None, labels: Tensor | None = None
) -> int | None:
    """Return K, the number of outputs, or None where it is not known yet.

    Args:
        task: of the labels.
        num_classes: K of "multiclass" and "multilabel", where the user gave it.
        head_outputs: number of outputs of the classifier head, which decides "multiclass" from 2 on.
        labels: checked labels that count: all of them for "multiclass", any of them for the columns of other tasks.
    """
    if task == "binary":
        return 2
    if num_classes is not None:
        return num_classes
    if task != "multiclass":
        return None if labels is None else labels.shape[1]
    if labels is not None and len(labels):
        return int(labels.max()) + 1
    return head_outputs if head_outputs is not None and head_outputs >= 2 else None
