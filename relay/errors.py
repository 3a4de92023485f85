"""What can go wrong with an exchange: who, in which phase, why, and whether another upstream may be tried.

Every failure has these four when it is raised; nobody matches message texts later. The one place that turns a failure
into a status, an error code and the record's two outcome letters is here too, after HAProxy's termination codes and
pingora's error types.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar, Self


class Side(Enum):
    """Who ended an exchange; the value is the first letter of the record's ``outcome``."""

    CLIENT = "C"
    UPSTREAM = "U"
    RELAY = "R"


class Phase(Enum):
    """How far an exchange had come; the value is the second letter of the record's ``outcome``."""

    REQUEST = "R"  #: reading the client's request
    QUEUE = "Q"  #: waiting for a place
    CONNECT = "C"  #: dialling an engine
    PREFILL = "P"  #: waiting for the prefill leg
    HEAD = "H"  #: the request is being sent, or was; no response head and first frame yet
    DATA = "D"  #: committed: bytes of the response are with the client


#: The outcome of an exchange that ended as it should.
NORMAL = "--"

#: The status nginx logs when the client has left before an answer; never sent.
CLIENT_CLOSED_REQUEST = 499


class ExchangeError(Exception):
    """One exchange failed.

    `status` is what a client is told while nothing has been sent; `code` goes into the error body; `may_retry` says
    that, before the commit point, another upstream may do better; `retry_after_s` becomes a ``Retry-After`` header.
    """

    side: ClassVar[Side] = Side.RELAY
    status: int = 500
    code: str = "internal_error"
    may_retry: bool = False
    is_timeout: bool = False

    def __init__(self, message: str, *, phase: Phase, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.phase = phase
        self.retry_after_s = retry_after_s

    @property
    def outcome(self) -> str:
        """The record's two letters: who (lower case: a timeout), and in which phase."""
        letter = self.side.value
        return (letter.lower() if self.is_timeout else letter) + self.phase.value

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.outcome} {self.status} {self.code}: {self.message}>"

    def settled(self) -> Self:
        """Itself, when it has been dealt with, without the frames that it and what led to it came through.

        Those frames hold the exchange, which holds its failure: a circle that would keep the request's body, until a
        garbage collection looks at everything there is.
        """
        error: BaseException | None = self
        while error is not None:
            before = error.__context__
            error.__traceback__ = error.__context__ = error.__cause__ = None
            error = before
        return self


class RequestRefused(ExchangeError):
    """The relay will not take this request: malformed, too large, not allowed, or for a model nobody serves."""

    def __init__(
        self, status: int, code: str, message: str, *, phase: Phase = Phase.REQUEST, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message, phase=phase, retry_after_s=retry_after_s)
        self.status = status
        self.code = code


class RateLimited(RequestRefused):
    """The request's key is over one of its limits."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(429, "rate_limit_exceeded", message, retry_after_s=retry_after_s)


class RequestTimeout(ExchangeError):
    """The client was too slow with its request (RFC 9110 §15.5.9)."""

    side = Side.CLIENT
    status = 408
    code = "request_timeout"
    is_timeout = True


class ClientGone(ExchangeError):
    """The client closed its connection before the exchange had ended. Nobody is left to answer."""

    side = Side.CLIENT
    status = CLIENT_CLOSED_REQUEST
    code = "client_closed_request"


class ClientStalled(ClientGone):
    """The client stopped reading for longer than ``client_stall_s``."""

    is_timeout = True


class UpstreamUnreachable(ExchangeError):
    """No connection to the engine could be had."""

    side = Side.UPSTREAM
    status = 502
    code = "upstream_error"
    may_retry = True


class UpstreamDisconnected(ExchangeError):
    """The engine closed or reset the connection before its answer was complete."""

    side = Side.UPSTREAM
    status = 502
    code = "upstream_disconnected"
    may_retry = True


class UpstreamProtocolError(ExchangeError):
    """What the engine sent is not HTTP/1.1, or not the answer that was asked for."""

    side = Side.UPSTREAM
    status = 502
    code = "upstream_error"
    may_retry = True


class UpstreamTimeout(ExchangeError):
    """A named limit is over: of connecting, prefill, the first token, between tokens, or the whole exchange."""

    side = Side.UPSTREAM
    status = 504
    code = "upstream_timeout"
    may_retry = True
    is_timeout = True


class UpstreamRefused(ExchangeError):
    """The engine answered with a status that the configuration counts as its failure (502, 503, 504).

    Only raised where another is left to be tried: the last engine's answer goes through untouched.
    """

    side = Side.UPSTREAM
    status = 502
    code = "upstream_error"
    may_retry = True


class UpstreamAnswered(ExchangeError):
    """The engine answered with an error of its own, which is the client's answer unless another attempt does better."""

    side = Side.UPSTREAM
    code = "upstream_error"
    may_retry = True

    def __init__(
        self, message: str, *, phase: Phase, status: int, fields: list[tuple[bytes, bytes]], body: bytes
    ) -> None:
        super().__init__(message, phase=phase)
        self.status = status
        self.fields = fields
        self.body = body


class AnswerTooLarge(ExchangeError):
    """The engine's answer is longer than the relay may hold of it (``stream.max_answer_bytes``)."""

    status = 502
    code = "upstream_error"


class UpstreamRecomputed(ExchangeError):
    """A decoder of vllm-ascend gave the request up: its answer is cut in the middle."""

    side = Side.UPSTREAM
    status = 502
    code = "upstream_recomputed"


class OutOfResources(ExchangeError):
    """The relay has no descriptor or no memory for another connection: no engine's fault."""

    status = 503
    code = "no_upstream"


class NoUpstream(ExchangeError):
    """No engine of the pool is up, or the pool has been given other roles while the request waited."""

    status = 503
    code = "no_upstream"


class QueueFull(ExchangeError):
    """The pool has no place, and no room to wait for one."""

    status = 429
    code = "queue_full"


class QueueTimeout(ExchangeError):
    """No place became free within ``queue_s``."""

    status = 429
    code = "queue_full"
    is_timeout = True


class Draining(ExchangeError):
    """The relay is shutting down and had to cut the exchange."""

    status = 503
    code = "draining"
