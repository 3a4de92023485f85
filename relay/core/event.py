"""What is read of one frame's JSON: narrow structs that skip over the content, and their decoders.

They are apart from the meter that reads with them since mypyc, which compiles that one, drops the settings of structs.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from relay.core.usage import WireUsage

NULL: Final = msgspec.Raw(b"null")


class Choice(msgspec.Struct, gc=False):
    """Of a chat or text completion."""

    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None


class Incomplete(msgspec.Struct, gc=False):
    """Why a response of the Responses API ended early."""

    reason: str | None = None


class Response(msgspec.Struct, gc=False):
    """What the last event of the Responses API holds."""

    status: str | None = None
    incomplete_details: Incomplete | None = None
    usage: WireUsage | None = None
    error: msgspec.Raw = NULL


class Stop(msgspec.Struct, gc=False):
    """The ``delta`` of Anthropic's ``message_delta``."""

    stop_reason: str | None = None


class Message(msgspec.Struct, gc=False):
    """The ``message`` of Anthropic's ``message_start``."""

    usage: WireUsage | None = None


class Event(msgspec.Struct, gc=False):
    """What is read of one frame's JSON, whichever the dialect."""

    choices: list[Choice] | None = None
    usage: WireUsage | None = None
    type: str | None = None
    object: str | None = None
    error: msgspec.Raw = NULL
    message: msgspec.Raw = NULL
    response: Response | None = None
    delta: msgspec.Raw = NULL
    stop_reason: str | None = None
    status: str | None = None
    incomplete_details: Incomplete | None = None


class Error(msgspec.Struct, gc=False):
    """An error of either API."""

    message: str | None = None
    type: str | None = None
    code: str | int | None = None


class Refusal(msgspec.Struct, gc=False):
    """The body of an error answer."""

    error: msgspec.Raw = NULL


decode_event = msgspec.json.Decoder(Event).decode
decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
ERROR: Final = msgspec.json.Decoder(Error)
MESSAGE: Final = msgspec.json.Decoder(Message)
REFUSAL: Final = msgspec.json.Decoder(Refusal)
STOP: Final = msgspec.json.Decoder(Stop)
#: For frames with a key of an unexpected type: each key by itself.
FIELDS: Final = tuple((field.name, msgspec.json.Decoder(field.type)) for field in msgspec.structs.fields(Event))
