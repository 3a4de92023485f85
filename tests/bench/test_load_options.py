"""The flags of load and its kin, and the plans they make."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import pytest

from relay.core.request import Route
from relay_bench import cli
from relay_bench.load import command, options
from relay_bench.load.results import environment, file_name, result_of
from relay_bench.load.run import jobs_of
from relay_bench.load.target import resolve
from tests.bench.loading import plan_for, record, tally_of

if TYPE_CHECKING:
    from pathlib import Path


def test_the_plan_is_the_same_again_and_other_words_change_nothing_else() -> None:
    words = ("--request-rate", "9", "--num-prompts", "40", "--random-input-len", "uniform:1-9", "--seed", "4")
    one = plan_for(*words)
    assert plan_for(*words) == one
    other = plan_for(*words, variant="other")
    assert [item.planned_ns for item in other.items] == [item.planned_ns for item in one.items]
    assert [len(item.body.split()) for item in other.items] == [len(item.body.split()) for item in one.items]
    assert other.items[0].body != one.items[0].body
    faster = plan_for(*words, "--request-rate", "18")
    assert [item.body for item in faster.items] == [item.body for item in one.items]


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ((), 1000),
        (("--num-prompts", "7"), 7),
        (("--request-rate", "20", "--duration", "3"), 60),
        (("--request-rate", "20", "--duration", "3", "--num-prompts", "9"), 9),
        (
            ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "0", "--ramp-up-end-rps", "10", "--duration", "4"),
            20,
        ),
    ],
)
def test_how_many(words: tuple[str, ...], number: int) -> None:
    assert len(plan_for("--random-input-len", "1", *words).items) == number


def test_open_and_closed_loops() -> None:
    assert plan_for("--max-concurrency", "3").manner.is_closed_loop
    both = plan_for("--max-concurrency", "3", "--request-rate", "5", "--num-prompts", "9")
    assert not both.manner.is_closed_loop
    assert both.rate_text == "open loop, 5 requests/s, at most 3 at once"
    assert plan_for("--num-prompts", "1").rate_text == "open loop, all at once"


def test_a_trace_is_no_rate(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("0\n0.5\n2\n")
    plan = plan_for("--trace", str(trace))
    assert plan.rate_text == f"open loop, trace {trace}"
    assert file_name(plan, "").startswith("chat-trace-m-")
    assert result_of(plan, tally_of(record()), url="http://x")["request_rate"] is None
    for words in (["--request-rate", "5"], ["--ramp-up-strategy", "linear", "--ramp-up-end-rps", "3"]):
        with pytest.raises(ValueError, match=f"--trace and {words[0]} exclude each other"):
            plan_for("--trace", str(trace), *words)


def test_jobs_share_everything_out() -> None:
    plan = plan_for("--num-prompts", "10", "--processes", "3", "--max-concurrency", "5", "--num-warmups", "4")
    jobs = jobs_of(plan, resolve("http://127.0.0.1:1/base/v1"))
    assert sorted(item.index for job in jobs for item in job.items) == list(range(10))
    assert [job.max_concurrency for job in jobs] == [2, 2, 1]
    assert all(job.head.startswith(b"POST /base/v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:1\r\n") for job in jobs)
    few = plan_for("--num-prompts", "10", "--processes", "8", "--max-concurrency", "2")
    assert [job.max_concurrency for job in jobs_of(few, resolve("http://127.0.0.1:1"))] == [1, 1]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(jobs[0]), type=type(jobs[0])) == jobs[0]


def test_backends_are_routes() -> None:
    assert plan_for("--backend", "openai", "--num-prompts", "1").manner.route is Route.COMPLETIONS
    assert plan_for("--num-prompts", "1").endpoint == "/v1/chat/completions"
    assert plan_for("--route", "messages", "--endpoint", "/x", "--num-prompts", "1").endpoint == "/x"


def test_headers_and_keys() -> None:
    plan = plan_for("--api-key", "k", "--header", "X-Sim-Tokens: 5", "--num-prompts", "1", "--no-keep-alive")
    (job,) = jobs_of(plan, resolve("http://127.0.0.1:1"))
    for line in (b"authorization: Bearer k", b"x-sim-tokens: 5", b"connection: close"):
        assert b"\r\n" + line + b"\r\n" in job.head


@pytest.mark.parametrize(
    "words",
    [
        ("--num-prompts", "-1"),
        ("--burstiness", "0"),
        ("--request-rate", "0"),
        ("--duration", "5"),
        ("--processes", "0"),
        ("--header", "nonsense"),
        ("--header", "a: b\r\nc: d"),
        ("--goodput", "itl:5"),
        ("--extra-body", "[1]"),
        ("--dataset-name", "sharegpt"),
        ("--random-input-len", "many"),
        ("--random-range-ratio", "1"),
        ("--trace", "/nonexistent"),
        ("--ramp-up-strategy", "linear"),
        ("--ramp-up-strategy", "linear", "--ramp-up-end-rps", "5", "--request-rate", "5"),
        ("--request-rate", "10", "--num-prompts", "10", "--warmup", "2"),
        ("--max-concurrency", "2", "--warmup", "2"),
    ],
)
def test_what_the_flags_refuse(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"--|is no length"):
        plan_for(*words)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://x:99999", "http://u:p@x", "http://x?q=1", "http://nope.invalid"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match=r"x|http|nope"):
        resolve(url)


def test_urls() -> None:
    assert resolve("127.0.0.1:80").address == ("127.0.0.1", 80)
    assert resolve("http://127.0.0.1").address == ("127.0.0.1", 80)
    assert resolve("https://127.0.0.1").tls_name == "127.0.0.1"
    assert resolve("http://[::1]:9/").host == "[::1]:9"
    assert resolve("http://127.0.0.1:1/v1").path("/v1/models") == "/v1/models"
    assert resolve("http://127.0.0.1:1/a/").path("/v1/models") == "/a/v1/models"


def test_file_names_are_vllms() -> None:
    plan = plan_for("--num-prompts", "1", "--request-rate", "2.5", "--max-concurrency", "8")
    assert file_name(msgspec.structs.replace(plan, model="org/m"), "").startswith("chat-2.5qps-concurrency8-m-")


def test_a_server_by_its_host_or_its_port() -> None:
    assert options.url_of(options.parsed("--host", "engine")) == "http://engine:8000"
    assert options.url_of(options.parsed("--port", "9")) == "http://127.0.0.1:9"
    assert options.url_of(options.parsed("--host", "::1", "--port", "9")) == "http://[::1]:9"
    assert options.url_of(options.parsed("--base-url", "http://x")) == "http://x"


@pytest.mark.parametrize("verb", ["load", "sweep", "doctor"])
def test_no_server_is_a_mistake_that_says_what_to_give(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb]) == 2
    said = capsys.readouterr().err
    assert said == f"relay-bench {verb}: give the URL of a server, as http://127.0.0.1:8000, or --host and --port\n"


def test_metadata_and_percentiles() -> None:
    assert command.metadata_of(["a=b=c"]) == {"a": "b=c"}
    assert command.percentiles_of("50,99.9") == [50, 99.9]
    with pytest.raises(ValueError, match="--metadata"):
        command.metadata_of(["x"])
    for text in ("101", "x"):
        with pytest.raises(ValueError, match="--metric-percentiles"):
            command.percentiles_of(text)


def test_the_environment_is_stamped() -> None:
    assert set(environment()) == {"python", "kernel", "processor", "cores", "load_average"}
    assert math.isfinite(environment()["load_average"])
