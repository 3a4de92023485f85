"""``relay-bench doctor``: the command."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from relay.core.request import Route
from relay_bench.doctor.findings import Finding, Visit, examine
from relay_bench.doctor.observe import Observation, Patient
from relay_bench.load import command, options, run
from relay_bench.load.datasets import ENDPOINTS, Ask, Form
from relay_bench.load.progress import console
from relay_bench.load.target import Target, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

_PROMPT = "Count from one to one hundred, in words."
#: What SDKs on httpx and browsers send; without br and zstd, which fewer proxies know.
_ACCEPT_ENCODING = "gzip, deflate"


def main(argv: Sequence[str]) -> int:
    """Run ``relay-bench doctor``; the exit status: 0 fit, 1 something is wrong, 2 it could not be told."""
    parser = argparse.ArgumentParser(prog="relay-bench doctor", description="Is this path fit for streaming?")
    options.add_target(parser)
    parser.add_argument("--direct", default="", metavar="URL2", help="the engine behind it, to compare with")
    parser.add_argument("--model", default="", help="default: the first that /v1/models lists")
    parser.add_argument("--route", choices=[route.value for route in ENDPOINTS], default="chat")
    parser.add_argument("--output-len", type=int, default=64, help="tokens asked for (%(default)s)")
    parser.add_argument("--header", action="append", default=[], metavar="NAME: VALUE", help="repeatable")
    parser.add_argument("--api-key", default="", help="sent as a bearer token")
    parser.add_argument(
        "--silence-s", type=float, default=0.0, help="ask relay-bench's engine for so long a silence, to find timeouts"
    )
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of each request (%(default)s)")
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    chosen = parser.parse_args(argv)
    return command.guarded("doctor", _doctor, chosen)


async def _doctor(chosen: argparse.Namespace) -> int:
    if chosen.output_len < 1 or chosen.silence_s < 0 or chosen.timeout_s <= 0:
        raise ValueError("--output-len, --timeout-s: wanted more than 0; --silence-s: 0 or more")
    fields = dict(options.headers_of(chosen))
    target = resolve(options.url_of(chosen))
    direct = resolve(chosen.direct) if chosen.direct else None
    route = Route(chosen.route)
    chosen.dataset_name = "random"
    model = await run.model_of(chosen, direct or target, route, fields)
    visit = await _visit(chosen, target, direct, Form(route=route, model=model), fields)
    found, remarks = examine(visit)
    if chosen.json:
        report = {"url": target.url, "findings": [_as_dict(finding) for finding in found], "remarks": remarks}
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        Console().print(rendered(target.url, visit, found, remarks))
    return 1 if found else 0


async def _visit(
    chosen: argparse.Namespace, target: Target, direct: Target | None, form: Form, fields: dict[str, str]
) -> Visit:
    body = form.body(Ask((_PROMPT,), chosen.output_len)).body
    headers = {"content-type": "application/json", "accept": "text/event-stream", "user-agent": "relay-bench doctor"}
    path = ENDPOINTS[form.route]

    def patient(one: Target) -> Patient:
        return Patient(one, route=form.route, path=path, fields=headers | fields, timeout_s=chosen.timeout_s)

    with console.status("") as status:
        through = patient(target)
        try:
            status.update("a streamed request")
            visit = Visit(stream=await through.ask(body))
            if visit.stream.status == 200:
                status.update("another on the same connection, which takes gzip")
                visit.again = visit.compressed = await through.ask(body, accept_encoding=_ACCEPT_ENCODING)
            if chosen.silence_s and visit.stream.status == 200:
                status.update(f"{chosen.silence_s:g} s of silence")
                visit.silence_s = chosen.silence_s
                visit.silent = await through.ask(body, x_sim_ttft_ms=str(int(chosen.silence_s * 1000)))
        finally:
            through.close()
        if direct is not None:
            status.update("the same, direct")
            beside = patient(direct)
            try:
                visit.direct = await beside.ask(body)
            finally:
                beside.close()
    return visit


def _as_dict(finding: Finding) -> dict[str, Any]:
    return {"code": finding.code, "what": finding.what, "mends": finding.mends}


# -- the picture


def rendered(url: str, visit: Visit, found: list[Finding], remarks: list[str]) -> RenderableType:
    """The doctor's letter."""
    text = Text(_seen("through", visit.stream))
    if visit.direct is not None:
        text.append("\n" + _seen("direct ", visit.direct))
    for finding in found:
        text.append(f"\n\n✗ {finding.code.replace('_', ' ')}: {finding.what}", style="bold red")
        for mend in finding.mends:
            text.append(f"\n    {mend}")
    if not found:
        text.append("\n\n✓ nothing is wrong: frames come when they are made, and all of them", style="bold green")
    if remarks:
        text.append("\n")
    for remark in remarks:
        text.append(f"\n· {remark}", style="dim")
    return Group(Panel(text, title=f"doctor {url}", title_align="left", border_style="red" if found else "green"))


def _seen(name: str, one: Observation) -> str:
    """A line of figures, and one of when frames came."""
    ttft = "no content" if one.ttft_s is None else f"first token after {one.ttft_s * 1000:.1f} ms"
    line = f"{name}  {one.status or '-'}, {ttft}, {len(one.content_s)} content frames, done after "
    line += f"{one.end_s * 1000:.1f} ms"
    return f"{line}\n         {strip(one.content_s, one.end_s)}"


def strip(content_s: list[float], end_s: float, width: int = 80) -> str:
    """When frames came, from the request to its end: the more of them, the taller."""
    counts = [0] * width
    for at in content_s:
        counts[min(int(at / end_s * width), width - 1) if end_s > 0 else 0] += 1
    most = max(max(counts), 1)
    return "".join("·" if not count else "▁▂▃▄▅▆▇█"[-(-count * 8 // most) - 1] for count in counts)
