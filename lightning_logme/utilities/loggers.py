"""Show results in loggers. Only this file asks a logger which methods it has."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

_SHARE = 0.05  # the share of a validation's time that figures may take
# Seconds per figure. The first figure of a process also imports matplotlib. The low median ignores that cost.
_costs: deque[float] = deque([0.1], maxlen=9)


def _now() -> float:
    """Return the wall clock, in seconds."""
    return time.perf_counter()


class Board:
    """The loggers of a run.

    Pictures and text go to loggers whose ``experiment`` has the methods of a TensorBoard writer. Other loggers are
    skipped. Errors of a logger or of drawing are never raised: the first one of a board becomes a warning.

    Args:
        loggers: Lightning loggers.
        plots: False leaves out figures, histograms and layouts, True draws always, ``"auto"`` draws figures as long as
            they take at most 5 % of a validation (see :meth:`budget`).
        name: the first word of the warning.
        info: shows a message to the user.
    """

    def __init__(
        self,
        loggers: Iterable[Any],
        plots: bool | Literal["auto"] = "auto",
        name: str = "LogMECallback",
        info: Callable[[str], object] = _log.info,
    ) -> None:
        self._loggers = list(loggers)
        self._plots = plots
        self._name = name
        self._info = info
        self._without_figures: list[Any] = []  # loggers that failed to show a figure
        self._seconds: float | None = None  # the duration of the validation that figures belong to
        self._drawn = 0  # the number of figures of this validation
        self._charts: Mapping[str, Any] = {}  # the layout that was sent
        self._warned = self._informed = self._broken = False

    def budget(self, seconds: float) -> None:
        """Set the duration of the validation that the next figures belong to."""
        self._seconds, self._drawn = seconds, 0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers in each logger."""
        for logger in self._loggers:
            with self._guard(logger, "log_metrics"):
                logger.log_metrics(dict(values), step=step)

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Show the distribution of the finite values, if there are any."""
        if self._plots:
            finite = values.detach()[values.isfinite()].cpu()
            if len(finite):
                self._send("add_histogram", tag, finite, step)

    def text(self, tag: str, markdown: str) -> None:
        """Show a text."""
        self._send("add_text", tag, markdown)

    def layout(self, charts: Mapping[str, Any]) -> None:
        """Arrange scalars in charts, as in ``SummaryWriter.add_custom_scalars``. TensorBoard shows the last layout."""
        if self._plots and charts != self._charts:
            self._charts = charts
            self._send("add_custom_scalars", charts)

    def figure(self, tag: str, draw: Callable[[], Any], step: int = 0) -> None:
        """Draw a figure once, and show it in each logger that can show figures.

        Nothing is drawn if no logger can show figures, if matplotlib is not installed, if the time for figures is
        used up, or after an error in drawing.
        """
        if not self._plots or self._broken:
            return
        receivers = [pair for pair in self._methods("add_figure") if pair[0] not in self._without_figures]
        if not receivers or find_spec("matplotlib") is None or not self._within_budget():
            return
        self._drawn += 1
        begin = _now()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # The font may lack the letters of a name.
            try:
                figure = draw()
            except Exception as error:
                self._broken = True
                self._warn("a figure could not be drawn; no more figures are drawn", error)
                return
            for logger, show in receivers:
                try:
                    show(tag, figure, step)
                except Exception as error:
                    self._without_figures.append(logger)
                    self._warn(f"{type(logger).__name__}.add_figure failed; it gets no more figures", error)
        _costs.append(_now() - begin)

    def flush(self) -> None:
        """Write everything to disk."""
        self._send("flush")
        for logger in self._loggers:
            with self._guard(logger, "save"):
                logger.save()

    def _send(self, call: str, *arguments: Any) -> None:
        """Call this method of each experiment that has it."""
        for logger, method in self._methods(call):
            with self._guard(logger, call):
                method(*arguments)

    def _methods(self, call: str) -> list[tuple[Any, Callable[..., Any]]]:
        """Return the loggers whose experiment has this method, each with the method."""
        found = []
        for logger in self._loggers:
            with self._guard(logger, call):
                method = getattr(getattr(logger, "experiment", None), call, None)
                if method is not None:
                    found.append((logger, method))
        return found

    def _within_budget(self) -> bool:
        """Return whether there is time for another figure. Report once if there is not."""
        if self._plots is True or self._seconds is None:
            return True
        cost = statistics.median_low(_costs)
        if (self._drawn + 1) * cost <= _SHARE * self._seconds:
            return True
        if not self._informed:
            self._informed = True
            self._info(
                f"plots: figures are left out, because drawing them ({cost:.2g} s each) would take more than "
                f"{_SHARE:.0%} of this validation ({self._seconds:.2g} s); plots=True draws them always."
            )
        return False

    @contextmanager
    def _guard(self, logger: Any, call: str) -> Iterator[None]:
        """Turn an error of a logger into a warning."""
        try:
            yield
        except Exception as error:
            self._warn(f"{type(logger).__name__}.{call} failed; the run goes on", error)

    def _warn(self, message: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self._name}: {message}. {type(error).__name__}: {error}", stacklevel=3)
