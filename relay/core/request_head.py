"""A request's head, judged by `relay.core.strict` and parsed by h11; one that repeats the last is known by its bytes.

A client that keeps its connection sends the same head again and again, but for the digits of ``Content-Length`` (HTTP/2
has its table of fields for that). What a head was parsed to depends on nothing but its bytes, and on those digits in
one field alone, so the next head with the same bytes around them need not be judged and parsed anew.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import h11

from relay.core import headers, strict
from relay.core.request import route_of

if TYPE_CHECKING:
    from relay.core.auth import Substitution

#: Longer heads, and those of more fields, are not kept: that would be memory for each idle connection, up to 20 KiB.
REMEMBERED_BYTES: Final = 4096
REMEMBERED_FIELDS: Final = 48

_LENGTH: Final = re.compile(rb"(?i)\r\ncontent-length:[ \t]*([0-9]{1,19})[ \t]*\r\n")
_MOST_DIGITS: Final = 19


class RequestHead:
    """What a head says, but for the length of the body: that is its request's own."""

    __slots__ = (
        "expects_continue", "fields", "host", "is_chunked", "is_keep_alive", "method", "passed", "path", "request_id",
        "route", "target", "version",
    )  # fmt: skip

    def __init__(self, event: h11.Request, fields: headers.Headers, *, expects_continue: bool) -> None:
        self.method = event.method
        self.version = event.http_version
        #: in origin form, and the authority it was sent to
        self.target, self.host = strict.check_request(self.method, event.target, self.version, fields)
        self.path = self.target.partition(b"?")[0]
        self.route = route_of(self.target)
        self.fields = [field for field in fields if field[0] != b"content-length"]
        self.request_id = headers.request_id(fields)  #: the client's own; None: it has none, or no good one
        self.expects_continue = expects_continue
        self.is_keep_alive = self.version >= b"1.1" and not headers.wants_close(self.version, fields)
        self.is_chunked = headers.find(fields, b"transfer-encoding") is not None
        #: `headers.passed_fields` of it, and the rules they were made by, once they were asked for. Also the client's
        #: address and scheme are in them, so this holds as long as no two connections share a head.
        self.passed: tuple[Substitution, bytes] | None = None

    def __repr__(self) -> str:
        return f"<RequestHead {self.method!r} {self.target!r}>"


def parse(head: bytes, max_head_bytes: int) -> tuple[RequestHead, int | None]:
    """What a whole head says, and the length of its body if it tells one. Raises RequestRefused."""
    strict.check_raw_head(head)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=max_head_bytes)
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError as exc:
        raise strict.refusal_of(exc) from None
    assert isinstance(event, h11.Request)
    fields: headers.Headers = list(event.headers)
    parsed = RequestHead(event, fields, expects_continue=connection.they_are_waiting_for_100_continue)
    length = headers.find(fields, b"content-length")
    return parsed, None if length is None else int(length)


class HeadReader:
    """Reads the heads of one connection."""

    __slots__ = ("_after", "_before", "_last", "_max_head_bytes")

    def __init__(self, max_head_bytes: int) -> None:
        self._max_head_bytes = max_head_bytes
        self._last: RequestHead | None = None
        self._before = self._after = b""  # what stood around the digits of its Content-Length

    def __repr__(self) -> str:
        return f"<HeadReader last={self._last!r}>"

    def read(self, head: bytes) -> tuple[RequestHead, int | None]:
        """What a whole head says, and the length of its body if it tells one. Raises RequestRefused."""
        last = self._last
        if last is not None and head.startswith(self._before):
            digits = head[len(self._before) : len(head) - len(self._after)]
            if digits.isdigit() and len(digits) <= _MOST_DIGITS and head.endswith(self._after):
                return last, int(digits)
        parsed, length = parse(head, self._max_head_bytes)
        is_small = len(head) <= REMEMBERED_BYTES and len(parsed.fields) < REMEMBERED_FIELDS  # one is the length
        place = _LENGTH.search(head) if is_small and length is not None else None
        if place is not None:
            self._last, self._before, self._after = parsed, head[: place.start(1)], head[place.end(1) :]
        return parsed, length
