"""Errors in groups, as nurseries raise them."""

from __future__ import annotations


def leaf(error: BaseException) -> BaseException:
    """The error itself, or the first of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
