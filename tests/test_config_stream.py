"""Settings of streams and money: what is taken, what is refused, and what flags and pools make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay import cli, config
from relay.config import ConfigError, CostConfig, PoolConfig, PriceConfig, StreamConfig

POOL = '[[pool]]\nname = "p"\nupstreams = ["http://127.0.0.1:8000"]\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "relay.toml"


def problems(file: Path, text: str) -> list[str]:
    file.write_text(POOL + text)
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    return [problem.line("") for problem in caught.value.problems]


def test_all_of_it(file: Path) -> None:
    file.write_text(
        POOL
        + """
        force_stream = false
        include_usage = "as-asked"
        keepalive_comment_s = 0
        [stream]
        force_stream = true
        include_usage = "always"
        max_answer_bytes = 1000
        keepalive_comment_s = 2.5
        [prices."qwen3*"]
        prompt = 0.10
        cached_prompt = 0.02
        completion = 4
        [prices.embedder]
        prompt = 1
        [cost]
        in_usage = true
        """
    )
    found = config.load(file)
    assert found.stream == StreamConfig(
        force_stream=True, include_usage="always", max_answer_bytes=1000, keepalive_comment_s=2.5
    )
    pool = found.pools[0]
    assert (pool.force_stream, pool.include_usage, pool.keepalive_comment_s) == (False, "as-asked", 0.0)
    assert found.prices == {
        "qwen3*": PriceConfig(prompt=0.1, cached_prompt=0.02, completion=4.0),
        "embedder": PriceConfig(prompt=1.0),
    }
    assert found.cost == CostConfig(in_usage=True)


def test_nothing_of_it(file: Path) -> None:
    file.write_text(POOL)
    found = config.load(file)
    stream = found.stream
    assert (stream.force_stream, stream.include_usage, stream.keepalive_comment_s) == (False, "as-asked", 0.0)
    assert (found.prices, found.cost.in_usage) == ({}, False)
    assert found.stream_of(found.pools[0]) is found.stream


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("drain_kv = 1", "pool[0].drain_kv: 1 is not valid; allowed: true or false"),
        ("[admin]\nallow_remote = 'no'", 'admin.allow_remote: "no" is not valid; allowed: true or false'),
        ("force_stream = 1", "pool[0].force_stream: 1 is not valid; allowed: true or false"),
        ("[stream]\nforce_stream = 'yes'", 'stream.force_stream: "yes" is not valid; allowed: true or false'),
        ("[stream]\ninclude_usage = true",
         'stream.include_usage: true is not valid; allowed: "as-asked" or "always"'),
        ("include_usage = 'never'",
         'pool[0].include_usage: "never" is not valid; allowed: "as-asked" or "always"'),
        ("[stream]\nmax_answer_bytes = 0",
         "stream.max_answer_bytes: 0 is not valid; allowed: a whole number of bytes, at least 1"),
        ("[stream]\nkeepalive_comment_s = -1",
         "stream.keepalive_comment_s: -1 is not valid; allowed: seconds, 0 or more (0: none at all)"),
        ("keepalive_comment_s = '5s'",
         'pool[0].keepalive_comment_s: "5s" is not valid; allowed: seconds, 0 or more (0: none at all)'),
        ("[prices]\nqwen = 3", "prices.qwen: 3 is not valid; allowed: a table"),
        ('[prices."q*"]\nprompt = -0.1',
         'prices."q*".prompt: -0.1 is not valid; allowed: money for a million tokens, 0 or more'),
        ("[prices.q]\ncompletion = nan",
         "prices.q.completion: NaN is not valid; allowed: money for a million tokens, 0 or more"),
        ("[prices.q]\ncached_prompt = inf",
         "prices.q.cached_prompt: Infinity is not valid; allowed: money for a million tokens, 0 or more"),
        ("[prices.q]\npromt = 1",
         "prices.q.promt: is not a known name; perhaps prompt is meant; allowed: prompt, cached_prompt, completion"),
        ("[cost]\nin_usage = true",
         'cost.in_usage: there are no prices to tell; allowed: false, or a table [prices."MODEL"]'),
    ],
)  # fmt: skip
def test_what_is_wrong(file: Path, text: str, problem: str) -> None:
    assert problems(file, text) == [problem]


def test_prices_are_tables(file: Path) -> None:
    file.write_text(f"prices = 3\n{POOL}")
    with pytest.raises(ConfigError, match=r'prices: 3 is not valid; allowed: tables, \[prices\."MODEL"\]'):
        config.load(file)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (PoolConfig(), StreamConfig(force_stream=True, max_frame_bytes=7)),
        (PoolConfig(force_stream=False), StreamConfig(max_frame_bytes=7)),
        (PoolConfig(include_usage="always"),
         StreamConfig(force_stream=True, max_frame_bytes=7, include_usage="always")),
        (PoolConfig(keepalive_comment_s=5.0),
         StreamConfig(force_stream=True, max_frame_bytes=7, keepalive_comment_s=5.0)),
    ],
)  # fmt: skip
def test_a_pools_own(pool: PoolConfig, expected: StreamConfig) -> None:
    whole = config.Config(stream=StreamConfig(force_stream=True, max_frame_bytes=7))
    assert whole.stream_of(pool) == expected


def test_flags_win_over_file_and_pools(file: Path) -> None:
    file.write_text(POOL + 'force_stream = false\ninclude_usage = "always"\n')
    arguments = cli._parser().parse_args(["serve", "--force-stream", "--include-usage", "as-asked"])
    found = config.load(file, lambda loaded: cli._with_flags(loaded, arguments))
    stream = found.stream_of(found.pools[0])
    assert (stream.force_stream, stream.include_usage) == (True, "as-asked")


def test_without_flags_the_file_holds(file: Path) -> None:
    file.write_text(POOL + "force_stream = true\n")
    arguments = cli._parser().parse_args(["serve"])
    found = config.load(file, lambda loaded: cli._with_flags(loaded, arguments))
    assert found == config.load(file)
    assert found.stream_of(found.pools[0]).force_stream


def test_check_says_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(POOL + 'force_stream = true\n[stream]\ninclude_usage = "always"\n[prices."q*"]\nprompt = 1\n')
    assert cli.main(["check", "--config", str(file)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "force_stream = true" in lines
    assert "prices for q*" in lines
    assert 'stream.include_usage = "always" (default "as-asked")' in lines


def test_a_flag_refuses_what_the_file_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--include-usage", "never"])
    assert '"never" is not valid; allowed: "as-asked" or "always"' in capsys.readouterr().err
