"""The flags of ``relay-bench load`` and its kin, and the plan they make.

Names are ``vllm bench serve``'s where the meaning is; the help says where one is ours.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from relay.core.request import Route
from relay_bench.load import datasets, schedule
from relay_bench.load.datasets import ENDPOINTS, Body, Form
from relay_bench.load.lengths import SYNTAX, parse_lengths
from relay_bench.load.slo import METRICS, Objective, parse_objectives
from relay_bench.load.target import Target
from relay_bench.load.worker import Item, Manner

if TYPE_CHECKING:
    from collections.abc import Sequence

#: vLLM's ``--backend`` names, as routes.
BACKENDS: Final = {
    "openai-chat": Route.CHAT,
    "vllm-chat": Route.CHAT,
    "openai": Route.COMPLETIONS,
    "vllm": Route.COMPLETIONS,
    "openai-responses": Route.RESPONSES,
    "anthropic": Route.MESSAGES,
}
_SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty")
_DEFAULT_PROMPTS: Final = 1000
#: Flags that must not be below 0, and below 1.
_LEAST_0: Final = (
    "num_prompts", "max_concurrency", "num_warmups", "duration", "warmup", "cooldown", "random_prefix_len",
    "timeout_s", "max_lag_ms", "random_range_ratio",
)  # fmt: skip
_LEAST_1: Final = ("processes", "random_num_prefixes")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A run that only needs a server: everything drawn, nothing sent."""

    manner: Manner
    endpoint: str
    model: str
    headers: tuple[tuple[str, str], ...]
    items: tuple[Item, ...]
    request_rate: float
    burstiness: float
    ramp: tuple[str, float, float] | None
    trace: str  #: the file that instants come from, instead of a rate; empty: none
    max_concurrency: int
    duration_s: float
    warmup_s: float
    cooldown_s: float
    num_warmups: int
    processes: int
    objectives: tuple[Objective, ...]
    max_lag_ms: float

    @property
    def load_processes(self) -> int:
        """How many there are: `processes`, but none that would have no request or no place."""
        return min(self.processes, len(self.items), self.max_concurrency or self.processes)

    @property
    def rate_text(self) -> str:
        """The rate for people."""
        if self.manner.is_closed_loop:
            return f"closed loop, {self.max_concurrency} at once"
        if self.trace:
            rate = f"trace {self.trace}"
        elif self.ramp:
            strategy, start, end = self.ramp
            rate = f"{start:g} to {end:g} requests/s ({strategy})"
        elif math.isinf(self.request_rate):
            rate = "all at once"
        else:
            rate = f"{self.request_rate:g} requests/s"
        return f"open loop, {rate}" + (f", at most {self.max_concurrency} at once" if self.max_concurrency else "")


def add_target(parser: argparse.ArgumentParser) -> None:
    """The flags that name one server."""
    parser.add_argument("url", nargs="?", default="", help="http://HOST[:PORT][/PREFIX], https://… or unix:/path")
    parser.add_argument("--base-url", default="", help="the same, as a flag")
    parser.add_argument("--host", default="", help="instead of a URL (127.0.0.1, if --port is given)")
    parser.add_argument("--port", type=int, default=0, help="the same (8000, if --host is given)")


