"""Which requests reach the engine otherwise than the client wrote them, and what then has to be undone in the answer.

Two changes, both for one pool or for all: a request without ``stream`` is made one with (`Conversion.is_forced`: of the
stream one body has to be made again), and a stream is asked to tell its usage (`Conversion.hides_usage`: to a client
that had not asked for it).

The answer must be what the engine would have said, so what only its non-streaming path can answer stays as it is. Of
vLLM these are, beside ``prompt_logprobs`` and the log probabilities of an echoed prompt: beam search (refused in a
stream), ``kv_transfer_params`` (whose counterpart in the answer no stream has), ``background`` (answered before
anything is generated), and ``stream_options``, for which a request without ``stream`` is refused.
"""

from __future__ import annotations

from typing import Final

import msgspec

from relay.core import rewrite
from relay.core.framing import Buffer
from relay.core.request import RequestFacts, Route

_ABSENT: Final = msgspec.Raw(b"null")
#: A flag that is off, or as good as not there.
_OFF: Final = (b"null", b"false", b"0", b'"false"')


class _Body(msgspec.Struct, gc=False):
    prompt_logprobs: msgspec.Raw = _ABSENT
    echo: msgspec.Raw = _ABSENT
    logprobs: msgspec.Raw = _ABSENT
    use_beam_search: msgspec.Raw = _ABSENT
    background: msgspec.Raw = _ABSENT
    kv_transfer_params: msgspec.Raw = _ABSENT
    ec_transfer_params: msgspec.Raw = _ABSENT
    stream_options: msgspec.Raw = _ABSENT


_decode = msgspec.json.Decoder(_Body).decode
#: Whatever their value: each means something to the non-streaming path alone.
_UNSTREAMABLE: Final = ("prompt_logprobs", "kv_transfer_params", "ec_transfer_params", "stream_options")


class Conversion(msgspec.Struct, frozen=True, gc=False):
    """A request's body as engines get it, and what of their answer the client is not to see."""

    body: Buffer
    is_forced: bool = False  #: the client asked for one body, the engine is asked for a stream
    hides_usage: bool = False  #: the usage frame was not the client's wish
    is_unread: bool = False  #: the relay cannot change it, be that wanted or not


def convert(route: Route, facts: RequestFacts, body: Buffer, *, force_stream: bool, ask_usage: bool) -> Conversion:
    """What becomes of a request; `facts` are its body's. Never raises: what cannot be changed stays as it is."""
    if route is Route.OTHER:
        return Conversion(body)
    if not facts.is_json:
        return Conversion(body, is_unread=True)
    try:
        if facts.wants_stream:
            is_asked = facts.include_usage or route not in (Route.CHAT, Route.COMPLETIONS)
            if is_asked or not ask_usage:
                return Conversion(body)
            return Conversion(rewrite.ask_usage(body, route), hides_usage=True)
        if force_stream and can_be_streamed(route, body):
            return Conversion(rewrite.force_stream(body, route), is_forced=True)
    except ValueError:  # no object, or one with thousands of members
        return Conversion(body, is_unread=True)
    return Conversion(body)


def can_be_streamed(route: Route, body: Buffer) -> bool:
    """Whether a request without ``stream`` gets the same answer with it. Raises ValueError for what is no object."""
    found = _decode(body)
    if any(bytes(getattr(found, name)) != b"null" for name in _UNSTREAMABLE):
        return False
    if bytes(found.use_beam_search) not in _OFF or bytes(found.background) not in _OFF:
        return False
    is_echoed = route is Route.COMPLETIONS and bytes(found.echo) not in _OFF
    return not (is_echoed and bytes(found.logprobs) != b"null")
