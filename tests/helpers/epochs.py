"""Short training runs in this process, and random epoch records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, Trainer

from rlrt_lightning import (
    RLRT,
    Policy,
    Problem,
    RLRTModule,
    Rollout,
    RolloutDataModule,
    Sampling,
    Task,
    Teacher,
    Verdict,
)
from rlrt_lightning.callbacks import TeacherRefresh
from rlrt_lightning.epoch.record import EpochRecord, Questions
from rlrt_lightning.objective import SRPO, Method, group_advantages
from rlrt_lightning.policy.padding import pad_rows
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE
from rlrt_lightning.teacher import TeacherScore


class RuleTask(Task):
    """A few problems whose completions are judged by a function.

    Args:
        rule: Takes a completion; a true result is correct.
        size: Number of problems.
    """

    isolated = False

    def __init__(self, rule: Any, size: int = 7) -> None:
        self.rule, self.size = rule, size

    def problems(self, split: str) -> Sequence[Problem]:
        words = "tea 1 milk 2 eggs 3 rice".split()
        return [Problem(f"p{i}", " ".join(words[: 4 + i % 4]), "6") for i in range(self.size)]

    def verify(self, problem: Problem, completion: str) -> Verdict:
        outcome = self.rule(completion)
        return Verdict(float(outcome), bool(outcome))


class Recorder(TeacherRefresh):
    """Keeps each epoch's record and metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[Any] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs.append(trainer.datamodule.epoch)
        self.metrics.append(dict(trainer.datamodule.rollout_metrics))


def fit_and_record(
    folder: Path,
    task: Task,
    epochs: int = 1,
    method: Method = RLRT(),
    accumulate: int = 1,
    callbacks: Sequence[Callback] = (),
    optimizer: Any = lambda p: torch.optim.SGD(p, lr=0.1),
    policy: Policy | None = None,
    scored_by: Literal["trainer", "engine"] = "trainer",
    precision: Any = "32-true",
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Recorder, RLRTModule]:
    """Trains, and returns what was recorded and the trained module; `model` has further settings of the module, and
    `settings` are those of the data module."""
    settings = {"prompts_per_epoch": 4, "rollouts_per_prompt": 4, "sampling": Sampling(max_new_tokens=32), **settings}
    data = RolloutDataModule(task=task, benchmarks={}, **settings)
    module = RLRTModule(
        policy=policy or Policy(),
        method=method,
        optimizer=optimizer,
        **{"teacher": Teacher(TEACHER_TEMPLATE, scored_by=scored_by), **(model or {})},
    )
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[recorder, *callbacks],
        reload_dataloaders_every_n_epochs=1,
        accumulate_grad_batches=accumulate,
        precision=precision,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return recorder, module


def weights_changed(module: RLRTModule) -> bool:
    """Whether training has changed a weight of the embedded policy."""
    start = Policy()
    start.load()
    return any(not torch.equal(a, b) for a, b in zip(start.parameters(), module.policy.parameters(), strict=True))


def random_epoch_record(seed: int = 0, prompts: int = 4, k: int = 3) -> EpochRecord:
    """An epoch of random tokens, log-probs and rewards with RLRT's credit; `k` rollouts for each prompt."""
    g = torch.Generator().manual_seed(seed)
    rollouts = []
    for group in range(prompts):
        prompt = torch.randint(2, 28, (int(torch.randint(1, 6, (), generator=g)),), generator=g).tolist()
        for index in range(k):
            response = torch.randint(2, 28, (int(torch.randint(1, 9, (), generator=g)),), generator=g).tolist()
            logp = -3 * torch.rand(len(response), generator=g)
            rollouts.append(Rollout(group, index, prompt, response, logp, False, ""))
    rewards = torch.randint(0, 2, (prompts * k,), generator=g).float()
    rewards[:k] = 1.0  # a group without advantage
    groups = torch.tensor([r.group for r in rollouts])
    mask = pad_rows([torch.ones(len(r.response_ids)) for r in rollouts]).bool()
    old = pad_rows([r.logp_sampler for r in rollouts])
    teacher = -3 * torch.rand(old.shape, generator=g)
    a = group_advantages(rewards, groups)
    credit = RLRT()(a, rewards, old, teacher, mask, torch.ones(len(rewards)))
    problems = [Problem(str(i), "") for i in range(prompts)]
    every = torch.ones(len(rewards), dtype=torch.bool)
    return EpochRecord(
        questions=Questions(0, problems, [], [], range(prompts)),
        rollouts=rollouts,
        groups=groups,
        rewards=rewards,
        shaped_rewards=rewards,
        advantages=a,
        mask=mask,
        logp_sampler=old,
        logp_old=old,
        logp_student=old,
        logp_teacher=teacher,
        trainable=every,
        rescored=~every,
        contexts=[""] * len(rewards),
        teacher=[None] * len(rewards),
        contexts_truncated=0,
        unusable=~every,
        faults={},
        importance=mask.float(),
        credit=credit,
    )


def record_of_rank(data: EpochRecord, rank: int, ranks: int) -> EpochRecord:
    """The part of an epoch's groups that one of several ranks holds."""
    kept = [i for i, r in enumerate(data.rollouts) if r.group % ranks == rank]

    def own(values: Any) -> dict[str, Any]:
        return {
            name: [value[i] for i in kept] if isinstance(value, list) else value[kept]
            for name, value in vars(values).items()
            if isinstance(value, (list, torch.Tensor))
        }

    of_rows = own(data)
    of_rows["rollouts"] = [Rollout(**{**vars(r), "group": r.group // ranks}) for r in of_rows["rollouts"]]
    questions = replace(data.questions, problems=data.problems[rank::ranks])
    return replace(data, **of_rows, questions=questions, credit=replace(data.credit, **own(data.credit)))


def with_srpo_credit(data: EpochRecord, k: int) -> EpochRecord:
    """Sets random top-k teacher scores on the wrong rollouts, and SRPO's credit on all."""
    g = torch.Generator().manual_seed(1)
    data.teacher = [
        TeacherScore(
            logp=-torch.rand(len(r.response_ids), generator=g),
            entropy=torch.rand(len(r.response_ids), generator=g),
            top_tokens=torch.stack([torch.randperm(28, generator=g)[:k] for _ in r.response_ids]).int(),
            top_logp=(-6 - torch.rand(len(r.response_ids), k, generator=g)),
        )
        if reward == 0
        else None
        for r, reward in zip(data.rollouts, data.rewards.tolist(), strict=True)
    ]
    entropies = pad_rows([s.entropy if s else None for s in data.teacher], data.mask.shape[1])
    has_context = torch.tensor([s is not None for s in data.teacher])
    signals = data.advantages, data.rewards, data.logp_old, data.logp_teacher, data.mask, has_context
    data.credit = SRPO()(*signals, teacher_entropy=entropies)
    return data
