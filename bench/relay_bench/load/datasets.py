"""What is asked: request bodies, made before the run.

There is no tokenizer here, on purpose: it would bring transformers along, and the engine counts exactly. Synthetic
prompts are common short words, of which most tokenizers make one token each; what a prompt really took is in the
answer's usage, and that is what the results report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from relay.core.request import Route, peek
from relay_bench.load.lengths import Lengths, parse_lengths

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence

    from relay_bench.load.schedule import TraceEntry

T = TypeVar("T")

#: Words that are one token in the usual vocabularies, with the blank before them.
WORDS: Final = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company",
    "system", "program", "question", "work", "government", "number", "night", "point", "home", "water", "room",
    "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word",
    "business", "issue", "side", "kind", "head", "house", "service", "friend", "father", "power", "hour", "game",
    "line", "end", "member", "law", "car", "city", "community", "name", "team", "minute", "idea", "body",
    "information", "back", "parent", "face", "others", "level", "office", "door", "health", "person", "art", "war",
    "history", "party", "result", "change", "morning", "reason", "research", "girl",
)  # fmt: skip

#: Characters a token of English text takes on average; for files that come without counts.
_CHARS_PER_TOKEN: Final = 4

ENDPOINTS: Final = {
    Route.CHAT: "/v1/chat/completions",
    Route.COMPLETIONS: "/v1/completions",
    Route.RESPONSES: "/v1/responses",
    Route.MESSAGES: "/v1/messages",
}


class Ask(msgspec.Struct, frozen=True):
    """A request before it has a form: turns of a conversation, the user's first, and how long an answer may be."""

    turns: tuple[str, ...]
    output_len: int


class Body(msgspec.Struct, frozen=True):
    """A request's bytes, and what answer is expected of it."""

    body: bytes
    #: tokens asked for, over all choices; None: the body sets no limit
    output_len: int | None = None


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """What all bodies of a run have in common."""

    route: Route
    model: str
    continuous_usage: bool = False
    ignore_eos: bool = False
    #: sampling parameters and ``--extra-body``; they win over what is made here
    extra: dict[str, Any] = {}

    def body(self, ask: Ask) -> Body:
        """The body of one request."""
        fields: dict[str, Any] = {"model": self.model, "stream": True}
        roles = ("user", "assistant")
        messages = [{"role": roles[at % 2], "content": text} for at, text in enumerate(ask.turns)]
        if self.route is Route.CHAT:
            limit = "max_tokens" if "max_tokens" in self.extra else "max_completion_tokens"  # engines prefer the latter
            fields |= {"messages": messages, limit: ask.output_len}
        elif self.route is Route.COMPLETIONS:
            fields |= {"prompt": "\n".join(ask.turns), "max_tokens": ask.output_len}
        elif self.route is Route.RESPONSES:
            fields |= {"input": messages, "max_output_tokens": ask.output_len}
        else:
            fields |= {"messages": messages, "max_tokens": ask.output_len}
        if self.route in (Route.CHAT, Route.COMPLETIONS):
            fields["stream_options"] = {"include_usage": True}
            if self.continuous_usage:
                fields["stream_options"]["continuous_usage_stats"] = True
        if self.ignore_eos:
            fields["ignore_eos"] = True
        fields |= self.extra
        return _body_of(msgspec.json.encode(fields))


def _body_of(raw: bytes) -> Body:
    """A body with the answer that its own fields ask for."""
    facts = peek(raw)
    return Body(raw, None if facts.max_tokens is None else facts.max_tokens * (facts.n or 1))


