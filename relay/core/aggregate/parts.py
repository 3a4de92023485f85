"""How values come together that a stream has in pieces: accumulators of raw JSON.

Nothing is decoded that need not be. The pieces of a string are joined between its quotes, those of a list between its
brackets. So numbers and escapes stay as the engine spelled them, a value takes the memory of its text and no more, and
each byte is moved twice: when it comes, and when the answer is made.

Engines send null for "nothing new", so null never replaces a value. A piece of another type than expected does: it
is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, TypeAlias

import msgspec

NULL: Final = b"null"
#: What a member counts for beside its name and its value: punctuation, and something for our own objects.
_ENTRY: Final = 16

#: Most objects of a list: choices, tool calls. Small ones take far more memory than their text, which is what counts.
MOST_OBJECTS: Final = 16_384
#: Of an index that objects are put in order by.
_MOST_DIGITS: Final = 18

Members: TypeAlias = dict[str, msgspec.Raw]
Schema: TypeAlias = Mapping[str, "Callable[[], Last]"]

decode_members = msgspec.json.Decoder(Members).decode
_decode_items = msgspec.json.Decoder(list[Members]).decode
_encode = msgspec.json.Encoder().encode


class Last:
    """The last value. This and all other parts: `take` returns by how many bytes the answer has grown."""

    __slots__ = ("_value",)

    def __init__(self) -> None:
        self._value = NULL

    def take(self, raw: msgspec.Raw) -> int:
        """Adds what one frame says; may shrink. Raises msgspec.DecodeError for JSON of a shape nobody can merge."""
        value = bytes(raw)
        if value == NULL:
            return 0
        grown = len(value) - len(self._value)
        self._value = value
        return grown

    def json(self) -> bytes:
        """The whole value."""
        return self._value


class First(Last):
    """The first value that says something: names and ids, which some engines repeat, and others repeat as ``""``."""

    __slots__ = ()

    def take(self, raw: msgspec.Raw) -> int:
        """Takes it, or not."""
        return super().take(raw) if self._value in (NULL, b'""') else 0


class Text(Last):
    """A string, joined."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        super().__init__()
        self._pieces = bytearray()

    def take(self, raw: msgspec.Raw) -> int:
        """Appends a piece."""
        piece = bytes(raw)
        if not piece.startswith(b'"'):
            return super().take(raw)
        self._value = b'""'
        self._pieces += piece[1:-1]
        return len(piece) - 2

    def json(self) -> bytes:
        """The text, if any piece of it has come, be it empty."""
        return b"".join((b'"', self._pieces, b'"')) if self._pieces else self._value


class Items(Last):
    """A list, extended."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        super().__init__()
        self._items = bytearray()

    def take(self, raw: msgspec.Raw) -> int:
        """Appends the items of a list."""
        items = bytes(raw)
        if not items.startswith(b"["):
            return super().take(raw)
        self._value = b"[]"
        items = items[1:-1].strip()
        if items:
            if self._items:
                self._items += b","
            self._items += items
        return len(items) + 1

    def json(self) -> bytes:
        """The list, if one has come, be it empty."""
        return b"".join((b"[", self._items, b"]")) if self._items else self._value


class Object(Last):
    """An object, member by member as `schema` says; the last value where it says nothing."""

    __slots__ = ("_schema", "parts")

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self._schema = schema
        self.parts: dict[str, Last] = {}

    def take(self, raw: msgspec.Raw) -> int:
        """Merges an object."""
        if not bytes(raw).startswith(b"{"):
            return super().take(raw)
        return self.take_members(decode_members(raw))

    def take_members(self, members: Members) -> int:
        """Merges the members of an object."""
        self._value = b"{}"
        grown = 0
        for name, raw in members.items():
            part = self.parts.get(name)
            if part is None:
                part = self.parts[name] = self._schema.get(name, Last)()
                grown += len(name) + _ENTRY
            grown += part.take(raw)
        return grown

    def member(self, name: str) -> bytes:
        """One member as JSON; null where there is none."""
        part = self.parts.get(name)
        return NULL if part is None else part.json()

    def members(self) -> dict[str, bytes]:
        """All members as JSON."""
        return {name: part.json() for name, part in self.parts.items()}

    def json(self) -> bytes:
        """The object, if one has come, be it empty."""
        return object_json(self.members()) if self.parts else self._value


class Indexed(Last):
    """A list of objects that come in pieces in any order, each piece with the ``index`` of the object it belongs to.

    A piece without one begins an object if it has an ``id``, else it belongs to the last object.
    """

    __slots__ = ("_last", "_schema", "objects")

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self._schema = schema
        self._last = b"0"
        self.objects: dict[bytes, Object] = {}

    def take(self, raw: msgspec.Raw) -> int:
        """Merges a list of pieces."""
        if not bytes(raw).startswith(b"["):
            return super().take(raw)
        self._value = b"[]"
        grown = 0
        for members in _decode_items(raw):
            key = self._key(members)
            if key not in self.objects:
                if len(self.objects) >= MOST_OBJECTS:
                    raise ValueError(f"a list of more than {MOST_OBJECTS} objects")
                self.objects[key] = Object(self._schema)
            grown += self.objects[key].take_members(members)
            self._last = key
        return grown

    def _key(self, members: Members) -> bytes:
        if "index" in members:
            return bytes(members["index"])
        return b"%d" % len(self.objects) if "id" in members else self._last

    def in_order(self) -> Iterator[Object]:
        """The objects by their index."""
        for key in sorted(self.objects, key=lambda key: int(key) if key.isdigit() and len(key) <= _MOST_DIGITS else 0):
            yield self.objects[key]

    def json(self) -> bytes:
        """The list of objects without their index, if any list has come, be it empty."""
        if not self.objects:
            return self._value
        return list_json(object_json(found.members(), without="index") for found in self.in_order())


def object_json(members: Mapping[str, bytes], without: str = "") -> bytes:
    """An object of members that are JSON already; one copy of each, as answers can be long."""
    pieces = [b"{"]
    for name, value in members.items():
        if name != without:
            pieces += [_encode(name), b":", value, b","]
    pieces[max(1, len(pieces) - 1) :] = [b"}"]  # in place of the last comma
    return b"".join(pieces)


def list_json(items: Iterable[bytes]) -> bytes:
    """A list of items that are JSON already."""
    pieces = [b"["]
    for item in items:
        pieces += [item, b","]
    pieces[max(1, len(pieces) - 1) :] = [b"]"]
    return b"".join(pieces)
