"""The command line of relay: reads flags and file into a `Config`, and hands over to the command.

Exit statuses: 0 done, 1 the command failed, 2 the command line or the configuration is wrong. Imports of what a command
runs are inside it, so that ``relay check`` in a unit's ExecStartPre does not pay for the daemon.
"""

from __future__ import annotations

import argparse
import difflib
import os
import platform
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

import relay
from relay import config as settings
from relay.config import Config, ConfigError, PoolConfig, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_DONE, _WRONG_USAGE = 0, 2

#: The flag that settings come from, by the beginning of their keys, for what is found once flags and file are one.
_FLAG_OF_KEY = {
    "listen.": "listen", "admin.": "admin", "pool[0].upstreams": "upstream", "pool[0].prefill": "prefill",
    "pool[0].decode": "decode",
}  # fmt: skip
#: Of a pool's settings those that `relay check` tells of under their own names, where they are not the defaults.
_SHOWN_OF_POOL = (
    "session_header", "callback_address", "on_missing_kv", "drain_kv", "cached_tokens_from", "force_stream",
    "include_usage", "keepalive_comment_s",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.refuse(unknown)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = run(arguments)
        sys.stdout.flush()  # here, where a reader that has left is no surprise
        return status
    except BrokenPipeError:
        return _leave_closed_pipe()
    except ConfigError as error:
        for problem in error.problems:
            print(_line(problem, error.source, arguments), file=sys.stderr)
        return _WRONG_USAGE
    except KeyboardInterrupt:
        return 130  # as the shell reports a process ended by SIGINT


def _leave_closed_pipe() -> int:
    """Standard output's reader has left, as ``head`` does: nothing more is to be flushed to it. The exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + signal.SIGPIPE  # as the shell reports a process ended by it


def _serve(arguments: argparse.Namespace) -> int:
    _with_ascend_flags(arguments)

    def override(config: Config) -> Config:
        return _with_flags(config, arguments)

    from relay.daemon import process, supervisor

    process.prepare_signals()

    def load() -> Config:
        return settings.load(arguments.config, override)

    if arguments.config is None:
        return supervisor.run(settings.check(override(Config()), source="relay serve"))
    return supervisor.run(load(), load, source=arguments.config)


def _status(arguments: argparse.Namespace) -> int:
    from relay import status

    return status.main(arguments.admin.url, watch=arguments.watch, as_json=arguments.json)


def _check(arguments: argparse.Namespace) -> int:
    from relay.net import tls
    from relay.net.guard import Guard, GuardError

    config = settings.load(arguments.config)
    errors: list[str] = []
    doubts = [*settings.doubts(config)]
    try:
        names = Guard.read(config.auth).unmatched_limits()
        doubts += [Problem(f'auth.limits."{name}"', f"fits no key of {config.auth.keys_file}") for name in names]
    except GuardError as error:
        errors += error.problems
    try:
        tls.read(config)
    except tls.TlsError as error:
        errors += error.problems
    errors = [f"{arguments.config}:{problem}" for problem in errors]
    warnings = [Problem(doubt.key, f"warning: {doubt.message}").line(arguments.config) for doubt in doubts]
    for line in (*errors, *warnings):
        print(line, file=sys.stderr)
    if errors:
        return _WRONG_USAGE
    print(f"{arguments.config}: ok")
    for line in _summary(config):
        print(f"  {line}")
    return _DONE


def _key_new(arguments: argparse.Namespace) -> int:
    from relay import keys

    return keys.main(arguments.name)


def _install_systemd(arguments: argparse.Namespace) -> int:
    from relay import install

    return install.main(arguments.prefix, arguments.force)


def _demo(arguments: argparse.Namespace) -> int:
    from relay import demo

    return demo.run(once=arguments.once)


def _version(_: argparse.Namespace) -> int:
    import importlib.util
    from importlib import metadata

    print(f"relay {relay.__version__}")
    print(f"Python {platform.python_version()} ({platform.python_implementation()})")
    for name in ("trio", "h11", "httpx", "msgspec", "prometheus-client", "rich"):
        print(f"{name} {metadata.version(name)}")
    pump = importlib.util.find_spec("relay.net.pump")
    is_compiled = pump is not None and pump.origin is not None and not pump.origin.endswith(".py")
    print(f"pump {'compiled' if is_compiled else 'interpreted'}")
    return _DONE


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and where to read more."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        self.exit(_WRONG_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Arguments that nobody has taken; here rather than in the parser of all commands, which has none to show."""
        flag = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
        # Without the dashes, which make any two alike.
        names = {known.lstrip("-"): known for known in self._option_string_actions}
        near = difflib.get_close_matches(flag.lstrip("-"), names, n=1, cutoff=0.7)
        hint = f"; perhaps {names[near[0]]} is meant" if near else ""
        if flag in self._option_string_actions:
            hint = f"; flags stand behind {self.prog}"
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="relay", description=relay.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"relay {relay.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        return sub

    serve = command("serve", _serve, "Run the daemon in the foreground. A flag wins over the file.")
    flag = serve.add_argument
    flag("--config", metavar="FILE", help="configuration file (TOML)")
    flag("--listen", metavar="ADDR", action="append", type=_read(settings.Listener),
         help="HOST:PORT, [::1]:PORT or unix:/path; repeatable; port 0 picks one (default 127.0.0.1:8080)")  # fmt: skip
    flag("--admin", metavar="ADDR", type=_read(settings.AddressOrOff), default=argparse.SUPPRESS,
         help="where /metrics and /-/status are, or off (default 127.0.0.1:8081)")  # fmt: skip
    flag("--upstream", metavar="URL", action="append", type=_read(settings.Upstream),
         help="an engine: http(s)://HOST:PORT or unix:/path; repeatable")  # fmt: skip
    flag("--prefill", metavar="URL", action="append", type=_read(settings.Upstream),
         help="an engine that computes prompts, for disaggregated prefill; repeatable")  # fmt: skip
    flag("--decode", metavar="URL", action="append", type=_read(settings.Upstream),
         help="an engine that goes on from there; repeatable")  # fmt: skip
    flag("--connector", metavar="NAME", type=_read(settings.Connector),
         help="how a prefiller hands over to a decoder (default nixl)")  # fmt: skip
    flag("--balance", metavar="NAME", type=_read(settings.Balance),
         help="how an engine is picked (default least_outstanding; the README tells of the others)")  # fmt: skip
    flag("--force-stream", action="store_true",
         help="have engines stream to clients that do not, and answer those with one JSON body")  # fmt: skip
    flag("--include-usage", metavar="WHEN", type=_read(settings.IncludeUsage),
         help="always: ask engines for usage, and hide it from clients that did not (default as-asked)")  # fmt: skip
    flag("--workers", metavar="N", type=_read(settings.Workers),
         help="how many processes carry traffic, or auto: one per core (default auto)")  # fmt: skip
    flag("--log-format", metavar="FORMAT", type=_read(settings.LogFormat), help="json, text or off (default json)")
    flag("--drain-s", metavar="SECONDS", type=_read(settings.Delay),
         help="time for open streams to finish after SIGTERM (default 30)")  # fmt: skip

    ascend = serve.add_argument_group("as the vLLM-Ascend example proxy takes them").add_argument
    ascend("--host", metavar="HOST", help="where to listen, with --port")
    ascend("--port", metavar="N", type=int)
    for name in ("prefiller", "decoder"):
        ascend(f"--{name}-hosts", metavar="HOST", nargs="+")
        ascend(f"--{name}-ports", metavar="N", nargs="+", type=int)

    check = command("check", _check, "Validate a configuration, and print what it would do.")
    check.add_argument("--config", metavar="FILE", required=True, help="configuration file (TOML)")

    status = command("status", _status, "Show what a running daemon is doing.")
    status.add_argument("--admin", metavar="ADDR", type=_read(settings.Listener), default="127.0.0.1:8081",
                        help="its admin side (default %(default)s)")  # fmt: skip
    status.add_argument("--watch", action="store_true", help="go on showing it")
    status.add_argument("--json", action="store_true", help="as GET /-/status answers it")

    demo = command("demo", _demo, "Stream a chat completion from the built-in engine through a relay.")
    demo.add_argument("--once", action="store_true", help="exit after it, instead of leaving both running")

    key = commands.add_parser("key", help="Keys for clients: key new NAME.", allow_abbrev=False)
    keys = key.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    summary = "Print a new key once, and the line of auth.keys_file that lets its holder in."
    new = keys.add_parser("new", help=summary, description=summary, allow_abbrev=False)
    new.add_argument("name", metavar="NAME", help="whose key it is; in records and metrics")
    new.set_defaults(run=_key_new, parser=new)

    install = command("install-systemd", _install_systemd, "Write systemd units for this installation.")
    install.add_argument("--prefix", metavar="DIR", default="/", help="write below this directory (default /)")
    install.add_argument("--force", action="store_true", help="overwrite units that differ")

    command("version", _version, "Print versions: relay, Python, the dependencies, and whether the pump is compiled.")
    return parser


def _read(setting: Any) -> Callable[[str], Any]:
    """A flag's type: reads and refuses what the file's setting does."""

    def read(text: str) -> Any:
        try:
            return settings.read_flag(setting, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _with_flags(config: Config, arguments: argparse.Namespace) -> Config:
    """Put the flags that were given in the place of the file's settings."""
    replace = msgspec.structs.replace
    if arguments.listen is not None:
        config = replace(config, listen=replace(config.listen, addresses=tuple(arguments.listen)))
    if "admin" in arguments:  # None is a value here: off
        config = replace(config, admin=replace(config.admin, address=arguments.admin))
    if arguments.workers is not None:
        config = replace(config, daemon=replace(config.daemon, workers=arguments.workers))
    if arguments.drain_s is not None:
        config = replace(config, daemon=replace(config.daemon, drain_s=arguments.drain_s))
    if arguments.log_format is not None:
        config = replace(config, log=replace(config.log, format=arguments.log_format))
    streaming: dict[str, Any] = {}
    if arguments.force_stream:
        streaming["force_stream"] = True
    if arguments.include_usage is not None:
        streaming["include_usage"] = arguments.include_usage
    if streaming:
        pools = tuple(replace(pool, **dict.fromkeys(streaming)) for pool in config.pools)  # the flag is for all
        config = replace(config, pools=pools, stream=replace(config.stream, **streaming))
    first, *others = config.pools or (PoolConfig(),)
    if arguments.upstream is not None:
        first = replace(first, upstreams=tuple(arguments.upstream))
    for name in ("prefill", "decode"):
        if getattr(arguments, name) is not None:
            first = replace(first, **{name: tuple(getattr(arguments, name))})
    if arguments.balance is not None:
        first = replace(first, balance=arguments.balance)
    if arguments.connector is not None:
        first = replace(first, connector=arguments.connector)
    return replace(config, pools=(first, *others))


def _with_ascend_flags(arguments: argparse.Namespace) -> None:
    """Reads the flags of the vLLM-Ascend example proxy as those of relay's own that mean the same.

    Raises `ConfigError` where a host has no port, they are none, or relay's own stand beside them.
    """

    def read(flag: str, setting: Any, text: str) -> Any:
        try:
            return settings.read_flag(setting, text)
        except ValueError as error:
            raise ConfigError("relay serve", [Problem(flag, str(error))]) from None

    if arguments.host is not None or arguments.port is not None:
        if arguments.listen is not None:
            flag = "--port" if arguments.host is None else "--host"
            raise ConfigError("relay serve", [Problem(flag, "stands beside --listen; allowed: one or the other")])
        address = f"{arguments.host or '127.0.0.1'}:{8000 if arguments.port is None else arguments.port}"
        arguments.listen = [read("--host", settings.Listener, address)]
    for name, role in (("prefiller", "prefill"), ("decoder", "decode")):
        hosts, ports = getattr(arguments, f"{name}_hosts"), getattr(arguments, f"{name}_ports")
        if hosts is None and ports is None:
            continue
        hosts, ports = hosts or ["localhost"] * len(ports or ()), ports or []
        if len(hosts) != len(ports):
            message = f"{len(hosts)} hosts and {len(ports)} ports; allowed: as many of both"
            raise ConfigError("relay serve", [Problem(f"--{name}-ports", message)])
        urls = [f"http://{host}:{port}" for host, port in zip(hosts, ports, strict=True)]
        setattr(arguments, role, [read(f"--{name}-hosts", settings.Upstream, url) for url in urls])


def _line(problem: Problem, source: str, arguments: argparse.Namespace) -> str:
    """The problem under the name of what it comes from: a flag, or the file's key."""
    if arguments.run is not _serve:
        return problem.line(source)
    if problem.key.startswith("--"):
        return f"{source}: {problem.key}: {problem.message}"
    flag = next((flag for key, flag in _FLAG_OF_KEY.items() if problem.key.startswith(key)), None)
    if flag and (arguments.config is None or getattr(arguments, flag, None)):
        return f"relay serve: --{flag}: {problem.message}"
    return problem.line(source)


def _summary(config: Config) -> Iterator[str]:
    """What a relay with this configuration would do, for people."""
    for address in config.listen.addresses:
        yield f"listen on {address.url_in('http' if config.listen.tls is None else 'https')}"
    whence = ", from other machines, too" if config.admin.allow_remote else ""
    yield f"admin on {config.admin.address.url}{whence}" if config.admin.address else "admin off"
    for pool in config.pools:
        split = f"split, {pool.connector}, " if pool.is_split else ""
        yield f"pool {pool.name}: {', '.join(pool.models) or 'every model'}; {split}{pool.balance} over"
        for role in ("serve", "prefill", "decode"):
            for upstream in pool.upstreams_of(role):
                which = f"{role} " if pool.is_split else ""
                name = f", verified as {upstream.server_name}" if upstream.server_name else ""
                ca = f", vouched for by {upstream.ca}" if upstream.ca else ""
                weight = f", weight {upstream.weight}" if upstream.weight != 1 else ""
                most = f", at most {upstream.max_in_flight} in flight" if upstream.max_in_flight else ""
                kv = f", key-value sockets at {upstream.kv_address}" if upstream.kv_address else ""
                asked = upstream.bootstrap or (f"port {upstream.bootstrap_port}" if upstream.bootstrap_port else "")
                bootstrap = f", bootstrap server at {asked}" if asked else ""
                yield f"  {which}{upstream.url}{name}{ca}{weight}{most}{kv}{bootstrap}"
        if pool.max_in_flight:
            yield f"  at most {pool.max_in_flight} in flight"
        if pool.max_queue:
            yield f"  at most {pool.max_queue} waiting"
        for name in _SHOWN_OF_POOL:
            if (value := getattr(pool, name)) != getattr(PoolConfig(), name):
                yield f"  {name} = {_toml(value)}"
    if config.prices:
        yield f"prices for {', '.join(config.prices)}"
    changed = [*_differences(config)]
    yield "differs from the defaults:" if changed else "all else is the default"
    yield from changed


def _differences(config: Config) -> Iterator[str]:
    for table in ("daemon", "stream", "failover", "timeouts", "limits", "health", "auth", "cost", "log"):
        mine, default = getattr(config, table), getattr(Config(), table)
        for name in mine.__struct_fields__:
            value, usual = getattr(mine, name), getattr(default, name)
            if value != usual:
                yield f"  {table}.{name} = {_toml(value)} (default {_toml(usual)})"


def _toml(value: Any) -> str:
    return msgspec.json.encode(value).decode()
