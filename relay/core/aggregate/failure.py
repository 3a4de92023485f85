"""Why no answer can be made of a stream; and what an engine that reports an error inside it would have said without.

Before a stream the engine can say what is wrong by a status; inside one it is 200 already, and the error is an event.
A client that has not asked for a stream is owed the status. The rule: ``code``, where it is an HTTP status (vLLM and
SGLang put it there); else by the error's name, in ``type`` or ``code``; else 500. What is not even JSON is 502.

The body is the engine's own as far as possible: ``{"error": …}``, for SGLang flat (its ``object`` tells:
``serving_base.py``), on `/v1/messages` Anthropic's form.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from relay.core.aggregate.parts import Members
from relay.core.dialect import error_body
from relay.core.loose import UNDECODABLE
from relay.core.request import Route

#: What is raised for data that is no JSON, or lacks what the dialect demands.
UNMERGEABLE: Final = (*UNDECODABLE, ValueError, KeyError)
_NO_ERROR: Final = (b"null", b'""', b"{}", b"false")

#: Statuses by the names of errors, in lower case without underscores and blanks: vLLM's and SGLang's classes,
#: OpenAI's and Anthropic's types, the codes of the Responses API.
_STATUSES: Final = {
    "badrequesterror": 400, "invalidrequesterror": 400, "invalidprompt": 400, "authenticationerror": 401,
    "invalidapikey": 401, "permissionerror": 403, "permissiondeniederror": 403, "notfounderror": 404,
    "modelnotfound": 404, "requesttoolarge": 413, "unprocessableentityerror": 422, "ratelimiterror": 429,
    "ratelimitexceeded": 429, "insufficientquota": 429, "serviceunavailableerror": 503, "timeouterror": 504,
    "overloadederror": 529,
}  # fmt: skip


class AggregateError(Exception):
    """Of this stream no answer can be made."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class EngineError(AggregateError):
    """The engine reported an error inside its stream; `status` and `body` are what it would have sent without one."""

    def __init__(self, message: str, *, status: int, body: bytes) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class Truncated(AggregateError):
    """The stream ended before the answer did."""


class TooLarge(AggregateError):
    """The answer exceeds the limit."""


def is_error(members: Members) -> bool:
    """Whether an event's object is an error, by any of the ways to say so."""
    if "error" in members and bytes(members["error"]) not in _NO_ERROR:
        return True
    return any(name in members and bytes(members[name]) == b'"error"' for name in ("object", "type"))


def unreadable(route: Route, data: bytes, *, is_error: bool) -> EngineError:
    """For data that is no event of the dialect, perhaps because an error is told in plain text."""
    text = data[:300].decode("utf-8", "replace")
    message = text if is_error else f"the engine's stream holds what is no event of this API: {text}"
    return EngineError(message, status=502, body=error_body(route, 502, "upstream_error", message))


def engine_error(route: Route, data: bytes, members: Members) -> EngineError:
    """The error that an event with object `members`, of text `data`, reports. Raises what is `UNMERGEABLE`."""
    outer = _fields(data)
    has_inner = "error" in members and bytes(members["error"]) not in _NO_ERROR
    inner = _fields(members["error"]) if has_inner else outer
    status = _status_of(inner) or _status_of(outer) or 500
    message = str(inner.get("message") or data[:300].decode("utf-8", "replace"))
    code = str(inner.get("code") or inner.get("type") or "upstream_error")
    text: bytes | msgspec.Raw
    if route is Route.MESSAGES:
        text = data if has_inner and outer.get("type") == "error" else error_body(route, status, code, message)
    elif inner.get("object") == "error":
        text = members["error"] if has_inner else data
    elif has_inner and bytes(members["error"]).startswith(b"{"):
        text = b'{"error":%b}' % bytes(members["error"])
    elif not has_inner and "message" in outer and outer.get("type") != "error":
        text = b'{"error":%b}' % data
    else:
        text = error_body(route, status, code, message)
    return EngineError(message, status=status, body=msgspec.json.format(bytes(text), indent=-1))


def _fields(raw: bytes | msgspec.Raw) -> dict[str, Any]:
    """An error's members; one that is not an object is its own message."""
    found = msgspec.json.decode(raw)
    return found if isinstance(found, dict) else {"message": found}


def _status_of(error: dict[str, Any]) -> int | None:
    code = error.get("code")
    if isinstance(code, str) and code.isdecimal():
        code = int(code)
    if isinstance(code, int) and 400 <= code <= 599:
        return code
    for name in (error.get("type"), error.get("code")):
        if isinstance(name, str) and (status := _STATUSES.get(name.lower().replace("_", "").replace(" ", ""))):
            return status
    return None
