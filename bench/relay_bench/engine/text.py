"""What the engine says: the same words at the same positions for everyone, and one fixed tool call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Tokens as models emit them: leading blanks, letters beyond ASCII, quotes, backslashes and line ends that JSON
#: escapes. Their lengths differ, so that chunk sizes do.
WORDS: Final = (
    *(" The", " relay", " passes", " every", " frame", " on", " the", " moment", " it", " is", " whole", "."),
    *(" Half", " a", " frame", " is", " never", " sent", ",", " not", " even", " in", " Zürich", " or", " 東京", "."),
    *(' "Quoted"', " text", ",", " back\\slashes", " and", "\n", "line", " ends", " are", " escaped", "."),
    *(" 🙂", " naïve", " tokens", " may", " be", " long", ":", " antidisestablishmentarianism", "!\n\n"),
)

#: `WORDS` inside a JSON string, without the quotes around them.
ENCODED: Final = tuple(msgspec.json.encode(word)[1:-1] for word in WORDS)

#: Choices of one request start this far apart in the words, so that they differ.
_CHOICE_STRIDE: Final = 7

#: The arguments of the tool call, in the pieces a model makes of them; blanks stand where a model puts them.
TOOL_ARGUMENTS: Final = ("{", '"', "city", '":', ' "', "Zü", "rich", '",', '"', "unit", '":', ' "C', '"', "}")


def encoded_word(position: int, choice: int) -> bytes:
    """The token at `position` of choice `choice`, as it stands inside a JSON string."""
    return ENCODED[(position + choice * _CHOICE_STRIDE) % len(ENCODED)]


def stamp(position: int, now_us: int) -> bytes:
    """A token that tells its number and when it was made (see `EngineConfig.stamp`)."""
    return b" %05d:%015d" % (position, now_us)


def count_words(value: object) -> int:
    """How many words the strings in a decoded JSON value hold: the engine's idea of prompt tokens.

    Words that only say what an object is (roles, types) are not counted.
    """
    return sum(len(text.split()) for text in _strings(value))


def words_of(*values: object) -> list[str]:
    """These words themselves, in order: what the prefix cache takes for tokens."""
    return [word for value in values for text in _strings(value) for word in text.split()]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in {"role", "type"}:
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
