"""All contenders through all scenarios, in rounds."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from relay_bench.crowd import MeasureError
from relay_bench.peers import scenarios
from relay_bench.peers.scenarios import HOLD, LATENCY_ENGINE, SCENARIOS, Held, Sample
from relay_bench.servers import StartError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from relay_bench.load.options import Plan
    from relay_bench.load.records import Tally
    from relay_bench.peers.running import EngineServer
    from relay_bench.servers import Server

LATENCY: Final = "latency"


class Failure(msgspec.Struct, frozen=True):
    """A measurement that could not be made."""

    name: str
    scenario: str
    round: int
    why: str


class Gathered(msgspec.Struct):
    """All that was measured."""

    samples: list[Sample] = []
    held: list[Held] = []
    tallies: dict[str, dict[int, Tally]] = {}  #: of the schedule of latency, by contender and round
    plan: Plan | None = None  #: of the last one
    failures: list[Failure] = []
    lingering: dict[str, int] = {}  #: by contender: requests still in the engines long after their clients had left


class Campaign:
    """Contenders, engines, and the bound on what others may take of the machine before a sample is taken again."""

    def __init__(
        self, engines: Sequence[EngineServer], proxies: Sequence[Server], *, rounds: int, seed: int, max_foreign: float
    ) -> None:
        self.gathered = Gathered()
        self._engines = engines
        self._proxies = proxies
        self._rounds = rounds
        self._max_foreign = max_foreign
        self._seed = seed
        self._overwhelmed: set[tuple[str, str]] = set()  # contenders, and scenarios with too many streams for them
        self._order = random.Random(f"order {seed}")

    @property
    def steps(self) -> int:
        """How often `run` calls its `on_step`."""
        contenders = len(self._proxies) + 1
        return self._rounds * contenders * (len(SCENARIOS) + 1) + len(self._proxies)

    def run(self, on_step: Callable[[str], None]) -> Gathered:
        """Measures everything; `on_step` is told what comes next."""
        contenders = [self._engines[0], *self._proxies]
        for round_ in range(self._rounds):
            title = f"round {round_ + 1} of {self._rounds}"
            for scenario in SCENARIOS:
                self._tell(scenario.engine)
                for server in self._order.sample(contenders, k=len(contenders)):
                    on_step(f"{title}, {scenario.name}: {server.name}")
                    self._guarded(server, scenario.name, round_, partial(self._sample, server, scenario, round_))
            self._tell(LATENCY_ENGINE)
            for server in self._order.sample(contenders, k=len(contenders)):
                on_step(f"{title}, {LATENCY}: {server.name}")
                self._guarded(server, LATENCY, round_, partial(self._latency, server, round_))
        self._tell(HOLD.engine)
        for server in self._proxies:
            on_step(f"memory: {server.name}")
            self._guarded(server, HOLD.name, 0, partial(self._held, server))
        return self.gathered

    def _tell(self, headers: dict[str, str]) -> None:
        for engine in self._engines:
            engine.tell(**headers)

    def _guarded(self, server: Server, scenario: str, round_: int, work: Callable[[], None]) -> None:
        """Does `work`; what goes wrong with it is kept, and what it leaves behind in the engines."""
        try:
            if server.has_ended:
                raise StartError(f"{server.name} has ended")
            work()
        except (MeasureError, StartError, OSError) as error:
            self.gathered.failures.append(Failure(server.name, scenario, round_, str(error)))
        try:
            left = scenarios.settle(self._engines)
        except OSError as error:  # an engine with so much left to do that it does not answer
            self.gathered.failures.append(Failure(server.name, scenario, round_, f"the engine: {error}"))
            return
        if left:
            lingering = self.gathered.lingering
            lingering[server.name] = max(left, lingering.get(server.name, 0))

    def _sample(self, server: Server, scenario: scenarios.Scenario, round_: int) -> None:
        """A sample; of two, if others disturbed the first, the one less disturbed."""
        taken = self._sample_of_all_or_some(server, scenario, round_)
        if taken.foreign_cores > self._max_foreign:
            scenarios.settle(self._engines)
            again = self._sample_of_all_or_some(server, scenario, round_)
            taken = min(taken, again, key=lambda one: one.foreign_cores)
        self.gathered.samples.append(taken)

    def _sample_of_all_or_some(self, server: Server, scenario: scenarios.Scenario, round_: int) -> Sample:
        """A sample; of a tenth of paced streams where all are too many."""
        key = server.name, scenario.name
        if key not in self._overwhelmed:
            try:
                return scenarios.sample(scenario, server, self._engines, round_)
            except MeasureError:
                if not scenario.step_ms:
                    raise
            self._overwhelmed.add(key)
            scenarios.settle(self._engines)
        taken = scenarios.sample(scenarios.reduced(scenario), server, self._engines, round_)
        return msgspec.structs.replace(taken, is_reduced=True)

    def _held(self, server: Server) -> None:
        self.gathered.held.append(scenarios.held(server))

    def _latency(self, server: Server, round_: int) -> None:
        plan, tally = scenarios.latency(server, f"{self._seed} {round_}")
        self.gathered.plan = plan
        self.gathered.tallies.setdefault(server.name, {})[round_] = tally
