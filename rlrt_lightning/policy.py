"""The policy: a causal language model, its tokenizer, and the log-probabilities of given tokens under it."""

from __future__ import annotations

import importlib.util
import logging
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlrt_lightning.caching import cache_argument, copy_rows
from rlrt_lightning.chat import ChatTemplate, control_tokens, named_tokens
from rlrt_lightning.errors import ConfigError, first_line
from rlrt_lightning.log_probs import Compute, in_chunks, token_log_probs
from rlrt_lightning.lora import LoRA, TeacherAdapters, merged
from rlrt_lightning.padding import Shared, at_mask, batches, pad_sequences, share_prompts, worth_sharing
from rlrt_lightning.sharding import decoder_states, in_step, whole
from rlrt_lightning.tasks.base import Messages

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache, DynamicCache

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "tasks" / "strategy_sum" / "model"


class Scored:
    """Tokens that forward passes without gradient have read, and the places that these took, padding included."""

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0  # read when it is asked for: a GPU would stop for it
        self.places = 0

    def add(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Counts a pass over tokens [B, T], with the mask of what is seen, [B, T] or longer."""
        self.tokens = self.tokens + attention_mask[:, -input_ids.shape[1] :].sum()
        self.places += input_ids.numel()


@final
class Policy(nn.Module):
    """The language model that is trained. Nothing is read from disk before it is needed; the weights come last.

    Args:
        path: A folder, a Hugging Face id, or `embedded` for the small model that ships with the package.
        dtype: Type of the weights. Keep float32 for training and let `--trainer.precision=bf16-mixed` compute in bf16:
            an update of 1e-6 vanishes in the 8 bits of a bfloat16 weight.
        attention: Attention implementation of transformers: sdpa, eager, flash_attention_2, ...
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        logits_chunk: Tokens whose logits exist at once while log-probs are computed; memory is this times the
            vocabulary, not batch times length times vocabulary.
        score_tokens: Tokens, padding included, in one forward pass without gradient.
        chat: Put prompts into the model's chat template; null does so where the tokenizer has one. Without it, a
            conversation is the text of its messages.
        chat_kwargs: Variables of the chat template, for example `enable_thinking: false`; it has to read them.
        system_prompt: Put before the conversation as the system's message; needs a chat template with a system role.
        lora: Train low-rank adapters in place of the weights; null trains all weights.
    """

    def __init__(
        self,
        path: str = "embedded",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        logits_chunk: int = 1024,
        score_tokens: int = 16384,
        chat: bool | None = None,
        chat_kwargs: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"logits_chunk": logits_chunk, "score_tokens": score_tokens}.items():
            if value < 1:
                raise ConfigError(f"model.policy.{name} is {value}; it has to be at least 1")
        for name, given in {"system_prompt": system_prompt is not None, "chat_kwargs": bool(chat_kwargs)}.items():
            if given and chat is False:
                raise ConfigError(f"model.policy.{name} is for a chat template, and model.policy.chat is false")
        self.path = str(EMBEDDED) if path == "embedded" else path
        self.dtype = dtype
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.logits_chunk = logits_chunk
        self.score_tokens = score_tokens
        self.chat = chat
        self.chat_kwargs = chat_kwargs or {}
        self.system_prompt = system_prompt
        self.lora = lora
        if lora is not None and importlib.util.find_spec("peft") is None:
            raise ConfigError(
                "model.policy.lora needs peft, which is not installed: pip install 'rlrt-lightning[lora]'"
            )
        self._head_is_known = True
        self._continues_prompts = False
        self.decodes_rows = False
        """Whether padded rows can be decoded token by token with a key-value cache; known after `load`."""
        self.scored = Scored()
        """What was read without gradient."""

    # -- what can be known before the weights are there ------------------------------------------------------------

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            ConfigError: If there is no model at `path`, or it is no causal language model.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model.policy.path: no model can be read at {self.path!r}: {_reason(error)}") from error
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ConfigError(f"model.policy.path: {self.path!r} is a {config.model_type} model, not a causal LM")
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ConfigError: If there is none at `path`, or it has no chat template for `chat`, `chat_kwargs` or
                `system_prompt`.
        """
        from transformers import AutoTokenizer

        _ = self.config  # says more clearly what is wrong with a folder that holds no model at all
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"model.policy.path: no tokenizer can be read at {self.path!r}: {_reason(error)}"
            ) from error
        asked = {"chat": self.chat, "system_prompt": self.system_prompt is not None, "chat_kwargs": self.chat_kwargs}
        for setting, given in asked.items():
            if given and not tokenizer.chat_template:
                raise ConfigError(
                    f"model.policy.{setting} is set, but the tokenizer of {self.path!r} has no chat template"
                )
        if tokenizer.chat_template:
            ChatTemplate(tokenizer, self.path, self.system_prompt, self.chat_kwargs)  # refuses what it has no use for
        return tokenizer

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.path, self.system_prompt, self.chat_kwargs)

    @cached_property
    def end_tokens(self) -> list[int]:
        """Tokens that end a response: those of the generation config and of the tokenizer."""
        from transformers import GenerationConfig

        try:
            configured = GenerationConfig.from_pretrained(self.path).eos_token_id
        except OSError:  # a folder without a generation_config.json
            configured = self.config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        ends = sorted({int(e) for e in [*ends, self.tokenizer.eos_token_id] if e is not None})
        if not ends:
            raise ConfigError(
                f"model.policy.path: {self.path!r} names no end-of-sequence token, so no response can end"
            )
        self.check_embedded(ends, "end tokens")
        return ends

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model has positions for; None where it does not say. With longrope (Phi-3), only
        those before a longer sequence in the batch would change the frequencies of all others."""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return positions if positions is None else min([positions, *self._positions_before_longrope])

    @property
    def _positions_before_longrope(self) -> list[int]:
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        kinds = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))]
        return [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]

    @property
    def chats(self) -> bool:
        """Whether prompts are put into the chat template."""
        return bool(self.tokenizer.chat_template) and self.chat is not False

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """Every token id that the tokenizer knows. The model may have fewer embeddings, or, padded, more."""
        return frozenset(self.tokenizer.get_vocab().values())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens by their text: also those that have no role such as end or padding."""
        named = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        added = self.tokenizer.added_tokens_decoder
        return named | {token.content: number for number, token in added.items() if token.special}

    @property
    def lacks_embeddings(self) -> bool:
        """Whether the tokenizer has tokens that the model has no embedding for."""
        rows = getattr(self.config.get_text_config(), "vocab_size", None)
        return rows is not None and max(self.token_ids) >= rows

    def check_embedded(self, ids: Sequence[int], what: str) -> None:
        """Refuses tokens that the model cannot read or draw.

        Args:
            ids: The tokens.
            what: What they are, in words.

        Raises:
            ConfigError: If some have no embedding.
        """
        rows = getattr(self.config.get_text_config(), "vocab_size", None)
        if rows is None or max(ids, default=0) < rows:
            return
        beyond = sorted({i for i in ids if i >= rows})
        names = ", ".join(f"{i} ({self.tokenizer.convert_ids_to_tokens(i)})" for i in beyond[:5])
        raise ConfigError(
            f"model.policy.path: the model at {self.path!r} has embeddings for token ids below {rows}, and its "
            f"tokenizer gives {what} beyond them: {names}; resize the model's embeddings, or take the tokenizer that "
            "belongs to it"
        )

    def prompt_text(self, prompt: str | Messages) -> str:
        """Text of a prompt as the model reads it, up to where the response begins.

        Raises:
            ConfigError: If the chat template does not take it, or leaves out a part of it.
        """
        if not self.chats:
            return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt)
        return self._chat_template.render([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Tokens of a prompt, up to where the response begins; see `prompt_text`.

        Raises:
            ConfigError: If the chat template refuses it, or the model has no embedding for one of its tokens.
        """
        text, tokenizer = self.prompt_text(prompt), self.tokenizer
        # A chat template writes the special tokens itself.
        ids = list(tokenizer(text, add_special_tokens=not self.chats)["input_ids"])
        if not self.chats:  # some tokenizers end any text with an end token, after which no response begins
            closing = {*self.end_tokens, *named_tokens(tokenizer, ("eos", "sep", "cls", "pad"))}
            while ids and ids[-1] in closing:
                ids.pop()
        while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # by the text and by the tokenizer
            del ids[0]
        self.check_embedded(ids, "a prompt tokens")
        return ids

    @cached_property
    def _control_tokens(self) -> frozenset[int]:
        return control_tokens(self.tokenizer, self.end_tokens)

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Text of response tokens, without end tokens, padding and what the chat template writes around messages. Other
        special tokens, such as `<think>` or `<answer>` in some models, are text: see `chat.control_tokens`.

        Args:
            ids: The tokens. Those that the tokenizer does not know, of embeddings that only pad, have no text.
            keep_special: Leave all special tokens in the text.
        """
        said = [i for i in ids if i in self.token_ids and (keep_special or i not in self._control_tokens)]
        return str(self.tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def read_back(self, text: str) -> str:
        """What becomes of a text within a response that the tokenizer takes apart and puts together again."""
        a, b = (self.decode(self.tokenizer(t, add_special_tokens=False)["input_ids"], True) for t in (text, "a" + text))
        return b if text in b else a  # at the beginning of a text some tokenizers drop white space

    # -- the weights -----------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Reads the weights, once.

        Raises:
            ConfigError: If they cannot be read, or the attention implementation is not there.
        """
        if "model" in self._modules:
            return
        from transformers import AutoModelForCausalLM

        _ = self.config
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attention,
                trust_remote_code=False,
                weights_only=True,  # of a pytorch_model.bin, which is a pickle
            )
        except (OSError, ValueError, ImportError, pickle.UnpicklingError) as error:
            raise ConfigError(f"model.policy: {self.path!r} cannot be loaded: {_reason(error)}") from error
        if self.gradient_checkpointing:
            # Renamed in later releases of transformers, which warn of the old name.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if self.lora is not None:
            self.lora.add_to(model)
        if self._positions_before_longrope:
            log.warning(
                "model.policy.path: sequences are limited to %d tokens, where the model's position frequencies change "
                "(longrope): beyond, the rows of a batch would change each other's log-probs",
                self.max_positions,
            )
        self.adopt(model)

    def adopt(self, model: PreTrainedModel) -> None:
        """Takes a loaded model as the policy's weights."""
        self.model = model.train()
        self._head_is_known = self._chunks_match_the_model()
        self._continues_prompts, self.decodes_rows = self._cache_matches_the_model()

    def empty_copy(self, dtype: torch.dtype) -> PreTrainedModel:
        """A whole model of the same kind without adapters, whose weights are yet to be filled in, for inference."""
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        with no_init_weights(), torch.device(self.device):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, attn_implementation=self.attention, trust_remote_code=False
            )
        return model.eval().requires_grad_(False)

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by their names in a checkpoint, one at a time and without gradient, adapters merged into them. A
        head that is tied to the embeddings is among them: a sampler may have packed it for itself, and would keep the
        old one. Where they are sharded all ranks have to read them, and each gets them whole."""
        state = self.model.state_dict()
        for name, tensor in state.items():
            if (pair := merged(self.model, name, tensor)) is not None:
                yield pair[0], whole(pair[1]).detach()
        head = self.model.get_output_embeddings()
        if head is not None and "lm_head.weight" not in state:
            yield "lm_head.weight", whole(cast(Tensor, head.weight)).detach()

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
        self.model = teacher._modules.get("model", own)
        try:
            with adapters.within(own) if adapters is not None else nullcontext():
                yield
        finally:
            self.model = own

    # -- log-probabilities -----------------------------------------------------------------------------------------

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
            self.scored.add(inputs["input_ids"], inputs["attention_mask"])
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


def _reason(error: Exception) -> str:
    """Why a model cannot be read, in a line."""
    if "trust_remote_code" in str(error):
        return (
            "it comes with Python code that would have to run to read it (auto_map), and that is never done; take a "
            "model of an architecture that transformers has"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that holds more than tensors, which could run code when it is read; take a model "
            "with safetensors"
        )
    return first_line(error)
