"""Byte-careful changes to a JSON object: the members named change, every other byte stays as it was written.

Decoding and encoding again would respell what is none of the relay's business: numbers beyond a double, the order of
keys, escapes, duplicate keys. So nothing is re-encoded. msgspec skips over the values in C and says how long each is;
that is enough to walk from member to member, and edits are spans of the text replaced by other text.

To msgspec a duplicate key is the same key, and it keeps the last. Keys decoded into a type of ours without equality all
stay: the engine's parser may be one that takes the first. The type also gets the key with its escapes resolved, so that
``"str\\u0065am"`` is no way around a change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from decimal import Decimal
from functools import lru_cache
from typing import Final, TypeAlias

import msgspec

from relay.core.framing import Buffer
from relay.core.request import Route

#: What becomes of a member: raw JSON in its place, None to remove it, or changes to the members of the object it is.
Change: TypeAlias = "bytes | Mapping[str, Change] | None"

#: Most members of an object to be edited. Requests have some thirty; each costs a microsecond of the event loop.
MAX_MEMBERS: Final = 4096

# Possessive (`++`, `*+`): no position is tried twice, whatever the input, and nothing is kept of each escape in a key.
# What `relay.core.strict` says of groups does not concern this one: in JSON it fails at its first byte only.
_KEY = re.compile(rb'[ \t\r\n]*+[{,][ \t\r\n]*+("(?:[^"\\]++|\\.)*+")[ \t\r\n]*+:[ \t\r\n]*+')
#: Of a frame everything but its data: a byte order mark, names of fields, other lines, line ends (WHATWG HTML §9.2.6).
_NOT_DATA = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|\r\n|\n|\r)(?:data:[ ]?|[^\r\n]*+)")
_DATA: Final = b"data: "
_BLANKS: Final = b" " * len(_DATA)
_NO_OBJECT: Final = msgspec.Raw(b"null")


class _Key:
    """One key of an object, equal to no other."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Member(msgspec.Struct, gc=False):
    """``text[start:stop]`` is key and value, ``text[value:stop]`` the value."""

    name: str
    start: int
    value: int
    stop: int


#: `start`, `stop` and `new`: ``text[start:stop]`` becomes `new`.
_Edit: TypeAlias = tuple[int, int, bytes]


class _UsageHolder(msgspec.Struct, gc=False):
    usage: msgspec.Raw = _NO_OBJECT


class _Answer(msgspec.Struct, gc=False):
    usage: msgspec.Raw = _NO_OBJECT
    response: _UsageHolder | None = None
    choices: list[msgspec.Raw] | None = None
    object: str | None = None


class _Counts(msgspec.Struct, gc=False):
    prompt_tokens: msgspec.Raw = _NO_OBJECT


class _Walker:
    """Finds an object's members, at most `MAX_MEMBERS`. One for all: to make its decoder costs more than a walk."""

    def __init__(self) -> None:
        self._left = 0  # of the walk under way: walks never nest, nor are there threads
        self._decode = msgspec.json.Decoder(dict[_Key, msgspec.Raw], dec_hook=self._take_key).decode

    def _take_key(self, _: type, name: str) -> _Key:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"an object with more than {MAX_MEMBERS} members")
        return _Key(name)

    def members(self, text: Buffer) -> list[_Member]:
        """Raises ValueError where `text` is not a JSON object, or one with too many members."""
        self._left = MAX_MEMBERS
        try:
            pairs = self._decode(text)
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        except msgspec.DecodeError as error:
            raise ValueError(f"not a JSON object: {error}") from None
        members: list[_Member] = []
        position = 0
        for key, raw in pairs.items():
            found = _KEY.match(text, position)
            assert found is not None  # msgspec has found a key here
            position = found.end() + len(raw)
            members.append(_Member(key.name, found.start(1), found.end(), position))
        return members


_members = _Walker().members
_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_counts = msgspec.json.Decoder(_Counts).decode
_encode = msgspec.json.Encoder().encode
_UNREADABLE: Final = (msgspec.DecodeError, ValueError, RecursionError)


class Document:
    """A JSON object that becomes several others: its members are looked for once."""

    __slots__ = ("_members", "text")

    def __init__(self, text: Buffer) -> None:
        """Raises ValueError where `text` is not a JSON object, or has more than `MAX_MEMBERS` members."""
        self.text = text
        self._members = _members(text)

    def __repr__(self) -> str:
        return f"<Document bytes={len(self.text)} members={len(self._members)}>"

    def has_none_of(self, names: AbstractSet[str]) -> bool:
        """Whether there is no member of any of these names."""
        for member in self._members:  # noqa: SIM110 - any() makes a generator, which costs more than the rest
            if member.name in names:
                return False
        return True

    def edit(self, changes: Mapping[str, Change]) -> bytes:
        """The object with `changes`, as of the function `edit`.

        Raises ValueError where an inner object to be changed has too many members.
        """
        return _applied(_edits(self.text, self._members, changes), self.text)


