"""The command that starts a vLLM server for `VllmServerEngine`."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rlrt_lightning.policy.loading import NeedsTransformers
from rlrt_lightning.rollouts.vllm_adapters import adapter_settings, obstacle
from rlrt_lightning.rollouts.vllm_common import head_overrides
from rlrt_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy
    from rlrt_lightning.rollouts.vllm_server import VllmServerEngine

log = logging.getLogger(__name__)

MAX_SCORED_TOKENS = 2048
"""Number of tokens in a step of a server that scores. It bounds the tokens whose logits vLLM holds at the same time."""


def server_command(
    policy: Policy, engine: VllmServerEngine, host: str, port: int, flags: Sequence[str], scores: bool = False
) -> list[str]:
    """The command that starts a server for a policy.

    Args:
        policy: The policy.
        engine: The engine that will use the server.
        host: Address to listen on.
        port: Port to listen on.
        flags: Additional flags of vLLM.
        scores: Whether the server also scores for the teacher.

    Raises:
        ConfigError: If the flags set something that has its own setting.
    """
    for flag in flags:
        if (name := flag.partition("=")[0]) in ("--host", "--port", "--model"):
            raise ConfigError(f"serve.flags sets {name}; use serve's --host and --port, or model.policy.path, instead")
        if name.replace("_", "-").startswith("--hf-overrides") and head_overrides(policy):  # vLLM uses only the last
            raise ConfigError(
                "serve.flags sets --hf-overrides, which would drop the float32 head: also set "
                "model.policy.head_dtype=null"
            )
    if not _is_loopback(host):
        log.warning(
            "anyone who can reach %s, port %s, can replace the model's weights without a key: use a trusted network "
            "only, or 127.0.0.1 to listen on this machine alone",
            host,
            port,
        )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy.path]
    command += ["--dtype", engine.dtype_for(policy), "--host", host, "--port", str(port)]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-prefix-caching"]
    command += ["--generation-config", "vllm"]  # ignore the model's own limits and penalties
    if overrides := head_overrides(policy):
        command += ["--hf-overrides", json.dumps(overrides)]
    if policy.max_positions is not None:
        command += ["--max-model-len", str(policy.max_positions)]
    command += _adapter_flags(policy, engine)
    if not torch.cuda.is_available():
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]  # see VllmColocateEngine
    elif scores:
        command += ["--max-num-batched-tokens", str(MAX_SCORED_TOKENS)]
    return [*command, *flags]


def _adapter_flags(policy: Policy, engine: VllmServerEngine) -> list[str]:
    if policy.lora is None or engine.lora == "merged":
        return []
    reason = obstacle(policy, engine.dtype_for(policy))
    try:
        settings = adapter_settings(policy) if reason is None else {}
    except NeedsTransformers as error:
        reason = str(error)
    if reason is not None:
        log.info("data.engine: vLLM gets the LoRA adapters merged into the weights: %s", reason)
        return []
    flags = ["--enable-lora", "--max-loras", str(settings["max_loras"])]
    flags += ["--max-lora-rank", str(settings["max_lora_rank"])]
    return [*flags, "--lora-target-modules", *settings["lora_target_modules"]]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


def server_environment() -> dict[str, str]:
    """The environment of `server_command`. The weight endpoints need vLLM's development mode."""
    enabled = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **enabled}
