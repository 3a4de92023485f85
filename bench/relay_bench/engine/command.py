"""``relay-bench engine``: an engine from the command line."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from typing import TYPE_CHECKING

import trio

from relay_bench.engine.config import EngineConfig
from relay_bench.engine.handover import CONNECTORS, ROLES, connector_named
from relay_bench.engine.server import serve_engine
from relay_bench.groups import leaf

if TYPE_CHECKING:
    from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, one for each field of `EngineConfig`."""
    default = EngineConfig()
    parser.add_argument("--listen", metavar="ADDR", help="HOST:PORT, [::1]:PORT or unix:/path (127.0.0.1:8000)")
    parser.add_argument("--host", default="127.0.0.1", help="with --port, instead of --listen")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", default=default.model, help="the model served (%(default)s)")
    parser.add_argument("--ttft-ms", type=float, default=default.ttft_ms, help="time to the first token (%(default)s)")
    parser.add_argument(
        "--prefill-tokens-per-s",
        type=float,
        default=default.prefill_tokens_per_s,
        metavar="N",
        help="computing the prompt, before that; 0: no time",
    )
    parser.add_argument(
        "--prefix-cache-blocks",
        type=int,
        default=default.prefix_cache_blocks,
        metavar="N",
        help="of 16 tokens; 0: none",
    )
    parser.add_argument(
        "--enable-prompt-tokens-details",
        action="store_true",
        dest="prompt_tokens_details",
        help="cached tokens in usage",
    )
    parser.add_argument("--step-ms", type=float, default=default.step_ms, help="a decode step; 0: as fast as it goes")
    parser.add_argument("--jitter", type=float, default=default.jitter, help="share by which steps vary, 0 to 1")
    parser.add_argument("--max-seqs", type=int, default=default.max_seqs, help="requests decoded at once (%(default)s)")
    parser.add_argument("--max-tokens-default", type=int, default=default.max_tokens_default, metavar="N")
    parser.add_argument(
        "--keep-alive-s", type=float, default=default.keep_alive_s, help="idle connections (%(default)s)"
    )
    parser.add_argument(
        "--connector",
        choices=list(CONNECTORS),
        default=default.connector,
        help="hand-over of split requests (%(default)s)",
    )
    parser.add_argument("--role", choices=ROLES, default=default.role, help="for sglang and p2p_nccl")
    parser.add_argument(
        "--kv-port",
        type=int,
        default=default.kv_port,
        metavar="PORT",
        help="for other engines: bootstrap server (mooncake, sglang), sockets (p2p_nccl)",
    )
    parser.add_argument(
        "--kv-patience-s",
        type=float,
        default=default.kv_patience_s,
        metavar="S",
        help="for another engine (%(default)s)",
    )
    parser.add_argument("--captures", default="", metavar="DIR", help="recordings for x-sim-play")
    parser.add_argument("--usage", default="", help="usage for every request, as x-sim-usage (force, details, …)")
    parser.add_argument("--stamp", action="store_true", help="tokens are their number and the monotonic clock in µs")
    parser.add_argument("--log", action="store_true", help="a line per request begun, and ended, on standard error")


def config_of(options: argparse.Namespace) -> EngineConfig:
    """The settings the flags give; raises `ValueError` with what is wrong."""
    if not 0 <= options.jitter <= 1:
        raise ValueError("--jitter: wanted a number from 0 to 1")
    for name in (
        "ttft_ms",
        "step_ms",
        "keep_alive_s",
        "prefill_tokens_per_s",
        "kv_patience_s",
        "prefix_cache_blocks",
        "kv_port",
    ):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')}: wanted 0 or more")
    for name in ("max_seqs", "max_tokens_default"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: wanted 1 or more")
    connector_named(options.connector, options.role)
    host = f"[{options.host}]" if ":" in options.host else options.host
    fields = set(EngineConfig.__struct_fields__) - {"listen"}
    return EngineConfig(
        listen=options.listen or f"{host}:{options.port}", **{name: getattr(options, name) for name in fields}
    )


def run(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; the exit status."""
    status = 0
    try:
        trio.run(_serve, config_of(options))
    except* (OSError, ValueError) as errors:
        print(f"relay-bench engine: {_told(leaf(errors), options)}", file=sys.stderr)
        status = 2
    return status


def _told(error: BaseException, options: argparse.Namespace) -> str:
    """The error in words; a listener's with its address, and what to do where that is taken."""
    if not isinstance(error, OSError):
        return str(error)
    address = config_of(options).listen
    hint = "; --port 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
    return f"cannot listen on {address}: {error.strerror or error}{hint}"


async def _serve(config: EngineConfig) -> None:
    # the receiver is there before the address is printed: whoever waits for that line may signal at once
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            engine = await nursery.start(serve_engine, config)
            print(f"relay-bench engine: listening on {engine.url}", file=sys.stderr, flush=True)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break


def main(argv: Sequence[str] | None = None) -> int:
    """``relay-bench engine`` by itself."""
    parser = argparse.ArgumentParser(prog="relay-bench engine")
    add_arguments(parser)
    return run(parser.parse_args(argv))
