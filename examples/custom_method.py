"""RLRT on the first tokens of a response only, as a method of your own.

python -m rlrt_lightning fit --config configs/rlrt.yaml --model.method=examples.custom_method.FirstTokens \
  --model.method.tokens=4
"""

from dataclasses import dataclass, replace

import torch

from rlrt_lightning import RLRT, Credit, Signals


@dataclass(frozen=True)
class FirstTokens(RLRT):
    """RLRT on the first tokens of a response, where the strategy is chosen; GRPO's credit on the others.

    Args:
        tokens: Number of tokens.
    """

    tokens: int = 8

    def credit(self, signals: Signals) -> Credit:
        """See `Method.credit`."""
        credit, plain = super().credit(signals), Credit.plain(signals)
        early = torch.arange(signals.mask.shape[1]) < self.tokens
        return replace(
            credit,
            advantages=torch.where(early, credit.advantages, plain.advantages),
            weights=torch.where(early, credit.weights, plain.weights),
        )
