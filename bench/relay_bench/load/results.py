"""The result of a run as one JSON object, which ``vllm bench serve``'s plotters can read.

Keys of vLLM's are used only where ours means the same: ``ttft``, ``tpot`` and ``e2el`` from the instant of sending,
per-request arrays in seconds, summaries in milliseconds. Where it does not, the key is ours:

- ``itl`` is between tokens here, and null where nobody counted them; vLLM's ``itl``, between frames, is ``frame_gap``.
- ``max_output_tokens_per_s`` (which counts frames) and ``queue_times`` (which count from after the client's own sleep)
  have no place here; ``send_lag`` and ``ttft_planned`` say what the latter is for.
- ``request_rate`` is null where the instants come from a trace.
- ``completed`` are those without any fault: vLLM also counts streams that broke or held an error.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import msgspec

import relay
from relay_bench import processes
from relay_bench.load.slo import is_good
from relay_bench.load.stats import Histogram, histogram_of, percentile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay_bench.load.options import Plan
    from relay_bench.load.records import Record, Tally

#: What a request has one of, and what it has many of.
REQUEST_METRICS: Final = ("ttft", "ttft_planned", "tpot", "e2el", "e2el_planned", "send_lag")
FRAME_METRICS: Final = ("itl", "frame_gap", "client_delay", "frame_delay")
METRICS: Final = (*REQUEST_METRICS, *FRAME_METRICS)

#: Share of a load process's time beyond which it is too busy to be believed.
_MAX_CPU_SHARE: Final = 0.85
#: Share of the time without a core beyond which a late client is the machine's fault; a thousandth is usual.
_MAX_WAITED_SHARE: Final = 0.01

Result = dict[str, Any]


def result_of(
    plan: Plan, tally: Tally, *, url: str, label: str = "", percentiles: Sequence[float] = (50, 90, 99)
) -> Result:
    """The result of a run."""
    measured = [record for record in tally.records if record.is_measured]
    completed = [record for record in measured if not record.label]
    duration_s = _duration_s(plan, measured)
    inputs = sum(record.prompt_tokens or 0 for record in completed)
    outputs = sum(record.completion_tokens or 0 for record in completed)
    result: Result = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": plan.manner.route.value,
        "backend": plan.manner.route.value,
        "label": label or None,
        "model_id": plan.model,
        "tokenizer_id": None,
        "num_prompts": len(tally.records),
        "request_rate": None if plan.trace else "inf" if math.isinf(plan.request_rate) else plan.request_rate,
        "burstiness": "inf" if math.isinf(plan.burstiness) else plan.burstiness,
        "max_concurrency": plan.max_concurrency or None,
    }
    if plan.ramp:
        result |= dict(zip(("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"), plan.ramp, strict=True))
    result |= {
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(measured) - len(completed),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": _per(len(completed), duration_s),
        "request_goodput": None,
        "completion_rate": completion_rate(completed),
        "output_throughput": _per(outputs, duration_s),
        "total_token_throughput": _per(inputs + outputs, duration_s),
        "max_concurrent_requests": most_at_once(tally.records),
    }
    if plan.objectives:
        good = sum(is_good(record, plan.objectives) for record in measured)
        result["request_goodput"] = _per(good, duration_s)
        result["slo_attainment"] = _per(good, len(measured))
        result["goodput_config"] = {objective.metric: objective.limit_ms for objective in plan.objectives}
    if plan.manner.is_detailed:
        result |= _arrays(measured)
    histograms = _histograms(completed, measured, tally)
    for metric in REQUEST_METRICS:
        values = [
            value for record in _of(metric, completed, measured) if (value := record.metric_s(metric)) is not None
        ]
        result |= _summary(metric, values, percentiles)
    for metric in FRAME_METRICS:
        result |= _histogram_summary(metric, histograms[metric], percentiles)
    result |= {
        "tool": f"relay-bench {relay.__version__}",
        "url": url,
        "load": plan.rate_text,
        "sent": len(measured),
        "failures": failures_of(measured),
        "content_frames": sum(record.content_frames for record in completed),
        "itl_source": _count(record.itl_source for record in completed),
        "reused_connections": sum(record.is_reused for record in measured),
        "retried": tally.retried,
        "harness": _harness(plan, tally, histograms),
        "environment": environment(),
        "histograms": {name: _packed(histogram) for name, histogram in histograms.items() if histogram.count},
    }
    return result


def completion_rate(completed: Sequence[Record]) -> float | None:
    """Requests completed a second, from the first that was to the last: unlike the throughput, without start and drain.

    None where they are too few, or all at once.
    """
    ends = [record.done_ns for record in completed]
    span_ns = max(ends) - min(ends) if ends else 0
    return (len(ends) - 1) / (span_ns / 1e9) if span_ns else None


def failures_of(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Failures by label: how many, and what one of them said."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.label:
            entry = found.setdefault(record.label, {"count": 0, "example": record.error})
            entry["count"] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["count"]))


def most_at_once(records: Sequence[Record]) -> int:
    """How many requests were in flight at the same time, at most."""
    changes = sorted([(record.sent_ns, 1) for record in records] + [(record.done_ns, -1) for record in records])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def environment() -> dict[str, Any]:
    """What figures depend on besides the software measured."""
    return {
        "python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()}",
        "processor": processes.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
    }


def histogram_from(result: Result, metric: str) -> Histogram:
    """A metric's histogram out of a result; empty where it has none."""
    packed = result.get("histograms", {}).get(metric)
    return Histogram() if packed is None else msgspec.convert(packed, Histogram, strict=False)


