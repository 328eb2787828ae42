"""The policy: a causal language model, its tokenizer, and the log-probabilities of given tokens under it."""

from __future__ import annotations

import importlib.util
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

import torch
from torch import Tensor

from rlrt_lightning.policy.forward import ForwardPasses, TokenCounter
from rlrt_lightning.policy.lora import LoRA, merged
from rlrt_lightning.policy.sharding import whole
from rlrt_lightning.policy.tokens import reason
from rlrt_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parents[1] / "tasks" / "strategy_sum" / "model"


@final
class Policy(ForwardPasses):
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
        self.counter = TokenCounter()
        """What was read without gradient."""

    def load(self) -> None:
        """Reads the weights, once.

        Raises:
            ConfigError: If they cannot be read, or the attention implementation is not there.
        """
        if hasattr(self, "model"):
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
            raise ConfigError(f"model.policy: {self.path!r} cannot be loaded: {reason(error)}") from error
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
