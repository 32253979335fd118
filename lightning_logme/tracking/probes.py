"""The probes of a callback: when they run, and how their results are recorded."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from lightning_logme.features.extractor import HEAD, LAYER_MEAN, Extractor
from lightning_logme.scores.scoring import Scoring
from lightning_logme.tracking.history import History
from lightning_logme.tracking.keys import is_key
from lightning_logme.tracking.probe import PreparedProbe, Probe
from lightning_logme.tracking.strategy import is_sharded
from lightning_logme.utilities.compat import Callback, LightningModule, Trainer, is_one_of, rank_zero_warn
from lightning_logme.utilities.distributed import first_reason, gathered, together

Every = int | Literal["checkpoint"]


class Probes:
    """The probes of a callback.

    Args:
        probes: loaders or :class:`~lightning_logme.Probe` objects, by name.
        every: k runs them at the first of every k validations, "checkpoint" for each checkpoint that is saved.
        accuracy: whether accuracy is measured. Test samples need it.

    Raises:
        ValueError: a name or an option does not fit.
    """

    def __init__(self, probes: Mapping[str, Any] | None, every: Every, accuracy: bool = True) -> None:
        if not (isinstance(every, str) and every == "checkpoint") and (type(every) is not int or every < 1):
            raise ValueError(f"probe_every must be a positive integer or 'checkpoint', got {every!r}.")
        self.every = every
        self._probes = _by_name(probes)
        for name, probe in self._probes.items():
            if probe.test is not None and not accuracy:
                raise ValueError(
                    f"probes[{name!r}].test: test samples only serve to measure accuracy, and accuracy=False turns it "
                    "off; drop one of the two."
                )
        self._prepared: dict[str, PreparedProbe] = {}
        self._validations = 0
        self._is_rehearsed = False
        self._saved_at: int | None = None  # step of the last checkpoint for which the probes ran

    def __bool__(self) -> bool:
        return bool(self._probes)

    def prepare(self, trainer: Trainer, owner: Callback, name: str) -> None:
        """Read the first batch of each probe, for a new run.

        Raises:
            ValueError: in at least one process, a probe has no labels or wrong ones; the strategy needs the same number
                of forward passes in all processes; or a monitor uses a probe that runs only while a checkpoint is
                saved.
        """
        if not self:
            return
        self._validations, self._is_rehearsed, self._saved_at = 0, False, None
        self._check_run(trainer, owner, name)
        with together(trainer.world_size == 1):
            self._prepared = {name: PreparedProbe(name, probe) for name, probe in self._probes.items()}

    def _check_run(self, trainer: Any, owner: Callback, name: str) -> None:
        """Raise or warn if the settings of a run do not suit the probes."""
        if is_sharded(trainer):
            raise ValueError(
                f"probes: they cannot run under {type(trainer.strategy).__name__}, where all processes must run the "
                "same number of forward passes; save checkpoints, and score them later with score_checkpoints."
            )
        monitors = [callback for callback in trainer.callbacks if self._is_monitored_by(callback, name)]
        if monitors and self.every not in (1, "checkpoint"):
            rank_zero_warn(
                f"probe_every={self.every}: {type(monitors[0]).__name__} monitors a probe, and in validations without "
                "the probes it sees an old value; write probe_every=1 to avoid that."
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
                "(save_weights_only=False), so the probes will not run."
            )
        before = trainer.callbacks[: trainer.callbacks.index(owner)] if trainer.enable_validation else trainer.callbacks
        if any(is_one_of(callback, ("WeightAveraging",)) for callback in before):
            rank_zero_warn(
                "probes: they will run on the current weights, not on their average, which is in place only during "
                "validation; put LogMECallback before WeightAveraging in the Trainer's callbacks."
            )

    def _is_monitored_by(self, callback: Any, name: str) -> bool:
        monitor = getattr(callback, "monitor", None)
        return any(is_key(monitor, name, probe) for probe in self._probes)

    def check_names(self, extractor: Extractor) -> None:
        """Raise ``ValueError`` if two results would be logged under one key."""
        taken = set(extractor.names)
        for name in self._probes:
            keys = {f"{name}/{source}" if source else name for source in [HEAD, *extractor.names]}
            if keys & taken:
                raise ValueError(
                    f"probes: the name {name!r} leads to the key {sorted(keys & taken)[0]!r}, which is logged for a "
                    "layer or another probe as well; rename the probe."
                )
            taken |= keys

    def rehearse(self, trainer: Trainer, module: LightningModule, extractor: Extractor) -> None:
        """Run one batch of each probe before training, once in a run, so that mistakes surface early.

        Raises:
            ValueError: a probe cannot be scored in at least one process. All processes raise it.
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
                where = ""
                if prepared.has_test and not first.errors and guess is None:
                    first, uncalled = prepared.run(
                        trainer, module, extractor, Scoring(), limit_batches=trainer.world_size, is_test=True
                    )
                    where = ".test"
                if first.errors:
                    cause = next(iter(first.errors.values())).rstrip(".")
                    text = f"probes[{name!r}]{where}: its first batch cannot be scored: {cause}."
                    if (None in first.errors or uncalled) and "Probe(forward=" not in cause:
                        text += (
                            " The module is called as module(inputs) or module(**batch); if that is not how it runs, "
                            "give Probe(forward=callable(module, batch))."
                        )
                    raise ValueError(text)
        guess = first_reason(gathered(trainer.world_size == 1, guess))
        if guess is not None:
            extractor.drop_guess()
            rank_zero_warn(f"probes: the layer '{extractor.layers[-1]}' is scored instead of the head: {guess}")

    def is_due(self, trainer: Trainer, is_saving: bool) -> bool:
        """Return whether the probes run now, at a validation or while a checkpoint is being saved."""
        if not self._prepared:
            return False
        if self.every == "checkpoint":
            if not is_saving:
                return trainer.state.fn != "fit"  # outside a fit no checkpoint is saved
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
        """Run all probes and record results. After an error, warn and record NaN. All processes call this together."""
        scored = list(dict.fromkeys([HEAD, *extractor.names]))
        head = HEAD if extractor.head is not None else extractor.layers[-1]
        limit = int(getattr(trainer, "fast_dev_run", 0)) * trainer.world_size
        for name, prepared in self._prepared.items():
            started = time.perf_counter()
            current, _ = prepared.run(trainer, module, extractor, scoring, limit or None)
            results = current.results(trainer.strategy.root_device, alone=trainer.world_size == 1)
            if prepared.has_test and any(results.values()):  # without a linear head, nothing can be predicted
                results = prepared.test(trainer, module, extractor, scoring, results, limit or None)
            seconds = time.perf_counter() - started
            for source, reason in current.errors.items():
                key = f"{history.name}/{name}" + (f"/{source}" if source else "")
                warnings.warn(f"{key} is NaN, after an error: {reason}", stacklevel=2)
            history.record(
                trainer, module, current, results, scored, seconds, probe=name, head=head, is_saving=is_saving
            )


def _by_name(probes: Mapping[str, Any] | None) -> dict[str, Probe]:
    """Return the probes by name. A plain loader becomes a multiclass probe."""
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
                f"probes: the name {name!r} cannot be used; give a non-empty string other than {LAYER_MEAN!r} and "
                "'dataloader_idx_…', which are keys of other results."
            )
    return {name: probe if isinstance(probe, Probe) else Probe(probe) for name, probe in probes.items()}
