"""A client of a drill: one request after the other, on one connection as long as that lasts; what became of each."""

from __future__ import annotations

import itertools
import random
import time
from enum import Enum
from typing import TYPE_CHECKING, Final, Self

import msgspec
import trio

from relay.core.dialect import Meter
from relay.core.request import Route
from relay_bench.load.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Seconds after which an answer that has not ended never will.
PATIENCE_S: Final = 60.0
#: Seconds that a client waits after a failure: one that asks again at once would ask a thousand times.
_PAUSE_S: Final = 0.05
#: Bytes read at once.
READ_BYTES: Final = 65536


class End(Enum):
    """What became of a request."""

    WHOLE = "whole"  #: the answer asked for, to its end
    TOLD = "cut off, and told so by one error frame"
    REFUSED = "an error before the commit point"
    BROKEN = "anything else"
    LEFT = "hung up on"  #: as the client wanted it


class Outcome(msgspec.Struct, frozen=True):
    """One request's end."""

    id: str
    end: End
    detail: str = ""
    s: float = 0.0  #: how long it took


class ErrorCounter(Meter):
    """A meter that counts the frames which tell of an error."""

    __slots__ = ("error_frames",)

    def __init__(self, route: Route) -> None:
        super().__init__(route)
        self.error_frames = 0

    def inspect_data(self, data: bytes, event: bytes = b"") -> None:
        """See `Meter.inspect_data`: what every frame that is not ordinary comes to."""
        counter = Meter(self.route)
        counter.inspect_data(data, event)
        self.error_frames += counter.error is not None
        super().inspect_data(data, event)


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """A chat request for a stream of so many tokens."""

    id: str
    tokens: int
    messages: tuple[dict[str, str], ...] = ({"role": "user", "content": "Hello?"},)
    session: str = ""
    padding: int = 0  #: further bytes of body

    def encode(self) -> tuple[bytes, bytes]:
        """Its head and its body."""
        body = msgspec.json.encode(
            {
                "model": "tiny",
                "stream": True,
                "max_tokens": self.tokens,
                "messages": self.messages,
                "padding": "x" * self.padding,
            }
        )
        session = f"x-session-id: {self.session}\r\n" if self.session else ""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: drill\r\nx-request-id: {self.id}\r\n{session}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode("ascii"), body


class Reading:
    """An answer that is being read."""

    def __init__(self, tokens: int) -> None:
        self.meter = ErrorCounter(Route.CHAT)
        self.answer = Answer(Route.CHAT)
        self.answer.meter = self.meter
        self._tokens = tokens

    def feed(self, data: bytes) -> None:
        """Takes what was received; nothing: the peer has closed."""
        self.answer.feed(data, time.monotonic_ns())

    def end(self) -> tuple[End, str]:
        """What became of the request, now that nothing more comes; and the proof where that is bad."""
        answer, meter = self.answer, self.meter
        if not answer.frames:
            return End.REFUSED, ": ".join(answer.fault(None, is_exact=False))
        is_cut = answer.problem is not None and answer.problem[0] == "truncated" and not meter.saw_end
        if meter.error_frames == 1 and is_cut:
            return End.TOLD, meter.error or ""
        label, detail = answer.fault(self._tokens, is_exact=True)
        if not label and meter.content_frames != self._tokens:
            label, detail = "wrong_count", f"{meter.content_frames} tokens of {self._tokens}"
        if label:
            return End.BROKEN, f"{label} {detail}; {meter.error_frames} error frames"
        return End.WHOLE, ""


class Client:
    """A connection that is made anew where the last answer did not leave one. A context manager."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self.stream: trio.SocketStream | None = None

    def __repr__(self) -> str:
        return f"<Client {'connected' if self.stream else 'apart'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up, if it is connected."""
        if self.stream is not None:
            self.stream.socket.close()
            self.stream = None

    async def connected(self) -> trio.SocketStream:
        """Its connection. Raises OSError."""
        if self.stream is None:
            self.stream = await trio.open_tcp_stream(*self._address)
        return self.stream

    async def ask(self, ask: Ask) -> Outcome:
        """Sends a request, and reads its answer to the end. Raises nothing but `Cancelled`."""
        began = time.monotonic()
        reading = Reading(ask.tokens)
        answer = reading.answer
        with trio.move_on_after(PATIENCE_S) as patience:
            try:
                stream = await self.connected()
                await stream.send_all(b"".join(ask.encode()))
                while not answer.is_done:
                    reading.feed(await stream.receive_some(READ_BYTES))
            except (OSError, trio.BrokenResourceError) as error:
                answer.break_off("reset", str(error))
        if patience.cancelled_caught:
            answer.break_off("timeout", f"no end within {PATIENCE_S:g} s")
        if not answer.may_reuse:
            self.close()
        end, detail = reading.end()
        return Outcome(ask.id, end, detail, time.monotonic() - began)


class Crowd:
    """Clients that ask, each as soon as it has its answer, until told to `stop`."""

    def __init__(self, address: tuple[str, int], tokens: range, seed: int) -> None:
        self.outcomes: list[Outcome] = []
        self._address = address
        self._tokens = tokens
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self._must_stop = False

    def __repr__(self) -> str:
        return f"<Crowd {len(self.outcomes)} outcomes>"

    def that(self, end: End) -> list[Outcome]:
        """The requests that came to such an end."""
        return [outcome for outcome in self.outcomes if outcome.end is end]

    @property
    def ids(self) -> list[str]:
        """Of all requests, in the order of their text."""
        return sorted(outcome.id for outcome in self.outcomes)

    def stop(self) -> None:
        """Each client leaves when it has its answer."""
        self._must_stop = True

    async def run(self, clients: int) -> None:
        """So many clients ask, until all have stopped."""
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(self._ask)

    async def _ask(self) -> None:
        with Client(self._address) as client:
            while not self._must_stop:
                ask = Ask(id=f"drill-{next(self._numbers)}", tokens=self._rng.choice(self._tokens))
                outcome = await client.ask(ask)
                self.outcomes.append(outcome)
                if outcome.end is not End.WHOLE:
                    await trio.sleep(_PAUSE_S)


def examples(outcomes: Sequence[Outcome]) -> str:
    """How many, and what the first was like."""
    return f"{len(outcomes):,}" + (f", as {outcomes[0].id}: {outcomes[0].detail}" if outcomes else "")
