"""How far a candidate has come, and how that outlives the process."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_logme.moments import Moments
from lightning_logme.ranking.candidate import Candidate

# Of the features of one batch in a later process: other devices, threads and libraries round otherwise.
_SAME = 1e-3


@dataclass
class Round:
    """A candidate's result at the end of a round.

    Attributes:
        num_samples: seen so far.
        logme: of them.
        gain: of them.
        replicates: the scores with one block left out.
        labels: digest of the labels of all these samples.
    """

    num_samples: int
    logme: float
    gain: float
    replicates: list[float]
    labels: int


@dataclass(eq=False)
class Progress:
    """All that goes on from one round to the next.

    Attributes:
        rounds: finished ones.
        blocks: the moments of the samples seen so far, on the CPU; none once nothing will be added to them.
        num_features: D.
        constant: whether the features are the same for every sample.
        probe: the features and the labels of the first samples.
        fingerprint: of the module.
        num_parameters: of the module.
        heads: the modules whose input is the feature, none for the output of the module.
        seconds: spent.
        peak_memory: bytes of the accelerator's memory, where it has one.
    """

    rounds: list[Round] = field(default_factory=list)
    blocks: list[Moments] = field(default_factory=list)
    num_features: int | None = None
    constant: bool = False
    probe: tuple[Tensor, Tensor] | None = None
    fingerprint: str | None = None
    num_parameters: int | None = None
    heads: list[str] | None = None
    seconds: float = 0.0
    peak_memory: int | None = None

    @property
    def num_samples(self) -> int:
        return self.rounds[-1].num_samples if self.rounds else 0


class Store:
    """A folder with the progress of every candidate.

    Args:
        folder: is made where it does not exist.
        options: what all results depend on: a file that was written under other ones is not used.
    """

    def __init__(self, folder: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._options = dict(options)

    def load(self, candidate: Candidate) -> Progress | None:
        """The progress of a candidate; None, with a warning that names the cause, where it cannot be used."""
        path = self._path(candidate)
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            values, options = saved["progress"], saved["options"]
            values["rounds"] = [Round(**round_) for round_ in values["rounds"]]
            values["blocks"] = [_moments(block, values["num_features"]) for block in values["blocks"]]
            progress = Progress(**values)
        except Exception as error:
            _starts_anew(candidate, f"{path} cannot be read ({type(error).__name__}: {error})")
            return None
        now = self._all_options(candidate)
        for option in {**now, **options}:
            if now.get(option) != options.get(option):
                _starts_anew(candidate, f"{option} was {options.get(option)} and is {now.get(option)}")
                return None
        return progress

    def save(self, candidate: Candidate, progress: Progress) -> None:
        """Write the progress of a candidate; a process that is killed meanwhile leaves the file that there was."""
        values = {
            **vars(progress),
            "rounds": [vars(round_) for round_ in progress.rounds],
            "blocks": [vars(block) for block in progress.blocks],
        }
        path = self._path(candidate)
        unfinished = path.with_suffix(".unfinished")
        try:
            torch.save({"options": self._all_options(candidate), "progress": values}, unfinished)
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:  # a full disk must not end the ranking
            warnings.warn(f"resume_from: {path} could not be written ({error}).", stacklevel=2)

    def _all_options(self, candidate: Candidate) -> dict[str, str]:
        options = {**self._options, "head": candidate.head, "normalize": candidate.normalize}
        options |= {"pooling": _named(candidate.pooling)}
        options |= {"forward": _named(candidate.forward), "transform": _named(candidate.transform)}
        return {name: str(value) for name, value in options.items()}

    def _path(self, candidate: Candidate) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", candidate.name)[:60]
        return self._folder / f"{readable}-{hashlib.sha1(candidate.name.encode()).hexdigest()[:8]}.pt"


def is_same(candidate: Candidate, saved: Progress, fingerprint: str, features: Tensor, labels: Tensor) -> bool:
    """Whether a candidate is the one whose progress was saved; a warning says what has changed.

    Args:
        candidate: as it is now.
        saved: as it was.
        fingerprint: of its weights now.
        features: of the first samples now; they depend on the samples and on everything done to them.
        labels: of the first samples now.
    """
    cause = None
    if saved.fingerprint != fingerprint:
        cause = "its weights or its class are others"
    elif saved.probe is not None:
        number = min(len(labels), len(saved.probe[1]))
        then, labels_then = (part[:number] for part in saved.probe)
        now, atol = features[:number].float().cpu(), _SAME * float(then.abs().mean())
        if not torch.equal(labels[:number], labels_then):
            cause = "the first samples have other labels"
        elif now.shape != then.shape or not torch.allclose(now, then, rtol=_SAME, atol=atol, equal_nan=True):
            cause = "its features of the first samples are others: the samples changed, or what is done to them"
    if cause is not None:
        _starts_anew(candidate, cause)
    return cause is None


def _moments(tensors: Mapping[str, Tensor], num_features: int) -> Moments:
    """Moments as they were saved.

    Raises:
        ValueError: they are no moments of so many features.
    """
    moments = Moments(**tensors)
    expected = vars(Moments.zeros(num_features, len(moments.target_sum), "meta"))
    for name, value in vars(moments).items():
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            raise ValueError(f"{name} is of shape {tuple(value.shape)} and {value.dtype}")
    return moments


def _starts_anew(candidate: Candidate, cause: str) -> None:
    warnings.warn(f"resume_from: {candidate.name!r} starts anew, as {cause}.", stacklevel=2)


def _named(value: Any) -> str:
    """A callable by its name: its address is another one in every process."""
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else str(value)
