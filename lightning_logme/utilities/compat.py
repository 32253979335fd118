"""Code that depends on internals of Lightning, torch and torchmetrics, or on which Lightning package is imported.

Checked with lightning 2.5.3 to 2.6.6 (also as pytorch_lightning), torch 2.6 to 2.13 and torchmetrics 1.6 to 1.9.
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

# Both Lightning packages log through this module.
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

__all__ = [
    "CONVOLUTIONAL",
    "AnyCallback",
    "AnyDataModule",
    "AnyLogger",
    "Callback",
    "Fabric",
    "LightningModule",
    "Logger",
    "Trainer",
    "callbacks_of_new_trainer",
    "compiled_modules",
    "hooks_of",
    "is_one_of",
    "isolate_rng",
    "kept_buffers",
    "logged_step",
    "original",
    "plain_name",
    "prepared_batch",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
    "uncompiled",
    "validates_by_clock",
    "validation_loaders",
]

_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
# The name parts that FSDP, activation checkpointing and torch.compile insert into the names of modules.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
CONVOLUTIONAL = (_ConvNd, _BatchNorm)  # convolutions and batch norms of any number of dimensions


def _imported() -> list[str]:
    """Return the Lightning packages that are imported."""
    return [package for package in _FABRIC if package in sys.modules]


def _everywhere(name: str) -> tuple[type, ...]:
    """Return the class of this name in each imported Lightning package."""
    modules = [f"{_FABRIC[package]}.loggers" if name == "Logger" else package for package in _imported()]
    return tuple(getattr(sys.modules[module], name) for module in modules)


def _any(name: str) -> type:
    """Return a class for ``isinstance`` that covers the class of this name in each imported Lightning package."""

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
    # Importing one Lightning package redirects the log and the deprecation warnings of the other package to itself. So
    # Lightning is imported here only if the user has imported neither.
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
        """A callback for the Trainers of all Lightning packages that are imported when the callback is created."""

        def __init__(self) -> None:
            if AnyCallback.__bases__ != _everywhere("Callback"):
                AnyCallback.__bases__ = _everywhere("Callback")
            super().__init__()

    AnyDataModule, AnyLogger = _any("LightningDataModule"), _any("Logger")


def is_one_of(thing: object, names: tuple[str, ...]) -> bool:
    """Return whether an object has a class with one of these names. Some versions of Lightning lack the classes."""
    return any(cls.__name__ in names for cls in type(thing).__mro__)


def callbacks_of_new_trainer() -> list[Any]:
    """Return the callbacks of a new Trainer while it compares their ``state_key``, else an empty list.

    Lightning compares them in ``_validate_callbacks_list(callbacks)``, and its error does not say what to do.
    """
    caller = sys._getframe(2)
    return caller.f_locals.get("callbacks", []) if caller.f_code.co_name == "_validate_callbacks_list" else []


def validation_loaders(trainer: Trainer) -> list[Any]:
    """Return the validation loaders as Lightning has prepared them, or [None] if their batches are combined."""
    # During Trainer.validate after Trainer.fit, Trainer.val_dataloaders would still return the loaders of fit.
    fitting = trainer.state.fn == "fit"
    loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    combined = loop._combined_loader
    return list(combined.flattened) if combined is not None and combined._mode == "sequential" else [None]


def validates_by_clock(trainer: Trainer) -> bool:
    """Return whether ``val_check_interval`` is a time, so that each process validates by its own clock."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def logged_step(trainer: Trainer) -> int:
    """Return the step with which ``pl_module.log`` logs now."""
    loop = trainer.fit_loop.epoch_loop
    # At the end of an epoch, Lightning has already counted the last batch. At the end of a batch, and in a validation
    # that follows it, Lightning has not.
    progress = loop.batch_progress.current
    is_counted = trainer.training and progress.completed == progress.ready
    return max(0, loop._batches_that_stepped - int(is_counted))


def prepared_batch(batch: Any, trainer: Trainer, module: LightningModule) -> Any:
    """Return a batch as a validation loop passes it to the module: in its precision, after the hooks, on its device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def plain_name(name: str) -> str:
    """Return the name of a module without the name parts that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def compiled_modules(root: nn.Module) -> set[nn.Module]:
    """Return the modules of ``torch.compile`` and TorchScript, and all modules inside them."""
    compiled: Iterable[nn.Module] = (
        module
        for module in root.modules()
        if isinstance(module, torch.jit.ScriptModule)
        or hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
    )
    return {submodule for module in compiled for submodule in module.modules()}


def original(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def uncompiled(module: nn.Module, copy: Callable[[Any], Any]) -> Any:
    """Return an uncompiled copy of a module. Compiled code in a copy would use the weights of the original."""
    plain: Any = copy(original(module))
    if getattr(plain, "_compiler_ctx", None) is not None:  # a compiled LightningModule
        package = next(name for name in _imported() if isinstance(plain, sys.modules[name].LightningModule))
        plain = import_module(f"{package}.utilities.compile").to_uncompiled(plain)
    for submodule in plain.modules():
        vars(submodule).pop("_compiled_call_impl", None)
    return plain


def hooks_of(module: nn.Module, kind: type) -> list[tuple[dict[int, Any], int]]:
    """Return the dict and the key of each forward hook of a module that is a method of a class."""
    return [
        (hooks, key)
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key, hook in hooks.items()
        if isinstance(getattr(hook, "__self__", None), kind)
    ]


@contextmanager
def kept_buffers(root: nn.Module) -> Iterator[None]:
    """Restore the buffers of a module on exit, also if buffers were added or removed meanwhile."""
    submodules = [submodule for submodule in root.modules() if not isinstance(submodule, torch.jit.ScriptModule)]
    held = [
        (submodule, dict(submodule._buffers), set(submodule._non_persistent_buffers_set)) for submodule in submodules
    ]
    contents = [(buffer, buffer.clone()) for buffer in root.buffers()]
    try:
        yield
    finally:
        for submodule, buffers, transient in held:
            submodule._buffers.clear()
            submodule._buffers.update(buffers)
            submodule._non_persistent_buffers_set.clear()
            submodule._non_persistent_buffers_set.update(transient)
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)
