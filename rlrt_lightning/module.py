"""The Lightning module: policy, teacher, method, and the training step."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

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
    Ratio,
    Surrogate,
    cispo_surrogate,
    clipped_surrogate,
    distillation_loss,
    divergence_on_support,
    reference_kl,
    token_mean,
)
from rlrt_lightning.objective.gate import EntropyGate
from rlrt_lightning.objective.ratios import kl_estimate, log_ratio
from rlrt_lightning.policy.copies import FrozenWeights, Reference
from rlrt_lightning.policy.log_probs import log_probs_at
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.padding import at_mask
from rlrt_lightning.policy.sharding import FSDP2Strategy, check_strategy, whole
from rlrt_lightning.runtime.errors import ConfigError, check_ranges
from rlrt_lightning.runtime.optimizers import OptimizerFactory, SharedFactory, WarmUp, keep_settings
from rlrt_lightning.runtime.precision import rounding
from rlrt_lightning.runtime.stopping import WholeEpochs
from rlrt_lightning.teacher import Teacher

log = logging.getLogger(__name__)

GATE = "gate"
"""Key of the state of the method's gate in a checkpoint."""


@dataclass(frozen=True)
class StepReport:
    """Metrics of one optimizer step.

    Args:
        gradient_norm: Norm of the gradient before clipping, over all ranks.
        learning_rate: Learning rate of the first parameter group.
        skipped: Whether the step was skipped because of a non-finite gradient.
    """

    gradient_norm: float
    learning_rate: float
    skipped: bool


