"""What the head of an engine's answer says, worked out once: heads repeat, but for a date, a length and an id."""

from __future__ import annotations

import re
from typing import Final, TypeAlias

import h11

from relay.core import headers
from relay.core.framing import BodyKind, response_body_kind

#: Of each engine, so many final heads are known by their bytes, up to this size.
REMEMBERED_HEADS: Final = 16
REMEMBERED_BYTES: Final = 2048
#: And so many as they came, to the byte: an engine's streams begin alike for a second.
REMEMBERED_WHOLE: Final = 4

#: The fields whose values are an answer's own, where they are of printable characters; any other value stays part of
#: what a head is known by. Possessive: no position is tried twice. First letters are looked at before names: most
#: lines end there.
_OWN_NAMES: Final = frozenset({b"content-length", b"date", b"x-request-id"})
_FIRST_LETTERS: Final = bytes({name[0] for name in _OWN_NAMES})
_OWN: Final = re.compile(
    rb"\r\n(?=[%b])((?i:%b)):[ \t]*+([ -~]*+)(?=\r\n)"
    % (_FIRST_LETTERS + _FIRST_LETTERS.upper(), b"|".join(sorted(_OWN_NAMES)))
)
_MOST_DIGITS: Final = 19


class AnswerHead:
    """The head of a final answer. Raises FramingError where it contradicts itself."""

    __slots__ = (
        "_start", "_stream_start", "fields", "has_frames", "is_encoded", "is_keep_alive", "is_readable", "kind",
        "reason", "status",
    )  # fmt: skip

    def __init__(self, method: bytes, event: h11.Response) -> None:
        version = event.http_version
        self.status = event.status_code
        self.reason = event.reason
        self.fields: headers.Headers = list(event.headers)  #: those of `_OWN` as the first such head had them
        self.kind = response_body_kind(method, self.status, version, self.fields)
        #: behind the body the connection can carry another exchange, as far as the head can tell
        self.is_keep_alive = (
            self.kind is not BodyKind.CLOSE
            and not headers.wants_close(version, self.fields)
            and not (self.kind is BodyKind.NONE and _announces_body(self.fields))
        )
        self.is_encoded = headers.is_encoded(self.fields)
        self.is_readable = self.kind is not BodyKind.NONE and not self.is_encoded  #: a body, without a coding
        #: it is an event stream, to be relayed frame by frame; what cannot be read passes as it comes
        self.has_frames = self.is_readable and headers.is_event_stream(headers.content_type(self.fields))
        self._start: headers.HeadStart | None = None
        self._stream_start: headers.HeadStart | None = None

    @property
    def start(self) -> headers.HeadStart:
        """How the head of the client's answer begins, of which this is the engine's; without its date.

        Its length, too, is that of the first such head; but of an answer without a body, where it matters, each is its
        own first (`KnownHeads.remember`).
        """
        if self._start is None:
            self._start = headers.head_start(self.status, self.reason, self.fields)
        return self._start

    @property
    def stream_start(self) -> headers.HeadStart:
        """The same, for an event stream."""
        if self._stream_start is None:
            self._stream_start = headers.head_start(self.status, self.reason, self.fields, event_stream=True)
        return self._stream_start

    def __repr__(self) -> str:
        return f"<AnswerHead {self.status} {self.kind.value}>"


#: A head, and for each value of `_OWN`, in their order, the place of its field.
_Known: TypeAlias = tuple[AnswerHead, tuple[int, ...]]


class KnownHeads:
    """One engine's heads that are known by their bytes, but for the values that are each answer's own."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, ...], _Known] = {}  # by what is around the values
        self._whole: dict[bytes, tuple[AnswerHead, headers.Headers]] = {}  # what `find` has answered last

    def __repr__(self) -> str:
        return f"<KnownHeads {len(self._known)}>"

    def find(self, head: bytes) -> tuple[AnswerHead, headers.Headers] | None:
        """What a head says that came before, with its own fields; None: it has to be parsed."""
        found = self._whole.get(head)
        if found is None and len(head) <= REMEMBERED_BYTES:
            found = self._find_around(head)
            if found is not None:
                if len(self._whole) >= REMEMBERED_WHOLE:
                    self._whole.clear()
                self._whole[head] = found
        return found

    def _find_around(self, head: bytes) -> tuple[AnswerHead, headers.Headers] | None:
        around = _OWN.split(head)  # a text, then each field's name and value, and the text behind it
        values = around[2::3]
        del around[2::3]
        known = self._known.get(tuple(around))
        if known is None:
            return None
        parsed, places = known
        fields = parsed.fields.copy()
        for place, value in zip(places, values, strict=True):
            name, value = fields[place][0], value.rstrip(b" ")
            if name == b"content-length" and not (value.isdigit() and len(value) <= _MOST_DIGITS):
                return None
            fields[place] = name, value
        return parsed, fields

    def remember(self, head: bytes, parsed: AnswerHead) -> None:
        """Takes note of what a whole head was parsed to; of one that is long, or has no body, does nothing."""
        if len(head) > REMEMBERED_BYTES or parsed.kind is BodyKind.NONE:  # whose length says something else
            return
        if head.lower().count(b"\r\ncontent-length:") > 1:  # they may contradict each other the next time
            return
        around = _OWN.split(head)
        own = [(name.lower(), value.rstrip(b" ")) for name, value in zip(around[1::3], around[2::3], strict=True)]
        places = tuple(at for at, (name, _) in enumerate(parsed.fields) if name in _OWN_NAMES)
        if [parsed.fields[at] for at in places] != own:  # a value that is no answer's own, as `_OWN` has it
            return
        del around[2::3]
        if len(self._known) >= REMEMBERED_HEADS:
            self._known.clear()
            self._whole.clear()
        self._known[tuple(around)] = parsed, places


def _announces_body(fields: headers.Headers) -> bool:
    """Whether the head of an answer without a body (HEAD, 204, 304) tells the length of one.

    An engine that means it sends it, perhaps only when the next request is on its way; that would take it for its
    answer. So such a connection ends with the exchange, though RFC 9110 §8.6 allows the field in all but a 204.
    """
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")) for name, value in fields
    )
