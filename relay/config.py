"""The configuration: what each setting means, its unit, its default and the reason for it.

The structs are what the daemon works with. `load` reads them from a file, and differs from a plain
`msgspec.convert` in one way: it finds every mistake, not only the first, and says what is allowed instead. What a
mistake's line says is the `description` of the setting's type, so a type is described once, here.

A name that `interface.md` promises for later versions is refused, never ignored: whoever writes ``[auth]`` must not
get an open relay.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from relay.address import Address, UpstreamConfig, parse_address, parse_address_or_off, parse_upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

_YEAR_S = 31_536_000.0

Limit = Annotated[float, Meta(ge=0, le=_YEAR_S, description="seconds, 0 or more (0: no limit)")]
Delay = Annotated[float, Meta(ge=0, le=_YEAR_S, description="seconds, 0 or more (0: none at all)")]
Budget = Annotated[float, Meta(gt=0, le=_YEAR_S, description="seconds, more than 0")]
Size = Annotated[int, Meta(ge=1, description="a whole number of bytes, at least 1")]
Count = Annotated[int, Meta(ge=1, description="a whole number, at least 1")]
Status = Annotated[int, Meta(ge=400, le=599, description="an HTTP error status, 400 to 599")]
Name = Annotated[str, Meta(pattern=r"^\S+\Z", description="text without spaces")]
AddressOrOff = Annotated[Address | None, Meta(description='HOST:PORT, [::1]:PORT, unix:/path or "off"')]
Listener = Annotated[Address, Meta(description="HOST:PORT, [::1]:PORT or unix:/path")]
Listeners = Annotated[tuple[Listener, ...], Meta(min_length=1, description="a list of at least one address")]
Upstream = Annotated[UpstreamConfig, Meta(description="http://HOST:PORT or unix:/path, as text or { url = … }")]
Balance = Annotated[
    Literal["least_outstanding", "round_robin"],
    Meta(description='"least_outstanding" or "round_robin" (in this version)'),
]
Workers = Annotated[Literal["auto", 1], Meta(description='"auto" or 1 (this version runs one worker)')]
LogFormat = Annotated[Literal["json", "text", "off"], Meta(description='"json", "text" or "off"')]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One table of the file."""


_T = TypeVar("_T", bound=_Table)


class ListenConfig(_Table, frozen=True):
    """Where clients connect."""

    #: Loopback: whoever opens an engine to a network should say so. Ignored where systemd passes sockets.
    addresses: Listeners = (Address("127.0.0.1", 8080),)


class AdminConfig(_Table, frozen=True):
    """Where operators and Prometheus connect."""

    #: Apart from the public listener, so that no client ever reaches it; None (in the file "off"): no admin side.
    address: AddressOrOff = Address("127.0.0.1", 8081)


class DaemonConfig(_Table, frozen=True):
    """The life of the process."""

    #: Processes that carry traffic; this version runs one, and "auto" will mean one per core.
    workers: Workers = "auto"
    #: Seconds for open streams after SIGTERM; below systemd's stop limit of 90 s, 0 cuts them at once.
    drain_s: Delay = 30.0
    #: Seconds that readiness says 503 before accepting stops; 0, as only a load balancer that polls it needs more.
    ready_delay_s: Delay = 0.0


class PoolConfig(_Table, frozen=True):
    """Engines that serve the same models."""

    #: The pool's name in records and metrics.
    name: Name = "default"
    #: Models served here, `*` matches any text; empty: every model.
    models: tuple[Name, ...] = ()
    #: The engines; none is an error unless flags give some.
    upstreams: tuple[Upstream, ...] = ()
    #: Streams differ in length by orders of magnitude, so counting what is open beats taking turns.
    balance: Balance = "least_outstanding"


class StreamConfig(_Table, frozen=True):
    """What happens to event streams."""

    #: Bytes held while waiting for a frame's end; beyond it the frame goes on unaligned. Far above any token's frame.
    max_frame_bytes: Size = 1_048_576