def url_of(options: argparse.Namespace) -> str:
    """The URL the flags of `add_target` name; raises `ValueError` where they name none."""
    if url := options.url or options.base_url:
        return str(url)
    if not (options.host or options.port):
        raise ValueError("give the URL of a server, as http://127.0.0.1:8000, or --host and --port")
    host = f"[{options.host}]" if ":" in options.host else options.host or "127.0.0.1"
    return f"http://{host}:{options.port or 8000}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a run, less its server."""
    asks = parser.add_argument_group("what is asked")
    asks.add_argument("--model", default="", help="default: the first that /v1/models lists")
    asks.add_argument("--route", choices=[route.value for route in ENDPOINTS], default="", help="default: chat")
    asks.add_argument("--backend", choices=list(BACKENDS), default="", help="the route by vLLM's names")
    asks.add_argument("--endpoint", default="", help="another path than the route's own")
    asks.add_argument("--header", action="append", default=[], metavar="NAME: VALUE", help="repeatable")
    asks.add_argument("--api-key", default="", help="sent as a bearer token; default: none")
    asks.add_argument("--dataset-name", choices=("random", "sharegpt", "custom", "bodies"), default="random")
    asks.add_argument("--dataset-path", default="", help="of sharegpt (JSON), custom, bodies (JSON lines)")
    asks.add_argument(
        "--num-prompts", type=int, default=0, help=f"default: {_DEFAULT_PROMPTS}, or what --duration takes"
    )
    asks.add_argument("--random-input-len", default="1024", metavar="LEN", help=f"tokens: {SYNTAX}")
    asks.add_argument("--random-output-len", default="128", metavar="LEN", help="the same")
    asks.add_argument("--random-range-ratio", type=float, default=0.0, help="lengths vary by this share, uniformly")
    asks.add_argument("--random-prefix-len", type=int, default=0, help="tokens every prompt begins with")
    asks.add_argument("--random-num-prefixes", type=int, default=1, help="different ones (ours)")
    asks.add_argument("--turns", default="1", metavar="LEN", help="of a conversation, each with those before (ours)")
    asks.add_argument("--sharegpt-output-len", type=int, default=0)
    asks.add_argument("--custom-output-len", type=int, default=0)
    asks.add_argument("--ignore-eos", action="store_true", help="and count a shorter answer as failed")
    asks.add_argument("--continuous-usage", action="store_true", help="tokens of every frame, for itl (ours)")
    asks.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="fields of every body")
    for name in _SAMPLING:
        asks.add_argument(f"--{name.replace('_', '-')}", type=float, default=None)

    when = parser.add_argument_group("when")
    when.add_argument("--request-rate", type=float, default=math.inf, help="requests a second (inf: all at once)")
    when.add_argument("--burstiness", type=float, default=1.0, help="gamma's shape; 1: Poisson, inf: constant")
    when.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), default="")
    when.add_argument("--ramp-up-start-rps", type=float, default=0.0)
    when.add_argument("--ramp-up-end-rps", type=float, default=0.0)
    when.add_argument("--trace", default="", metavar="FILE", help="seconds, or Mooncake's objects, a line each (ours)")
    when.add_argument("--max-concurrency", type=int, default=0, help="at once; without a rate: closed loop")
    when.add_argument("--duration", type=float, default=0.0, metavar="S", help="of the schedule (ours)")
    when.add_argument("--num-warmups", type=int, default=0, help="requests before the run")
    when.add_argument("--warmup", type=float, default=0.0, metavar="S", help="beginning of the run not counted (ours)")
    when.add_argument("--cooldown", type=float, default=0.0, metavar="S", help="end not counted (ours)")
    when.add_argument("--seed", type=int, default=0)

    how = parser.add_argument_group("how")
    how.add_argument("--processes", type=int, default=1, help="load processes (ours)")
    how.add_argument("--timeout-s", type=float, default=600.0, help="of a whole request (ours)")
    how.add_argument("--no-keep-alive", action="store_true", help="a connection for each request (ours)")
    how.add_argument("--insecure", action="store_true", help="do not verify certificates")
    how.add_argument("--request-id-prefix", default="bench", help="of X-Request-Id; empty: none is sent")
    how.add_argument("--stamps", action="store_true", help="read those of relay-bench engine --stamp (ours)")
    how.add_argument("--max-lag-ms", type=float, default=10.0, help="p99 of send lag or client delay: degraded beyond")
    how.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help=", ".join(METRICS))


def parsed(*words: str) -> argparse.Namespace:
    """The flags of a run and its server, for runs that are the harness's own."""
    parser = argparse.ArgumentParser()
    add_target(parser)
    add_arguments(parser)
    return parser.parse_args(words)


def plan_of(options: argparse.Namespace, *, model: str, is_detailed: bool = False, variant: str = "") -> Plan:
    """The plan the flags make; raises `ValueError` with what is wrong. All that is random comes from ``--seed``.

    Plans that differ in `variant` alone have the same instants and lengths in other words.
    """
    _check(options)
    ramp = (options.ramp_up_strategy, options.ramp_up_start_rps, options.ramp_up_end_rps)
    has_ramp = bool(options.ramp_up_strategy)
    is_closed = bool(options.max_concurrency) and math.isinf(options.request_rate) and not (has_ramp or options.trace)
    # streams of their own, so that another rate meets the same prompts
    arrivals_rng, asks_rng = random.Random(f"arrivals {options.seed}"), random.Random(f"asks {options.seed}")
    trace = _trace(options)
    instants = [entry.at_ns for entry in trace] or _instants(options, is_closed, arrivals_rng)
    route = route_of(options)
    words_rng = random.Random(f"words {options.seed} {variant}")
    bodies = _bodies(options, route, model, len(instants), asks_rng, words_rng, trace)
    items = tuple(
        Item(index, at_ns, body.body, body.output_len)
        for index, (at_ns, body) in enumerate(zip(instants, bodies, strict=True))
    )
    end_s = options.duration or (0.0 if is_closed else instants[-1] / 1e9)
    if options.warmup + options.cooldown and options.warmup + options.cooldown >= end_s:
        raise ValueError(
            f"--warmup, --cooldown: nothing is left of {end_s:g} s (closed loops need --duration for them)"
        )
    return Plan(
        manner=Manner(
            route=route,
            request_id_prefix=options.request_id_prefix,
            is_closed_loop=is_closed,
            timeout_s=options.timeout_s,
            keep_alive=not options.no_keep_alive,
            verify_tls=not options.insecure,
            continuous_usage=options.continuous_usage,
            has_stamps=options.stamps,
            is_exact=options.ignore_eos,
            is_detailed=is_detailed,
        ),
        endpoint=options.endpoint or ENDPOINTS[route],
        model=model,
        headers=headers_of(options),
        items=items,
        request_rate=options.request_rate,
        burstiness=options.burstiness,
        ramp=ramp if has_ramp else None,
        trace=options.trace,
        max_concurrency=options.max_concurrency,
        duration_s=end_s,
        warmup_s=options.warmup,
        cooldown_s=options.cooldown,
        num_warmups=options.num_warmups,
        processes=options.processes,
        objectives=parse_objectives(options.goodput),
        max_lag_ms=options.max_lag_ms,
    )


