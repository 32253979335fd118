"""The two packages that Lightning comes in: `lightning` and `pytorch_lightning`, one code with classes of their own."""

from __future__ import annotations

from typing import Any

import lightning.fabric.loggers
import lightning.pytorch
from lightning.pytorch.utilities import compile as compilation
from torch import nn

# The same class of every package that is installed, for isinstance.
CALLBACKS: tuple[type, ...] = (lightning.pytorch.Callback,)
DATA_MODULES: tuple[type, ...] = (lightning.pytorch.LightningDataModule,)
LOGGERS: tuple[type, ...] = (lightning.fabric.loggers.Logger,)
_UNCOMPILE: dict[type, Any] = {lightning.pytorch.LightningModule: compilation.to_uncompiled}

try:
    import lightning_fabric.loggers
    import pytorch_lightning
    from pytorch_lightning.utilities import compile as other_compilation
except ImportError:
    pass
else:
    CALLBACKS += (pytorch_lightning.Callback,)
    DATA_MODULES += (pytorch_lightning.LightningDataModule,)
    LOGGERS += (lightning_fabric.loggers.Logger,)
    _UNCOMPILE[pytorch_lightning.LightningModule] = other_compilation.to_uncompiled


def to_uncompiled(module: nn.Module) -> nn.Module:
    """A LightningModule as it was before ``torch.compile``."""
    return next(undo for cls, undo in _UNCOMPILE.items() if isinstance(module, cls))(module)