class FailoverConfig(_Table, frozen=True):
    """Trying another engine; before the first byte of an answer has gone out, never after."""

    #: Engines tried for one request, the first included: two may fail at once in a rolling restart. 1: no failover.
    attempts: Count = 3
    #: Seconds after which no further attempt is begun: a client's patience, not an engine's.
    budget_s: Budget = 30.0
    #: Statuses that count as the engine's failure: a gateway's. 500 is not one, as it may be the request's own fault.
    statuses: tuple[Status, ...] = (502, 503, 504)


class TimeoutsConfig(_Table, frozen=True):
    """One limit for each wait."""

    #: Seconds for a request's head, from its first byte: a head is one packet; nginx takes 60, HAProxy's guide 10.
    client_head_s: Limit = 10.0
    #: Seconds for a request's whole body: a large one with images over a slow line.
    client_body_s: Limit = 60.0
    #: Seconds a client's connection may idle between requests: nginx's keepalive_timeout.
    client_idle_s: Limit = 75.0
    #: Seconds a client may take no byte while some wait for it; memory is held meanwhile.
    client_stall_s: Limit = 30.0
    #: Seconds a request may wait for a place at an engine: as long as people wait for a first word.
    queue_s: Limit = 60.0
    #: Seconds to reach an engine: one lost SYN is sent again after 1 s, a second after 3 s.
    connect_s: Limit = 3.0
    #: Seconds from the request sent to the first frame: a long prompt behind a long queue; openai's SDK waits 600.
    first_token_s: Limit = 600.0
    #: Seconds between two reads of a stream: preemption and recomputation of a long context pause for tens of seconds.
    between_tokens_s: Limit = 120.0
    #: Seconds for a whole exchange: none, as length is the request's own business (`max_tokens`).
    total_s: Limit = 0.0
    #: Seconds an unused connection to an engine is kept: below the 5 s after which uvicorn closes it.
    upstream_idle_s: Limit = 4.0


class LimitsConfig(_Table, frozen=True):
    """What one client, and all together, may hold."""

    #: Bytes of a request's head: nginx takes 8 KiB a line, gateways add long tokens and cookies.
    max_head_bytes: Size = 65_536
    #: Bytes of a request's body: a long context is about 1 MB, images come as base64.
    max_body_bytes: Size = 67_108_864
    #: Client connections of a worker; each takes two descriptors while it streams.
    max_connections: Count = 20_000
    #: Bytes of request bodies held at once; beyond it bodies wait unread, then get 503.
    max_buffered_bytes: Size = 1_073_741_824


class LogConfig(_Table, frozen=True):
    """The records of exchanges, on standard output."""

    #: One JSON object a line, for the journal and jq; "text" for people, "off" for neither.
    format: LogFormat = "json"


class Config(_Table, frozen=True):
    """A whole configuration; `Config()` is what an empty file means."""

    listen: ListenConfig = ListenConfig()
    admin: AdminConfig = AdminConfig()
    daemon: DaemonConfig = DaemonConfig()
    pools: tuple[PoolConfig, ...] = msgspec.field(name="pool", default=())
    stream: StreamConfig = StreamConfig()
    failover: FailoverConfig = FailoverConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()


#: Names of the interface that later versions take, indices left out.
_NOT_YET_SUPPORTED = frozenset({
    "auth", "cost", "health", "prices", "listen.tls", "timeouts.prefill_s",
    "stream.force_stream", "stream.include_usage", "stream.keepalive_comment_s",
    "pool.max_in_flight", "pool.max_queue", "pool.session_header", "pool.force_stream", "pool.include_usage",
    "pool.keepalive_comment_s", "pool.prefill", "pool.decode", "pool.on_missing_kv", "pool.drain_kv",
    "pool.callback_address", "pool.connector",
    "pool.upstreams.weight", "pool.upstreams.max_in_flight", "pool.upstreams.ca", "pool.upstreams.server_name",
})  # fmt: skip


class Problem(NamedTuple):
    """One mistake: the setting's key (``pool[0].upstreams[1]``; a line number in what is not TOML), and a sentence."""

    key: str
    message: str

    def line(self, source: str) -> str:
        """The problem as a person reads it: where it is, what is wrong, what is allowed."""
        return ":".join(filter(None, (source, self.key))) + ": " + self.message


