"""What the frames of a stream mean, in the dialect of each route: content, usage, finish reason, error, end.

Most frames of a stream are alike: one more piece of content. They are not parsed. Once a first content frame has been
inspected, a `Meter` says how its like begins (`ordinary_prefix`) and which words (`markers`) must not occur in what was
received; frames that pass both are merely counted. All others are inspected: decoded by narrow structs that skip over
the content, and never fatal. A frame that is not JSON is counted and passed on, since a relay that dies of `data:`
serves nobody.

Which field means what is in vLLM's ``entrypoints/openai/protocol.py`` and Anthropic's and OpenAI's streaming
references; the recordings of a real engine in ``tests/captures`` are the judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from relay.core.request import Route

T = TypeVar("T")

_LINES = re.compile(rb"\r\n|\n|\r")
_BOM: Final = b"\xef\xbb\xbf"
#: Longest text of an error kept for the record.
_ERROR_TEXT: Final = 300


_NULL: Final = msgspec.Raw(b"null")


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one exchange as the engine counts them; None: it did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None
    total_tokens: int | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    """The usage object of all four dialects at once; their names do not collide."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None
    message: msgspec.Raw = _NULL


class _Incomplete(msgspec.Struct, gc=False):
    reason: str | None = None


class _Response(msgspec.Struct, gc=False):
    status: str | None = None
    incomplete_details: _Incomplete | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = _NULL


class _Stop(msgspec.Struct, gc=False):
    stop_reason: str | None = None


class _Message(msgspec.Struct, gc=False):
    usage: _Usage | None = None


