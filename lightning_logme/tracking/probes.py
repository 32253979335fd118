"""When probes are run, and what is done with their results."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from lightning_logme.features.extractor import HEAD, LAYER_MEAN, Extractor
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.history import History, is_key
from lightning_logme.tracking.probe import PreparedProbe, Probe
from lightning_logme.tracking.strategy import is_sharded
from lightning_logme.utilities.compat import Callback, LightningModule, Trainer, is_one_of, rank_zero_warn
from lightning_logme.utilities.distributed import first_reason, gathered, together

Every = int | Literal["checkpoint"]


class Probes:
    """The probes of a callback.

    Args:
        probes: by name, loaders or :class:`~lightning_logme.Probe`.
        every: at the first of every so many validations, or "checkpoint" for whenever a checkpoint is saved.

    Raises:
        ValueError: a name or an option does not fit.
    """

    def __init__(self, probes: Mapping[str, Any] | None, every: Every) -> None:
        if not (isinstance(every, str) and every == "checkpoint") and (type(every) is not int or every < 1):
            raise ValueError(f"probe_every must be a positive integer or 'checkpoint', got {every!r}.")
        self.every = every
        self._probes = _named(probes)
        self._prepared: dict[str, PreparedProbe] = {}
        self._validations = 0
        self._is_rehearsed = False
        self._saved_at: int | None = None  # step of the last checkpoint that they were run for

    def __bool__(self) -> bool:
        return bool(self._probes)

    def prepare(self, trainer: Trainer, owner: Callback, name: str) -> None:
        """Read the first batch of each probe, for a new run.

        Raises:
            ValueError: a probe has no labels, or wrong ones, in one process or more; or the strategy is one under
                which processes must make as many forward passes as each other; or a monitor waits for a probe that
                runs only when a checkpoint is saved.
        """
        if not self:
            return
        self._validations, self._is_rehearsed, self._saved_at = 0, False, None
        self._check_run(trainer, owner, name)
        with together(trainer.world_size == 1):
            self._prepared = {name: PreparedProbe(name, probe) for name, probe in self._probes.items()}

    def _check_run(self, trainer: Any, owner: Callback, name: str) -> None:
        """Raise, or warn of, what in a run does not go with probes."""
        if is_sharded(trainer):
            raise ValueError(
                f"probes cannot be run under {type(trainer.strategy).__name__}, whose processes must make as many "
                "forward passes as each other; save checkpoints, and score them afterwards with score_checkpoints."
            )
        monitors = [callback for callback in trainer.callbacks if self._is_monitored_by(callback, name)]
        if monitors and self.every not in (1, "checkpoint"):
            rank_zero_warn(
                f"{type(monitors[0]).__name__} monitors a probe, and with probe_every={self.every} it takes the value "
                "of an earlier validation for a new one."
            )
        if trainer.state.fn != "fit":
            return
        if monitors and self.every == "checkpoint":
            raise ValueError(
                f"probe_every='checkpoint': {type(monitors[0]).__name__} monitors {monitors[0].monitor!r}, which is "
                "known only while a checkpoint is being saved; write probe_every=1."
            )
        if self.every == "checkpoint" and all(
            getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks
        ):
            rank_zero_warn(
                "probe_every='checkpoint': no ModelCheckpoint saves checkpoints with the state of callbacks "
                "(save_weights_only=False), so the probes will not be run."
            )
        before = trainer.callbacks[: trainer.callbacks.index(owner)] if trainer.enable_validation else trainer.callbacks
        if any(is_one_of(callback, ("WeightAveraging",)) for callback in before):
            rank_zero_warn(
                "probes will see the weights in training and not their average, which is there during validation only: "
                "put LogMECallback before WeightAveraging in the Trainer's callbacks."
            )

    def _is_monitored_by(self, callback: Any, name: str) -> bool:
        monitor = getattr(callback, "monitor", None)
        return any(is_key(monitor, name, f"/{probe}") for probe in self._probes)

    def check_names(self, extractor: Extractor) -> None:
        """Raise ``ValueError`` where two results would be logged under one key."""
        taken = set(extractor.names)
        for name in self._probes:
            keys = {f"{name}/{source}" if source else name for source in [HEAD, *extractor.names]}
            if keys & taken:
                raise ValueError(
                    f"probes has the name {name!r}, and {sorted(keys & taken)[0]!r} is logged for a layer or another "
                    "probe as well; give it another name."
                )
            taken |= keys

    def rehearse(self, trainer: Trainer, module: LightningModule, extractor: Extractor) -> None:
        """Run one batch of each probe before training, once a run, so that mistakes surface early.

        Raises:
            ValueError: a probe cannot be scored, in one process or more: raised in all.
        """
        if self._is_rehearsed:
            return
        self._is_rehearsed = True
        guess = None
        with together(trainer.world_size == 1):
            for name, prepared in self._prepared.items():
                first, uncalled = prepared.run(trainer, module, extractor, Scoring(), limit_batches=trainer.world_size)
                if HEAD in uncalled and extractor.is_head_guessed and extractor.layers:
                    guess = first.errors.pop(HEAD)
                if first.errors:
                    cause = next(iter(first.errors.values())).rstrip(".")
                    text = f"probes[{name!r}]: its first batch cannot be scored: {cause}."
                    if (None in first.errors or uncalled) and "Probe(forward=" not in cause:
                        text += (
                            " The module is called as module(inputs) or module(**batch); if that is not how it runs, "
                            "give Probe(forward=callable(module, batch))."
                        )
                    raise ValueError(text)
        guess = first_reason(gathered(trainer.world_size == 1, guess))
        if guess is not None:
            extractor.drop_guess()
            rank_zero_warn(f"probes: '{extractor.layers[-1]}' stands for the head: {guess}")

    def is_due(self, trainer: Trainer, is_saving: bool) -> bool:
        """Return whether the probes are to be run now, at a validation or while a checkpoint is being saved."""
        if not self._prepared:
            return False
        if self.every == "checkpoint":
            if not is_saving:
                return trainer.state.fn != "fit"  # no checkpoint will be saved
            is_new = self._saved_at != trainer.global_step
            self._saved_at = trainer.global_step
            return is_new
        self._validations += 1
        return (self._validations - 1) % self.every == 0

    def run(
        self,
        trainer: Trainer,
        module: LightningModule,
        extractor: Extractor,
        history: History,
        scoring: Scoring,
        is_saving: bool = False,
    ) -> None:
        """Score all probes; a result is NaN, with a warning, where something fails. All processes call this in step.

        Args:
            trainer: of the run.
            module: is run, and left as it was.
            extractor: of its features.
            history: for the results.
            scoring: of the callback.
            is_saving: whether a checkpoint is being saved.
        """
        scored = list(dict.fromkeys([HEAD, *extractor.names]))
        head = HEAD if extractor.head is not None else extractor.layers[-1]
        few = int(getattr(trainer, "fast_dev_run", 0)) * trainer.world_size
        for name, prepared in self._prepared.items():
            started = time.perf_counter()
            current, _ = prepared.run(trainer, module, extractor, scoring, few or None)
            seconds = time.perf_counter() - started
            for source, reason in current.errors.items():
                key = f"{history.name}/{name}" + (f"/{source}" if source else "")
                warnings.warn(f"{key} is NaN, after an error: {reason}", stacklevel=2)
            history.record(trainer, module, current, scored, seconds, probe=name, head=head, is_saving=is_saving)


def _named(probes: Mapping[str, Any] | None) -> dict[str, Probe]:
    """Return the probes by name, a plain loader as a probe with classes."""
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
