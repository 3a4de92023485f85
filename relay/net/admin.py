"""The admin side: readiness, metrics, what the worker is doing, and engines in and out. One answer per connection."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, NamedTuple

import h11
import msgspec
import trio

import relay
from relay import config as settings
from relay.address import UpstreamConfig
from relay.core import status
from relay.core.board import total
from relay.core.health import State
from relay.core.loose import UNDECODABLE
from relay.core.status import PoolStatus, Status, UpstreamStatus
from relay.net import sockets
from relay.net.fleet import Pool
from relay.net.metrics_text import CONTENT_TYPE, Processes, metrics_text
from relay.net.pool import Upstream
from relay.net.roster import Roster, RosterError
from relay.net.service import Service, local_answer

#: How long an admin client may take altogether.
ADMIN_S: Final = 10.0
#: Longest request of an admin client.
MOST_BYTES: Final = 65536

_JSON: Final = "application/json"
_STATES: Final = {
    State.HEALTHY: "healthy",
    State.DOWN: "unhealthy",
    State.EJECTED: "ejected",
    State.PROBING: "half-open",
}
#: How often the readings are taken that rates are made of, seconds: a rate is that of the last one to two of these.
_RATE_S: Final = 5.0


class Answer(NamedTuple):
    """What an admin client is told."""

    status: int
    body: bytes
    content_type: str = _JSON


class _Gone(Exception):
    """An admin client left before it had asked for anything."""


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    """An engine to put in or to take out."""

    url: str
    pool: str = ""
    role: str = "serve"


class _Instances(msgspec.Struct):
    """The same, as the vLLM-Ascend proxy takes it: ``{"type": "prefill", "instances": ["10.0.0.1:8000"]}``."""

    type: str
    instances: list[str] | str


class Admin:
    """Answers on one listener."""

    def __init__(self, service: Service, roster: Roster, reload: Callable[[], str]) -> None:
        self._service = service
        self._roster = roster
        self._reload = reload  #: reads the configuration again, and says what came of it; raises ValueError
        self._since = time.monotonic()
        self._before = (self._since, total([service.tally.block]))
        self._last = self._before

    async def serve(self, listener: socket.socket) -> None:
        """Answers until cancelled."""
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_readings)
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, _ = listener.accept()
                except OSError:
                    await trio.sleep(0.1)
                    continue
                sock.setblocking(False)
                nursery.start_soon(self._serve_one, sock)

    async def _serve_one(self, sock: socket.socket) -> None:
        with sock, trio.move_on_after(ADMIN_S):
            try:
                method, answer = await self._answer_on(sock)
                await sockets.send_all(sock, _head(answer) + (b"" if method == b"HEAD" else answer.body))
                sock.shutdown(socket.SHUT_WR)
                while await _receive(sock):
                    pass  # what has not been read would reset the connection, and could lose the answer
            except (OSError, _Gone):
                return
            except Exception as exc:  # a fault of ours: this connection ends, the daemon does not
                print(f"relay: internal error: {exc!r}", file=sys.stderr, flush=True)
                sys.excepthook(type(exc), exc, exc.__traceback__)

    async def _answer_on(self, sock: socket.socket) -> tuple[bytes, Answer]:
        """The method of the request that comes, and the answer to it. Raises _Gone, OSError."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_BYTES)
        request: h11.Request | None = None
        body = b""
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await _receive(sock)
                    if not data:
                        raise _Gone
                    connection.receive_data(data)
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > MOST_BYTES:
                        return b"", _refusal(413, f"the body is over {MOST_BYTES} bytes")
                elif request is not None:
                    return request.method, self.answer(request.method, request.target, body)
        except h11.RemoteProtocolError as exc:
            return b"", _refusal(exc.error_status_hint, f"not a request: {exc}")

    def answer(self, method: bytes, target: bytes, body: bytes = b"") -> Answer:
        """The answer to an admin request."""
        path = target.partition(b"?")[0].decode("latin-1")
        verb = "GET" if method == b"HEAD" else method.decode("latin-1")
        actions: dict[str, dict[str, Callable[[bytes], Answer]]] = {
            "/metrics": {"GET": self._metrics},
            "/-/status": {"GET": lambda _: _json(self.status())},
            "/-/exchanges": {"GET": lambda _: _json(self._exchanges())},
            "/-/upstreams": {"POST": self._add, "DELETE": self._remove},
            "/-/reload": {"POST": self._reloaded},
            "/instances/add": {"POST": lambda body: self._instances(body, is_added=True)},
            "/instances/remove": {"POST": lambda body: self._instances(body, is_added=False)},
            "/healthcheck": {"GET": self._healthcheck},
        }
        if path in ("/-/live", "/-/ready"):
            local = local_answer(self._service, method, path.encode())
            if local is not None:
                return Answer(*local)
        if path not in actions:
            return _refusal(404, f"unknown path; try /-/live, /-/ready, {', '.join(actions)}")
        if verb not in actions[path]:
            return _refusal(405, f"only {', '.join(actions[path])} here")
        try:
            return actions[path][verb](body)
        except (RosterError, ValueError) as problem:
            return _refusal(400, str(problem))

    # -- telling

    async def _take_readings(self) -> None:
        while True:
            await trio.sleep(_RATE_S)
            self._service.tally.take_in(self._service)
            self._before, self._last = self._last, (time.monotonic(), total([self._service.tally.block]))

    def _metrics(self, _: bytes) -> Answer:
        self._service.tally.take_in(self._service)
        return Answer(200, metrics_text([self._service.tally.block], [Processes([os.getpid()])]), CONTENT_TYPE)

    def status(self) -> Status:
        """What ``relay status`` shows."""
        service = self._service
        service.tally.take_in(service)
        now = time.monotonic()
        return Status(
            version=relay.__version__,
            state="ready" if service.is_ready else "draining",
            uptime_s=round(now - self._since, 3),
            in_flight=len(service.active),
            frames=service.pump.frames,
            pools=tuple(self._pool(pool, now) for pool in service.fleet.pools),
        )

    def _pool(self, pool: Pool, now: float) -> PoolStatus:
        began, before = self._before
        return PoolStatus(
            name=pool.name,
            models=pool.config.models,
            policy=pool.config.balance,
            in_flight=pool.in_flight,
            queued=pool.queued,
            rates=status.rates(pool.name, before, total([self._service.tally.block]), now - began),
            upstreams=tuple(_upstream(upstream, now) for upstream in pool.upstreams),
        )

    def _exchanges(self) -> list[dict[str, object]]:
        """In flight, oldest first."""
        now = time.monotonic()
        return [
            {
                "id": exchange.id,
                "client": exchange.client.peer,
                "path": exchange.request.path,
                "model": exchange.facts.model,
                "pool": exchange.pool and exchange.pool.name,
                "upstream": exchange.upstream and exchange.upstream.config.url,
                "phase": exchange.phase.name.lower(),
                "attempts": exchange.attempts,
                "frames": exchange.frames_so_far,
                "age_ms": round((now - exchange.timeline.request_started) * 1000, 3),
            }
            for exchange in sorted(self._service.active, key=lambda exchange: exchange.timeline.request_started)
        ]

    def _healthcheck(self, _: bytes) -> Answer:
        """As the vLLM-Ascend proxy answers it: how many engines there are of each role."""
        counts: dict[str, int] = {}
        for pool in self._service.fleet.pools:
            for role, group in pool.groups.items():
                counts[f"{role}_instances"] = counts.get(f"{role}_instances", 0) + len(group.upstreams)
        return _json({"status": "ok", **counts})

    # -- changing

    def _add(self, body: bytes) -> Answer:
        change = self._change(body)
        config = _engine(change.url)
        self._roster.add(change.pool, change.role, config)
        return _json({"added": config.url, "pool": change.pool})

    def _remove(self, body: bytes) -> Answer:
        change = self._change(body)
        url = _engine(change.url).url
        self._roster.remove(change.pool, change.role, url)
        return _json({"removed": url, "pool": change.pool})

    def _change(self, body: bytes) -> _Change:
        try:
            change = msgspec.json.decode(body, type=_Change)
        except UNDECODABLE as exc:
            raise ValueError(f'{exc}; wanted: {{"pool": …, "role": …, "url": …}}') from None
        return msgspec.structs.replace(change, pool=change.pool or self._service.fleet.pools[0].name)

    def _instances(self, body: bytes, *, is_added: bool) -> Answer:
        try:
            wanted = msgspec.json.decode(body, type=_Instances)
        except UNDECODABLE as exc:
            raise ValueError(f'{exc}; wanted: {{"type": "prefill" or "decode", "instances": ["HOST:PORT"]}}') from None
        instances = [wanted.instances] if isinstance(wanted.instances, str) else wanted.instances
        for pool in self._service.fleet.pools:
            if wanted.type in pool.groups:
                for config in [_engine(each if "://" in each else f"http://{each}") for each in instances]:
                    if is_added:
                        self._roster.add(pool.name, wanted.type, config)
                    else:
                        self._roster.remove(pool.name, wanted.type, config.url)
                word = "added" if is_added else "removed"
                return _json({word: instances, "type": wanted.type})
        raise RosterError(f"no pool has instances of type {wanted.type}")

    def _reloaded(self, _: bytes) -> Answer:
        return _json({"reloaded": self._reload()})


