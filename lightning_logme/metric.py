"""LogME as a torchmetrics metric, whose states are moments."""

# No postponed annotations here: torch.jit.script cannot read class annotations that are strings.
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_logme.features.labels import Target
from lightning_logme.features.outputs import decide_num_outputs
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.accuracy import Accuracy, measure
from lightning_logme.scores.evidence import Evidence
from lightning_logme.scores.moments import Moments, Rows, moments_device
from lightning_logme.scores.reduction import gathered_subset
from lightning_logme.scores.subset import SAMPLE_SIZE, IndexedRows, Subset, index_of
from lightning_logme.utilities.checks import Task, check_flags, check_options, check_task, positive

_LISTS = ("held_features", "held_target", "held_index", "subset_features", "subset_target", "subset_index", "num_seen")
_ON_CPU = ("held_index", "subset_index", "num_seen")  # so that updates do not wait for the device


class LogME(Metric):
    r"""The log of maximum evidence (LogME) as a metric, accumulated over batches and processes.

    See :func:`lightning_logme.functional.logme` for the formula and the reference. The states are float64 sums over
    samples, mainly :math:`F^T F` and :math:`F^T Y`. Memory is therefore O(D² + DK) for any number of samples, and
    batches and processes combine exactly, by addition. While there are fewer than D samples, the sums are 0, and the
    samples themselves are held, which takes less memory and time. For :meth:`accuracy`, the features of at most 2048
    samples are also kept.

    ``forward`` and ``update`` accept

    - ``features`` (:class:`~torch.Tensor`): (N, D) floating point of any precision, with D = ``num_features``.
    - ``target`` (:class:`~torch.Tensor`): (N,) integers for "binary" and "multiclass", (N, L) of 0 and 1 for
      "multilabel", (N,) or (N, M) for "regression".

    ``compute`` returns a float64 scalar in nats per sample. It never raises on data that ``update`` has accepted: if
    there is no evidence (no samples, fewer than two classes, NaN or Inf in the features), it returns NaN, and one
    warning names the cause.

    The states stay float64 under ``half()``, ``to(dtype)`` and ``set_dtype``. ``forward`` also computes the score of
    the batch, with an eigendecomposition each time. If you need only the total, call ``update``.

    Args:
        task: "binary", "multiclass", "multilabel" or "regression".
        num_features: D.
        num_classes: K, needed for "multiclass".
        num_labels: L, needed for "multilabel".
        num_outputs: M, the number of columns of a "regression" target.
        ignore_index: label of rows that are left out ("multilabel": rows with any such entry). Not accepted for
            "regression".
        fit_intercept: centre features and targets first. The LogME papers do not.
        normalize: scale the features of each sample to length 1 first. The LogME papers do not.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument does not fit the task; in ``update``, a shape, dtype or label does not fit, and the
            batch is not added.

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

    options: Tensor
    count: Tensor
    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    target_square: Tensor
    held_features: list[Tensor]
    held_target: list[Tensor]
    held_index: list[Tensor]
    subset_features: list[Tensor]
    subset_target: list[Tensor]
    subset_index: list[Tensor]
    num_seen: list[Tensor]

    def __init__(
        self,
        task: Task,
        num_features: int,
        num_classes: int | None = None,
        num_labels: int | None = None,
        num_outputs: int = 1,
        ignore_index: int | None = None,
        fit_intercept: bool = False,
        normalize: bool = False,
        **kwargs: Any,
    ) -> None:
        # By default, torchmetrics gathers the matrices of all processes in every process; an all-reduce does not.
        super().__init__(**{**kwargs, "dist_sync_fn": kwargs.get("dist_sync_fn") or _all_reduce})
        check_task(task)
        check_options(task, ignore_index, fit_intercept)
        check_flags(normalize=normalize)
        self.task: Task = task
        self.num_features = positive("num_features", num_features)
        given = {"multiclass": ("num_classes", num_classes), "multilabel": ("num_labels", num_labels)}
        known = decide_num_outputs(task, num_classes) if task == "binary" else None
        self.num_outputs = known or positive(*given.get(task, ("num_outputs", num_outputs)))
        self.ignore_index = ignore_index
        self.fit_intercept = fit_intercept
        self.normalize = normalize
        self._evidence: Evidence | None = None
        self._accuracy: Accuracy | None = None
        self._is_measuring = False  # whether accuracy is being computed: only then do processes exchange rows
        # A sum is a scalar 0 until rows are added, because torchmetrics copies every state and its
        # default, and a D × D matrix is large.
        zero = torch.zeros((), dtype=torch.float64)
        # A MetricCollection merges metrics with equal states (in old versions: an equal first state), but metrics that
        # differ in these options must stay apart.
        options = torch.tensor([normalize, math.inf if ignore_index is None else ignore_index], dtype=torch.float64)
        self.add_state("options", default=options, dist_reduce_fx="max")
        self.add_state("count", default=zero, dist_reduce_fx="sum")
        self.add_state("gram", default=zero, dist_reduce_fx="sum")
        self.add_state("cross", default=zero, dist_reduce_fx="sum")
        self.add_state("feature_sum", default=zero, dist_reduce_fx="sum")
        self.add_state("target_sum", default=zero, dist_reduce_fx="sum")
        self.add_state("target_square", default=zero, dist_reduce_fx="sum")
        for name in _LISTS:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add the features and labels of a batch."""
        checked = Target.checked(target, self.task, self.num_outputs, self.ignore_index)
        rows = checked.rows(features, self.num_features, self.normalize)
        accumulator = self._accumulator()
        if not self._is_folded:  # the rows may be held, and the caller may overwrite its tensors
            rows = Rows(rows.features.clone(), rows.target.clone())
        # Processes take samples in turn, as in DistributedSampler.
        world_size = _world_size()
        first = self._num_seen * world_size + (dist.get_rank() if world_size > 1 else 0)
        accumulator.add(rows, index=checked.index(range(first, first + len(target) * world_size, world_size)))
        self._set(accumulator)
        self.num_seen = [torch.tensor([self._num_seen + len(target)])]

    def compute(self) -> Tensor:
        """Return LogME of the samples of all processes since the last reset."""
        self._evidence = self._accumulator().evidence(self.fit_intercept)
        self._accuracy = None
        return self._evidence.score

    def evidence(self) -> Evidence:
        """Return the evidence behind :meth:`compute`, synchronised between processes in the same way."""
        self.compute()  # cached by torchmetrics until the next update
        assert self._evidence is not None
        return self._evidence

    def accuracy(self) -> Accuracy:
        """Return the leave-one-out accuracy of the evidence's linear head, synchronised as in :meth:`compute`.

        It is measured on all samples, or on a random subset of 2048. This method also does the work of :meth:`compute`,
        so call it first if you need both.

        Example:
            >>> import torch
            >>> from lightning_logme import LogME
            >>> metric = LogME("regression", num_features=2)
            >>> features = torch.tensor([[0.0, 1], [1, 1], [2, 1], [3, 1], [4, 1]])
            >>> metric.update(features, torch.tensor([1.0, 3, 5, 7, 9]))
            >>> accuracy = metric.accuracy()
            >>> accuracy.metric, round(accuracy.value, 3)
            ('r2', 1.0)
        """
        if self._computed is None or self._accuracy is None:
            self._is_measuring = True
            try:
                with self.sync_context(self.dist_sync_fn, should_sync=self.sync_on_compute):
                    accumulator = self._accumulator()
                    evidence, spectrum = accumulator.decomposed(self.fit_intercept)
                    self._accuracy = measure(accumulator.sample(), evidence, spectrum, self.task)
                    self._evidence = replace(evidence, temperature=self._accuracy.temperature)
            finally:
                self._is_measuring = False
            self._computed = self._evidence.score  # type: ignore[assignment]  # torchmetrics annotates None
        return self._accuracy

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the states of another metric, or a dict of its states."""
        super().merge_state(incoming_state)
        # Otherwise torchmetrics returns the value from before the merge, or warns that ``update`` was not called.
        self._computed = None
        self._update_count += 1

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Add incoming states, for ``forward`` and ``merge_state``."""
        # States of version 0.1 have neither lists nor options.
        missing: dict[str, Any] = {name: [] for name in _LISTS} | {"options": self.options}
        incoming_state = {**missing, **incoming_state}
        for name in ("subset_features", "subset_target"):  # later rows overwrite these
            incoming_state[name] = [rows.clone() for rows in incoming_state[name]]
        if self._num_seen <= SAMPLE_SIZE:  # every row is still kept, so all can get new indices
            shift = index_of(sum(incoming_state["num_seen"], torch.zeros(1, dtype=torch.int64)) * _world_size())
            self.held_index = [index + shift for index in self.held_index]
            self.subset_index = [index + shift for index in self.subset_index]
        super()._reduce_states(incoming_state)
        self._set(self._accumulator())
        self.num_seen = [torch.tensor([self._num_seen])]

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any = None) -> None:
        """Replace the states by their sums over all processes."""
        group, accumulator = process_group or self.process_group, self._accumulator()
        for name, value in vars(self._sums(accumulator)).items():
            setattr(self, name, functools.reduce(torch.add, dist_sync_fn(value, group=group)))
        if self._is_measuring and _world_size() > 1:
            everyone = gathered_subset(accumulator.chosen(), SAMPLE_SIZE, group)
            accumulator.subset = Subset(SAMPLE_SIZE)
            accumulator.choose(everyone)
        self._set_rows(accumulator)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load copies of states whose shapes fit, and discard results that were computed before."""
        sums = vars(Moments.zeros(self.num_features, self.num_outputs, "meta")).items()
        states = [(name, tuple(value.shape), state_dict.get(prefix + name)) for name, value in sums]
        held = state_dict.get(prefix + "held_features", ())
        states += [("held_features", (len(rows), self.num_features), rows) for rows in held]
        for name, shape, loaded in states:
            if loaded is not None and tuple(loaded.shape) not in (shape, ()):
                raise ValueError(
                    f"the state {name!r} must have shape {shape}, got {tuple(loaded.shape)}; load it into a metric "
                    "with the same num_features and number of outputs."
                )
        self._computed = self._evidence = self._accuracy = None
        if prefix + "count" in state_dict:  # states of version 0.1 have no lists
            state_dict = {**{prefix + name: [] for name in _LISTS}, **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, value in self.metric_state.items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else [each.clone() for each in value])

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one or several values; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

    def moments(self) -> Moments:
        """Return the sums over the samples of this process, or of all processes once they are synchronised."""
        return self._sums(self._accumulator())

    def _sums(self, accumulator: Accumulator) -> Moments:
        sums = accumulator.moments().get(0)
        return Moments.zeros(self.num_features, self.num_outputs, self.count.device) if sums is None else sums

    @property
    def _num_seen(self) -> int:
        """The number of samples so far, including ignored ones."""
        return sum(int(number) for number in self.num_seen)

    @property
    def _is_folded(self) -> bool:
        return self.gram.ndim > 0

    def _accumulator(self) -> Accumulator:
        """Return an accumulator of the states. Between two calls, the states are either held rows or sums."""
        accumulator = Accumulator(self.task, self.num_features, self.num_outputs, self.count.device)
        if self._is_folded:
            accumulator.sums = {0: Moments(**{field.name: getattr(self, field.name) for field in fields(Moments)})}
        held = zip(self.held_features, self.held_target, self.held_index, strict=True)
        accumulator.held = [IndexedRows(Rows(features, target), index) for features, target, index in held]
        subset = zip(self.subset_features, self.subset_target, self.subset_index, strict=True)
        groups = [IndexedRows(Rows(features, target), index) for features, target, index in subset]
        accumulator.subset = Subset(SAMPLE_SIZE, *groups[:1])
        accumulator.choose(groups[1:])
        accumulator.segments = {0}
        accumulator.num_samples = sum(map(len, self.held_features))
        return accumulator

    def _set(self, accumulator: Accumulator) -> None:
        """Write an accumulator into the states. Rows become sums as soon as there are D samples."""
        if accumulator.sums or accumulator.num_samples >= self.num_features:
            for name, value in vars(accumulator.moments()[0]).items():
                setattr(self, name, value)
        self._set_rows(accumulator)

    def _set_rows(self, accumulator: Accumulator) -> None:
        """Write the rows of an accumulator into the states."""
        for name, groups in (("held", accumulator.held), ("subset", accumulator.chosen())):
            setattr(self, f"{name}_features", [group.rows.features for group in groups])
            setattr(self, f"{name}_target", [group.rows.target for group in groups])
            setattr(self, f"{name}_index", [group.index for group in groups])

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Let torch move the states between devices, but keep their precision."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(moments_device(fn(tensor.new_empty(0)).device))

        self._computed = self._evidence = self._accuracy = None
        return super()._apply(move, (*exclude_state, *_ON_CPU))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(state: Tensor, group: Any = None) -> list[Tensor]:
    """Return the sum over all processes, as a list of one tensor: torchmetrics adds up the items of a list."""
    # A copy, because metrics of one MetricCollection share their states.
    total = state.clone()
    dist.all_reduce(total, group=group)
    return [total]