class Synthetic(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths by distribution, prefixes shared, conversations of several turns.

    A conversation's later turns hold the earlier ones with stand-ins for the answers, so prefix caches see what they
    would see; a turn does not wait for the answer to the one before, which would close the loop.
    """

    input_len: Lengths = parse_lengths("1024")
    output_len: Lengths = parse_lengths("128")
    prefix_len: int = 0
    num_prefixes: int = 1  #: different prefixes, drawn for each conversation
    turns: Lengths = parse_lengths("1")

    def asks(self, total: int, rng: random.Random, words: random.Random, trace: Sequence[TraceEntry] = ()) -> list[Ask]:
        """`total` requests; turns of one conversation in their order, spread among those of others.

        `rng` decides everything but which words there are: the same load can be put in other words, which no prefix
        cache has seen. A `trace` that knows its lengths gives each request its own instead.
        """
        prefixes = [_words(self.prefix_len, words) for _ in range(self.num_prefixes)]
        if any(entry.input_len or entry.output_len for entry in trace):
            return [self._traced(entry, rng, words) for entry in trace]
        if self.turns == parse_lengths("1"):
            return [self._conversation(1, prefixes, rng, words)[0] for _ in range(total)]
        conversations: list[list[Ask]] = []
        left = total
        while left > 0:
            conversation = self._conversation(min(self.turns.draw(rng), left), prefixes, rng, words)
            conversations.append(conversation)
            left -= len(conversation)
        # each turn has a place between 0 and 1; sorting a conversation's own places keeps its order
        places = [
            (place, ask)
            for conversation in conversations
            for place, ask in zip(sorted(rng.random() for _ in conversation), conversation, strict=True)
        ]
        places.sort(key=lambda placed: placed[0])
        return [ask for _, ask in places]

    def _traced(self, entry: TraceEntry, rng: random.Random, words: random.Random) -> Ask:
        prompt = _words(entry.input_len or self.input_len.draw(rng), words)
        return Ask((prompt,), entry.output_len or self.output_len.draw(rng))

    def _conversation(self, turns: int, prefixes: list[str], rng: random.Random, words: random.Random) -> list[Ask]:
        prefix = rng.choice(prefixes)
        said: tuple[str, ...] = ()
        asks = []
        for turn in range(turns):
            text = _words(self.input_len.draw(rng), words)
            said = (*said, f"{prefix} {text}" if prefix and not turn else text)
            output_len = self.output_len.draw(rng)
            asks.append(Ask(said, output_len))
            said = (*said, _words(output_len, words))
        return asks


def _words(number: int, rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=number))


def read_sharegpt(path: str, total: int, rng: random.Random, *, output_len: int | None) -> list[Ask]:
    """`total` first turns of the conversations of a ShareGPT-format file, shuffled, repeated where it has too few.

    An answer is as long as the file's, at four characters a token, or `output_len`. Raises `ValueError`.
    """
    try:
        entries = json.loads(Path(path).read_bytes())
        found = []
        for entry in entries:
            turns = [turn["value"] for turn in entry.get("conversations") or entry.get("conversation") or ()]
            if len(turns) >= 2 and turns[0].strip():
                found.append(Ask((turns[0],), output_len or max(1, len(turns[1]) // _CHARS_PER_TOKEN)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{path}: not a ShareGPT file (a list of objects with `conversations`): {error!r}"
        raise ValueError(message) from None
    if not found:
        raise ValueError(f"{path}: no conversation of two turns")
    rng.shuffle(found)
    return _repeated(found, total)


def read_custom(path: str, total: int, *, output_len: int | None) -> list[Ask]:
    """vLLM's ``custom`` dataset: JSON lines of ``{"prompt": …, "output_tokens": …}``. Raises `ValueError`."""
    asks = []
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
            asks.append(Ask((str(entry["prompt"]),), int(output_len or entry.get("output_tokens") or 128)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: wanted an object with `prompt`: {error!r}") from None
    if not asks:
        raise ValueError(f"{path}: empty")
    return _repeated(asks, total)


def read_bodies(path: str, total: int) -> list[Body]:
    """JSON lines of whole request bodies, sent byte for byte. Raises `ValueError`."""
    bodies = []
    for number, line in _lines(path):
        raw = line.encode()
        facts = peek(raw)
        if not facts.is_json:
            raise ValueError(f"{path}:{number}: not JSON")
        if not facts.wants_stream:
            raise ValueError(f'{path}:{number}: "stream" is not true, and there is no latency without a stream')
        bodies.append(_body_of(raw))
    if not bodies:
        raise ValueError(f"{path}: empty")
    return _repeated(bodies, total)


def _lines(path: str) -> Iterable[tuple[int, str]]:
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _repeated(items: Sequence[T], total: int) -> list[T]:
    return [items[at % len(items)] for at in range(total)]
