"""DIVER: successful rollouts get a reward for differing from their siblings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from rlrt_lightning.objective.methods.base import Method
from rlrt_lightning.objective.methods.grpo import GRPO

if TYPE_CHECKING:
    from sacrebleu.metrics import BLEU

_FORMULA = re.compile(r"\\\[(.*?)\\\]|\\\((.*?)\\\)|\$\$(.*?)\$\$|\$(.*?)\$", re.DOTALL)


@dataclass(frozen=True)
class DIVER(GRPO):
    """Diversity-incentivized exploration (arXiv:2509.26209): GRPO that adds scale * min(diversity, cap) to the rewards
    of successful rollouts before the advantages are computed.

    Args:
        scale: Reward for a diversity of 1.
        cap: Upper bound of the rewarded diversity.
        diversity: "bleu": 1 - the mean BLEU of the completion against each sibling's; "formulas": the fraction of the
            completion's formulas (between $ $, \\( \\) or \\[ \\]) that no sibling contains.
        tokenize: BLEU's tokenizer, a name from sacrebleu: "13a" for words, "char" for characters, "zh", ...
        steps: Number of optimizer steps during which diversity is rewarded; null for all steps.
        success_threshold: A reward of at least this counts as success (r = 1).
        normalize_std: Divide advantages by the group's standard deviation.
    """

    scale: float = 0.1
    cap: float = 1.0
    diversity: Literal["bleu", "formulas"] = "bleu"
    tokenize: str = "13a"
    steps: int | None = None
    success_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("scale", "cap"):
            if getattr(self, name) < 0:
                raise ValueError(f"DIVER.{name} is {getattr(self, name)}; it has to be 0 or more")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"DIVER.steps is {self.steps}; it has to be at least 1, or null")
        if self.diversity == "bleu":
            _bleu(self.tokenize)  # refuses an unknown tokenizer before the run

    def shape_rewards(self, rewards: Tensor, groups: Tensor, texts: Sequence[str]) -> Tensor:
        """See `Method.shape_rewards`."""
        shaped = rewards.clone()
        if self.scale == 0:
            return shaped
        members: dict[int, list[int]] = defaultdict(list)
        for i, group in enumerate(groups.tolist()):
            members[group].append(i)
        for i in self.successful(rewards).nonzero()[:, 0].tolist():
            siblings = [texts[j] for j in members[int(groups[i])] if j != i]
            if siblings:
                shaped[i] += self.scale * min(self._diversity(texts[i], siblings), self.cap)
        return shaped

    def _diversity(self, text: str, siblings: Sequence[str]) -> float:
        if self.diversity == "bleu":
            return 1 - fmean(_bleu(self.tokenize).sentence_score(text, [s]).score / 100 for s in siblings)
        own = _formulas(text)
        theirs = set().union(*map(_formulas, siblings))
        return len(own - theirs) / len(own) if own else 0.0

    def at(self, step: int) -> Method:
        """See `Method.at`."""
        return self if self.steps is None or step < self.steps else replace(self, scale=0.0)


@lru_cache
def _bleu(tokenize: str) -> BLEU:
    from sacrebleu.metrics import BLEU

    try:
        return BLEU(effective_order=True, tokenize=tokenize)
    except Exception as error:
        raise ValueError(f"DIVER.tokenize is {tokenize!r}: {error or 'unknown to sacrebleu'}") from None


def _formulas(text: str) -> set[str]:
    return {"".join("".join(found).split()) for found in _FORMULA.findall(text)} - {""}
