"""Every forward pass of a policy: log-probs of given tokens, and whatever else is computed from logits, a chunk of
tokens at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlrt_lightning.policy.caching import cache_argument, copy_rows
from rlrt_lightning.policy.log_probs import Compute, in_chunks, token_log_probs
from rlrt_lightning.policy.lora import TeacherAdapters
from rlrt_lightning.policy.padding import Shared, at_mask, batches, pad_sequences, share_prompts, worth_sharing
from rlrt_lightning.policy.sharding import decoder_states, in_step
from rlrt_lightning.policy.tokens import TokenSide

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache, DynamicCache

log = logging.getLogger(__name__)


class TokenCounter:
    """Tokens that forward passes without gradient have read, and the places that these took, padding included."""

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0  # read when it is asked for: a GPU would stop for it
        self.places = 0

    def add(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Counts a pass over tokens [B, T], with the mask of what is seen, [B, T] or longer."""
        self.tokens = self.tokens + attention_mask[:, -input_ids.shape[1] :].sum()
        self.places += input_ids.numel()


class ForwardPasses(TokenSide, nn.Module):
    """The part of a `Policy` that computes with its weights."""

    model: PreTrainedModel
    logits_chunk: int
    score_tokens: int
    gradient_checkpointing: bool
    counter: TokenCounter
    _head_is_known: bool
    _continues_prompts: bool

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt can be read once for several responses in training too: not where activations are computed
        again, which leaves no cache, nor with sharded weights, which want the same passes on all ranks, nor with linear
        attention, whose cache is overwritten and leaves nothing for the backward pass."""
        return (
            self._continues_prompts
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
        """Where the weights are."""
        return next(self.model.parameters()).device

    @contextmanager
    def evaluating(self) -> Iterator[PreTrainedModel]:
        """The model without dropout, gradient or gradient checkpointing. Where the weights are sharded all ranks have
        to enter, each with as many forward passes as it needs, and leave together."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), in_step(self.model):
                yield self.model
        finally:
            self.model.train(was_training)

    @contextmanager
    def weights_of(self, teacher: nn.Module) -> Iterator[None]:
        """Computes with the teacher's weights where it has its own."""
        own = self.model
        adapters: TeacherAdapters | None = getattr(teacher, "adapters", None)
        self.model = getattr(teacher, "model", own)
        try:
            with adapters.within(own) if adapters is not None else nullcontext():
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
        """Log-probability and entropy of each response token, without the logits of the whole batch in memory.

        Args:
            input_ids: Prompt and response, padded on the right, [B, T].
            attention_mask: 0 at padding, [B, T].
            response_mask: True at response tokens, [B, T]; never at position 0.
            temperature: Divides the logits, as it did when the tokens were sampled.
            blocks: As in `from_logits`; so is the next.
            shared: The prompts that rows share.

        Returns:
            Log-probs and entropies in nats, float32 [B, T], 0 outside the response. Gradient flows through both.
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
        *of_tokens: Tensor,
        blocks: Sequence[tuple[int, int]] | None = None,
        shared: Shared | None = None,
    ) -> list[Tensor]:
        """What can be computed from the logits of each response token, `logits_chunk` tokens at a time: the logits of a
        chunk are dropped, and computed again in the backward pass, so that they are never all in memory.

        Args:
            compute: Takes float32 logits [C, V] of C tokens and their share of each of `of_tokens`, and returns tensors
                [C, ...].
            input_ids: As in `log_probs`; so are the next three.
            attention_mask: [B, T].
            response_mask: [B, T].
            temperature: Divides the logits.
            of_tokens: Whatever else `compute` needs of the R response tokens of the batch, in reading order, [R, ...].
            blocks: Rows and width of the parts that go through the decoder on their own, as `padding.blocks` gives
                them; None for one part.
            shared: The prompts, where each is read once for the rows that share it; the widths of the blocks are then
                those of the responses alone.

        Returns:
            The tensors that `compute` returns, of all response tokens, [R, ...].
        """
        blocks = blocks or [(len(input_ids), input_ids.shape[1])]
        if shared is not None:
            states = self._states_of_siblings(input_ids, attention_mask, response_mask, blocks, shared)
            return self._in_chunks(compute, states, temperature, *of_tokens)
        parts, start = [], 0
        for rows, width in blocks:
            part = slice(start, start + rows), slice(width)
            parts.append(self._states(input_ids[part], attention_mask[part], response_mask[part]))
            start += rows
        return self._in_chunks(compute, torch.cat(parts), temperature, *of_tokens)

    def _in_chunks(self, compute: Compute, states: Tensor, temperature: float, *of_tokens: Tensor) -> list[Tensor]:
        logits_of = partial(self._tempered_logits, temperature=temperature)
        return in_chunks(compute, logits_of, states, self.logits_chunk, *of_tokens)

    def _states(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
        """What `_logits` makes the logits of each response token of, [R, H]."""
        states = self._all_states(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return states[:, :-1][response_mask[:, 1:].bool()]

    def _all_states(self, **inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            self.counter.add(inputs["input_ids"], inputs["attention_mask"])
        if self._head_is_known:
            return decoder_states(self.model, **inputs).last_hidden_state
        return self.model(**inputs).logits

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses after given prompts, without gradient.

        Args:
            sequences: Token ids of prompt and response.
            temperature: Divides the logits.

        Returns:
            For each sequence a float32 tensor on the CPU, as long as the response, in nats.
        """
        targets = [torch.tensor(response, dtype=torch.long) for _, response in sequences]
        return [logp for logp, _ in self.score_by(token_log_probs, sequences, temperature, targets)]

    def score_by(
        self,
        compute: Compute,
        sequences: Sequence[tuple[list[int], list[int]]],
        temperature: float,
        *of_tokens: Sequence[Tensor],
    ) -> list[tuple[Tensor, ...]]:
        """What can be computed from the logits of given responses after given prompts (`from_logits`), without
        gradient, in batches of about `score_tokens` tokens of similar length. A prompt that several responses share is
        read once for them.

        Args:
            compute: As in `from_logits`.
            sequences: Token ids of prompt and response.
            temperature: Divides the logits.
            of_tokens: Whatever else `compute` needs of each sequence's response, [T, ...] each.

        Returns:
            For each sequence what `compute` returns of its response, on the CPU, [T, ...] each.
        """
        scores: list[tuple[Tensor, ...]] = [()] * len(sequences)
        with self.evaluating():
            for chosen, states in self._states_of(sequences):
                given = [torch.cat([values[i] for i in chosen]).to(self.device) for values in of_tokens]
                _deal(self._in_chunks(compute, states, temperature, *given), chosen, sequences, scores)
        return scores

    def _states_of(self, sequences: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[list[int], Tensor]]:
        """Sequences in batches, with what `_logits` makes the logits of their response tokens of, [R, H]."""
        if not self._continues_prompts or not worth_sharing(sequences):
            for chosen in batches([sum(map(len, sequence)) for sequence in sequences], self.score_tokens):
                yield chosen, self._states(*pad_sequences([sequences[i] for i in chosen], self.device))
            return
        siblings: dict[tuple[int, ...], list[int]] = {}
        for i, (prompt, _) in enumerate(sequences):
            siblings.setdefault(tuple(prompt), []).append(i)
        groups = list(siblings.items())
        most = max(len(rows) for _, rows in groups)  # the room that a prompt takes is that of all its rows
        for part in batches([len(prompt) for prompt, _ in groups], max(1, self.score_tokens // most)):
            yield from self._states_after_prompts(sequences, [i for g in part for i in groups[g][1]])

    def _states_after_prompts(
        self, sequences: Sequence[tuple[list[int], list[int]]], chosen: Sequence[int]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Reads the prompts of some sequences, and then the responses that follow each."""
        prompts, mask, after = share_prompts([sequences[i][0] for i in chosen], self.device)
        read = self._read_prompts(prompts, mask)
        for part in batches([len(sequences[i][1]) for i in chosen], self.score_tokens):
            those = [chosen[m] for m in part]
            told, _, asked = pad_sequences([([], sequences[i][1]) for i in those], self.device)
            yield those, self._states_told(read, mask, after[part], told, asked)[asked]

    def _states_of_siblings(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        blocks: Sequence[tuple[int, int]],
        shared: Shared,
    ) -> Tensor:
        """`_states` of rows whose prompts are read once for all of them, [R, H]."""
        prompts, mask, after = shared
        read = self._read_prompts(prompts, mask)
        begin = (attention_mask.bool() & ~response_mask.bool()).sum(1, keepdim=True)
        length = response_mask.sum(1, keepdim=True)
        parts, start = [], 0
        for rows, width in blocks:
            part, start = slice(start, start + rows), start + rows
            place = torch.arange(width, device=input_ids.device)
            asked = place < length[part]
            told = input_ids[part].gather(1, (begin[part] + place).clamp(max=input_ids.shape[1] - 1))
            parts.append(self._states_told(read, mask, after[part], told, asked)[asked])
        return torch.cat(parts)

    def _read_prompts(self, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
        """The cache of some prompts [G, P], padded on the left, and the state of each one's last token [G, H]."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.config)
        states = self._read_on(cache, ids, mask)
        return cache, states[:, -1]

    def _read_on(self, cache: Cache, ids: Tensor, mask: Tensor) -> Tensor:
        """The states of tokens [B, T] that follow those of a cache, and are added to it; mask of both, [B, P+T]."""
        return self._all_states(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            use_cache=True,
            **cache_argument(self.model, cache),
        )

    def _states_told(
        self, read: tuple[DynamicCache, Tensor], mask: Tensor, after: Tensor, told: Tensor, asked: Tensor
    ) -> Tensor:
        """What predicts each token of some responses, [B, T, H].

        Args:
            read: What `_read_prompts` gave.
            mask: Of the prompts, [G, P].
            after: Which prompt each response follows, [B].
            told: The responses, padded on the right, [B, T].
            asked: Their mask, [B, T].
        """
        cache, last = read
        states = last[after][:, None]
        if told.shape[1] <= 1:
            return states[:, : told.shape[1]]
        seen = torch.cat([mask[after], asked[:, 1:].long()], 1)  # the last token of a response predicts nothing
        told_states = self._read_on(copy_rows(cache, after), told[:, :-1], seen)
        return torch.cat([states, told_states], 1)

    def compare(
        self,
        compute: Compute,
        sequences: Sequence[tuple[list[int], list[int]]],
        others: Sequence[tuple[list[int], list[int]]],
        other: nn.Module,
        temperature: float = 1.0,
    ) -> list[tuple[Tensor, ...]]:
        """What can be computed from two sets of logits at each token of the same responses: this policy's after one
        prompt, and another model's, or its own, after another prompt. Without gradient, a chunk at a time.

        Args:
            compute: Takes float32 logits [C, V] of C tokens from either side and returns tensors [C, ...].
            sequences: Token ids of prompt and response, for this policy.
            others: The same responses after what the other side is shown.
            other: Whose weights the other side has, as in `weights_of`.
            temperature: Divides the logits.

        Returns:
            For each sequence what `compute` returns of its response, on the CPU, [T, ...] each.
        """
        scores: list[tuple[Tensor, ...]] = [()] * len(sequences)
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
                _deal([torch.cat(results) for results in zip(*parts, strict=True)], chosen, sequences, scores)
        return scores

    def _tempered_logits(self, states: Tensor, temperature: float) -> Tensor:
        logits = self._logits(states).float()
        return logits if temperature == 1 else logits / temperature

    def _logits(self, states: Tensor) -> Tensor:
        """What the model's forward does after its decoder, for the architectures that do more than the head."""
        if not self._head_is_known:
            return states  # they are logits already
        logits = self.model.get_output_embeddings()(states)
        config = self.config.get_text_config()
        if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scaling
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _chunks_match_the_model(self) -> bool:
        """Whether decoder plus head gives the model's own logits. Architectures do odd things after the head, and a
        silent difference would be a wrong gradient."""
        self._head_is_known = True
        ids = torch.arange(4, device=self.device)[None]
        near = 1e-4 if self.dtype == "float32" else 1e-2  # a soft cap far above small logits changes them by little
        with self.evaluating():
            expected = self.model(input_ids=ids, use_cache=False).logits
            try:
                states = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
                same = torch.allclose(self._logits(states).float(), expected.float(), rtol=near, atol=near)
            except (AttributeError, TypeError):
                same = False
        if not same:
            log.warning(
                "The logits of %s are not its head applied to its decoder's states; they are computed for whole "
                "batches at once, which takes more memory.",
                type(self.model).__name__,
            )
        return same

    def _cache_matches_the_model(self) -> tuple[bool, bool]:
        """Whether responses that follow cached prompts of different lengths have the states of whole sequences, where
        all of their tokens follow at once, and one by one. Some recurrent architectures read the padding, or begin anew
        where several tokens follow."""
        sequences = [([0, 1, 2], [3, 2, 1]), ([3], [0, 1, 2]), ([0, 1, 2], [2, 3, 0])]
        near = 1e-2 if self.dtype == "float32" else 0.3
        with self.evaluating():
            expected = self._states(*pad_sequences(sequences, self.device)).float()
            try:
                at_once, in_steps = (
                    float((states.flatten(0, 1).float() - expected).norm()) <= near * float(expected.norm())
                    for states in self._states_by_cache(sequences)
                )
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
                return False, False  # a cache of its own kind, in older releases of transformers
        return at_once, in_steps

    def _states_by_cache(self, sequences: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """`_states` of responses of one length after prompts read once, in one pass and token by token, [B, T, H]."""
        prompts, mask, after = share_prompts([prompt for prompt, _ in sequences], self.device)
        told, _, asked = pad_sequences([([], response) for _, response in sequences], self.device)
        read = self._read_prompts(prompts, mask)
        at_once = self._states_told(read, mask, after, told, asked)
        cache, seen, states = copy_rows(read[0], after), mask[after], [read[1][after][:, None]]
        for step in range(told.shape[1] - 1):
            seen = torch.cat([seen, asked[:, step : step + 1].long()], 1)
            states.append(self._read_on(cache, told[:, step : step + 1], seen))
        return at_once, torch.cat(states, 1)


def _deal(
    results: Sequence[Tensor],
    chosen: Sequence[int],
    sequences: Sequence[tuple[list[int], list[int]]],
    scores: list[tuple[Tensor, ...]],
) -> None:
    """Gives each chosen sequence its response's share of figures of all their tokens, [R, ...] each."""
    lengths = [len(sequences[i][1]) for i in chosen]
    for i, *parts in zip(chosen, *(r.cpu().split(lengths) for r in results), strict=True):
        scores[i] = tuple(part.clone() for part in parts)
