"""Everything at once, for long: mixed clients, engines that fail in every way. Nothing grows, all accounts agree."""

from __future__ import annotations

import itertools
import random
import secrets
import time
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from relay.core.auth import keys_line
from relay_bench.drill import vitals
from relay_bench.drill.accounts import Accounts
from relay_bench.drill.attempts import KILLED, UNENDED, Entry, Kind, Logs, Work
from relay_bench.drill.mixed import Asked, Mix, Seen, Visitor, draw
from relay_bench.drill.report import Report
from relay_bench.drill.rest import judge_rest
from relay_bench.drill.rogue import Rogue
from relay_bench.drill.stage import EngineChild, RelayChild, Scene, Stage, pace, stage
from relay_bench.engine.ledger import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

#: Pools, each named as its model; the last has prefillers and decoders.
_POOLS: Final = ("plain", "forced", "split")
#: Seconds within which the relay's metrics have taken in what has ended.
_BEAT_S: Final = 1.5
#: Looks at the relay, at least.
_MIN_LOOKS: Final = 12


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How large, and how long."""

    minutes: float = 60.0
    engines: int = 2  #: of each kind
    workers: int = 2
    clients: int = 48
    places: int = 12  #: in the plain pool; others wait in its queue
    tokens: range = range(2, 40)
    pause_s: float = 0.8  #: longest rest of a client between two requests
    ttft_ms: float = 30.0
    step_ms: float = 10.0
    kill_every_s: float = 15.0
    down_s: float = 1.0
    look_every_s: float = 1.0
    #: By which share memory and descriptors may grow, by mean and by line. Little of a short run is past its beginning.
    growth: float = 0.02
    short_growth: float = 0.1
    short_minutes: float = 30.0
    seed: int = 0


FULL = Plan()
QUICK = Plan(minutes=0.1, clients=32, pause_s=0.2, kill_every_s=1.5, down_s=0.2, look_every_s=0.3)


class Engines:
    """The engines of a soak, by pool and role; those that died stay known by their logs."""

    def __init__(self, here: Stage, flags: tuple[str, ...]) -> None:
        self._here = here
        self._flags = flags
        self.groups: dict[str, list[EngineChild]] = {}
        self.all: list[EngineChild] = []
        #: Of engines, by URL: from when to when they were, times of day.
        self.downs: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)

    def __repr__(self) -> str:
        return f"<Engines {len(self.all)} engines so far, {self.kills} killed>"

    @property
    def kills(self) -> int:
        """How many engines have been killed."""
        return sum(map(len, self.downs.values()))

    async def start(self, number: int) -> None:
        """Starts so many of each kind."""
        for name in ("plain", "forced", "prefill", "decode"):
            self.groups[name] = await self._here.engines(number, *self._flags_of(name))
            self.all += self.groups[name]

    @property
    def alive(self) -> list[EngineChild]:
        """Those that run."""
        return [engine for group in self.groups.values() for engine in group]

    async def kill_in_turn(self, every_s: float, down_s: float, end: trio.Event) -> None:
        """One after the other dies and returns, until the end."""
        turns = itertools.cycle([(name, at) for name, group in self.groups.items() for at in range(len(group))])
        for name, at in turns:
            with trio.move_on_after(every_s):
                await end.wait()
                return
            before = self.groups[name][at]
            died = time.time()
            await before.kill()
            await trio.sleep(down_s)
            again = self.groups[name][at] = await self._here.engine_again(before, *self._flags_of(name))
            self.downs[before.url].append((died, time.time()))
            self.all.append(again)

    def logs(self, rogue: Rogue) -> Logs:
        """What all have logged. They must have ended."""
        of: dict[Kind, defaultdict[str, list[Work]]] = {kind: defaultdict(list) for kind in Kind}
        of[Kind.ROGUE] = rogue.log
        urls = {name: [engine.url for engine in group] for name, group in self.groups.items()}
        for engine in self.all:
            kind = Kind.PREFILLER if engine.url in urls["prefill"] else Kind.ENGINE
            for id_, work in worked(engine.url, engine.log(), was_killed=engine.was_killed):
                of[kind][id_].append(work)
        pools = {
            "plain": [*urls["plain"], rogue.url],
            "forced": urls["forced"],
            "split": [*urls["prefill"], *urls["decode"]],
        }
        return Logs(of=of, pools=pools, downs=self.downs, rogue=rogue.url)

    def _flags_of(self, name: str) -> tuple[str, ...]:
        model = "split" if name in ("prefill", "decode") else name
        return (*self._flags, "--model", model, "--log")


def worked(url: str, lines: Iterable[tuple[str, str, int]], *, was_killed: bool) -> Iterator[tuple[str, Work]]:
    """The requests of one engine's log, with their ids, in the order in which they began."""
    begun: list[tuple[str, list[Work]]] = []
    running: defaultdict[str, deque[list[Work]]] = defaultdict(deque)
    for id_, state, tokens in lines:
        if state == State.QUEUED.value:
            begun.append((id_, []))
            running[id_].append(begun[-1][1])
        elif running[id_]:
            running[id_].popleft().append(Work(url, state, tokens))
        else:  # an end without a beginning: one too many, as it should be found
            begun.append((id_, [Work(url, state, tokens)]))
    for id_, ended in begun:
        yield id_, ended[0] if ended else Work(url, KILLED if was_killed else UNENDED)


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("soak")
    secrets_of = {name: secrets.token_urlsafe(12) for name in ("alice", "bob")}
    mix = Mix(models=_POOLS, tokens=plan.tokens, keys=tuple(secrets_of.values()))
    visits: dict[str, tuple[Asked, Seen]] = {}
    looks: list[vitals.Vitals] = []
    rogue = Rogue(plan.seed)
    async with stage(scene) as here, trio.open_nursery() as nursery:
        await nursery.start(rogue.serve)
        engines = Engines(here, pace(plan.ttft_ms, plan.step_ms))
        await engines.start(plan.engines)
        relay = await _relay(here, plan, engines, rogue, secrets_of)
        idle = vitals.look(relay.process.pid)
        descriptors = await relay.descriptors_at_rest()
        await _load(relay, plan, mix, engines, visits, looks)
        await judge_rest(report, relay, engines.alive, descriptors, scene.settle_s)
        await trio.sleep(_BEAT_S)
        samples = await relay.metrics()
        await relay.stop()
        for engine in engines.alive:
            await engine.stop()
        nursery.cancel_scope.cancel()
        status, faults = relay.process.returncode, relay.faults
        logs = engines.logs(rogue)
        accounts = Accounts(visits, logs)
        for entry in relay.records_as(Entry):
            accounts.take(entry)
    report.judge("the relay has met no fault of its own, and ends in order", status == 0 and not faults, faults)
    more = {
        "engines killed": engines.kills,
        "attempts": accounts.attempts.sums["attempts"],
        **{f"requests in the log of {kind.value}": sum(map(len, logs.of[kind].values())) for kind in Kind},
        "failovers": accounts.sums["failovers"],
        "attempts that met an engine while it was down": accounts.attempts.sums["unmet"],
        "legs logged again, lost with a kept connection before": accounts.attempts.sums["again"],
        "answers whose end a killed engine had not logged": accounts.sums["unlogged"],
        "prefills whose end a killed engine had not logged": accounts.attempts.sums["unlogged prefills"],
        "cut answers whose tokens a killed engine had not logged": accounts.sums["uncounted"],
    }
    _add_figures(report, plan, visits, accounts, more)
    accounts.judge(report, samples, is_long=plan.minutes >= plan.short_minutes)
    _judge_vitals(report, plan, idle, looks)
    return report


