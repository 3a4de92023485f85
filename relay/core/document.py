"""A JSON object that becomes others: the members named change, every other byte stays as it was written.

Decoding and encoding again would respell what is none of the relay's business: numbers beyond a double, the order of
keys, escapes, duplicate keys. So nothing is re-encoded. msgspec skips over the values in C and says how long each is;
that is enough to walk from member to member, and edits are spans of the text replaced by other text.

To msgspec a duplicate key is the same key, and it keeps the last. Keys decoded into a type of ours without equality all
stay: the engine's parser may be one that takes the first. The type also gets the key with its escapes resolved, so that
``"str\\u0065am"`` is no way around a change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Final, TypeAlias

import msgspec

from relay.core.framing import Buffer

#: What becomes of a member: raw JSON in its place, None to remove it, or changes to the members of the object it is.
Change: TypeAlias = "bytes | Mapping[str, Change] | None"

#: Most members of an object to be edited. Requests have some thirty; each costs a microsecond of the event loop.
MAX_MEMBERS: Final = 4096

# Possessive (`++`, `*+`): no position is tried twice, whatever the input, and nothing is kept of each escape in a key.
# What `relay.core.strict` says of groups does not concern this one: in JSON it fails at its first byte only.
_KEY: Final = re.compile(rb'[ \t\r\n]*+[{,][ \t\r\n]*+("(?:[^"\\]++|\\.)*+")[ \t\r\n]*+:[ \t\r\n]*+')


class _Key:
    """One key of an object, equal to no other."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Member:
    """``text[start:stop]`` is key and value, ``text[value:stop]`` the value."""

    __slots__ = ("name", "start", "stop", "value")

    def __init__(self, name: str, start: int, value: int, stop: int) -> None:
        self.name = name
        self.start = start
        self.value = value
        self.stop = stop


_BLANK: Final = 0x20  # where JSON is, and no string: the last of the bytes that may stand between
_QUOTE: Final = 0x22

#: Texts below this are cut by copies, which take less time than views.
_COPIED: Final = 16_384

#: `start`, `stop` and `new`: ``text[start:stop]`` becomes `new`.
_Edit: TypeAlias = tuple[int, int, bytes]


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
        text = bytes(text)
        try:
            pairs = self._decode(text)
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        except msgspec.DecodeError as error:
            raise ValueError(f"not a JSON object: {error}") from None
        members: list[_Member] = []
        position = 0
        for key, raw in pairs.items():
            start, value = _key_at(text, position, key.name)
            position = value + len(raw)
            members.append(_Member(key.name, start, value, position))
        return members


def _key_at(text: bytes, position: int, name: str) -> tuple[int, int]:
    """Where the next key is, behind a brace or a comma, and its value; msgspec has found both there."""
    spelled = name.encode()
    start = _behind_blanks(text, _behind_blanks(text, position) + 1)
    end = start + 1 + len(spelled)
    if text[start + 1 : end] == spelled and text[end] == _QUOTE:  # without escapes
        return start, _behind_blanks(text, _behind_blanks(text, end + 1) + 1)
    found = _KEY.match(text, position)
    assert found is not None
    return found.start(1), found.end()


def _behind_blanks(text: bytes, position: int) -> int:
    while text[position] <= _BLANK:
        position += 1
    return position


_members: Final = _Walker().members
_encode: Final = msgspec.json.Encoder().encode


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

    def edit(self, changes: Mapping[str, Change], *, within: Buffer | None = None) -> bytes:
        """The object with `changes`, as of the function `edit`; or `within`, where it stands at the same positions.

        The same bytes object, where nothing changes. Raises ValueError where an inner object to be changed has too many
        members.
        """
        edits = _edits(self.text, self._members, changes)
        text = self.text if within is None else within
        return _applied(edits, text) if edits else bytes(text)


def edit(body: Buffer, changes: Mapping[str, Change]) -> bytes:
    """Returns a JSON object with members changed, and everything else of it unchanged to the byte.

    A member that is there gets its new value in its place, all of them where a key is there more than once; one that
    is not is appended. A mapping changes members of an inner object and makes one where there is none or null; a
    value of any other type it leaves alone, for the engine to refuse. New values are not checked to be JSON.

    Raises ValueError where `body` is not a JSON object, or has more than `MAX_MEMBERS` members. Time is linear in the
    length of the body: one to two milliseconds per megabyte.
    """
    return Document(body).edit(changes)


def is_object(value: Buffer | msgspec.Raw) -> bool:
    """Whether a JSON value, without blanks before it, is an object."""
    return bytes(memoryview(value)[:1]) == b"{"


def _applied(edits: list[_Edit], text: Buffer) -> bytes:
    source = text if len(text) < _COPIED else memoryview(text)
    pieces: list[Buffer | memoryview] = []
    position = 0
    for start, stop, new in edits:
        pieces.append(source[position:start])
        pieces.append(new)
        position = stop
    pieces.append(source[position:])
    return b"".join(pieces)


def _edits(text: Buffer, members: list[_Member], changes: Mapping[str, Change]) -> list[_Edit]:
    """What `changes` amount to, in the order of the text."""
    edits: list[_Edit] = []
    wanted = dict(changes)
    seen: set[str] = set()
    is_any_kept = False
    for index, member in enumerate(members):
        if member.name not in wanted:
            is_any_kept = True
            continue
        change = wanted[member.name]
        seen.add(member.name)
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
    for name, change in wanted.items():
        new = None if name in seen else _new(change)
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
    if is_object(value):
        offset = member.value
        return [(offset + start, offset + stop, new) for start, stop, new in _edits(value, _members(value), change)]
    return [(member.value, member.stop, _new(change) or b"null")] if value == b"null" else []


def _new(change: Change) -> bytes | None:
    """The value of a member that was not there; None: there is still none."""
    if change is None or isinstance(change, bytes):
        return change
    made = edit(b"{}", change)
    return None if made == b"{}" else made  # of nothing but removals
