"""When probes are run, and what is done with what they show."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from lightning_logme.distributed import first_reason, gathered, is_one_of, is_sharded
from lightning_logme.journal import Journal, is_key
from lightning_logme.packages import Callback, LightningModule, Trainer, rank_zero_warn
from lightning_logme.probe import PreparedProbe, Probe
from lightning_logme.sources import HEAD, LAYER_MEAN, Sources

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
        if not (isinstance(every, str) and every == "checkpoint") and (type(every) is not int or every < 1):
            raise ValueError(f"probe_every must be a positive integer or 'checkpoint', got {every!r}.")
        self._probes = _named(probes)
        self._every = every
        self._prepared: dict[str, PreparedProbe] = {}
        self._name = ""
        self._validations = 0
        self._rehearsed = False

    def __bool__(self) -> bool:
        return bool(self._probes)

    def prepare(self, trainer: Trainer, owner: Callback, name: str) -> None:
        """Read the first batch of each, for a new run.

        Raises:
            ValueError: a probe has no labels, or wrong ones, in one process or more; or the strategy is one under
                which processes must make as many forward passes.
        """
        if not self:
            return
        self._validations, self._rehearsed = 0, False
        self._name = name
        self._check_run(trainer, owner)
        self._prepared, error = {}, None
        try:
            self._prepared = {name: PreparedProbe(name, probe) for name, probe in self._probes.items()}
        except ValueError as caught:
            error = caught
        reason = first_reason(gathered(trainer.world_size == 1, None if error is None else str(error)))
        if reason is not None:  # in all processes, or one would wait for another
            raise ValueError(reason) from error

    def _check_run(self, trainer: Any, owner: Callback) -> None:
        """Say what in a run does not go with probes."""
        if is_sharded(trainer):
            raise ValueError(
                f"probes cannot be run under {type(trainer.strategy).__name__}, whose processes must make as many "
                "forward passes as each other; save checkpoints, and score them afterwards with score_checkpoints."
            )
        monitors = [callback for callback in trainer.callbacks if self._monitors(callback)]
        if monitors and self._every not in (1, "checkpoint"):
            rank_zero_warn(
                f"{type(monitors[0]).__name__} monitors a probe, and with probe_every={self._every} will take what it "
                "sees in between, the value of an earlier validation, for a new one."
            )
        if trainer.state.fn != "fit":
            return
        if self._every == "checkpoint" and not trainer.checkpoint_callbacks:
            rank_zero_warn("probe_every='checkpoint', and no ModelCheckpoint saves any: the probes will not be run.")
        before = trainer.callbacks[: trainer.callbacks.index(owner)] if trainer.enable_validation else trainer.callbacks
        if any(is_one_of(callback, ("WeightAveraging",)) for callback in before):
            rank_zero_warn(
                "probes will see the weights in training and not their average, which is there during validation only: "
                "put LogMECallback before WeightAveraging in the Trainer's callbacks."
            )

    def check_names(self, sources: Sources) -> None:
        """Raise ``ValueError`` where two things would be logged under one key."""
        taken = set(sources.names)
        for name in self._probes:
            keys = {f"{name}/{source}" if source else name for source in [HEAD, *sources.names]}
            if keys & taken:
                raise ValueError(
                    f"probes has the name {name!r}, and {sorted(keys & taken)[0]!r} is logged for a layer or another "
                    "probe as well; name it otherwise."
                )
            taken |= keys

    def rehearse(self, trainer: Trainer, pl_module: LightningModule, sources: Sources) -> None:
        """Run one batch of each probe before training, once a run, so that mistakes surface early.

        Raises:
            ValueError: a probe cannot be scored, in one process or more: raised in all.
        """
        if self._rehearsed or not self._prepared:
            return
        self._rehearsed = True
        reason, guess = None, None
        for name, prepared in self._prepared.items():
            collector = prepared.collect(trainer, pl_module, sources, limit_batches=trainer.world_size)
            if HEAD in collector.uncalled and sources.is_head_guessed and sources.layers:
                guess = collector.broken.pop(HEAD)
            if reason is None and collector.broken:
                cause = next(iter(collector.broken.values())).rstrip(".")
                reason = f"probes[{name!r}]: its first batch cannot be scored: {cause}."
                if (None in collector.broken or collector.uncalled) and "Probe(forward=" not in cause:
                    reason += (
                        " The module is called as module(inputs) or module(**batch); if that is not how it runs, give "
                        "Probe(forward=callable(module, batch))."
                    )
        everyone = gathered(trainer.world_size == 1, (reason, guess))
        reason, guess = (first_reason(reasons) for reasons in zip(*everyone, strict=True))
        if reason is not None:
            raise ValueError(reason)
        if guess is not None:
            sources.drop_guess()
            rank_zero_warn(f"probes: '{sources.layers[-1]}' stands for the head: {guess}")

    def run(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        sources: Sources,
        journal: Journal,
        position: tuple[int, int] | None,
        **options: Any,
    ) -> None:
        """Score all of them, if they are due; what fails is NaN, with a warning.

        Args:
            trainer: of the run.
            pl_module: is run, and left as it was.
            sources: of its features.
            journal: for the results.
            position: see :meth:`Journal.enter`.
            options: of :class:`~lightning_logme.collector.Collector`.
        """
        if not self._prepared or not self._are_due(trainer):
            return
        scored = list(dict.fromkeys([HEAD, *sources.names]))
        head = HEAD if sources.head is not None else sources.layers[-1]
        for name, prepared in self._prepared.items():
            few = int(getattr(trainer, "fast_dev_run", 0)) * trainer.world_size
            collector = prepared.collect(trainer, pl_module, sources, few or None, **options)
            for source, reason in collector.broken.items():
                key = f"{journal.name}/{name}" + (f"/{source}" if source else "")
                warnings.warn(f"{key} is NaN, after an error: {reason}", stacklevel=2)
            journal.enter(trainer, pl_module, collector, scored, probe=name, head=head, position=position)

    def _are_due(self, trainer: Trainer) -> bool:
        if self._every != "checkpoint":
            self._validations += 1
            return (self._validations - 1) % self._every == 0
        if trainer.state.fn != "fit":  # nothing is saved, and who validates wants to see
            return True
        if any(self._monitors(callback) for callback in getattr(trainer, "callbacks", ())):
            return True  # what they decide is known only when the probes have run
        due = [_saves(callback, trainer) for callback in trainer.checkpoint_callbacks]
        return bool(trainer.strategy.broadcast(any(due)))

    def _monitors(self, callback: Any) -> bool:
        monitor = getattr(callback, "monitor", None)
        return any(is_key(monitor, self._name, f"/{probe}") for probe in self._probes)


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


def _saves(callback: Any, trainer: Trainer) -> bool:
    """Whether a ModelCheckpoint saves, or has just saved, the weights that are being validated.

    Where that depends on a key that is not known yet, it may.
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
    current = trainer.callback_metrics.get(callback.monitor)
    return current is None or bool(callback.check_monitor_top_k(trainer, current))
