"""What is configured by model: names before patterns, patterns in their order."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.by_name import ByName

FOUND = ByName([("qwen*", "first"), ("*-mini*", "second"), ("qwen3", "named"), ("a+b.*", "escaped")])


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
    assert ByName([("*", 1)]).get("") == 1


@given(st.text("ab*", max_size=8).filter(lambda glob: "*" in glob), st.text("ab", max_size=12))
def test_a_star_is_any_text(glob: str, model: str) -> None:
    expected = re.fullmatch(".*".join(map(re.escape, glob.split("*"))), model, re.DOTALL)
    assert (ByName([(glob, 1)]).get(model) == 1) == (expected is not None)


def test_a_long_name_is_not_sought_over_and_over() -> None:
    """By the square of its length, this takes the better part of an hour."""
    assert ByName([("*-vl-*-awq", 1)]).get("-vl-" * 250_000) is None