def route_of(options: argparse.Namespace) -> Route:
    """The route the flags name."""
    if options.backend and not options.route:
        return BACKENDS[options.backend]
    return Route(options.route or "chat")


def headers_of(options: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    """The fields the flags ask for; raises `ValueError`."""
    fields = [("authorization", f"Bearer {options.api_key}")] if options.api_key else []
    for line in options.header:
        name, colon, value = line.partition(":")
        if not colon or not name.strip() or not line.isascii() or not line.isprintable():
            raise ValueError(f"--header {line!r}: wanted NAME: VALUE")
        fields.append((name.strip().lower(), value.strip()))
    return tuple(fields)


def head_of(plan: Plan, target: Target) -> bytes:
    """Request line and fields of every request, but for length and id."""
    fields = {
        "host": target.host,
        "content-type": "application/json",
        "accept": "text/event-stream",
        "user-agent": "relay-bench",
        **dict(plan.headers),
    }
    if not plan.manner.keep_alive:
        fields["connection"] = "close"
    lines = [f"POST {target.path(plan.endpoint)} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "".join(f"{line}\r\n" for line in lines).encode("ascii")


def _check(options: argparse.Namespace) -> None:
    for name in _LEAST_0 + _LEAST_1:
        least = int(name in _LEAST_1)
        if not getattr(options, name) >= least:
            raise ValueError(f"--{name.replace('_', '-')}: wanted {least} or more")
    if not options.burstiness > 0:
        raise ValueError("--burstiness: wanted more than 0")
    if not options.random_range_ratio < 1:
        raise ValueError("--random-range-ratio: wanted less than 1")
    if not isinstance(options.extra_body, dict):
        raise ValueError("--extra-body: wanted a JSON object")
    arrivals = ("--trace", options.trace), ("--ramp-up-strategy", options.ramp_up_strategy)
    chosen = [flag for flag, value in arrivals if value] + ["--request-rate"] * math.isfinite(options.request_rate)
    if len(chosen) > 1:
        raise ValueError(f"{chosen[0]} and {chosen[1]} exclude each other")
    if options.dataset_name != "random" and not options.dataset_path:
        raise ValueError(f"--dataset-name {options.dataset_name} needs --dataset-path")


def _trace(options: argparse.Namespace) -> list[schedule.TraceEntry]:
    if not options.trace:
        return []
    try:
        entries = schedule.read_trace(Path(options.trace).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--trace {options.trace}: {error}") from None
    if options.duration:
        entries = [entry for entry in entries if entry.at_ns <= options.duration * 1e9]
    return entries[: options.num_prompts or None]


def _instants(options: argparse.Namespace, is_closed: bool, rng: random.Random) -> list[int]:
    total = options.num_prompts
    if is_closed:
        return [0] * (total or _DEFAULT_PROMPTS)
    curve = schedule.curve_of(
        rate=options.request_rate,
        strategy=options.ramp_up_strategy,
        start=options.ramp_up_start_rps,
        end=options.ramp_up_end_rps,
    )
    if options.duration:
        within = schedule.number_within(curve, options.duration)
        total = min(total, within) if total else within
    return schedule.arrivals(total or _DEFAULT_PROMPTS, curve, burstiness=options.burstiness, rng=rng)


def _bodies(
    options: argparse.Namespace,
    route: Route,
    model: str,
    total: int,
    rng: random.Random,
    words: random.Random,
    trace: Sequence[schedule.TraceEntry],
) -> list[Body]:
    if options.dataset_name == "bodies":
        return datasets.read_bodies(options.dataset_path, total)
    extra: dict[str, Any] = {name: value for name in _SAMPLING if (value := getattr(options, name)) is not None}
    if "top_k" in extra:
        extra["top_k"] = int(extra["top_k"])
    form = Form(
        route=route,
        model=model,
        continuous_usage=options.continuous_usage,
        ignore_eos=options.ignore_eos,
        extra=extra | options.extra_body,
    )
    if options.dataset_name == "sharegpt":
        output_len = options.sharegpt_output_len or None
        asks = datasets.read_sharegpt(options.dataset_path, total, rng, output_len=output_len)
    elif options.dataset_name == "custom":
        asks = datasets.read_custom(options.dataset_path, total, output_len=options.custom_output_len or None)
    else:
        synthetic = datasets.Synthetic(
            input_len=parse_lengths(options.random_input_len).spread(options.random_range_ratio),
            output_len=parse_lengths(options.random_output_len).spread(options.random_range_ratio),
            prefix_len=options.random_prefix_len,
            num_prefixes=options.random_num_prefixes,
            turns=parse_lengths(options.turns),
        )
        asks = synthetic.asks(total, rng, words, trace)
    return [form.body(ask) for ask in asks]
