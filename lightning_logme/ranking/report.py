"""The progress output of a ranking: bars, lines, and curves in a logger. Only rank 0 reports."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tqdm.auto import tqdm

from lightning_logme.ranking.result import Ranking
from lightning_logme.utilities.compat import Logger
from lightning_logme.utilities.loggers import Board


class Report:
    """The progress output of a ranking.

    Args:
        progress: whether to show bars and lines.
        loggers: the loggers that get each point of a curve when it is known, and the table at the end.
    """

    def __init__(self, progress: bool, loggers: Sequence[Logger]) -> None:
        self._progress = progress
        self._board = Board(loggers, plots=True, name="rank_backbones")

    @contextmanager
    def bar(self, name: str, start: int, stop: int | None) -> Iterator[Callable[[int], object]]:
        """Show a bar from ``start`` to ``stop``, and yield a function that advances it by a number of samples."""
        disable = None if self._progress else True  # with None, tqdm shows the bar only in a terminal
        with tqdm(total=stop, initial=start, desc=name, unit=" samples", leave=False, disable=disable) as bar:
            yield bar.update

    def line(self, text: str) -> None:
        """Print a line."""
        if self._progress:
            tqdm.write(text)

    def point(self, name: str, values: Mapping[str, float], num_samples: int) -> None:
        """Log the values of a row after a round, by their names."""
        self._board.scalars({_tag(what, name): value for what, value in values.items()}, num_samples)

    def finish(self, ranking: Ranking) -> None:
        """Log the table and, on one page, the figures, in loggers that can show them."""
        names = [row.name for row in ranking.rows]
        charts = {
            what: ["Multiline", [_tag(what, name) for name in names]] for what in ("gain", ranking.metric, "logme")
        }
        self._board.layout({"against the number of samples": charts})
        self._board.text("ranking", ranking.to_markdown())
        self._board.figure("ranking", ranking.page)
        self._board.flush()


def _tag(what: str, name: str) -> str:
    return f"{what}/{re.sub(r'[^-/. A-Za-z0-9_]', '_', name).replace(' ', '_')}"
