"""The Lightning module: policy, teacher and method, and the step that trains the policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from rlrt_lightning import resume
from rlrt_lightning.epoch.batch import MicroBatch
from rlrt_lightning.objective import (
    RLRT,
    Aggregation,
    Importance,
    Method,
    clipped_surrogate,
    distillation_loss,
    divergence_on_support,
    token_mean,
)
from rlrt_lightning.objective.ratios import kl_estimate, log_ratio
from rlrt_lightning.policy.log_probs import log_probs_at
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.padding import at_mask
from rlrt_lightning.policy.sharding import FSDP2Strategy, check_strategy, whole
from rlrt_lightning.runtime.errors import ConfigError, check_ranges
from rlrt_lightning.runtime.optimizers import OptimizerFactory, SharedFactory, WarmUp, keep_settings
from rlrt_lightning.runtime.stopping import WholeEpochs
from rlrt_lightning.teacher import Teacher


@dataclass(frozen=True)
class StepReport:
    """An optimizer step.

    Args:
        gradient_norm: Before clipping, over all ranks.
        learning_rate: That of the first group of weights.
        skipped: Whether it was not taken, because the gradient was not finite.
    """

    gradient_norm: float
    learning_rate: float
    skipped: bool


class RLRTModule(LightningModule):
    """Trains a policy on rollouts with token advantages.

    Args:
        policy: The language model that is trained.
        teacher: Whose weights score the rollouts, and with what context.
        method: How advantages are spread over tokens: GRPO, RLRT, RLSD, SDPO, SRPO, EntropyBonus, DIVER, or a class
            of your own.
        clip_low: The ratio to the rollout policy may fall to 1 - clip_low before a token's gradient stops.
        clip_high: The ratio may rise to 1 + clip_high before a token's gradient stops.
        dual_clip: Bounds the loss of tokens with a negative advantage at dual_clip * |A|; null for no bound.
        aggregation: token-mean weighs all tokens of a mini-batch the same; seq-mean-token-mean averages within each
            rollout first.
        importance: Where the trainer rescores the rollouts (`data.rescore`), all that a token adds to the loss
            (surrogate, divergence to the teacher, entropy bonus) is weighted by min(P_trainer / P_sampler,
            importance_cap): for each token, for the whole sequence, or off.
        importance_cap: Upper limit of that weight; the paper has 2.
        optimizer: Class path and settings of the optimizer; the paper has AdamW with lr 1e-6.
        warmup_steps: Optimizer steps over which the learning rate rises linearly to its constant value.
        allow_changes: Settings that may differ from those of the checkpoint when a run is resumed (`--ckpt_path`), such
            as [data.seed, model.method]; each stands for all settings below it. Settings of the optimizer (not its
            class), trainer, engine, checkpoints and evaluation may always change.
    """

    def __init__(
        self,
        policy: Policy,
        teacher: Teacher,
        method: Method = RLRT(),
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        dual_clip: float | None = None,
        aggregation: Aggregation = "token-mean",
        importance: Importance = "token",
        importance_cap: float = 2.0,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6),
        warmup_steps: int = 10,
        allow_changes: list[str] | None = None,
    ) -> None:
        super().__init__()
        check_ranges(
            "model",
            {
                "clip_low": (clip_low, 0 <= clip_low < 1, "from 0 to below 1"),
                "clip_high": (clip_high, clip_high >= 0, "0 or more"),
                "dual_clip": (dual_clip, dual_clip is None or 1 < dual_clip < math.inf, "above 1, or null"),
                "warmup_steps": (warmup_steps, warmup_steps >= 0, "0 or more"),
                "importance_cap": (importance_cap, importance_cap >= 1, "at least 1"),
            },
        )
        self.policy = policy
        self.method = method
        self.teacher = teacher
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.aggregation: Aggregation = aggregation
        self.importance: Importance = importance
        self.importance_cap = importance_cap
        self.optimizer_factory = SharedFactory(optimizer)
        self.warmup_steps = warmup_steps
        self.allow_changes = allow_changes
        self._whole_epochs = WholeEpochs()
        self.steps: list[StepReport] = []
        """Optimizer steps that no callback has taken note of yet (`EpochMetrics`)."""
        self.skipped = False
        """Whether the newest optimizer step was skipped, because its gradient was not finite."""

    # -- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
        """One forward pass over a micro-batch.

        Returns:
            `loss`, a share of the mean over the mini-batch, and `metrics` of the micro-batch: a mean for each tag, and
            how many values it is the mean of.
        """
        logp, entropy, divergence = self._token_values(batch)
        surrogate = clipped_surrogate(
            logp,
            batch.logp_old,
            batch.advantages,
            batch.response_mask,
            self.clip_low,
            self.clip_high,
            self.dual_clip,
            self.aggregation,
            batch.importance,
        )
        loss = surrogate.loss
        tokens = int(batch.response_mask.sum())
        metrics = {
            "train/clip_fraction": (surrogate.clip_fraction, tokens),
            "train/entropy": (entropy.detach().sum() / max(tokens, 1), tokens),
            "train/kl": (_kl(logp.detach(), batch), tokens),
        }
        if divergence is not None:
            assert batch.distillation is not None
            loss = loss + distillation_loss(
                divergence,
                logp,
                batch.logp_old,
                batch.distillation,
                batch.response_mask,
                batch.distillation_cap,
                self.aggregation,
                batch.importance,
            )
            distilled = batch.distillation != 0
            mean = (divergence.detach() * distilled).sum() / distilled.sum().clamp(min=1)
            metrics["train/divergence"] = mean, int(distilled.sum())
        if batch.entropy_bonus is not None:
            bonus = batch.importance * batch.entropy_bonus * entropy
            loss = loss - token_mean(bonus, batch.response_mask, self.aggregation)
        loss = loss * batch.share
        # What only stands in, so that this rank takes the step with the others, is not trained on.
        metrics = {tag: (mean, count if batch.share else 0) for tag, (mean, count) in metrics.items()}
        return {"loss": loss, "metrics": {**metrics, "train/loss": (loss.detach(), 1)}}

    def _token_values(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies of the response tokens and, where the method distils, the divergence between student
        and teacher: [B, T] each, nats, 0 outside the response."""
        sequences = batch.input_ids, batch.attention_mask, batch.response_mask, batch.temperature
        if batch.top_tokens is None or batch.top_logp is None:
            return *self.policy.log_probs(*sequences, blocks=batch.blocks, shared=batch.shared), None
        alpha = batch.alpha

        def compute(logits: Tensor, targets: Tensor, top_tokens: Tensor, top_logp: Tensor) -> tuple[Tensor, ...]:
            student, entropy = log_probs_at(logits, torch.cat([targets[:, None], top_tokens], -1))
            tail = top_tokens.shape[-1] < logits.shape[-1]
            return student[:, 0], entropy, divergence_on_support(student[:, 1:], top_logp, alpha, tail)

        targets = batch.input_ids[batch.response_mask]
        of_tokens = targets, batch.top_tokens, batch.top_logp
        results = self.policy.from_logits(compute, *sequences, *of_tokens, blocks=batch.blocks, shared=batch.shared)
        logp, entropy, divergence = (at_mask(values, batch.response_mask) for values in results)
        return logp, entropy, divergence

    def configure_optimizers(self) -> Any:
        """The optimizer over the policy's weights, constant after a linear warm-up."""
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = self.optimizer_factory(trained)
        schedule = WarmUp(optimizer, self.warmup_steps)
        keep_settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Logs the settings of the method, and whose weights its teacher has."""
        teacher = f"; the teacher has {self.teacher.schedule}" if self.method.context != "none" else ""
        rank_zero_info("method: %s%s", self.method, teacher)

    def on_train_epoch_start(self) -> None:
        """Has the run finish the epochs that it begins."""
        self._whole_epochs.begin(self.trainer)

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        """Seeds dropout, where a model has any: the same in a resumed run."""
        torch.manual_seed(batch.seed)

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        """Comes after the callbacks': puts off the end that any of them asks for to the end of the epoch, and ends a
        run that a signal asked to stop (`SafeStop`) between two optimizer steps. After the last one the epoch is
        finished first: its validation and the next rollouts can be given up."""
        trainer = cast(Any, self.trainer)
        self._whole_epochs.hold(trainer, batch_idx)
        done = batch_idx + 1
        if done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches:
            trainer.datamodule.stop_signal.check(trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Notes the gradient's norm before it is clipped, and the learning rate.

        A step whose gradient is not finite is skipped. The norm is that over all ranks, so all of them decide the same.
        One whose gradient is exactly 0, since no rank has anything to learn, is taken: momentum goes on as ever."""
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
        # One that looks for a scale skips by itself, until there is no smaller one to try.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.skipped = not math.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1)
        if self.skipped:
            for p in self.policy.parameters():
                p.grad = None  # optimizers leave alone what has none
        self.steps.append(StepReport(norm, optimizer.param_groups[0]["lr"], self.skipped))

    # -- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Passes problems of an evaluation set with their rollouts and verdicts (`Evaluated`) on to the `Evaluation`
        callback, which counts them."""
        return batch

    test_step = predict_step = validation_step

    def on_validation_end(self) -> None:
        """A run that was to end during the evaluation finishes its epoch."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._whole_epochs.hold(self.trainer)

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """What every run has (`rlrt_lightning.callbacks.default_callbacks`): those that the trainer has none of.

        Raises:
            ConfigError: If there is no data module to make rollouts.
        """
        from rlrt_lightning.callbacks import adopt_checkpoints, default_callbacks

        trainer = cast(Any, self.trainer)
        if not getattr(trainer.datamodule, "makes_rollouts", False):
            raise ConfigError(
                f"{trainer.state.fn.value}: pass datamodule=RolloutDataModule(...) to the trainer; rollouts come from "
                "nowhere else"
            )
        adopt_checkpoints(trainer.callbacks)
        return default_callbacks(trainer.callbacks, checkpoints=bool(trainer.checkpoint_callbacks))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the settings of the run."""
        checkpoint[resume.KEY] = resume.record(self.trainer, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint's settings and weights with the run's before any weight is loaded.

        Raises:
            ConfigError: If it holds another model, or comes from a run with other settings.
        """
        found = checkpoint.get("state_dict")  # not there where shards have been loaded already
        if self._attached:
            resume.compare(self.trainer, self, checkpoint)
        elif found is not None:
            self.teacher.schedule = resume.teacher_weights(checkpoint) or self.method.needs.teacher
            self.teacher.load(self.policy)
        if found is None:
            return
        theirs = {name: tuple(value.shape) for name, value in found.items()}
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        if differ := sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n)):
            first = differ[0]
            raise ConfigError(
                f"ckpt_path: the checkpoint holds another model: {len(differ)} weights differ, such as {first}, "
                f"{list(theirs[first]) if first in theirs else 'not there'} in the checkpoint and "
                f"{list(ours[first]) if first in ours else 'not there'} in this run; set model.policy, "
                "model.method and teacher_refresh as in the run that made it"
            )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override] # Lightning's is a descriptor of its own
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", **parts: Any
    ) -> RLRTModule:
        """A module with a checkpoint's weights, for use without a trainer. No code of the file is run.

        Args:
            checkpoint_path: The checkpoint, as one file.
            map_location: Device to load to, as `torch.load` takes it.
            parts: Arguments of the class, such as `policy=Policy(path=...)`; those left out are as in the run.

        Raises:
            ConfigError: If the checkpoint cannot be read, or a part of it has to be given and is not.
        """
        found = resume.parts_of(Path(checkpoint_path), set(parts))
        load = cast(Any, super().load_from_checkpoint)
        module = load(checkpoint_path, map_location=map_location, weights_only=True, **{**found, **parts})
        return cast(RLRTModule, module)

    def configure_model(self) -> None:
        """Loads the weights, after everything that can be checked without them has been, and shards them."""
        strategy = self.trainer.strategy if self._attached else None
        if strategy is not None:
            check_strategy(strategy)
        self.policy.load()
        self.teacher.load(self.policy)
        if isinstance(strategy, FSDP2Strategy):
            self._shard(strategy)

    def _shard(self, strategy: FSDP2Strategy) -> None:
        if isinstance(self.policy.model, FSDPModule):
            return  # by an earlier fit or validate of this trainer
        for own in (self.policy, self.teacher):
            if hasattr(own, "model"):
                strategy.shard(cast(Any, own.model))
        if self.teacher.adapters is not None:
            self.teacher.adapters.copy(self.policy.model)  # in the same shards

    @property
    def _attached(self) -> bool:
        try:
            return self.trainer is not None
        except RuntimeError:  # Lightning's answer where there is none
            return False


def _kl(logp: Tensor, batch: MicroBatch) -> Tensor:
    """KL(P_old || P_new) estimated on the sampled tokens."""
    return kl_estimate(log_ratio(logp, batch.logp_old, batch.response_mask)[batch.response_mask]).mean()
