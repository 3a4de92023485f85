"""How a prompt begins, read off a request body: what an engine's prefix cache would know it by.

An engine caches what a prompt shares with earlier ones from its first token on. A conversation shares all of its past
with itself, the instructions with every other conversation of the same application. So what tells conversations apart
is where they first differ, the first words of the user; and what keeps one together is that nothing later counts, as
that is different in every turn. Hence the key: instructions and messages up to and with the first of the user.

- A fixed number of leading bytes, as routers take it, is either too small, and all conversations behind one long set of
  instructions go to one engine until it is full and then anywhere; or too large, and a conversation shorter than that
  goes to another engine with every turn. It is what is left for prompts without structure: text, and token ids.
- The body's order decides what is seen: ``system`` and ``instructions`` count where they stand before the messages, and
  nothing after the user's first message is read. ``tools`` do not count: they are the application's, not the
  conversation's, and clients put them behind the messages as often as before.

Raw JSON is compared, since one client always spells the same text in the same way.
"""

from __future__ import annotations

import json
import re
from typing import Final

#: Bytes of a body that are looked at.
LOOK_BYTES: Final = 65536
#: Bytes of the prompt that tell it apart: about 8,000 tokens. Longer instructions make one key of all their users.
PREFIX_BYTES: Final = 32768
#: Bytes of a prompt that has no messages: about 256 tokens, 16 blocks of vLLM's cache. While a text that grows with
#: each turn is shorter than this, its key changes, and what that loses is a prefill of less than 256 tokens.
TEXT_BYTES: Final = 1024
#: Members of a body, and messages, that are looked at: Python reads them one by one, a microsecond each.
_MOST_VALUES: Final = 256

_PROMPTS: Final = frozenset({"messages", "prompt", "input"})
_INSTRUCTIONS: Final = frozenset({"system", "instructions"})

_decode = json.JSONDecoder(strict=False).raw_decode
_TOKEN = re.compile(r"[^\s,:]")  # that keys and values are separated as they should be is not our concern
_CUT: Final = object()


def prompt_prefix(body: bytes | bytearray) -> bytes:
    """The part of the prompt that an affinity goes by, at most `PREFIX_BYTES`; empty where the body has none.

    Never raises: what is not JSON begins somehow, too, and the engine will refuse it.
    """
    text = str(body[:LOOK_BYTES], "latin-1")  # a character a byte: what they say does not matter here
    parts = []
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        return b""
    at = _skip(text, at + 1)
    for _ in range(_MOST_VALUES):
        if text[at : at + 1] != '"':
            break
        name, at = _value(text, at)
        at = _skip(text, at)
        if name in _PROMPTS:
            parts.append(text[at : _end_of_beginning(text, at)])
            break
        value, end = _value(text, at)
        # What does not end within the look stands for what is behind it, even if it is only tools.
        if name in _INSTRUCTIONS or value is _CUT:
            parts.append(text[at:end])
        at = _skip(text, end)
    return "".join(parts)[:PREFIX_BYTES].encode("latin-1")


def _end_of_beginning(text: str, begin: int) -> int:
    """Of a prompt at `begin`: where the first message of the user ends, or without messages the first `TEXT_BYTES`."""
    if text[begin : begin + 1] == "[":
        at = _skip(text, begin + 1)
        for _ in range(_MOST_VALUES):
            if text[at : at + 1] in ("]", ""):
                return at
            message, at = _value(text, at)
            if message is _CUT or (isinstance(message, dict) and message.get("role") == "user"):
                return at
            if not isinstance(message, dict):
                break
            at = _skip(text, at)
        else:
            return at
    _, length = _value(text[begin : begin + TEXT_BYTES], 0)
    return begin + length


def _skip(text: str, at: int) -> int:
    """Where the next value, key or bracket is."""
    found = _TOKEN.search(text, at)
    return found.start() if found else len(text)


def _value(text: str, at: int) -> tuple[object, int]:
    """The JSON value at `at` and where it ends; `_CUT` and the end of the text if it does not end in it."""
    try:
        return _decode(text, at)
    except (ValueError, RecursionError):
        return _CUT, len(text)
