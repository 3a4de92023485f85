"""What the control process tells of the fleet and its limits."""

from __future__ import annotations

import pytest

from relay.address import parse_upstream
from relay.config import Config, KeyLimitsConfig, PoolConfig
from relay.daemon import key_limits
from relay.daemon.key_limits import KeyLimits
from relay.daemon.membership import Membership
from relay.daemon.scoreboard import KEY_NUMBERS, MOST_NUMBERS, Scoreboard
from relay.net.pump import Pump
from relay.net.service import Service


def test_an_engine_too_many_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    engines = tuple(parse_upstream(f"http://10.0.0.1:{1 + at}") for at in range(MOST_NUMBERS))  # and their pool
    service = Service(Config(pools=(PoolConfig(upstreams=engines),)), Pump(), None)
    membership = Membership(service, Scoreboard(1))
    for _ in range(2):
        (pool,) = membership.fleet()
        assert [member.config for member in pool.members if member.number is None] == [engines[-1]]
    said = f"relay: {engines[-1].url}: more than {MOST_NUMBERS} engines; its limit is each worker's\n"
    assert capsys.readouterr().err == said


def test_a_key_too_many_is_told_of_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(key_limits, "KEY_NUMBERS", KEY_NUMBERS[:1])
    limits = KeyLimits(Scoreboard(1))
    for _ in range(2):
        limits.settle({name: KeyLimitsConfig(max_in_flight=1) for name in ("alice", "bob")})
    assert capsys.readouterr().err == "relay: bob: too many limits of keys; its max_in_flight does not hold\n"