def file_name(plan: Plan, label: str) -> str:
    """As vLLM names its files: label or backend, rate, concurrency, model, date."""
    rate = "trace" if plan.trace else f"{plan.request_rate:g}qps"
    places = f"-concurrency{plan.max_concurrency}" if plan.max_concurrency else ""
    model = plan.model.rpartition("/")[2]
    return f"{label or plan.manner.route.value}-{rate}{places}-{model}-{time.strftime('%Y%m%d-%H%M%S')}.json"


# -- parts


def _of(metric: str, completed: list[Record], measured: list[Record]) -> list[Record]:
    """Lateness is the client's, however a request ended."""
    return measured if metric == "send_lag" else completed


def _duration_s(plan: Plan, measured: list[Record]) -> float:
    """From the start (of what is measured) to the last end: vLLM's, with the drain in it."""
    if not measured:
        return 0.0
    return max(record.done_ns for record in measured) / 1e9 - plan.warmup_s


def _per(number: float, of: float) -> float:
    return number / of if of > 0 else 0.0


def _count(words: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return found


def _arrays(measured: list[Record]) -> Result:
    """vLLM's arrays, by request, in seconds; as there, what failed has 0 and an error."""
    return {
        "input_lens": [record.prompt_tokens or 0 for record in measured],
        "output_lens": [record.completion_tokens or 0 for record in measured],
        "ttfts": [record.metric_s("ttft") or 0.0 for record in measured],
        "itls": [[ns / 1e9 for ns in record.itls_ns or ()] for record in measured],
        "latencies": [record.metric_s("e2el") or 0.0 for record in measured],
        "start_times": [record.sent_ns / 1e9 for record in measured],
        "errors": [f"{record.label}: {record.error}" if record.label else "" for record in measured],
        "planned_times": [record.planned_ns / 1e9 for record in measured],
        "end_times": [record.done_ns / 1e9 for record in measured],
        "frame_gaps": [_gaps_s(record) for record in measured],
    }


def _gaps_s(record: Record) -> list[float]:
    marks = record.content_ns or []
    return [(later - earlier) / 1e9 for earlier, later in pairwise(marks)]


def _histograms(completed: list[Record], measured: list[Record], tally: Tally) -> dict[str, Histogram]:
    found = {
        metric: histogram_of(
            round(value * 1e9)
            for record in _of(metric, completed, measured)
            if (value := record.metric_s(metric)) is not None
        )
        for metric in REQUEST_METRICS
    }
    return found | {metric: getattr(tally, metric) for metric in FRAME_METRICS}


def _packed(histogram: Histogram) -> Any:
    return msgspec.to_builtins(histogram, str_keys=True)


def _quantile_name(percent: float) -> str:
    return f"p{percent:g}"


def _summary(metric: str, values_s: list[float], percentiles: Sequence[float]) -> Result:
    if not values_s:
        return _nothing(metric, percentiles)
    ordered = sorted(values_s)
    found: Result = {
        f"mean_{metric}_ms": statistics.fmean(ordered) * 1000,
        f"median_{metric}_ms": percentile(ordered, 0.5) * 1000,
        f"std_{metric}_ms": statistics.pstdev(ordered) * 1000,
    }
    return found | {f"{_quantile_name(p)}_{metric}_ms": percentile(ordered, p / 100) * 1000 for p in percentiles}


def _histogram_summary(metric: str, histogram: Histogram, percentiles: Sequence[float]) -> Result:
    mean, median, std = histogram.mean_ns, histogram.quantile_ns(0.5), histogram.std_ns
    if mean is None or median is None or std is None:
        return _nothing(metric, percentiles)
    found: Result = {
        f"mean_{metric}_ms": mean / 1e6,
        f"median_{metric}_ms": median / 1e6,
        f"std_{metric}_ms": std / 1e6,
    }
    for p in percentiles:
        found[f"{_quantile_name(p)}_{metric}_ms"] = (histogram.quantile_ns(p / 100) or 0.0) / 1e6
    return found


def _nothing(metric: str, percentiles: Sequence[float]) -> Result:
    names = ("mean", "median", "std", *map(_quantile_name, percentiles))
    return {f"{name}_{metric}_ms": None for name in names}


def _harness(plan: Plan, tally: Tally, histograms: dict[str, Histogram]) -> dict[str, Any]:
    """What the client itself did to the figures."""
    busy = tally.cpu_s / tally.wall_s / plan.load_processes if tally.wall_s else 0.0
    lag, delay = (histograms[name].quantile_ns(0.99) for name in ("send_lag", "client_delay"))
    frames = sum(record.content_frames for record in tally.records)
    waited = tally.waited_s / tally.wall_s / plan.load_processes if tally.wall_s else 0.0
    degraded = []
    if lag is not None and lag / 1e6 > plan.max_lag_ms:
        degraded.append(f"requests were sent late: p99 {lag / 1e6:.1f} ms, bound {plan.max_lag_ms:g} ms")
    if delay is not None and delay / 1e6 > plan.max_lag_ms:
        degraded.append(f"the client read late: p99 {delay / 1e6:.1f} ms, bound {plan.max_lag_ms:g} ms")
    if degraded and waited > _MAX_WAITED_SHARE:
        degraded.append(f"other processes kept the load processes from a core for {waited:.1%} of the time")
    if busy > _MAX_CPU_SHARE:
        degraded.append(f"the load processes were busy for {busy:.0%} of the time: use more --processes")
    return {
        "degraded": degraded,
        "processes": plan.load_processes,
        "cpu_share": busy,
        "waited_share": waited,
        "cpu_us_per_frame": _per(tally.cpu_s * 1e6, frames),
        "reads": tally.reads,
        "reads_with_kernel_stamp": tally.client_delay.count,
        "lost_stamps": tally.lost_stamps,
    }
