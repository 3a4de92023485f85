"""``relay status``: what a running daemon is doing, for people; asked of its admin side.

`render` makes the picture of a `Status` and fits it to the terminal it is printed on; the rest fetches and repeats.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Generic, Literal, NamedTuple, TypeVar

import httpx
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from relay.core.status import KeyStatus, PoolStatus, Status, UpstreamStatus

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType, RenderResult

#: How long the daemon may take to answer; it answers within milliseconds.
ANSWER_S: Final = 5.0
#: Between two looks of ``--watch``.
WATCH_S: Final = 1.0

#: Keys in the table; all are in ``--json``.
MOST_KEYS_SHOWN: Final = 20
#: Characters a line needs for every column of the tables.
WIDE: Final = 99
_INDENT: Final = (0, 0, 0, 2)

_STYLE_OF_STATE: Final = {
    "ready": "green", "healthy": "green", "draining": "yellow", "half-open": "yellow", "ejected": "red",
    "unhealthy": "red",
}  # fmt: skip

_DONE, _UNREACHABLE = 0, 1

_T = TypeVar("_T")


class StatusError(Exception):
    """The daemon's status could not be had; the message says why, and what may help."""


def main(admin_url: str, watch: bool, as_json: bool) -> int:
    """Print the status of the daemon whose admin side is `admin_url` (``http://…`` or ``unix:/path``).

    `watch`: again and again, until Ctrl-C; `as_json`: as the daemon sent it. Answers the exit status: 1 if the daemon
    cannot be reached or does not answer with its status.
    """
    transport, base_url = None, admin_url
    if admin_url.startswith("unix:"):
        transport, base_url = httpx.HTTPTransport(uds=admin_url.removeprefix("unix:")), "http://relay"
    # Not by way of a proxy: what stands in the environment is meant for the internet, not for an admin side.
    with httpx.Client(transport=transport, base_url=base_url, timeout=ANSWER_S, trust_env=False) as client:
        try:
            show(
                lambda: fetch(client, admin_url),
                Console(highlight=False),
                watch=watch,
                as_json=as_json,
                pause=lambda: time.sleep(WATCH_S),
            )
        except StatusError as error:
            print(f"relay status: {error}", file=sys.stderr)
            return _UNREACHABLE
    return _DONE


def fetch(client: httpx.Client, admin_url: str) -> bytes:
    """The daemon's status as JSON. Raises `StatusError`; `admin_url` is what that calls the daemon by."""
    try:
        answer = client.get("/-/status")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = str(error) or type(error).__name__
        message = f"no answer from {admin_url} ({why}); is relay running, and is this its admin address?"
        raise StatusError(message) from None
    if answer.status_code != httpx.codes.OK:
        raise StatusError(f"{admin_url} answered {answer.status_code} to /-/status; is it relay's admin address?")
    return answer.content


