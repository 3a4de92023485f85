"""An engine's prefix cache, as vLLM has it: whole blocks of tokens, each known by itself and all before it. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

#: Tokens of a block: vLLM's default on GPUs.
BLOCK_TOKENS: Final = 16


class PrefixCache:
    """So many blocks; those not used for the longest time make room (vLLM ``v1/core/block_pool.py``).

    Blocks that a running request uses can make room here, too, which they cannot in vLLM: give it more of them.
    """

    def __init__(self, blocks: int) -> None:
        self._most = blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()  # by hash, the one used last at the end

    def __repr__(self) -> str:
        return f"<PrefixCache {len(self._blocks)} of {self._most} blocks>"

    def serve(self, prompt: Sequence[Hashable], answer: Sequence[Hashable] = ()) -> int:
        """A request: how many tokens of its prompt are found. Prompt and answer are in the cache behind it.

        Of a prompt that is there as a whole the last token is computed all the same, and with it its block.
        """
        found = 0
        for block in _hashes(prompt[:-1]):
            if block not in self._blocks:
                break
            found += BLOCK_TOKENS
        self.add([*prompt, *answer])
        return found

    def add(self, tokens: Sequence[Hashable]) -> None:
        """These have been computed."""
        # From the end on: what stands at the beginning is of use to more requests, and is the last to go.
        for block in reversed([*_hashes(tokens)]):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)


def _hashes(tokens: Sequence[Hashable]) -> Iterator[int]:
    """Of each whole block, with all before it."""
    before = 0
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        before = hash((before, *tokens[start : start + BLOCK_TOKENS]))
        yield before
