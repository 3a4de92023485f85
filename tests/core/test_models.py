"""What is configured by model: names before patterns, patterns in their order."""

from __future__ import annotations

import pytest

from relay.core.models import ByModel

FOUND = ByModel([("qwen*", "first"), ("*-mini*", "second"), ("qwen3", "named"), ("a+b.*", "escaped")])


@pytest.mark.parametrize(
    ("model", "item"),
    [
        ("qwen3", "named"),
        ("qwen3-mini", "first"),
        ("gpt-mini-2", "second"),
        ("qwen", "first"),
        ("qwen\n", "first"),
        ("a+b.c", "escaped"),
        ("aab.c", None),
        ("xqwen", None),
        ("Qwen3", None),
        ("", None),
    ],
)
def test_a_name_comes_before_the_first_pattern_that_fits(model: str, item: str | None) -> None:
    assert FOUND.get(model) == item


def test_any_text_is_none_too() -> None:
    assert ByModel([("*", 1)]).get("") == 1
