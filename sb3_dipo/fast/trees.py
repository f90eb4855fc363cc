"""Nested tuples and dicts of tensors."""

from collections.abc import Callable
from typing import Any

import torch as th


def map_tensors(function: Callable[..., Any], *trees: Any) -> Any:
    """
    Apply a function to the tensors of nested tuples and dicts; what is no tensor is taken from the first.

    :param function: of as many tensors as there are trees
    :param trees: of the same form
    :return: such a tree
    """
    first = trees[0]
    if isinstance(first, th.Tensor):
        return function(*trees)
    if isinstance(first, dict):
        return {key: map_tensors(function, *(tree[key] for tree in trees)) for key in first}
    if isinstance(first, tuple):
        values = [map_tensors(function, *parts) for parts in zip(*trees, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else tuple(values)
    return first
