"""LogME as a torchmetrics metric whose states are the moments."""

# Annotations are not postponed here: torch.jit.script cannot read those of a class that are strings.
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lightning_logme.arguments import check_options, check_task, positive
from lightning_logme.evidence import Evidence
from lightning_logme.moments import Batch, Moments, Task, moments_device


class LogME(Metric):
    r"""Log of maximum evidence (LogME) of features for a target, accumulated over batches and processes.

    See :func:`lightning_logme.functional.logme` for the formula and the source. No feature is kept: the states are
    float64 sums over samples, :math:`F^T F` and :math:`F^T Y` above all, so that memory is O(D² + DK) whatever the
    number of samples, and batches and processes combine by addition, exactly.

    As input to ``forward`` and ``update`` the metric accepts

    - ``features`` (:class:`~torch.Tensor`): (N, D) floating point of any precision, D = ``num_features``.
    - ``target`` (:class:`~torch.Tensor`): (N,) integers for "binary" and "multiclass", (N, L) of 0 and 1 for
      "multilabel", (N,) or (N, M) for "regression".

    As output ``compute`` returns a float64 scalar, nats per sample. It never raises on data it has accepted: where
    there is no evidence (no samples, fewer than two classes, NaN or Inf in the features) it is NaN, and one warning
    names the cause.

    The states stay float64 whatever ``half()``, ``to(dtype)`` or ``set_dtype`` ask for. ``forward`` computes the score
    of the batch, at the price of an eigendecomposition each time: where only the total matters, call ``update``.

    Args:
        task: "binary", "multiclass", "multilabel" or "regression".
        num_features: D.
        num_classes: K, needed for "multiclass".
        num_labels: L, needed for "multilabel".
        num_outputs: M, the columns of a "regression" target.
        ignore_index: rows with this label are left out ("multilabel": with any such entry). Has no meaning for
            "regression".
        fit_intercept: centre features and targets first. The papers do not.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument does not fit the task; in ``update``, a shape, dtype or label does not fit. Nothing is
            accumulated then.

    Example:
        >>> import torch
        >>> from lightning_logme import LogME
        >>> metric = LogME("multiclass", num_features=8, num_classes=4)
        >>> generator = torch.Generator().manual_seed(0)
        >>> for _ in range(10):
        ...     target = torch.arange(20) % 4
        ...     features = torch.randn(20, 8, generator=generator) + 2 * torch.eye(4, 8)[target]
        ...     metric.update(features, target)
        >>> score = metric.compute()
        >>> evidence = metric.evidence()
        >>> evidence.num_samples, bool(evidence.score == score), bool(evidence.gain > 0)
        (200, True, True)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    count: Tensor
    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_square: Tensor

    def __init__(
        self,
        task: Task,
        num_features: int,
        num_classes: int | None = None,
        num_labels: int | None = None,
        num_outputs: int = 1,
        ignore_index: int | None = None,
        fit_intercept: bool = False,
        **kwargs: Any,
    ) -> None:
        # torchmetrics would gather the matrices of all processes in each, and add them up there.
        super().__init__(**{**kwargs, "dist_sync_fn": kwargs.get("dist_sync_fn") or _all_reduce})
        check_task(task)
        check_options(task, ignore_index, fit_intercept)
        self.task: Task = task
        self.num_features = positive("num_features", num_features)
        self.num_outputs = _number_of_outputs(task, num_classes, num_labels, num_outputs)
        self.ignore_index = ignore_index
        self.fit_intercept = fit_intercept
        self._evidence: Evidence | None = None
        for name, value in vars(Moments.zeros(self.num_features, self.num_outputs)).items():
            self.add_state(name, default=value, dist_reduce_fx="sum")
            # torchmetrics keeps a copy of every default, which reset() clones: D × D zeros, held in one number.
            self._defaults[name] = value.new_zeros(()).expand_as(value)

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add a batch."""
        batch = Batch.checked(features, target, self.task, self.num_outputs, self.num_features, self.ignore_index)
        for name, value in vars(self.moments().accumulate(batch)).items():
            setattr(self, name, value)

    def compute(self) -> Tensor:
        """LogME of everything seen since the last reset, by all processes."""
        self._evidence = Evidence.from_moments(self.moments(), self.task, self.fit_intercept)
        return self._evidence.score

    def evidence(self) -> Evidence:
        """Everything behind :meth:`compute`, synchronised between processes as it is."""
        self.compute()  # cached by torchmetrics until the next update
        assert self._evidence is not None
        return self._evidence

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of another metric, or of its states as a dict."""
        super().merge_state(incoming_state)
        # torchmetrics would go on to return what was computed before, or warn that nothing was ever added.
        self._computed = None
        self._update_count += 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Copies of states that fit; what was computed before is forgotten."""
        for name, value in vars(self.moments()).items():
            loaded = state_dict.get(prefix + name)
            if loaded is not None and loaded.shape != value.shape:
                raise ValueError(
                    f"the state {name!r} must have shape {tuple(value.shape)}, got {tuple(loaded.shape)}; load it into "
                    "a metric of the same num_features and number of outputs."
                )
        self._computed, self._evidence = None, None
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, value in vars(self.moments()).items():
            setattr(self, name, value.clone())

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one or several values, see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

    def moments(self) -> Moments:
        """The states as they are: the sums of this process, unless they have been synchronised."""
        return Moments(**{field.name: getattr(self, field.name) for field in fields(Moments)})

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Module:
        """Let torch move the states between devices, never change their precision."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(moments_device(fn(tensor.new_empty(0)).device))

        self._computed, self._evidence = None, None
        return super()._apply(move, *args, **kwargs)


def _all_reduce(state: Tensor, group: Any = None) -> list[Tensor]:
    """In place of all processes' states, which torchmetrics would add up, a list of their sum."""
    # Metrics of one MetricCollection share their states: the sum must not be written to them.
    total = state.clone()
    dist.all_reduce(total, group=group)
    return [total]


def _number_of_outputs(task: Task, num_classes: int | None, num_labels: int | None, num_outputs: int) -> int:
    if task == "binary":
        if num_classes not in (None, 2):
            raise ValueError(f"num_classes must be 2 or None for task='binary', got {num_classes!r}.")
        return 2
    if task == "multiclass":
        return positive("num_classes", num_classes)
    if task == "multilabel":
        return positive("num_labels", num_labels)
    return positive("num_outputs", num_outputs)
