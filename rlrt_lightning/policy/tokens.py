"""The policy without its weights: configuration, tokenizer, chat template and special tokens."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rlrt_lightning.policy.chat import ChatTemplate, control_tokens, named_tokens
from rlrt_lightning.policy.texts import thoughts
from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.runtime.hub import check_reachable
from rlrt_lightning.tasks.base import Messages

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class TokenSide:
    """The part of a `Policy` that does not need its weights. Files are read on first use."""

    path: str
    chat: bool | None
    chat_kwargs: dict[str, Any]
    system_prompt: str | None
    _max_positions: int | None

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            ConfigError: If there is no model at `path`, or it is not a causal language model.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

        check_reachable("model.policy.path", self.path, "model")
        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model.policy.path: no model can be read at {self.path!r}: {reason(error)}") from error
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ConfigError(f"model.policy.path: {self.path!r} is a {config.model_type} model, not a causal LM")
        return config

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            ConfigError: If there is no tokenizer at `path`, or it has no chat template although `chat`, `chat_kwargs`
                or `system_prompt` is set.
        """
        from transformers import AutoTokenizer

        _ = self.config  # gives a clearer error for a folder without a model
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"model.policy.path: no tokenizer can be read at {self.path!r}: {reason(error)}"
            ) from error
        needs = {"chat": self.chat, "system_prompt": self.system_prompt is not None, "chat_kwargs": self.chat_kwargs}
        for setting, given in needs.items():
            if given and not tokenizer.chat_template:
                raise ConfigError(
                    f"model.policy.{setting} is set, but the tokenizer of {self.path!r} has no chat template"
                )
        if tokenizer.chat_template:
            ChatTemplate(tokenizer, self.path, self.system_prompt, self.chat_kwargs)  # checks the two settings
        return tokenizer

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.path, self.system_prompt, self.chat_kwargs)

    @cached_property
    def end_tokens(self) -> list[int]:
        """Tokens that end a response: the end tokens of the generation config and of the tokenizer."""
        from transformers import GenerationConfig

        try:
            configured = GenerationConfig.from_pretrained(self.path).eos_token_id
        except OSError:  # a folder without a generation_config.json
            configured = self.config.eos_token_id
        ends = configured if isinstance(configured, list) else [configured]
        ends = sorted({int(e) for e in [*ends, self.tokenizer.eos_token_id] if e is not None})
        if not ends:
            raise ConfigError(
                f"model.policy.path: {self.path!r} defines no end-of-sequence token, so responses cannot end; set "
                "eos_token_id in its generation_config.json"
            )
        self.check_embedded(ends, "end tokens")
        return ends

    @property
    def max_positions(self) -> int | None:
        """Maximum sequence length: the setting `max_positions`, or the model's; None if its config does not set one.
        With longrope (Phi-3) the model's is the original length, beyond which a sequence changes the position
        frequencies of the whole batch.

        Raises:
            ConfigError: If the setting exceeds the model's maximum.
        """
        limits = [getattr(self.config.get_text_config(), "max_position_embeddings", None)]
        own = min([n for n in (*limits, *self._positions_before_longrope) if n is not None], default=None)
        if self._max_positions is None or own is None:
            return self._max_positions if own is None else own
        if self._max_positions > own:
            raise ConfigError(
                f"model.policy.max_positions is {self._max_positions}, but the model at {self.path!r} has {own} "
                "positions; set it to at most this number, or to null"
            )
        return self._max_positions

    @property
    def _positions_before_longrope(self) -> list[int]:
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        kinds = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))]
        return [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]

    @property
    def chats(self) -> bool:
        """Whether the chat template is applied to prompts."""
        return bool(self.tokenizer.chat_template) and self.chat is not False

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """All token ids of the tokenizer. The model may have fewer embeddings, or more if they are padded."""
        return frozenset(self.tokenizer.get_vocab().values())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of all special tokens by their text, including those without a role such as end or padding."""
        named = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        added = self.tokenizer.added_tokens_decoder
        return named | {token.content: number for number, token in added.items() if token.special}

    @property
    def lacks_embeddings(self) -> bool:
        """Whether the tokenizer has tokens for which the model has no embedding."""
        rows = getattr(self.config.get_text_config(), "vocab_size", None)
        return rows is not None and max(self.token_ids) >= rows

    def check_embedded(self, ids: Sequence[int], what: str) -> None:
        """Refuses tokens without an embedding.

        Args:
            ids: The token ids.
            what: Description of the tokens for the error message.

        Raises:
            ConfigError: If the model has no embedding for one of the tokens.
        """
        rows = getattr(self.config.get_text_config(), "vocab_size", None)
        if rows is None or max(ids, default=0) < rows:
            return
        beyond = sorted({i for i in ids if i >= rows})
        names = ", ".join(f"{i} ({self.tokenizer.convert_ids_to_tokens(i)})" for i in beyond[:5])
        raise ConfigError(
            f"model.policy.path: the model at {self.path!r} has embeddings for token ids below {rows}, but its "
            f"tokenizer gives {what} beyond them: {names}; resize the model's embeddings, or use the model's own "
            "tokenizer"
        )

    def prompt_text(self, prompt: str | Messages, chat_kwargs: dict[str, Any] | None = None) -> str:
        """The text of a prompt with the chat template applied, up to the start of the response.

        Args:
            prompt: The prompt.
            chat_kwargs: Variables of the chat template, which override the policy's.

        Raises:
            ConfigError: If the chat template rejects the prompt or ignores one of its messages.
        """
        if not self.chats:
            return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._chat_template.render(messages, chat_kwargs)

    def check_chat_kwargs(self, chat_kwargs: dict[str, Any], setting: str) -> None:
        """Checks variables for `prompt_text`.

        Args:
            chat_kwargs: The variables.
            setting: The setting that holds them, for the message.

        Raises:
            ConfigError: If the chat template does not read one of them, or none is applied.
        """
        if not chat_kwargs:
            return
        if not self.chats:
            raise ConfigError(f"{setting} is set, but no chat template is applied to prompts (model.policy.chat)")
        self._chat_template.check_kwargs(chat_kwargs, setting)

    def encode_prompt(self, prompt: str | Messages, chat_kwargs: dict[str, Any] | None = None) -> list[int]:
        """Token ids of a prompt, up to the start of the response; see `prompt_text`.

        Args:
            prompt: The prompt.
            chat_kwargs: Variables of the chat template, which override the policy's.

        Raises:
            ConfigError: If the chat template rejects the prompt, or the model has no embedding for one of its tokens.
        """
        text, tokenizer = self.prompt_text(prompt, chat_kwargs), self.tokenizer
        # A chat template adds the special tokens itself.
        ids = list(tokenizer(text, add_special_tokens=not self.chats)["input_ids"])
        if not self.chats:  # some tokenizers append an end token, after which the model would not respond
            closing = {*self.end_tokens, *named_tokens(tokenizer, ("eos", "sep", "cls", "pad"))}
            while ids and ids[-1] in closing:
                ids.pop()
        while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:  # added by both the text and the tokenizer
            del ids[0]
        self.check_embedded(ids, "a prompt tokens")
        return ids

    @cached_property
    def _control_tokens(self) -> frozenset[int]:
        return control_tokens(self.tokenizer, self.end_tokens)

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of response tokens, without end tokens, padding and the chat template's own tokens. Other special
        tokens, such as `<think>` or `<answer>` in some models, are text; see `chat.control_tokens`.

        Args:
            ids: The token ids. Ids unknown to the tokenizer, from padded embeddings, have no text.
            keep_special: Whether to keep all special tokens in the text.
        """
        kept = [i for i in ids if i in self.token_ids and (keep_special or i not in self._control_tokens)]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def thoughts(self, ids: Sequence[int], inside: bool) -> list[bool]:
        """Which response tokens are thinking: those between `<think>` and `</think>`, not the tags' own tokens. The
        tags are found in the text, so that they may be special tokens or consist of several tokens.

        Args:
            ids: The token ids.
            inside: Whether the response begins inside the thinking, because the prompt ends with `<think>`.
        """
        pieces = {i: str(self.tokenizer.decode([i])) if i in self.token_ids else "" for i in set(ids)}
        ends = list(accumulate(len(pieces[i]) for i in ids))
        spans = thoughts("".join(pieces[i] for i in ids), inside)
        starts = [0, *ends[:-1]]
        return [any(a <= start and end <= b for a, b in spans) for start, end in zip(starts, ends, strict=True)]

    def read_back(self, text: str) -> str:
        """A text after encoding and decoding, as it would appear within a completion."""
        a, b = (self.decode(self.tokenizer(t, add_special_tokens=False)["input_ids"], True) for t in (text, "a" + text))
        return b if text in b else a  # some tokenizers drop whitespace at the beginning of a text


def reason(error: Exception) -> str:
    """One line that explains why a model cannot be read."""
    if "trust_remote_code" in str(error):
        return (
            "it requires running Python code from its repository (auto_map), which is not supported; use a model whose "
            "architecture is part of transformers"
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that contains more than tensors and could run code when loaded; use a model with "
            "safetensors weights"
        )
    return first_line(error)
