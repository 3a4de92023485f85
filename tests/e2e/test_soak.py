"""The soak, in small: kept by this relay, and broken by one that miscounts or leaks."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
import trio

from relay.core.request import Route
from relay_bench.drill import soak
from relay_bench.drill.accounts import Accounts, Entry, Work
from relay_bench.drill.command import main
from relay_bench.drill.mixed import Asked, Seen
from relay_bench.drill.report import Report
from relay_bench.drill.stage import Scene
from relay_bench.drill.vitals import Vitals, trend
from tests.e2e.test_drills import sabotaged


def test_a_soak_leaves_nothing_unaccounted(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Memory is left to longer ones: of seconds, its beginning is the most."""
    status = main(["soak", "--minutes", "0.08", "--quick", "--json"])
    report = msgspec.json.decode(capsysbinary.readouterr().out, type=Report)
    assert [text for text in report.broken if not text.startswith(("memory", "descriptors"))] == []
    assert status == bool(report.broken)
    assert len(report.promises) == 21


def test_a_soak_of_a_relay_that_miscounts() -> None:
    command = sabotaged(
        "from relay.net.tally import Tally",
        "Tally.failed_over = lambda self: None",
        "from relay.net.exchange import Exchange",
        "Exchange.bytes_out = property(lambda self: self.reply.bytes_out)",
    )
    plan = msgspec.structs.replace(soak.QUICK, minutes=0.04, engines=1, workers=1)
    broken = trio.run(soak.drill, Scene(command=command), plan).broken
    assert {"metrics and records agree on failovers", "every byte of every answer is counted"} <= set(broken)


@pytest.mark.parametrize(
    ("log", "died_s", "unlogged", "is_kept"),
    [
        (["completed"], None, 0, True),
        ([], None, 0, False),
        ([], 0.1, 1, True),  # behind the answer, and before its line
        ([], 5.0, 0, False),
        (["aborted"], 0.1, 0, False),  # not excused: it knew of this one
    ],
)
def test_answers_of_engines_that_were_killed(
    log: list[str], died_s: float | None, unlogged: int, is_kept: bool
) -> None:
    """A record, and what its engine's log says."""
    ended = datetime(2026, 1, 1, tzinfo=UTC)
    asked = Asked(id="a", route=Route.CHAT, model="plain", tokens=3, key="k", is_stream=True)
    seen = Seen(is_sent=True, has_left=False, status=200, received=10, tokens=3, is_whole=True)
    entry = Entry(
        ts=ended, id="a", outcome="--", status=200, pool="plain", upstream="http://e", stream=True, attempts=1,
        frames=5, bytes_out=10, completion_tokens=3, usage="engine",
    )  # fmt: skip
    deaths = {"http://e": [] if died_s is None else [ended.timestamp() + died_s]}
    accounts = Accounts({"a": (asked, seen)}, {"a": [Work(state, 3) for state in log]}, "http://rogue", deaths)
    accounts.take(entry)
    report = Report("soak")
    accounts.judge(report, {})
    broken = {text for text in report.broken if text.startswith("what the records say")}
    assert (accounts.sums["unlogged"], not broken) == (unlogged, is_kept)


@pytest.mark.parametrize(
    ("values", "is_flat"),
    [
        ([100] * 30, True),
        ([50] * 10 + [100] * 20, True),  # the first third is for getting there
        ([100] * 10 + [100, 101] * 10, True),
        ([100 + number for number in range(30)], False),
        ([100] * 20 + [110] * 10, False),
        ([120 - number for number in range(30)], True),  # less is no leak
    ],
)
def test_what_is_flat(values: list[float], is_flat: bool) -> None:
    looks = [Vitals(float(at), value, value, 0.0) for at, value in enumerate(values)]
    assert trend(looks, "memory").is_flat(0.02) is is_flat
