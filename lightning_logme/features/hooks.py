"""Hooks on a network: they capture and pool the inputs or outputs of modules, and record which layers run."""

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

# Attributes of layers that hold their number of output channels.
_WIDTHS = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "normalized_shape")
_BEFORE_SCRIPT = "__prepare_scriptable__"


class NotCalledError(ValueError):
    """Raised if a module was not called for a batch."""


class CallTrace:
    """A recorder of the layers that run in a network, and of when the watched modules start.

    Its hooks exist only while it is open. Modules compiled by ``torch.compile`` get none, because hooks would become
    part of the compiled code. Their layers count in the order of registration.

    Args:
        root: the network.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.is_open = False
        self.calls: list[Call] = []
        self._starts: dict[nn.Module, int] = {}  # number of calls before the start
        self._handles: list[RemovableHandle] = []

    def open(self, watched: Iterable[nn.Module]) -> None:
        """Drop the recorded calls, and start to record."""
        self.close()
        self.calls, self._starts, self.is_open = [], {}, True
        compiled = compiled_modules(self.root)
        # These hooks run first, so that the call is recorded before a capture on the same layer runs.
        for module in self.root.modules():
            if module not in compiled and layer_width(module) is not None:
                self._handles.append(module.register_forward_hook(self._on_layer, prepend=True))
        for module in watched:
            if module not in compiled:
                self._handles.append(module.register_forward_pre_hook(self._on_start, prepend=True))

    def close(self) -> None:
        """Remove the hooks, and keep the recorded calls."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.is_open = [], False

    def around(self, module: nn.Module) -> Calls:
        """Return the calls since a watched module started, and the calls before."""
        if module in self._starts:
            start = self._starts[module]
            return self.calls[start:], self.calls[:start]
        before = itertools.takewhile(lambda submodule: submodule is not module, self.root.modules())
        return _registered(module.modules()), _registered(before)

    def _on_start(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._starts[module] = len(self.calls)

    def _on_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        width = layer_width(module)
        if self.is_open and width is not None and isinstance(output, Tensor) and not output.is_nested:
            self.calls.append(Call(width, tuple(output.shape), isinstance(module, CONVOLUTIONAL)))

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the user's module contains a copy of this object, which must be idle and empty.
        return vars(CallTrace(nn.Module()))


@dataclass(eq=False)
class Window:
    """The state that the captures of one network share.

    Attributes:
        trace: the recorder of the calls in the network.
        is_open: whether hooks capture. It is a flag, because compiled code ignores hooks that are attached later.
        labels: the labels of the batch; None if they are not known yet.
    """

    trace: CallTrace
    is_open: bool = False
    labels: Labels | None = None


class Capture:
    """A hook that captures the input or output of a module while its window is open, and pools it at once.

    In compiled code, or without labels, it copies the tensor and pools it later. It is a class and not a closure, so
    that the user's module can still be pickled and copied.

    Args:
        module: the module; None for values that are passed to :meth:`receive`.
        side: "input" or "output".
        name: the name in messages.
        window: see :class:`Window`.
        pooling: see :func:`~lightning_logme.features.pooling.pool`.
        key: the key in a mapping of poolings.
        remedy: what to do if the module is not called.

    Attributes:
        seen: for each call since the window was opened, the tensor, and whether it is pooled.
        error: the exception of the last call that failed.
        handle: the handle of the hook.
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
        """Attach the hook, and replace the previous one, which ``torch.jit.script`` may have removed."""
        if self.module is None:
            return
        if self.handle is not None:
            self.handle.remove()
        if self.side == "input":
            self.handle = self.module.register_forward_pre_hook(self._on_input, with_kwargs=True)
        else:
            self.handle = self.module.register_forward_hook(self._on_output)
        # torch.jit.script compiles the hooks of a module as well. It calls this function first, which removes them.
        vars(self.module)[_BEFORE_SCRIPT] = partial(_without_captures, self.module)

    @property
    def is_open(self) -> bool:
        """Whether the hook captures."""
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
        except Exception as error:  # An error must not interrupt the user's forward pass.
            self.error = error

    def pooled(self, tensor: Tensor, labels: Labels) -> Tensor:
        """Return one vector for each label."""
        return self.pooler.rows(tensor, labels, self._around() if self._calls is None else self._calls)

    def _around(self) -> Calls:
        """Return the calls inside the module, if its output is captured, and the calls before it."""
        trace = self._window.trace
        if self.module is None:
            return [], list(trace.calls)
        inside, before = trace.around(self.module)
        return ([] if self.side == "input" else inside), before

    def call_error(self) -> ValueError:
        """Return the error of a module that was not called, was called several times, or got no tensor."""
        if len(self.seen) == 0:
            return NotCalledError(
                f"{self.name} was not called for this batch; {self.remedy}. A model that was compiled and has run "
                'before ignores new hooks: call torch.compiler.set_stance("force_eager") or compile the model again.'
            )
        if len(self.seen) > 1:
            return ValueError(
                f"{self.name} was called {len(self.seen)} times for one batch, so its features cannot be matched with "
                "the labels; name a module that is called once, or give features=callable(module, batch)."
            )
        return ValueError(f"{self.name} was called without a tensor; name a module that takes and returns tensors.")

    def remove(self) -> None:
        """Remove the hook from the module."""
        self.seen, self.error = [], None
        if self.module is not None and self.handle is not None:
            self.handle.remove()
            if not hooks_of(self.module, Capture):
                vars(self.module).pop(_BEFORE_SCRIPT, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the user's module contains a copy of this object, which must be idle and empty.
        idle = dict.fromkeys(("module", "pooler", "error", "handle", "_calls"))
        return {**vars(self), **idle, "seen": [], "_window": Window(CallTrace(nn.Module()))}


def _without_captures(module: nn.Module) -> nn.Module:
    """Return the module without its captures, for torch.jit.script. The next batch attaches them again."""
    for hooks, key in hooks_of(module, Capture):
        del hooks[key]
    prepare = getattr(type(module), _BEFORE_SCRIPT, None)
    return module if prepare is None else prepare(module)


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in nested tuples, lists and mappings. Last hidden states and logits come first."""
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
    """Return rows made from a tensor, copied if they share its memory or are a view of a larger tensor.

    A later layer may overwrite shared memory, and a view keeps all of the memory of its base.
    """
    if any(type(each) is not Tensor or each.layout != torch.strided for each in (rows, tensor)):
        return rows.clone()  # Other kinds of tensors may have no storage to compare.
    storage = rows.untyped_storage()
    is_shared = storage.data_ptr() == tensor.untyped_storage().data_ptr()
    return rows.clone() if is_shared or storage.nbytes() > rows.nbytes else rows


def _registered(modules: Iterable[nn.Module]) -> list[Call]:
    """Return the calls of the layers among modules, as if each had been called once, in this order."""
    widths = ((module, layer_width(module)) for module in modules)
    return [Call(width, None, isinstance(module, CONVOLUTIONAL)) for module, width in widths if width]


def layer_width(module: nn.Module) -> int | None:
    """Return the number of output channels of a layer with parameters of its own; None for other modules."""
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
