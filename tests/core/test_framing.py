"""Body framing: which, and where a body ends, at every split and beside an oracle."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.framing import (
    MAX_CHUNK_HEADER_BYTES,
    BodyDecoder,
    BodyKind,
    ChunkDecoder,
    CloseDecoder,
    FramingError,
    LengthDecoder,
    decoder_for,
    response_body_kind,
)


def decode(decoder: BodyDecoder, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """The payload of the body in `pieces`, and what is left behind it."""
    payload = bytearray()
    for index, piece in enumerate(pieces):
        position = 0
        while position < len(piece) and not decoder.is_done and decoder.error is None:
            begin, end, position = decoder.next(piece, position, len(piece))
            payload += piece[begin:end]
        if decoder.is_done or decoder.error:
            return bytes(payload), piece[position:] + b"".join(pieces[index + 1 :])
    return bytes(payload), b""


def splits(data: bytes) -> list[list[bytes]]:
    """`data` whole, byte by byte, and cut in two at every place."""
    return [
        [data],
        [data[i : i + 1] for i in range(len(data))],
        *([data[:i], data[i:]] for i in range(1, len(data))),
    ]


BODIES = [
    b"5\r\nhello\r\n0\r\n\r\n",
    b"0\r\n\r\n",
    b"00A\r\n0123456789\r\n1\r\nx\r\n000\r\n\r\n",
    b'3;name=value;quoted="a b"\r\nabc\r\n0;last\r\nTrailer: x\r\nOther:\r\n\r\n',
    b"a \t;\r\n\r\n\r\n0\r\n\r\n0\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("body", BODIES)
def test_chunks_come_out_the_same_at_every_split(body: bytes) -> None:
    expected = None
    for pieces in splits(body):
        decoder = ChunkDecoder()
        payload, rest = decode(decoder, pieces)
        assert decoder.is_done
        assert decoder.error is None
        assert rest == b""
        expected = payload if expected is None else expected
        assert payload == expected


@pytest.mark.parametrize("body", BODIES)
def test_bytes_behind_the_last_chunk_are_not_the_bodys(body: bytes) -> None:
    for pieces in splits(body + b"HTTP/1.1 200 OK"):
        decoder = ChunkDecoder()
        _, rest = decode(decoder, pieces)
        assert decoder.is_done
        assert rest == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("body", BODIES)
def test_a_close_before_the_end_is_an_error_wherever_it_falls(body: bytes) -> None:
    for cut in range(len(body)):
        decoder = ChunkDecoder()
        decode(decoder, [body[:cut]])
        decoder.at_close()
        assert not decoder.is_done
        assert decoder.error is not None


@pytest.mark.parametrize(
    ("body", "position"),
    [
        (b"g\r\n", 0),
        (b"\r\n", 0),
        (b"-1\r\n", 0),
        (b"+1\r\nx", 0),
        (b"0x5\r\nhello", 0),
        (b"1_0\r\n", 0),
        (b" 5\r\nhello", 0),
        (b"5\nhello", 0),
        (b"5 \r\nhello", 0),
        (b"5\t\r\nhello", 0),
        (b"5 5\r\nhello", 0),
        (b"5\r\nhello!\r\n", 8),
        (b"5\r\nhello\n0\r\n", 8),
        (b"5\r\nhello\r\nzz\r\n", 10),
        (b"5;\x00\r\nhello", 0),
        (b"5;a\rb\r\nhello", 0),
        (b"1234567890abcdef\r\n", 0),
        (b"0\r\nno colon\r\n\r\n", 3),
        (b"0\r\n folded: x\r\n\r\n", 3),
        (b"0\r\nA: b\r\n: empty\r\n\r\n", 9),
    ],
)
def test_the_first_wrong_byte_has_its_position_at_every_split(body: bytes, position: int) -> None:
    for pieces in splits(body):
        decoder = ChunkDecoder()
        decode(decoder, pieces)
        assert decoder.error is not None, pieces
        assert decoder.error.position == position, pieces


def test_what_came_before_an_error_is_delivered() -> None:
    payload, _ = decode(ChunkDecoder(), [b"5\r\nhello\r\nbad\r\n"])
    assert payload == b"hello"


def test_an_endless_chunk_header_is_an_error_not_memory() -> None:
    decoder = ChunkDecoder()
    decode(decoder, [b"5;" + b"x" * (2 * MAX_CHUNK_HEADER_BYTES)])
    assert decoder.error is not None
    decoder = ChunkDecoder()
    decode(decoder, [b"5;", *[b"x" * 100] * 100])
    assert decoder.error is not None


def test_endless_trailers_are_an_error() -> None:
    decoder = ChunkDecoder()
    decode(decoder, [b"0\r\n", *[b"name: value\r\n"] * 5000])
    assert decoder.error is not None
    assert not decoder.is_done


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.integers(1, 17))
def test_any_chunks_in_any_pieces_equal_h11s_reading(chunks: list[bytes], step: int) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    oracle = h11.Connection(h11.CLIENT)
    oracle.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    oracle.send(h11.EndOfMessage())
    oracle.receive_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body)
    expected = bytearray()
    while not isinstance(event := oracle.next_event(), h11.EndOfMessage):
        if isinstance(event, h11.Data):
            expected += event.data
    payload, rest = decode(ChunkDecoder(), [body[i : i + step] for i in range(0, len(body), step)])
    assert payload == bytes(expected) == b"".join(chunks)
    assert rest == b""


@given(st.binary(max_size=60), st.integers(1, 9))
def test_arbitrary_bytes_never_raise_and_splitting_changes_nothing(data: bytes, step: int) -> None:
    whole, cut = ChunkDecoder(), ChunkDecoder()
    first = decode(whole, [data])
    second = decode(cut, [data[i : i + step] for i in range(0, len(data), step)])
    assert first[0] == second[0]
    assert whole.is_done == cut.is_done
    assert (whole.error and whole.error.position) == (cut.error and cut.error.position)


def test_length_and_close_bodies() -> None:
    decoder: BodyDecoder = LengthDecoder(5)
    assert decode(decoder, [b"he", b"lloX"]) == (b"hello", b"X")
    decoder.at_close()
    assert decoder.error is None
    decoder = LengthDecoder(5)
    decode(decoder, [b"hel"])
    decoder.at_close()
    assert decoder.error is not None
    assert decoder.error.position == 3
    decoder = CloseDecoder()
    assert decode(decoder, [b"he", b"llo"]) == (b"hello", b"")
    assert not decoder.is_done
    decoder.at_close()
    assert decoder.is_done
    assert LengthDecoder(0).is_done


CHUNKED = (b"transfer-encoding", b"chunked")


@pytest.mark.parametrize(
    ("method", "status", "headers", "kind"),
    [
        (b"GET", 200, [CHUNKED], BodyKind.CHUNKED),
        (b"GET", 200, [(b"transfer-encoding", b"Chunked")], BodyKind.CHUNKED),
        (b"GET", 200, [(b"content-length", b"5")], BodyKind.LENGTH),
        (b"GET", 200, [(b"content-length", b"5"), (b"content-length", b"5")], BodyKind.LENGTH),
        (b"GET", 200, [], BodyKind.CLOSE),
        (b"HEAD", 200, [(b"content-length", b"5")], BodyKind.NONE),
        (b"GET", 204, [], BodyKind.NONE),
        (b"GET", 304, [(b"content-length", b"5")], BodyKind.NONE),
        (b"GET", 103, [], BodyKind.NONE),
    ],
)
def test_body_kind(method: bytes, status: int, headers: list[tuple[bytes, bytes]], kind: BodyKind) -> None:
    assert response_body_kind(method, status, b"1.1", headers) is kind


@pytest.mark.parametrize(
    ("version", "headers"),
    [
        (b"1.1", [CHUNKED, (b"content-length", b"5")]),
        (b"1.0", [CHUNKED]),
        (b"1.1", [(b"transfer-encoding", b"gzip, chunked")]),
        (b"1.1", [CHUNKED, CHUNKED]),
        (b"1.1", [(b"transfer-encoding", b"identity")]),
        (b"1.1", [(b"content-length", b"5"), (b"content-length", b"6")]),
        (b"1.1", [(b"content-length", b"5, 5")]),
        (b"1.1", [(b"content-length", b"+5")]),
    ],
)
def test_contradictory_framing_is_refused(version: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(FramingError):
        response_body_kind(b"GET", 200, version, headers)


def test_decoder_for_reads_the_length() -> None:
    decoder = decoder_for(BodyKind.LENGTH, [(b"content-length", b"3")])
    assert decode(decoder, [b"abcd"]) == (b"abc", b"d")
    assert decoder_for(BodyKind.NONE, [(b"content-length", b"3")]).is_done
