"""Tasks: problems, and verifiers that judge completions."""

from __future__ import annotations

from rlrt_lightning.tasks.base import Problem, Task, Verdict
from rlrt_lightning.tasks.dataset import DatasetTask
from rlrt_lightning.tasks.reasoning_gym import ReasoningGym
from rlrt_lightning.tasks.rewards import ExactMatch, MathReward, Reward
from rlrt_lightning.tasks.strategy_sum import StrategySum

__all__ = [
    "DatasetTask",
    "ExactMatch",
    "MathReward",
    "Problem",
    "ReasoningGym",
    "Reward",
    "StrategySum",
    "Task",
    "Verdict",
]
