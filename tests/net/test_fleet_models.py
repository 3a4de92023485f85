"""Which pool a model belongs to, and which models there are."""

from __future__ import annotations

import msgspec
import pytest

from relay.config import PoolConfig, PriceConfig
from relay.core.request import RequestFacts, Route
from relay.errors import RequestRefused
from relay.net.fleet import Fleet
from tests.net.pools import (
    URLS,
    config_of,
    upstreams,
)

FLEET = Fleet(
    config_of(
        PoolConfig(name="first", models=("qwen3-32b", "qwen*", "a*z")),
        PoolConfig(name="second", models=("qwen-vl", "*-r1", "q.en")),
        PoolConfig(name="rest"),
    )
)
NAMED = Fleet(config_of(PoolConfig(name="first", models=("m", "org/*")), PoolConfig(name="second", models=("n",))))


@pytest.mark.parametrize(
    ("model", "pool"),
    [
        ("qwen3-32b", "first"),
        ("qwen-other", "first"),
        ("qwen-vl", "second"),  # a name comes before a pattern
        ("qwen-r1", "first"),  # the first pattern that fits
        ("deepseek-r1", "second"),
        ("az", "first"),
        ("a\nz", "first"),
        ("azx", "rest"),
        ("Qwen3", "rest"),
        ("q.en", "second"),
        ("qxen", "rest"),  # nothing but * is special
        ("", "rest"),
        ("x" * 100_000, "rest"),
    ],
)
def test_the_pool_for_a_model(model: str, pool: str) -> None:
    found = FLEET.serving(model)
    assert found is not None
    assert found.name == pool
    assert FLEET.pool_for(Route.CHAT, RequestFacts(is_json=True, model=model)) is found


@pytest.mark.parametrize("route", Route)
def test_requests_without_a_model_go_to_the_first_pool(route: Route) -> None:
    assert FLEET.pool_for(route, RequestFacts(is_json=True)).name == "first"


def test_a_model_that_nobody_serves() -> None:
    facts = RequestFacts(is_json=True, model="x")
    with pytest.raises(RequestRefused) as refused:
        NAMED.pool_for(Route.CHAT, facts)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert refused.value.message == "no pool serves the model 'x'; known: m, org/*, n"
    assert NAMED.pool_for(Route.OTHER, facts).name == "first"  # what `model` means there is not known


def test_a_body_that_is_not_json_names_no_pool() -> None:
    facts = RequestFacts(is_json=False)
    for fleet in (FLEET, NAMED):
        with pytest.raises(RequestRefused) as refused:
            fleet.pool_for(Route.CHAT, facts)
        assert (refused.value.status, refused.value.code) == (400, "invalid_json")
        assert fleet.pool_for(Route.OTHER, facts).name == "first"
    only = Fleet(config_of(PoolConfig()))
    assert only.pool_for(Route.CHAT, facts).name == "default"  # no choice to make: the engine is the judge
    priced = Fleet(msgspec.structs.replace(config_of(PoolConfig()), prices={"tiny": PriceConfig(prompt=1.0)}))
    with pytest.raises(RequestRefused, match="or a price"):
        priced.pool_for(Route.CHAT, facts)


def test_models_are_those_that_a_request_would_reach() -> None:
    fleet = Fleet(
        config_of(
            PoolConfig(name="one", models=("a*",), upstreams=upstreams(URLS[:2])),
            PoolConfig(name="rest", upstreams=upstreams(URLS[2:4])),
        )
    )
    first, second, third, fourth = fleet.upstreams
    assert fleet.models() is None
    first.models = {"a1": msgspec.Raw(b'{"id":"a1","x":[1.50]}'), "b": msgspec.Raw(b'{"id":"b","of":"first"}')}
    second.models = {"a1": msgspec.Raw(b'{"id":"a1","of":"second"}'), "a2": msgspec.Raw(b'{"id":"a2"}')}
    third.models = {"b": msgspec.Raw(b'{"id":"b"}'), "a3": msgspec.Raw(b'{"id":"a3"}')}
    assert fleet.models() == (
        b'{"object":"list","data":[{"id":"a1","x":[1.50]},{"id":"a2"},{"id":"b"}]}'  # as the engines wrote them
    )
    second.health.on_probe(False, 0.0)
    assert fleet.models() == b'{"object":"list","data":[{"id":"a1","x":[1.50]},{"id":"b"}]}'
    for up in (first, third, fourth):
        up.health.on_probe(False, 0.0)
    assert fleet.models() is None
