"""`lightning` and `pytorch_lightning` are one code in two packages, each with classes of its own."""

from __future__ import annotations

import sys
from abc import ABCMeta
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Both packages log through this module.
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn

__all__ = [
    "AnyCallback",
    "AnyDataModule",
    "AnyLogger",
    "Callback",
    "Fabric",
    "LightningModule",
    "Logger",
    "Trainer",
    "callbacks_of_new_trainer",
    "isolate_rng",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "to_uncompiled",
]

_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


def _imported() -> list[str]:
    return [package for package in _FABRIC if package in sys.modules]


def _everywhere(name: str) -> tuple[type, ...]:
    """The class of that name in every imported package."""
    places = [f"{_FABRIC[package]}.loggers" if name == "Logger" else package for package in _imported()]
    return tuple(getattr(sys.modules[place], name) for place in places)


def _any(name: str) -> type:
    """A base class of that class in every package, for ``isinstance``."""

    def covers(_: type, other: type) -> bool:
        return issubclass(other, _everywhere(name))

    return ABCMeta(name, (), {"__subclasshook__": classmethod(covers)})


if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import Logger
    from lightning.fabric.loggers import Logger as AnyLogger
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch import Callback as AnyCallback
    from lightning.pytorch import LightningDataModule as AnyDataModule
    from lightning.pytorch.utilities.seed import isolate_rng

else:
    # The import of a package redirects the log and the deprecation warnings of the other one to itself. So Lightning
    # is imported here only for a user who has imported neither.
    if not _imported():
        import_module("lightning.pytorch")
    _pytorch = _imported()[0]
    _fabric = _FABRIC[_pytorch]
    Callback, LightningModule, Trainer = (
        getattr(sys.modules[_pytorch], name) for name in ("Callback", "LightningModule", "Trainer")
    )
    Fabric = import_module(_fabric).Fabric
    Logger = import_module(f"{_fabric}.loggers").Logger
    isolate_rng = import_module(f"{_pytorch}.utilities.seed").isolate_rng

    class AnyCallback(*_everywhere("Callback")):
        """A callback for the Trainer of every package that is imported by the time it is made."""

        def __init__(self) -> None:
            if AnyCallback.__bases__ != _everywhere("Callback"):
                AnyCallback.__bases__ = _everywhere("Callback")
            super().__init__()

    AnyDataModule, AnyLogger = _any("LightningDataModule"), _any("Logger")


def to_uncompiled(module: nn.Module) -> Any:
    """A LightningModule as it was before ``torch.compile``."""
    package = next(name for name in _imported() if isinstance(module, sys.modules[name].LightningModule))
    return import_module(f"{package}.utilities.compile").to_uncompiled(module)


def callbacks_of_new_trainer() -> list[Any]:
    """The callbacks of a Trainer in the making, for a ``state_key`` that it compares with theirs; else none.

    Lightning 2.5 and 2.6 do so in ``_validate_callbacks_list(callbacks)``, which raises an error of its own.
    """
    caller = sys._getframe(2)
    return caller.f_locals.get("callbacks", []) if caller.f_code.co_name == "_validate_callbacks_list" else []
