"""Labelled samples of another task, on which a module that is trained on its own is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_logme.arguments import check_options, check_task, positive_or_none
from lightning_logme.batch import TargetSpec, check_target, find_mask
from lightning_logme.collector import Collector
from lightning_logme.distributed import reason_of
from lightning_logme.forward import Forward, call, copied
from lightning_logme.moments import Task
from lightning_logme.packages import LightningModule, Trainer
from lightning_logme.samples import Portion, Samples
from lightning_logme.sources import Sources
from lightning_logme.taps import NotCalledError
from lightning_logme.undisturbed import same_generators, undisturbed

# Seconds of a pass after which there is a bar.
_PATIENCE = 2.0


class Probe:
    """A labelled loader of a target task, for :class:`~lightning_logme.LogMECallback`.

    The samples are those of :func:`~lightning_logme.rank_backbones`: of a map-style data set all that its sampler would
    give, each once, in a fixed random order stratified by class; anything else is taken as it comes, the same in every
    process, which keeps its share. Batches go through the hooks of the module and its data module, such as
    ``on_after_batch_transfer``, as those of validation do; labels are read before.

    Args:
        dataloader: gives batches with labels; can be iterated over again and again.
        task: "binary", "multiclass", "multilabel" or "regression".
        num_classes: K of "multiclass", or labels of "multilabel"; None counts the labels of data sets that have them at
            hand (``targets``, ``labels``, the tensors of a TensorDataset, also through Subset).
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor; None finds them in
            the usual forms.
        forward: callable(module, batch) that runs the module, where it is not to be called as module(inputs) or
            module(**batch).
        limit_batches: how many batches to take; None takes all.
        ignore_index: rows with this label are left out; has no part in regression.

    Raises:
        ValueError: an argument does not fit.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_logme import LogMECallback, Probe
        >>> data = TensorDataset(torch.randn(40, 8), torch.randn(40))
        >>> callback = LogMECallback(probes={"ratings": Probe(DataLoader(data), task="regression")})
    """

    # No dataclass: LightningCLI's parser takes those for groups of options, and nests no loader in them.
    def __init__(
        self,
        dataloader: DataLoader | Iterable[Any],
        *,
        task: Task = "multiclass",
        num_classes: int | None = None,
        target: TargetSpec = None,
        forward: Forward | None = None,
        limit_batches: int | None = None,
        ignore_index: int | None = -100,
    ) -> None:
        check_task(task)
        check_target(target)
        if forward is not None and not callable(forward):
            raise ValueError(f"forward must be callable(module, batch) or None, got {forward!r}.")
        limit_batches = positive_or_none("limit_batches", limit_batches)
        ignore_index = None if task == "regression" else ignore_index
        check_options(task, ignore_index, fit_intercept=False)
        self.dataloader = dataloader
        self.task: Task = task
        self.num_classes = positive_or_none("num_classes", num_classes)
        self.target = target
        self.forward = forward
        self.limit_batches = limit_batches
        self.ignore_index = ignore_index


class PreparedProbe:
    """A probe whose first batch has been read, so that what is wrong with its labels is known before training starts.

    Raises:
        ValueError: there are no labels, or they do not fit the task, or the number of classes is not known; the message
            names the probe.
    """

    def __init__(self, name: str, probe: Probe) -> None:
        self._name = name
        self._probe = probe
        try:
            with same_generators():
                self._samples = Samples(probe.dataloader, probe.task, probe.target, seed=0, repeatable=False)
                self._num_outputs = self._samples.num_outputs(probe.num_classes, probe.ignore_index, tokens=True)
        except Exception as error:
            raise ValueError(f"probes[{name!r}]: {reason_of(error)}") from error

    def collect(
        self,
        trainer: Trainer,
        module: LightningModule,
        sources: Sources,
        limit_batches: int | None = None,
        **options: Any,
    ) -> Collector:
        """Run the module on this process's share of the samples.

        Args:
            trainer: whose device, precision and number of processes it is.
            module: is left as it was.
            sources: attached to the module.
            limit_batches: fewer than the probe's own.
            options: of the :class:`~lightning_logme.collector.Collector`.

        Returns:
            The metrics; what fails on the way is broken in them.
        """
        probe = self._probe
        collector = Collector(
            probe.task,
            self._num_outputs,
            ignore_index=probe.ignore_index,
            rank=trainer.global_rank,
            world=trainer.world_size,
            **options,
        )
        try:
            with undisturbed(module, getattr(trainer, "datamodule", None)):
                for portion in self._portions(trainer, limit_batches or probe.limit_batches):
                    errors = self._add(collector, portion, trainer, module, sources)
                    for source, error in errors.items():
                        collector.broken.setdefault(source, reason_of(error))
                        if isinstance(error, NotCalledError):
                            collector.uncalled.add(source)
                    if collector.broken.keys() >= set(sources.names):
                        break
        except Exception as error:
            collector.broken[None] = reason_of(error)
        finally:
            sources.stop()
        return collector

    def _add(
        self, collector: Collector, portion: Portion, trainer: Trainer, module: LightningModule, sources: Sources
    ) -> dict[str | None, Exception]:
        """Add the rows of a batch; returns the errors of sources that failed."""
        batch = _prepared(portion.batch, trainer, module)
        sources.start()
        with trainer.precision_plugin.forward_context():
            if sources.taps:
                (self._probe.forward or self._call)(module, batch)
            rows, failed = sources.rows(module, batch, portion.target, find_mask(batch), self._probe.task)
        places = range(portion.start, portion.start + len(portion.target))
        return {**failed, **collector.add(0, rows, portion.target, places)}

    def _call(self, module: LightningModule, batch: Any) -> Any:
        return call(module, batch, self._probe.target)

    def _portions(self, trainer: Trainer, limit_batches: int | None) -> Iterator[Portion]:
        """This process's batches, with a bar if they take their time."""
        rank, world = trainer.global_rank, trainer.world_size
        shown = rank == 0 and getattr(trainer.progress_bar_callback, "is_enabled", False)
        with tqdm(desc=f"probe {self._name}", delay=_PATIENCE, leave=False, disable=not shown, unit=" batches") as bar:
            for index, portion in enumerate(self._samples.portions(0, None, rank, world)):
                if limit_batches is not None and rank + index * world >= limit_batches:  # batches are dealt out in turn
                    return
                yield portion
                bar.update()


def _prepared(batch: Any, trainer: Trainer, module: LightningModule) -> Any:
    """A batch as a validation loop would give it to the module, which may write to it."""
    batch = trainer.precision_plugin.convert_input(copied(batch))
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
