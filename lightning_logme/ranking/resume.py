"""The folder from which a ranking is resumed: results of candidates that finished or were dropped."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_logme.ranking.candidate import Candidate
from lightning_logme.scores.accumulator import Accumulator
from lightning_logme.scores.evidence import Evidence

# Relative tolerance for features in a later process: other devices, threads and libraries round differently.
_TOLERANCE = 1e-3


@dataclass
class Score:
    """The score of one source of a candidate at the end of a round.

    Attributes:
        logme: LogME of the samples so far.
        gain: the gain of these samples.
        replicates: for each block of the jackknife, the score without that block.
        accuracy: the leave-one-out accuracy: see :class:`~lightning_logme.Accuracy`.
        accuracy_replicates: for each block of the accuracy, the accuracy without that block.
    """

    logme: float
    gain: float
    replicates: list[float]
    accuracy: float
    accuracy_replicates: list[float]


@dataclass
class Round:
    """The results of a candidate at the end of a round.

    Attributes:
        seen: number of samples read so far.
        num_samples: number of samples scored so far; tokens count one by one.
        labels: digest of the labels of all samples read so far.
        scores: the scores, by source of features.
    """

    seen: int
    num_samples: int
    labels: int
    scores: dict[str, Score]


@dataclass(frozen=True, eq=False)
class FirstSamples:
    """The first samples, which show later whether a network and a data set are still the same.

    Attributes:
        labels: (n, …), on the CPU.
        features: (n, D) by source, for each sample or each token that counts; float32, on the CPU.
    """

    labels: Tensor
    features: dict[str, Tensor]

    def difference(self, now: FirstSamples) -> str | None:
        """Return how the first samples differ now, or None if they do not. The batch sizes need not be equal.

        Features depend on the weights, the samples and their preprocessing.
        """
        common = min(len(self.labels), len(now.labels))
        if not torch.equal(self.labels[:common].double(), now.labels[:common].double()):
            return "the labels of the first samples changed"
        if self.features.keys() != now.features.keys():
            return "its layers changed"
        for source, then in self.features.items():
            rows = min(len(then), len(now.features[source]))
            then, features = then[:rows], now.features[source][:rows]
            atol = _TOLERANCE * float(then.abs().mean())
            if features.shape != then.shape or not torch.allclose(features, then, _TOLERANCE, atol, equal_nan=True):
                return "its features of the first samples changed: weights, samples or preprocessing differ"
        return None


@dataclass(eq=False)
class Progress:
    """The state of a candidate between two rounds.

    Attributes:
        rounds: the finished rounds.
        evidence: evidence of the last round, by source.
        accumulators: sums over the samples so far, by source, on the CPU; empty if no round follows.
        first: the first samples, if they are needed.
        heads: names of the modules whose input is the feature; empty if it is the output.
        constant: sources whose features are the same for every sample.
        num_parameters: number of parameters of the module.
        seconds: time spent so far.
        peak_memory: peak accelerator memory in bytes; None on a CPU.
        is_complete: whether all samples have been seen.
    """

    rounds: list[Round] = field(default_factory=list)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    accumulators: dict[str, Accumulator] = field(default_factory=dict)
    first: FirstSamples | None = None
    heads: list[str] | None = None
    constant: list[str] = field(default_factory=list)
    num_parameters: int | None = None
    seconds: float = 0.0
    peak_memory: int | None = None
    is_complete: bool = False

    @property
    def seen(self) -> int:
        return self.rounds[-1].seen if self.rounds else 0

    @property
    def num_samples(self) -> int:
        return self.rounds[-1].num_samples if self.rounds else 0


class Store:
    """A folder with the results of candidates that finished or were dropped.

    Args:
        folder: its path; it is created if it does not exist.
        options: options on which all results depend. A file with different options is not used.
    """

    def __init__(self, folder: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._options = dict(options)

    def load(self, candidate: Candidate) -> Progress | None:
        """Return the results of a candidate. If they cannot be used, warn why and return None."""
        path = self._path(candidate)
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            values, options = saved["progress"], saved["options"]
            values["rounds"] = [
                Round(**{**one, "scores": {source: Score(**score) for source, score in one["scores"].items()}})
                for one in values["rounds"]
            ]
            values["evidence"] = {source: Evidence(**one) for source, one in values["evidence"].items()}
            values["first"] = FirstSamples(**values["first"])
            progress = Progress(**values)
        except Exception as error:
            warn_of_restart(candidate, f"{path} cannot be read ({type(error).__name__}: {error})")
            return None
        now = self._all_options(candidate)
        for option in {**now, **options}:
            if now.get(option) != options.get(option):
                warn_of_restart(candidate, f"{option} was {options.get(option)} and is {now.get(option)}")
                return None
        return progress

    def save(self, candidate: Candidate, progress: Progress) -> None:
        """Write the results of a candidate. If the process is killed while it writes, the old file stays."""
        path = self._path(candidate)
        unfinished = path.with_suffix(".unfinished")
        try:
            torch.save({"options": self._all_options(candidate), "progress": asdict(progress)}, unfinished)
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:  # a full disk must not end the ranking
            warnings.warn(f"resume_from: {path} could not be written ({error}).", stacklevel=2)

    def _all_options(self, candidate: Candidate) -> dict[str, str]:
        selection = {name: _as_text(value) for name, value in vars(candidate.selection).items()}
        own = {"forward": _as_text(candidate.forward), "transform": _as_text(candidate.transform)}
        return {name: str(value) for name, value in {**self._options, **selection, **own}.items()}

    def _path(self, candidate: Candidate) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", candidate.name)[:60]
        return self._folder / f"{readable}-{hashlib.sha1(candidate.name.encode()).hexdigest()[:8]}.pt"


def warn_of_restart(candidate: Candidate, cause: str) -> None:
    """Warn that the results in the folder are not used."""
    warnings.warn(f"resume_from: {candidate.name!r} starts again, because {cause}.", stacklevel=2)


def _as_text(value: Any) -> str:
    """Return a value as text; a callable by its name, because its address differs between processes."""
    if isinstance(value, Mapping):
        return str({key: _as_text(one) for key, one in value.items()})
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else str(value)
