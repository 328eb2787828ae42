"""An epoch's rollouts as tensors, and how they are dealt out to optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.objective import Aggregation, DivergenceSettings
from rlrt_lightning.policy import padding
from rlrt_lightning.policy.padding import Shared, at_mask, balance, blocks, pad_sequences, worth_sharing
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.seeding import derive_seed
from rlrt_lightning.teacher import TeacherScore


class MicroBatch:
    """What one forward and backward pass sees.

    Neither a tuple nor a dataclass: Lightning takes those apart, and would round log-probs to bfloat16 under
    `--trainer.precision=bf16-true`.

    Args:
        input_ids: Prompt and response, padded on the right, the longest first, [B, T].
        attention_mask: 0 at padding, [B, T].
        blocks: Rows and width of the parts that go through the decoder on their own, so that little of it is padding.
        shared: The prompts, where each is read once for the rows that share it, as in `Policy.from_logits`.
        response_mask: True at response tokens, [B, T].
        logp_old: Log-probs that the surrogate's ratio divides by, as in `EpochRecord`, nats, [B, T].
        importance: Weight of each token that corrects for the sampler's arithmetic, [B, T].
        advantages: Token advantages, [B, T].
        distillation: Weight of the divergence to the teacher at each token, [B, T]; None where the method has none.
        alpha: Which divergence, as in `DivergenceSettings`; read only where there is one.
        distillation_cap: Upper limit of P_new / P_old in the divergence's weight; read only where there is one.
        top_tokens: The k tokens that are compared at each of the R response tokens, in reading order, int32 [R, k].
        top_logp: Their log-probs under the teacher, nats, [R, k].
        entropy_bonus: Coefficient of the entropy at each token, [B, T]; None where the method has none.
        share: What the micro-batch's own mean counts for, so that the gradients that Lightning averages over
            micro-batches and ranks add up to the mean over the whole mini-batch.
        temperature: Of the sampling.
        rows: Which rollouts of the epoch's record these are, B of them.
        seed: Seed of what is random in its forward pass, such as dropout.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        blocks: list[tuple[int, int]],
        shared: Shared | None,
        response_mask: Tensor,
        logp_old: Tensor,
        importance: Tensor,
        advantages: Tensor,
        distillation: Tensor | None,
        alpha: float,
        distillation_cap: float,
        top_tokens: Tensor | None,
        top_logp: Tensor | None,
        entropy_bonus: Tensor | None,
        share: float,
        temperature: float,
        rows: list[int],
        seed: int,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.blocks = blocks
        self.shared = shared
        self.response_mask = response_mask
        self.logp_old = logp_old
        self.importance = importance
        self.advantages = advantages
        self.distillation = distillation
        self.alpha = alpha
        self.distillation_cap = distillation_cap
        self.top_tokens = top_tokens
        self.top_logp = top_logp
        self.entropy_bonus = entropy_bonus
        self.share = share
        self.temperature = temperature
        self.rows = rows
        self.seed = seed

    def to(self, device: torch.device, **options: Any) -> MicroBatch:
        """The same on a device."""
        moved: dict[str, Any] = {
            name: value.to(device, **options) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        if self.shared is not None:
            prompts, mask, after = (tensor.to(device, **options) for tensor in self.shared)
            moved["shared"] = prompts, mask, after
        return MicroBatch(**moved)

    @property
    def places(self) -> int:
        """Places that the decoder computes, padding included."""
        if self.shared is None:
            return sum(rows * width for rows, width in self.blocks)
        return self.shared[0].numel() + sum(rows * max(width - 1, 0) for rows, width in self.blocks)

    @property
    def tokens(self) -> Tensor:
        """Tokens among them, a scalar."""
        if self.shared is None:
            return self.attention_mask.sum()
        return self.shared[1].sum() + (self.response_mask.sum(1) - 1).clamp(min=0).sum()


T = TypeVar("T")


class Batches(Generic[T]):
    """Batches in order, as an iterable of known length: Lightning takes it as a data loader, and unlike a `DataLoader`
    it gets no distributed sampler (each rank has rollouts of its own).

    Args:
        batches: The batches, or those that are left of them.
        given: How many were given out before these.
    """

    def __init__(self, batches: list[T], given: int = 0) -> None:
        self.batches = batches
        self.given = self._before = given

    def __len__(self) -> int:
        return self._before + len(self.batches)

    def __iter__(self) -> Iterator[T]:
        for i, batch in enumerate(self.batches):
            self.given = self._before + i + 1
            yield batch

    @property
    def left(self) -> list[T]:
        """Those that were not given out yet."""
        return self.batches[self.given - self._before :]

    def newest(self, n: int) -> list[T]:
        """The n that were given out last."""
        end = self.given - self._before
        return self.batches[max(0, end - n) : end]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module saves what is left. Lightning warns of a loader that has none of these two."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""


def micro_batches(
    epoch: EpochRecord,
    minibatches: int,
    accumulate: int,
    aggregation: Aggregation,
    temperature: float = 1.0,
    world_size: int = 1,
    totals: Tensor | None = None,
    from_ranks: Callable[[list[tuple[int, int]]], list[list[tuple[int, int]]]] = lambda mine: [mine],
    share_prompts: bool = False,
    seed: tuple[int | str, ...] = (0,),
) -> Batches[MicroBatch]:
    """Cuts an epoch into mini-batches (one optimizer step each) of whole groups, and each of these into exactly
    `accumulate` micro-batches.

    Rollouts without any gradient, such as those of a group that was all right or all wrong, are left out of the
    forward pass; they still count in the mean over the mini-batch.

    Args:
        epoch: The rollouts.
        minibatches: Optimizer steps in the epoch.
        accumulate: Micro-batches of each step.
        aggregation: As in `clipped_surrogate`.
        temperature: Of the sampling.
        world_size: Ranks whose gradients are averaged.
        totals: `mini_batch_sizes` summed over all ranks; None for one rank.
        from_ranks: Gathers what each rank has: all make as many forward passes, since sharded weights want that.
        share_prompts: Have a prompt read once for the rollouts that share it, where that saves much.
        seed: Names the streams of the micro-batches' own random numbers.
    """
    if totals is None:
        totals = mini_batch_sizes(epoch, minibatches)
    tokens = epoch.mask.sum(-1)
    useful = epoch.credit.trains
    step_of = _step_of(epoch, minibatches)
    by_token = aggregation == "token-mean"
    parts = []
    for step in range(minibatches):
        members = (step_of == step).nonzero()[:, 0]
        trained = members[useful[members]]
        lengths = _lengths(epoch, trained)
        shortest = members[tokens[members].argmin()]
        for part in balance(lengths, accumulate):
            # All ranks take all steps: where there is nothing to learn, a rollout whose loss counts 0 stands in.
            rows = trained[part] if part else shortest[None]
            mine, all_ = (tokens[rows].sum(), totals[step, 0]) if by_token else (len(rows), totals[step, 1])
            share = float(mine / all_) * accumulate * world_size if part else 0.0
            parts.append((rows, share))
    wanted = [(len(blocks(_lengths(epoch, rows))), len(rows)) for rows, _ in parts]
    counts = [
        min(max(count for count, _ in part), min(most for _, most in part))
        for part in zip(*from_ranks(wanted), strict=True)
    ]
    return Batches(
        [
            _collate(epoch, rows, share, temperature, n, share_prompts, derive_seed(*seed, number))
            for number, ((rows, share), n) in enumerate(zip(parts, counts, strict=True))
        ]
    )


def mini_batch_sizes(epoch: EpochRecord, minibatches: int) -> Tensor:
    """Response tokens and rollouts that count in each mini-batch on this rank, those without gradient included,
    [M, 2]."""
    sizes = torch.stack([epoch.mask.sum(-1), torch.ones(len(epoch.rollouts), dtype=torch.long)], 1)
    sizes *= epoch.counted[:, None]
    return torch.zeros(minibatches, 2, dtype=torch.long).index_add_(0, _step_of(epoch, minibatches), sizes)


def _lengths(epoch: EpochRecord, rows: Tensor) -> list[int]:
    chosen = [epoch.rollouts[i] for i in rows.tolist()]
    return [len(r.prompt_ids) + len(r.response_ids) for r in chosen]


def _step_of(epoch: EpochRecord, minibatches: int) -> Tensor:
    groups = torch.tensor([r.group for r in epoch.rollouts])
    return groups * minibatches // len(epoch.problems)


def _collate(
    epoch: EpochRecord, rows: Tensor, share: float, temperature: float, count: int, share_prompts: bool, seed: int
) -> MicroBatch:
    sequences = [(r.prompt_ids, r.response_ids) for r in (epoch.rollouts[i] for i in rows.tolist())]
    shared, cut = None, blocks(_lengths(epoch, rows), count)
    if share_prompts and worth_sharing(sequences):
        rows = rows[epoch.mask[rows].sum(1).argsort(descending=True, stable=True)]
        shared = padding.share_prompts([epoch.rollouts[i].prompt_ids for i in rows.tolist()])
        cut = blocks([len(epoch.rollouts[i].response_ids) for i in rows.tolist()])
    chosen = [epoch.rollouts[i] for i in rows.tolist()]
    ids, attention, response = pad_sequences([(r.prompt_ids, r.response_ids) for r in chosen])

    def spread(values: Tensor) -> Tensor:  # from response positions to positions of the whole sequence
        return at_mask(values[rows][epoch.mask[rows]].float(), response)

    credit = epoch.credit
    divergence = credit.divergence or DivergenceSettings(0.0, 1.0)
    top_tokens = top_logp = None
    if credit.distillation is not None:
        top_tokens, top_logp = _compared([epoch.teacher[i] for i in rows.tolist()], chosen)
    return MicroBatch(
        input_ids=ids,
        attention_mask=attention,
        blocks=cut,
        shared=shared,
        response_mask=response,
        logp_old=spread(epoch.logp_old),
        importance=spread(epoch.importance),
        advantages=spread(credit.advantages),
        distillation=None if credit.distillation is None else spread(credit.distillation),
        alpha=divergence.alpha,
        distillation_cap=divergence.importance_cap,
        top_tokens=top_tokens,
        top_logp=top_logp,
        entropy_bonus=None if credit.entropy_bonus is None else spread(credit.entropy_bonus),
        share=share,
        temperature=temperature,
        rows=rows.tolist(),
        seed=seed,
    )


def _compared(scores: Sequence[TeacherScore | None], rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """What the teacher said of the tokens that are compared, [R, k] each; where it said nothing, the divergence has
    weight 0 and any tokens do."""
    k = max((score.top_tokens.shape[1] for score in scores if score is not None), default=1)
    if k == 0:
        raise ConfigError(
            "model.method gives credit with a divergence to the teacher, but asks for no tokens to compare: set top_k "
            "in its needs"
        )
    tokens, logp = [], []
    for score, rollout in zip(scores, rollouts, strict=True):
        length = len(rollout.response_ids)
        tokens.append(torch.arange(k, dtype=torch.int32).expand(length, k) if score is None else score.top_tokens)
        logp.append(torch.full((length, k), -math.log(k + 1)) if score is None else score.top_logp)
    return torch.cat(tokens), torch.cat(logp)
