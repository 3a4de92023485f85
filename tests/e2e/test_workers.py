"""Two workers: what one does not lose with the other, and what holds over both.

A worker that is stopped (SIGSTOP) accepts nothing, so the other gets what is opened meanwhile: that is how a test knows
which worker has what.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from relay.core.auth import keys_line
from relay_bench.engine import Engine
from tests.e2e.fleet import fakes
from tests.e2e.harness import GOOD_ANSWER, Answer, Client, ask, request, states, until
from tests.e2e.test_process import START_S, Process, relay_serve

STREAMS = 3
#: Asks for 22 frames in half a second.
SLOW: dict[str, Any] = {"body": {"max_tokens": 20}, "sim_step_ms": "25"}


class Relay:
    """A daemon of two workers and its admin side."""

    def __init__(self, process: Process, admin_port: int) -> None:
        self.process = process
        self.port = process.port
        self.admin_port = admin_port

    async def admin(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer of 200; the text of /metrics."""
        data = b"" if body is None else json.dumps(body).encode()
        answer = await ask(self.admin_port, request(path, data, method=method, content_length=str(len(data))))
        assert answer.status == 200, answer
        return answer.payload.decode() if path == "/metrics" else answer.json()

    async def metric(self, series: str) -> float:
        """A metric's value; 0 if it has none."""
        found = re.search(rf"^{re.escape(series)} (\S+)$", await self.admin("GET", "/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def becomes_idle(self) -> None:
        """The daemon comes to have nothing in flight."""
        with trio.fail_after(START_S):
            while await self.metric('relay_in_flight{pool="default"}'):
                pass

    @property
    def workers(self) -> list[int]:
        """Their process ids."""
        (forker,) = children_of(self.process.process.pid)
        return sorted(children_of(forker))

    async def replaces(self, worker: int) -> None:
        """A worker that was killed is gone, and there is another."""

        def is_replaced() -> bool:
            now = self.workers  # once: it may die between two looks
            return len(now) == 2 and worker not in now

        await until(is_replaced, START_S)

    @contextmanager
    def stopped(self, pid: int) -> Iterator[None]:
        """One worker is stopped."""
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    @asynccontextmanager
    async def streams(self, pid: int, count: int = STREAMS, **asked: Any) -> AsyncIterator[list[Client]]:
        """Clients of one worker, each of which has got two frames of a stream."""
        (other,) = (each for each in self.workers if each != pid)
        clients: list[Client] = []
        try:
            with self.stopped(other):
                for _ in range(count):
                    client = await Client.connect(self.port)
                    clients.append(client)
                    await client.send(request(**asked))
                    await client.frames(2)
            yield clients
        finally:
            for client in clients:
                client.stream.socket.close()


def children_of(pid: int) -> list[int]:
    """A process's children (proc(5))."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@asynccontextmanager
async def two_workers(*arguments: str) -> AsyncIterator[Relay]:
    """A daemon of two workers that serves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        admin_port = free.getsockname()[1]
    flags = ("--workers", "2", "--admin", f"127.0.0.1:{admin_port}", *arguments)
    async with relay_serve(*flags) as process:
        await process.prints(lambda: b"listening" in process.stderr)
        yield Relay(process, admin_port)


def configuration(path: Path, *lines: str) -> str:
    """A configuration file's name."""
    path.write_text("\n".join(("[[pool]]", *lines)))
    return str(path)


async def answers_of(clients: list[Client]) -> list[Answer]:
    return [await client.answer() for client in clients]


async def served_by_each(relay: Relay) -> None:
    """A request to each worker."""
    for worker in relay.workers:
        async with relay.streams(worker, 1) as (client,):
            assert (await client.answer()).status == 200


async def test_a_worker_that_dies_takes_its_own_streams_and_no_others(engine: Engine) -> None:
    async with two_workers("--upstream", engine.url) as relay:
        for _ in range(4):
            assert (await ask(relay.port, request())).status == 200
        victim, other = relay.workers
        async with (
            relay.streams(victim, sim_fault="stall-after:2") as lost,
            relay.streams(other, **SLOW) as kept,
        ):
            os.kill(victim, signal.SIGKILL)
            assert {answer.end for answer in await answers_of(lost)} <= {"fin", "rst"}
            await relay.replaces(victim)
            assert other in relay.workers
            assert [(answer.end, len(answer.frames)) for answer in await answers_of(kept)] == [("whole", 22)] * STREAMS
        await until(lambda: states(engine).count("aborted") == STREAMS)
        await served_by_each(relay)
        await relay.becomes_idle()
        done = 'relay_requests_total{outcome="--",pool="default",route="chat",status="200"}'
        assert await relay.metric(done) == 4 + STREAMS + 2
        assert f"worker {victim} ended with SIGKILL".encode() in relay.process.stderr
        relay.process.signal(signal.SIGTERM)
        assert await relay.process.ended() == 0
    assert b"Traceback" not in relay.process.stderr


async def test_limits_hold_over_both_and_survive_a_death(engine: Engine, tmp_path: Path) -> None:
    limited = f"upstreams = [{{ url = '{engine.url}', max_in_flight = {STREAMS} }}]"
    path = configuration(tmp_path / "relay.toml", limited, "max_queue = 4")
    async with two_workers("--config", path) as relay:
        first, second = relay.workers
        async with relay.streams(first, 2, sim_fault="stall-after:2"), relay.streams(second, 1) as (last,):
            # Three are taken, by both together; whoever comes now waits, at either worker.
            await last.answer()
            async with relay.streams(second, 1, sim_fault="stall-after:2"), trio.open_nursery() as nursery:
                answers: list[Answer] = []

                async def wait() -> None:
                    answers.append(await ask(relay.port, request()))

                for _ in range(4):
                    nursery.start_soon(wait)
                with trio.fail_after(START_S):
                    while (pool := (await relay.admin("GET", "/-/status"))["pools"][0])["queued"] < 4:
                        pass
                assert (pool["in_flight"], pool["upstreams"][0]["in_flight"]) == (STREAMS, STREAMS)
                assert (await ask(relay.port, request())).status == 429
                os.kill(first, signal.SIGKILL)  # what it held is given back, and goes to who waits at the other
                await until(lambda: len(answers) == 4, START_S)
                # All three places are there again.
                await until(lambda: len(relay.workers) == 2, START_S)
                async with relay.streams(second, STREAMS - 1, sim_fault="stall-after:2"):
                    assert (await relay.admin("GET", "/-/status"))["in_flight"] == STREAMS
            served = [answer for answer in answers if answer.head.startswith(b"HTTP/1.1 200")]
            assert all(answer.head == b"" for answer in answers if answer not in served)  # the dead worker's
        await relay.becomes_idle()


async def test_what_goes_on_at_one_that_comes_back_counts_over_both(engine: Engine, tmp_path: Path) -> None:
    limited = f"upstreams = [{{ url = '{engine.url}', max_in_flight = {STREAMS} }}]"
    async with two_workers("--config", configuration(tmp_path / "relay.toml", limited)) as relay:
        first, second = relay.workers
        for _ in range(2):
            async with (
                relay.streams(first, STREAMS - 1, sim_fault="stall-after:2"),
                relay.streams(second, 1, sim_fault="stall-after:2"),
            ):
                await relay.admin("DELETE", "/-/upstreams", {"url": engine.url})
                await relay.admin("POST", "/-/upstreams", {"url": engine.url})
                for _ in range(4):
                    assert (await ask(relay.port, request())).status == 429
            await relay.becomes_idle()
            await served_by_each(relay)


async def test_a_reload_lets_nobody_past_a_limit(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"

    def write(weight: int) -> str:
        upstream = f"{{ url = '{engine.url}', max_in_flight = {STREAMS}, weight = {weight} }}"
        return configuration(path, f"upstreams = [{upstream}]", "max_queue = 9")

    async with two_workers("--config", write(1)) as relay, AsyncExitStack() as stack:
        first, _ = relay.workers
        with relay.stopped(first):
            waiting = [await stack.enter_async_context(await Client.connect(relay.port)) for _ in range(4)]
            for client in waiting:  # the other worker's from now on
                assert (await client.ask(request("/-/live", method="GET"))).status == 200
        async with relay.streams(first, STREAMS, sim_fault="stall-after:2"):
            for client in waiting:
                await client.send(request())
            with trio.fail_after(START_S):
                while (await relay.admin("GET", "/-/status"))["pools"][0]["queued"] < 4:
                    pass
            for weight in (2, 3):
                write(weight)
                await relay.admin("POST", "/-/reload")
                assert len(engine.requests()) == STREAMS
        assert [answer.status for answer in await answers_of(waiting)] == [200] * 4


async def test_what_an_operator_changes_has_reached_both_when_it_is_confirmed(
    engine: Engine, second_engine: Engine
) -> None:
    async with two_workers("--upstream", engine.url) as relay:
        await relay.admin("POST", "/-/upstreams", {"url": second_engine.url})
        await relay.admin("DELETE", "/-/upstreams", {"url": engine.url})
        await served_by_each(relay)
        assert (len(engine.requests()), len(second_engine.requests())) == (0, 2)


async def test_a_reload_reaches_both(engine: Engine, second_engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    async with two_workers("--config", configuration(path, f"upstreams = ['{engine.url}']")) as relay:
        async with relay.streams(relay.workers[0], 1, **SLOW) as (client,):
            configuration(path, f"upstreams = ['{second_engine.url}']")
            relay.process.signal(signal.SIGHUP)
            await relay.process.prints(lambda: b"relay: reloaded" in relay.process.stderr)
            await served_by_each(relay)
            assert len((await client.answer()).frames) == 22  # what was in flight goes on
        assert (len(engine.requests()), len(second_engine.requests())) == (1, 2)
        configuration(path, "upstreams = []")
        relay.process.signal(signal.SIGHUP)
        await relay.process.prints(lambda: b"not reloaded:" in relay.process.stderr)
        await served_by_each(relay)


async def test_keys_are_read_once_for_all_workers(engine: Engine, tmp_path: Path) -> None:
    """Whatever becomes of their file, workers agree on who may come in; one begun later does as well."""
    keys = tmp_path / "keys"
    pool = (f"upstreams = ['{engine.url}']", "[auth]", f"keys_file = '{keys}'")
    path = configuration(tmp_path / "relay.toml", *pool)

    def hold(name: str) -> None:
        keys.write_text(keys_line(name, f"{name}-key".encode()) + "\n")

    async def statuses(relay: Relay, key: str) -> list[int]:
        found = []
        for pid in relay.workers:
            with relay.stopped(pid):
                found.append((await ask(relay.port, request(authorization=f"Bearer {key}"))).status)
        return found

    hold("alice")
    async with two_workers("--config", path) as relay:
        keys.unlink()
        relay.process.signal(signal.SIGHUP)
        await relay.process.prints(lambda: b"not reloaded: " in relay.process.stderr)
        assert f"not reloaded: auth.keys_file: {keys}: cannot be read: No such file".encode() in relay.process.stderr
        victim, _ = relay.workers
        os.kill(victim, signal.SIGKILL)
        await relay.replaces(victim)
        assert await statuses(relay, "alice-key") == [200, 200]
        hold("bob")
        await relay.admin("POST", "/-/reload", "")
        keys.unlink()
        assert await statuses(relay, "alice-key") == [401, 401]
        assert await statuses(relay, "bob-key") == [200, 200]
    assert b"Traceback" not in relay.process.stderr


async def test_keys_are_counted_and_limited_over_both_and_a_death_changes_neither(
    engine: Engine, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(keys_line("alice", b"alice-key") + "\n" + keys_line("bob", b"bob-key") + "\n")
    pool = (f"upstreams = ['{engine.url}']", "[auth]", f"keys_file = '{keys}'")
    limits = ("[auth.limits.alice]", "max_in_flight = 3", "[auth.limits.bob]", "requests_per_minute = 2")
    path = configuration(tmp_path / "relay.toml", *pool, *limits)
    alice: dict[str, Any] = {"authorization": "Bearer alice-key"}
    bob: dict[str, Any] = {"authorization": "Bearer bob-key"}
    stalled: dict[str, Any] = {"sim_fault": "stall-after:2", **alice}

    async def told(relay: Relay) -> dict[str, dict[str, Any]]:
        return {key["name"]: key for key in (await relay.admin("GET", "/-/status"))["keys"]}

    async def answers(relay: Relay, pid: int, fields: dict[str, Any], count: int) -> list[int]:
        (other,) = (each for each in relay.workers if each != pid)
        with relay.stopped(other):
            return [(await ask(relay.port, request(**fields))).status for _ in range(count)]

    async with two_workers("--config", path) as relay:
        first, second = relay.workers
        async with relay.streams(first, 2, **stalled), relay.streams(second, 1, **stalled):
            for worker in (first, second):
                assert await answers(relay, worker, alice, 1) == [429]
            assert (await told(relay))["alice"]["in_flight"] == 3
            assert await relay.metric('relay_key_in_flight{key="alice"}') == 3
            os.kill(first, signal.SIGKILL)
            await relay.replaces(first)
            with trio.fail_after(START_S):
                while (alices := (await told(relay))["alice"])["in_flight"] != 1:
                    pass
            assert alices["refusals"] == 2
            async with relay.streams(second, 2, **stalled):
                (new,) = (each for each in relay.workers if each != second)
                assert await answers(relay, new, alice, 1) == [429]
        assert await answers(relay, new, bob, 1) == [200]
        assert await answers(relay, second, bob, 2) == [200, 429]
        # Limits are what the file says now, for both.
        configuration(Path(path), *pool, "[auth.limits.alice]", "max_in_flight = 1")
        await relay.admin("POST", "/-/reload", "")
        for worker in relay.workers:
            assert await answers(relay, worker, bob, 3) == [200] * 3
        async with relay.streams(new, 1, **stalled):
            assert await answers(relay, second, alice, 1) == [429]
        with trio.fail_after(START_S):
            while (found := await told(relay))["alice"]["in_flight"]:
                pass
        assert (found["bob"]["requests"], found["bob"]["refusals"]) == (8, 1)
        assert (found["alice"]["requests"], found["alice"]["refusals"]) == (4, 4)
    assert b"Traceback" not in relay.process.stderr


async def test_one_answer_tells_of_both_and_both_drain(engine: Engine) -> None:
    async with two_workers("--upstream", engine.url) as relay:
        first, second = relay.workers
        async with relay.streams(first, 1, **SLOW) as (one,), relay.streams(second, 1, **SLOW) as (other,):
            status = await relay.admin("GET", "/-/status")
            assert (status["workers"], status["in_flight"]) == (2, 2)
            assert status["pools"][0]["upstreams"][0]["in_flight"] == 2
            exchanges = await relay.admin("GET", "/-/exchanges")
            assert [exchange["phase"] for exchange in exchanges] == ["data", "data"]
            assert exchanges[0]["age_ms"] > exchanges[1]["age_ms"]
            assert await relay.metric('relay_in_flight{pool="default"}') == 2
            relay.process.signal(signal.SIGTERM)
            for answer in (await one.answer(), await other.answer()):
                assert (answer.end, len(answer.frames)) == ("whole", 22)
        assert await relay.process.ended() == 0
    records = [json.loads(line) for line in relay.process.stdout.splitlines()]
    assert [record["outcome"] for record in records] == ["--", "--"]


async def test_workers_outlive_the_control_process_to_the_end_of_their_streams(engine: Engine) -> None:
    async with two_workers("--upstream", engine.url) as relay:
        (forker,) = children_of(relay.process.process.pid)
        async with relay.streams(relay.workers[0], 1, **SLOW) as (client,):
            relay.process.signal(signal.SIGKILL)
            answer = await client.answer()
            assert (answer.end, len(answer.frames)) == ("whole", 22)
        await until(lambda: not children_of(forker), START_S)


class LayerwiseEngines:
    """A prefiller and a decoder of ascend_layerwise: the decoder calls back, and answers once the prefiller was asked.

    Both are at one address, on which a request to decode is one that names a metaserver.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []  #: what the prefiller was given as `kv_transfer_params`
        self.is_prefilled = trio.Event()

    async def serve(self, stream: trio.SocketStream) -> None:
        data = b""
        while not (match := re.match(rb"(?si).*\r\ncontent-length: *(\d+).*?\r\n\r\n", data)) or (
            len(data) < match.end() + int(match[1])
        ):
            received = await stream.receive_some()
            if not received:
                return
            data += received
        asked = json.loads(data[match.end() :])["kv_transfer_params"]
        if "metaserver" not in asked:
            self.asked.append(asked)
            self.is_prefilled.set()
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            return
        found = re.search(rb"(?i)\r\nx-request-id: (\S+)", data)
        assert found is not None
        body = json.dumps({"request_id": f"chatcmpl-{found[1].decode()}", "remote_block_ids": [1, 2]}).encode()
        match_url = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/\S+)", asked["metaserver"])
        assert match_url is not None
        path = match_url[2]
        answer = await ask(int(match_url[1]), request(path, body))
        assert answer.status == 200
        await self.is_prefilled.wait()
        self.is_prefilled = trio.Event()
        await stream.send_all(GOOD_ANSWER)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_decoders_call_reaches_the_worker_that_waits_for_it(
    nursery: trio.Nursery, tmp_path: Path, workers: int
) -> None:
    """Also where the pool came with a reload."""
    engines = LayerwiseEngines()
    listeners = [(await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] for _ in range(2)]
    for listener in listeners:
        nursery.start_soon(trio.serve_listeners, engines.serve, [listener])
    prefill, decode = (f"http://127.0.0.1:{listener.socket.getsockname()[1]}" for listener in listeners)
    path = tmp_path / "relay.toml"
    health = ("[health]", "interval_s = 0")
    configuration(path, f"upstreams = ['{prefill}']", *health)
    async with two_workers("--config", str(path), "--workers", str(workers)) as relay:
        pool = (f"prefill = ['{prefill}']", f"decode = ['{decode}']", 'connector = "ascend_layerwise"')
        configuration(path, *pool, *health)
        assert await relay.admin("POST", "/-/reload") == {"reloaded": "yes"}
        if workers == 1:
            assert (await ask(relay.port, request())).status == 200
        else:
            for pid in relay.workers:
                with relay.stopped(pid):
                    answer = await ask(relay.port, request())
                    assert (answer.status, answer.end) == (200, "whole")
    assert [asked["remote_block_ids"] for asked in engines.asked] == [[1, 2]] * workers


async def test_an_engine_is_picked_by_what_both_have_there(engine: Engine, second_engine: Engine) -> None:
    stalled: dict[str, Any] = {"sim_fault": "stall-after:2"}
    async with two_workers("--upstream", engine.url) as relay:
        first, second = relay.workers
        async with relay.streams(first, **stalled):
            await relay.admin("POST", "/-/upstreams", {"url": second_engine.url})
            async with relay.streams(second, **stalled):
                assert (states(engine), states(second_engine)) == (["running"] * STREAMS, ["running"] * STREAMS)


async def test_a_client_of_any_worker_is_told_how_long_an_engine_will_be_away(tmp_path: Path) -> None:
    """Workers do not probe: that the engine has been up, and so needs seven good probes now, they have to be told."""
    file = tmp_path / "relay.toml"
    async with fakes("m") as (one,):
        health = ("[health]", "interval_s = 0.5", "failures = 1", "successes = 7")
        async with two_workers("--config", configuration(file, f"upstreams = ['{one.url}']", *health)) as relay:
            assert (await ask(relay.port, request())).status == 200
            one.health = 503
            for worker in relay.workers:
                (other,) = (each for each in relay.workers if each != worker)
                with relay.stopped(other), trio.fail_after(START_S):
                    while (refused := await ask(relay.port, request())).status == 200:
                        pass  # a probe is still to come, or to be told of
                assert (refused.status, refused.headers["retry-after"]) == (503, "4")