async def _relay(here: Stage, plan: Plan, engines: Engines, rogue: Rogue, keys: Mapping[str, str]) -> RelayChild:
    keys_file = here.folder / "keys"
    keys_file.write_text("".join(f"{keys_line(name, secret.encode())}\n" for name, secret in keys.items()))
    urls = {name: [engine.url for engine in group] for name, group in engines.groups.items()}
    settings = {
        "listen.addresses": '["127.0.0.1:0"]',
        "admin.address": f'"unix:{here.folder}/admin"',
        "daemon.workers": str(plan.workers),
        "auth.keys_file": f'"{keys_file}"',
        "health.interval_s": "0.5",
        "timeouts.first_token_s": "2.0",
        "timeouts.prefill_s": "2.0",
        "timeouts.between_tokens_s": "1.0",
        "pool.name": '"plain"',
        "pool.models": '["plain"]',
        "pool.upstreams": str([*urls["plain"], rogue.url]),
        "pool.max_in_flight": str(plan.places),
        "pool.max_queue": str(plan.clients),
    }
    forced = {"name": '"forced"', "models": '["forced"]', "upstreams": str(urls["forced"]), "force_stream": "true"}
    split = {"name": '"split"', "models": '["split"]', "prefill": str(urls["prefill"]), "decode": str(urls["decode"])}
    return await here.relay_of({**settings, **here.scene.settings}, (forced, split))


