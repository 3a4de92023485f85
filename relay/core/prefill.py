"""The body of the prefill leg: the client's request, cut down to one token that nobody will read.

No two proxies agree on this rewrite, and each difference is somebody's bug. What holds here, for every route:

- **One token** in the one field that sets the limit on the route. A chat request may say it twice, and vLLM lets
  ``max_completion_tokens`` win, so that one goes; ``max_tokens`` is known to every engine, both at once not to all.
- **``min_tokens`` 1.** A prefill that ends on its first token being EOS has not ended "by length", and then
  vllm-ascend and vLLM's Mooncake connector (`request_finished`) give no handle: the decoder quietly computes the whole
  prompt again. A client's own ``min_tokens`` above 1 would be a 400. Engines ignore it where the route has no such
  field.
- **``stream`` false, no ``stream_options``**, which without a stream are a 400 (captured: `pd_err_prefill_*`). An
  answer in one piece has a true status.
- **No budget for thinking** on the Messages API, whose budgets must be below ``max_tokens`` (vLLM
  `anthropic/protocol.py`; only its prefill legs are let off, and only of late). A budget bounds what is generated; of
  all that ``thinking`` can say, only ``disabled`` is in the prompt, and that stays.
- **Nothing is stored** of a Responses API answer that nobody will ask for.

All else stays, byte by byte, though one token needs little of it. ``tools``, ``tool_choice``, ``response_format`` and
``chat_template_kwargs`` can become part of the prompt, by way of the chat template: without them the two legs would
compute different prompts, and the decoder would read keys and values of the wrong tokens. ``logprobs``,
``top_logprobs``, ``structured_outputs``, ``stop`` and the sampling parameters are not in the prompt, and cost one token
next to nothing; but a request that the decoder would refuse is better refused by the prefiller, before anything is
held for it, and whatever looks at one of them alone (``top_logprobs`` without ``logprobs``) would answer 400.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from relay.core.document import Change, Document
from relay.core.framing import Buffer
from relay.core.loose import UNDECODABLE
from relay.core.request import Route

#: Makes an answer come in one piece.
WHOLE: Final[Mapping[str, Change]] = {"stream": b"false", "stream_options": None}

_ONE_TOKEN: Final[Mapping[Route, Mapping[str, Change]]] = {
    Route.CHAT: {"max_tokens": b"1", "max_completion_tokens": None, "min_tokens": b"1", **WHOLE},
    Route.COMPLETIONS: {"max_tokens": b"1", "min_tokens": b"1", **WHOLE},
    Route.RESPONSES: {"max_output_tokens": b"1", "min_tokens": b"1", "store": b"false", **WHOLE},
    Route.MESSAGES: {"max_tokens": b"1", "min_tokens": b"1", **WHOLE},
}


def one_token(document: Document, route: Route, changes: Mapping[str, Change]) -> bytes:
    """The request for one token in one piece, with further `changes`; all else unchanged to the byte.

    Raises KeyError for a route that does not generate, and what `Document.edit` raises.
    """
    all_changes = {**_ONE_TOKEN[route], **changes}
    if route is Route.MESSAGES and _budgets_thinking(document.text):
        all_changes["thinking"] = None
    return document.edit(all_changes)


class _Thinking(msgspec.Struct, gc=False):
    type: str | None = None


class _Message(msgspec.Struct, gc=False):
    thinking: _Thinking | None = None


_decode_message = msgspec.json.Decoder(_Message).decode


def _budgets_thinking(body: Buffer) -> bool:
    try:
        thinking = _decode_message(body).thinking
    except UNDECODABLE:
        return False
    return thinking is not None and thinking.type == "enabled"


_NULL: Final = msgspec.Raw(b"null")


class _Shape(msgspec.Struct, gc=False):
    """What decides whether one prefill can serve a request; of any type, as the engine is the judge."""

    n: msgspec.Raw = _NULL
    best_of: msgspec.Raw = _NULL
    use_beam_search: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL
    prompt_embeds: msgspec.Raw = _NULL
    prompt_logprobs: msgspec.Raw = _NULL
    prompt_logprob_token_ids: msgspec.Raw = _NULL
    echo: msgspec.Raw = _NULL
    logprobs: msgspec.Raw = _NULL
    truncate_prompt_tokens: msgspec.Raw = _NULL
    truncation: msgspec.Raw = msgspec.Raw(b'"disabled"')
    background: msgspec.Raw = _NULL
    previous_response_id: msgspec.Raw = _NULL


_SHAPE: Final = frozenset(_Shape.__struct_fields__)
#: What nearly every other request comes to, but for its prompt.
_NOTHING: Final = _Shape()
_LIST_OF_PROMPTS: Final = re.compile(rb'\[[ \t\r\n]*+["\[]')
_decode_shape = msgspec.json.Decoder(_Shape).decode
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode

_ABSENT: Final = frozenset({b"null"})
_OFF: Final = frozenset({b"null", b"false"})

#: Values with which a member is in nobody's way. Any other value, also one of a wrong type, is.
_HARMLESS: Final[Mapping[str, frozenset[bytes]]] = {
    # A handle is read once. Two sequences would read it twice, the second time from blocks that may be somebody else's
    # by then (vllm#38900: the prefiller makes n children and answers with the handle of one).
    "n": frozenset({b"null", b"1"}),
    "best_of": frozenset({b"null", b"1"}),
    "use_beam_search": _OFF,
    # Embeddings have no token ids, by which the connectors count what there is to be read.
    "prompt_embeds": _ABSENT,
    # Log probabilities of the prompt exist only where the prompt is computed: the decoder computes it all, and reads
    # nothing (vLLM: `skip_reading_prefix_cache`).
    "prompt_logprobs": _ABSENT,
    "prompt_logprob_token_ids": _ABSENT,
    # How much of the prompt is cut off depends on `max_tokens`, in which the two legs differ.
    "truncation": frozenset({b'"disabled"'}),
    # State of one engine, unknown to the other; and an answer that is not there yet.
    "previous_response_id": _ABSENT,
    "background": _OFF,
}


def obstacle(document: Document) -> str | None:
    """The member for which a request cannot be split with one handle, such as ``n``; None: nothing is in the way.

    Never raises.
    """
    if document.has_none_of(_SHAPE):
        return None
    try:
        shape = _decode_shape(document.text)
    except UNDECODABLE:
        return None
    prompt, shape.prompt = shape.prompt, _NULL  # which every completion has
    if shape != _NOTHING:
        for name, harmless in _HARMLESS.items():
            if bytes(getattr(shape, name)) not in harmless:
                return name
    if _prompts(prompt) > 1:
        return "prompt"  # each prompt has a handle, and the answer holds the first one's (captured: comp_batch2)
    if bytes(shape.echo) not in _OFF and bytes(shape.logprobs) not in _ABSENT:
        return "echo"  # with logprobs: those of the prompt
    if bytes(shape.truncate_prompt_tokens).startswith(b"-"):
        return "truncate_prompt_tokens"  # "as much as fits": see truncation
    return None


def prompts(body: Buffer) -> int:
    """How many prompts a request holds: the length of a list of texts or of token lists, otherwise 1. Never raises."""
    try:
        return _prompts(_decode_shape(body).prompt)
    except UNDECODABLE:
        return 1


def _prompts(prompt: msgspec.Raw) -> int:
    # A list of numbers is one prompt, and can be long: not worth an object for each.
    return len(_decode_list(prompt)) if _LIST_OF_PROMPTS.match(prompt) else 1
