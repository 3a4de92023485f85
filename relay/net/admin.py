"""The admin side: readiness, metrics, what the daemon is doing, and engines in and out. One answer per connection."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Final, NamedTuple

import h11
import msgspec
import trio
from msgspec.structs import replace

from relay import config as settings
from relay.address import UpstreamConfig
from relay.core import status
from relay.core.board import total
from relay.core.loose import UNDECODABLE
from relay.core.status import ExchangeStatus, PoolStatus, Series, Status
from relay.net import sockets
from relay.net.metrics_text import CONTENT_TYPE, Processes, metrics_text
from relay.net.notices import say_fault
from relay.net.report import Crew, exchanges_of, status_of
from relay.net.roster import Roster, RosterError
from relay.net.service import Service, local_answer
from relay.net.tls import client_context

#: How long an admin client may take altogether.
ADMIN_S: Final = 10.0
#: What changes nothing.
_READS: Final = (b"GET", b"HEAD")
#: Longest request of an admin client.
MOST_BYTES: Final = 65536

_JSON: Final = "application/json"
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
    ca: str = ""
    server_name: str = ""


class _Instances(msgspec.Struct):
    """The same, as the vLLM-Ascend proxy takes it: ``{"type": "prefill", "instances": ["10.0.0.1:8000"]}``."""

    type: str
    instances: list[str] | str


class Admin:
    """Answers on one listener."""

    def __init__(
        self, service: Service, roster: Roster, reload: Callable[[], Awaitable[str]], crew: Crew | None = None
    ) -> None:
        self._service = service
        self._roster = roster
        self._reload = reload  #: reads the configuration again, and answers what takes a restart; raises ValueError
        self._crew = crew or _Alone(service)
        self._since = time.monotonic()
        self._before = (self._since, total(self._crew.blocks))
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
                while await sockets.receive(sock):
                    pass  # what has not been read would reset the connection, and could lose the answer
            except (OSError, _Gone):
                return
            except Exception as exc:  # a fault of ours: this connection ends, the daemon does not
                say_fault(exc)

    async def _answer_on(self, sock: socket.socket) -> tuple[bytes, Answer]:
        """The method of the request that comes, and the answer to it. Raises _Gone, OSError."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_BYTES)
        request: h11.Request | None = None
        body = b""
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await sockets.receive(sock)
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
                    if request.method not in _READS and any(name == b"origin" for name, _ in request.headers):
                        # Any web page can have its reader's browser post to loopback; browsers then say for whom.
                        return request.method, _refusal(403, "web pages may not change anything here")
                    return request.method, await self.answer(request.method, request.target, body)
        except h11.RemoteProtocolError as exc:
            return b"", _refusal(exc.error_status_hint, f"not a request: {exc}")

    async def answer(self, method: bytes, target: bytes, body: bytes = b"") -> Answer:
        """The answer to an admin request."""
        path = target.partition(b"?")[0].decode("latin-1")
        verb = "GET" if method == b"HEAD" else method.decode("latin-1")
        actions: dict[str, dict[str, Callable[[bytes], Awaitable[Answer]]]] = {
            "/metrics": {"GET": self._metrics},
            "/-/status": {"GET": self._status},
            "/-/exchanges": {"GET": self._exchanges},
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
            return await actions[path][verb](body)
        except (RosterError, ValueError) as problem:
            return _refusal(400, str(problem))

    # -- telling

    async def _take_readings(self) -> None:
        while True:
            await trio.sleep(_RATE_S)
            self._before, self._last = self._last, (time.monotonic(), total(self._crew.blocks))

    async def _metrics(self, _: bytes) -> Answer:
        await self._crew.statuses()
        return Answer(200, metrics_text(self._crew.blocks, [Processes(self._crew.pids)]), CONTENT_TYPE)

    async def status(self) -> Status:
        """What ``relay status`` shows."""
        parts = await self._crew.statuses()
        now = time.monotonic()
        whole = status.merged(status_of(self._service), parts)
        series = total(self._crew.blocks)
        pools = self._with_rates(whole.pools, series, now)
        return replace(whole, uptime_s=round(now - self._since, 3), pools=pools, keys=status.keys_of(series))

    def _with_rates(self, pools: Iterable[PoolStatus], after: Series, now: float) -> tuple[PoolStatus, ...]:
        began, before = self._before
        return tuple(replace(pool, rates=status.rates(pool.name, before, after, now - began)) for pool in pools)

    async def _status(self, _: bytes) -> Answer:
        return _json(await self.status())

    async def _exchanges(self, _: bytes) -> Answer:
        """In flight, oldest first."""
        found = sorted(await self._crew.exchanges(), key=lambda exchange: -exchange.age_ms)
        return _json(found)

    async def _healthcheck(self, _: bytes) -> Answer:
        """As the vLLM-Ascend proxy answers it: how many engines there are of each role."""
        counts: dict[str, int] = {}
        for pool in self._service.fleet.pools:
            for role, group in pool.groups.items():
                counts[f"{role}_instances"] = counts.get(f"{role}_instances", 0) + len(group.upstreams)
        return _json({"status": "ok", **counts})

    # -- changing

    async def _add(self, body: bytes) -> Answer:
        change = self._change(body)
        known = self._roster.known(change.pool, change.role, _engine(change.url))
        config = replace(known, ca=change.ca or known.ca, server_name=change.server_name or known.server_name)
        if config.is_tls:
            client_context(config.ca)  # or it is refused here
        elif config.ca or config.server_name:
            raise ValueError(f"ca and server_name are of no use to {config.url}; allowed: with https://")
        self._roster.add(change.pool, change.role, config)
        await self._settle("added")
        return _json({"added": config.url, "pool": change.pool})

    async def _remove(self, body: bytes) -> Answer:
        change = self._change(body)
        url = _engine(change.url).url
        self._roster.remove(change.pool, change.role, url)
        await self._settle("removed")
        return _json({"removed": url, "pool": change.pool})

    def _change(self, body: bytes) -> _Change:
        try:
            change = msgspec.json.decode(body, type=_Change)
        except UNDECODABLE as exc:
            wanted = '{"pool": …, "role": …, "url": …, "ca": …, "server_name": …}'
            raise ValueError(f"{exc}; wanted: {wanted}") from None
        return replace(change, pool=change.pool or self._service.fleet.pools[0].name)

    async def _instances(self, body: bytes, *, is_added: bool) -> Answer:
        try:
            wanted = msgspec.json.decode(body, type=_Instances)
        except UNDECODABLE as exc:
            raise ValueError(f'{exc}; wanted: {{"type": "prefill" or "decode", "instances": ["HOST:PORT"]}}') from None
        instances = [wanted.instances] if isinstance(wanted.instances, str) else wanted.instances
        for pool in self._service.fleet.pools:
            if wanted.type in pool.groups:
                configs = [_engine(each if "://" in each else f"http://{each}") for each in instances]
                known = pool.groups[wanted.type].upstreams
                if wrong := [config.url for config in configs if (config.url in known) is is_added]:
                    is_in = "is in it already" if is_added else f"is not in it, but {', '.join(known) or 'nobody'}"
                    raise RosterError(f"pool {pool.name} stays as it was: {', '.join(wrong)} {is_in}")
                for config in configs:
                    if is_added:
                        self._roster.add(pool.name, wanted.type, self._roster.known(pool.name, wanted.type, config))
                    else:
                        self._roster.remove(pool.name, wanted.type, config.url)
                word = "added" if is_added else "removed"
                await self._settle(word)
                return _json({word: instances, "type": wanted.type})
        raise RosterError(f"no pool has instances of type {wanted.type}")

    async def _reloaded(self, _: bytes) -> Answer:
        left = await self._reload()
        return _json({"reloaded": f"yes, but {left}" if left else "yes"})

    async def _settle(self, done: str) -> None:
        """Waits until all workers know of what has been `done`. Raises ValueError where one does not answer."""
        try:
            await self._crew.settle()
        except ValueError as problem:
            raise ValueError(f"{done}, but {problem}") from None


class _Alone:
    """A worker that is the whole daemon."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.blocks = [service.tally.block]
        self.pids = [os.getpid()]

    async def statuses(self) -> list[Status]:
        self._service.tally.take_in(self._service)
        return [status_of(self._service)]

    async def exchanges(self) -> list[ExchangeStatus]:
        return exchanges_of(self._service)

    async def settle(self) -> None:
        pass


def _engine(url: str) -> UpstreamConfig:
    config: UpstreamConfig = settings.read_flag(settings.Upstream, url)
    return config


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
