"""Checks of the arguments that several parts share: one clear sentence each."""

from __future__ import annotations

from numbers import Integral
from typing import Any, get_args

from lightning_logme.moments import Task


def check_task(task: Any) -> None:
    """Raise ``ValueError`` unless ``task`` is one of the four tasks."""
    if not isinstance(task, str) or task not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(map(repr, get_args(Task)))}, got {task!r}.")


def check_options(task: Task, ignore_index: Any, fit_intercept: Any) -> None:
    """Raise ``ValueError`` unless the options are of their types, and have a meaning for the task."""
    if ignore_index is not None and not _is_integer(ignore_index):
        raise ValueError(f"ignore_index must be an integer or None, got {ignore_index!r}.")
    if ignore_index is not None and task == "regression":
        raise ValueError(
            f"ignore_index={ignore_index} has no meaning for task='regression', where it is a value like any other; "
            "drop those rows."
        )
    if not isinstance(fit_intercept, bool):
        raise ValueError(f"fit_intercept must be True or False, got {fit_intercept!r}.")


def positive(name: str, value: Any, optional: bool = False) -> Any:
    """An integer above zero as an int.

    Raises:
        ValueError: it is none.
    """
    if optional and value is None:
        return None
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer{' or None' if optional else ''}, got {value!r}.")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
