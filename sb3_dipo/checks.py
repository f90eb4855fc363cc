"""Argument checks: each error names the argument, what it may be, and what it was."""

import math
from collections.abc import Iterable
from typing import Any


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``, raise ``ValueError`` otherwise."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, not {value!r}.")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False, raise ``ValueError`` otherwise."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, not {value!r}.")
    return value


def check_int(name: str, value: Any, minimum: int) -> int:
    """Return ``value`` as an int if it is a whole number >= ``minimum`` (``1e6`` is one), raise ``ValueError`` otherwise."""
    try:
        whole = not isinstance(value, bool) and int(value) == value and int(value) >= minimum
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"`{name}` must be a whole number of at least {minimum}, not {value!r}.")
    return int(value)


def check_float(
    name: str,
    value: Any,
    minimum: float = 0.0,
    maximum: float = math.inf,
    open_minimum: bool = False,
    finite: bool = True,
) -> float:
    """
    Return ``value`` as a float if it lies in the range, raise ``ValueError`` otherwise.

    :param name: the argument's name, for the message
    :param value: the value to check
    :param minimum: lower end of the range
    :param maximum: upper end of the range, included
    :param open_minimum: whether ``minimum`` itself is excluded
    :param finite: whether infinity is excluded
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    inside = minimum < number <= maximum if open_minimum else minimum <= number <= maximum
    if not inside or (finite and math.isinf(number)):
        lower = f"{'above' if open_minimum else 'at least'} {minimum:g}"
        upper = f" and at most {maximum:g}" if math.isfinite(maximum) else ""
        raise ValueError(f"`{name}` must be a {'finite ' if finite else ''}number {lower}{upper}, not {value!r}.")
    return number
