"""The page around the plots."""

from __future__ import annotations

import time
from html import escape
from typing import TYPE_CHECKING, Any, Final

import msgspec

from relay_bench.compare import METRICS as COMPARED
from relay_bench.compare import Cost, Difference, number_signed
from relay_bench.load.results import Result, histogram_from
from relay_bench.load.terminal import TITLES, number
from relay_bench.peers import picture
from relay_bench.report import peers, plots

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_STYLE: Final = """
:root{--ink:#1c1f24;--dim:#626a76;--line:#dfe3e8;--bad:#b00020;--good:#00693e}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:#fff;margin:0 auto;
max-width:1400px;padding:28px 32px}
h1{font-size:26px;margin:0 0 2px}
h2{font-size:19px;margin:36px 0 6px;border-bottom:2px solid var(--ink);padding-bottom:4px}
p{margin:6px 0}.dim{color:var(--dim)}.bad{color:var(--bad);font-weight:600}.good{color:var(--good);font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:18px 26px;margin:14px 0}
figure{margin:0;break-inside:avoid}figcaption{font-weight:600;font-size:14px;margin-bottom:2px}
.legend{font-weight:400;font-size:12.5px;margin-left:10px}.legend span{margin-right:12px;white-space:nowrap}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
svg{width:100%;height:auto;display:block}
svg text{font-family:inherit;fill:var(--dim)}.tick{font-size:11px}.label{font-size:12px}
.marktext{font-size:11.5px;fill:var(--bad)}.grid{stroke:var(--line);stroke-width:1}
.mark{stroke:var(--bad);stroke-width:1.2;stroke-dasharray:4 3}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px;margin:12px 0;font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--dim);font-weight:600;white-space:normal;max-width:110px;vertical-align:bottom}th:first-child,td:first-child{text-align:left}
.prose td,.prose th{text-align:left;white-space:normal}code{font-size:12px}
@media print{body{padding:0;max-width:none;font-size:11pt}.plots{grid-template-columns:1fr 1fr}h2{break-after:avoid}}
@page{margin:14mm}
"""


def page(named: Sequence[tuple[str, Result]], title: str) -> str:
    """The whole document for results, each with its name."""
    loads = [(name, result) for name, result in named if "kind" not in result]
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="dim">{escape(_made(named))}</p>']
    for name, result in named:
        if result.get("kind") == "compare":
            parts += _compare(name, result)
        elif result.get("kind") == "sweep":
            parts += _sweep(name, result)
        elif result.get("kind") == "peers":
            parts += _peers(name, result)
    if loads:
        parts += _loads(loads)
    parts += _environments(named)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _made(named: Sequence[tuple[str, Result]]) -> str:
    files = f"{len(named)} result{'s' if len(named) != 1 else ''}"
    return f"relay-bench, {time.strftime('%Y-%m-%d %H:%M')}, from {files}"


# -- kinds of results


def _loads(loads: list[tuple[str, Result]]) -> list[str]:
    parts = ["<h2>Load</h2>"]
    for name, result in loads:
        parts.append(
            f"<p><b>{escape(name)}</b> {escape(result.get('load', ''))}, {escape(str(result.get('url', '')))}. "
        )
        parts += [*_verdicts(result), "</p>"]
    parts.append(_load_table(loads))
    parts.append(_plots(plots.distributions(loads)))
    for name, result in loads:
        drawn = [plot for plot in (plots.timeline(result), plots.gantt(result)) if plot]
        if drawn:
            steady = plots.gap_summary(result)
            parts.append(f"<h2>{escape(name)}, request by request</h2>")
            if steady:
                text = f"p99 gap of a stream: median {number(steady['median'])} ms, worst {number(steady['worst'])} ms"
                parts.append(f'<p class="dim">{text}</p>')
            parts.append(_plots(drawn))
    return parts


def _verdicts(result: Result) -> Iterable[str]:
    harness = result.get("harness", {})
    for reason in harness.get("degraded", ()):
        yield f'<br><span class="bad">Degraded, do not trust these figures: {escape(reason)}</span>'
    for label, failure in result.get("failures", {}).items():
        text = f"{failure['count']:,} failed: {label} ({failure['example'][:160]})"
        yield f'<br><span class="bad">{escape(text)}</span>'
    if not result.get("failed") and not harness.get("degraded"):
        yield '<span class="good">All requests succeeded, and the client was on time.</span>'
    if floor := harness.get("floor_text"):
        yield f'<br><span class="dim">Harness floor: {escape(floor)}</span>'


