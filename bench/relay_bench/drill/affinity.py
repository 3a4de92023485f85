"""What affinity is for: how much of a conversation its engine still knows, by policy.

Conversations of several turns, each with the instructions of one of a few applications, go through the relay under one
policy after another. Which engine a turn went to is in the relay's record; what that engine would have found in its
prefix cache is computed here (`engine.prefix_cache`), turn by turn in the order they were sent.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from relay_bench.drill.client import Ask, Client, End, Outcome, examples
from relay_bench.drill.report import Report
from relay_bench.drill.rest import records_of
from relay_bench.drill.stage import Scene, stage
from relay_bench.engine.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from relay_bench.drill.stage import EngineChild, Stage

AFFINITIES: Final = ("prefix_affinity", "session_affinity")
OTHERS: Final = ("least_outstanding", "random")

#: The part of what one cache of that size for all could find that an affinity must find.
LEAST_SHARE: Final = 0.9
#: Different tokens; text of a word each.
_VOCABULARY: Final = 50_000


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet and its conversations; lengths in tokens."""

    engines: int = 4
    conversations: int = 160
    at_once: int = 48
    turns: range = range(4, 11)
    applications: int = 4
    instructions: int = 400
    question: range = range(20, 120)
    answer: range = range(50, 300)
    #: Of each engine's cache: enough for its part of the conversations at once, not for all of them.
    blocks: int = 1500
    #: An engine's time for an answer, and the longest that a client then thinks. Without a pause every conversation
    #: would return to the engine it has just left, which is the one with the least to do, by whatever policy.
    answer_ms: float = 40.0
    think_ms: float = 80.0
    seed: int = 0


FULL = Plan()
QUICK = Plan(engines=3, conversations=32, at_once=16, turns=range(4, 7), blocks=900, answer_ms=20.0, think_ms=40.0)


class Turn(msgspec.Struct, frozen=True):
    """One request of a conversation."""

    ask: Ask
    prompt: list[int]
    answer: list[int]
    think_s: float  #: before it is sent


async def drill(scene: Scene, plan: Plan = FULL) -> Report:
    """Holds the drill. Raises `DrillError`."""
    report = Report("affinity")
    conversations = draw(plan)
    turns = [turn for conversation in conversations for turn in conversation]
    best = found_share(turns, {}, plan.blocks * plan.engines)
    shares: dict[str, float] = {}
    async with stage(scene) as here:
        engines = await here.engines(plan.engines, "--ttft-ms", f"{plan.answer_ms:g}")
        for policy in (*AFFINITIES, *OTHERS):
            sent, upstreams = await _run(report, here, engines, policy, conversations, plan.at_once)
            shares[policy] = found_share(sent, upstreams, plan.blocks)
            most = max(Counter(upstreams.values()).values()) / len(upstreams) * plan.engines
            report.picture.append((policy, shares[policy], f"busiest engine {most:.2f} × the mean"))
    report.picture.append(("one cache for all", best, "conversation after conversation"))
    report.add("conversations", f"{len(conversations):,}, {plan.at_once} at once")
    report.add("turns, by each policy", len(turns))
    report.add("tokens of a prompt, on average", sum(len(turn.prompt) for turn in turns) // len(turns))
    report.add("blocks of cache, in each engine", plan.blocks)
    others = max(shares[policy] for policy in OTHERS)
    for policy in AFFINITIES:
        report.judge(
            f"{policy} finds {LEAST_SHARE:.0%} of what can be found, and more than without affinity",
            shares[policy] >= LEAST_SHARE * best and shares[policy] > others,
            f"{shares[policy]:.1%} of prompts' tokens, of {best:.1%}; without at most {others:.1%}",
        )
    return report


def draw(plan: Plan) -> list[list[Turn]]:
    """The conversations, turn by turn: each prompt is all that was said before, and a new question."""
    rng = random.Random(plan.seed)

    def words(number: int) -> list[int]:
        return [rng.randrange(_VOCABULARY) for _ in range(number)]

    applications = [words(plan.instructions) for _ in range(plan.applications)]
    conversations = []
    for number in range(plan.conversations):
        instructions = rng.choice(applications)
        said, messages = [*instructions], [_message("system", instructions)]
        turns = []
        for turn in range(rng.choice(plan.turns)):
            question, answer = words(rng.choice(plan.question)), words(rng.choice(plan.answer))
            said, messages = [*said, *question], [*messages, _message("user", question)]
            ask = Ask(id=f"{number}-{turn}", tokens=2, messages=tuple(messages), session=f"session-{number}")
            turns.append(Turn(ask, said, answer, rng.uniform(0, plan.think_ms) / 1000))
            said, messages = [*said, *answer], [*messages, _message("assistant", answer)]
        conversations.append(turns)
    return conversations


def _message(role: str, tokens: Iterable[int]) -> dict[str, str]:
    return {"role": role, "content": " ".join(f"w{token}" for token in tokens)}


def found_share(sent: Sequence[Turn], upstreams: Mapping[str, str], blocks: int) -> float:
    """The share of all prompts' tokens that is found in the caches of the engines they went to, by request id."""
    caches: dict[str, PrefixCache] = {}
    found = 0
    for turn in sent:
        cache = caches.setdefault(upstreams.get(turn.ask.id, ""), PrefixCache(blocks))
        found += cache.serve(turn.prompt, turn.answer)
    return found / sum(len(turn.prompt) for turn in sent)


async def _run(
    report: Report,
    here: Stage,
    engines: Sequence[EngineChild],
    policy: str,
    conversations: Sequence[Sequence[Turn]],
    at_once: int,
) -> tuple[list[Turn], dict[str, str]]:
    """All conversations under one policy: their turns as they were sent, and where each went."""
    relay = await here.relay(engines, {"pool.balance": f'"{policy}"'})
    sent: list[Turn] = []
    outcomes: list[Outcome] = []

    async def talk(left: Iterator[Sequence[Turn]]) -> None:
        with Client(relay.address) as client:
            for conversation in left:
                for turn in conversation:
                    await trio.sleep(turn.think_s)
                    sent.append(turn)
                    outcomes.append(await client.ask(turn.ask))

    left = iter(conversations)
    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(talk, left)
    failed = [outcome for outcome in outcomes if outcome.end is not End.WHOLE]
    report.judge(
        "all answers are whole", not failed, f"{examples(failed)} are not" + (f" under {policy}" if failed else "")
    )
    return sent, {record["id"]: record["upstream"] for record in await records_of(report, relay)}
