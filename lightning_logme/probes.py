"""When probes are run, and what is done with what they show."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_logme.journal import Journal
from lightning_logme.probe import PreparedProbe, Probe
from lightning_logme.sources import HEAD, LAYER_MEAN, Sources
from lightning_logme.taps import Pooling

Every = int | Literal["checkpoint"]


class Probes:
    """The probes of a callback.

    Args:
        probes: by name, loaders or :class:`~lightning_logme.Probe`.
        every: at the first of every so many validations, or "checkpoint".

    Raises:
        ValueError: a name or an option cannot be one.
    """

    def __init__(self, probes: Mapping[str, Any] | None, every: Every) -> None:
        if every != "checkpoint" and (type(every) is not int or every < 1):
            raise ValueError(f"probe_every must be a positive integer or 'checkpoint', got {every!r}.")
        self._probes = _named(probes)
        self._every = every
        self._prepared: dict[str, PreparedProbe] = {}
        self._validations = 0

    def __bool__(self) -> bool:
        return bool(self._probes)

    def prepare(self) -> None:
        """Read the first batch of each, for a new run."""
        self._validations = 0
        self._prepared = {name: PreparedProbe(name, probe) for name, probe in self._probes.items()}

    def check_names(self, sources: Sources) -> None:
        """Raise ``ValueError`` where a probe and a layer would be logged under one key."""
        for name in self._probes:
            if name in sources.names:
                raise ValueError(f"probes has the name {name!r}, under which a layer is logged; name it otherwise.")

    def rehearse(
        self, trainer: Trainer, pl_module: LightningModule, sources: Sources, pooling: Pooling, name: str
    ) -> None:
        """One batch of each, so that who waits for the first validation need not wait to learn of a mistake."""
        for probe, prepared in self._prepared.items():
            collector = prepared.collect(trainer, pl_module, sources, pooling, limit_batches=trainer.world_size)
            if collector.broken is not None:
                rank_zero_warn(f"{name}/{probe} will be NaN unless this changes: {collector.broken}")

    def run(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        sources: Sources,
        pooling: Pooling,
        journal: Journal,
        position: tuple[int, int] | None,
        **options: Any,
    ) -> None:
        """Score all of them, if they are due; what fails is NaN, with a warning.

        Args:
            trainer: of the run.
            pl_module: is run, and left as it was.
            sources: of its features.
            pooling: to one vector a sample.
            journal: for the results.
            position: see :meth:`Journal.enter`.
            options: of :class:`~lightning_logme.collector.Collector`.
        """
        if not self._prepared or not self._are_due(trainer, journal.name):
            return
        scored = list(dict.fromkeys([HEAD, *sources.names]))
        for name, prepared in self._prepared.items():
            collector = prepared.collect(trainer, pl_module, sources, pooling, **options)
            if collector.broken is not None:
                warnings.warn(f"{journal.name}/{name} is NaN, after an error: {collector.broken}", stacklevel=2)
            journal.enter(trainer, pl_module, collector, scored, probe=name, position=position)

    def _are_due(self, trainer: Trainer, name: str) -> bool:
        if self._every != "checkpoint":
            self._validations += 1
            return (self._validations - 1) % self._every == 0
        if trainer.state.fn != TrainerFn.FITTING:  # nothing is saved, and who validates wants to see
            return True
        # Keys that are known only when the probes have run.
        unknown = tuple(f"{prefix}/{probe}" for probe in self._probes for prefix in (name, f"{name}_gain"))
        due = [_saves(callback, trainer, unknown) for callback in trainer.checkpoint_callbacks]
        return bool(trainer.strategy.broadcast(any(due)))


def _named(probes: Mapping[str, Any] | None) -> dict[str, Probe]:
    """By name, a plain loader as a probe with classes."""
    if probes is None:
        return {}
    if not isinstance(probes, Mapping):
        raise ValueError(
            f"probes must be a mapping from names to loaders or Probes, as in {{'news': loader}}, got "
            f"{type(probes).__name__}."
        )
    for name in probes:
        if not isinstance(name, str) or not name or name == LAYER_MEAN or name.startswith("dataloader_idx_"):
            raise ValueError(
                f"probes has the name {name!r}; a name must be a string that is not empty, and neither {LAYER_MEAN!r} "
                "nor 'dataloader_idx_…', which are logged for something else."
            )
    return {name: probe if isinstance(probe, Probe) else Probe(probe) for name, probe in probes.items()}


def _saves(callback: Any, trainer: Trainer, unknown: tuple[str, ...]) -> bool:
    """Whether a ModelCheckpoint saves, or has just saved, the weights that are being validated.

    Where that depends on a key that is not known yet, such as those that begin with one of ``unknown``, it may.
    """
    if not hasattr(callback, "check_monitor_top_k"):
        return True  # of a kind that Lightning does not bring
    if callback._last_global_step_saved == trainer.global_step > 0:  # every_n_train_steps saves before validation
        return True
    deferred = getattr(callback, "_defer_save_until_validation", False)
    every = callback._every_n_epochs
    if not deferred and (every < 1 or (trainer.current_epoch + 1) % every != 0):
        return False
    if callback.monitor is None or callback.save_top_k == 0 or callback.save_last:
        return callback.save_top_k != 0 or bool(callback.save_last)
    current = None if callback.monitor.startswith(unknown) else trainer.callback_metrics.get(callback.monitor)
    return current is None or bool(callback.check_monitor_top_k(trainer, current))