async def _load(
    relay: RelayChild,
    plan: Plan,
    mix: Mix,
    engines: Engines,
    visits: dict[str, tuple[Asked, Seen]],
    looks: list[vitals.Vitals],
) -> None:
    """All clients, deaths of engines, and looks at the relay, for the plan's time."""
    end = trio.Event()
    numbers = itertools.count()
    seconds = plan.minutes * 60
    look_every_s = min(plan.look_every_s, seconds / _MIN_LOOKS)
    async with trio.open_nursery() as nursery:
        for number in range(plan.clients):
            rng = random.Random(f"{plan.seed} {number}")
            nursery.start_soon(_visit_again, Visitor(relay.address, mix), rng, mix, plan.pause_s, numbers, visits, end)
        nursery.start_soon(engines.kill_in_turn, plan.kill_every_s, plan.down_s, end)
        async with trio.open_nursery() as watching:
            watching.start_soon(vitals.watch, relay.process.pid, look_every_s, looks)
            await _show_progress(seconds, visits, looks, engines)
            watching.cancel_scope.cancel()
        end.set()


async def _visit_again(
    visitor: Visitor,
    rng: random.Random,
    mix: Mix,
    pause_s: float,
    numbers: Iterable[int],
    visits: dict[str, tuple[Asked, Seen]],
    end: trio.Event,
) -> None:
    """One client's requests, until the end."""
    for number in numbers:
        asked = draw(rng, mix, number)
        visits[asked.id] = asked, await visitor.visit(asked)
        with trio.move_on_after(rng.random() * pause_s):
            await end.wait()
        if end.is_set():
            break
    visitor.close()


async def _show_progress(
    seconds: float, visits: Mapping[str, object], looks: list[vitals.Vitals], engines: Engines
) -> None:
    """Waits for the end, and shows how far it is where somebody looks on."""
    console = Console(stderr=True)
    columns = BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=seconds)
        while (elapsed_s := time.monotonic() - began) < seconds:
            pss = f"{looks[-1].pss / 1024:,.1f} MiB" if looks else ""
            text = f"{len(visits):,} requests, {engines.kills} engines killed, {pss}"
            progress.update(task, completed=elapsed_s, description=text)
            await trio.sleep(min(0.5, seconds - elapsed_s))


def _add_figures(
    report: Report,
    plan: Plan,
    visits: Mapping[str, tuple[Asked, Seen]],
    accounts: Accounts,
    more: Mapping[str, int],
) -> None:
    asked = [asked for asked, _ in visits.values()]
    report.add("requests", f"{len(asked):,} in {plan.minutes:g} min, {plan.clients} clients, {plan.workers} workers")
    for name, number in (
        ("streams", sum(one.is_stream for one in asked)),
        ("faults asked for", sum(bool(one.fault) for one in asked)),
        ("hung up on", sum(one.hang_up is not None for one in asked)),
        ("read slowly", sum(one.is_slow for one in asked)),
        *more.items(),
    ):
        report.add(name, number)
    outcomes: Counter[str] = Counter()
    for (_, _, outcome), number in accounts.ended.items():
        outcomes[outcome] += number
    report.add("records' outcomes", ", ".join(f"{outcome} {count:,}" for outcome, count in outcomes.most_common()))


def _judge_vitals(report: Report, plan: Plan, idle: vitals.Vitals, looks: list[vitals.Vitals]) -> None:
    for name in ("memory", "pss"):
        tenths = [getattr(looks[at * len(looks) // 10], name) / 1024 for at in range(10)]
        report.add(f"{name} at each tenth", f"{' '.join(f'{one:.1f}' for one in tenths)} MiB")
    share = plan.growth if plan.minutes >= plan.short_minutes else plan.short_growth
    for kind, unit in vitals.KINDS.items():
        trend = vitals.trend(looks, kind)
        report.add(f"{kind} at rest, in the middle and the last third",
                   f"{getattr(idle, kind):,.0f}, {trend.middle:,.0f}, {trend.last:,.0f} {unit}")  # fmt: skip
        report.judge(
            f"{kind}: no more than {share:.0%} of growth over the last two thirds, by mean and by line",
            trend.is_flat(share),
            f"{trend.last / trend.middle - 1:+.1%}, {trend.growth / trend.middle:+.1%} "
            f"({trend.per_minute:+,.1f} {unit}/min)",
        )
