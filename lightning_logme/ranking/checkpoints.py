"""The ranking of checkpoints of one network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_logme.features.calling import Forward
from lightning_logme.features.labels import TargetSpec
from lightning_logme.features.pooling import Pooling
from lightning_logme.features.selection import AUTO, Head
from lightning_logme.ranking.candidate import Transform, uncompiled_copy
from lightning_logme.ranking.rank import rank_backbones
from lightning_logme.ranking.result import RankBy, Ranking
from lightning_logme.utilities.checks import Task
from lightning_logme.utilities.compat import Logger, plain_name

PathLike = str | os.PathLike[str]


def score_checkpoints(
    module: nn.Module,
    paths: PathLike | Iterable[PathLike],
    dataloader: Any,
    *,
    task: Task = "multiclass",
    num_classes: int | None = None,
    head: Head | Mapping[Any, Head] = AUTO,
    layers: Sequence[str] = (),
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
    resume_from: PathLike | None = None,
    accelerator: str = "auto",
    devices: int | str | list[int] = 1,
    strategy: Any = "auto",
    precision: Any = None,
    logger: Logger | Iterable[Logger] | None = None,
    progress: bool = True,
) -> Ranking:
    """Rank the checkpoints of one network by how well their features suit a target task, without training any.

    The checkpoints are loaded one at a time, into a copy of the module. Samples, error bars and the race work as in
    :func:`~lightning_logme.rank_backbones`. A file that cannot be read, or does not fit the module, becomes a failed
    row.

    Args:
        module: the LightningModule, or any other module, of the checkpoints. It is left as it was.
        paths: Lightning checkpoints or state dicts saved by ``torch.save``, or one folder of ``.ckpt`` files. They are
            read with ``weights_only=True``, so no code in them is executed.
        dataloader: a loader of the target task, as in :func:`~lightning_logme.rank_backbones`.
        head: which feature is scored, as in :func:`~lightning_logme.rank_backbones`: one for all, or a mapping by path.
        task, num_classes, layers, layer_mean, target, pooling, forward, transforms, fit_intercept, ignore_index,
            normalize, rank_by, race, seed, resume_from, accelerator, devices, strategy, precision, logger, progress: as
            in :func:`~lightning_logme.rank_backbones`. The keys of a mapping are paths, as strings.

    Returns:
        A :class:`~lightning_logme.Ranking`. The names of its rows are the given paths.

    Raises:
        ValueError: an argument does not fit, or a folder holds no checkpoint.
        RuntimeError: every checkpoint failed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_logme import score_checkpoints
        >>> labels = torch.arange(300) % 3
        >>> inputs = torch.nn.functional.one_hot(labels, 12).float() + 0.5 * torch.randn(300, 12)
        >>> loader = DataLoader(TensorDataset(inputs, labels), batch_size=64)
        >>> network = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(network.state_dict(), Path(folder, "first.ckpt"))
        ...     torch.save({"state_dict": "broken"}, Path(folder, "second.ckpt"))
        ...     ranking = score_checkpoints(network, folder, loader, accelerator="cpu", progress=False)
        >>> [(Path(row.name).name, row.ended) for row in ranking.rows]
        [('first.ckpt', 'finished'), ('second.ckpt', 'failed')]
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be the torch.nn.Module of the checkpoints, got {module!r:.60}.")
    names = _names(paths)
    if isinstance(head, Mapping):
        head = {os.fspath(path): value for path, value in head.items()}
    candidates = [(name, partial(_loaded, module, name)) for name in names]
    return rank_backbones(
        candidates,
        dataloader,
        task=task,
        num_classes=num_classes,
        head=head,
        layers=layers,
        layer_mean=layer_mean,
        target=target,
        pooling=pooling,
        forward=forward,
        transforms=transforms,
        fit_intercept=fit_intercept,
        ignore_index=ignore_index,
        normalize=normalize,
        rank_by=rank_by,
        race=race,
        seed=seed,
        resume_from=resume_from,
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,
        logger=logger,
        progress=progress,
    )


def _names(paths: PathLike | Iterable[PathLike]) -> list[str]:
    if isinstance(paths, (str, os.PathLike)):
        folder = Path(paths)
        if not folder.is_dir():
            return [os.fspath(paths)]
        found = sorted(str(path) for path in folder.glob("*.ckpt"))
        if not found:
            raise ValueError(f"paths: the folder {str(folder)!r} holds no .ckpt file; give another folder, or files.")
        return found
    names = [os.fspath(path) for path in paths]
    if not names:
        raise ValueError("paths is empty; give the checkpoints to score, or a folder of .ckpt files.")
    return names


def _loaded(module: nn.Module, path: str) -> nn.Module:
    """Return a copy of the module with the weights of a checkpoint.

    Raises:
        ValueError: the file holds no weights, or the module cannot be copied.
        RuntimeError: the weights do not fit the module.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    loaded: Any = uncompiled_copy(module)
    if isinstance(checkpoint, dict) and "state_dict" in checkpoint:
        if hasattr(loaded, "configure_model"):  # as load_from_checkpoint does
            loaded.configure_model()
        if hasattr(loaded, "on_load_checkpoint"):
            loaded.on_load_checkpoint(checkpoint)
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, dict) or not any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(f"{path!r} holds neither a Lightning checkpoint nor a state dict.")
    own = {plain_name(name): name for name in loaded.state_dict()}
    weights = {own.get(plain_name(name), name): value for name, value in checkpoint.items()}
    loaded.load_state_dict(weights, strict=getattr(loaded, "strict_loading", True))
    return loaded
