"""GRPO: every token gets the group advantage."""

from __future__ import annotations

from dataclasses import dataclass

from rlrt_lightning.objective.methods.base import Credit, Method, Signals


@dataclass(frozen=True)
class GRPO(Method):
    """Group relative policy optimization (arXiv:2402.03300): every token of a rollout gets its group advantage A.

    Args:
        normalize_std: Divide advantages by the group's standard deviation. False is Dr. GRPO (arXiv:2503.20783), the
            baseline in arXiv:2605.10781.
    """

    normalize_std: bool = False

    def credit(self, signals: Signals) -> Credit:
        """See `Method.credit`."""
        return Credit.plain(signals)
