"""A request and its head, which strict judges and h11 parses; one that repeats another is known by its bytes.

Clients send the same head again and again, on one connection and on many; what changes is the number in
``Content-Length`` and the names by which a request is found again: its ``X-Request-Id``, and what gateways and tracers
add. (HTTP/2 has its table of fields for that.) All else that is read of a head depends on its other bytes alone. So a
head whose other bytes are known is neither judged nor parsed again; only those values are checked. That saves half of
what a request costs before it is sent on, where the worker has rested for some milliseconds.
"""

from __future__ import annotations

import re
from typing import Final, TypeAlias

import h11

from relay.core import headers, strict
from relay.core.request import Route, route_of
from relay.core.shape import Shape

#: Longer heads, and those of more fields, are not kept: a small field takes thirty times its bytes once it is parsed.
REMEMBERED_BYTES: Final = 4096
REMEMBERED_FIELDS: Final = 48
#: Of all heads a worker keeps, in bytes as they came: some 250 ordinary ones in 1.1 MB; parsed, the worst take 4 MB.
#: The oldest go for what is new, and with them the credentials in them; but a connection keeps its own last one.
ALL_REMEMBERED_BYTES: Final = 131_072

#: Traces that differ with each request and are the engine's to read: W3C's, Zipkin's, AWS's, Google's, Cloudflare's.
_TRACES: Final = frozenset(
    (
        b"traceparent", b"tracestate", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-amzn-trace-id",
        b"x-cloud-trace-context", b"cf-ray", b"x-correlation-id",
    )
)  # fmt: skip
_TOLD: Final = frozenset((b"content-length", b"x-request-id"))
_FIRST_LETTERS: Final = bytes({name[0] for name in _TOLD | _TRACES})
#: The fields whose values are a request's own, where they are of visible characters; any other value stays part of what
#: a head is known by. Possessive: no position is tried twice. First letters are looked at before names: most lines end
#: there.
_OWN: Final = re.compile(
    rb"\r\n(?=[%b])((?i:%b)):[ \t]*+([!-~]*+)[ \t]*+(?=\r\n)"
    % (_FIRST_LETTERS + _FIRST_LETTERS.upper(), b"|".join(sorted(_TOLD | _TRACES)))
)
_MOST_DIGITS: Final = 19  # as `strict` allows


class RequestHead:
    """What a head says, but for what is its request's own: the length of the body, the id, and traces."""

    __slots__ = (
        "authorization", "expects_continue", "fields", "host", "is_chunked", "is_keep_alive", "method", "path", "route",
        "target", "version",
    )  # fmt: skip

    def __init__(self, event: h11.Request, fields: headers.Headers, *, expects_continue: bool) -> None:
        self.method = event.method
        self.version = event.http_version
        #: in origin form, and the authority it was sent to
        self.target, self.host = strict.check_request(self.method, event.target, self.version, fields)
        self.path = self.target.partition(b"?")[0]
        #: only a POST generates, and names a model: a browser that asks whether it may (OPTIONS) names none
        self.route = route_of(self.target) if self.method == b"POST" else Route.OTHER
        self.fields = [field for field in fields if field[0] not in _TOLD]  #: traces as the first such head had them
        self.authorization = headers.find(fields, b"authorization")
        self.expects_continue = expects_continue
        self.is_keep_alive = self.version >= b"1.1" and not headers.wants_close(self.version, fields)
        self.is_chunked = headers.find(fields, b"transfer-encoding") is not None

    def __repr__(self) -> str:
        return f"<RequestHead {self.method!r} {self.target!r}>"


class Request:
    """One request, read whole."""

    __slots__ = ("body", "fields", "has_body", "head", "id", "key")

    def __init__(self, head: RequestHead, fields: headers.Headers, request_id: str | None, *, has_body: bool) -> None:
        self.head = head  #: shared with other requests
        self.fields = fields  #: the head's, where nothing in them is this request's own
        self.id = request_id  #: the client's own; None: it has none, or no good one
        self.body = b""
        self.has_body = has_body  #: it comes with a body, be it an empty one
        self.key: str | None = None  #: the name of the API key it came with, where the relay knows keys

    def find(self, name: bytes) -> bytes | None:
        """The value of its first field called `name` (in lower case), but for ``content-length``."""
        if name == b"x-request-id":  # which is in no shared head
            return None if self.id is None else self.id.encode("ascii")
        return headers.find(self.fields, name)

    @property
    def path(self) -> str:
        """The target without its query, which may hold secrets: what goes into records."""
        return self.head.path.decode("ascii", "replace")

    def __repr__(self) -> str:
        return f"<Request {self.head!r} body={len(self.body)}>"


