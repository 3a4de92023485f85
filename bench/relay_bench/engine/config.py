"""What the engine is told when it starts; single requests override parts of it by ``x-sim-*`` headers."""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine. The defaults are a test's: a free port, no pauses."""

    #: ``HOST:PORT``, ``[::1]:PORT`` or ``unix:/path``; port 0 takes a free one.
    listen: str = "127.0.0.1:0"
    #: The one model served; a request that names another gets vLLM's 404, a request that names none is served.
    model: str = "tiny"
    #: Milliseconds from a place among the running sequences to the first token (vLLM: prefill).
    ttft_ms: float = 0.0
    #: Tokens of the prompt computed in a second, before that time begins; 0: they cost nothing. What the prefix cache
    #: or another engine has is not computed.
    prefill_tokens_per_s: float = 0.0
    #: Blocks of 16 tokens (words) that the prefix cache holds; 0: none, and half of every prompt is said to be cached.
    prefix_cache_blocks: int = 0
    #: ``prompt_tokens_details`` in all usage, as vLLM's ``--enable-prompt-tokens-details``.
    prompt_tokens_details: bool = False
    #: Milliseconds of a decode step; 0: as fast as the machine goes. A 30B model on one card takes 15 to 30.
    step_ms: float = 0.0
    #: Share by which a step may be longer or shorter, 0 to 1, uniform; seeded, so that runs repeat.
    jitter: float = 0.0
    #: Requests decoded at once, as vLLM's ``--max-num-seqs`` (default there 256, too); more wait their turn.
    max_seqs: int = 256
    #: Tokens of an answer whose request sets no limit (vLLM: 16 for completions, the rest of the context for chat).
    max_tokens_default: int = 16
    #: How a split request is handed over (`relay_bench.engine.handover`), and which half comes here.
    connector: str = "nixl"
    role: str = "both"
    #: One more port, for other engines: the bootstrap server of mooncake and sglang (8998), the sockets of p2p_nccl
    #: (14579). 0: the first port is for them, too.
    kv_port: int = 0
    #: Longest wait for another engine; real ones wait up to 480 s, or without end.
    kv_patience_s: float = 30.0
    #: Seconds an idle connection stays open between requests; uvicorn's default. 0: never closed.
    keep_alive_s: float = 5.0
    #: Folder of recorded ``NAME.response.raw`` files for ``x-sim-play: NAME``; empty: none.
    captures: str = ""
    #: Usage for every request, in the syntax of ``x-sim-usage``; ``force`` is vLLM's --enable-force-include-usage.
    usage: str = ""
    #: Content of every token as `` SSSSS:TTTTTTTTTTTTTTT`` (its number, and CLOCK_MONOTONIC in µs when it was made), so
    #: that a load client can check order and measure the delay of each frame.
    stamp: bool = False
    #: One line per finished request on standard error.
    log: bool = False
