"""The short cut past parsing: frames known by their form.

Nearly all frames of a stream hold one more piece of content and nothing else, and all that is to be known of them is
their number; a chat's first says who speaks (`OPENING`), of which there is nothing to note. So one pattern per dialect,
run once over a frame, takes the place of JSON parsing: it spells out the whole frame, with the few values that vary. A
frame with anything more (usage, a finish reason, an error, log probabilities, another key order, blanks behind colons)
does not match and is parsed; so a pattern can miss an ordinary frame, at the price of some time, but not take another
for one. The engine's text cannot look like JSON's structure, since its quotes are escaped.

The forms are vLLM's and SGLang's (``id`` first) and llama.cpp's (``choices`` first), all written without blanks.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from relay.core.request import Route

# Single negated characters rather than classes, and possessive repeats: what sre runs fastest. Before Python 3.11.5 a
# possessive group that fails behind a repeat or a lookahead has eaten what it read (python/cpython#106052, #100061): no
# ordinary frame comes to that where one stands below, and what is then taken for ordinary is no JSON.
#: The rest of a JSON string behind its opening quote, with something in it.
_TEXT: Final = rb'(?!")([^"\\]*+(?:\\.[^"\\]*+)*+)"'
_NOTHING: Final = rb"(?:null|\[[\d,]*+\])"  # or token ids
#: Up to the first choice, which is all there is: what comes before holds no object.
_HEAD: Final = rb'\{"[^{]*+\{(?:"finish_reason":null,)?+"index":\d++,'
_TAIL: Final = rb'(?:,"[^"]++":%b)*+\}\](?:,"(?!error")[^"]++":(?:%b|\d++|"[^"\\]*+"))*+\}' % (_NOTHING, _NOTHING)
_CALL: Final = rb'tool_calls":\[\{"index":\d++,"function":\{"arguments":"%b\}\}\]' % _TEXT
_DELTA: Final = rb'"delta":\{"(?:[^"]++":null,"){0,16}(?:(?!role"|tool_calls")[^"]++":"%b|%b)(?:,"[^"]++":null)*+\}' % (
    _TEXT,
    _CALL,
)
_CHAT: Final = b"data: " + _HEAD + _DELTA + _TAIL + rb"\n\n"
_COMPLETION: Final = b"data: " + _HEAD + rb'"text":"' + _TEXT + _TAIL + rb"\n\n"
_ROLE: Final = rb'"delta":\{"role":"[^"\\]*+"(?:,"[^"]++":(?:null|""))*+\}'
#: The event's type says that nothing but content is inside.
_TYPE: Final = rb"(?:content_block_delta|response\.[a-z_.]++(?<=\.delta))"
_TYPED: Final = rb'(?:event: %b\ndata: |data: \{"type":"%b")([^\r\n]++)\n\n' % (_TYPE, _TYPE)

_FORMS: Final = {
    Route.CHAT: _CHAT,
    Route.COMPLETIONS: _COMPLETION,
    Route.RESPONSES: _TYPED,
    Route.MESSAGES: _TYPED,
    Route.OTHER: _CHAT,
}

#: The data of a chat stream's first frame that says who speaks and nothing else, of which there is nothing to note.
OPENING: Final = re.compile(rb'(?!\{[^{]*"error":)' + _HEAD + _ROLE + _TAIL)
#: An ordinary frame, by route.
FRAMES: Final = {route: re.compile(form) for route, form in _FORMS.items()}


class Form(NamedTuple):
    """How the chunks of ordinary frames are known."""

    #: Matches a whole chunk of one ordinary frame, if group 1, its size, says so too. The last group that matched is
    #: its text. Any other would match in its place that is not empty, and has no byte like the one behind it and
    #: nothing that `is_line` forbids.
    pattern: re.Pattern[bytes]
    #: True: the text is the rest of a line; no CR. False: it is inside a JSON string; where there is a backslash in it,
    #: no LF, and no backslash at its end.
    is_line: bool


class Count:
    """How many frames were known by their form alone.

    Of a `Meter`, which is not compiled, and whose own attributes cost more to change.
    """

    __slots__ = ("frames",)

    def __init__(self) -> None:
        self.frames = 0


#: By route.
CHUNKS: Final = {
    route: Form(re.compile(rb"([0-9A-Fa-f]{1,8}+)\r\n(?:%b)\r\n" % form), is_line=form is _TYPED)
    for route, form in _FORMS.items()
}