class KnownHead:
    """A head that is known by its bytes, but for the values found by `_OWN`."""

    __slots__ = ("id_at", "length_at", "parsed", "shape", "size", "traces")

    def __init__(
        self,
        parsed: RequestHead,
        shape: Shape | None,
        size: int,
        length_at: int | None,
        id_at: int | None,
        traces: tuple[tuple[int, int], ...],
    ) -> None:
        self.parsed = parsed
        self.shape = shape
        self.size = size  #: in bytes
        self.length_at = length_at  #: the place of the length among the values, and
        self.id_at = id_at  #: that of the id; None: there is none
        self.traces = traces  #: of each trace its place there, and that of its field


#: A head, perhaps shared with other requests, also of other connections; its fields, a list of this request's own where
#: it has traces; the length of the body, if it tells one; the client's own id, if it has a good one; and what the
#: connection's next head may be like. No named tuple: to make one is a call of Python's.
ReadHead: TypeAlias = tuple[RequestHead, headers.Headers, int | None, str | None, KnownHead | None]


class HeadReader:
    """Reads the heads of a worker's connections."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, ...], KnownHead] = {}  # by what is around the values of `_OWN`
        self._known_bytes = 0

    def __repr__(self) -> str:
        return f"<HeadReader known={len(self._known)}>"

    def read(self, head: bytes, max_head_bytes: int, like: KnownHead | None = None) -> ReadHead:
        """What a whole head says, which may be `like` the one before it. Raises RequestRefused."""
        if like is not None and like.shape is not None and (values := like.shape.values(head)) is not None:
            return _read_known(like, values) or self._read_anew(head, max_head_bytes)
        around, values = _split(head)
        known = self._known.get(around)
        return (known and _read_known(known, values)) or self._read_anew(head, max_head_bytes)

    def _read_anew(self, head: bytes, max_head_bytes: int) -> ReadHead:
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
        around, values = _split(head)
        length, ids = headers.find(fields, b"content-length"), headers.find_all(fields, b"x-request-id")
        own = [name.lower() for name in around[1::2]]
        length_at = own.index(b"content-length") if length is not None else None
        id_at = own.index(b"x-request-id") if b"x-request-id" in own else None
        # An id that is not among the values, of two words, say, makes each head a new one; of two ids the first counts.
        is_id_at_hand = own.count(b"x-request-id") == len(ids) <= 1
        traced = [at for at, name in enumerate(own) if name in _TRACES]
        places = [place for place, (name, _) in enumerate(parsed.fields) if name in _TRACES]
        are_traces_at_hand = [(own[at], values[at]) for at in traced] == [parsed.fields[place] for place in places]
        is_small = len(fields) <= REMEMBERED_FIELDS and len(head) <= REMEMBERED_BYTES
        known = None
        if is_id_at_hand and are_traces_at_hand and is_small:
            traces = tuple(zip(traced, places, strict=True))
            known = KnownHead(parsed, Shape.of(head, _OWN), len(head), length_at, id_at, traces)
            self._remember(around, known)
        request_id = headers.good_request_id(ids[0]) if ids else None
        return parsed, parsed.fields, None if length is None else int(length), request_id, known

    def _remember(self, around: tuple[bytes, ...], known: KnownHead) -> None:
        if around in self._known:
            self._known_bytes -= self._known.pop(around).size
        self._known_bytes += known.size
        while self._known_bytes > ALL_REMEMBERED_BYTES:
            oldest = next(iter(self._known))
            self._known_bytes -= self._known.pop(oldest).size
        self._known[around] = known


def _split(head: bytes) -> tuple[tuple[bytes, ...], list[bytes]]:
    """What is around the values found by `_OWN`: a text, then each field's name and the text behind it; and these."""
    around = _OWN.split(head)
    values = around[2::3]
    del around[2::3]
    return tuple(around), values


def _read_known(known: KnownHead, values: list[bytes]) -> ReadHead | None:
    """What a head says that is known but for these values; None where its length is wrong, which parsing is to say."""
    length = request_id = None
    if known.length_at is not None:
        digits = values[known.length_at]
        if not digits.isdigit() or len(digits) > _MOST_DIGITS:
            return None
        length = int(digits)
    if known.id_at is not None:
        request_id = headers.visible_request_id(values[known.id_at])
    fields = known.parsed.fields
    if known.traces:
        fields = fields.copy()
        for at, place in known.traces:
            fields[place] = fields[place][0], values[at]
    return known.parsed, fields, length, request_id, known