def _load_table(loads: list[tuple[str, Result]]) -> str:
    metrics = [metric for metric in TITLES if any(histogram_from(result, metric).count for _, result in loads)]
    rows = []
    for name, result in loads:
        cells = [name, f"{result['completed']:,}", f"{result['failed']:,}", f"{result['request_throughput']:,.2f}"]
        cells += [f"{result['output_throughput']:,.1f}", _share(result.get("slo_attainment"))]
        for metric in metrics:
            histogram = histogram_from(result, metric)
            quantiles = [histogram.quantile_ns(q) for q in (0.5, 0.99)]
            cells.append(" / ".join(number(None if ns is None else ns / 1e6) for ns in quantiles))
        rows.append(cells)
    names = ["", "completed", "failed", "requests/s", "output tokens/s", "met objectives"]
    return _table([*names, *(f"{TITLES[metric]}, p50 / p99 ms" for metric in metrics)], rows)


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _compare(name: str, result: Result) -> list[str]:
    rounds = (
        f"{result['load']}; {result['rounds']} rounds of {result['requests_per_round']:,} requests, order drawn anew"
    )
    parts = [f"<h2>Comparison: {escape(name)}</h2>", f"<p>{escape(rounds)}.</p>"]
    for contender, runs in result["runs"].items():
        bad = [run for run in runs if run["failed"] or run["harness"]["degraded"]]
        if bad:
            parts += [
                f"<p><b>{escape(contender)}</b>, {len(bad)} of {len(runs)} runs, the first:",
                *_verdicts(bad[0]),
                "</p>",
            ]
    rows = []
    for row in msgspec.convert(result["differences"], list[Difference]):
        added = row.added
        interval = f"{number_signed(added.low)} … {number_signed(added.high)}"
        cells = [row.name, COMPARED[row.metric], f"{row.pairs:,}", number(row.direct_ms), number(row.through_ms)]
        rows.append([*cells, number_signed(added.estimate), interval])
    parts.append(
        _table(["through", "metric", "pairs", "direct ms", "through it ms", "added ms", "95 % interval"], rows)
    )
    if result["costs"]:
        costs = [
            [
                cost.name,
                f"{cost.cpu_us_per_frame:.1f}",
                f"{cost.cpu_us_per_request:.0f}",
                f"{cost.memory_bytes / 2**20:.1f}",
            ]
            for cost in msgspec.convert(result["costs"], list[Cost])
        ]
        parts.append(_table(["through", "CPU µs per frame", "CPU µs per request", "memory MiB"], costs))
    parts.append(_plots(plots.differences(result)))
    parts.append(_plots(plots.compared_distributions(result)))
    return parts


def _peers(name: str, result: Result) -> list[str]:
    added, remark = peers.differences(result)
    parts = [f"<h2>Comparison of peers: {escape(name)}</h2>", peers.prose(result)]
    parts.append(_table(peers.headings(), picture.with_ratios(result)))
    parts.append(_plots(peers.costs(result)))
    parts.append("<h2>Latency added</h2>")
    if remark:
        parts.append(f'<p class="dim">{escape(remark)}</p>')
    parts += [_plots(added), _plots(peers.distributions(result))]
    parts.append(_table(["", "version", "language", "as it was run"], peers.described(result), is_prose=True))
    return parts


def _sweep(name: str, result: Result) -> list[str]:
    unit = "requests/s" if result["over"] == "rate" else "at once"
    knee = "throughput is a straight line: no knee" if result["knee"] is None else f"knee at {result['knee']:g} {unit}"
    verdict = f"{result['url']}, {result['model_id']}: {knee}"
    parts = [f"<h2>Sweep: {escape(name)}</h2>", f"<p>{escape(verdict)}.</p>"]
    if result["goodput"]:
        wanted = f"{result['attainment']:.0%} of requests with {' '.join(result['goodput'])}"
        best = "no load tried" if result["best"] is None else f"up to {result['best']:g} {unit}"
        kind = "bad" if result["best"] is None else "good"
        parts.append(f'<p class="{kind}">{escape(wanted)}: {escape(best)}.</p>')
    parts.append(_plots(plots.sweep(result)))
    runs = [(run["label"], run) for run in result["runs"]]
    parts.append(_load_table(runs))
    parts.append(
        _plots(
            [plots.cdf(TITLES[m], [(n, histogram_from(r, m)) for n, r in runs]) for m in ("ttft_planned", "frame_gap")]
        )
    )
    return parts


def _environments(named: Sequence[tuple[str, Result]]) -> list[str]:
    """Where each result was taken; equal ones once."""
    seen: dict[str, list[str]] = {}
    for name, result in named:
        text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in _stamp(result).items())
        seen.setdefault(text, []).append(name)
    lines = [f'<p class="dim"><b>{escape(", ".join(names))}</b>: {escape(text)}</p>' for text, names in seen.items()]
    return ["<h2>Taken on</h2>", *lines]


def _stamp(result: Result) -> dict[str, Any]:
    return {"date": result.get("date"), **result.get("environment", {})}


# -- pieces


def _plots(drawn: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], *, is_prose: bool = False) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="prose"' if is_prose else ""
    return f'<div class="wide"><table{kind}><tr>{head}</tr>{body}</table></div>'
