"""Tasks: problems, and verifiers that judge completions."""

from __future__ import annotations

from rlrt_lightning.tasks.base import Problem, Task, Verdict
from rlrt_lightning.tasks.dataset import DatasetTask
from rlrt_lightning.tasks.last_digit import LastDigit
from rlrt_lightning.tasks.reasoning_gym import ReasoningGym
from rlrt_lightning.tasks.rewards import ExactMatch, MathReward, Reward

__all__ = [
    "DatasetTask",
    "ExactMatch",
    "LastDigit",
    "MathReward",
    "Problem",
    "ReasoningGym",
    "Reward",
    "Task",
    "Verdict",
]
