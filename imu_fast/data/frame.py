"""What a tokenizer puts around a text, and what is there once although the text brings it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Frame:
    """The tokens around a text that are there once, though the text may bring them itself.

    Attributes:
        argument: of the tokenizer, which a text is. before, behind: what it puts there. end: what
            ends a text, the tokenizer's or ours; empty where there is no such token.
    """

    tokenizer: Any
    argument: str
    before: list[int]
    behind: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: Any, argument: str) -> Frame:
        """Found out by a text of one letter; ``argument``: ``"text"`` or ``"text_target"``."""
        whole = list(tokenizer(**{argument: "a"})["input_ids"])
        bare = list(tokenizer(**{argument: "a"}, add_special_tokens=False)["input_ids"])
        starts = [k for k in range(len(whole)) if whole[k : k + len(bare)] == bare]
        at = starts[-1] if starts and bare else None
        before, behind = ([], []) if at is None else (whole[:at], whole[at + len(bare) :])
        eos = tokenizer.eos_token_id
        return cls(tokenizer, argument, before, behind, behind or ([] if eos is None else [eos]))

    def begun(self, text: str) -> list[int]:
        """A text's tokens without those behind it."""
        ids = list(self.tokenizer(**{self.argument: text}, verbose=False)["input_ids"])
        return _without(ids[: len(ids) - len(self.behind)], self.before)

    def ended(self, ids: list[int]) -> list[int]:
        """With those that end it."""
        return ids if self.end and ids[-len(self.end) :] == self.end else [*ids, *self.end]

    def once(self, ids: list[int]) -> list[int]:
        """A tokenizer's own output."""
        return _without(_without(ids, self.before)[::-1], self.behind[::-1])[::-1]


def _without(ids: list[int], first: list[int]) -> list[int]:
    """Without the second ``first`` at the beginning."""
    n = len(first)
    return ids[n:] if n and ids[: 2 * n] == first * 2 else ids
