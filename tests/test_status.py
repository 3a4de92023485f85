"""`relay status`: the figures, the picture at several widths, and what is said when nobody answers."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from relay import status as command
from relay.core import metrics
from relay.core.board import Board, read, total
from relay.core.status import KeyStatus, PoolStatus, Rates, Status, UpstreamStatus, keys_of, merged, rates
from relay.status import StatusError, fetch, main, render, show

LONG_URL = "http://prefill-0.engines.inference.svc.cluster.local:8000"
WORKING = Status(
    version="0.2.0",
    state="ready",
    uptime_s=8071.4,
    workers=2,
    in_flight=1037,
    pools=(
        PoolStatus(
            name="chat",
            models=("qwen3-32b", "qwen*"),
            policy="least_outstanding",
            in_flight=37,
            queued=2,
            rates=Rates(requests_per_s=12.44, tokens_per_s=1830.2, ttft_p50_ms=84.21, ttft_p99_ms=12_310.0,
                        gap_p50_ms=24.1, gap_p99_ms=141.4),
            upstreams=(
                UpstreamStatus(url="http://10.0.0.1:8000", state="healthy", weight=2, in_flight=20, max_in_flight=64,
                               probe_ms=1.23, age_s=8000.0),
                UpstreamStatus(url="http://10.0.0.2:8000", state="ejected", failures=3,
                               last_error="cannot connect: Connection refused", last_error_age_s=95.0),
            ),
        ),
        PoolStatus(
            name="long",
            policy="round_robin",
            upstreams=(
                UpstreamStatus(url=LONG_URL, role="prefill", state="half-open"),
                UpstreamStatus(url="http://10.0.2.1:8000", role="decode", state="draining", last_error="\x1b[2J\nboo"),
            ),
        ),
        PoolStatus(name="empty", models=("[bold]m[/]",), policy="random"),
    ),
)  # fmt: skip


def picture(status: Status, width: int) -> str:
    """What a terminal of `width` columns shows."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(render(status))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# -- the figures


def test_rates_are_of_one_pool_and_of_the_time_between_two_readings() -> None:
    block = bytearray(1 << 16)
    board = Board(block)

    def work(pool: str, times: int) -> None:
        board.counter(metrics.REQUESTS, pool, "chat", "200", "--").add(times)
        board.counter(metrics.REQUESTS, pool, "chat", "502", "UH").add(times)
        board.counter(metrics.TOKENS, pool, "m", "completion").add(100 * times)
        board.counter(metrics.TOKENS, pool, "m", "prompt").add(1000 * times)
        for model in ("m", "n"):
            for _ in range(times):
                board.histogram(metrics.FIRST_TOKEN, pool, model).observe(0.9)

    work("chat", 7)
    work("other", 50)
    before = read(block)
    board.histogram(metrics.FIRST_TOKEN, "chat", "new").observe(0.9)
    work("chat", 4)
    work("other", 1)
    found = rates("chat", before, read(block), 2.0)
    assert found.requests_per_s == 4
    assert found.tokens_per_s == 200
    # all 9 between the bounds 0.7 and 1 s
    assert found.ttft_p50_ms == pytest.approx(850)
    assert found.ttft_p99_ms == pytest.approx(997)
    assert (found.gap_p50_ms, found.gap_p99_ms) == (None, None)
    assert rates("chat", before, before, 2.0) == Rates()
    assert rates("unknown", {}, before, 2.0) == Rates()
    assert rates("chat", {}, before, 0.0).requests_per_s == 0


