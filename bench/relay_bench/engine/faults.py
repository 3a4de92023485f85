"""What a request's ``x-sim-*`` headers ask of the engine beyond an ordinary answer. Parsing only.

An unknown name is refused with a 400 that lists the known ones: a misspelt fault must not pass as a good answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from relay_bench.engine.plain import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Instead of any answer. `early-answer` comes before the body has been read; the others after it.
BEFORE_HEAD: Final = frozenset({"die-before-head", "rst-before-head", "stall-before-head", "early-answer"})

#: ``{"die": …, "rst": …, "stall": …}`` at one of these places: close, reset, or silence until the peer leaves.
_CUT_PLACES: Final = ("after-head", "after", "mid-frame")
CUTS: Final = frozenset(f"{how}-{place}" for how in ("die", "rst", "stall") for place in _CUT_PLACES) | {"bad-chunk"}

#: Another answer than the one asked for.
OTHER_ANSWERS: Final = frozenset({"status", "json-error", "json-on-stream"})

#: Frames added, changed or left out.
EDITS: Final = frozenset(
    {"error-frame", "error-first", "non-json-frame", "no-done", "no-final-blank", "comment", "huge-frame", "crlf", "cr"}
    | {"bom"}
)

#: The head, or what follows the answer.
AROUND: Final = frozenset({"wrong-content-type", "no-content-type", "1xx", "close-idle", "truncate-length"})

FAULTS: Final = BEFORE_HEAD | CUTS | OTHER_ANSWERS | EDITS | AROUND

RECHUNKS: Final = frozenset({"bytes", "frames", "split", "size", "writes", "burst", "ext", "length", "close"})

#: Words of ``x-sim-clock``.
CLOCKS: Final = frozenset({"own", "shared"})


class Shape(msgspec.Struct, frozen=True):
    """How the body's bytes are cut into chunks and writes. The default is uvicorn's: a chunk and a write per frame."""

    #: ``chunked``, ``length`` (Content-Length) or ``close`` (the end of the connection ends the body).
    framing: str = "chunked"
    #: ``frame``; or `number` whole ``frames`` to a chunk, one frame ``split`` over `number` chunks, or chunks of
    #: ``size`` `number` bytes wherever frames end; or a chunk per frame and a write per `number` of them, a ``burst``,
    #: as a socket holds them whose reader is behind.
    cut: str = "frame"
    number: int = 1
    #: > 0: each chunk's raw bytes leave in writes of so many, with a turn of the scheduler in between.
    write_size: int = 0
    #: Chunk extensions and a trailer, which HTTP allows and nobody expects.
    has_extensions: bool = False


class Controls(msgspec.Struct, frozen=True):
    """One request's own pace, shape and faults."""

    ttft_ms: float | None = None
    step_ms: float | None = None
    own_clock: bool = False  #: steps from its own first token on, and not with the others
    shape: Shape = Shape()
    faults: Mapping[str, str] = {}  #: name to argument, ``""`` where there is none
    play: str = ""  #: a recording to send instead of an answer

    def number(self, fault: str, default: int) -> int:
        """The argument of `fault`, which the request names."""
        argument = self.faults[fault]
        if not argument:
            return default
        if not argument.isdecimal():
            raise _refusal("x-sim-fault", f"{fault}:{argument}", "a whole number behind the colon")
        return int(argument)

    def first(self, names: frozenset[str]) -> str:
        """The first fault the request names out of `names`; empty if none."""
        return next((name for name in self.faults if name in names), "")


def read_controls(headers: Mapping[str, str]) -> Controls:
    """Read the ``x-sim-*`` headers; raises `Refusal`."""
    faults = _words(headers, "x-sim-fault", FAULTS)
    controls = Controls(
        ttft_ms=_milliseconds(headers, "x-sim-ttft-ms"),
        step_ms=_milliseconds(headers, "x-sim-step-ms"),
        own_clock="own" in _words(headers, "x-sim-clock", CLOCKS),
        shape=_shape(_words(headers, "x-sim-rechunk", RECHUNKS)),
        faults=faults,
        play=headers.get("x-sim-play", "").strip(),
    )
    for fault in faults.keys() - {"early-answer"}:
        controls.number(fault, 0)
    return controls


def _shape(words: Mapping[str, str]) -> Shape:
    framing, cut, number, write_size = "chunked", "frame", 1, 0
    for name, argument in words.items():
        if argument and (not argument.isdecimal() or argument == "0"):
            raise _refusal("x-sim-rechunk", f"{name}:{argument}", "a number from 1 behind the colon")
        if name in {"length", "close"}:
            framing = name
        elif name == "writes":
            write_size = int(argument or 1)
        elif name == "bytes":
            cut, number = "size", 1
        elif name != "ext":
            cut, number = name, int(argument or 2)
    return Shape(framing, cut, number, write_size, "ext" in words)


def _words(headers: Mapping[str, str], header: str, known: frozenset[str]) -> dict[str, str]:
    """``name:argument, name`` of one header."""
    words: dict[str, str] = {}
    for item in headers.get(header, "").split(","):
        name, _, argument = item.strip().partition(":")
        if not name:
            continue
        if name not in known:
            raise _refusal(header, name, "one of " + ", ".join(sorted(known)))
        words[name] = argument.strip()
    return words


def _milliseconds(headers: Mapping[str, str], header: str) -> float | None:
    value = headers.get(header)
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise _refusal(header, value, "milliseconds, 0 or more")
    return number


def _refusal(header: str, value: str, wanted: str) -> Refusal:
    return Refusal(400, f"{header}: {value!r} is not understood; wanted: {wanted}", "BadRequestError", header)
