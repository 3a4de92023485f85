"""What is read of usage outside of a meter."""

from __future__ import annotations

import pytest

from relay.core.usage import cached_tokens


@pytest.mark.parametrize(
    ("answer", "cached"),
    [
        (b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":7}}}', 7),
        (b'{"object":"response","usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":0}}}', 0),
        (b'{"type":"message","usage":{"input_tokens":2,"cache_read_input_tokens":7,"output_tokens":1}}', 7),
        (b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":null}}', None),
        (b'{"usage":{"prompt_tokens":9,"prompt_tokens_details":{}}}', None),
        (b'{"usage":null}', None),
        (b'{"usage":[]}', None),
        (b'{"usage":{"prompt_tokens_details":{"cached_tokens":"7"}}}', None),
        (b"{}", None),
        (b"[]", None),
        (b"", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
        (b'{"kv_transfer_params":{"remote_prefill_cached_tokens":3},"usage":{"prompt_tokens":9}}', None),
    ],
)
def test_cached_tokens_of_a_whole_answer(answer: bytes, cached: int | None) -> None:
    assert cached_tokens(answer) == cached
