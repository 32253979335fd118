"""The function that ranks backbones."""

from __future__ import annotations

import itertools
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from torch import nn

from lightning_logme.features.calling import Forward
from lightning_logme.features.isolation import same_generators
from lightning_logme.features.labels import TargetSpec, check_target
from lightning_logme.features.pooling import Pooling
from lightning_logme.features.sampling import Samples
from lightning_logme.features.selection import AUTO, Head, Selection
from lightning_logme.ranking.candidate import Candidate, Transform
from lightning_logme.ranking.collect import Rules
from lightning_logme.ranking.model import with_head
from lightning_logme.ranking.race import Race
from lightning_logme.ranking.report import Report
from lightning_logme.ranking.result import RankBy, Ranking
from lightning_logme.ranking.resume import Store
from lightning_logme.ranking.standing import standing
from lightning_logme.scores.scoring import Scoring
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
    rank_by: RankBy = "logme",
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
    """Rank backbones by the log of maximum evidence (LogME) of their features for a target, without any training.

    LogME is that of You et al., ICML 2021: see :func:`lightning_logme.functional.logme`.
    :class:`~lightning_logme.Ranking` explains how to read the result.

    **Samples.** All candidates see the same samples, in the same order and the same blocks. From a map-style data set,
    samples are drawn without replacement from all that the loader's sampler would give, in an order set by ``seed``.
    They are stratified by class if the data set exposes its labels (``targets``, ``labels``, the tensors of a
    TensorDataset; also through Subset). Any other loader is a stream, which is read again for each candidate and round,
    and must give the same batches each time. Shuffle a stream beforehand, because blocks and early rounds follow its
    order. With labels (N, T), each token whose label is not ``ignore_index`` counts as one sample.

    **The race.** The first round has 256 samples, or four per class if that is more. Each further round doubles the
    number. After each round, a candidate is dropped if all its rows are significantly behind the leader. The others
    continue where they stopped: moments add up, so no features are computed twice. Among equally good
    candidates, the chance that any is dropped in the whole race is at most 5 %. The difference from the leader is
    measured in paired standard errors, and compared with a quantile of Student's t with seven degrees of freedom. The
    5 % are divided among all pairs of rows and all rounds (Bonferroni). A dropped candidate keeps its last score
    and number of samples. Evidence grows with samples, so compare only scores with the same number of samples. With
    ``rank_by="accuracy"``, the race compares accuracies instead of scores, in the same way.

    **Error bars.** Standard errors are those of a block jackknife: the samples form eight random blocks, and each block
    is left out once. All candidates see the same blocks, so their differences are paired, and far more certain than the
    error bars of single candidates suggest. Rows that are not significantly behind the best are ``tied``. If samples
    are stratified, the error bars do not include the variation of the class counts. A standard error is itself
    uncertain by about a quarter. Above D = 256 it comes from the 256 leading directions of the features. A class that
    occurs in only one block adds nothing to the standard error.

    The accuracy (R², F1) is measured on all samples, or on a random subset of 2048, which is the same for all
    candidates. Its standard error comes from 32 random blocks of these samples, so more than 2048 samples do not reduce
    it. It holds the linear head fixed. Differences of accuracies are also paired, and compared with the same quantiles.

    **Remarks.** The last column of the table gives a remark if a row is significantly behind in LogME, but its accuracy
    is higher than the leader's, or lower by at most .005 or by at most two paired standard errors. Then the difference
    in nats is certain, but it hardly matters for a linear classifier, or the samples do not show that it does.

    **Failures.** If a candidate runs out of memory, cannot be loaded or gives NaN, its row shows the error. The others
    go on. Ctrl-C ends the race, and the results so far are returned.

    **Memory.** Each device holds the whole model of a candidate. Each row in the race needs eight D × D matrices of
    float64 in main memory (105 MB at D = 1280), or its features while there are fewer than 8 D samples.

    Args:
        candidates: modules, or factories that build one, by name. A factory is called again in each round, with the
            same seed, and only one of the built modules is in memory at a time. Modules that you pass are left as they
            were.
        dataloader: a loader of batches with labels.
        task: "binary", "multiclass", "multilabel" or "regression".
        num_classes: K for "multiclass", or the number of labels for "multilabel". None counts them if the data set
            exposes its labels.
        head: which feature is scored. "auto" runs one batch, and scores the input of the linear layer or 1 × 1
            convolution that makes the module's output. If there is none, as in an encoder without a head, it scores the
            output. A dotted name selects the module whose input is scored. With several names, the inputs of these
            modules are concatenated. None scores the output. Give one value for all, or a mapping by candidate. The
            table shows what was scored.
        layers: dotted names of modules whose output is scored as well, or glob patterns such as "encoder.layer.*": one
            list for all, or a mapping by candidate. Each layer has a row of its own, ``<candidate>/<layer>``. A
            candidate is dropped only if all its rows are behind.
        layer_mean: score the mean of the layers' pooled features as well, for each candidate with layers.
        target: where the labels are in a batch: a key, an index, or a callable(batch) -> Tensor. None takes the second
            item of a tuple, or an entry such as "labels".
        pooling: how tokens (N, T, D) and maps (N, C, H, W) become vectors (N, D), as in
            :class:`~lightning_logme.LogMECallback`: one for all, or a mapping by candidate, whose values may be
            mappings by layer.
        forward: callable(model, batch) -> output: one for all, or a mapping by candidate. None calls model(inputs), or
            model(**batch) with the entries of a mapping that the model accepts, without the labels.
        transforms: a callable(batch) -> batch for each candidate that needs preprocessing of its own on the CPU, such
            as a tokenizer. Labels are read before it.
        fit_intercept: centre features and targets first. The LogME papers do not.
        ignore_index: label of samples, or tokens, that are left out. Not used in regression.
        normalize: scale each sample's features to length 1 first. The LogME papers do not, but it often ranks better.
        rank_by: "logme" or "accuracy": what the race compares, what orders the rows, and what ``best``, ``tied``,
            ``scores`` and the figures go by. "accuracy" means R² in regression and F1 in "multilabel".
        race: drop candidates early. With False, all candidates see all samples.
        seed: seed of the order of the samples, and of the factories.
        resume_from: folder that keeps the results of candidates that finished or were dropped. If a ranking was killed,
            run it again: it reads these results, and computes only the other candidates. A candidate starts again, with
            a warning, if its options, or its features of the first samples, have changed.
        accelerator: as in :class:`lightning.fabric.Fabric`.
        devices: as in Fabric. Several devices give the same result as one.
        strategy: as in Fabric. It must keep a whole model on each device, as "ddp" does.
        precision: as in Fabric.
        logger: one Lightning logger, or several. They get the curves during the race, and at the end scores, curves and
            table on one page, as an image. TensorBoard shows the curves under Custom Scalars, and the table also under
            Text.
        progress: whether to show progress bars, and to report dropped candidates.

    Returns:
        A :class:`~lightning_logme.Ranking`, even if candidates failed or the race was interrupted.

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
    if rank_by not in get_args(RankBy):
        raise ValueError(f"rank_by must be 'logme' or 'accuracy', got {rank_by!r}.")
    if resume_from is not None and not isinstance(resume_from, (str, os.PathLike)):
        raise ValueError(f"resume_from must be the path of a folder or None, got {resume_from!r}.")
    if logger is not None and not isinstance(logger, (AnyLogger, Iterable)):
        raise ValueError(f"logger must be one Lightning logger or several, got {logger!r}.")
    loggers: Any = [] if logger is None else [logger] if isinstance(logger, AnyLogger) else logger
    pairs = _pairs(candidates)
    names = [name for name, _ in pairs]
    heads = _by_candidate("head", head, names, AUTO)
    if isinstance(layers, Iterator):  # an iterator can be read only once, for one candidate
        layers = tuple(layers)
    layer_lists = _by_candidate("layers", layers, names, ())
    poolings = _by_candidate("pooling", pooling, names, "auto")
    forwards = _by_candidate("forward", forward, names, None, check=True)
    transform_by_name = _by_candidate("transforms", transforms, names, None, check=True)
    entries = []
    for name, source in pairs:
        own = layer_lists[name]
        is_mean = layer_mean and bool(own or not any(layer_lists.values()))
        selection = Selection(heads[name], own, is_mean, pooling=poolings[name])
        entries.append(Candidate(name, source, selection, forwards[name], transform_by_name[name], target))
    for name, other in itertools.permutations(names, 2):
        if layer_lists[name] and other.startswith(f"{name}/"):
            raise ValueError(f"candidates: {other!r} could be the row of a layer of {name!r}; rename one of them.")
    with same_generators():
        samples = Samples(dataloader, task, target, seed)
        if samples.number is not None:
            samples.check_number(samples.number)
        num_outputs = samples.num_outputs(num_classes, ignore_index)
    fabric = Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)
    scoring = Scoring(task, num_outputs, ignore_index, fit_intercept, normalize)
    rules = Rules(scoring, rank_by, race and len(entries) > 1, seed)
    result = fabric.launch(partial(_run, entries, samples, rules, resume_from, list(loggers), progress))
    ranking, heads_found = pickle.loads(result)
    builders = {
        entry.name: partial(with_head, entry, found, samples.first, rules, fabric)
        for entry in entries
        if (found := heads_found[entry.name]) is not None
    }
    return replace(ranking, _builders=builders)


def _run(
    candidates: list[Candidate],
    samples: Samples,
    rules: Rules,
    resume_from: str | os.PathLike[str] | None,
    loggers: list[Logger],
    progress: bool,
    fabric: Fabric,
) -> bytes:
    """Run the ranking in one process. Return the ranking, and the names of the heads that were found, by candidate.

    Both are pickled, because this process may be a child that ends.
    """
    store = None
    if resume_from is not None:
        # ``race`` is left out, because a candidate's results are the same with and without a race.
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
        warnings.warn("the ranking was interrupted: it holds the results so far.", stacklevel=2)
    ranking = standing(race)
    with suppress(KeyboardInterrupt):  # Ctrl-C while drawing must not lose the ranking
        report.finish(ranking)
    return pickle.dumps((ranking, {name: progress.heads for name, progress in race.progress.items()}))


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
        raise ValueError("candidates is empty; give at least one module or factory, as in {'resnet50': model}.")
    seen = set()
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str) or not pair[0]:
            raise ValueError(
                "candidates must be a mapping from names (strings) to modules or factories, or pairs of the two, got "
                f"{pair!r:.60}."
            )
        name, source = pair
        if name in seen:
            raise ValueError(f"candidates has two entries named {name!r}; give each a name of its own.")
        seen.add(name)
        if not callable(source):
            raise ValueError(
                f"candidates[{name!r}] must be a torch.nn.Module or a callable that builds one, got "
                f"{type(source).__name__}."
            )
    return pairs


def _by_candidate(argument: str, value: Any, names: list[str], default: Any, check: bool = False) -> dict[str, Any]:
    """Return the value of each candidate, given one for all or a mapping. ``check`` demands callables or None."""
    if not isinstance(value, Mapping):
        values = dict.fromkeys(names, value)
    else:
        unknown = [name for name in value if name not in names]
        if unknown:
            raise ValueError(
                f"{argument} names {', '.join(map(repr, unknown))}, but the only candidates are "
                f"{', '.join(map(repr, names))}."
            )
        values = {name: value.get(name, default) for name in names}
    for name in names if check else ():
        if values[name] is not None and not callable(values[name]):
            raise ValueError(f"{argument} of {name!r} must be callable or None, got {values[name]!r}.")
    return values