@given(st.lists(st.floats(0.00001, 9.9), min_size=1, max_size=50))
def test_quantiles_lie_between_the_bounds_around_the_true_ones(values: list[float]) -> None:
    block = bytearray(1 << 16)
    series = Board(block).histogram(metrics.INTER_FRAME, "p", "m")
    for value in values:
        series.observe(value)
    found = rates("p", {}, read(block), 1.0)
    for q, quantile_ms in ((0.5, found.gap_p50_ms), (0.99, found.gap_p99_ms)):
        exact = sorted(values)[max(0, -int(-q * len(values) // 1) - 1)]
        edges = (0.0, *metrics.FRAME_BOUNDS)
        low = max(edge for edge in edges if edge < exact)
        high = min(edge for edge in edges if edge >= exact)
        assert quantile_ms is not None
        assert low * 1000 <= quantile_ms <= high * 1000 * (1 + 1e-9)


def test_beyond_the_last_bound_a_quantile_is_that_bound() -> None:
    block = bytearray(1 << 16)
    Board(block).histogram(metrics.INTER_FRAME, "p", "m").observe(100)
    assert rates("p", {}, read(block), 1.0).gap_p50_ms == 10_000


def test_keys_are_added_up_over_boards_and_the_busiest_come_first() -> None:
    blocks = [bytearray(1 << 16) for _ in range(2)]
    for at, block in enumerate(blocks, 1):
        board = Board(block)
        for name, times in (("alice", at), ("bob", 10)):
            board.counter(metrics.KEY_REQUESTS, name).add(times)
            board.counter(metrics.KEY_TOKENS, name, "prompt").add(100 * times)
            board.counter(metrics.KEY_TOKENS, name, "completion").add(7)
        board.gauge(metrics.KEY_IN_FLIGHT, "alice").add(at)
        board.counter(metrics.KEY_COST, "alice").add(0.25)
    board.counter(metrics.KEY_REFUSALS, "alice", "max_in_flight").add(2)
    board.counter(metrics.KEY_REFUSALS, "alice", "requests_per_minute").add(3)
    assert keys_of(total(blocks)) == (
        KeyStatus(name="alice", in_flight=3, requests=3, refusals=5, prompt_tokens=300, completion_tokens=14, cost=0.5),
        KeyStatus(name="bob", requests=20, prompt_tokens=2000, completion_tokens=14),
    )
    assert keys_of({}) == ()


# -- the picture


@pytest.mark.parametrize("width", [40, 60, 80, 100, 101, 120, 200])
def test_nothing_is_cut_off_and_no_line_is_too_long(width: int) -> None:
    text = picture(WORKING, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    if width >= 80:
        for url in ("http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://10.0.2.1:8000"):
            assert url in text
        assert "relay 0.2.0 · ready · up 2 h 14 min · 2 workers · 1,037 in flight" in text
        assert "37 in flight · 2 queued · 12.4 requests/s · 1,830 tokens/s" in text
        assert "first token p50 84.2 ms, p99 12.3 s · between frames p50 24.1 ms, p99 141 ms" in text
    for state in ("healthy", "ejected", "half-open", "draining"):
        assert state in text


def lines_of(text: str, part: str) -> list[str]:
    return [line for line in text.splitlines() if part in line]


def test_a_wide_terminal_has_all_columns_and_a_narrow_one_those_that_matter() -> None:
    wide, narrow = picture(WORKING, 101), picture(WORKING, 100)
    (chat_head, long_head) = lines_of(wide, "upstream ")
    assert chat_head.split() == ["upstream", "state", "weight", "in", "flight", "failures", "5xx", "probe", "age"]
    assert long_head.split() == [
        "upstream",
        "role",
        "state",
        "weight",
        "in",
        "flight",
        "failures",
        "5xx",
        "probe",
        "age",
    ]
    assert lines_of(narrow, "upstream ")[0].split() == ["upstream", "state", "in", "flight", "failures"]
    (row,) = lines_of(wide, "10.0.0.1")
    assert row.split() == [
        "http://10.0.0.1:8000",
        "healthy",
        "2",
        "20/64",
        "0",
        "0",
        "1.2",
        "ms",
        "2",
        "h",
        "13",
        "min",
    ]
    assert lines_of(narrow, "10.0.0.1")[0].split() == ["http://10.0.0.1:8000", "healthy", "20/64", "0"]


def test_keys_have_a_table_of_the_busiest() -> None:
    alice = KeyStatus(name="alice", in_flight=3, requests=1234, refusals=5, prompt_tokens=300, cost=0.5)
    status = Status(version="1", state="ready", uptime_s=0.0, keys=(alice,))
    wide, narrow = picture(status, 120), picture(status, 60)
    (row,) = lines_of(wide, "alice")
    assert row.split() == ["alice", "3", "1,234", "5", "300", "0", "0", "0.50"]
    assert lines_of(narrow, "alice")[0].split() == ["alice", "3", "1,234", "5", "300", "0"]
    many = Status(version="1", state="ready", uptime_s=0.0, keys=tuple(KeyStatus(name=f"k{n:04}") for n in range(1500)))
    assert len(lines_of(picture(many, 80), "k0")) == 20
    assert "and 1,480 more: --json" in picture(many, 80)
    assert "keys" not in picture(WORKING, 80)


def test_last_errors_stand_below_and_cannot_move_the_cursor() -> None:
    text = picture(WORKING, 80)
    assert "  http://10.0.0.2:8000: cannot connect: Connection refused, 1 min 35 s ago" in text
    assert "'\\x1b[2J\\nboo'" in text
    assert "\x1b" not in text


def test_names_are_not_markup() -> None:
    assert "empty · [bold]m[/] · random" in picture(WORKING, 80)


def test_what_is_missing_is_said() -> None:
    text = picture(WORKING, 80)
    assert "long · every model · round_robin" in text
    assert "no upstreams" in text
    assert "first token p50 -, p99 - · between frames p50 -, p99 -" in text
    assert "1 worker ·" in picture(Status(version="1", state="draining", uptime_s=0.0), 80)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (3600, "1 h 0 min"),
        (90061, "1 d 1 h"),
        (86400 * 400, "400 d 0 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert f"up {text} ·" in picture(Status(version="1", state="ready", uptime_s=seconds), 80)


# -- the command


def test_the_status_goes_through_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(WORKING), type=Status) == WORKING
    # a newer daemon says more, an older one less
    assert msgspec.json.decode(b'{"version":"9","state":"ready","uptime_s":1,"new":[]}', type=Status).pools == ()


class Enough(Exception):
    """Ends a watch."""


class Daemon:
    """Answers with each of `answers`, to one `show` after the other pause, and keeps what that printed each time."""

    def __init__(self, *answers: bytes | StatusError, is_terminal: bool = False) -> None:
        self._answers = iter(answers)
        self._file = io.StringIO()
        self.console = Console(
            width=100, height=40, file=self._file, force_terminal=is_terminal, color_system=None, highlight=False
        )
        self.printed: list[str] = []

    def fetch(self) -> bytes:
        answer = next(self._answers, None)
        if answer is None:
            raise Enough
        if isinstance(answer, StatusError):
            raise answer
        return answer

    def pause(self) -> None:
        self.printed.append(self._file.getvalue())
        self._file.seek(0)
        self._file.truncate()

    def show(self, *, watch: bool = False, as_json: bool = False) -> list[str]:
        with suppress(Enough):
            show(self.fetch, self.console, watch=watch, as_json=as_json, pause=self.pause)
        self.pause()
        return self.printed


def test_one_look() -> None:
    assert Daemon(msgspec.json.encode(WORKING)).show() == [picture(WORKING, 100)]


def test_json_is_what_the_daemon_sent() -> None:
    body = b'{"state":"ready",  "odd":["[red]\\u00e9", "' + b"x" * 200 + b'"]}\n'
    assert Daemon(body).show(as_json=True) == [body.decode()]


def test_watching_json_is_a_line_each_time() -> None:
    assert Daemon(b'{"a":1}\n', b'{"a":2}').show(watch=True, as_json=True) == ['{"a":1}\n', '{"a":2}\n', ""]


def test_watching_goes_on_when_the_daemon_is_away() -> None:
    first, second = (msgspec.json.encode(msgspec.structs.replace(WORKING, version=version)) for version in ("v1", "v2"))
    shown = Daemon(first, StatusError("nobody there"), second, is_terminal=True).show(watch=True)
    assert ["v1" in text for text in shown[:3]] == [True, False, False]
    assert ["nobody there" in text for text in shown[:3]] == [False, True, False]
    assert ["v2" in text for text in shown[:3]] == [False, False, True]
    assert shown[3].endswith("\x1b[?25h")  # the cursor is shown again


def test_watching_without_a_terminal_prints_each_time() -> None:
    first, second = (msgspec.json.encode(msgspec.structs.replace(WORKING, version=version)) for version in ("v1", "v2"))
    shown = Daemon(first, StatusError("nobody there"), second).show(watch=True)
    assert [[word in text for word in ("v1", "nobody there", "v2")] for text in shown[:3]] == [
        [True, False, False], [False, True, False], [False, False, True],
    ]  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_needs_a_daemon_to_begin_with(as_json: bool) -> None:
    with pytest.raises(StatusError):
        Daemon(StatusError("nobody there")).show(watch=True, as_json=as_json)


@pytest.mark.parametrize("body", [b"<html>", b'{"state":"ready"}', b"[]", b"\xff"])
def test_an_answer_of_something_else_is_no_status(body: bytes) -> None:
    with pytest.raises(StatusError, match="not the one of this version"):
        Daemon(body).show()


def test_a_status_other_than_200_is_told() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(404 if request.url.path == "/-/status" else 500))
    with httpx.Client(transport=transport, base_url="http://relay") as client, pytest.raises(StatusError) as told:
        fetch(client, "http://relay")
    assert str(told.value).startswith("http://relay answered 404 to /-/status")


@contextmanager
def answering(listener: socket.socket) -> Iterator[None]:
    """Answers one request with `WORKING`; gives up where none comes."""
    listener.settimeout(5)

    def answer() -> None:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return
        with connection:
            connection.recv(65536)
            body = msgspec.json.encode(WORKING)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)
            )

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_main_asks_over_tcp_whatever_proxy_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener, answering(listener):
        assert main(f"http://127.0.0.1:{listener.getsockname()[1]}", watch=False, as_json=False) == 0
    assert "relay 0.2.0" in capsys.readouterr().out


def test_main_asks_over_a_unix_socket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "a")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with answering(listener):
            assert main(f"unix:{path}", watch=False, as_json=True) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Status) == WORKING


