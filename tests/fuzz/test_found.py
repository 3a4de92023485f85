"""What fuzzing has found, mended since; and the seeds it starts from."""

from __future__ import annotations

import pytest

from tests.fuzz.checks import CHECKS

CASES = [
    ("framing", "white space behind the size of the last chunk", b"A0 \r\n\r\n"),
    ("framing", "trailers", b"A5\r\nhello\r\n0\r\nx: y\r\n\r\n"),
    ("framing", "an extension", b"\x005;a=b\r\nhello\r\na\r\n0123456789\r\n0\r\n\r\n"),
    ("framing", "cut", b"\x025\r\nhel"),
    ("frames", "one frame to a chunk", b"A9\r\ndata: a\n\n\r\n0\r\n\r\n"),
    ("frames", "all line ends", b"Cdata: a\r\n\r\nid: 1\rdata: b\r\r: c\n\n"),
    ("frames", "a frame beyond the limit", b"\x1fdata: " + b"a" * 100 + b"\n\ndata: b"),
]


@pytest.mark.parametrize(("target", "name", "case"), CASES, ids=[f"{target}: {name}" for target, name, _ in CASES])
def test_found(target: str, name: str, case: bytes) -> None:
    CHECKS[target](case)
    for size in range(32):
        CHECKS[target](bytes([size]) + case[1:])
