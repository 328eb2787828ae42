"""The work of forward passes: tokens that were processed, and multiplications that a pass would take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from rlrt_lightning.policy.padding import split_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WORTH_SHARING = 0.9
"""Prompts are shared if this reduces the work to less than this fraction."""


class TokenCounter:
    """Counts the tokens of forward passes without gradients, with and without padding."""

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0  # a tensor on the GPU until it is read, to avoid a synchronization
        self.padded_tokens = 0
        self._report: Callable[[int], None] | None = None

    def add(self, input_ids: Tensor, mask: Tensor) -> None:
        """Counts a forward pass over tokens [B, T]; the mask [B, >= T], 0 at padding, may also cover cached tokens."""
        self.tokens = self.tokens + mask[:, -input_ids.shape[1] :].sum()
        self.padded_tokens += input_ids.numel()
        if self._report is not None:
            self._report(input_ids.numel())

    @contextmanager
    def reporting(self, report: Callable[[int], None]) -> Iterator[None]:
        """Also passes the number of tokens of each forward pass, including padding, to a function."""
        self._report = report
        try:
            yield
        finally:
            self._report = None


class Work(NamedTuple):
    """Multiplications and additions of a decoder's forward pass, without the output head."""

    per_token: float
    """In the weights, for each token."""
    per_pair: float
    """In the attention, for each pair of a query and a key."""

    @classmethod
    def of(cls, decoder: nn.Module, config: PreTrainedConfig) -> Work:
        """The work of a model. All experts of a mixture are counted, and all layers as full attention."""
        config = config.get_text_config()
        embeddings = sum(p.numel() for m in decoder.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
        heads = getattr(config, "num_attention_heads", None) or 1
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        weights = sum(p.numel() for p in decoder.parameters()) - embeddings
        return cls(2.0 * weights, 4.0 * width * config.num_hidden_layers)

    def separately(self, sequences: Sequence[tuple[list[int], list[int]]]) -> float:
        """The work of sequences (prompt, response) that are each read whole. Without a mask, attention kernels compute
        only the pairs below the diagonal."""
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        return self.per_token * sum(lengths) + self.per_pair * sum(n * n / 2 for n in lengths)

    def sharing(self, sequences: Sequence[tuple[list[int], list[int]]]) -> float:
        """The work if each distinct prompt is read once, and its responses continue from its cache. Different lengths
        then need a mask, with which all pairs are computed."""
        prompts = [len(prompt) for prompt in {tuple(prompt) for prompt, _ in sequences}]
        responses = [(len(response), len(prompt) + len(response)) for prompt, response in sequences]
        tokens = sum(prompts) + sum(n for n, _ in responses)
        pairs = sum(n * n for n in prompts) + sum(n * keys for n, keys in responses)
        return self.per_token * tokens + self.per_pair * pairs

    def worth_sharing(self, sequences: Sequence[tuple[list[int], list[int]]]) -> bool:
        """Whether reading each distinct prompt once saves enough work; sequences are prompts with their responses."""
        saves = self.sharing(sequences) < WORTH_SHARING * self.separately(sequences)
        return saves and all(prompt for prompt, _ in sequences)

    def split(
        self, sequences: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[list[int], list[int], list[int]]] | None:
        """Splits each sequence into a prefix, read once for all sequences that begin with it, the rest of its prompt
        and its response; whole prompts or common prefixes, whichever takes less work. None if reading each sequence
        whole takes less."""

        def joined(parts: Sequence[tuple[list[int], list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
            return [(prefix, rest + response) for prefix, rest, response in parts]

        whole = [(prompt, list[int](), response) for prompt, response in sequences]
        best = min(whole, split_prompts(sequences), key=lambda parts: self.sharing(joined(parts)))
        return best if self.worth_sharing(joined(best)) else None