class RLRTModule(LightningModule):
    """Trains a policy on rollouts with token advantages.

    Args:
        policy: The language model being trained.
        teacher: Scores rollouts with a privileged context.
        method: How advantages are distributed over tokens: GRPO, RLRT, AntiSD, RLCSD, RLSD, SDPO, SRPO,
            EntropyBonus, DIVER, or a custom class.
        clip_low: The ratio P_new / P_old is clipped below at 1 - clip_low.
        clip_high: The ratio P_new / P_old is clipped above at 1 + clip_high.
        dual_clip: Bounds the loss of tokens with a negative advantage at dual_clip * |A|; null for no bound. verl and
            the code that RLRT's authors built on use 3.
        surrogate: clip is PPO's clipped surrogate. cispo (arXiv:2506.13585) bounds each token's weight
            P_new / P_old at 1 + clip_high instead of removing its gradient; clip_low is unused then.
        ratio: Level of P_new / P_old in the clipped surrogate: token, or sequence for the geometric mean over the
            rollout's tokens (GSPO, arXiv:2507.18071, which uses clip_low 3e-4, clip_high 4e-4 and seq-mean-token-mean).
        aggregation: token-mean weights all tokens of a mini-batch equally; seq-mean-token-mean averages within each
            rollout first; constant-length divides by rollouts * `length` (Dr. GRPO, arXiv:2503.20783).
        length: Tokens of a rollout in constant-length; null is the longest response allowed
            (`data.sampling.max_new_tokens`).
        reference_kl: Coefficient of the KL divergence to the policy's initial weights in the loss; 0 for none. All
            rollouts are then trained on, and scored once an epoch by a frozen copy of the weights, or without a copy if
            the policy has adapters or the teacher has the initial weights. See `model.teacher.rest_on_cpu`.
        mask_truncated: Leave truncated rollouts out of the loss and of its mean; they still count in their group's
            advantages.
        importance: Level of the importance weight min(P_trainer / P_sampler, importance_cap): token, sequence or off.
            With `data.rescore`, it multiplies each token's loss (surrogate, divergence to the teacher, KL to the
            reference, entropy bonus).
        importance_cap: Upper bound of the importance weight; the paper uses 2.
        optimizer: Class path and settings of the optimizer; the paper uses AdamW with lr 1e-6. The default has no
            weight decay.
        warmup_steps: Optimizer steps over which the learning rate rises linearly to its constant value.
        allow_changes: Settings that may differ from the checkpoint's when resuming (`--ckpt_path`), such as
            [data.seed, model.method]; a name includes all settings below it. Settings of the optimizer (except its
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
        surrogate: Literal["clip", "cispo"] = "clip",
        ratio: Ratio = "token",
        aggregation: Aggregation = "token-mean",
        length: int | None = None,
        reference_kl: float = 0.0,
        mask_truncated: bool = False,
        importance: Importance = "token",
        importance_cap: float = 2.0,
        optimizer: OptimizerFactory = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0),
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
                "length": (length, length is None or length >= 1, "1 or more, or null"),
                "reference_kl": (reference_kl, 0 <= reference_kl < math.inf, "0 or more"),
                "warmup_steps": (warmup_steps, warmup_steps >= 0, "0 or more"),
                "importance_cap": (importance_cap, importance_cap >= 1, "at least 1"),
            },
        )
        if length is not None and aggregation != "constant-length":
            raise ConfigError(
                f"model.length is {length}, but model.aggregation is {aggregation}, which does not use it"
            )
        if surrogate == "cispo" and (ratio != "token" or dual_clip is not None):
            raise ConfigError("model.surrogate is cispo, which has neither ratio=sequence nor dual_clip; remove them")
        self.policy = policy
        self.method = method
        self.teacher = teacher
        self.reference = Reference(teacher.rest_on_cpu) if reference_kl > 0 else None
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip
        self.surrogate: Literal["clip", "cispo"] = surrogate
        self.ratio: Ratio = ratio
        self.aggregation: Aggregation = aggregation
        self.length = length
        self.reference_kl = reference_kl
        self.mask_truncated = mask_truncated
        self.importance: Importance = importance
        self.importance_cap = importance_cap
        self.optimizer_factory = SharedFactory(optimizer)
        self.warmup_steps = warmup_steps
        self.allow_changes = allow_changes
        self._whole_epochs = WholeEpochs()
        self.steps: list[StepReport] = []
        """Optimizer steps that the `EpochMetrics` callback has not collected yet."""
        self.skipped = False
        """Whether the last optimizer step was skipped because of a non-finite gradient."""
        self.gate = method.new_gate()
        """The method's gate as of the last epoch that has begun to train; None if the method has none."""
        self._next_gate: EntropyGate | None = None

    # -- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
        """Computes the loss of a micro-batch.

        Returns:
            `loss`, scaled by the micro-batch's share of the mini-batch's mean, and `metrics`: for each tag a mean and
            the number of values in it.
        """
        logp, entropy, divergence = self._token_values(batch)
        surrogate = self._surrogate(logp, batch)
        loss, mean = surrogate.loss, self._mean(batch)
        tokens = int(batch.response_mask.sum())
        metrics = {
            "train/clip_fraction": (surrogate.clip_fraction, tokens),
            "train/entropy": (entropy.detach().sum() / max(tokens, 1), tokens),
            "train/kl": (_kl(logp.detach(), batch.logp_old, batch), tokens),
        }
        if batch.logp_reference is not None:
            kl = reference_kl(logp, batch.logp_reference, batch.response_mask, **mean)
            loss = loss + self.reference_kl * kl
            metrics["train/reference_kl"] = _kl(batch.logp_reference, logp.detach(), batch), tokens
        if divergence is not None:
            assert batch.distillation is not None
            weights, cap = batch.distillation, batch.distillation_cap
            loss = loss + distillation_loss(divergence, logp, batch.logp_old, weights, batch.response_mask, cap, **mean)
            distilled = weights != 0
            average = (divergence.detach() * distilled).sum() / distilled.sum().clamp(min=1)
            metrics["train/divergence"] = average, int(distilled.sum())
        if batch.entropy_bonus is not None:
            bonus = batch.importance * batch.entropy_bonus * entropy
            loss = loss - token_mean(bonus, batch.response_mask, self.aggregation, mean["length"])
        loss = loss * batch.share
        # A share of 0 marks a placeholder for a rank without trainable rollouts; it has no metrics.
        metrics = {tag: (value, count if batch.share else 0) for tag, (value, count) in metrics.items()}
        return {"loss": loss, "metrics": {**metrics, "train/loss": (loss.detach(), 1)}}

    def _surrogate(self, logp: Tensor, batch: MicroBatch) -> Surrogate:
        inputs, mean = (logp, batch.logp_old, batch.advantages, batch.response_mask), self._mean(batch)
        if self.surrogate == "cispo":
            return cispo_surrogate(*inputs, self.clip_high, **mean)
        return clipped_surrogate(*inputs, self.clip_low, self.clip_high, self.dual_clip, ratio=self.ratio, **mean)

    def _mean(self, batch: MicroBatch) -> dict[str, Any]:
        """How token losses are averaged: arguments of the loss functions."""
        length = self.length
        if self.aggregation == "constant-length" and length is None:
            length = cast(Any, self.trainer).datamodule.sampling.max_new_tokens
        return {"aggregation": self.aggregation, "importance": batch.importance, "length": length}

    def _token_values(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies of the response tokens, and the divergence between student and teacher if the method
        has one: nats, [B, S] each, 0 outside the response."""
        sequences = batch.input_ids, batch.attention_mask, batch.response_mask, batch.temperature
        if batch.top_tokens is None or batch.top_logp is None:
            return *self.policy.log_probs(*sequences, blocks=batch.blocks, shared=batch.shared), None
        alpha = batch.alpha

        def compute(logits: Tensor, targets: Tensor, top_tokens: Tensor, top_logp: Tensor) -> tuple[Tensor, ...]:
            student, entropy = log_probs_at(logits, torch.cat([targets[:, None], top_tokens], -1))
            tail = top_tokens.shape[-1] < logits.shape[-1]
            return student[:, 0], entropy, divergence_on_support(student[:, 1:], top_logp, alpha, tail)

        targets = batch.input_ids[batch.response_mask]
        inputs = targets, batch.top_tokens, batch.top_logp
        results = self.policy.from_logits(compute, *sequences, *inputs, blocks=batch.blocks, shared=batch.shared)
        logp, entropy, divergence = (at_mask(values, batch.response_mask) for values in results)
        return logp, entropy, divergence

    def configure_optimizers(self) -> Any:
        """The optimizer of the policy's weights; its learning rate is constant after a linear warm-up."""
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = self.optimizer_factory(trained)
        schedule = WarmUp(optimizer, self.warmup_steps)
        keep_settings(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def next_gate(self) -> EntropyGate | None:
        """A copy of the gate for a new epoch to step. It replaces `gate` when the epoch begins to train, because a
        checkpoint that is saved before then makes the resumed run repeat the epoch."""
        self._next_gate = copy.deepcopy(self.gate)
        return self._next_gate

    def on_fit_start(self) -> None:
        """Logs the method's settings and the teacher's weights. Warns if updates will be lost by rounding."""
        half = {p.dtype for p in self.policy.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
        if half and self.trainer.is_global_zero:
            log.warning(
                "the trained weights are in half precision, which rounds away steps of a learning rate such as 1e-6; "
                "set model.policy.dtype=float32 and trainer.precision=bf16-mixed"
            )
        self._next_gate = None
        teacher = f"; the teacher has {self.teacher.schedule}" if self.method.context != "none" else ""
        rank_zero_info("method: %s%s", self.method, teacher)

    def on_train_epoch_start(self) -> None:
        """Ensures that a run finishes each epoch it starts."""
        self._whole_epochs.begin(self.trainer)

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        """Seeds dropout, so that a resumed run uses the same masks."""
        torch.manual_seed(batch.seed)
        if self._next_gate is not None:
            self.gate, self._next_gate = self._next_gate, None

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        """Runs after the callbacks. Postpones a stop requested by a callback to the end of the epoch, and stops a run
        that received a signal (`SafeStop`) between two optimizer steps. After the last step, the epoch is finished
        first; its validation and the next rollouts can be interrupted. They do not need the gradients, which are freed
        here rather than before the next epoch's first step."""
        trainer = cast(Any, self.trainer)
        self._whole_epochs.hold(trainer, batch_idx)
        done = batch_idx + 1
        if done == trainer.num_training_batches:
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()
        elif done % trainer.accumulate_grad_batches == 0:
            trainer.datamodule.stop_signal.check(trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Records the norm of the gradient before clipping, and the learning rate.

        A step with a non-finite gradient is skipped; all ranks see the same norm and make the same decision. A step
        with a zero gradient, when no rank has trainable rollouts, is taken and updates the optimizer's momentum."""
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
        # A gradient scaler skips steps itself while it can still reduce its scale.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.skipped = not math.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1)
        if self.skipped:
            for p in self.policy.parameters():
                p.grad = None  # optimizers ignore weights without a gradient
        self.steps.append(StepReport(norm, optimizer.param_groups[0]["lr"], self.skipped))

    # -- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Passes a batch of evaluated problems (`Evaluated`) to the `Evaluation` callback, which computes metrics."""
        return batch

    test_step = predict_step = validation_step

    def on_validation_end(self) -> None:
        """Postpones a stop requested during the evaluation to the end of the epoch."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._whole_epochs.hold(self.trainer)

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """The default callbacks (`rlrt_lightning.callbacks.default_callbacks`) that the trainer does not have yet.

        Raises:
            ConfigError: If the data module does not generate rollouts.
        """
        from rlrt_lightning.callbacks import adopt_checkpoints, adopt_progress_bar, default_callbacks

        trainer = cast(Any, self.trainer)
        if not getattr(trainer.datamodule, "makes_rollouts", False):
            raise ConfigError(
                f"{trainer.state.fn.value}: pass datamodule=RolloutDataModule(...) to the trainer; it generates the "
                "rollouts"
            )
        adopt_checkpoints(trainer.callbacks)
        adopt_progress_bar(trainer)
        return default_callbacks(trainer.callbacks, checkpoints=bool(trainer.checkpoint_callbacks))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the run's settings and the state of the method's gate to the checkpoint."""
        checkpoint[resume.KEY] = resume.record(self.trainer, self)
        if self.gate is not None:
            checkpoint[GATE] = self.gate.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint's settings and weights with the run's before the weights are loaded.

        Raises:
            ConfigError: If the checkpoint is of a different model, or of a run with different settings.
        """
        if self.gate is not None and GATE in checkpoint:
            self.gate.load_state_dict(checkpoint[GATE])
        found = checkpoint.get("state_dict")  # missing if shards are already loaded
        if self._attached:
            resume.compare(self.trainer, self, checkpoint)
        elif found is not None:
            self.teacher.schedule = resume.teacher_weights(checkpoint) or self.method.needs.teacher
            self._load_copies()
        if found is None:
            return
        theirs = {name: tuple(value.shape) for name, value in found.items()}
        ours = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        if differ := sorted(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n)):
            first = differ[0]
            raise ConfigError(
                f"ckpt_path: the checkpoint is of a different model: {len(differ)} weights differ, such as {first}, "
                f"{list(theirs[first]) if first in theirs else 'missing'} in the checkpoint and "
                f"{list(ours[first]) if first in ours else 'missing'} in this run; set model.policy, "
                "model.method, model.reference_kl and teacher_refresh as in the run that saved it"
            )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override] # Lightning uses a custom descriptor
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", **parts: Any
    ) -> RLRTModule:
        """Loads a module with a checkpoint's weights, for use without a trainer. Never runs code from the file.

        Args:
            checkpoint_path: The checkpoint, a single file.
            map_location: Device to load to, as in `torch.load`.
            parts: Arguments of the class, such as `policy=Policy(path=...)`; the others are taken from the checkpoint.

        Raises:
            ConfigError: If the checkpoint cannot be read, or does not contain an argument that was not passed.
        """
        found = resume.parts_of(Path(checkpoint_path), set(parts))
        load = cast(Any, super().load_from_checkpoint)
        module = load(checkpoint_path, map_location=map_location, weights_only=True, **{**found, **parts})
        return cast(RLRTModule, module)

    def configure_model(self) -> None:
        """Loads the weights, after all checks that do not need them, and shards them."""
        strategy = self.trainer.strategy if self._attached else None
        if strategy is not None:
            check_strategy(strategy)
        sharding = strategy if isinstance(strategy, FSDP2Strategy) else None
        self.policy.load(sharding)
        if strategy is not None and (half := rounding(self.trainer)) is not None:
            self.policy.dither_once(half, sharding)
        self._load_copies(sharding)
        if sharding is not None:
            self._shard(sharding)

    @property
    def reference_weights(self) -> FrozenWeights | None:
        """The initial weights of the KL divergence: the teacher's if it has them, otherwise a copy; None without it."""
        return self.teacher if self.reference is not None and self.teacher.weights == "initial" else self.reference

    def _load_copies(self, sharding: FSDP2Strategy | None = None) -> None:
        self.teacher.load(self.policy, sharding)
        if self.reference is not None and self.reference_weights is self.reference:
            self.reference.load(self.policy, sharding)

    def _shard(self, strategy: FSDP2Strategy) -> None:
        if isinstance(self.policy.model, FSDPModule):
            return  # loaded as shards, or sharded by an earlier call of fit or validate
        for own in (self.policy, self.teacher, self.reference):
            if own is not None and hasattr(own, "model"):
                strategy.shard(cast(Any, own.model), self.policy.head_is_float32)
        if self.teacher.adapters is not None:
            self.teacher.adapters.copy(self.policy.model)  # copies the sharding too

    @property
    def _attached(self) -> bool:
        try:
            return self.trainer is not None
        except RuntimeError:  # raised by Lightning if there is no trainer
            return False


def _kl(logp: Tensor, sampled_from: Tensor, batch: MicroBatch) -> Tensor:
    """KL(Q || P) estimated on the sampled tokens, from log P and log Q, [B, S] each."""
    return kl_estimate(log_ratio(logp, sampled_from, batch.response_mask)[batch.response_mask]).mean()