class ConfigError(Exception):
    """A configuration cannot be used; `problems` has every reason."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        super().__init__("\n".join(problem.line(source) for problem in problems))
        self.source = source
        self.problems = tuple(problems)


def load(path: str | Path, override: Callable[[Config], Config] = lambda config: config) -> Config:
    """Read a configuration file, let `override` (the flags) change it, and check the whole. Raises `ConfigError`."""
    source = str(path)
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(source, [Problem("", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(source, [Problem("", f"is not UTF-8, as TOML must be: {error.reason}")]) from error
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(source, [Problem(line[1] if line else "", f"is not TOML: {error}")]) from error
    problems: list[Problem] = []
    config = override(_read_table(Config, table, "", problems))
    problems += _conflicts(config, wrong={re.split(r"[.\[]", problem.key)[0] for problem in problems})
    if problems:
        raise ConfigError(source, problems)
    return config


def check(config: Config, source: str) -> Config:
    """Check a configuration that was made without a file. Raises `ConfigError` under the name `source`."""
    if problems := [*_conflicts(config)]:
        raise ConfigError(source, problems)
    return config


def read_flag(setting: Any, text: str) -> Any:
    """Read a value of a setting's type (`Delay`, `Listener`) from a flag's text; a wrong one raises `ValueError`."""
    return _read_value(setting, text, strict=False)


# Settings that are right each for itself and wrong together.


def _conflicts(config: Config, wrong: Collection[str] = ()) -> Iterator[Problem]:
    """Compare settings with each other; tables known to be `wrong` are left out, as they hold defaults by now."""
    if len(config.pools) > 1:
        yield Problem("pool[1]", "is a second pool; allowed: one [[pool]] (in this version)")
    if "pool" not in wrong:
        yield from _useless_pools(config)
    if "listen" not in wrong and "admin" not in wrong:
        yield from _colliding_addresses(config)
        yield from _loops(config)
    if "limits" not in wrong and config.limits.max_buffered_bytes < config.limits.max_body_bytes:
        least = config.limits.max_body_bytes
        yield Problem("limits.max_buffered_bytes", f"has no room for max_body_bytes; allowed: {least} or more")


def _own_addresses(config: Config) -> list[tuple[str, Address]]:
    own = [(f"listen.addresses[{at}]", address) for at, address in enumerate(config.listen.addresses)]
    return own if config.admin.address is None else [*own, ("admin.address", config.admin.address)]


def _colliding_addresses(config: Config) -> Iterator[Problem]:
    for (first, address), (second, other) in itertools.combinations(_own_addresses(config), 2):
        if address.collides_with(other):
            yield Problem(second, f"{other} collides with {address} ({first}); allowed: an address of its own")


def _useless_pools(config: Config) -> Iterator[Problem]:
    if not any(pool.upstreams for pool in config.pools):
        yield Problem(
            "pool[0].upstreams",
            "no upstream to send requests to; give --upstream http://HOST:PORT, or upstreams in a [[pool]]",
        )
    for at, pool in enumerate(config.pools):
        yield from _repeated([upstream.url for upstream in pool.upstreams], f"pool[{at}].upstreams")
        yield from _repeated(pool.models, f"pool[{at}].models")


def _loops(config: Config) -> Iterator[Problem]:
    for at, pool in enumerate(config.pools):
        for index, upstream in enumerate(pool.upstreams):
            for key, address in _own_addresses(config):
                if upstream.is_served_by(address):
                    message = f"{upstream.url} is this relay itself ({key}); allowed: an engine's URL"
                    yield Problem(f"pool[{at}].upstreams[{index}]", message)


def _repeated(items: Sequence[str], key: str) -> Iterator[Problem]:
    for at, item in enumerate(items):
        if item in items[:at]:
            yield Problem(f"{key}[{at}]", f"{_shown(item)} is there twice; allowed: once")


# Reading: a value goes in; a setting comes out, or `_WRONG` after a line was added to `problems`.

_WRONG: Any = object()

_TEXT_READERS: dict[Any, Callable[[str], Any]] = {
    Address: parse_address,
    Address | None: parse_address_or_off,
    UpstreamConfig: parse_upstream,
}


def _read_table(struct: type[_T], table: dict[str, Any], key: str, problems: list[Problem]) -> _T:
    """Read the settings of one table; those that are wrong keep their default."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
    values = {}
    for name, value in table.items():
        path = _joined(key, name)
        if name not in fields:
            problems.append(_unknown(path, name, [*fields]))
        elif (setting := _read(fields[name].type, value, path, problems)) is not _WRONG:
            values[fields[name].name] = setting
    return struct(**values)


