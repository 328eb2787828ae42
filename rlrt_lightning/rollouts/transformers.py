"""Rollouts with transformers' own forward pass: anywhere, with the very weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlrt_lightning.policy.caching import cache_argument
from rlrt_lightning.policy.padding import share_prompts
from rlrt_lightning.rollouts.base import Rollout, RolloutEngine, Sampling, Stops, room, without_room
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlrt_lightning.policy.model import Policy

NOISE_BLOCK = 64
"""Random numbers drawn at once for each row; a row that ends early has drawn at most this many too many."""


class TransformersEngine(RolloutEngine):
    """Samples with the policy's own weights. A prompt is read once for its K rollouts, and finished ones leave the
    batch. The log-probs are the policy's, to rounding.

    Args:
        max_rows: Rollouts that are decoded at once; bounds the memory of the key-value cache.
        dtype: Sample with a copy of the weights in this type, renewed before each epoch and given back before
            training; null samples with the policy's weights themselves. Worth its memory under
            `--trainer.precision=bf16-mixed`, where each step would otherwise cast all weights (set
            `--data.rescore=true` with it), and with sharded weights (fsdp2), which null has to fetch from all ranks
            again for every token.
    """

    def __init__(self, max_rows: int = 256, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> None:
        if max_rows < 1:
            raise ConfigError(f"data.engine.max_rows is {max_rows}; it has to be at least 1")
        self.max_rows = max_rows
        self.dtype = dtype
        self._policy: Policy | None = None
        self._copy: PreTrainedModel | None = None

    @property
    def ready(self) -> bool:
        """See `RolloutEngine.ready`."""
        return self._policy is not None and (self.dtype is None or self._copy is not None)

    def release(self) -> None:
        """See `RolloutEngine.release`."""
        self._copy = None

    def sync(self, policy: Policy) -> None:
        """See `RolloutEngine.sync`.

        Raises:
            ConfigError: If rows of different lengths cannot be decoded together with the policy's architecture.
        """
        if not policy.decodes_rows:
            raise ConfigError(
                f"data.engine: TransformersEngine cannot sample from {type(policy.model).__name__}: with its key-value "
                "cache a padded batch is not computed as each row alone is; take a vLLM engine, or another model"
            )
        self._policy = policy
        if self.dtype is None:
            return
        if self._copy is None:
            self._copy = policy.empty_copy(getattr(torch, self.dtype))
        own = self._copy.state_dict()
        for name, weight in policy.merged_weights():
            if name in own:
                own[name].copy_(weight)

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """See `RolloutEngine.generate`."""
        policy = self._policy
        if policy is None or not self.ready:
            raise RuntimeError("sync the engine with a policy before it generates")
        stops = Stops.of(policy, sampling)
        yield from without_room(policy, prompts, n, sampling)
        fitting = [i for i in range(len(prompts)) if room(policy, prompts[i], sampling)]
        rows = [(group, k) for group in sorted(fitting, key=lambda i: len(prompts[i])) for k in range(n)]
        at_once = self.max_rows // n * n or self.max_rows  # siblings together, where there is room for them
        with policy.evaluating() as model:
            own = self._copy is not None
            context: Any = torch.autocast(policy.device.type, enabled=False) if own else nullcontext()
            for start in range(0, len(rows), at_once):
                chosen = rows[start : start + at_once]
                with context:
                    yield from _Decoding(self._copy or model, policy, prompts, chosen, sampling, stops, seeds).run()


class _Decoding:
    """Some rollouts on their way from prefix to finished responses. Rows are rollouts that are still open.

    Args:
        model: What computes.
        policy: Whose tokenizer it is.
        prompts: Token ids of each prompt.
        chosen: Prompt and index of each rollout.
        sampling: How tokens are drawn.
        stops: What ends a response.
        seeds: A seed for each prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        prompts: Sequence[list[int]],
        chosen: Sequence[tuple[int, int]],
        sampling: Sampling,
        stops: Stops,
        seeds: Sequence[int],
    ) -> None:
        self.model, self.policy, self.sampling = model, policy, sampling
        self.prompts, self.chosen = prompts, chosen
        self.device = policy.device
        self.ends, self.stops = torch.tensor(stops.ids, device=self.device), stops.strings
        self.longest_stop = max(map(len, stops.strings), default=0)
        self.noise = [generator(seeds[group], "sampling", k) for group, k in chosen]
        self.limits = torch.tensor([room(policy, prompts[group], sampling) for group, _ in chosen], device=self.device)
        self.steps = int(self.limits.max())
        self.tokens = torch.zeros(len(chosen), self.steps, dtype=torch.long, device=self.device)
        self.logp = torch.zeros(len(chosen), self.steps, device=self.device)
        self.entropy = torch.zeros(len(chosen), self.steps, device=self.device)

    def run(self) -> Iterator[Rollout]:
        logits, cache, mask = self._read_prompts()
        rows = torch.arange(len(self.noise), device=self.device)  # which rollout each row of the batch is
        open_ = torch.ones_like(rows, dtype=torch.bool)
        for step in range(self.steps):
            if step % NOISE_BLOCK == 0:
                noise = torch.stack([torch.rand(NOISE_BLOCK, generator=self.noise[r]) for r in rows.tolist()])
                noise = noise.to(self.device)
            tokens, logp, entropy = sample(logits, noise[:, step % NOISE_BLOCK], self.sampling)
            self.tokens[rows, step], self.logp[rows, step], self.entropy[rows, step] = tokens, logp, entropy

            ended = torch.isin(tokens, self.ends) | self._at_stop_string(rows, step)
            done = ended | (step + 1 == self.limits[rows])
            for row in (open_ & done).nonzero()[:, 0].tolist():
                yield self._finish(int(rows[row]), step + 1, truncated=not bool(ended[row]))
            open_ &= ~done
            if not open_.any():
                return
            # Selecting rows copies the cache, so wait until a fifth of them is done.
            if open_.sum() <= 0.8 * len(rows):
                keep = open_.nonzero()[:, 0]
                cache.reorder_cache(keep)
                rows, tokens, mask, noise, open_ = rows[keep], tokens[keep], mask[keep], noise[keep], open_[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = self._forward(tokens[:, None], mask, cache)

    def _read_prompts(self) -> tuple[Tensor, Any, Tensor]:
        """Reads each prompt once, then copies its cache to its rows. Prompts are padded on the left, so that all
        rows write their next token at the same place."""
        from rlrt_lightning.rollouts.cache import growing_cache

        ids, mask, after = share_prompts([self.prompts[group] for group, _ in self.chosen], self.device)
        cache: Any = growing_cache(self.model.config, ids.shape[1] + self.steps)
        logits = self._forward(ids, mask, cache)
        cache.reorder_cache(after)  # repeats rows, too, in every kind of layer
        return logits[after], cache, mask[after]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        # A finished row may wait in the batch for others, beyond the last position that the model has.
        last = None if self.policy.max_positions is None else self.policy.max_positions - 1
        positions = (mask.cumsum(1) - 1).clamp(min=0, max=last)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(self.model, cache),
        )
        return out.logits[:, -1]

    def _at_stop_string(self, rows: Tensor, step: int) -> Tensor:
        """Which rows' text has just come to hold a stop string."""
        found = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        if not self.stops:
            return found
        for row, of in enumerate(rows.tolist()):
            text = self._text_end(of, step + 1)
            found[row] = any(stop in text for stop in self.stops)
        return found

    def _text_end(self, row: int, length: int) -> str:
        """The end of the text of a row's first tokens, with room for a stop string: most tokens have a character or
        more, but a byte has a quarter of one, and one that the tokenizer does not know has none."""
        reach = self.longest_stop + 8
        while True:
            text = self.policy.decode(self.tokens[row, max(0, length - reach) : length].tolist(), keep_special=True)
            # The first of these tokens may lose a space, or three bytes of a character that begins before them.
            if reach >= length or len(text) >= self.longest_stop + 4:
                return text
            reach *= 2

    def _finish(self, row: int, length: int, truncated: bool) -> Rollout:
        group, index = self.chosen[row]
        response = self.tokens[row, :length].tolist()
        return Rollout(
            group=group,
            index=index,
            prompt_ids=self.prompts[group],
            response_ids=response,
            logp_sampler=self.logp[row, :length].cpu(),
            entropy=self.entropy[row, :length].cpu(),
            truncated=truncated,
            text=self.policy.decode(response),
        )


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token for each row by inverting the cumulative distribution at a given random number, so that a row's
    draw does not depend on which other rows are in the batch.

    Args:
        logits: [R, V].
        uniform: One number in [0, 1) for each row, [R].
        sampling: Temperature and cuts.

    Returns:
        Tokens [R], and their log-prob and the entropy of the distribution before the cuts (nats), float32 [R].
    """
    logits = logits.float()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    logp = logits.log_softmax(-1)
    probs = logp.exp()
    entropy = -torch.where(probs > 0, probs * logp, 0.0).sum(-1)
    if sampling.temperature == 0:
        tokens = logp.argmax(-1)
    else:
        cumulative = _cut(probs, sampling).cumsum(-1)
        total = cumulative[:, -1:]
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        # With weights that are not finite no token is found; the log-prob then says what is wrong.
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0], entropy


def _cut(probs: Tensor, sampling: Sampling) -> Tensor:
    """Sets to 0 what top-k, top-p and min-p drop, in transformers' order; not renormalised."""
    if 0 < sampling.top_k < probs.shape[-1]:
        probs = torch.where(probs < probs.topk(sampling.top_k).values[:, -1:], 0.0, probs)
    if sampling.top_p < 1:
        ranked, order = probs.sort(descending=True)
        before = ranked.cumsum(-1) - ranked
        kept = torch.where(before < sampling.top_p * ranked.sum(-1, keepdim=True), ranked, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)
    if sampling.min_p > 0:
        probs = torch.where(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0.0, probs)
    return probs
