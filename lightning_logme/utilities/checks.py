"""Checks of arguments. Each error is one clear sentence."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any, Literal, get_args

Task = Literal["binary", "multiclass", "multilabel", "regression"]
EXCLUSIVE = ("binary", "multiclass")  # tasks in which a sample belongs to exactly one of the outputs


def check_task(task: Any) -> None:
    """Raise ``ValueError`` unless ``task`` is one of the four tasks."""
    if not isinstance(task, str) or task not in get_args(Task):
        raise ValueError(f"task must be one of {', '.join(map(repr, get_args(Task)))}, got {task!r}.")


def check_options(task: Task, ignore_index: Any, fit_intercept: Any) -> None:
    """Raise ``ValueError`` unless the options have the right types and fit the task."""
    if ignore_index is not None and not _is_integer(ignore_index):
        raise ValueError(f"ignore_index must be an integer or None, got {ignore_index!r}.")
    if ignore_index is not None and task == "regression":
        raise ValueError(
            f"ignore_index={ignore_index} has no meaning for task='regression', where it is an ordinary value; drop "
            "those rows instead."
        )
    check_flags(fit_intercept=fit_intercept)


def check_flags(**flags: Any) -> None:
    """Raise ``ValueError`` unless each flag is a bool. A string such as "false" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}.")


def names(name: str, value: Any) -> tuple[str, ...]:
    """Return several names as a tuple of strings.

    Raises:
        ValueError: ``value`` is a single string, or holds something that is not a string.
    """
    if isinstance(value, str):
        raise ValueError(f"{name} must be a sequence of names, got the string {value!r}; write {name}=[{value!r}].")
    listed = tuple(value) if isinstance(value, Iterable) else (value,)
    if not isinstance(value, Iterable) or not all(isinstance(item, str) for item in listed):
        raise ValueError(f"{name} must be a sequence of names, got {value!r}.")
    return listed


def positive_or_none(name: str, value: Any) -> int | None:
    """Return a positive integer, or None for None; see :func:`positive`."""
    return None if value is None else positive(name, value)


def positive(name: str, value: Any) -> int:
    """Return a positive integer as an int.

    Raises:
        ValueError: ``value`` is not a positive integer.
    """
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return int(value)


def integer(name: str, value: Any) -> int:
    """Return an integer as an int.

    Raises:
        ValueError: ``value`` is not an integer.
    """
    if not _is_integer(value):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