def edit(body: Buffer, changes: Mapping[str, Change]) -> bytes:
    """Returns a JSON object with members changed, and everything else of it unchanged to the byte.

    A member that is there gets its new value in its place, all of them where a key is there more than once; one that
    is not is appended. A mapping changes members of an inner object and makes one where there is none or null; a
    value of any other type it leaves alone, for the engine to refuse. New values are not checked to be JSON.

    Raises ValueError where `body` is not a JSON object, or has more than `MAX_MEMBERS` members. Time is linear in the
    length of the body: one to two milliseconds per megabyte.
    """
    return Document(body).edit(changes)


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
        if _is_object(found.usage):
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
        if _is_object(found.usage) and bytes(_decode_counts(found.usage).prompt_tokens) != b"null":
            return {"usage": {"prompt_tokens_details": cached}}
        if _is_object(found.usage) and found.object == "response":
            return {"usage": {"input_tokens_details": cached}}
        return {"response": {"usage": {"input_tokens_details": cached}}} if _has_usage(found.response) else {}

    return _changed(answer, changes)


def is_usage_only(frame: Buffer) -> bool:
    """Whether a frame holds a usage object and not one choice: what ``include_usage`` adds to a stream."""
    try:
        found = _decode_answer(json_of(frame))
    except _UNREADABLE:
        return False
    return found.choices == [] and _is_object(found.usage)


def _changed(answer: Buffer, changes: Callable[[_Answer], Mapping[str, Change]]) -> bytes:
    """A frame or a whole answer with changes that depend on what is in it; as it is, where it cannot be read.

    The same object, if it is bytes and nothing changes.
    """
    text = json_of(answer)
    try:
        edits = _edits(text, _members(text), changed) if (changed := changes(_decode_answer(text))) else []
    except _UNREADABLE:
        edits = []
    return _applied(edits, answer) if edits else bytes(answer)


def _has_usage(response: _UsageHolder | None) -> bool:
    return response is not None and _is_object(response.usage)


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


def _is_object(value: Buffer | msgspec.Raw) -> bool:
    return bytes(memoryview(value)[:1]) == b"{"


def _applied(edits: list[_Edit], text: Buffer) -> bytes:
    pieces: list[bytes | memoryview] = []
    position = 0
    view = memoryview(text)
    for start, stop, new in edits:
        pieces += (view[position:start], new)
        position = stop
    pieces.append(view[position:])
    return b"".join(pieces)


def _edits(text: Buffer, members: list[_Member], changes: Mapping[str, Change]) -> list[_Edit]:
    """What `changes` amount to, in the order of the text."""
    edits: list[_Edit] = []
    absent = dict(changes)
    is_any_kept = False
    for index, member in enumerate(members):
        if member.name not in changes:
            is_any_kept = True
            continue
        change = changes[member.name]
        absent.pop(member.name, None)
        if isinstance(change, bytes):
            edits.append((member.value, member.stop, change))
            is_any_kept = True
        elif change is not None:
            edits += _inner_edits(text, member, change)
            is_any_kept = True
        elif is_any_kept:
            edits.append((members[index - 1].stop, member.stop, b""))
        else:
            stop = members[index + 1].start if index + 1 < len(members) else member.stop
            edits.append((member.start, stop, b""))
    added = []
    for name, change in absent.items():
        new = _new(change)
        if new is not None:
            added.append(_named(name) + new)
    if added:
        end = members[-1].stop if members else text.index(b"{") + 1
        edits.append((end, end, b"," * is_any_kept + b",".join(added)))
    return edits


@lru_cache(maxsize=64)
def _named(name: str) -> bytes:
    """What a member begins with."""
    return _encode(name) + b":"


def _inner_edits(text: Buffer, member: _Member, change: Mapping[str, Change]) -> list[_Edit]:
    value = text[member.value : member.stop]
    if _is_object(value):
        offset = member.value
        return [(offset + start, offset + stop, new) for start, stop, new in _edits(value, _members(value), change)]
    return [(member.value, member.stop, _new(change) or b"null")] if value == b"null" else []


def _new(change: Change) -> bytes | None:
    """The value of a member that was not there; None: there is still none."""
    if change is None or isinstance(change, bytes):
        return change
    made = edit(b"{}", change)
    return None if made == b"{}" else made  # of nothing but removals
