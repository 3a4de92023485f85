"""What a hand-over between a prefiller and a decoder is, without saying which.

A connector knows one engine's protocol and does no I/O. For each attempt it is asked for a *plan*: which bodies go
where, under which ids, in which order. There are four orders, and a plan's type says which:

- `DecodeOnly`: the request cannot be split; one leg.
- `Sequential`: the prefill leg is read whole; its answer makes the decode leg.
- `Concurrent`: both legs are sent at once; the engines find each other.
- `DecodeFirst`: the decoder is asked first, and calls the relay back when it has room; that makes the prefill leg.

The exchange runs these four, whoever planned them, so a new engine is a new file here and a line in ``__init__.py``.
Types instead of one plan with flags, since then no plan can hold a leg that its order has no use for.

Connectors keep no state: one instance serves every request of the process, and what belongs to one attempt is in its
plan. An attempt that failed is planned anew, with the next attempt number: new ids, and never the old handle, which the
engine may have freed (vllm-ascend#13929).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from random import Random
from typing import ClassVar, Final, Literal, TypeAlias

import msgspec

from relay.core.document import Change, Document
from relay.core.framing import Buffer
from relay.core.prefill import one_token
from relay.core.request import Route

#: The member of a vLLM request that says what to do with keys and values, and of an answer that says where they are.
KV_PARAMS: Final = "kv_transfer_params"
#: Where else vLLM takes them from: `vllm_xargs` of chat and completions, `sampling_params` of its own protocol. The
#: relay's own, if there are some, take their place there.
_OTHER_PLACES: Final[dict[str, Change]] = {
    "vllm_xargs": {KV_PARAMS: None},
    "sampling_params": {"extra_args": {KV_PARAMS: None}},
}
#: What may stand before an object, for Python's parser: blanks, and what UTF-16 and byte order marks are made of.
_BEFORE_OBJECTS: Final = b" \t\r\n\x00\xef\xbb\xbf\xfe\xff"

#: Where decoders call the relay back.
CALLBACK_PATH: Final = b"/v1/metaserver"

Role = Literal["prefill", "decode"]


class Endpoint(msgspec.Struct, frozen=True):
    """One engine's addresses, as configured, then completed by its connector."""

    #: ``http://HOST:PORT`` or ``unix:/path``.
    url: str
    #: Name or address without brackets; empty for a unix socket.
    host: str
    #: ``HOST:PORT`` where p2p_nccl's sockets listen.
    kv_address: str = ""
    #: URL of Mooncake's bootstrap server.
    bootstrap: str = ""
    #: Port of SGLang's bootstrap server.
    bootstrap_port: int | None = None
    #: Data-parallel rank and engine id of each rank, as the bootstrap server tells them.
    ranks: tuple[tuple[int, str], ...] = ()


class Preflight(msgspec.Struct, frozen=True):
    """A question to an engine before its first request.

    The answer's body (200) goes to `parse`, which returns the endpoint with what it taught filled in, or raises
    ValueError saying why it taught nothing. It holds until the engine restarts: whoever keeps the endpoint drops it
    when an attempt with the engine fails, and asks again.
    """

    url: str
    parse: Callable[[bytes], Endpoint]


class SplitRequest(msgspec.Struct, frozen=True):
    """A client's request as one attempt sees it."""

    route: Route
    body: Buffer
    #: The client's ``X-Request-Id``, or the one made for it.
    id: str
    #: 1 for the first.
    attempt: int = 1
    #: Where decoders reach this worker, with `CALLBACK_PATH`; empty unless the connector `calls_back`.
    callback_url: str = ""

    @property
    def attempt_id(self) -> str:
        """The id this attempt goes by, where the engine leaves the choice: ``ID``, then ``ID-2``, ``ID-3``."""
        return self.id if self.attempt == 1 else f"{self.id}-{self.attempt}"


class LegRequest(msgspec.Struct, frozen=True, gc=False):  # bytes alone: no cycle goes through it
    """One request to one engine; method, path and the client's other headers are those of the client's request."""

    body: Buffer
    #: Its ``X-Request-Id``.
    request_id: str
    #: Further header fields, names in lower case; they take the place of the client's own.
    headers: tuple[tuple[bytes, bytes], ...] = ()


class HandOver(msgspec.Struct, frozen=True):
    """What a prefiller's answer leads to."""

    decode: LegRequest
    #: The answer should hold a handle and does not. `decode` is then the request for a decoder alone: the pool's
    #: ``on_missing_kv`` says whether to send it.
    is_missing: bool = False
    #: Something is held for the decoder until `decode` is sent. If it never is, `drain` frees it.
    holds_kv: bool = False


class DecodeOnly(msgspec.Struct, frozen=True):
    """The request goes to a decoder as it is."""

    decode: LegRequest
    #: What it cannot be split for: a member of the body, or ``route``; empty where nothing of it was looked at.
    because: str = ""


