"""``relay demo``: the built-in engine and a relay as child processes, and one streamed chat completion through both.

Both are started through their own command lines, so what is shown is what ``relay serve`` does anywhere. Every wait
has a limit, and whatever happens both children are gone when this returns.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import httpx
import msgspec
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

#: Seconds for a child to say where it listens: a cold start on a slow disk.
START_LIMIT_S = 10.0
#: Seconds for the streamed answer, which takes less than two.
ANSWER_LIMIT_S = 30.0
#: Seconds from the answer's end to its record.
RECORD_LIMIT_S = 5.0
#: Seconds for a child to end after SIGTERM, before SIGKILL; the relay is told to drain for `DRAIN_S` of them.
STOP_LIMIT_S = 5.0
#: Seconds for the kernel to end a child after SIGKILL.
KILL_LIMIT_S = 2.0
#: Seconds the relay leaves a visitor's own stream when the demo ends.
DRAIN_S = 1.0

#: Where the relay and its admin side listen if nobody else does: their defaults.
PREFERRED_PORT = 8080
ADMIN_PORT = 8081

_INTERRUPTED = 130  # as the shell reports a process ended by SIGINT


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class Record(msgspec.Struct, frozen=True):
    """What is shown of an exchange's record."""

    id: str
    outcome: str
    error: str | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    relay_ms: float | None = None
    gap_p50_ms: float | None = None
    frames: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage: str | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    error: Any = None


def run(*, once: bool) -> int:
    """Run the demo and return the process's exit status; `once` ends it after the first answer."""
    return trio.run(_run, once)


async def _run(once: bool) -> int:
    status = _INTERRUPTED
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_on_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop_on_signal)
            try:
                async with _Child.started("engine", _engine_command()) as engine:
                    admin = "off" if once or _is_taken(ADMIN_PORT) else f"127.0.0.1:{ADMIN_PORT}"
                    async with _Child.started("relay", _relay_command(engine.url, once, admin)) as relay:
                        await _show_one_answer(relay)
                        status = 0
                        if not once:
                            await _show_more(engine, relay, admin)
            except* DemoError as errors:
                for error in errors.exceptions:
                    print(f"relay demo: {error}", file=sys.stderr)
                status = 1
            except* BrokenPipeError:
                # Nobody reads any more, as in `relay demo | head`; what is still buffered has nowhere to go.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                status = 1
            nursery.cancel_scope.cancel()
    return status


def _engine_command() -> list[str]:
    pace = ["--ttft-ms", "120", "--step-ms", "25", "--model", "demo"]
    return [sys.executable, "-m", "relay_bench", "engine", "--listen", "127.0.0.1:0", *pace]


def _relay_command(engine_url: str, once: bool, admin: str) -> list[str]:
    port = 0 if once or _is_taken(PREFERRED_PORT) else PREFERRED_PORT
    command = [sys.executable, "-m", "relay", "serve", "--listen", f"127.0.0.1:{port}", "--admin", admin]
    return [*command, "--upstream", engine_url, "--log-format", "json", "--drain-s", str(DRAIN_S)]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


async def _show_one_answer(relay: _Child) -> None:
    print(f"The built-in engine answers behind a relay on {relay.url}:\n")
    exchange_id = f"demo-{secrets.token_hex(4)}"
    with _within(ANSWER_LIMIT_S, "the answer"):
        await _stream_answer(relay.url, exchange_id)
    with _within(RECORD_LIMIT_S, "the relay's record of the answer"):
        line, record = await _record_of(relay, exchange_id)
    _print_record(record, line)
    if record.outcome != "--":
        raise DemoError(f"the exchange ended as {record.outcome}: {record.error}")


async def _stream_answer(url: str, exchange_id: str) -> None:
    """Ask for a streamed completion, and print its tokens as they come."""
    body = {**_question(), "stream_options": {"include_usage": True}}
    headers = {"X-Request-Id": exchange_id}
    is_done = False
    # A proxy from the environment must not come between; the limit for the whole is the caller's.
    async with httpx.AsyncClient(trust_env=False, timeout=None) as client:
        try:
            async with client.stream("POST", _chat_url(url), json=body, headers=headers) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise DemoError(f"the relay answered {response.status_code}: {text}")
                async for line in response.aiter_lines():  # to the end, which has to be a clean one
                    is_done = is_done or line == "data: [DONE]"
                    if not is_done:
                        _print_token(line)
        except httpx.HTTPError as error:
            raise DemoError(f"the stream broke: {str(error) or type(error).__name__}") from error
    print("\n")
    if not is_done:
        raise DemoError("the stream ended without [DONE]")


