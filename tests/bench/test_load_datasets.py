"""Datasets: lengths, prefixes, turns, files; and bodies that the engine takes."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.core.request import Route, peek
from relay_bench.engine.ask import read_ask
from relay_bench.engine.config import EngineConfig
from relay_bench.engine.routes import GENERATING
from relay_bench.load.datasets import (
    ENDPOINTS,
    WORDS,
    Ask,
    Form,
    Synthetic,
    read_bodies,
    read_custom,
    read_sharegpt,
)
from relay_bench.load.lengths import Lengths, parse_lengths
from relay_bench.load.schedule import TraceEntry

if TYPE_CHECKING:
    from pathlib import Path


def asks_of(dataset: Synthetic, total: int, *, seed: int = 0, words: int = 0, trace: Any = ()) -> list[Ask]:
    return dataset.asks(total, random.Random(seed), random.Random(words), trace)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("7", 7, 7), ("uniform:3-9", 3, 9), ("lognormal:100,0.5", 1, 10_000), ("exponential:50", 1, 10_000)],
)
def test_lengths_are_drawn_from_what_was_written(text: str, least: int, most: int) -> None:
    lengths, rng = parse_lengths(text), random.Random(0)
    drawn = [lengths.draw(rng) for _ in range(2000)]
    assert min(drawn) >= least
    assert max(drawn) <= most
    if text.startswith("uniform"):
        assert set(drawn) == set(range(3, 10))
    if text.startswith("lognormal"):
        assert sorted(drawn)[1000] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("text", ["", "0", "-3", "uniform:9-3", "uniform:3", "lognormal:5", "zipf:3", "nan", "5,6"])
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(ValueError, match="is no length"):
        parse_lengths(text)


def test_a_range_ratio_spreads_a_constant_only() -> None:
    assert parse_lengths("100").spread(0.25) == Lengths("uniform", 75, 125)
    assert parse_lengths("uniform:1-2").spread(0.5) == parse_lengths("uniform:1-2")


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 5), st.integers(0, 5))
def test_other_words_make_the_same_load(total: int, seed: int, words: int) -> None:
    dataset = Synthetic(
        input_len=parse_lengths("uniform:1-20"),
        output_len=parse_lengths("uniform:1-9"),
        turns=parse_lengths("uniform:1-4"),
    )
    one, other = asks_of(dataset, total, seed=seed, words=words), asks_of(dataset, total, seed=seed, words=words + 1)
    shape = [(len(ask.turns), [len(turn.split()) for turn in ask.turns], ask.output_len) for ask in one]
    assert shape == [(len(ask.turns), [len(turn.split()) for turn in ask.turns], ask.output_len) for ask in other]
    assert len(one) == total
    assert asks_of(dataset, total, seed=seed, words=words) == one


def test_prefixes_are_shared() -> None:
    dataset = Synthetic(input_len=parse_lengths("5"), prefix_len=30, num_prefixes=3)
    starts = {" ".join(ask.turns[0].split()[:30]) for ask in asks_of(dataset, 200)}
    assert len(starts) == 3
    assert all(len(ask.turns[0].split()) == 35 for ask in asks_of(dataset, 20))


def test_a_turn_holds_the_ones_before_it_and_comes_after_them() -> None:
    dataset = Synthetic(input_len=parse_lengths("4"), output_len=parse_lengths("3"), turns=parse_lengths("3"))
    found = asks_of(dataset, 30)
    seen: set[tuple[str, ...]] = {()}
    for ask in found:
        assert len(ask.turns) % 2 == 1
        assert ask.turns[:-2] in seen  # the same conversation's turn before, or none
        seen.add(ask.turns)
    assert sorted(len(ask.turns) for ask in found) == [1] * 10 + [3] * 10 + [5] * 10
    assert [len(ask.turns) for ask in found[:3]] != [1, 3, 5]  # spread among others


def test_a_trace_brings_its_lengths() -> None:
    trace = [TraceEntry(0, 6, 2), TraceEntry(1)]
    first, second = asks_of(Synthetic(input_len=parse_lengths("9")), 2, trace=trace)
    assert (len(first.turns[0].split()), first.output_len) == (6, 2)
    assert (len(second.turns[0].split()), second.output_len) == (9, 128)


@pytest.mark.parametrize("route", ENDPOINTS)
def test_the_engine_takes_every_form(route: Route) -> None:
    body = Form(route=route, model="tiny", ignore_eos=True).body(Ask(("one two", "three", "four"), 7))
    ask = read_ask(GENERATING[ENDPOINTS[route]], body.body, {}, EngineConfig(), now_s=0, clock_us=lambda: 0)
    assert (ask.stream, ask.tokens, ask.prompt_tokens, body.output_len) == (True, 7, 4, 7)
    assert ask.usage.at_end is (route in (Route.CHAT, Route.COMPLETIONS))
    assert json.loads(body.body)["ignore_eos"] is True


def test_extra_fields_win_and_choices_multiply_tokens() -> None:
    body = Form(route=Route.CHAT, model="m", continuous_usage=True, extra={"n": 3, "model": "other"}).body(
        Ask(("a",), 5)
    )
    fields = json.loads(body.body)
    assert (fields["model"], body.output_len) == ("other", 15)
    assert fields["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize("route", ENDPOINTS)
def test_a_limit_among_the_extra_fields_is_what_is_expected(route: Route) -> None:
    name = "max_output_tokens" if route is Route.RESPONSES else "max_tokens"
    body = Form(route=route, model="tiny", extra={name: 5}).body(Ask(("one",), 7))
    ask = read_ask(GENERATING[ENDPOINTS[route]], body.body, {}, EngineConfig(), now_s=0, clock_us=lambda: 0)
    assert (ask.tokens, body.output_len) == (5, 5)


def test_words_are_single() -> None:
    assert all(word.isalpha() for word in WORDS)


def test_sharegpt(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    turns = [{"from": "human", "value": "hello there"}, {"from": "gpt", "value": "x" * 40}]
    file.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, {"conversations": []}]))
    found = read_sharegpt(str(file), 3, random.Random(0), output_len=None)
    assert found == [Ask(("hello there",), 10)] * 3
    assert read_sharegpt(str(file), 1, random.Random(0), output_len=4)[0].output_len == 4
    file.write_text('{"no": 1}')
    with pytest.raises(ValueError, match=r"s\.json"):
        read_sharegpt(str(file), 1, random.Random(0), output_len=None)


def test_custom(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"prompt":"a b","output_tokens":9}\n\n{"prompt":"c"}\n')
    assert read_custom(str(file), 3, output_len=None) == [Ask(("a b",), 9), Ask(("c",), 128), Ask(("a b",), 9)]
    file.write_text('{"prompt":"a"}\n[]\n')
    with pytest.raises(ValueError, match=r"c\.jsonl:2"):
        read_custom(str(file), 1, output_len=None)


def test_bodies_are_sent_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "b.jsonl"
    line = '{ "model":"m", "stream": true, "max_tokens": 6, "n":2, "messages":[]}'
    file.write_text(line + "\n")
    found = read_bodies(str(file), 2)
    assert [body.body for body in found] == [line.encode()] * 2
    assert found[0].output_len == 12
    assert peek(found[0].body).wants_stream
    for bad, message in (("{", "not JSON"), ('{"stream":false}', "no latency without a stream"), ("", "empty")):
        file.write_text(bad)
        with pytest.raises(ValueError, match=message):
            read_bodies(str(file), 1)