class Sequential(msgspec.Struct, frozen=True):
    """Prefill, read whole; then decode."""

    prefill: LegRequest
    #: Of the body of the prefiller's answer (2xx) makes the rest of the plan. Never raises.
    hand_over: Callable[[bytes], HandOver]
    #: Only the decoder that was planned for can take over; otherwise it may be chosen again when prefill has ended.
    binds_decoder: bool = False


class Concurrent(msgspec.Struct, frozen=True):
    """Both legs at once.

    Each waits inside the engine for the other, and engines wait long (sglang#29482: 1800 s). So either leg's failure
    before the decoder's first frame ends both, and a prefiller's error status is the client's answer like a decoder's.
    The prefiller's answer is read to its end and dropped: closing its connection would abort the transfer.
    """

    prefill: LegRequest
    decode: LegRequest


class DecodeFirst(msgspec.Struct, frozen=True):
    """Decode; the decoder calls back; then prefill.

    The callback is recognised by its `key` (`Connector.callback_key`), and is answered 200 at once: the decoder takes
    any answer for a success, and calls again, up to three times, only where it got none. So what cannot be taken
    now is closed without one, a second callback is answered and dropped, and a prefiller's failure must end the decode
    leg, which would wait for it without end.
    """

    decode: LegRequest
    key: str
    #: Of the body of a callback with this key makes the prefill leg. Its answer holds nothing that is needed.
    prefill: Callable[[bytes], LegRequest]


Plan: TypeAlias = DecodeOnly | Sequential | Concurrent | DecodeFirst


class Connector(ABC):
    """One engine's way to hand over."""

    #: As in the configuration.
    name: ClassVar[str]
    #: Decoders call back: the worker needs an address for them, and plans need a `callback_url`.
    calls_back: ClassVar[bool] = False
    #: Decoders may give requests up (`relay.core.connectors.recompute`).
    may_recompute: ClassVar[bool] = False

    def complete(self, endpoint: Endpoint, role: Role) -> Endpoint:
        """The endpoint with the engine's documented defaults for what is not configured; called once, at start.

        Raises ValueError saying what is wrong and what is allowed.
        """
        return endpoint

    def preflight(self, prefill: Endpoint) -> Preflight | None:
        """What must be asked before a plan for this prefiller can be made; None: nothing, or nothing any more."""
        return None

    def callback_key(self, message: bytes) -> str | None:
        """The `DecodeFirst.key` a decoder's callback is meant for; None: it is for nobody. Never raises."""
        return None

    def plan(self, request: SplitRequest, prefill: Endpoint, decode: Endpoint, rng: Random) -> Plan:
        """One attempt with these two engines, whose endpoints are complete and have had their preflight.

        Raises ValueError as `as_it_is` does.

        `rng` makes what has to be unique; seed it from the operating system, as ids shared by two requests can mix up
        their keys and values.
        """
        if request.route is Route.OTHER:
            return as_it_is(request)
        try:
            return self._plan(request, prefill, decode, rng)
        except ValueError:
            return as_it_is(request)

    @abstractmethod
    def _plan(self, request: SplitRequest, prefill: Endpoint, decode: Endpoint, rng: Random) -> Plan:
        """`plan` of a request that generates. Raises ValueError where the body is not a JSON object."""


def drain(leg: LegRequest, route: Route) -> LegRequest:
    """The decode leg of a client that has left, made short: the decoder takes what is held for it, and ends at once.

    One token, not an empty or a wrong request: every version of every engine frees a handle that was read; not all do
    for one that was refused. The answer is of no interest. Raises ValueError where the body is not a JSON object.
    """
    return LegRequest(one_token(Document(leg.body), route, {}), leg.request_id, leg.headers)


def alone(request: SplitRequest, because: str = "") -> DecodeOnly:
    """The request to a vLLM decoder that computes the prompt itself.

    A client's own `KV_PARAMS` are removed: in a split pool they are the relay's, and would make the decoder read from
    wherever they say. Raises ValueError where the body is not a JSON object.
    """
    document = Document(request.body)
    changes: dict[str, Change] = {KV_PARAMS: None}
    changes |= {name: inner for name, inner in _OTHER_PLACES.items() if not document.has_none_of({name})}
    return DecodeOnly(LegRequest(document.edit(changes), request.attempt_id), because)


def as_it_is(request: SplitRequest) -> DecodeOnly:
    """A request that does not generate, or has no JSON object for a body: the engine says what is wrong with it.

    Less `KV_PARAMS`, as above. Raises ValueError where the relay cannot read an object that an engine may: Python's
    parser also takes NaN, lone surrogates, a byte order mark, UTF-16, and any number of members.
    """
    try:
        return alone(request)
    except ValueError:
        if bytes(request.body).lstrip(_BEFORE_OBJECTS).startswith(b"{"):
            raise
        return DecodeOnly(LegRequest(request.body, request.attempt_id))


def unique(rng: Random) -> str:
    """An id nobody else has: 32 hexadecimal digits."""
    return f"{rng.getrandbits(128):032x}"


def host_and_port(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
