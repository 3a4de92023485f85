"""What the frames of a stream mean, in the dialect of each route: content, usage, finish reason, error, end.

Most frames of a stream are alike, one more piece of content, and are merely counted; a chat's opening role is known by
its form as well (`relay.core.ordinary`). All others are inspected: decoded by narrow structs that skip over the
content, and never fatal. A frame that is not JSON is counted and passed on, since a relay that dies of `data:` serves
nobody.

Which field means what is in vLLM's ``entrypoints/openai`` (each route's ``protocol.py``), and in Anthropic's and
OpenAI's streaming references; the recordings of a real engine in ``tests/captures`` are the judge.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any, Final

import msgspec

from relay.core import ordinary
from relay.core.framing import Buffer
from relay.core.loose import UNDECODABLE, decode_or_none
from relay.core.request import Route
from relay.core.sse import fields
from relay.core.usage import Usage, WireUsage, updated

__all__ = ["Meter", "Usage", "error_body", "error_frame", "refusal_frame"]

#: Longest text of an error kept for the record, in characters.
_ERROR_TEXT: Final = 300

_NULL: Final = msgspec.Raw(b"null")
_NO_ERROR: Final = (b"null", b'""', b"{}", b"false")


class _Choice(msgspec.Struct, gc=False):
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Incomplete(msgspec.Struct, gc=False):
    reason: str | None = None


class _Response(msgspec.Struct, gc=False):
    status: str | None = None
    incomplete_details: _Incomplete | None = None
    usage: WireUsage | None = None
    error: msgspec.Raw = _NULL


class _Stop(msgspec.Struct, gc=False):
    stop_reason: str | None = None


class _Message(msgspec.Struct, gc=False):
    usage: WireUsage | None = None


class _Event(msgspec.Struct, gc=False):
    """What is read of one frame's JSON, whichever the dialect."""

    choices: list[_Choice] | None = None
    usage: WireUsage | None = None
    type: str | None = None
    object: str | None = None
    error: msgspec.Raw = _NULL
    message: msgspec.Raw = _NULL
    response: _Response | None = None
    delta: msgspec.Raw = _NULL
    stop_reason: str | None = None
    status: str | None = None
    incomplete_details: _Incomplete | None = None


class _Error(msgspec.Struct, gc=False):
    message: str | None = None
    type: str | None = None
    code: str | int | None = None


class _Refusal(msgspec.Struct, gc=False):
    error: msgspec.Raw = _NULL


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_ERROR: Final = msgspec.json.Decoder(_Error)
_MESSAGE: Final = msgspec.json.Decoder(_Message)
_REFUSAL: Final = msgspec.json.Decoder(_Refusal)
_STOP: Final = msgspec.json.Decoder(_Stop)
#: For frames with a key of an unexpected type: each key by itself.
_FIELDS: Final = tuple((field.name, msgspec.json.Decoder(field.type)) for field in msgspec.structs.fields(_Event))
_encode = msgspec.json.encode
#: What a usage object begins behind, which is none in a string: there the quotes are escaped.
_USAGE: Final = re.compile(rb'(?<!\\)"usage"[ \t\r\n]*:[ \t\r\n]*(?=\{)')
_MOST_USAGES: Final = 4
_python_decoder: Final = json.JSONDecoder()  # reads a value that has something behind it, as msgspec does not


