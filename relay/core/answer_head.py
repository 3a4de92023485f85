"""What the head of an engine's answer says, worked out once: heads repeat, as those of a second's streams do."""

from __future__ import annotations

import h11

from relay.core import headers
from relay.core.framing import BodyKind, response_body_kind


class AnswerHead:
    """The head of a final answer. Raises FramingError where it contradicts itself."""

    __slots__ = (
        "_stream_start", "fields", "has_frames", "is_encoded", "is_keep_alive", "is_readable", "kind", "reason",
        "status",
    )  # fmt: skip

    def __init__(self, method: bytes, event: h11.Response) -> None:
        version = event.http_version
        self.status = event.status_code
        self.reason = event.reason
        self.fields: headers.Headers = list(event.headers)
        self.kind = response_body_kind(method, self.status, version, self.fields)
        #: behind the body the connection can carry another exchange, as far as the head can tell
        self.is_keep_alive = (
            self.kind is not BodyKind.CLOSE
            and not headers.wants_close(version, self.fields)
            and not (self.kind is BodyKind.NONE and _announces_body(self.fields))
        )
        self.is_encoded = headers.find(self.fields, b"content-encoding") is not None
        self.is_readable = self.kind is not BodyKind.NONE and not self.is_encoded  #: a body, without a coding
        #: it is an event stream, to be relayed frame by frame; what cannot be read passes as it comes
        self.has_frames = self.is_readable and headers.is_event_stream(headers.content_type(self.fields))
        self._stream_start: headers.HeadStart | None = None

    @property
    def stream_start(self) -> headers.HeadStart:
        """How the head of the client's stream begins, of which this is the engine's."""
        if self._stream_start is None:
            self._stream_start = headers.head_start(self.status, self.reason, self.fields, event_stream=True)
        return self._stream_start

    def __repr__(self) -> str:
        return f"<AnswerHead {self.status} {self.kind.value}>"


def _announces_body(fields: headers.Headers) -> bool:
    """Whether the head of an answer without a body (HEAD, 204, 304) tells the length of one.

    An engine that means it sends it, perhaps only when the next request is on its way; that would take it for its
    answer. So such a connection ends with the exchange, though RFC 9110 §8.6 allows the field in all but a 204.
    """
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0")) for name, value in fields
    )
