"""What the user sees while a ranking runs: bars, lines, and curves in a logger."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from lightning_logme.packages import Logger
from lightning_logme.ranking.progress import Round

if TYPE_CHECKING:
    from lightning_logme.ranking.result import Ranking


class Report:
    """Of the first process; the others are silent.

    Args:
        progress: whether there are bars and lines.
        loggers: get a point of every curve when it is known, and the table at the end.
    """

    def __init__(self, progress: bool, loggers: Sequence[Logger]) -> None:
        self._progress = progress
        self._loggers = loggers

    @contextmanager
    def bar(self, name: str, start: int, stop: int) -> Iterator[Callable[[int], object]]:
        """A bar for the samples from ``start`` to ``stop``; what it gives is told how many were done."""
        disable = None if self._progress else True  # None: only where there is no terminal
        with tqdm(total=stop, initial=start, desc=name, unit=" samples", leave=False, disable=disable) as bar:
            yield bar.update

    def line(self, text: str) -> None:
        if self._progress:
            tqdm.write(text)

    def point(self, name: str, round_: Round) -> None:
        """A round that a candidate has finished."""
        values = {_tag("gain", name): round_.gain, _tag("logme", name): round_.logme}
        self._log(lambda logger: logger.log_metrics(values, step=round_.num_samples))

    def finish(self, ranking: Ranking) -> None:
        """The table and the pictures, where a logger can show them, on one page."""
        self._log(lambda logger: _show(ranking, logger))

    def _log(self, call: Callable[[Logger], None]) -> None:
        for logger in self._loggers:
            try:
                call(logger)
            except Exception as error:  # what is known is worth more than its picture
                warnings.warn(
                    f"{type(logger).__name__} failed, and the ranking went on: {type(error).__name__}: {error}",
                    stacklevel=2,
                )


def _show(ranking: Ranking, logger: Logger) -> None:
    writer: Any = getattr(logger, "experiment", None)
    names = [row.name for row in ranking.rows]
    if hasattr(writer, "add_custom_scalars"):
        charts = {what: ["Multiline", [_tag(what, name) for name in names]] for what in ("gain", "logme")}
        writer.add_custom_scalars({"against the number of samples": charts})
    if hasattr(writer, "add_text"):
        writer.add_text("ranking", ranking.to_markdown())
    if hasattr(writer, "add_figure"):
        from lightning_logme.ranking.figures import page

        writer.add_figure("ranking", page(ranking))
    if hasattr(writer, "flush"):
        writer.flush()
    logger.save()


def _tag(what: str, name: str) -> str:
    return f"{what}/{re.sub(r'[^-/. A-Za-z0-9_]', '_', name).replace(' ', '_')}"
