"""Micro-batches: an epoch's rollouts as tensors, split into optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.objective import Aggregation, DivergenceSettings, path_weights
from rlrt_lightning.policy import padding
from rlrt_lightning.policy.padding import Shared, at_mask, balance, blocks, pad_sequences, split
from rlrt_lightning.policy.work import Work
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.seeding import derive_seed
from rlrt_lightning.teacher import TeacherScore


class MicroBatch:
    """The input of one forward and backward pass.

    Neither a tuple nor a dataclass: Lightning converts the tensors inside those, and would round log-probs to bfloat16
    under `--trainer.precision=bf16-true`.

    Args:
        input_ids: Prompt and response, padded on the right, the longest first, [B, S].
        attention_mask: 0 at padding, [B, S].
        blocks: Number of rows and width of each block that passes through the decoder separately, to reduce padding.
        shared: Prompts shared by several rows, as in `Policy.from_logits`; None if each row's own prompt is read.
        response_mask: True at response tokens, [B, S].
        logp_old: Denominator of the surrogate's ratio, as in `EpochRecord`, nats, [B, S].
        importance: Token weights that correct for numerical differences between sampler and trainer, times those of
            `path_weights` if the method's loss has two means, [B, S].
        advantages: Token advantages A_t, [B, S].
        distillation: Weight of the divergence to the teacher at each token, [B, S]; None if the method has none.
        alpha: The divergence's parameter, as in `DivergenceSettings`; unused without a divergence.
        distillation_cap: Upper bound of P_new / P_old in the divergence's weight; unused without a divergence.
        top_tokens: The k tokens compared by the divergence at each of the R response tokens, row by row, int32 [R, k].
        top_logp: Their log-probs under the teacher, nats, [R, k].
        entropy_bonus: Coefficient of the entropy at each token, [B, S]; None if the method has none.
        logp_reference: Log-probs under the reference, nats, [B, S]; None without a KL divergence to it.
        share: Factor of the micro-batch's mean loss, so that the gradients, which Lightning averages over micro-batches
            and ranks, are those of the mean over the whole mini-batch.
        temperature: The sampling temperature.
        rows: Indices of the B rollouts in the epoch's record.
        seed: Seed of the forward pass, for dropout.
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
        logp_reference: Tensor | None,
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
        self.logp_reference = logp_reference
        self.share = share
        self.temperature = temperature
        self.rows = rows
        self.seed = seed

    def to(self, device: torch.device, **options: Any) -> MicroBatch:
        """Copies the micro-batch to a device."""
        moved: dict[str, Any] = {
            name: value.to(device, **options) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        if self.shared is not None:
            prompts, mask, prompt_index = (tensor.to(device, **options) for tensor in self.shared)
            moved["shared"] = prompts, mask, prompt_index
        return MicroBatch(**moved)

    @property
    def padded_tokens(self) -> int:
        """Number of tokens that the decoder reads, including padding."""
        if self.shared is None:
            return sum(rows * width for rows, width in self.blocks)
        return self.shared[0].numel() + sum(rows * max(width - 1, 0) for rows, width in self.blocks)

    @property
    def tokens(self) -> Tensor:
        """Number of tokens that the decoder reads, without padding; a scalar."""
        if self.shared is None:
            return self.attention_mask.sum()
        return self.shared[1].sum() + (self.response_mask.sum(1) - 1).clamp(min=0).sum()


T = TypeVar("T")


class Batches(Generic[T]):
    """A data loader over a list of batches. Lightning adds no distributed sampler to it, as it would to a `DataLoader`;
    each rank has its own rollouts.

    Args:
        batches: The batches; after a resume, the remaining ones.
        served: Number of batches that were yielded before these.
        accumulate: Number of batches per optimizer step.
        longest: Tokens of the longest trained rollout (prompt and response) on any rank; 0 if it was not measured.
    """

    def __init__(self, batches: list[T], served: int = 0, accumulate: int = 1, longest: int = 0) -> None:
        self.batches = batches
        self.accumulate = accumulate
        self.longest = longest
        self.served = self._before = served

    def __len__(self) -> int:
        return self._before + len(self.batches)

    def __iter__(self) -> Iterator[T]:
        for i, batch in enumerate(self.batches):
            self.served = self._before + i + 1
            yield batch

    @property
    def remaining(self) -> list[T]:
        """The batches that were not yielded yet."""
        return self.batches[self.served - self._before :]

    def latest(self, n: int) -> list[T]:
        """The n batches that were yielded last."""
        end = self.served - self._before
        return self.batches[max(0, end - n) : end]

    def state_dict(self) -> dict[str, Any]:
        """Empty: the data module saves the remaining batches. Lightning warns about loaders without this method."""
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
    sharing: Work | None = None,
    seed: tuple[int | str, ...] = (0,),
    tokens_per_pass: int | None = None,
) -> Batches[MicroBatch]:
    """Splits an epoch into mini-batches of whole groups (one optimizer step each), and each mini-batch into equally
    many micro-batches: `accumulate`, or the fewest that `tokens_per_pass` allows.

    Rollouts without a gradient, such as those of a group with equal rewards, are skipped in the forward pass but still
    count in the mean over the mini-batch.

    Args:
        epoch: The epoch's record.
        minibatches: Number of optimizer steps.
        accumulate: Number of micro-batches per optimizer step; unused with `tokens_per_pass`.
        aggregation: As in `clipped_surrogate`.
        temperature: The sampling temperature.
        world_size: Number of ranks whose gradients are averaged.
        totals: `mini_batch_sizes` summed over all ranks; None for one rank.
        from_ranks: Gathers a value from all ranks; sharded weights require the same number of forward passes on each.
        sharing: The policy's work per token, to share the forward pass of a prompt where this saves enough; None never
            shares.
        seed: Names the random streams of the micro-batches.
        tokens_per_pass: Upper bound of a micro-batch's padded tokens (rows * longest row) on every rank; a single
            longer rollout is a micro-batch.
    """
    if totals is None:
        totals = mini_batch_sizes(epoch, minibatches)
    weights = epoch.importance * _path_weights(epoch, minibatches, totals)
    tokens = epoch.mask.sum(-1)
    useful = epoch.trains
    step_of = _step_of(epoch, minibatches)
    by_token = aggregation == "token-mean"
    steps = [(step_of == step).nonzero()[:, 0] for step in range(minibatches)]
    longest = 0
    if tokens_per_pass is not None:
        own = _fewest([_lengths(epoch, members[useful[members]]) for members in steps], tokens_per_pass)
        every = [found for (found,) in from_ranks([own])]
        accumulate, longest = max(passes for passes, _ in every), max(tokens for _, tokens in every)
    parts = []
    for step, members in enumerate(steps):
        trained = members[useful[members]]
        lengths = _lengths(epoch, trained)
        shortest = members[torch.tensor(_lengths(epoch, members)).argmin()]
        for part in balance(lengths, accumulate):
            # All ranks take all steps: if there is nothing to train on, the shortest rollout is used with a share of 0.
            rows = trained[part] if part else shortest[None]
            part_size, total = (tokens[rows].sum(), totals[step, 0]) if by_token else (len(rows), totals[step, 1])
            share = float(part_size / total) * accumulate * world_size if part else 0.0
            parts.append((rows, share))
    wanted = [(len(blocks(_lengths(epoch, rows))), len(rows)) for rows, _ in parts]
    counts = [
        min(max(count for count, _ in part), min(most for _, most in part))
        for part in zip(*from_ranks(wanted), strict=True)
    ]
    return Batches(
        [
            _collate(epoch, weights, rows, share, temperature, n, sharing, derive_seed(*seed, number))
            for number, ((rows, share), n) in enumerate(zip(parts, counts, strict=True))
        ],
        accumulate=accumulate,
        longest=longest,
    )


