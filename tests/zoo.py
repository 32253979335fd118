"""Models of timm, torchvision and transformers whose weights take no memory, and the layers that are their heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

NUM_LABELS = 37  # No other layer of any model has this number of outputs.

T = TypeVar("T")

_WITHOUT_DEFAULT = {"vocab_size": 33, "head_dim": 64, "num_key_value_heads": 1}
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers")


class _EmptyOnMeta(TorchFunctionMode):
    """Put weights on the meta device. Other tensors, which a constructor may compute with, stay on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def without_memory(build: Callable[[], T]) -> T:
    """Call a constructor with the weights on the meta device."""
    try:
        with torch.device("meta"):
            return build()
    except (NotImplementedError, RuntimeError):  # The constructor reads numbers from a tensor.
        with _EmptyOnMeta():
            return build()


def transformer(cls: Any, labels: bool = True) -> nn.Module:
    """Build a model of transformers with the default configuration, and with at most two layers if possible."""

    def build(shallow: bool, complete: bool) -> nn.Module:
        config = cls.config_class()
        for name, value in _WITHOUT_DEFAULT.items() if complete else ():
            if getattr(config, name, value) is None:
                setattr(config, name, value)
        if labels:
            config.num_labels = NUM_LABELS
        if shallow:
            _limit_depth(config)
        return cls(config)

    for options in ((True, False), (True, True)):
        try:
            return without_memory(lambda options=options: build(*options))
        except Exception:
            continue
    return without_memory(lambda: build(False, False))


def _limit_depth(config: Any) -> None:
    for name in _DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(2, getattr(config, name)))
    for part in vars(config).values():
        if hasattr(part, "model_type"):
            _limit_depth(part)


def layers_with_outputs(model: nn.Module, number: int = NUM_LABELS) -> list[str]:
    """Return the names of the modules whose weight has this number of outputs."""
    weights = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    return [name for name, weight in weights if isinstance(weight, nn.Parameter) and weight.shape[:1] == (number,)]


def behead(model: nn.Module, head: str) -> nn.Module:
    """Replace the head by an identity, as users do."""
    parent, _, name = head.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    return model
