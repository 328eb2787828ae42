"""The policy: a causal language model, its tokenizer, and its forward passes."""

from __future__ import annotations

import importlib.util
import logging
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, final

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rlrt_lightning.policy.dither import dither
from rlrt_lightning.policy.forward import ForwardPasses
from rlrt_lightning.policy.loading import (
    Files,
    NeedsTransformers,
    check_names,
    copy_shards,
    fill,
    meta_model,
    stand_ins,
    tensor_files,
)
from rlrt_lightning.policy.lora import LoRA, adapted_layers, merged, without_adapter
from rlrt_lightning.policy.sharding import FSDP2Strategy, whole
from rlrt_lightning.policy.tokens import reason
from rlrt_lightning.policy.work import TokenCounter
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.precision import computing, half_precision
from rlrt_lightning.runtime.ranks import gather
from rlrt_lightning.runtime.terminal import loading_quietly, waiting_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parents[1] / "tasks" / "last_digit" / "model"


@final
class Policy(ForwardPasses):
    """The language model being trained. Files are read on first use, the weights last.

    Args:
        path: A folder, a Hugging Face id, or `embedded` for the small model that ships with the package.
        dtype: Data type of the weights. Keep float32 for training and compute in bfloat16 with
            `--trainer.precision=bf16-mixed`: bfloat16 weights have 8 significant bits, too few for updates of 1e-6.
        head_dtype: Data type in which the output head computes logits; null uses that of the rest of the model. In
            bfloat16, rounded logits cause much of the mismatch between sampler and trainer.
        dither: Move each weight of a half-precision checkpoint to a random point of the interval that is rounded to it,
            if the trainer rounds float32 weights (`--trainer.precision=bf16-mixed` or `16-mixed`). The rounded weights
            stay the same, but small updates are no longer without effect until they add up to half a rounding step; see
            docs/precision.md. Adapters that are merged into half-precision weights are rounded likewise.
        attention: Attention implementation of transformers: sdpa, eager, flash_attention_2, ...
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        logits_chunk: Number of tokens whose logits are in memory at once when log-probs are computed; memory grows with
            logits_chunk * vocabulary, not batch * length * vocabulary.
        score_tokens: Number of tokens, including padding, in a forward pass without gradients.
        chat: Whether to apply the model's chat template to prompts; null applies it if the tokenizer has one. Without
            the template, the messages of a conversation are joined as text.
        chat_kwargs: Variables of the chat template, such as `enable_thinking: false`; the template has to read them.
        system_prompt: System message added to each conversation; requires a chat template with a system role.
        lora: Train low-rank adapters and freeze the other weights; null trains all weights.
        max_positions: Maximum length of a sequence (prompt and response), in tokens; null: the model's. vLLM needs a
            key-value cache for at least one sequence of this length, which can exceed its memory in models with very
            long contexts.
    """

    def __init__(
        self,
        path: str = "embedded",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        head_dtype: Literal["float32"] | None = "float32",
        dither: bool = True,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        logits_chunk: int = 1024,
        score_tokens: int = 16384,
        chat: bool | None = None,
        chat_kwargs: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        lora: LoRA | None = None,
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("logits_chunk", logits_chunk, 1),
            ("score_tokens", score_tokens, 1),
            ("max_positions", max_positions, 2),
        ):
            if value is not None and value < least:
                raise ConfigError(f"model.policy.{name} is {value}; it has to be at least {least}")
        for name, given in {"system_prompt": system_prompt is not None, "chat_kwargs": bool(chat_kwargs)}.items():
            if given and chat is False:
                raise ConfigError(f"model.policy.{name} requires a chat template, but model.policy.chat is false")
        self.path = str(EMBEDDED) if path == "embedded" else path
        self.dtype = dtype
        self.head_dtype = head_dtype
        self.dither = dither
        self.attention = attention
        self.gradient_checkpointing = gradient_checkpointing
        self.logits_chunk = logits_chunk
        self.score_tokens = score_tokens
        self.chat = chat
        self.chat_kwargs = chat_kwargs or {}
        self.system_prompt = system_prompt
        self.lora = lora
        self._max_positions = max_positions
        if lora is not None and importlib.util.find_spec("peft") is None:
            raise ConfigError(
                "model.policy.lora needs peft, which is not installed: pip install 'rlrt-lightning[lora]'"
            )
        self._applies_head = True
        self._caches_prompts = self._dithered = False
        self.decodes_rows = False
        """Whether padded rows can be decoded token by token with a key-value cache; set by `load`."""
        self.counter = TokenCounter()
        """Counts the tokens of forward passes without gradients."""

    def load(self, strategy: FSDP2Strategy | None = None) -> None:
        """Loads the weights; does nothing if they are loaded.

        Args:
            strategy: Shards the weights. If the files allow it, each rank then reads only its shards; otherwise the
                whole model is loaded, and the caller has to shard it.

        Raises:
            ConfigError: If the weights cannot be read, or the attention implementation is not available.
        """
        if hasattr(self, "model"):
            return
        _ = self.config
        with waiting_for(f"the weights of {self.path}"), loading_quietly(local=Path(self.path).exists()):
            if strategy is None or not self._load_shards(strategy):
                self.adopt(self._prepared(self._load_whole()))
        if self._positions_before_longrope:
            log.warning(
                "model.policy.path: sequences are limited to %d tokens, because longer ones change the position "
                "frequencies (longrope) and so the log-probs of the other rows in a batch",
                self.max_positions,
            )

    def dither_once(self, dtype: torch.dtype, strategy: FSDP2Strategy | None = None) -> None:
        """Applies `dither` to the loaded weights, unless that is off or has been done.

        Args:
            dtype: The half precision to which forward passes round float32 weights.
            strategy: The strategy that shards the weights, or will.
        """
        if self.dither and not self._dithered:
            dither(self.model, dtype, gathered=strategy is not None and strategy.gathers_in_bf16)
            self._dithered = True

    def _load_whole(self) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        try:
            model, found = cast(Any, AutoModelForCausalLM).from_pretrained(
                self.path,
                dtype=getattr(torch, self.dtype),
                attn_implementation=self.attention,
                trust_remote_code=False,
                weights_only=True,  # for a pytorch_model.bin, which is a pickle
                ignore_mismatched_sizes=True,  # refused below, with their names
                output_loading_info=True,
            )
        except (OSError, ValueError, ImportError, pickle.UnpicklingError) as error:
            raise ConfigError(f"model.policy: {self.path!r} cannot be loaded: {reason(error)}") from error
        mismatched = sorted(name for name, *_ in found["mismatched_keys"])
        if unread := mismatched or sorted(found["missing_keys"]):  # transformers initialized them at random
            what = "has other shapes for" if mismatched else "lacks"
            raise ConfigError(f"model.policy: {self.path!r} {what} {len(unread)} weights, such as {unread[0]}")
        return cast("PreTrainedModel", model)

    def _load_shards(self, strategy: FSDP2Strategy) -> bool:
        """Loads a sharded model of which each rank reads only its shards; False if transformers has to load it."""
        files, model = Files(), None
        try:
            files = tensor_files(self.path, self.config)
            model = self._meta_model()
            check_names(model, files, getattr(torch, self.dtype))
            obstacle = None
        except (NeedsTransformers, ImportError, ValueError) as error:
            obstacle = reason(error)
        obstacles = [found for found in gather(obstacle) if found]
        if obstacles or model is None:
            rank_zero_info("model.policy.path: each rank first loads the whole model: %s", obstacles[0])
            return False
        strategy.shard(self._prepared(model), self.head_dtype is not None)
        fill(model, files, strategy.root_device)
        with computing(strategy):
            self.adopt(model, half=half_precision(strategy.precision_plugin) is not None)
        return True

    def _meta_model(self) -> PreTrainedModel:
        return meta_model(self.path, self.config, getattr(torch, self.dtype), self.attention)

    def _prepared(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with gradient checkpointing and adapters, if they are set."""
        if self.gradient_checkpointing:
            # Later releases of transformers renamed the method and warn about the old name.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        if self.lora is not None:
            with stand_ins(model):
                self.lora.add_to(model)
        return model

    def adapted_layers(self) -> list[str]:
        """The names of the layers with adapters, such as `q_proj`. Does not load the weights.

        Raises:
            NeedsTransformers: If the weights are not loaded and the model's initialization needs them.
        """
        model = self.model if hasattr(self, "model") else self._prepared(self._meta_model())
        return adapted_layers(name for name, _ in model.named_parameters())

    def adopt(self, model: PreTrainedModel, half: bool = False) -> None:
        """Uses a loaded model as the policy's model.

        Args:
            model: The model. If it is sharded, all ranks have to call this.
            half: Whether it computes in half precision even if `dtype` is float32.
        """
        self.model = model.train()
        self._applies_head = self._head_matches_model()
        self._caches_prompts, self.decodes_rows = self._cache_matches_model(half or self.dtype != "float32")

    def tokens_with_logits(self, tokens: int) -> int:
        """The number of tokens whose logits are in memory at the same time.

        Args:
            tokens: Padded tokens of a training pass.
        """
        return min(self.logits_chunk, tokens) if self._applies_head else tokens

    def sharded_copy(self, strategy: FSDP2Strategy) -> PreTrainedModel:
        """A frozen copy of the sharded model; each rank copies its shards."""
        model = self._meta_model().requires_grad_(False)
        strategy.shard(model, self.head_dtype is not None)
        copy_shards(model, self.model)
        return model

    def empty_copy(self, dtype: torch.dtype) -> PreTrainedModel:
        """An unsharded model of the same architecture for inference, with uninitialized weights and no adapters."""
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        with no_init_weights(), torch.device(self.device):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, attn_implementation=self.attention, trust_remote_code=False
            )
        return model.eval().requires_grad_(False)

    def merged_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights with adapters merged into them, one at a time, by their names in a checkpoint. Includes a head
        that is tied to the embeddings, because a sampler may keep a separate packed copy of it. Collective if the
        weights are sharded: all ranks have to iterate, and each gets full tensors.

        Args:
            dtype: Data type of the weights into which an adapter is merged; None keeps the model's.
        """
        return self._full_weights(partial(merged, self.model, dtype, self.dither))

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Like `merged_weights`, without the adapters."""
        return self._full_weights(without_adapter)

    def _full_weights(
        self, renamed: Callable[[str, Tensor], tuple[str, Tensor] | None]
    ) -> Iterator[tuple[str, Tensor]]:
        names = set()
        for name, tensor in self.model.state_dict().items():
            if (pair := renamed(name, tensor)) is not None:
                names.add(pair[0])
                yield pair[0], whole(pair[1]).detach()
        head = self.model.get_output_embeddings()
        if head is not None and "lm_head.weight" not in names:
            yield "lm_head.weight", whole(cast(Tensor, head.weight)).detach()
