"""Changes to requests and answers that the relay makes on its own account, by `relay.core.document`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Final

import msgspec

from relay.core.document import Change, Document, edit, is_object
from relay.core.framing import Buffer
from relay.core.request import Route

#: Of a frame everything but its data: a byte order mark, names of fields, other lines, line ends (WHATWG HTML §9.2.6).
_NOT_DATA = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|\r\n|\n|\r)(?:data:[ ]?|[^\r\n]*+)")
_DATA: Final = b"data: "
_BLANKS: Final = b" " * len(_DATA)
_NO_OBJECT: Final = msgspec.Raw(b"null")


class _UsageHolder(msgspec.Struct, gc=False):
    usage: msgspec.Raw = _NO_OBJECT


class _Answer(msgspec.Struct, gc=False):
    usage: msgspec.Raw = _NO_OBJECT
    response: _UsageHolder | None = None
    choices: list[msgspec.Raw] | None = None
    object: str | None = None


class _Counts(msgspec.Struct, gc=False):
    prompt_tokens: msgspec.Raw = _NO_OBJECT


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_counts = msgspec.json.Decoder(_Counts).decode
_UNREADABLE: Final = (msgspec.DecodeError, ValueError, RecursionError)


def force_stream(body: Buffer, route: Route) -> bytes:
    """The request for a stream that ends with usage, of which one whole answer can be made. Raises as `edit`."""
    return edit(body, {"stream": b"true", **_usage_option(route)})


def ask_usage(body: Buffer, route: Route) -> bytes:
    """A streaming request that did not ask for usage with the option for it on, where the route has one.

    vLLM takes ``continuous_usage_stats`` for nothing beside it, until now, so it goes: otherwise all frames would
    change. Raises as `edit`.
    """
    if not (option := _usage_option(route)):
        return bytes(body)
    return edit(body, {"stream_options": {**option["stream_options"], "continuous_usage_stats": None}})


def add_cost(answer: Buffer, costs: Mapping[str, Decimal]) -> bytes:
    """A frame or a whole JSON answer with `costs` (name to amount) in its usage object, of which alone bytes change.

    The object is the top level's ``usage``, or that of ``response`` in the last event of the Responses API. An answer
    without one, or that cannot be read, is returned as it is.
    """
    amounts = {name: format(cost, "f").encode() for name, cost in costs.items()}

    def changes(found: _Answer) -> Mapping[str, Change]:
        if is_object(found.usage):
            return {"usage": amounts}
        return {"response": {"usage": amounts}} if _has_usage(found.response) else {}

    return _changed(answer, changes)


def set_cached_tokens(answer: Buffer, count: int) -> bytes:
    """A frame or a whole JSON answer that says in its usage object, as `add_cost` finds it, how much was cached.

    For an engine that got the prompt's key-value cache from another, and cannot know. What changes is the count of
    ``cached_tokens`` in ``prompt_tokens_details``, of the Responses API in ``input_tokens_details``. Anthropic's usage
    stays as it is, since its other counts depend on that one.
    """
    cached = {"cached_tokens": b"%d" % count}

    def changes(found: _Answer) -> Mapping[str, Change]:
        if is_object(found.usage) and bytes(_decode_counts(found.usage).prompt_tokens) != b"null":
            return {"usage": {"prompt_tokens_details": cached}}
        if is_object(found.usage) and found.object == "response":
            return {"usage": {"input_tokens_details": cached}}
        return {"response": {"usage": {"input_tokens_details": cached}}} if _has_usage(found.response) else {}

    return _changed(answer, changes)


def is_usage_only(frame: Buffer) -> bool:
    """Whether a frame holds a usage object and not one choice: what ``include_usage`` adds to a stream."""
    try:
        found = _decode_answer(json_of(frame))
    except _UNREADABLE:
        return False
    return found.choices == [] and is_object(found.usage)


def _changed(answer: Buffer, changes: Callable[[_Answer], Mapping[str, Change]]) -> bytes:
    """A frame or a whole answer with changes that depend on what is in it; as it is, where it cannot be read.

    The same object, if it is bytes and nothing changes.
    """
    text = json_of(answer)
    try:
        changed = changes(_decode_answer(text))
        return Document(text).edit(changed, within=answer) if changed else bytes(answer)
    except _UNREADABLE:
        return bytes(answer)


def _has_usage(response: _UsageHolder | None) -> bool:
    return response is not None and is_object(response.usage)


def json_of(answer: Buffer) -> Buffer:
    """The JSON of a frame, or of a whole answer, at its positions there.

    A line break in data stands where JSON has blank space. So blanks in place of all that is not data leave it.
    """
    if answer.startswith(_DATA) and answer.find(b"\n") == len(answer) - 2 and b"\r" not in answer:
        return _BLANKS + answer[len(_DATA) :]  # one line of data: nearly every frame there is
    return answer if answer.lstrip().startswith(b"{") else _NOT_DATA.sub(lambda found: b" " * len(found[0]), answer)


def _usage_option(route: Route) -> Mapping[str, Mapping[str, Change]]:
    if route in (Route.CHAT, Route.COMPLETIONS):
        return {"stream_options": {"include_usage": b"true"}}
    return {}  # responses and messages always say it
