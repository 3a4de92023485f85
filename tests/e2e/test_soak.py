"""The soak, in small: kept by this relay, and broken by one that miscounts or leaks."""

from __future__ import annotations

import msgspec
import pytest
import trio

from relay_bench.drill import soak
from relay_bench.drill.command import main
from relay_bench.drill.report import Report
from relay_bench.drill.stage import Scene
from relay_bench.drill.vitals import Vitals, trend
from tests.e2e.test_drills import sabotaged


def test_a_soak_leaves_nothing_unaccounted(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """Memory and descriptors are left to longer ones, as CI's of a minute: of seconds, the beginning is the most."""
    status = main(["soak", "--minutes", "0.08", "--quick", "--json"])
    report = msgspec.json.decode(capsysbinary.readouterr().out, type=Report)
    assert [text for text in report.broken if not text.startswith(("memory", "descriptors"))] == []
    assert status == bool(report.broken)
    assert len(report.promises) == 35


def test_a_soak_of_a_relay_that_leaks() -> None:
    """A megabyte and a few descriptors for each exchange."""
    command = sabotaged(
        "import os",
        "from relay.net.exchange import Exchange",
        "account = Exchange._account",
        "def leak(self): kept.append(([os.dup(2) for _ in range(3)], b'x' * 1_000_000)); account(self)",
        "Exchange._account = leak",
    )
    plan = msgspec.structs.replace(soak.QUICK, minutes=0.04, engines=1, workers=1)
    broken = trio.run(soak.drill, Scene(command=command, settle_s=0.5), plan).broken
    assert {"no connection has leaked", "memory", "descriptors"} <= {text.partition(":")[0] for text in broken}


def test_a_soak_of_a_relay_that_miscounts() -> None:
    command = sabotaged(
        "from relay.net.tally import Tally",
        "Tally.failed_over = lambda self: None",
        "from relay.net.exchange import Exchange",
        "Exchange.bytes_out = property(lambda self: self.reply.bytes_out)",
        "from relay.net import exchange",
        "make = exchange.make_record",
        "exchange.make_record = lambda **of: make(**of | {'prefill_upstream': None, 'frames': of['frames'] + 1})",
    )
    plan = msgspec.structs.replace(soak.QUICK, minutes=0.04, engines=1, workers=1)
    broken = trio.run(soak.drill, Scene(command=command), plan).broken
    assert {
        "metrics and records agree on failovers",
        "every byte of every answer is counted",
        "client and record agree on frames",
        "what is in the log of a prefiller is an attempt of a record, and where that says",
    } <= set(broken)


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
