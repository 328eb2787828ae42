"""Logs the asymmetry D_t between student and teacher as metrics, histograms and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.ranks import Mean, mean_over_ranks
from rlrt_lightning.runtime.run_files import claim_path

from .boards import tensorboards
from .signal_picture import Scored, Token, draw, html_page

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule
    from rlrt_lightning.module import RLRTModule

QUANTILES = (0.05, 0.5, 0.95)


class ReversedSignalLogger(Callback):
    """Logs D_t = log P_S - log P_T of each epoch's scored rollouts under `signal/`, and shows it token by token.

    Args:
        picture_every_n_epochs: Interval, in epochs and starting with the first, of pictures that show a few correct
            rollouts with each token coloured by D_t: an image in TensorBoard, and `signal/epoch-N.html` in the run's
            folder. 0 disables them.
        rollouts: Number of rollouts in a picture.
    """

    def __init__(self, picture_every_n_epochs: int = 10, rollouts: int = 6) -> None:
        if picture_every_n_epochs < 0:
            raise ConfigError(
                f"reversed_signal.picture_every_n_epochs is {picture_every_n_epochs}; it has to be 0 or more"
            )
        if rollouts < 1:
            raise ConfigError(f"reversed_signal.rollouts is {rollouts}; it has to be at least 1")
        self.picture_every_n_epochs = picture_every_n_epochs
        self.rollouts = rollouts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that no other run's pictures would be overwritten."""
        if stage == "fit":
            claim_path(trainer, "signal")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's signal before training on it."""
        data = cast("RolloutDataModule", cast(Any, trainer).datamodule)
        epoch = data.epoch
        module = cast("RLRTModule", pl_module)
        if epoch is None or module.method.context == "none":
            return
        data.rollout_metrics |= mean_over_ranks(signal_statistics(epoch))
        folder = claim_path(trainer, "signal")
        if not trainer.is_global_zero or not epoch.has_context.any():
            return
        scored = epoch.mask & epoch.has_context[:, None]
        for board in tensorboards(trainer):
            board.add_histogram("signal/asymmetry", epoch.credit.asymmetry[scored].numpy(), trainer.global_step)
        if self.picture_every_n_epochs and trainer.current_epoch % self.picture_every_n_epochs == 0:
            self._picture(trainer, module, epoch, folder)

    def _picture(self, trainer: Trainer, module: RLRTModule, epoch: EpochRecord, folder: Path) -> None:
        shown = (epoch.has_context & epoch.correct).nonzero()[:, 0].tolist()
        # One rollout per problem, sorted by the largest D_t.
        shown.sort(key=lambda i: -float(epoch.credit.asymmetry[i].max()))
        of_problem: dict[int, int] = {}
        for i in shown:
            of_problem.setdefault(epoch.rollouts[i].group, i)
        scored = [describe(module, epoch, i) for i in list(of_problem.values())[: self.rollouts]]
        if not scored:
            return
        folder.mkdir(parents=True, exist_ok=True)
        title = f"Epoch {trainer.current_epoch}"
        (folder / f"epoch-{trainer.current_epoch}.html").write_text(html_page(title, scored), encoding="utf-8")
        for board in tensorboards(trainer):
            board.add_image("signal/rollouts", draw(title, scored), trainer.global_step, dataformats="HWC")


def signal_statistics(epoch: EpochRecord) -> dict[str, float]:
    """Statistics of D_t and of the token weights of an epoch, by tag. Shares of tokens are relative to scored tokens.

    Args:
        epoch: The epoch's rollouts with their credit.
    """
    credit, context, correct = epoch.credit, epoch.has_context, epoch.correct
    solved = int(correct.sum())
    stats = {
        "signal/context": float(context.float().mean()),
        "signal/context_of_correct": Mean(float((context & correct).sum()) / max(solved, 1), solved),
    }
    for name, rows in (("correct", context & correct), ("wrong", context & ~correct)):
        values = credit.asymmetry[epoch.mask & rows[:, None]]
        if len(values):
            stats[f"signal/asymmetry_{name}"] = Mean(float(values.mean()), len(values))
            cuts = torch.tensor(QUANTILES)
            for q, value in zip(QUANTILES, _quantiles(values, cuts).tolist(), strict=True):
                stats[f"signal/asymmetry_{name}_p{round(100 * q):02d}"] = Mean(value, len(values))
    scored = epoch.mask & context[:, None]
    weights = credit.weights[scored]
    if len(weights):
        advantages = epoch.advantages[:, None].expand_as(epoch.mask)[scored].abs().mean()
        stats["signal/up_weighted"] = Mean(float((weights > 1).float().mean()), len(weights))
        stats["signal/down_weighted"] = Mean(float((weights < 1).float().mean()), len(weights))
        if advantages > 0:
            # Far from 1, the method changes the size of the step as well as its direction.
            stats["signal/effective_advantage"] = Mean(
                float(credit.advantages[scored].abs().mean() / advantages), float(advantages) * len(weights)
            )
        if credit.weight_bounds is not None:
            clipped = weights.clamp(*credit.weight_bounds)
            stats["signal/weight_mean"] = Mean(float(clipped.mean()), len(weights))
            stats["signal/clipped"] = Mean(float((clipped != weights).float().mean()), len(weights))
    return stats


def _quantiles(values: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    ranked = values.sort().values  # torch.quantile refuses more than 2^24 values
    return ranked[(cuts * (len(ranked) - 1)).round().long()]


def describe(module: RLRTModule, epoch: EpochRecord, row: int) -> Scored:
    """Collects a scored rollout's tokens and their values for a picture."""
    rollout, policy = epoch.rollouts[row], module.policy
    problem = epoch.problems[rollout.group]
    tokens = [
        Token(
            text=str(policy.tokenizer.decode([token], clean_up_tokenization_spaces=False)),
            asymmetry=float(epoch.credit.asymmetry[row, t]),
            logp_student=float(epoch.logp_student[row, t]),
            logp_teacher=float(epoch.logp_teacher[row, t]),
            weight=float(epoch.credit.weights[row, t]),
            advantage=float(epoch.credit.advantages[row, t]),
        )
        for t, token in enumerate(rollout.response_ids)
    ]
    return Scored(problem.id, problem.question, epoch.contexts[row] or "", float(epoch.advantages[row]), tokens)