async def _receive(sock: socket.socket) -> bytes:
    """The next bytes, after other tasks' turn: else a client that floods would hold up the streams, and its own end."""
    await trio.lowlevel.wait_readable(sock)
    return await sockets.receive(sock)


def _engine(url: str) -> UpstreamConfig:
    config: UpstreamConfig = settings.read_flag(settings.Upstream, url)
    return config


def _upstream(upstream: Upstream, now: float) -> UpstreamStatus:
    return UpstreamStatus(
        url=upstream.config.url,
        role=upstream.role,
        state=_STATES[upstream.health.state(now)],
        weight=upstream.config.weight,
        in_flight=upstream.outstanding,
        idle=upstream.idle,
        failures=upstream.failures,
        last_error=upstream.last_error,
        probe_ms=None if upstream.probe_s is None else round(upstream.probe_s * 1000, 3),
        age_s=round(now - upstream.added_at, 3),
    )


def _head(answer: Answer) -> bytes:
    lines = (
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        f"content-type: {answer.content_type}",
        f"content-length: {len(answer.body)}",
        "connection: close",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def _refusal(status_code: int, message: str) -> Answer:
    return _json({"error": message}, status_code)


def _json(value: object, status_code: int = 200) -> Answer:
    return Answer(status_code, msgspec.json.encode(value) + b"\n")