class _Event(msgspec.Struct, gc=False):
    """What is read of one frame's JSON, whichever the dialect."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
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


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_stop = msgspec.json.Decoder(_Stop).decode
_decode_message = msgspec.json.Decoder(_Message).decode
_encode = msgspec.json.encode

#: What no ordinary frame holds, by route: what must be read, and the empty text of a frame that says nothing (a role, a
#: character half decoded). The model's own text cannot hold these words: its quotes are escaped.
_MARKERS: Final = (b'"usage":{', b'"finish_reason":"')
_COMPACT_MARKERS: Final = dict.fromkeys(Route, _MARKERS) | {
    Route.CHAT: (*_MARKERS, b'"content":""', b'"delta":{}'),
    Route.COMPLETIONS: (*_MARKERS, b'"text":""'),
}
_SPACED_MARKERS: Final = {
    route: tuple(marker.replace(b":", b": ") for marker in markers) for route, markers in _COMPACT_MARKERS.items()
}


class Meter:
    """What one exchange's frames amount to. `inspect` a frame, or count it as ordinary."""

    __slots__ = (
        "comments", "content_frames", "error", "finish_reason", "markers", "opaque_frames", "ordinary_prefix", "route",
        "saw_end", "saw_id_field", "usage",
    )  # fmt: skip

    def __init__(self, route: Route) -> None:
        self.route = route
        self.ordinary_prefix = b""  #: how content frames of this stream begin; empty: not known, inspect each
        self.markers: tuple[bytes, ...] = _COMPACT_MARKERS[route]  #: what an ordinary frame does not hold
        self.usage: Usage | None = None  #: the engine's last word on it
        self.finish_reason: str | None = None
        self.error: str | None = None  #: an error the engine reported inside its stream
        self.saw_end = False  #: the route's end mark has come
        self.saw_id_field = False
        self.content_frames = 0
        self.opaque_frames = 0  #: frames with data that is not JSON
        self.comments = 0

    def __repr__(self) -> str:
        return f"<Meter {self.route.value} content={self.content_frames} end={self.saw_end} usage={self.usage}>"

    @property
    def saw_content(self) -> bool:
        """Whether any content frame has passed."""
        return self.content_frames > 0

    @property
    def expects_end_mark(self) -> bool:
        """Whether streams of this route end with a mark."""
        return self.route is not Route.OTHER

    def count_ordinary(self, number: int) -> None:
        """Counts content frames recognised by `ordinary_prefix` and `markers`."""
        self.content_frames += number

    def inspect(self, frame: bytes) -> None:
        """Takes note of all that one frame says. Never raises."""
        event, data = self._fields(frame)
        if data is None:
            return
        if data == b"[DONE]":
            self.saw_end = True
            return
        try:
            body = _decode_event(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.opaque_frames += 1
            return
        if event == b"error" or _is_given(body.error) or body.object == "error" or body.type == "error":
            self.error = _error_text(body, data)
            return
        if body.usage is not None:
            self._take_usage(body.usage)
        if self._is_content(body):
            self.content_frames += 1
            self._learn(frame, data, is_typed=body.type is not None)
        self._take_end(body)

    def take_body(self, body: bytes) -> None:
        """Takes note of usage and finish reason of a whole JSON answer. Never raises."""
        try:
            answer = _decode_event(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if answer.usage is not None:
            self._take_usage(answer.usage)
        for choice in answer.choices or ():
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.finish_reason = self.finish_reason or answer.stop_reason
        if answer.object == "response":
            self.finish_reason = _finish_of(answer.status, answer.incomplete_details)

    def _fields(self, frame: bytes) -> tuple[bytes, bytes | None]:
        """The event type and the data of a frame (WHATWG HTML §9.2.6); no data: nothing is dispatched."""
        if frame.startswith(b"data: ") and frame.endswith(b"\n\n") and frame.count(b"\n") == 2 and b"\r" not in frame:
            return b"", frame[6:-2]
        event = b""
        data: list[bytes] = []
        for line in _LINES.split(frame.removeprefix(_BOM)):
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                data.append(value)
            elif name == b"event":
                event = value
            elif name == b"id":
                self.saw_id_field = True
            elif not name and line:
                self.comments += 1
            elif name == b"error":  # llama.cpp before September 2025
                event = name
                data.append(value)
        return event, b"\n".join(data) if data else None

    def _is_content(self, body: _Event) -> bool:
        if body.choices is not None:
            return any(choice.text or (choice.delta and _says_something(choice.delta)) for choice in body.choices)
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
            self.finish_reason = _decode_quietly(_decode_stop, body.delta, _Stop()).stop_reason or self.finish_reason
        elif kind == "message_start":
            usage = _decode_quietly(_decode_message, body.message, _Message()).usage
            if usage is not None:
                self._take_usage(usage)
        elif kind in ("response.completed", "response.incomplete", "response.failed") and body.response is not None:
            self.saw_end = True
            response = body.response
            self.finish_reason = _finish_of(response.status, response.incomplete_details)
            if response.usage is not None:
                self._take_usage(response.usage)
            if _is_given(response.error):
                self.error = _text_of(response.error)

    def _take_usage(self, usage: _Usage) -> None:
        """The engine's newest figures; what it leaves out this time (`message_delta` may) stays as it was."""
        before = self.usage or Usage()
        prompt = _first(usage.prompt_tokens, usage.input_tokens, before.prompt_tokens)
        completion = _first(usage.completion_tokens, usage.output_tokens, before.completion_tokens)
        inputs = usage.prompt_tokens_details or usage.input_tokens_details
        outputs = usage.completion_tokens_details or usage.output_tokens_details
        total = usage.total_tokens
        if total is None and prompt is not None and completion is not None:
            total = prompt + completion
        self.usage = Usage(
            prompt,
            _first(inputs.cached_tokens if inputs else None, usage.cache_read_input_tokens, before.cached_tokens),
            completion,
            _first(outputs.reasoning_tokens if outputs else None, before.reasoning_tokens),
            total,
        )

    def _learn(self, frame: bytes, data: bytes, *, is_typed: bool) -> None:
        """Remembers how a content frame of this stream begins."""
        if self.route is Route.OTHER:
            return
        if frame.startswith(b"event:"):
            self.ordinary_prefix = bytes(frame[: frame.find(b"data:") + 5])
        elif frame.startswith(b"data:") and not is_typed:
            # Up to the JSON's first value: its first key, no text of the model's. Where the type is in the JSON alone,
            # content and end may begin alike.
            self.ordinary_prefix = bytes(frame[: frame.find(b":", 5) + 1])
        if data.find(b'": ') >= 0 and data.find(b'":"') < 0:
            self.markers = _SPACED_MARKERS[self.route]


def _says_something(delta: dict[str, Any]) -> bool:
    """Whether a chat delta holds more than a role: any text, tool call, audio, under whatever name."""
    return any(value for name, value in delta.items() if name != "role")


def _is_given(raw: msgspec.Raw) -> bool:
    return bytes(raw) != b"null"


def _first(*values: int | None) -> int | None:
    for value in values:
        if value is not None:
            return value
    return None


def _finish_of(status: str | None, incomplete: _Incomplete | None) -> str | None:
    return (incomplete and incomplete.reason) or status


def _decode_quietly(decode: Callable[[msgspec.Raw], T], raw: msgspec.Raw, default: T) -> T:
    try:
        found = decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return default
    return found or default


def _error_text(body: _Event, data: bytes) -> str:
    return _text_of(body.error if _is_given(body.error) else msgspec.Raw(data))


def _text_of(raw: msgspec.Raw) -> str:
    """A line for the record out of an error object, whatever its form."""
    error = _decode_quietly(_decode_error, raw, _Error())
    text = error.message or bytes(raw).decode("utf-8", "replace")
    return text[:_ERROR_TEXT]


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
    body = error_body(route, status, code, message)
    if route is Route.MESSAGES:
        return b"event: error\ndata: " + body + b"\n\n"
    if route is Route.RESPONSES:
        return b"event: error\ndata: " + body[:-1] + b',"type":"error"}\n\n'
    return b"data: " + body + b"\n\n"
