"""`relay key new`: what a person sees, and what ``>> FILE`` stores."""

from __future__ import annotations

import re

import pytest

from relay import keys
from relay.core.auth import parse_keys


def test_the_line_lets_the_key_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main("alice") == 0
    out, err = capsys.readouterr()
    (key,) = re.findall(r"^    (sk-relay-[A-Za-z0-9_-]{43})$", err, re.MULTILINE)
    assert out.count("\n") == 1
    assert key not in out
    assert parse_keys(out.encode()).name_of(key.encode()) == "alice"


def test_no_key_is_there_twice(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("alice", "alice", "bob"):
        keys.main(name)
    lines = capsys.readouterr().out  # as `relay key new >> FILE` leaves it
    assert repr(parse_keys(lines.encode())) == "<Keys 3: alice, bob>"


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-a", "a\n", "ä", "a" * 65])
def test_a_wrong_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert keys.main(name) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"relay key new: {name!r} is not a name for a key; allowed: ")
    assert err.count("\n") == 1
