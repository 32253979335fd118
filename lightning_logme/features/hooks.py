"""Hooks on a network: they capture what modules take or give, pooled at once, and record which layers run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_logme.features.labels import Labels
from lightning_logme.features.pooling import FIRST, LAST, Call, Calls, Pooler, Pooling
from lightning_logme.utilities.compat import CONVOLUTIONAL, compiled_modules, hooks_of

# Attributes that give the number of channels that a layer puts out.
_WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "normalized_shape")
_BEFORE_SCRIPT = "__prepare_scriptable__"


class NotCalledError(ValueError):
    """A module was not called for a batch."""


class CallTrace:
    """Records which layers run, and when the watched modules begin, while it is open.

    Hooks are there only while it is open. Modules compiled by ``torch.compile`` are left alone, as hooks that come and
    go would be compiled in: their layers count in the order in which they are registered.

    Args:
        root: the network.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.is_open = False
        self.calls: list[Call] = []
        self._begins: dict[nn.Module, int] = {}
        self._handles: list[RemovableHandle] = []

    def open(self, watched: Iterable[nn.Module]) -> None:
        """Forget what was recorded, and record."""
        self.close()
        self.calls, self._begins, self.is_open = [], {}, True
        compiled = compiled_modules(self.root)  # or scripted
        # Prepended, so that a capture that follows finds the layer recorded.
        for module in self.root.modules():
            if module not in compiled and layer_width(module) is not None:
                self._handles.append(module.register_forward_hook(self._on_layer, prepend=True))
        for module in watched:
            if module not in compiled:
                self._handles.append(module.register_forward_pre_hook(self._on_begin, prepend=True))

    def close(self) -> None:
        """Remove the hooks; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.is_open = [], False

    def around(self, module: nn.Module) -> Calls:
        """Return the calls since a watched module began, and those before."""
        if module in self._begins:
            begin = self._begins[module]
            return self.calls[begin:], self.calls[:begin]
        before = itertools.takewhile(lambda part: part is not module, self.root.modules())
        return _registered(module.modules()), _registered(before)

    def _on_begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._begins[module] = len(self.calls)

    def _on_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        width = layer_width(module)
        if self.is_open and width is not None and isinstance(output, Tensor) and not output.is_nested:
            self.calls.append(Call(width, tuple(output.shape), isinstance(module, CONVOLUTIONAL)))

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the user's module takes this along: idle, without what was recorded.
        return vars(CallTrace(nn.Module()))


@dataclass(eq=False)
class Window:
    """The state that the captures of one network share: whether they are open, and for which labels.

    Attributes:
        trace: of the calls in the network.
        is_open: whether what passes is captured. A plain flag: hooks that come and go are not seen by code that
            torch.compile has compiled before.
        labels: of the batch, None where they are not known yet.
    """

    trace: CallTrace
    is_open: bool = False
    labels: Labels | None = None


class Capture:
    """Captures the input, or the output, of a module while its window is open, and pools it at once.

    Inside compiled code, and where the labels are not known yet, the tensor is copied, and pooled later. A class and
    not a closure, so that the user's module can still be pickled and copied.

    Args:
        module: to capture from; None for values that are given to :meth:`receive`.
        side: "input" or "output".
        name: what messages call it.
        window: of the network.
        pooling: see :func:`~lightning_logme.features.pooling.pool`.
        key: what a mapping of poolings calls it.
        remedy: what to do where the module is not called.

    Attributes:
        seen: for each call since the window was opened, the tensor, and whether it is pooled.
        error: of a call.
        handle: of the hook.
    """

    def __init__(
        self,
        module: nn.Module | None,
        side: Literal["input", "output"],
        name: str,
        window: Window,
        pooling: Pooling = "auto",
        key: str = "",
        remedy: str = "name a module that is called",
    ) -> None:
        axis = None
        if side == "input":
            axis = FIRST if hasattr(module, "in_channels") else LAST if hasattr(module, "in_features") else None
        self.module = module
        self.side = side
        self.name = name
        self.remedy = remedy
        self.pooler = Pooler(pooling, name, key, axis)
        self.seen: list[tuple[Tensor | None, bool]] = []
        self.error: Exception | None = None
        self.handle: RemovableHandle | None = None
        self._window = window
        self._calls: Calls | None = None
        self.attach()

    def attach(self) -> None:
        """Attach the hook, also in place of one that ``torch.jit.script`` took away."""
        if self.module is None:
            return
        if self.handle is not None:
            self.handle.remove()
        if self.side == "input":
            self.handle = self.module.register_forward_pre_hook(self._on_input, with_kwargs=True)
        else:
            self.handle = self.module.register_forward_hook(self._on_output)
        # torch.jit.script calls this before it compiles the module, and all of its hooks.
        vars(self.module)[_BEFORE_SCRIPT] = partial(_without_captures, self.module)

    @property
    def is_open(self) -> bool:
        """Whether what passes the module is captured."""
        return self._window.is_open

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.receive((args, kwargs))

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.receive(output)

    def receive(self, value: Any) -> None:
        """Capture the first tensor in a value."""
        if not self._window.is_open:
            return
        try:
            tensor = first_tensor(value)
            if tensor is None:
                self.seen.append((None, False))
            elif torch.compiler.is_compiling():
                self.seen.append((tensor.detach().clone(), False))
            else:
                tensor, labels = tensor.detach(), self._window.labels
                if self._window.trace.is_open:
                    self._calls = self._around()
                rows = tensor if labels is None else self.pooled(tensor, labels).detach()
                self.seen.append((owned(rows, tensor), labels is not None))
        except Exception as error:  # which must not end the user's forward pass
            self.error = error

    def pooled(self, tensor: Tensor, labels: Labels) -> Tensor:
        """Return one vector for each label."""
        return self.pooler.rows(tensor, labels, self._around() if self._calls is None else self._calls)

    def _around(self) -> Calls:
        """Return the calls inside the module and before it."""
        trace = self._window.trace
        if self.module is None:
            return [], list(trace.calls)
        inside, before = trace.around(self.module)
        return ([] if self.side == "input" else inside), before

    def why_not_one(self) -> ValueError:
        """Return the error for a module that was not called once, or that was called without a tensor."""
        if len(self.seen) == 0:
            return NotCalledError(
                f"{self.name} was not called for this batch; {self.remedy}. If the model was compiled and run before "
                'the hooks were attached, call torch.compiler.set_stance("force_eager") or compile it anew, so that '
                "they are seen."
            )
        if len(self.seen) > 1:
            return ValueError(
                f"{self.name} was called {len(self.seen)} times for one batch, so its features cannot be matched with "
                "the labels; name a module that is called once, or give features=callable(module, batch)."
            )
        return ValueError(f"{self.name} was called without a tensor; name a module that takes and returns tensors.")

    def remove(self) -> None:
        """Leave the module as it was."""
        self.seen, self.error = [], None
        if self.module is not None and self.handle is not None:
            self.handle.remove()
            if not hooks_of(self.module, Capture):
                vars(self.module).pop(_BEFORE_SCRIPT, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the user's module takes this along: idle, without the features.
        idle = dict.fromkeys(("module", "pooler", "error", "handle", "_calls"))
        return {**vars(self), **idle, "seen": [], "_window": Window(CallTrace(nn.Module()))}


def _without_captures(module: nn.Module) -> nn.Module:
    """Return the module without its captures, for torch.jit.script; the next batch attaches them again."""
    for hooks, key in hooks_of(module, Capture):
        del hooks[key]
    prepare = getattr(type(module), _BEFORE_SCRIPT, None)
    return module if prepare is None else prepare(module)


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in nested tuples, lists and mappings; a last hidden state or logits go first."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = (value.get("last_hidden_state"), value.get("logits"), *value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            tensor = first_tensor(item)
            if tensor is not None:
                return tensor
    return None


def owned(rows: Tensor, tensor: Tensor) -> Tensor:
    """Return rows that were made from a tensor, copied where they share its memory or keep more memory than their own.

    A later layer may work in place, and a view would keep all that it is a view of.
    """
    if any(type(each) is not Tensor or each.layout != torch.strided for each in (rows, tensor)):
        return rows.clone()  # their storage may not be one that can be looked at
    storage = rows.untyped_storage()
    is_shared = storage.data_ptr() == tensor.untyped_storage().data_ptr()
    return rows.clone() if is_shared or storage.nbytes() > rows.nbytes else rows


def _registered(modules: Iterable[nn.Module]) -> list[Call]:
    """Return the layers among modules as if each was called once, in this order."""
    widths = ((module, layer_width(module)) for module in modules)
    return [Call(width, None, isinstance(module, CONVOLUTIONAL)) for module, width in widths if width]


def layer_width(module: nn.Module) -> int | None:
    """Return the number of channels that a layer with parameters of its own puts out; None for other modules."""
    if next(module.parameters(recurse=False), None) is None:
        return None
    if any(next(child.parameters(), None) is not None for child in module.children()):
        return None
    for name in _WIDTHS:
        value = getattr(module, name, None)
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        if isinstance(value, int):
            return value
    return None
