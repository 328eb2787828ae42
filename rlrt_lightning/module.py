"""The Lightning module: policy, teacher and method, and the step that trains the policy."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from rlrt_lightning import resume
from rlrt_lightning.batch import MicroBatch
from rlrt_lightning.errors import ConfigError, check_ranges
from rlrt_lightning.log_probs import log_probs_at
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
from rlrt_lightning.optimizers import OptimizerFactory, SharedFactory, WarmUp, keep_settings
from rlrt_lightning.padding import at_mask
from rlrt_lightning.policy import Policy
from rlrt_lightning.ranks import Mean, mean_over_ranks
from rlrt_lightning.seeding import derive_seed
from rlrt_lightning.sharding import FSDP2Strategy, check_strategy, whole
from rlrt_lightning.stopping import WholeEpochs
from rlrt_lightning.teacher import Teacher

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule


class RLRTModule(LightningModule):
    """Trains a policy on roll-outs with token advantages.

    Args:
        policy: The language model that is trained.
        teacher: Whose weights score the roll-outs, and with what context.
        method: How advantages are spread over tokens: GRPO, RLRT, RLSD, SDPO, SRPO, EntropyBonus, DIVER, or a class
            of your own.
        clip_low: The ratio to the roll-out policy may fall to 1 - clip_low before a token's gradient stops.
        clip_high: The ratio may rise to 1 + clip_high before a token's gradient stops.
        dual_clip: Bounds the loss of tokens with a negative advantage at dual_clip * |A|; null for no bound.
        aggregation: token-mean weighs all tokens of a mini-batch the same; seq-mean-token-mean averages within each
            roll-out first.
        importance: Where the trainer rescores the roll-outs (`data.rescore`), all that a token adds to the loss
            (surrogate, divergence to the teacher, entropy bonus) is weighted by min(P_trainer / P_sampler,
            importance_cap): for each token, for the whole sequence, or off.
        importance_cap: Upper limit of that weight; the paper has 2.
        optimizer: Class path and settings of the optimiser; the paper has AdamW with lr 1e-6.
        warmup_steps: Optimiser steps over which the learning rate rises linearly to its constant value.
        allow_changes: Settings that may differ from those of the checkpoint when a run is resumed (`--ckpt_path`), such
            as [data.seed, model.method]; each stands for all settings below it. Settings of the optimiser (not its
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
        self._epoch_start = 0.0
        self._tokens: Tensor | int = 0  # of the epoch's micro-batches
        self._places = 0  # of these, padding included
        self._figures: dict[str, list[tuple[Tensor | float, int]]] = {}
        self._of_rollouts: dict[str, float] = {}
        self._steps = {"faults/skipped_steps": 0, "train/empty_steps": 0}  # of the epoch
        self._whole_epochs = WholeEpochs()
        self.skipped = False
        """Whether the newest optimiser step was skipped, because its gradient was not finite."""

    # -- training --------------------------------------------------------------------------------------------------

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """One forward pass over a micro-batch; its loss is a share of the mean over the mini-batch."""
        logp, entropy, divergence = self._token_figures(batch)
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
        figures = {
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
            figures["train/divergence"] = mean, int(distilled.sum())
        if batch.entropy_bonus is not None:
            bonus = batch.importance * batch.entropy_bonus * entropy
            loss = loss - token_mean(bonus, batch.response_mask, self.aggregation)
        loss = loss * batch.share
        self._figures.setdefault("train/loss", []).append((loss.detach(), 1))
        self._tokens = self._tokens + batch.tokens  # read at the epoch's end: a GPU would stop for it
        self._places += batch.places
        for tag, (mean, count) in figures.items():
            # What only stands in, so that this rank takes the step with the others, is not trained on.
            self._figures.setdefault(tag, []).append((mean, count if batch.share else 0))
        return loss

    def _token_figures(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor | None]:
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
        """The optimiser over the policy's weights, constant after a linear warm-up."""
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
        """Notes what the roll-outs of the epoch were like."""
        self._figures.clear()
        if self._data.epoch is not None:
            self.log_epoch(mean_over_ranks(self.trainer, self._data.epoch.stats))
        self._tokens, self._places = 0, 0
        self._steps = dict.fromkeys(self._steps, 0)
        self._epoch_start = time.perf_counter()
        self._whole_epochs.begin(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        """Puts off the end that any callback asks for to the end of the epoch; comes after all of theirs."""
        self._whole_epochs.hold(self.trainer, batch_idx)

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        """Seeds dropout, where a model has any: the same in a resumed run."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            torch.manual_seed(derive_seed(self._data.seed, "training", self.global_step, self.global_rank))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Notes the gradient's norm before it is clipped, and the learning rate.

        A step whose gradient is not finite is skipped. The norm is that over all ranks, so all of them decide the same.
        One whose gradient is exactly 0, since no rank has anything to learn, is taken: momentum goes on as ever."""
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
        # One that looks for a scale skips by itself, until there is no smaller one to try.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.skipped = not math.isfinite(norm) and (scaler is None or scaler.get_scale() <= 1)
        self._steps["faults/skipped_steps"] += self.skipped
        self._steps["train/empty_steps"] += norm == 0
        if self.skipped:
            for p in self.policy.parameters():
                p.grad = None  # optimisers leave alone what has none
        for tag, value in (("train/grad_norm", norm), ("train/lr", optimizer.param_groups[0]["lr"])):
            self._figures.setdefault(tag, []).append((value, 1))

    def on_train_epoch_end(self) -> None:
        """Logs the epoch: its roll-outs, what the updates were like over all tokens of all ranks, how long they took.

        To the loggers at once, before the epoch is saved: what is saved is not trained again, so what is not logged by
        then would be missing if the run were killed in between."""
        figures: dict[str, float] = {}
        for tag, parts in self._figures.items():
            # A skipped step would make a whole epoch's curve NaN; what was bad in it stands in a file of its own.
            finite = [(float(mean), n) for mean, n in parts if n and math.isfinite(mean)]
            count = sum(n for _, n in finite)
            figures[tag] = Mean(sum(mean * n for mean, n in finite) / max(count, 1), count)
        self._figures.clear()
        figures |= self._steps
        tokens = float(self._tokens)
        seconds = figures["time/train"] = time.perf_counter() - self._epoch_start
        figures["speed/train_tokens_per_s"] = tokens / seconds
        figures["speed/train_padding"] = Mean(1 - tokens / max(self._places, 1), self._places)
        values = {**self._of_rollouts, **mean_over_ranks(self.trainer, figures)}
        self.log_dict(values, logger=False, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, self.global_step - 1)
            logger.save()
        self._of_rollouts = {}
        self._data.finish_epoch()

    def log_epoch(self, values: dict[str, float]) -> None:
        """Logs figures of the epoch's roll-outs, together with those of its updates when these are done.

        Args:
            values: By tag; the same on all ranks.
        """
        self._of_rollouts |= {tag: float(value) for tag, value in values.items()}

    @property
    def rollout_figures(self) -> dict[str, float]:
        """What was logged of the epoch's roll-outs, by tag; the same on all ranks."""
        return self._of_rollouts

    def figures_so_far(self) -> dict[str, Any]:
        """What is to be logged at the end of the epoch, for a checkpoint within it."""
        figures = {tag: [(float(mean), n) for mean, n in parts] for tag, parts in self._figures.items()}
        return {
            "figures": figures,
            "rollouts": self._of_rollouts,
            "tokens": int(self._tokens),
            "places": self._places,
            "steps": self._steps,
            "seconds": time.perf_counter() - self._epoch_start,
        }

    def go_on_with(self, so_far: dict[str, Any]) -> None:
        """Takes up what `figures_so_far` gave."""
        self._figures, self._of_rollouts = so_far["figures"], so_far["rollouts"]
        self._tokens, self._places, self._steps = so_far["tokens"], so_far["places"], so_far["steps"]
        self._epoch_start = time.perf_counter() - so_far["seconds"]

    # -- evaluation ------------------------------------------------------------------------------------------------

    def validation_step(self, indices: list[int], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Rolls problems of a benchmark out (`Evaluated`); the `Evaluation` callback counts the verdicts."""
        return self._data.evaluate(dataloader_idx, indices)

    test_step = predict_step = validation_step

    def on_validation_end(self) -> None:
        """Lets the engine give back its memory."""
        self._data.engine.release()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._whole_epochs.hold(self.trainer)

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """What every run has (`rlrt_lightning.callbacks.default_callbacks`): those that the trainer has none of.

        Raises:
            ConfigError: If there is no data module to make roll-outs.
        """
        from rlrt_lightning.callbacks import adopt_checkpoints, default_callbacks
        from rlrt_lightning.datamodule import RolloutDataModule

        trainer = cast(Any, self.trainer)
        if not isinstance(trainer.datamodule, RolloutDataModule):
            raise ConfigError(
                f"{trainer.state.fn.value}: pass datamodule=RolloutDataModule(...) to the trainer; roll-outs come from "
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
            if "model" in own._modules:
                strategy.shard(cast(Any, own.model))
        if self.teacher.adapters is not None:
            self.teacher.adapters.copy(self.policy.model)  # in the same shards

    @property
    def _attached(self) -> bool:
        try:
            return self.trainer is not None
        except RuntimeError:  # Lightning's answer where there is none
            return False

    @property
    def _data(self) -> RolloutDataModule:
        return cast("RolloutDataModule", cast(Any, self.trainer).datamodule)


def _kl(logp: Tensor, batch: MicroBatch) -> Tensor:
    """KL(P_old || P_new) estimated on the sampled tokens."""
    return kl_estimate(log_ratio(logp, batch.logp_old, batch.response_mask)[batch.response_mask]).mean()