def test_nobody_there_is_one_line_and_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for watch in (False, True):
        assert main(f"http://127.0.0.1:{port}", watch=watch, as_json=False) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"relay status: no answer from http://127.0.0.1:{port} (")
        assert printed.err.endswith("is relay running, and is this its admin address?\n")
        assert printed.err.count("\n") == 1


def test_watching_pauses_between_looks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", pause)
    monkeypatch.setattr(command, "fetch", lambda *_: b"{}")
    with pytest.raises(KeyboardInterrupt):
        main("http://127.0.0.1:1", watch=True, as_json=True)
    assert pauses == [command.WATCH_S] * 3
    assert capsys.readouterr().out == "{}\n" * 3


# -- several workers


def test_a_daemon_is_the_sum_of_its_workers() -> None:
    def part(in_flight: int, state: str, error: str | None = None, age_s: float = 0.0) -> Status:
        upstream = UpstreamStatus(
            url="http://a:1",
            state=state,
            in_flight=in_flight,
            failures=1,
            last_error=error,
            last_error_age_s=None if error is None else age_s,
        )
        gone = UpstreamStatus(url="http://gone:1", state="healthy", in_flight=5)
        leaving = UpstreamStatus(url="http://a:1", state="draining", in_flight=in_flight)
        pool = PoolStatus(
            name="chat", policy="random", in_flight=in_flight, queued=1, upstreams=(upstream, gone, leaving)
        )
        return Status(version="1", state="ready", uptime_s=0.0, in_flight=in_flight, frames=10, pools=(pool,))

    whole = part(0, "healthy", "probe: timeout", 7.0)
    whole = msgspec.structs.replace(
        whole, pools=(msgspec.structs.replace(whole.pools[0], upstreams=whole.pools[0].upstreams[:1]),)
    )
    status = merged(whole, [part(2, "healthy", "reset", 5.0), part(3, "ejected", "refused", 2.0)])
    assert (status.workers, status.in_flight, status.frames) == (2, 5, 20)
    (pool,) = status.pools
    assert (pool.in_flight, pool.queued) == (5, 2)
    upstream, leaving = pool.upstreams
    assert (upstream.in_flight, upstream.failures) == (5, 2)
    assert (upstream.state, upstream.last_error, upstream.last_error_age_s) == ("ejected", "refused", 2.0)
    assert (leaving.url, leaving.state, leaving.in_flight) == ("http://a:1", "draining", 5)