class Meter:
    """What one exchange's frames amount to. `take` each, or count those known to be ordinary."""

    __slots__ = (
        "_inspected", "_is_ordinary", "comments", "error", "finish_reason", "opaque_frames", "ordinary", "route",
        "saw_end", "saw_id_field", "usage",
    )  # fmt: skip

    def __init__(self, route: Route) -> None:
        self.route = route
        self._is_ordinary = ordinary.FRAMES[route].fullmatch
        self.usage: Usage | None = None  #: the engine's last word on it
        self.finish_reason: str | None = None  #: of the choice that ended last
        self.error: str | None = None  #: an error the engine reported, in its stream or as its answer
        self.saw_end = False  #: the route's end mark has come
        self.saw_id_field = False  #: an ``id:`` line has come: openai's SDK then fails on comments
        self.ordinary = ordinary.Count()  #: content frames that are not inspected, but only counted
        self._inspected = 0  # content frames that were
        self.opaque_frames = 0  #: frames with data that is not the JSON expected
        self.comments = 0

    def __repr__(self) -> str:
        return f"<Meter {self.route.value} content={self.content_frames} end={self.saw_end} usage={self.usage}>"

    @property
    def counted(self) -> Usage | None:
        """`usage`; where the engine has not said what it generated, content frames stand in: the stream was cut."""
        usage = self.usage
        if not self.content_frames or (usage is not None and usage.completion_tokens is not None):
            return usage
        return msgspec.structs.replace(usage or Usage(), completion_tokens=self.content_frames)

    @property
    def content_frames(self) -> int:
        """How many frames had content."""
        return self.ordinary.frames + self._inspected

    @property
    def saw_content(self) -> bool:
        """Whether any content frame has passed."""
        return self._inspected > 0 or self.ordinary.frames > 0

    @property
    def expects_end_mark(self) -> bool:
        """Whether streams of this route end with a mark."""
        return self.route is not Route.OTHER

    def take(self, frame: Buffer) -> None:
        """Takes note of a frame: counts an ordinary one, inspects any other. Never raises."""
        if self._is_ordinary(frame):
            self.ordinary.frames += 1
        else:
            self.inspect(frame)

    def inspect(self, frame: Buffer) -> None:
        """Takes note of all that one frame says. Never raises."""
        event, data, others = fields(bytes(frame))
        if others:
            self.comments += others.count(b"")
            self.saw_id_field = self.saw_id_field or b"id" in others
        if data is not None:
            self.inspect_data(data, event)

    def inspect_data(self, data: bytes, event: bytes = b"") -> None:
        """Takes note of what the data of a frame says, which is an `event` of a type or none. Never raises."""
        if data == b"[DONE]":
            self.saw_end = True
            return
        try:
            body = _decode_event(data)
        except UNDECODABLE:
            self.opaque_frames += 1
            salvaged = _salvaged(data)
            if salvaged is None:
                self.error = _cut(data) if event == b"error" else self.error
                return
            body = salvaged
        self._take_error(body, data, is_error=event == b"error")
        if body.usage is not None:
            self.usage = updated(self.usage, body.usage)
        if self._is_content(body):
            self._inspected += 1
        self._take_end(body)

    def take_body(self, body: bytes, *, status: int = 200) -> None:
        """Takes note of usage, finish reason and error of a whole answer, which should be JSON. Never raises."""
        is_refusal = status >= 400
        try:
            answer = _decode_event(body)
        except UNDECODABLE:
            if is_refusal:
                self.error = _cut(body) or None
            return
        self._take_error(answer, body, is_error=is_refusal)
        if answer.usage is not None:
            self.usage = updated(self.usage, answer.usage)
        for choice in answer.choices or ():
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.finish_reason = self.finish_reason or answer.stop_reason
        if answer.object == "response":
            self.finish_reason = _finish_of(answer.status, answer.incomplete_details)

    def take_end(self, text: bytes) -> None:
        """Takes note of the usage in the end of a whole answer whose beginning is not known. Never raises."""
        for found in [*_USAGE.finditer(text)][: -_MOST_USAGES - 1 : -1]:  # the last is the first to be tried
            with suppress(ValueError, RecursionError):
                usage, _ = _python_decoder.raw_decode(text[found.end() :].decode("utf-8", "replace"))
                self.take_body(_encode({"usage": usage}))
            if self.usage is not None:
                return

    def _take_error(self, body: _Event, text: bytes, *, is_error: bool) -> None:
        has_error = body.error is not _NULL and bytes(body.error) not in _NO_ERROR
        if has_error or is_error or body.object == "error" or body.type == "error":
            self.error = _error_text(body.error if has_error else msgspec.Raw(text))

    def _is_content(self, body: _Event) -> bool:
        if body.choices is not None:
            for choice in body.choices:  # noqa: SIM110 - any() makes a generator, which costs more than the rest
                if choice.text or (choice.delta and _says_something(choice.delta)):
                    return True
            return False
        kind = body.type or ""
        return kind == "content_block_delta" or (kind.startswith("response.") and kind.endswith(".delta"))

    def _take_end(self, body: _Event) -> None:
        for choice in body.choices or ():
            self.finish_reason = choice.finish_reason or self.finish_reason
        kind = body.type
        if kind is None:
            return
        if kind == "message_stop":
            self.saw_end = True
        elif kind == "message_delta":
            stop = decode_or_none(_STOP, body.delta)
            self.finish_reason = (stop and stop.stop_reason) or self.finish_reason
        elif kind == "message_start":
            message = decode_or_none(_MESSAGE, body.message)
            if message is not None and message.usage is not None:
                # What it says of the output is a placeholder: should the stream be cut, nothing is known of it.
                message.usage.output_tokens = None
                self.usage = updated(self.usage, message.usage)
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self.saw_end = True
            response = body.response or _Response()
            self.finish_reason = _finish_of(response.status, response.incomplete_details)
            if response.usage is not None:
                self.usage = updated(self.usage, response.usage)
            if bytes(response.error) not in _NO_ERROR:
                self.error = _error_text(response.error)


