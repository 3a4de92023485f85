"""What the tests of the load generator stand on: an engine, a job for it, and the test's own trio to run that in."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from relay.core.request import Route
from relay_bench.load import options
from relay_bench.load.datasets import ENDPOINTS, Ask, Form
from relay_bench.load.records import Record, Tally
from relay_bench.load.stats import Histogram
from relay_bench.load.target import resolve
from relay_bench.load.worker import Item, Job, Manner, Progress, Run

#: Seconds no test waits longer than.
LIMIT_S = 20.0


@contextmanager
def engine_child(*flags: str) -> Iterator[str]:
    """An engine in a process of its own: its URL."""
    words = [sys.executable, "-m", "relay_bench", "engine", "--listen", "127.0.0.1:0", *flags]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        yield process.stderr.readline().partition("listening on ")[2].strip()
        process.terminate()


def job_for(url: str, *, total: int = 1, tokens: int = 4, every_ns: int = 0, **fields: Any) -> Job:
    """A job of `total` requests of `tokens` tokens; `headers` and ``extra`` body fields on demand."""
    route = fields.pop("route", Route.CHAT)
    headers = {"content-type": "application/json"} | fields.pop("headers", {})
    form = Form(
        route=route,
        model="tiny",
        continuous_usage=fields.get("continuous_usage", False),
        ignore_eos=fields.get("is_exact", False),
        extra=fields.pop("extra", {}),
    )
    target = resolve(url)
    lines = [f"POST {target.path(ENDPOINTS[route])} HTTP/1.1", f"host: {target.host}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    bodies = [form.body(Ask(("one two three",), tokens)) for _ in range(total)]
    own = {name: fields.pop(name) for name in Manner.__struct_fields__ if name in fields}
    return Job(
        target=target,
        manner=Manner(route=route, **own),
        head="".join(f"{line}\r\n" for line in lines).encode(),
        items=[Item(at, at * every_ns, body.body, body.output_len) for at, body in enumerate(bodies)],
        total=total,
        **fields,
    )


async def load(job: Job, reports: list[Progress] | None = None) -> Tally:
    """Does a job, to its end."""
    with trio.fail_after(LIMIT_S):
        async with Run(job, (reports if reports is not None else []).append) as run:
            await run.warm_up()
            return await run.run(time.monotonic_ns())


def labels(tally: Tally) -> list[str]:
    """How each request ended; empty: well."""
    return [record.label for record in tally.records]


def record(**fields: Any) -> Record:
    """A record of a good answer: planned at 0, sent at 1 ms, 4 tokens from 11 to 41 ms."""
    ms = 1_000_000
    usual: dict[str, Any] = {
        "index": 0, "planned_ns": 0, "due_ns": 0, "sent_ns": ms, "done_ns": 42 * ms, "first_content_ns": 11 * ms,
        "last_content_ns": 41 * ms, "content_frames": 4, "completion_tokens": 4, "prompt_tokens": 3, "status": 200,
        "frames": 6,
    }  # fmt: skip
    return Record(**(usual | fields))


def plan_for(*words: str, is_detailed: bool = False, variant: str = "") -> options.Plan:
    chosen = options.parsed("http://127.0.0.1:1", *words)
    return options.plan_of(chosen, model="m", is_detailed=is_detailed, variant=variant)


def tally_of(*records: Record, gaps: Histogram | None = None, cpu_s: float = 0.1) -> Tally:
    return Tally(list(records), gaps or Histogram(), Histogram(), Histogram(), Histogram(), cpu_s, 1.0)
