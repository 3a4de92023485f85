"""The drills, in small: kept by this relay, and broken by one that is switched off in part or sabotaged."""

from __future__ import annotations

import sys

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from relay_bench.drill import affinity, hangups, rolling
from relay_bench.drill.client import End, Reading
from relay_bench.drill.command import main
from relay_bench.drill.report import Report, closing, rendered
from relay_bench.drill.stage import Scene
from relay_bench.engine.prefix_cache import BLOCK_TOKENS, PrefixCache

#: So that an engine which has come back is known at once.
QUICK_PROBES = ("--set", "health.interval_s=0.1", "--set", "health.failures=1", "--set", "health.successes=1")

NO_ERROR = "no client sees an error before the commit point"


def kept(capsysbinary: pytest.CaptureFixture[bytes], *arguments: str) -> tuple[int, Report]:
    """The exit status of a quick drill, and its report."""
    status = main([*arguments, "--quick", "--json"])
    report = msgspec.json.decode(capsysbinary.readouterr().out, type=Report)
    print(
        *(f"{promise.text}: {promise.seen}" for promise in report.promises if not promise.is_kept),
        sep="\n",
        file=sys.stderr,
    )
    return status, report


def sabotaged(*changes: str) -> tuple[str, ...]:
    """The command of a relay with some of its parts replaced."""
    imports = "import sys", "from relay import cli", "from relay.core.balance import Load"
    more = "from relay.net.fleet import Group", "from relay.net.pool import UpstreamConnection", "kept = []"
    return sys.executable, "-c", "\n".join((*imports, *more, *changes, "sys.exit(cli.main())"))


