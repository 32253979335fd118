"""Where features come from: hooks that remember what passes a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class NotCalledError(ValueError):
    """A module was not called for a batch."""


_BEFORE_SCRIPT = "__prepare_scriptable__"


class Tap:
    """Remembers the input, or the output, of a module while it is open.

    Hooks stay attached for a whole run, and a plain flag opens them: hooks that come and go are not seen by code that
    torch.compile has compiled before. A class and not a closure, so that the user's module can still be pickled and
    copied.

    Args:
        module: what to listen to.
        side: "input" or "output".
        name: what errors call the module.
        remedy: what to do where it is not called.

    Raises:
        ValueError: the module is one of TorchScript, which takes no hooks.
    """

    def __init__(
        self,
        module: nn.Module,
        side: Literal["input", "output"],
        name: str,
        remedy: str = "name a module that is called",
    ) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name} is a module of TorchScript, which takes no hooks; name another module.")
        self.module = module
        self.side = side
        self.name = name
        self.remedy = remedy
        self.open = False
        self._seen: list[Tensor | None] = []
        self._error: Exception | None = None
        self._handle: RemovableHandle | None = None
        self._attach()

    def _attach(self) -> None:
        if self.side == "input":
            self._handle = self.module.register_forward_pre_hook(self._on_input, with_kwargs=True)
        else:
            self._handle = self.module.register_forward_hook(self._on_output)
        # torch.jit.script calls this before it compiles the module, and all of its hooks.
        vars(self.module)[_BEFORE_SCRIPT] = partial(_without_taps, self.module)

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.receive((args, kwargs))

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.receive(output)

    def receive(self, value: Any) -> None:
        """Remember a value that passes, or the first tensor in it."""
        if self.open:
            try:
                tensor = first_tensor(value)
                # A copy, because a later layer may work in place.
                self._seen.append(None if tensor is None else tensor.detach().clone())
            except Exception as error:  # which must not end the user's forward pass
                self._error = error

    def start(self) -> None:
        """Forget what was seen, and listen."""
        if self._handle is not None and self._handle.id not in (self._handle.hooks_dict_ref() or ()):
            self._handle.remove()  # what torch.jit.script has left of it
            self._attach()
        self._seen, self._error = [], None
        self.open = True

    @property
    def called(self) -> bool:
        """Whether the module was called since the start."""
        return bool(self._seen) or self._error is not None

    def take(self) -> Tensor:
        """Return the input or output since the start, and stop listening.

        Raises:
            NotCalledError: it was not called.
            ValueError: it was called more than once, or there was no tensor.
            Exception: any other error of a call.
        """
        seen, error = self._seen, self._error
        self.stop()
        if error is not None:
            raise error
        if len(seen) == 0:
            raise NotCalledError(
                f"{self.name} was not called for this batch; {self.remedy}. If the model was compiled and run before "
                'the hooks were attached, call torch.compiler.set_stance("force_eager") or compile it anew, so that '
                "they are seen."
            )
        if len(seen) > 1:
            raise ValueError(
                f"{self.name} was called {len(seen)} times for one batch, so its features cannot be matched with the "
                "labels; name a module that is called once, or give features=callable(module, batch)."
            )
        if seen[0] is None:
            raise ValueError(f"{self.name} was called without a tensor; name a module that takes and returns tensors.")
        return seen[0]

    def stop(self) -> None:
        """Forget what was seen, and listen no more."""
        self.open = False
        self._seen, self._error = [], None

    def remove(self) -> None:
        """Leave the module as it was."""
        self.stop()
        if self._handle is not None:
            self._handle.remove()
            if not any(_taps(self.module)):
                vars(self.module).pop(_BEFORE_SCRIPT, None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the user's module takes this along: idle, without the features.
        idle = {"open": False, "_seen": [], "_error": None, "_handle": None, "module": None}
        return {**vars(self), **idle}


def _taps(module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """The hooks of a module that belong to taps: the dict that holds each, and its key."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Tap):
                yield hooks, key


def _without_taps(module: nn.Module) -> nn.Module:
    """Return the module without its taps, for torch.jit.script; the next batch attaches them again."""
    for hooks, key in _taps(module):
        del hooks[key]
    prepare = getattr(type(module), _BEFORE_SCRIPT, None)
    return module if prepare is None else prepare(module)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and mappings: the last hidden state, or the logits, of Hugging Face."""
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