def _read(setting: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    plain = _without_meta(setting)
    if get_origin(plain) is tuple:
        return _read_list(setting, value, key, problems)
    if _is_table(plain):
        if isinstance(value, dict):
            return _read_table(plain, value, key, problems)
        problems.append(Problem(key, f"{_shown(value)} is not valid; allowed: a table"))
        return _WRONG
    if plain is UpstreamConfig and isinstance(value, dict):
        return _read_upstream_table(value, key, problems)
    try:
        return _read_value(setting, value)
    except ValueError as error:
        problems.append(Problem(key, str(error)))
        return _WRONG


def _read_value(setting: Any, value: Any, *, strict: bool = True) -> Any:
    """Read one value that holds no others; a wrong one raises `ValueError` with what is allowed."""
    reader = _TEXT_READERS.get(_without_meta(setting))
    try:
        if reader is None:
            return msgspec.convert(value, setting, strict=strict)
        text = msgspec.convert(value, str)
    except msgspec.ValidationError:
        raise ValueError(_not_valid(setting, value)) from None
    try:
        return reader(text)
    except ValueError as error:
        raise ValueError(f"{_shown(text)} {error}") from None


def _read_list(setting: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    item_type = get_args(_without_meta(setting))[0]
    if not isinstance(value, list):
        allowed = f"[[{key}]]" if _is_table(item_type) else "a list, [ … ]"
        problems.append(Problem(key, f"{_shown(value)} is not valid; allowed: {allowed}"))
        return _WRONG
    items = [_read(item_type, item, f"{key}[{at}]", problems) for at, item in enumerate(value)]
    if any(item is _WRONG for item in items):
        return _WRONG
    try:
        return msgspec.convert(tuple(items), setting)
    except msgspec.ValidationError:  # too short: the items are right by now
        problems.append(Problem(key, _not_valid(setting, value)))
        return _WRONG


def _read_upstream_table(table: dict[str, Any], key: str, problems: list[Problem]) -> Any:
    """Read an upstream's long form, which holds no more than the short one yet."""
    problems += [_unknown(_joined(key, name), name, ["url"]) for name in table if name != "url"]
    if "url" not in table:
        problems.append(Problem(key, 'has no url; allowed: { url = "http://HOST:PORT" }'))
        return _WRONG
    try:
        return _read_value(Upstream, table["url"])
    except ValueError as error:
        problems.append(Problem(f"{key}.url", str(error)))
        return _WRONG


def _unknown(path: str, name: str, known: list[str]) -> Problem:
    if re.sub(r"\[\d+\]", "", path) in _NOT_YET_SUPPORTED:
        return Problem(path, "is not supported by this version; take it out")
    meant = difflib.get_close_matches(name, known, n=1)
    hint = f"; perhaps {meant[0]} is meant" if meant else ""
    return Problem(path, f"is not a known name{hint}; allowed: {', '.join(known)}")


def _without_meta(setting: Any) -> Any:
    return get_args(setting)[0] if get_origin(setting) is Annotated else setting


def _is_table(setting: Any) -> bool:
    return isinstance(setting, type) and issubclass(setting, _Table)


def _joined(key: str, name: str) -> str:
    name = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    return f"{key}.{name}" if key else name


def _not_valid(setting: Any, value: Any) -> str:
    return f"{_shown(value)} is not valid; allowed: {get_args(setting)[1].description}"


def _shown(value: Any) -> str:
    """The value as the file has it, short, on one line, and without a URL's password."""
    text = re.sub(r"//[^/@]*@", "//…@", json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 80 else text[:79] + "…"
