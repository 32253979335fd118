"""The call that ranks backbones."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from lightning_logme.arguments import check_flags, check_task, integer, positive_or_none
from lightning_logme.attach import AUTO, Head, checked_head
from lightning_logme.batch import TargetSpec, check_target
from lightning_logme.forward import Forward
from lightning_logme.moments import Task
from lightning_logme.packages import AnyLogger, Fabric, Logger
from lightning_logme.pooling import Pooling, check_pooling
from lightning_logme.ranking.candidate import Candidate, Transform
from lightning_logme.ranking.progress import Store
from lightning_logme.ranking.race import Race, Rules
from lightning_logme.ranking.report import Report
from lightning_logme.ranking.result import Ranking
from lightning_logme.ranking.standing import standing
from lightning_logme.samples import Samples
from lightning_logme.undisturbed import same_generators

Source = nn.Module | Callable[[], nn.Module]


def rank_backbones(
    candidates: Mapping[str, Source] | Iterable[tuple[str, Source]],
    dataloader: Any,
    *,
    task: Task = "multiclass",
    num_classes: int | None = None,
    head: Head | Mapping[str, Head] = AUTO,
    target: TargetSpec = None,
    pooling: Pooling | Mapping[str, Pooling] = "auto",
    forward: Forward | Mapping[str, Forward | None] | None = None,
    transforms: Mapping[str, Transform] | None = None,
    fit_intercept: bool = False,
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
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor; None finds them in
            the usual forms.
        pooling: how tokens (N, T, D) and maps (N, C, H, W) become (N, D), as in
            :class:`~lightning_logme.LogMECallback`; one for all, or a mapping by candidate.
        forward: callable(model, batch) -> output, for modules that are not called as model(inputs) or
            model(**batch); one for all, or a mapping by candidate.
        transforms: by candidate, callable(batch) -> batch: the preprocessing of its own, on the CPU. Labels are read
            before it.
        fit_intercept: centre features and targets first. The papers do not.
        normalize: scale each sample's features to length 1 first. The papers do not; on real tasks it ranks better.
        race: drop candidates early. Among equally good ones, the chance that any is dropped in the whole race is at
            most 5 %. If False all see all samples.
        seed: of the order of the samples, and of factories.
        resume_from: folder in which finished moments are kept, and from which a ranking that was killed goes on.
            Candidates whose weights, features or options have changed start anew, with a warning.
        accelerator: as in :class:`lightning.fabric.Fabric`.
        devices: the same; several give the result of one.
        strategy: the same; one that keeps a whole model on every device, such as "ddp".
        precision: the same.
        logger: one or several of Lightning's: curves while it runs, then the table and the figures.
        progress: whether to show bars, and who is dropped.

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
    check_flags(fit_intercept=fit_intercept, normalize=normalize, race=race, progress=progress)
    num_classes = positive_or_none("num_classes", num_classes)
    seed = integer("seed", seed)
    if resume_from is not None and not isinstance(resume_from, (str, os.PathLike)):
        raise ValueError(f"resume_from must be the path of a folder or None, got {resume_from!r}.")
    pairs = _pairs(candidates)
    names = [name for name, _ in pairs]
    options = {
        "head": _by_candidate("head", head, names, AUTO),
        "pooling": _by_candidate("pooling", pooling, names, "auto"),
        "forward": _by_candidate("forward", forward, names, None),
        "transform": _by_candidate("transforms", transforms, names, None),
    }
    for name in names:
        check_pooling(options["pooling"][name])
        options["head"][name] = checked_head(options["head"][name])
        for argument, values in (("forward", options["forward"]), ("transforms", options["transform"])):
            _check(argument, name, values[name], callable, "callable")
    entries = [
        Candidate(
            name,
            source,
            target=target,
            normalize=normalize,
            **{option: values[name] for option, values in options.items()},
        )
        for name, source in pairs
    ]
    with same_generators():
        samples = Samples(dataloader, task, target, seed)
        if samples.number is not None:
            samples.check_number(samples.number)
        num_outputs = samples.num_outputs(num_classes)
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)
    rules = Rules(num_outputs, fit_intercept, race and len(entries) > 1, seed)
    if logger is not None and not isinstance(logger, (AnyLogger, Iterable)):
        raise ValueError(f"logger must be a Lightning logger, or several, got {logger!r}.")
    several: Any = [] if logger is None else [logger] if isinstance(logger, AnyLogger) else logger
    loggers: list[Logger] = list(several)
    parcel = fabric.launch(
        partial(
            _run,
            candidates=entries,
            samples=samples,
            rules=rules,
            resume_from=resume_from,
            loggers=loggers,
            progress=progress,
        )
    )
    return pickle.loads(parcel)


def _run(
    fabric: Fabric,
    candidates: list[Candidate],
    samples: Samples,
    rules: Rules,
    resume_from: str | os.PathLike[str] | None,
    loggers: list[Logger],
    progress: bool,
) -> bytes:
    """What every process does. Pickled, as the ranking may come from a process that ends, and shares its tensors."""
    store = None
    if resume_from is not None:
        store = Store(
            resume_from,
            {
                **samples.fingerprint(),
                "task": samples.task,
                "num_outputs": rules.num_outputs,
                "rounds": next(samples.rounds(rules.num_outputs)),
                "fit_intercept": rules.fit_intercept,
                "precision": fabric.strategy.precision.precision,
            },
        )
    first = fabric.is_global_zero
    report = Report(progress and first, loggers if first else [])
    race = Race(fabric, candidates, samples, rules, store, report)
    race.run()
    if not race.evidence and not race.interrupted:
        raise RuntimeError(
            "every candidate failed: " + "; ".join(f"{name}: {cause}" for name, cause in race.failed.items())
        )
    if race.interrupted and first:
        warnings.warn("the ranking was interrupted: it holds what was known by then.", stacklevel=2)
    ranking = standing(race)
    with suppress(KeyboardInterrupt):  # of one who will not wait for a picture
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


def _check(argument: str, name: str, value: Any, right: Callable[[Any], bool], what: str) -> None:
    if value is not None and not right(value):
        raise ValueError(f"{argument} of {name!r} must be {what} or None, got {value!r}.")


def _by_candidate(argument: str, value: Any, names: list[str], default: Any) -> dict[str, Any]:
    """One value for each candidate, from a mapping or from one for all."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    unknown = [name for name in value if name not in names]
    if unknown:
        raise ValueError(
            f"{argument} names {', '.join(map(repr, unknown))}, and there are only the candidates "
            f"{', '.join(map(repr, names))}."
        )
    return {name: value.get(name, default) for name in names}