def _fewest(steps: Sequence[list[int]], limit: int) -> tuple[int, int]:
    """The fewest micro-batches that keep to the limit of tokens in each optimizer step, at least 1, and the tokens of
    the longest rollout, from the tokens of each step's rollouts."""
    passes = max(len(split(lengths, limit)) for lengths in steps)
    return max(1, passes), max((tokens for lengths in steps for tokens in lengths), default=0)


def mini_batch_sizes(epoch: EpochRecord, minibatches: int) -> Tensor:
    """Number of response tokens, of rollouts, and of the method's selected tokens that count in each mini-batch on this
    rank, including those without a gradient, [M, 3]."""
    selected = torch.zeros_like(epoch.mask) if epoch.credit.selected is None else epoch.credit.selected
    sizes = torch.stack([epoch.mask.sum(-1), torch.ones(len(epoch.rollouts), dtype=torch.long), selected.sum(-1)], 1)
    sizes *= epoch.counted[:, None]
    return torch.zeros(minibatches, 3, dtype=torch.long).index_add_(0, _step_of(epoch, minibatches), sizes)


def _path_weights(epoch: EpochRecord, minibatches: int, totals: Tensor) -> Tensor:
    """`path_weights` of each rollout's mini-batch, [N, T]; 1 if the method selects no tokens. `totals`: [M, 3]."""
    weights, credit = torch.ones_like(epoch.importance), epoch.credit
    if credit.selected is not None:
        for i, step in enumerate(_step_of(epoch, minibatches).tolist()):
            weights[i] = path_weights(credit.selected[i], int(totals[step, 0]), int(totals[step, 2]), credit.eta)
    return weights


