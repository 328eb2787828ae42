"""Rollouts with the forward pass of transformers, from the weights that are being trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlrt_lightning.policy.caching import cache_argument
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.padding import share_prompts
from rlrt_lightning.rollouts.base import Rollout, RolloutEngine, Sampling, Stops, empty_rollouts, room
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.precision import Dtype
from rlrt_lightning.runtime.seeding import generator

NOISE_BLOCK = 64
"""Random numbers drawn at a time for each row."""


class TransformersEngine(RolloutEngine):
    """Samples with the policy's own weights. Each prompt is processed once for its K rollouts, and finished rollouts
    leave the batch. The log-probs equal the policy's up to rounding.

    Args:
        max_rows: Maximum number of rollouts decoded at once; bounds the memory of the key-value cache.
        dtype: Sample with a copy of the weights in this type, which is updated before each epoch and freed before
            training; null samples with the policy's weights themselves, in the autocast of `trainer.precision`. The
            copy is worth its memory with `--trainer.precision=bf16-mixed`, where each step would otherwise cast all
            weights (also set `--data.rescore=true`), and with sharded weights (fsdp2), which would otherwise be
            gathered from all ranks for every token.
    """

    def __init__(self, max_rows: int = 256, dtype: Dtype | None = None) -> None:
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

    def device_bytes(self, policy: Policy, available: int | None) -> tuple[float, float]:
        """See `RolloutEngine.device_bytes`: the copy in `dtype`."""
        size = 0 if self.dtype is None else getattr(torch, self.dtype).itemsize
        return size * sum(float(weight.numel()) for weight in policy.model.parameters()), 0.0

    def sync(self, policy: Policy) -> None:
        """See `RolloutEngine.sync`.

        Raises:
            ConfigError: If the policy's architecture cannot decode rows of different lengths together.
        """
        if not policy.decodes_rows:
            raise ConfigError(
                f"data.engine: TransformersEngine cannot sample from {type(policy.model).__name__}, whose key-value "
                "cache gives different results for a padded batch and a single row; use a vLLM engine or another model"
            )
        self._policy = policy
        if self.dtype is None:
            return
        dtype = getattr(torch, self.dtype)
        if self._copy is None:
            self._copy = policy.empty_copy(dtype)
        own = self._copy.state_dict()
        for name, weight in policy.merged_weights(dtype):
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
        yield from empty_rollouts(policy, prompts, n, sampling)
        fitting = [i for i in range(len(prompts)) if room(policy, prompts[i], sampling)]
        rows = [(group, k) for group in sorted(fitting, key=lambda i: len(prompts[i])) for k in range(n)]
        at_once = self.max_rows // n * n or self.max_rows  # whole groups, if they fit
        with policy.evaluating() as model:
            own = self._copy is not None
            context: Any = torch.autocast(policy.device.type, enabled=False) if own else nullcontext()
            for start in range(0, len(rows), at_once):
                chosen = rows[start : start + at_once]
                with context:
                    yield from _Decoding(self._copy or model, policy, prompts, chosen, sampling, stops, seeds).run()


class _Decoding:
    """Decodes a batch of rollouts. The rows of the batch are the unfinished rollouts.

    Args:
        model: The model that computes the logits.
        policy: Provides the tokenizer.
        prompts: Token ids of each prompt.
        chosen: Prompt index and rollout index of each rollout.
        sampling: How tokens are sampled.
        stops: The tokens and strings that end a response.
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
        rows = torch.arange(len(self.noise), device=self.device)  # the rollout in each row of the batch
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
            # Selecting rows copies the cache, so wait until a fifth of them are done.
            if open_.sum() <= 0.8 * len(rows):
                keep = open_.nonzero()[:, 0]
                cache.reorder_cache(keep)
                rows, tokens, mask, noise, open_ = rows[keep], tokens[keep], mask[keep], noise[keep], open_[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = self._forward(tokens[:, None], mask, cache)

    def _read_prompts(self) -> tuple[Tensor, Any, Tensor]:
        """Processes each prompt once, then copies its cache to its rows. Prompts are left-padded so that all rows
        write their next token at the same position."""
        from rlrt_lightning.rollouts.cache import growing_cache

        ids, mask, after = share_prompts([self.prompts[group] for group, _ in self.chosen], self.device)
        cache: Any = growing_cache(self.model.config, ids.shape[1] + self.steps)
        logits = self._forward(ids, mask, cache)
        cache.reorder_cache(after)  # can also repeat rows, in every kind of layer
        return logits[after], cache, mask[after]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        # A finished row may stay in the batch past the model's last position.
        last = None if self.policy.max_positions is None else self.policy.max_positions - 1
        positions = (mask.cumsum(1) - 1).clamp(min=0, max=last)[:, -ids.shape[1] :]
        return self.policy.next_logits(
            self.model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **cache_argument(self.model, cache),
        )

    def _at_stop_string(self, rows: Tensor, step: int) -> Tensor:
        """Whether the newest token of each row completes a stop string, [R]."""
        found = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        if not self.stops:
            return found
        for row, rollout in enumerate(rows.tolist()):
            text = self._text_end(rollout, step + 1)
            found[row] = any(stop in text for stop in self.stops)
        return found

    def _text_end(self, row: int, length: int) -> str:
        """The end of the text of a row's first `length` tokens, long enough for any stop string. Most tokens have at
        least one character, but a byte token may have a quarter of one and an unknown token none."""
        window = self.longest_stop + 8
        while True:
            text = self.policy.decode(self.tokens[row, max(0, length - window) : length].tolist(), keep_special=True)
            # The first token of the window may lose a space, or up to three bytes of a character that starts earlier.
            if window >= length or len(text) >= self.longest_stop + 4:
                return text
            window *= 2

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
    """Samples one token per row by inverting the cumulative distribution at a given random number, so that a row's
    sample does not depend on the other rows of the batch.

    Args:
        logits: Logits, [R, V].
        uniform: One number in [0, 1) for each row, [R].
        sampling: Temperature, top-p, top-k and min-p.

    Returns:
        Tokens [R], their log-probs, and the entropy of the distribution (nats), float32 [R] each; log-probs and
        entropy are before truncation by top-p, top-k and min-p.
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
        cumulative = _truncate(probs, sampling).cumsum(-1)
        total = cumulative[:, -1:]
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        # With non-finite weights no token is found, and the log-prob is non-finite too.
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0], entropy


def _truncate(probs: Tensor, sampling: Sampling) -> Tensor:
    """Sets to 0 the probabilities that top-k, top-p and min-p drop, in the order of transformers, without
    renormalizing."""
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
