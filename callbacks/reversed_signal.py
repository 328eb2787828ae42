"""Logs the asymmetry D_t between student and teacher as metrics, histograms and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image

from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.ranks import Mean, mean_over_ranks
from rlrt_lightning.runtime.run_files import claim_path

from .boards import log_picture, tensorboards
from .parts import data_of
from .signal_pages import link_pages, page_path
from .signal_picture import Picture, Scored, Token, draw, effects, html_page

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule
    from rlrt_lightning.module import RLRTModule

QUANTILES = (0.05, 0.5, 0.95)
TOWARDS = "the loss pulls the student towards the teacher"


class ReversedSignalLogger(Callback):
    """Logs D_t = log P_S - log P_T of each epoch's scored rollouts under `signal/`, and shows it token by token.

    Args:
        picture_every_n_epochs: Interval, in epochs and starting with the first, of pictures that show the correct
            rollouts with the largest |D_t|, one per problem, with each token coloured by D_t: `signal/epoch-N.html` and
            `.png` in the run's folder, with epochs counted from 1 and all of them linked in `signal/index.html`, and
            the image in TensorBoard, W&B and MLflow. 0 disables them.
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
        data = data_of(trainer)
        epoch, module = data.epoch, cast("RLRTModule", pl_module)
        if epoch is None:
            return
        if module.method.context != "none":
            self._log(trainer, data, epoch)
        folder = claim_path(trainer, "signal")
        every = self.picture_every_n_epochs
        if trainer.is_global_zero and every and trainer.current_epoch % every == 0:
            title = f"{type(module.method).__name__}, epoch {trainer.current_epoch + 1}"
            title += f", training reward {data.rollout_metrics['rollout/reward']:.2f}"
            _publish(trainer, make_picture(module, epoch, title, self.rollouts), folder)

    def _log(self, trainer: Trainer, data: RolloutDataModule, epoch: EpochRecord) -> None:
        data.rollout_metrics |= mean_over_ranks(signal_statistics(epoch))
        if trainer.is_global_zero and epoch.has_context.any():
            scored = epoch.mask & epoch.has_context[:, None]
            for board in tensorboards(trainer):
                board.add_histogram("signal/asymmetry", epoch.credit.asymmetry[scored].numpy(), trainer.global_step)


def _publish(trainer: Trainer, picture: Picture, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    epoch, image = trainer.current_epoch + 1, draw(picture)
    page = page_path(folder, epoch)
    page.write_text(html_page(picture), encoding="utf-8")
    Image.fromarray(image).save(page.with_suffix(".png"))
    link_pages(folder, epoch)
    log_picture(trainer, "signal/rollouts", image, trainer.global_step)


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
        for name, chosen in (("selected", credit.selected), ("thoughts", epoch.thoughts)):
            if chosen is not None:
                stats[f"signal/{name}"] = Mean(float(chosen[scored].float().mean()), len(weights))
    return stats | _contrast_statistics(epoch)


def _contrast_statistics(epoch: EpochRecord) -> dict[str, float]:
    """Statistics of the contrast e_t with failed siblings, by tag; empty if the method has none."""
    contrast, valid = epoch.credit.contrast, epoch.wrong_valid
    if contrast is None or valid is None:
        return {}
    both = epoch.has_context & valid.any(-1)
    stats: dict[str, float] = {"signal/contrasted": float(both.float().mean())}
    for name, rows in (("correct", both & epoch.correct), ("wrong", both & ~epoch.correct)):
        values = contrast[epoch.mask & rows[:, None]]
        if len(values):
            stats[f"signal/contrast_{name}"] = Mean(float(values.mean()), len(values))
    return stats


def _quantiles(values: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    ranked = values.sort().values  # torch.quantile refuses more than 2^24 values
    return ranked[(cuts * (len(ranked) - 1)).round().long()]


def choose(epoch: EpochRecord, count: int) -> list[int]:
    """The correct rollouts with the largest |D_t| of a scored token, one per problem, sorted by it. If the teacher
    scored none of the correct rollouts, the first correct rollout of each problem.

    Args:
        epoch: The epoch's rollouts with their credit.
        count: The largest number of rollouts.

    Returns:
        Indices of rollouts.
    """
    correct = epoch.correct & epoch.nonempty
    scored = correct & epoch.has_context
    rows = (scored if scored.any() else correct).nonzero()[:, 0].tolist()
    of_problem: dict[int, int] = {}
    for i in sorted(rows, key=lambda i: -float(epoch.credit.asymmetry[i].abs().max())):
        of_problem.setdefault(epoch.rollouts[i].group, i)
    return list(of_problem.values())[:count]


def make_picture(module: RLRTModule, epoch: EpochRecord, title: str, count: int) -> Picture:
    """Chooses and describes the rollouts of a picture.

    Args:
        module: The module, with its method and policy.
        epoch: The epoch's rollouts with their credit.
        title: Title of the picture.
        count: The largest number of rollouts.
    """
    rows = choose(epoch, count)
    shown = [describe(module, epoch, i) for i in rows]
    pull = epoch.credit.distillation
    pulls = pull is not None and bool(pull[rows].any())
    against, with_teacher = (meaning and (TOWARDS if pulls else meaning) for meaning in effects(shown))
    return Picture(title, _remark(module, shown), against, with_teacher, shown)


def _remark(module: RLRTModule, shown: list[Scored]) -> str:
    """One or two sentences below the title: how the rollouts were chosen, and why nothing is coloured if so."""
    if not shown:
        return "No rollout of this epoch was correct."
    if any(rollout.strongest for rollout in shown):
        return "Correct rollouts, one per problem, with the largest |D|, D = log P_student - log P_teacher."
    if module.method.context == "none":
        reason = "This method has no teacher, so nothing is coloured."
    elif shown[0].context is None:
        reason = "The teacher scored none of them, so nothing is coloured."
    else:
        reason = "Student and teacher agree on every word, so nothing is coloured."
    return f"Correct rollouts, one per problem. {reason}"


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
    return Scored(problem.id, problem.question, epoch.contexts[row], float(epoch.advantages[row]), tokens)