def show(
    fetch: Callable[[], bytes], console: Console, *, watch: bool, as_json: bool, pause: Callable[[], object]
) -> None:
    """Prints one status; with `watch` another after each `pause`, until that raises, on a terminal in its place.

    Raises `StatusError` for the first one, and as JSON for any. Later ones that cannot be had are told of in the
    picture's place: a daemon that is watched may well be restarted.
    """
    if as_json:
        _print_json(console, fetch())
        while watch:
            pause()
            _print_json(console, fetch())
        return
    picture = render(_decode(fetch()))
    if not watch:
        _print(console, picture)
        return
    if not console.is_terminal:
        for each in itertools.chain([picture], _pictures(fetch, pause)):
            _print(console, each)
        return
    with Live(picture, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for later in _pictures(fetch, pause):
            live.update(later, refresh=True)


def _pictures(fetch: Callable[[], bytes], pause: Callable[[], object]) -> Iterator[RenderableType]:
    """What is to be seen after each `pause`."""
    while True:
        pause()
        try:
            yield render(_decode(fetch()))
        except StatusError as error:
            yield Text(str(error), style="red")


def _print(console: Console, picture: RenderableType) -> None:
    """Prints by itself: rich would exit with 1 where the reader has left, which is no failure."""
    with console.capture() as printed:
        console.print(picture)
    console.file.write(printed.get())
    console.file.flush()


def _print_json(console: Console, body: bytes) -> None:
    console.file.write(body.decode().rstrip("\n") + "\n")
    console.file.flush()


def _decode(body: bytes) -> Status:
    try:
        return msgspec.json.decode(body, type=Status)
    except msgspec.DecodeError as error:
        raise StatusError(f"the answer to /-/status is not the one of this version of relay: {error}") from None


# -- the picture


def render(status: Status) -> RenderableType:
    """The picture of a daemon: a line for it, then each pool with its figures, its upstreams and their last errors."""
    parts: list[RenderableType] = [_headline(status)]
    for pool in status.pools:
        errors = [
            Text(f"{_printable(upstream.url)}: {_printable(upstream.last_error)}, {_ago(upstream.last_error_age_s)}")
            for upstream in pool.upstreams
            if upstream.last_error
        ]
        errors += [Text(f"{_printable(url)}: {_printable(error)}") for url, error in pool.unresolved.items()]
        parts += ["", _pool_line(pool), Padding(Group(*_figures(pool), _Upstreams(pool), *errors), _INDENT)]
    if status.keys:
        parts += ["", Text("keys", style="bold"), Padding(_Keys(status.keys), _INDENT)]
    return Group(*parts)


def _headline(status: Status) -> Text:
    return _joined(
        [
            Text(f"relay {_printable(status.version)}", style="bold"),
            _state(status.state),
            f"up {_duration(status.uptime_s)}",
            "1 worker" if status.workers == 1 else f"{status.workers} workers",
            f"{status.in_flight:,} in flight",
        ]
    )


def _pool_line(pool: PoolStatus) -> Text:
    models = ", ".join(map(_printable, pool.models)) or "every model"
    return _joined([Text(_printable(pool.name), style="bold"), models, _printable(pool.policy)])


def _figures(pool: PoolStatus) -> list[Text]:
    rates = pool.rates
    return [
        _joined(
            [
                f"{_of(pool.in_flight, pool.max_in_flight)} in flight",
                f"{pool.queued:,} queued",
                f"{_rate(rates.requests_per_s)} requests/s",
                f"{_rate(rates.tokens_per_s)} tokens/s",
            ]
        ),
        _joined(
            [
                f"first token p50 {_ms(rates.ttft_p50_ms)}, p99 {_ms(rates.ttft_p99_ms)}",
                f"between frames p50 {_ms(rates.gap_p50_ms)}, p99 {_ms(rates.gap_p99_ms)}",
            ]
        ),
    ]


class _Upstreams:
    """The table of a pool's upstreams: all columns where they have room, else those that matter first."""

    def __init__(self, pool: PoolStatus) -> None:
        self.upstreams = pool.upstreams

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        columns = [column for column in _COLUMNS if self._has_room_for(column, options.max_width)]
        yield _table(columns, self.upstreams) if self.upstreams else Text("no upstreams", style="yellow")

    def _has_room_for(self, column: _Column[UpstreamStatus], width: int) -> bool:
        if column.title == "role":
            return any(upstream.role != "serve" for upstream in self.upstreams)
        return width >= WIDE or not column.is_extra


class _Keys:
    """The table of keys: the busiest, as there may be one for each employee."""

    def __init__(self, keys: Sequence[KeyStatus]) -> None:
        self.keys = keys

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        columns = [column for column in _KEY_COLUMNS if not column.is_extra or options.max_width >= WIDE]
        yield _table(columns, self.keys[:MOST_KEYS_SHOWN])
        if len(self.keys) > MOST_KEYS_SHOWN:
            yield Text(f"and {len(self.keys) - MOST_KEYS_SHOWN:,} more: --json", style="dim")


def _table(columns: Sequence[_Column[_T]], rows: Iterable[_T]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column.title, justify=column.justify, overflow="fold", no_wrap=column.no_wrap)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table


class _Column(NamedTuple, Generic[_T]):
    """One column of a table."""

    title: str
    cell: Callable[[_T], RenderableType]
    justify: Literal["left", "right"] = "right"
    no_wrap: bool = True
    is_extra: bool = False  #: only where the terminal is wide


_COLUMNS: Final[tuple[_Column[UpstreamStatus], ...]] = (
    _Column("upstream", lambda upstream: Text(_printable(upstream.url)), "left", no_wrap=False),
    _Column("role", lambda upstream: Text(_printable(upstream.role)), "left"),
    _Column("state", lambda upstream: _state(upstream.state), "left"),
    _Column("weight", lambda upstream: f"{upstream.weight:,}", is_extra=True),
    _Column("in flight", lambda upstream: _of(upstream.in_flight, upstream.max_in_flight)),
    _Column("failures", lambda upstream: f"{upstream.failures:,}"),
    _Column("5xx", lambda upstream: f"{upstream.server_errors:,}", is_extra=True),
    _Column("probe", lambda upstream: _ms(upstream.probe_ms), is_extra=True),
    _Column("age", lambda upstream: _duration(upstream.age_s), is_extra=True),
)

_KEY_COLUMNS: Final[tuple[_Column[KeyStatus], ...]] = (
    _Column("key", lambda key: Text(_printable(key.name)), "left", no_wrap=False),
    _Column("in flight", lambda key: f"{key.in_flight:,}"),
    _Column("requests", lambda key: f"{key.requests:,}"),
    _Column("refused", lambda key: f"{key.refusals:,}"),
    _Column("prompt", lambda key: f"{key.prompt_tokens:,}"),
    _Column("cached", lambda key: f"{key.cached_tokens:,}", is_extra=True),
    _Column("completion", lambda key: f"{key.completion_tokens:,}"),
    _Column("cost", lambda key: f"{key.cost:,.2f}", is_extra=True),
)


def _state(state: str) -> Text:
    return Text(_printable(state), style=_STYLE_OF_STATE.get(state, ""))


def _joined(parts: Iterable[str | Text]) -> Text:
    return Text(" · ").join(part if isinstance(part, Text) else Text(part) for part in parts)


def _duration(seconds: float) -> str:
    """The two greatest units: what matters of an uptime."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    units = [(days, "d"), (hour, "h"), (minute, "min"), (second, "s")]
    first = next((at for at, (number, _) in enumerate(units) if number), len(units) - 1)
    return " ".join(f"{number} {unit}" for number, unit in units[first : first + 2])


def _of(count: int, most: int) -> str:
    return f"{count:,}/{most:,}" if most else f"{count:,}"


def _ago(seconds: float | None) -> str:
    return "time unknown" if seconds is None else f"{_duration(seconds)} ago"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.1f}"


def _printable(text: str) -> str:
    """Text of others, an engine's error for one, without what would move a terminal's cursor."""
    return text if text.isprintable() else ascii(text)
