"""The call that ranks backbones."""

from __future__ import annotations

import itertools
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from lightning_logme.features.calling import Forward
from lightning_logme.features.isolation import same_generators
from lightning_logme.features.labels import TargetSpec, check_target
from lightning_logme.features.pooling import Pooling
from lightning_logme.features.sampling import Samples
from lightning_logme.features.selection import AUTO, Head, Selection
from lightning_logme.ranking.candidate import Candidate, Transform
from lightning_logme.ranking.collect import Rules
from lightning_logme.ranking.race import Race
from lightning_logme.ranking.report import Report
from lightning_logme.ranking.result import Ranking
from lightning_logme.ranking.resume import Store
from lightning_logme.ranking.standing import standing
from lightning_logme.scores.scoring import Scoring
from lightning_logme.scores.subset import SAMPLE_SIZE
from lightning_logme.utilities.checks import Task, check_flags, check_options, check_task, integer, positive_or_none
from lightning_logme.utilities.compat import AnyLogger, Fabric, Logger

Source = nn.Module | Callable[[], nn.Module]


def rank_backbones(
    candidates: Mapping[str, Source] | Iterable[tuple[str, Source]],
    dataloader: Any,
    *,
    task: Task = "multiclass",
    num_classes: int | None = None,
    head: Head | Mapping[str, Head] = AUTO,
    layers: Sequence[str] | Mapping[str, Sequence[str]] = (),
    layer_mean: bool = False,
    target: TargetSpec = None,
    pooling: Pooling | Mapping[str, Pooling | Mapping[str, Pooling]] = "auto",
    forward: Forward | Mapping[str, Forward | None] | None = None,
    transforms: Mapping[str, Transform] | None = None,
    fit_intercept: bool = False,
    ignore_index: int | None = -100,
    normalize: bool = False,
    race: bool = True,
    seed: int = 0,
    resume_from: str | os.PathLike[str] | None = None,
    accelerator: str = "auto",
    devices: int | str | list[int] = 1,
    strategy: Any = "auto",
    precision: Any = None,
    logger: Logger | Iterable[Logger] | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank backbones by the log of maximum evidence (LogME) of their features for a target, without fine-tuning.

    All candidates see the same samples in the same order. After 256 samples (four a class, where that is more), and
    every time their number has doubled, those that trail the leader by more than chance allows are dropped: see
    ``race``. Nothing is computed twice, for moments add up. LogME is that of You et al., ICML 2021, see
    :func:`lightning_logme.functional.logme`; the standard errors are a block jackknife's over 8 random blocks of the
    samples, paired between candidates.

    Args:
        candidates: by name, a module, or a factory that makes one: then one at a time is in memory, made anew every
            round from a seeded generator. Modules that are passed in are left as they were.
        dataloader: gives batches with labels. Of a map-style data set, samples are drawn without replacement from all
            that its sampler would give, stratified by class where the data set has its labels at hand (``targets``,
            ``labels``, the tensors of a TensorDataset; also through Subset). Anything else is streamed: it must give
            the same batches every time it is iterated over.
        task: "binary", "multiclass", "multilabel" or "regression".
        num_classes: K of "multiclass", or labels of "multilabel"; None takes it from labels at hand.
        head: where the feature is: "auto" runs one batch, and takes the input of the linear layer or 1 × 1 convolution
            that makes the module's output; where there is none, as in an encoder without a head, the output itself. A
            dotted name names the module whose input it is; several names stand for several heads, whose inputs are
            concatenated; None takes the output. One for all, or a mapping by candidate. The table says which it was.
        layers: dotted names of modules whose output is scored as well, or glob patterns such as "encoder.layer.*"; one
            list for all, or a mapping by candidate. Each layer has a row of its own, ``<candidate>/<layer>``, and a
            candidate stays in the race as long as one of its rows does.
        layer_mean: score the mean of the layers' pooled features, too, for each candidate with layers.
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor; None finds them in
            the usual forms.
        pooling: how tokens (N, T, D) and maps (N, C, H, W) become (N, D), as in
            :class:`~lightning_logme.LogMECallback`; one for all, or a mapping by candidate, whose values may be
            mappings by layer.
        forward: callable(model, batch) -> output, for modules that are not called as model(inputs) or
            model(**batch); one for all, or a mapping by candidate.
        transforms: by candidate, callable(batch) -> batch: the preprocessing of its own, on the CPU. Labels are read
            before it.
        fit_intercept: centre features and targets first. The papers do not.
        ignore_index: samples, or tokens, with this label are left out; not used in regression.
        normalize: scale each sample's features to length 1 first. The papers do not; on real tasks it ranks better.
        race: drop candidates early. Among equally good ones, the chance that any is dropped in the whole race is at
            most 5 %. If False all see all samples.
        seed: of the order of the samples, and of factories.
        resume_from: folder in which the results of candidates that are through are kept, and from which a ranking that
            was killed takes them. Candidates whose features or options have changed start anew, with a warning.
        accelerator: as in :class:`lightning.fabric.Fabric`.
        devices: the same; several devices give the same result as one.
        strategy: the same; one that keeps a whole model on every device, such as "ddp".
        precision: the same.
        logger: one or several of Lightning's: curves while it runs, then the table and the figures.
        progress: whether to show bars, and which candidates are dropped.

    Returns:
        A :class:`~lightning_logme.Ranking`. A candidate that fails has its error in its row, and does not stop the
        others; Ctrl-C ends the race, and what is known is returned.

    Raises:
        ValueError: an argument does not fit; the first batch has no labels, or wrong ones; the loader gives candidates
            different labels.
        RuntimeError: every candidate failed.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_logme import rank_backbones
        >>> labels = torch.arange(300) % 3
        >>> images = torch.nn.functional.one_hot(labels, 12).float() + 0.5 * torch.randn(300, 12)
        >>> ranking = rank_backbones(
        ...     {"all": torch.nn.Identity(), "useless": lambda: torch.nn.Linear(1, 4)},
        ...     DataLoader(TensorDataset(images, labels), batch_size=64),
        ...     transforms={"useless": lambda batch: batch[0][:, -1:]},
        ...     accelerator="cpu",
        ...     progress=False,
        ... )
        >>> ranking.best, [row.name for row in ranking.rows if row.tied_with_best]
        ('all', ['all'])
    """
    check_task(task)
    check_target(target)
    check_flags(layer_mean=layer_mean, fit_intercept=fit_intercept, normalize=normalize, race=race, progress=progress)
    num_classes = positive_or_none("num_classes", num_classes)
    seed = integer("seed", seed)
    ignore_index = None if task == "regression" else ignore_index
    check_options(task, ignore_index, fit_intercept)
    if resume_from is not None and not isinstance(resume_from, (str, os.PathLike)):
        raise ValueError(f"resume_from must be the path of a folder or None, got {resume_from!r}.")
    if logger is not None and not isinstance(logger, (AnyLogger, Iterable)):
        raise ValueError(f"logger must be a Lightning logger, or several, got {logger!r}.")
    several: Any = [] if logger is None else [logger] if isinstance(logger, AnyLogger) else logger
    pairs = _pairs(candidates)
    names = [name for name, _ in pairs]
    heads = _by_candidate("head", head, names, AUTO)
    if isinstance(layers, Iterator):  # which could be read for one candidate only
        layers = tuple(layers)
    layer_lists = _by_candidate("layers", layers, names, ())
    poolings = _by_candidate("pooling", pooling, names, "auto")
    forwards = _by_candidate("forward", forward, names, None, check=True)
    several_transforms = _by_candidate("transforms", transforms, names, None, check=True)
    entries = []
    for name, source in pairs:
        own = layer_lists[name]
        is_mean = layer_mean and bool(own or not any(layer_lists.values()))
        selection = Selection(heads[name], own, is_mean, pooling=poolings[name])
        entries.append(Candidate(name, source, selection, forwards[name], several_transforms[name], target))
    for name, other in itertools.permutations(names, 2):
        if layer_lists[name] and other.startswith(f"{name}/"):
            raise ValueError(f"candidates: {other!r} could be the row of a layer of {name!r}; rename one of them.")
    with same_generators():
        samples = Samples(dataloader, task, target, seed)
        if samples.number is not None:
            samples.check_number(samples.number)
        num_outputs = samples.num_outputs(num_classes, ignore_index)
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)
    scoring = Scoring(task, num_outputs, ignore_index, fit_intercept, normalize, sample_size=SAMPLE_SIZE)
    rules = Rules(scoring, race and len(entries) > 1, seed)
    return pickle.loads(fabric.launch(partial(_run, entries, samples, rules, resume_from, list(several), progress)))


def _run(
    candidates: list[Candidate],
    samples: Samples,
    rules: Rules,
    resume_from: str | os.PathLike[str] | None,
    loggers: list[Logger],
    progress: bool,
    fabric: Fabric,
) -> bytes:
    """Do what every process does. The ranking is pickled, as it may come from a process that ends."""
    store = None
    if resume_from is not None:
        # Not whether there is a race: a candidate has the same results in a race and without one.
        options = {**samples.fingerprint(), **vars(rules.scoring), "seed": rules.seed}
        options["precision"] = fabric.strategy.precision.precision
        store = Store(resume_from, {**options, "rounds": next(samples.rounds(rules.scoring.num_outputs))})
    first = fabric.is_global_zero
    report = Report(progress and first, loggers if first else [])
    race = Race(fabric, candidates, samples, rules, store, report)
    race.run()
    if len(race.failed) == len(candidates) and not any(progress.rounds for progress in race.progress.values()):
        causes = "; ".join(f"{name}: {cause}" for name, cause in race.failed.items())
        raise RuntimeError(f"every candidate failed: {causes}")
    if race.interrupted and first:
        warnings.warn("the ranking was interrupted: it holds what was known by then.", stacklevel=2)
    ranking = standing(race)
    with suppress(KeyboardInterrupt):  # Ctrl-C while drawing must not lose the ranking
        report.finish(ranking)
    return pickle.dumps(ranking)


def _pairs(candidates: Any) -> list[tuple[str, Source]]:
    if isinstance(candidates, (Mapping, nn.ModuleDict)):
        candidates = candidates.items()
    elif isinstance(candidates, nn.Module) or not isinstance(candidates, Iterable):
        raise ValueError(
            "candidates must be a mapping from names to modules or factories, as in {'resnet50': model}, got "
            f"{type(candidates).__name__}."
        )
    pairs = list(candidates)
    if not pairs:
        raise ValueError("candidates is empty: pass at least one module or factory, as in {'resnet50': model}.")
    seen = set()
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str) or not pair[0]:
            raise ValueError(
                "candidates must be a mapping from names (strings) to modules or factories, or pairs of both, got "
                f"{pair!r:.60}."
            )
        name, source = pair
        if name in seen:
            raise ValueError(f"candidates has two entries named {name!r}; give each a name of its own.")
        seen.add(name)
        if not callable(source):
            raise ValueError(
                f"candidates[{name!r}] must be a torch.nn.Module or a callable that makes one, got "
                f"{type(source).__name__}."
            )
    return pairs


def _by_candidate(argument: str, value: Any, names: list[str], default: Any, check: bool = False) -> dict[str, Any]:
    """Return one value for each candidate, from a mapping or from one for all; ``check`` that they can be called."""
    if not isinstance(value, Mapping):
        values = dict.fromkeys(names, value)
    else:
        unknown = [name for name in value if name not in names]
        if unknown:
            raise ValueError(
                f"{argument} names {', '.join(map(repr, unknown))}, and there are only the candidates "
                f"{', '.join(map(repr, names))}."
            )
        values = {name: value.get(name, default) for name in names}
    for name in names if check else ():
        if values[name] is not None and not callable(values[name]):
            raise ValueError(f"{argument} of {name!r} must be callable or None, got {values[name]!r}.")
    return values
