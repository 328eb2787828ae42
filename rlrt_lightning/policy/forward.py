"""The forward passes of a policy: log-probs of given tokens, and other functions of the logits, computed in chunks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlrt_lightning.policy import padding
from rlrt_lightning.policy.caching import cache_argument, copy_rows
from rlrt_lightning.policy.head import head_in_float32, logits_from_states
from rlrt_lightning.policy.log_probs import Compute, in_chunks, token_log_probs
from rlrt_lightning.policy.lora import TeacherAdapters
from rlrt_lightning.policy.padding import Shared, at_mask, batches, pad_sequences, share_prompts
from rlrt_lightning.policy.sharding import decoder_states, lockstep
from rlrt_lightning.policy.tokens import TokenSide
from rlrt_lightning.policy.work import TokenCounter, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache

log = logging.getLogger(__name__)


class ForwardPasses(TokenSide, nn.Module):
    """The part of a `Policy` that runs the model."""

    model: PreTrainedModel
    logits_chunk: int
    score_tokens: int
    gradient_checkpointing: bool
    head_dtype: Literal["float32"] | None
    counter: TokenCounter
    _applies_head: bool  # see `_head_matches_model`
    _caches_prompts: bool  # see `_cache_matches_model`

    @property
    def work(self) -> Work:
        """The work of the model's forward passes."""
        return Work.of(self.model.get_decoder() if self._applies_head else self.model, self.config)

    @property
    def shares_prompts(self) -> bool:
        """Whether several responses can share the forward pass of their prompt in training. Not with gradient
        checkpointing, which keeps no cache; with sharded weights, which require the same passes on all ranks; or with
        linear attention, whose cache is overwritten in place before the backward pass."""
        return (
            self._caches_prompts
            and not self._has_linear_attention
            and not self.gradient_checkpointing
            and not isinstance(self.model, FSDPModule)
        )

    @property
    def _has_linear_attention(self) -> bool:
        from transformers.cache_utils import DynamicCache

        return any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=self.config).layers)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @contextmanager
    def evaluating(self) -> Iterator[PreTrainedModel]:
        """The model without dropout, gradients or gradient checkpointing. With sharded weights this is collective: all
        ranks have to enter it, may run different numbers of forward passes, and leave it together."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), lockstep(self.model):
                yield self.model
        finally:
            self.model.train(was_training)

    @contextmanager
    def weights_of(self, teacher: nn.Module) -> Iterator[None]:
        """Runs forward passes with the teacher's weights if it has its own."""
        own = self.model
        adapters: TeacherAdapters | None = getattr(teacher, "adapters", None)
        self.model = getattr(teacher, "model", own)
        try:
            with adapters.applied_to(own) if adapters is not None else nullcontext():
                yield
        finally:
            self.model = own

    def log_probs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        temperature: float = 1.0,
        blocks: Sequence[tuple[int, int]] | None = None,
        shared: Shared | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each response token, without materializing the logits of the whole batch.

        Args:
            input_ids: Prompt and response, padded on the right, [B, T].
            attention_mask: 0 at padding, [B, T].
            response_mask: True at response tokens, [B, T]; never at position 0.
            temperature: Divides the logits; the sampling temperature.
            blocks: See `from_logits`.
            shared: See `from_logits`.

        Returns:
            Log-probs and entropies in nats, float32 [B, T], 0 outside the response. Gradients flow through both.
        """
        targets = input_ids[response_mask.bool()]
        logp, entropy = self.from_logits(
            token_log_probs,
            input_ids,
            attention_mask,
            response_mask,
            temperature,
            targets,
            blocks=blocks,
            shared=shared,
        )
        return at_mask(logp, response_mask), at_mask(entropy, response_mask)

    def from_logits(
        self,
        compute: Compute,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        temperature: float,
        *token_inputs: Tensor,
        blocks: Sequence[tuple[int, int]] | None = None,
        shared: Shared | None = None,
    ) -> list[Tensor]:
        """Applies `compute` to the logits of the response tokens, `logits_chunk` tokens at a time. The logits of a
        chunk are freed, and recomputed in the backward pass, so that memory never holds those of all tokens.

        Args:
            compute: Takes float32 logits [C, V] of C tokens and the matching slices of `token_inputs`, and returns
                tensors [C, ...].
            input_ids: See `log_probs`.
            attention_mask: See `log_probs`.
            response_mask: See `log_probs`.
            temperature: See `log_probs`.
            token_inputs: Further inputs of `compute` for the batch's R response tokens, row by row, [R, ...].
            blocks: Number of rows and width of each block that passes through the decoder separately, from
                `padding.blocks`; None for a single block.
            shared: Prompts that are shared by several rows and read once; the widths of `blocks` then count response
                tokens only. None reads each row's own prompt.

        Returns:
            The outputs of `compute` for all response tokens, [R, ...].
        """
        blocks = blocks or [(len(input_ids), input_ids.shape[1])]
        if shared is not None:
            states = self._states_with_shared_prompts(input_ids, attention_mask, response_mask, blocks, shared)
            return self._in_chunks(compute, states, temperature, *token_inputs)
        parts, start = [], 0
        for rows, width in blocks:
            part = slice(start, start + rows), slice(width)
            parts.append(self._states(input_ids[part], attention_mask[part], response_mask[part]))
            start += rows
        return self._in_chunks(compute, torch.cat(parts), temperature, *token_inputs)

    def _in_chunks(self, compute: Compute, states: Tensor, temperature: float, *token_inputs: Tensor) -> list[Tensor]:
        logits_of = partial(self._tempered_logits, temperature=temperature)
        return in_chunks(compute, logits_of, states, self.logits_chunk, *token_inputs)

    def _states(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """The states from which `_tempered_logits` computes the logits of each response token, [R, H].

        The model gets no mask: padding on the right is invisible to causal attention, and a mask [B, 1, T, T] would
        exclude the kernels whose memory grows linearly with T.
        """
        states = self._all_states(attention_mask, input_ids=input_ids, use_cache=False)
        return states[:, :-1][response_mask[:, 1:].bool()]

    def _all_states(self, mask: Tensor, **inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            self.counter.add(inputs["input_ids"], mask)
        if self._applies_head:
            return decoder_states(self.model, **inputs).last_hidden_state
        return self.model(**inputs).logits

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses after given prompts, without gradients.

        Args:
            sequences: Token ids of prompt and response.
            temperature: Divides the logits.

        Returns:
            For each sequence the log-probs of its T response tokens, nats, float32 [T], on the CPU.
        """
        targets = [torch.tensor(response, dtype=torch.long) for _, response in sequences]
        return [logp for logp, _ in self.score_by(token_log_probs, sequences, temperature, targets)]

    def score_by(
        self,
        compute: Compute,
        sequences: Sequence[tuple[list[int], list[int]]],
        temperature: float,
        *token_inputs: Sequence[Tensor],
    ) -> list[tuple[Tensor, ...]]:
        """Applies `compute` to the logits of given responses after given prompts, as `from_logits` does, without
        gradients. Sequences of similar length are batched, with about `score_tokens` tokens per batch. A prompt shared
        by several responses is read once, and so is a long common prefix of several prompts.

        Args:
            compute: See `from_logits`.
            sequences: Token ids of prompt and response.
            temperature: Divides the logits.
            token_inputs: Further inputs of `compute`, for each sequence's T response tokens, [T, ...].

        Returns:
            For each sequence the outputs of `compute` for its response tokens, [T, ...], on the CPU.
        """
        scores: list[tuple[Tensor, ...]] = [()] * len(sequences)
        lengths = [len(response) for _, response in sequences]
        with self.evaluating():
            for chosen, states in self._states_in_batches(sequences):
                inputs = [torch.cat([values[i] for i in chosen]).to(self.device) for values in token_inputs]
                padding.scatter_rows(self._in_chunks(compute, states, temperature, *inputs), chosen, lengths, scores)
        return scores

    def _states_in_batches(
        self, sequences: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of sequences: their indices, and the states of their response tokens as in `_states`, [R, H]."""
        parts = self.work.split(sequences) if self._caches_prompts else None
        if parts is None:
            for chosen in batches([sum(map(len, sequence)) for sequence in sequences], self.score_tokens):
                yield chosen, self._states(*pad_sequences([sequences[i] for i in chosen], self.device))
            return
        siblings: dict[tuple[int, ...], list[int]] = {}
        for i, (prefix, _, _) in enumerate(parts):
            siblings.setdefault(tuple(prefix), []).append(i)
        groups = list(siblings.items())
        most = max(len(rows) for _, rows in groups)  # a prefix's cache is copied for each of its rows
        for batch in batches([len(prefix) for prefix, _ in groups], max(1, self.score_tokens // most)):
            yield from self._states_after_prefixes(parts, [i for g in batch for i in groups[g][1]])

    def _states_after_prefixes(
        self, parts: Sequence[tuple[list[int], list[int], list[int]]], chosen: Sequence[int]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Reads the distinct prefixes of the chosen sequences, then the rest of the prompts and the responses in
        batches; `parts` are token ids of prefix, rest and response."""
        prompts, prompt_mask, prompt_index = share_prompts([parts[i][0] for i in chosen], self.device)
        prefix = self._prefill(prompts, prompt_mask)
        for part in batches([len(parts[i][1] + parts[i][2]) for i in chosen], self.score_tokens):
            batch = [chosen[m] for m in part]
            ids, mask, response_mask = pad_sequences([parts[i][1:] for i in batch], self.device)
            states = self._response_states(prefix, prompt_mask, prompt_index[part], ids, mask.bool())
            yield batch, states[response_mask]

    def _states_with_shared_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        blocks: Sequence[tuple[int, int]],
        shared: Shared,
    ) -> Tensor:
        """`_states` of rows that share prompts, each of which is read once, [R, H]."""
        prompts, prompt_mask, prompt_index = shared
        prefix = self._prefill(prompts, prompt_mask)
        begin = (attention_mask.bool() & ~response_mask.bool()).sum(1, keepdim=True)
        length = response_mask.sum(1, keepdim=True)
        parts, start = [], 0
        for rows, width in blocks:
            part, start = slice(start, start + rows), start + rows
            column = torch.arange(width, device=input_ids.device)
            mask = column < length[part]
            ids = input_ids[part].gather(1, (begin[part] + column).clamp(max=input_ids.shape[1] - 1))
            parts.append(self._response_states(prefix, prompt_mask, prompt_index[part], ids, mask)[mask])
        return torch.cat(parts)

    def _prefill(self, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
        """The cache of prompts [G, P], padded on the left, and the states of their last tokens [G, H]."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.config)
        states = self._extend(cache, ids, mask)
        return cache, states[:, -1]

    def _extend(self, cache: Cache, ids: Tensor, mask: Tensor) -> Tensor:
        """Appends tokens [B, T] to a cache of P tokens and returns their states; mask of both, [B, P+T]."""
        return self._all_states(
            mask,
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            use_cache=True,
            **cache_argument(self.model, cache),
        )

    def _response_states(
        self,
        prefix: tuple[DynamicCache, Tensor],
        prompt_mask: Tensor,
        prompt_index: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
    ) -> Tensor:
        """The states that predict each response token, [B, T, H].

        Args:
            prefix: Cache and last states of the prompts, from `_prefill`.
            prompt_mask: Attention mask of the prompts, [G, P].
            prompt_index: Index of the prompt of each response, [B].
            response_ids: Responses, padded on the right, [B, T].
            response_mask: True at response tokens, [B, T].
        """
        cache, last = prefix
        states = last[prompt_index][:, None]
        if response_ids.shape[1] <= 1:
            return states[:, : response_ids.shape[1]]
        # The last token of a response predicts nothing, so it is not an input.
        attention_mask = torch.cat([prompt_mask[prompt_index], response_mask[:, 1:].long()], 1)
        following = self._extend(copy_rows(cache, prompt_index), response_ids[:, :-1], attention_mask)
        return torch.cat([states, following], 1)

    def compare(
        self,
        compute: Compute,
        sequences: Sequence[tuple[list[int], list[int]]],
        others: Sequence[tuple[list[int], list[int]]],
        other: nn.Module,
        temperature: float = 1.0,
    ) -> list[tuple[Tensor, ...]]:
        """Applies `compute` to two sets of logits of the same responses: this policy's after one prompt, and those of
        `other` after another prompt. Without gradients, in chunks.

        Args:
            compute: Takes float32 logits [C, V] of C tokens from either side and returns tensors [C, ...].
            sequences: Token ids of prompt and response, for this policy.
            others: The same responses after the prompts of `other`.
            other: The module whose weights are used for `others`, as in `weights_of`.
            temperature: Divides the logits.

        Returns:
            For each sequence the outputs of `compute` for its response tokens, [T, ...], on the CPU.
        """
        scores: list[tuple[Tensor, ...]] = [()] * len(sequences)
        responses = [len(response) for _, response in sequences]
        lengths = [max(sum(map(len, a)), sum(map(len, b))) for a, b in zip(sequences, others, strict=True)]
        with self.evaluating():
            for chosen in batches(lengths, self.score_tokens):
                ours = self._states(*pad_sequences([sequences[i] for i in chosen], self.device))
                with self.weights_of(other):
                    theirs = self._states(*pad_sequences([others[i] for i in chosen], self.device))
                parts = []
                for a, b in zip(ours.split(self.logits_chunk), theirs.split(self.logits_chunk), strict=True):
                    first = self._tempered_logits(a, temperature)
                    with self.weights_of(other):
                        parts.append(compute(first, self._tempered_logits(b, temperature)))
                padding.scatter_rows(
                    [torch.cat(results) for results in zip(*parts, strict=True)], chosen, responses, scores
                )
        return scores

    def _tempered_logits(self, states: Tensor, temperature: float) -> Tensor:
        # Without a known head the states are already logits.
        logits = logits_from_states(self.model, states, self.head_is_float32) if self._applies_head else states
        return logits.float() if temperature == 1 else logits.float() / temperature

    @property
    def head_is_float32(self) -> bool:
        """Whether the head computes in float32, even if the rest of the model computes in half precision."""
        return self.head_dtype is not None and self._applies_head

    def next_logits(self, model: PreTrainedModel, **inputs: Any) -> Tensor:
        """Logits [B, V] of the token after each row of the inputs, computed as in training.

        Args:
            model: The policy's model, or a copy of it in another dtype.
            inputs: Inputs of the model's forward.
        """
        if not self._applies_head:
            return model(logits_to_keep=1, **inputs).logits[:, -1]
        states = decoder_states(model, **inputs).last_hidden_state[:, -1]
        return logits_from_states(model, states, self.head_is_float32)

    def _head_matches_model(self) -> bool:
        """Whether decoder, head and known scalings reproduce the model's logits. Some architectures apply further
        operations after the head; missing one would silently give wrong gradients."""
        self._applies_head = True
        ids = torch.arange(4, device=self.device)[None]
        # Tight, because a missing soft cap hardly changes small logits.
        tolerance = 1e-4 if self.dtype == "float32" else 1e-2
        with self.evaluating():
            with head_in_float32(self.model, self.head_is_float32):
                expected = self.model(input_ids=ids, use_cache=False).logits
            try:
                states = decoder_states(self.model, input_ids=ids, use_cache=False).last_hidden_state
                logits = self._tempered_logits(states, 1.0)
                same = torch.allclose(logits, expected.float(), rtol=tolerance, atol=tolerance)
            except (AttributeError, TypeError):
                same = False
        if not same:
            log.warning(
                "The logits of %s are not its head applied to its decoder's states; the logits of whole batches are "
                "computed at once, which takes more memory, and model.policy.head_dtype is ignored.",
                type(self.model).__name__,
            )
        return same

    def _cache_matches_model(self, half: bool) -> tuple[bool, bool]:
        """Whether responses after cached prompts of different lengths have the same states as in whole sequences, first
        with all response tokens in one pass, then token by token. Some recurrent architectures read padding, or reset
        their state when several tokens follow a cache. `half`: whether the model computes in half precision."""
        sequences = [([0, 1, 2], [3, 2, 1]), ([3], [0, 1, 2]), ([0, 1, 2], [2, 3, 0])]
        tolerance = 0.3 if half else 1e-2
        with self.evaluating():
            expected = self._states(*pad_sequences(sequences, self.device)).float()
            try:
                one_pass, token_by_token = (
                    float((states.flatten(0, 1).float() - expected).norm()) <= tolerance * float(expected.norm())
                    for states in self._cached_states(sequences)
                )
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
                return False, False  # architectures with their own cache class, in older releases of transformers
        return one_pass, token_by_token

    def _cached_states(self, sequences: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """States of responses of equal length after cached prompts, in one pass and token by token, [B, T, H] each."""
        prompts, prompt_mask, prompt_index = share_prompts([prompt for prompt, _ in sequences], self.device)
        ids, _, mask = pad_sequences([([], response) for _, response in sequences], self.device)
        prefix = self._prefill(prompts, prompt_mask)
        one_pass = self._response_states(prefix, prompt_mask, prompt_index, ids, mask)
        cache, attention_mask = copy_rows(prefix[0], prompt_index), prompt_mask[prompt_index]
        states = [prefix[1][prompt_index][:, None]]
        for step in range(ids.shape[1] - 1):
            attention_mask = torch.cat([attention_mask, mask[:, step : step + 1].long()], 1)
            states.append(self._extend(cache, ids[:, step : step + 1], attention_mask))
        return one_pass, torch.cat(states, 1)
