"""What the relay reads of a request: which API it is for, and a handful of facts from its body.

The engine is the judge of a request, not the relay. So a body is peeked at, never validated: one narrow msgspec struct
skips over everything but the few keys that routing and accounting need, without building a single object of the prompt.
A key of the wrong type counts as absent, and the body goes on untouched for the engine to answer with its own 400.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final
from urllib.parse import unquote_to_bytes

import msgspec

from relay.core.loose import UNDECODABLE, decode_or_none, first_known


class Route(StrEnum):
    """Which of the generating APIs a path belongs to; as text, the ``route`` label of metrics."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    OTHER = "other"

    __hash__ = str.__hash__  # Enum's is a function of Python's, called at each look-up


_ROUTES = {
    b"/v1/chat/completions": Route.CHAT,
    b"/v1/completions": Route.COMPLETIONS,
    b"/v1/responses": Route.RESPONSES,
    b"/v1/messages": Route.MESSAGES,
}


def route_of(target: bytes) -> Route:
    """The route of an origin-form target; the query does not matter, everything else must be exact.

    But escapes are read as engines do: by ``/v1/chat/completion%73`` and ``/v1/chat%2Fcompletions`` they generate, too,
    and with a line break at the end, where Starlette's patterns end before it.
    """
    path = target.partition(b"?")[0]
    if b"%" in path:
        path = unquote_to_bytes(path).removesuffix(b"\n")
    return _ROUTES.get(path, Route.OTHER)


def may_stream(route: Route) -> bool:
    """Can an answer on this route be an event stream whose dialect the relay knows?"""
    return route is not Route.OTHER


#: Longest name of a model; a longer one counts as absent, since names are compared with patterns and recorded.
MAX_MODEL_CHARACTERS: Final = 1024

_Model = Annotated[str, msgspec.Meta(max_length=MAX_MODEL_CHARACTERS)]


class RequestFacts(msgspec.Struct, frozen=True, gc=False):
    """What the relay knows of a request from its body. `None` stands for absent, null, or not of the expected type."""

    #: The body is a JSON text. An empty body is not; nor are ``NaN`` or UTF-16, which Python's own parser would take.
    is_json: bool
    model: str | None = None
    wants_stream: bool = False
    #: ``stream_options.include_usage``: the client asked for the usage frame.
    include_usage: bool = False
    n: int | None = None
    user: str | None = None
    #: The limit on generated tokens, by whichever of its names the route uses.
    max_tokens: int | None = None


class _StreamOptions(msgspec.Struct, gc=False):
    include_usage: bool | None = None


class _Body(msgspec.Struct, gc=False):
    """The body of a well-typed request: decoded in one go."""

    model: _Model | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    user: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None


_ABSENT = msgspec.Raw(b"null")


class _LooseBody(msgspec.Struct, gc=False):
    """The same keys of an object in which at least one has another type: located, and decoded one by one."""

    model: msgspec.Raw = _ABSENT
    stream: msgspec.Raw = _ABSENT
    stream_options: msgspec.Raw = _ABSENT
    n: msgspec.Raw = _ABSENT
    user: msgspec.Raw = _ABSENT
    max_tokens: msgspec.Raw = _ABSENT
    max_completion_tokens: msgspec.Raw = _ABSENT
    max_output_tokens: msgspec.Raw = _ABSENT


class _LooseStreamOptions(msgspec.Struct, gc=False):
    include_usage: msgspec.Raw = _ABSENT


_decode = msgspec.json.Decoder(_Body).decode
_decode_loose = msgspec.json.Decoder(_LooseBody).decode
_decode_loose_options = msgspec.json.Decoder(_LooseStreamOptions).decode
_MODEL: Final = msgspec.json.Decoder(_Model)
_TEXT: Final = msgspec.json.Decoder(str)
_NUMBER: Final = msgspec.json.Decoder(int)
_SCALAR: Final = msgspec.json.Decoder(bool | int | float | str | None)
_decode_any = msgspec.json.Decoder(msgspec.Raw).decode


def peek(body: bytes | bytearray) -> RequestFacts:
    """Read the facts off a request body. Never raises: what cannot be read is not known."""
    try:
        found = _decode(body)
    except msgspec.ValidationError:
        return _peek_loosely(body)
    except UNDECODABLE:
        return RequestFacts(False)
    options = found.stream_options
    return RequestFacts(
        True,
        found.model,
        found.stream is True,
        options is not None and options.include_usage is True,
        found.n,
        found.user,
        first_known(found.max_completion_tokens, found.max_output_tokens, found.max_tokens),
    )


def _peek_loosely(body: bytes | bytearray) -> RequestFacts:
    try:
        found = _decode_loose(body)
    except msgspec.ValidationError:
        return RequestFacts(_is_json(body))  # an array or a scalar
    except UNDECODABLE:
        return RequestFacts(False)
    try:
        include_usage = _flag(_decode_loose_options(found.stream_options).include_usage)
    except msgspec.DecodeError:
        include_usage = False
    limits = (found.max_completion_tokens, found.max_output_tokens, found.max_tokens)
    return RequestFacts(
        True,
        decode_or_none(_MODEL, found.model),
        _flag(found.stream),
        include_usage,
        decode_or_none(_NUMBER, found.n),
        decode_or_none(_TEXT, found.user),
        first_known(*(decode_or_none(_NUMBER, limit) for limit in limits)),
    )


def _is_json(body: bytes | bytearray) -> bool:
    try:
        _decode_any(body)
    except UNDECODABLE:
        return False
    return True


def _flag(raw: msgspec.Raw) -> bool:
    """Truth as the engines' pydantic models see it in their default, lax mode: ``1`` and ``"true"`` are true too."""
    value = decode_or_none(_SCALAR, raw)
    if isinstance(value, str):
        return value.lower() in ("1", "on", "t", "true", "y", "yes")
    return bool(value == 1)