def test_a_kill_is_survived(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    status, report = kept(capsysbinary, "kill", *QUICK_PROBES)
    assert (status, report.broken) == (0, [])
    assert len(report.promises) == 9


def test_a_kill_without_failover(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    status, report = kept(capsysbinary, "kill", *QUICK_PROBES, "--set", "failover.attempts=1")
    assert status == 1
    assert NO_ERROR in report.broken


def test_hang_ups_leave_nothing(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    status, report = kept(capsysbinary, "hangups")
    assert (status, report.broken) == (0, [])
    assert len(report.promises) == 8


def test_hang_ups_with_a_relay_that_leaks() -> None:
    leaky = sabotaged(
        "UpstreamConnection.close = lambda self: kept.append(self.sock)",
        "Load.release = lambda self: None",
    )
    scene = Scene(command=leaky, settings={"log.format": '"off"'}, settle_s=0.2)
    report = trio.run(hangups.drill, scene, msgspec.structs.replace(hangups.QUICK, requests=100))
    assert {
        "all load counts are back at zero",
        "no connection has leaked",
        "one record for each request begun",
        "each request sent whole has its own",
    } <= set(report.broken)


def test_engines_are_replaced(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    status, report = kept(capsysbinary, "rolling")
    assert (status, report.broken) == (0, [])
    assert len(report.promises) == 9


def test_engines_that_are_never_taken_out() -> None:
    scene = Scene(command=sabotaged("Group.remove = lambda self, url: self.upstreams[url]"), settle_s=0.2)
    plan = msgspec.structs.replace(rolling.QUICK, engines=1, drain_s=0.3)
    assert {
        "an engine that is taken out gets nothing more",
        "no attempt fails, not even one that another makes good",
        "only the new engines are in the pool, and all are used",
        "zero errors",
    } <= set(trio.run(rolling.drill, scene, plan).broken)


def test_streams_are_held_at_once(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    status, report = kept(capsysbinary, "streams")
    assert (status, report.broken) == (0, [])
    assert len(report.promises) == 8


def test_streams_that_are_refused(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    status, report = kept(capsysbinary, "streams", "--streams", "40", "--set", "pool.max_in_flight=30")
    assert status == 1
    assert "no frame is lost, and none torn" in report.broken


def test_affinity_finds_what_was_said(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    status, report = kept(capsysbinary, "affinity")
    assert (status, report.broken) == (0, [])
    shares = {name: share for name, share, _ in report.picture}
    assert shares["prefix_affinity"] > 1.2 * max(shares["random"], shares["least_outstanding"])


def test_no_affinity_finds_less() -> None:
    scene = Scene(settings={"pool.balance": '"random"'})
    plan = msgspec.structs.replace(affinity.QUICK, engines=2, conversations=12)
    report = trio.run(affinity.drill, scene, plan)
    assert [text.split()[0] for text in report.broken] == ["prefix_affinity", "session_affinity"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kill", "--quick", "--set", "failover.attempts=none"], "relay did not start: "),
        (["kill", "--set", "failover"], "wanted KEY=VALUE"),
    ],
)
def test_a_drill_that_cannot_be_held(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        status = main(arguments)
    except SystemExit as exit_:  # argparse
        status = int(str(exit_.code))
    assert status == 2
    assert said in capsys.readouterr().err


# -- what became of a request

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
ERROR = b'data: {"error":{"message":"gone","type":"server_error","code":"upstream_disconnected"}}\n\n'
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


def chunks(*frames: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames)


@pytest.mark.parametrize(
    ("received", "end"),
    [
        (HEAD + chunks(TOKEN, TOKEN, DONE) + LAST, End.WHOLE),
        (HEAD + chunks(TOKEN, DONE) + LAST, End.BROKEN),  # a token is missing
        (HEAD + chunks(TOKEN, TOKEN, TOKEN, DONE) + LAST, End.BROKEN),  # it was asked twice
        (HEAD + chunks(TOKEN, TOKEN) + LAST, End.BROKEN),  # no end mark
        (HEAD + chunks(TOKEN, ERROR), End.TOLD),
        (HEAD + chunks(TOKEN, TOKEN, ERROR), End.TOLD),
        (HEAD + chunks(TOKEN), End.BROKEN),  # not told
        (HEAD + chunks(TOKEN, ERROR, ERROR), End.BROKEN),  # told twice
        (HEAD + chunks(TOKEN, ERROR) + LAST, End.BROKEN),  # a clean end
        (HEAD + chunks(TOKEN, ERROR, DONE), End.BROKEN),
        (HEAD, End.REFUSED),
        (REFUSAL, End.REFUSED),
        (b"", End.REFUSED),
    ],
)
def test_what_became_of_a_request(received: bytes, end: End) -> None:
    for step in (1, len(received) or 1):
        reading = Reading(2)
        for start in range(0, len(received), step):
            reading.feed(received[start : start + step])
        if not reading.answer.is_done:
            reading.feed(b"")
        found, detail = reading.end()
        assert found is end
        assert bool(detail) == (end is not End.WHOLE)


# -- prefix caches

prompts = st.lists(st.integers(0, 3), max_size=6 * BLOCK_TOKENS)


def blocks(*numbers: int) -> list[int]:
    return [number for number in numbers for _ in range(BLOCK_TOKENS)]


def test_a_conversation_finds_its_past() -> None:
    cache = PrefixCache(100)
    first, answer, second = blocks(1, 2), blocks(3), blocks(4)
    assert cache.serve(first, answer) == 0
    assert cache.serve([*first, *answer, *second]) == 3 * BLOCK_TOKENS
    assert cache.serve(blocks(2, 1)) == 0  # a block is known with what stands before it


def test_what_was_used_last_stays_and_beginnings_stay_longest() -> None:
    cache = PrefixCache(3)
    cache.serve(blocks(1, 2, 3))
    cache.serve(blocks(9))
    assert cache.serve(blocks(1, 2, 3, 4)) == 2 * BLOCK_TOKENS


@given(st.lists(prompts, max_size=8), prompts, st.integers(0, 20))
def test_a_cache_finds_whole_blocks_and_never_all(before: list[list[int]], prompt: list[int], size: int) -> None:
    cache, unlimited = PrefixCache(size), PrefixCache(1_000_000)
    for one in before:
        assert cache.serve(one) <= unlimited.serve(one)
    found = unlimited.serve(prompt)
    assert cache.serve(prompt) <= found <= max(len(prompt) - 1, 0)
    assert found % BLOCK_TOKENS == 0
    shared = max((_shared(prompt, one) for one in before), default=0)
    assert found == min(shared, max(len(prompt) - 1, 0)) // BLOCK_TOKENS * BLOCK_TOKENS


def _shared(one: list[int], other: list[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


# -- reports


def test_a_promise_judged_twice_was_kept_if_it_was_both_times() -> None:
    report = Report("drill")
    report.judge("a", True)
    report.judge("b", False, "first")
    report.judge("a", False)
    report.judge("b", True, "second")
    assert report.broken == ["a", "b"]
    assert report.promises[1].seen == "first"
    assert rendered(report)
    assert closing(report) == "drill drill: 2 of 2 promises BROKEN: a; b"
    report.promises.clear()
    report.judge("c", True)
    assert closing(report) == "drill drill: all 1 promises kept"