def _print_token(line: str) -> None:
    field, _, data = line.partition(": ")
    if field != "data":
        return
    try:
        chunk = msgspec.json.decode(data, type=_Chunk)
    except msgspec.DecodeError as error:
        raise DemoError(f"the stream holds what is no chunk, {data!r}: {error}") from error
    if chunk.error is not None:
        raise DemoError(f"the stream holds an error: {data}")
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)


def _print_record(record: Record, line: str) -> None:
    print(f"first token  after {_ms(record.ttft_ms)}, of which the relay took {_ms(record.relay_ms)}")
    print(f"frames       {record.frames} in {_ms(record.total_ms)}, {_ms(record.gap_p50_ms)} apart (median)")
    print(f"usage        {record.prompt_tokens} + {record.completion_tokens} tokens, as counted by: {record.usage}")
    print(f"\nIts record, one line of the relay's standard output:\n{line}", flush=True)


def _ms(value: float | None) -> str:
    return "an unknown time" if value is None else f"{value:.1f} ms"


async def _record_of(relay: _Child, exchange_id: str) -> tuple[str, Record]:
    """Find one exchange's record in the relay's output; also the line as it stands there."""
    while (line := await relay.stdout.next()) is not None:
        try:
            record = msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError as error:
            raise DemoError(f"the relay's output holds what is no record, {line!r}: {error}") from error
        if record.id == exchange_id:
            return line, record
    raise await relay.unexpected_end()


async def _show_more(engine: _Child, relay: _Child, admin: str) -> None:
    """Show how to send more, and print the record of each, for as long as both run."""
    shown = "" if admin == "off" else f"; `relay status` shows them, and http://{admin}/metrics"
    print(f"\nBoth run until Ctrl-C{shown}. Try, in another terminal:\n")
    print(f"  curl -N {_chat_url(relay.url)} -H 'Content-Type: application/json' -d '{json.dumps(_question())}'\n")
    sys.stdout.flush()
    ended: list[_Child] = []
    async with trio.open_nursery() as nursery:

        async def repeat(child: _Child) -> None:
            await child.repeat()
            ended.append(child)
            nursery.cancel_scope.cancel()

        nursery.start_soon(repeat, engine)
        nursery.start_soon(repeat, relay)
    raise await ended[0].unexpected_end()


def _chat_url(url: str) -> str:
    return f"{url}/v1/chat/completions"


def _question() -> dict[str, Any]:
    question = {"role": "user", "content": "What does a relay do?"}
    return {"model": "demo", "stream": True, "max_tokens": 48, "messages": [question]}


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise DemoError(f"{what} took more than {seconds:g} s") from None


class _Lines:
    """The lines of a child's output."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._unread = bytearray()

    async def next(self) -> str | None:
        """Wait for the next line; None at the end. A cancelled wait loses nothing."""
        while (end := self._unread.find(b"\n")) < 0:
            more = await self._stream.receive_some()
            if not more:
                return None
            self._unread += more
        line = self._unread[:end].decode(errors="replace")
        del self._unread[: end + 1]
        return line

    async def copy_to(self, output: TextIO) -> None:
        """Print each line as it comes, to the end."""
        while (line := await self.next()) is not None:
            print(line, file=output, flush=True)


class _Child:
    """A server in a process of its own, that has said where it listens."""

    def __init__(self, name: str, process: trio.Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.name = name
        self.url = ""
        self.stdout = _Lines(process.stdout)
        self._stderr = _Lines(process.stderr)
        self._process = process

    @classmethod
    @asynccontextmanager
    async def started(cls, name: str, command: list[str]) -> AsyncGenerator[_Child]:
        """Start a server, wait until it listens, and stop it at the end of the block."""
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # the terminal's Ctrl-C is for the demo, which then ends its children in order
        )
        child = cls(name, process)
        try:
            with _within(START_LIMIT_S, f"the start of the {name}"):
                child.url = await child._listening()
            yield child
        finally:
            with trio.move_on_after(STOP_LIMIT_S + KILL_LIMIT_S, shield=True):
                await child._stop()

    async def _listening(self) -> str:
        said: list[str] = []
        while (line := await self._stderr.next()) is not None:
            _, found, url = line.partition("listening on ")
            if found:
                return url
            said.append(line)
        error = await self.unexpected_end()
        raise DemoError("\n  ".join([f"{error} before it listened", *said]))

    async def unexpected_end(self) -> DemoError:
        """Make the error of a child that should still be there; its output has ended, so the rest is about to."""
        with trio.move_on_after(STOP_LIMIT_S):
            await self._process.wait()
        return DemoError(f"the {self.name} ended with status {self._process.returncode}")

    async def repeat(self) -> None:
        """Pass on what the child has to say, until it ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.stdout.copy_to, sys.stdout)
            nursery.start_soon(self._stderr.copy_to, sys.stderr)

    async def _stop(self) -> None:
        with trio.move_on_after(STOP_LIMIT_S):
            self._process.terminate()
            await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