def _salvaged(data: bytes) -> _Event | None:
    """What can be read of an object with a key of an unexpected type, which counts as absent; None: no JSON object."""
    try:
        found = _decode_fields(data)
    except UNDECODABLE:
        return None
    event = _Event()
    for name, decoder in _FIELDS:
        if name in found and (value := decode_or_none(decoder, found[name])) is not None:
            setattr(event, name, value)
    return event


def _says_something(delta: dict[str, Any]) -> bool:
    """Whether a chat delta holds more than a role: any text, tool call, audio, under whatever name."""
    for name, value in delta.items():  # noqa: SIM110 - as above
        if value and name != "role":
            return True
    return False


def _finish_of(status: str | None, incomplete: _Incomplete | None) -> str | None:
    return (incomplete and incomplete.reason) or status


def _error_text(raw: msgspec.Raw) -> str:
    """A line for the record out of an error, whatever its form."""
    error = decode_or_none(_ERROR, raw) or _Error()
    text = error.message or error.type or error.code
    return _cut(bytes(raw)) if text is None else str(text)[:_ERROR_TEXT]


def _cut(text: bytes) -> str:
    return text[: 4 * _ERROR_TEXT].decode("utf-8", "replace")[:_ERROR_TEXT]


# -- the relay's own errors, in the client's dialect

#: `type` of an error by its status, as the two APIs name them.
_OPENAI_TYPES: Final = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip
_ANTHROPIC_TYPES: Final = _OPENAI_TYPES | {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}


def error_body(route: Route, status: int, code: str, message: str) -> bytes:
    """The JSON body of an answer with which the relay refuses or gives up."""
    if route is Route.MESSAGES:
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return _encode({"type": "error", "error": {"type": kind, "message": message}})
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return _encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


def error_frame(route: Route, status: int, code: str, message: str) -> bytes:
    """One well-formed frame that the route's official SDK raises on.

    ``{"error": …}`` in plain data is what openai's SDK looks for on every route; anthropic's wants ``event: error``.
    """
    return _framed(route, error_body(route, status, code, message))


def refusal_text(answer: bytes) -> str:
    """A line for the record out of an engine's error answer; empty where that says nothing."""
    return _error_text(msgspec.Raw(_error_object(answer) or answer))


def _error_object(answer: bytes) -> bytes:
    """The error object of an engine's error answer, in one line; empty where it has none."""
    refusal = decode_or_none(_REFUSAL, msgspec.Raw(answer))
    error = bytes(refusal.error).translate(None, b"\r\n") if refusal else b""
    return error if error.startswith(b"{") else b""


def refusal_frame(route: Route, status: int, code: str, message: str, answer: bytes) -> bytes:
    """The body of an engine's error answer as a frame, for a stream that began before it.

    The engine's error object stays as it is, in one line. Of any other form (SGLang's flat one, FastAPI's ``detail``, a
    proxy's page) the beginning of what it says is put behind `message`.
    """
    error = _error_object(answer)
    if not error:
        said = _error_text(msgspec.Raw(answer))
        return error_frame(route, status, code, f"{message}: {said}" if said else message)
    return _framed(route, (b'{"type":"error","error":%b}' if route is Route.MESSAGES else b'{"error":%b}') % error)


def _framed(route: Route, body: bytes) -> bytes:
    if route is Route.MESSAGES:
        return b"event: error\ndata: " + body + b"\n\n"
    if route is Route.RESPONSES:
        return b"event: error\ndata: " + body[:-1] + b',"type":"error"}\n\n'
    return b"data: " + body + b"\n\n"