def _lengths(epoch: EpochRecord, rows: Tensor) -> list[int]:
    chosen = [epoch.rollouts[i] for i in rows.tolist()]
    return [len(r.prompt_ids) + len(r.response_ids) for r in chosen]


def _step_of(epoch: EpochRecord, minibatches: int) -> Tensor:
    groups = torch.tensor([r.group for r in epoch.rollouts])
    return groups * minibatches // len(epoch.problems)


def _collate(
    epoch: EpochRecord,
    weights: Tensor,
    rows: Tensor,
    share: float,
    temperature: float,
    count: int,
    sharing: Work | None,
    seed: int,
) -> MicroBatch:
    sequences = [(r.prompt_ids, r.response_ids) for r in (epoch.rollouts[i] for i in rows.tolist())]
    shared, cut = None, blocks(_lengths(epoch, rows), count)
    if sharing is not None and sharing.worth_sharing(sequences):
        rows = rows[epoch.mask[rows].sum(1).argsort(descending=True, stable=True)]
        shared = padding.share_prompts([epoch.rollouts[i].prompt_ids for i in rows.tolist()])
        cut = blocks([len(epoch.rollouts[i].response_ids) for i in rows.tolist()])
    chosen = [epoch.rollouts[i] for i in rows.tolist()]
    ids, attention, response = pad_sequences([(r.prompt_ids, r.response_ids) for r in chosen])

    def by_sequence(values: Tensor) -> Tensor:  # from layout [N, T] to [B, S]
        return at_mask(values[rows][epoch.mask[rows]].float(), response)

    credit = epoch.credit
    divergence = credit.divergence or DivergenceSettings(0.0, 1.0)
    top_tokens = top_logp = None
    if credit.distillation is not None:
        top_tokens, top_logp = _top_tokens([epoch.teacher[i] for i in rows.tolist()], chosen)
    return MicroBatch(
        input_ids=ids,
        attention_mask=attention,
        blocks=cut,
        shared=shared,
        response_mask=response,
        logp_old=by_sequence(epoch.logp_old),
        importance=by_sequence(weights),
        advantages=by_sequence(credit.advantages),
        distillation=None if credit.distillation is None else by_sequence(credit.distillation),
        alpha=divergence.alpha,
        distillation_cap=divergence.importance_cap,
        top_tokens=top_tokens,
        top_logp=top_logp,
        entropy_bonus=None if credit.entropy_bonus is None else by_sequence(credit.entropy_bonus),
        logp_reference=None if epoch.logp_reference is None else by_sequence(epoch.logp_reference),
        share=share,
        temperature=temperature,
        rows=rows.tolist(),
        seed=seed,
    )


def _top_tokens(scores: Sequence[TeacherScore | None], rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """The tokens compared by the divergence and their log-probs under the teacher, [R, k] each. Rollouts that were not
    scored get arbitrary values; their divergence has weight 0."""
    k = max((score.top_tokens.shape[1] for score in scores if score is not None), default=1)
    if k == 0:
        raise ConfigError(
            "model.method returns credit with a divergence to the teacher but requests no tokens to compare; set top_k "
            "in its needs"
        )
    tokens, logp = [], []
    for score, rollout in zip(scores, rollouts, strict=True):
        length = len(rollout.response_ids)
        tokens.append(torch.arange(k, dtype=torch.int32).expand(length, k) if score is None else score.top_tokens)
        logp.append(torch.full((length, k), -math.log(k + 1)) if score is None else score.top_logp)
    return torch.cat(tokens), torch.cat(logp)
