"""Extract the features of a batch from a network, by source: one vector for each label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_logme.features.hooks import CallTrace, Capture, NotCalledError, Window, first_tensor, owned
from lightning_logme.features.labels import Labels
from lightning_logme.features.pooling import Pooler, Pooling
from lightning_logme.utilities.compat import compiled_modules

Features = Callable[[Any, Any], Any]
Errors = dict[str | None, Exception]  # by source; the key None stands for all sources

HEAD = ""  # the name of the source that is the input of the head; other sources have the name of their layer
LAYER_MEAN = "layer_mean"
HEAD_KEY = "head"  # the key of the input of the head in a mapping of poolings


class Source:
    """A source of features: the inputs of one or several heads, the output of a layer, or a callable.

    Args:
        name: :data:`HEAD`, or the name of a layer.
        captures: the captures whose features are concatenated.
        features: a callable(module, batch) that gives the features instead.
        pooling: the pooling of these features.
        guess: the name of the head, if it was found and not named by the user.
        outputs: the number of outputs of the head, if known.
    """

    def __init__(
        self,
        name: str,
        captures: Sequence[Capture] = (),
        *,
        features: Features | None = None,
        pooling: Pooling = "auto",
        guess: str | None = None,
        outputs: int | None = None,
    ) -> None:
        self.name = name
        self.captures = tuple(captures)
        self.features = features
        self.guess = guess
        self.outputs = outputs
        self.poolers = [capture.pooler for capture in captures]
        if features is not None:
            self.poolers = [Pooler(pooling, "features=callable", HEAD_KEY)]

    def __str__(self) -> str:
        return " and ".join(pooler.name for pooler in self.poolers)

    def rows(self, module: nn.Module, batch: Any, labels: Labels, trace: CallTrace) -> Tensor:
        """Return one vector for each label of the last batch: (N, D), or (N, T, D) for labels (N, T).

        Raises:
            NotCalledError: a module was not called.
            ValueError: a module was called several times, or a shape is wrong.
        """
        if self.features is not None:
            begin = len(trace.calls)
            tensor = first_tensor(self.features(module, batch))
            if tensor is None:
                raise ValueError(
                    "features=callable(module, batch) returned no tensor; it must return features of shape (N, D)."
                )
            # Collective operations need the features on the device of the run, where the features of layers are.
            tensor = tensor.detach().to(getattr(module, "device", tensor.device))
            rows = self.poolers[0].rows(tensor, labels, (trace.calls[begin:], trace.calls[:begin]))
            return owned(rows, tensor)
        tensors = []
        for capture in self.captures:
            if capture.error is not None:
                raise capture.error
            captured, is_pooled = capture.seen[0] if len(capture.seen) == 1 else (None, False)
            if captured is None:
                self._raise(capture.call_error())
            tensors.append(captured if is_pooled else owned(capture.pooled(captured, labels), captured))
        return tensors[0] if len(tensors) == 1 else _concatenated(tensors)

    def _raise(self, error: ValueError) -> NoReturn:
        if self.guess is None or not isinstance(error, NotCalledError):
            raise error
        raise NotCalledError(
            f"head: '{self.guess}' was taken for the classifier head, but it was not called for this batch; name the "
            "head with head=, or use head=None for the output of the module, or give features=callable(module, batch). "
            "To change how a probe calls the module, give Probe(forward=callable(module, batch)). A model that was "
            'compiled and has run before ignores new hooks: call torch.compiler.set_stance("force_eager") or compile '
            "the model again."
        )


class Extractor:
    """An extractor of features, which captures them by source while a network runs.

    Args:
        module: the network.
        sources: the sources, in the order of logging.
        window: the state that the captures share.
        layer_mean: whether the mean of the layers is a source as well.
        num_outputs: the number of outputs, K, if known.

    Attributes:
        sources: the sources by name.
    """

    def __init__(
        self,
        module: nn.Module,
        sources: Iterable[Source] = (),
        window: Window | None = None,
        *,
        layer_mean: bool = False,
        num_outputs: int | None = None,
    ) -> None:
        self.module = module
        self.sources = {source.name: source for source in sources}
        self.layer_mean = layer_mean
        self.num_outputs = num_outputs
        self._window = Window(CallTrace(module)) if window is None else window

    @property
    def captures(self) -> list[Capture]:
        return [capture for source in self.sources.values() for capture in source.captures]

    @property
    def head(self) -> Source | None:
        """The source that is the input of the head, or None."""
        return self.sources.get(HEAD)

    @property
    def names(self) -> list[str]:
        """The names of all sources: the head, the layers in their order, and their mean."""
        return [*self.sources, *([LAYER_MEAN] if self.layer_mean else [])]

    @property
    def layers(self) -> list[str]:
        return [name for name in self.sources if name != HEAD]

    @property
    def is_head_guessed(self) -> bool:
        """Whether the head was found, and not named by the user."""
        return self.head is not None and self.head.guess is not None

    def give(self, output: Any) -> None:
        """Pass the output of the network to the captures that have no module."""
        for capture in self.captures:
            if capture.module is None:
                capture.receive(output)

    def replace_head(self, module: nn.Module, name: str) -> Capture:
        """Use the input of a module as the features of the head from now on, and return its capture."""
        pooler = self.sources[HEAD].poolers[0]
        capture = Capture(module, "input", f"the head '{name}'", self._window, pooler.pooling, pooler.key)
        self.sources[HEAD] = Source(HEAD, [capture])
        return capture

    def drop_guess(self) -> None:
        """Remove a head that the user did not name, if there are layers to score instead."""
        if self.is_head_guessed and self.layers:
            for capture in self.sources.pop(HEAD).captures:
                capture.remove()

    @property
    def is_compiled(self) -> bool:
        """Whether one of the captured modules is compiled by ``torch.compile``."""
        compiled = compiled_modules(self.module)
        return any(capture.module in compiled for capture in self.captures)

    @property
    def poolings(self) -> list[str]:
        """Descriptions of how the tokens and maps of the last batch were pooled."""
        poolers = (pooler for source in self.sources.values() for pooler in source.poolers)
        return [pooler.description for pooler in poolers if pooler.description is not None]

    def start(self, labels: Labels | None) -> None:
        """Start to capture a batch. ``labels`` is None if they are not known yet."""
        self._forget()
        self._window.is_open, self._window.labels = True, labels
        for capture in self.captures:
            if capture.handle is not None and capture.handle.id not in (capture.handle.hooks_dict_ref() or ()):
                capture.attach()  # torch.jit.script removed the hook
        if not all(pooler.settled for source in self.sources.values() for pooler in source.poolers):
            self._window.trace.open(capture.module for capture in self.captures if capture.module is not None)

    @property
    def called(self) -> bool:
        """Whether a captured module was called since :meth:`start`, or a callable gives the features."""
        return any(
            source.features is not None or any(capture.seen or capture.error for capture in source.captures)
            for source in self.sources.values()
        )

    def stop(self) -> None:
        """Stop capturing, and drop what was captured."""
        self._forget()
        self._window.is_open, self._window.labels = False, None
        if self._window.trace.is_open:
            self._window.trace.close()

    def _forget(self) -> None:
        for capture in self.captures:
            capture.seen, capture.error = [], None

    def remove(self) -> None:
        """Remove all hooks from the network."""
        self.stop()
        for capture in self.captures:
            capture.remove()

    def rows(self, batch: Any, labels: Labels) -> tuple[dict[str, Tensor], Errors]:
        """Return one vector for each label of the last batch, by source, and the errors of the sources that failed."""
        rows: dict[str, Tensor] = {}
        errors: Errors = {}
        # Read the captures first, because features=callable may call the same modules again.
        for name, source in sorted(self.sources.items(), key=lambda item: not item[1].captures):
            try:
                rows[name] = source.rows(self.module, batch, labels, self._window.trace)
            except Exception as error:
                errors[name] = error
        if self.layer_mean:
            try:
                for layer in self.layers:
                    if layer in errors:
                        raise errors[layer]
                rows[LAYER_MEAN] = _mean({layer: rows[layer] for layer in self.layers})
            except Exception as error:
                errors[LAYER_MEAN] = error
        return rows, errors

    def run(
        self, batch: Any, labels: Labels, forward: Callable[[Any, Any], Any], precision: AbstractContextManager[Any]
    ) -> tuple[dict[str, Tensor], Errors]:
        """Run the network on a batch, which must be on its device, and return the same as :meth:`rows`.

        Args:
            batch: the batch.
            labels: its labels.
            forward: runs the network. It is called only if a module is captured.
            precision: the autocast context.
        """
        self.start(labels)
        try:
            with precision, torch.no_grad():
                if self.captures:
                    forward(self.module, batch)
                return self.rows(batch, labels)
        finally:
            self.stop()


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """Return the features of several heads, concatenated."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors], -1)


def _mean(rows: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the features of several layers."""
    shapes = {tuple(tensor.shape) for tensor in rows.values()}
    if len(shapes) > 1:
        listed = ", ".join(f"'{layer}' {tuple(tensor.shape)}" for layer, tensor in rows.items())
        raise ValueError(f"layer_mean needs features of equal length, got {listed}; name layers that have them.")
    tensors = list(rows.values())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([tensor.to(dtype) for tensor in tensors]).mean(0)
