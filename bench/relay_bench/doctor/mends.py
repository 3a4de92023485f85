"""The settings that mend what the doctor finds."""

from __future__ import annotations

from typing import Final

MENDS: Final = {
    "buffering": (
        "nginx: `proxy_buffering off;` (or the answer's header `X-Accel-Buffering: no`)",
        "Caddy: `flush_interval -1` in `reverse_proxy`, if the answer's type is not text/event-stream",
        "HAProxy: `option http-no-delay`, and no `option http-buffer-response`",
        "Envoy: no buffer or body-transforming filter on this route",
        "Cloudflare and other CDNs: `Content-Type: text/event-stream` and no feature that rewrites bodies",
        "Apache: `SetEnv proxy-sendchunked 1` and `flushpackets=on` in `ProxyPass`",
    ),
    "content_length": (
        "something collects the whole answer to count it: look for body-transforming or caching middleware",
    ),
    "content_type": (
        "the answer must say `Content-Type: text/event-stream`: SDKs and proxies decide by it whether to stream",
        "vLLM-Ascend's example proxy says application/json: pass `media_type` of the engine's answer on",
    ),
    "compression": (
        "nginx: take text/event-stream out of `gzip_types`, or `gzip off;` at this location",
        "Caddy: `encode` with a `match` that leaves text/event-stream out",
        "Cloudflare: a compression rule that turns it off for this path",
        "Envoy: leave text/event-stream out of the compressor filter's `content_type`",
    ),
    "usage": (
        'vLLM: `--enable-force-include-usage`; relay: `include_usage = "always"`; else a proxy drops or rewrites '
        "`stream_options`",
    ),
    "end_mark": ("the last frame is lost: look for a timeout, or a proxy that parses frames and stops too early",),
    "error_frame": ("the engine failed in mid-answer: its log says why",),
    "cut": (
        "nginx: `proxy_read_timeout`; HAProxy: `timeout server` and `timeout tunnel`; Envoy: the route's `timeout: 0s`",
        "a load balancer's idle timeout (AWS ALB: 60 s), or a worker that is restarted while it streams",
    ),
    "stalled": ("the stream fell silent without an end: an engine that hangs, or a proxy that lost its side of it",),
    "idle_cut": (
        "nginx: `proxy_read_timeout 600s;` (60 s by default)",
        "HAProxy: `timeout server 600s`; Envoy: `stream_idle_timeout` (5 min by default) and the route's `timeout: 0s`",
        "AWS ALB: idle timeout (60 s by default); Cloudflare: 100 s, not to be changed on most plans",
        "relay: `keepalive_comment_s` sends a comment where nothing flows, which all of these count as traffic",
    ),
    "keep_alive": (
        "nginx: `keepalive_timeout` above 0 towards clients; towards the engine `keepalive`, `proxy_http_version 1.1;` "
        'and `proxy_set_header Connection "";`',
        "HAProxy: no `option httpclose`; uvicorn: `--timeout-keep-alive` above the client's pause",
    ),
    "framing": ("a proxy changes the body but not its framing, or dies in mid-answer: its error log says so",),
    "late_first": ("queueing or prefill on the way: an authentication, moderation or routing step, or buffering",),
    "http": ("the answer is no stream to look at: mend the request first (model, key, route)",),
    "connect": ("nothing answers there: address, port, firewall, certificate",),
}
