"""What the engine says: the same words at the same positions for everyone, and one fixed tool call."""

from __future__ import annotations

from typing import Final

import msgspec

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
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, dict):
        return sum(count_words(item) for key, item in value.items() if key not in {"role", "type"})
    if isinstance(value, list):
        return sum(count_words(item) for item in value)
    return 0
