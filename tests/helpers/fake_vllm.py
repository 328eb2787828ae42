"""A stand-in for a vLLM server that computes with a policy of its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from rlrt_lightning import LoRA, Policy
from rlrt_lightning.rollouts.vllm_client import Server, UnknownAdapters
from rlrt_lightning.rollouts.vllm_common import EngineError


class FakeVllm:
    """Replaces the requests of a `Server`.

    Args:
        lora: The policy's adapters.
        ignored: Endpoints that do nothing, although the server reports success.
        refused: Endpoints that return an error.
    """

    def __init__(self, lora: LoRA | None = None, ignored: tuple[str, ...] = (), refused: tuple[str, ...] = ()) -> None:
        self.policy = Policy(lora=lora)
        self.policy.load()
        self.ignored, self.refused = ignored, refused
        self.version, self.adapters = "", set[str]()
        self.scored = 0
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """See `Server._call`."""
        with self._lock:
            path, asked = path.partition("?")[0], body or {}
            self.calls.append(path)
            if path in self.refused:
                raise EngineError(f"{path} returned 500")
            handler = {
                "/weight_info": lambda: {"weight_version": self.version},
                "/v1/models": lambda: {"data": [{"id": "base"}, *({"id": name} for name in self.adapters)]},
                "/update_weight_version": lambda: setattr(self, "version", asked["new_version"]),
                "/collective_rpc": lambda: self._load(Path(asked["kwargs"]["weights_path"])),
                "/v1/load_lora_adapter": lambda: self._load_adapters(asked["lora_name"], Path(asked["lora_path"])),
                "/v1/unload_lora_adapter": lambda: self.adapters.discard(asked["lora_name"]),
                "/v1/completions": lambda: self._complete(asked),
            }
            return handler.get(path, dict)() or {}

    def _load(self, folder: Path) -> None:
        if "/collective_rpc" in self.ignored:
            return
        own = self.policy.model.state_dict()
        for file in folder.iterdir():
            for name, tensor in load_file(file).items():
                adapted = name.replace(".weight", ".base_layer.weight")
                own[adapted if adapted in own else name].copy_(tensor)

    def _load_adapters(self, name: str, folder: Path) -> None:
        self.adapters.add(name)
        if "/v1/load_lora_adapter" not in self.ignored:
            state = load_file(folder / "adapter_model.safetensors")
            named = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
            set_peft_model_state_dict(self.policy.model, named)

    def _complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        if "model" in asked and asked["model"] not in self.adapters:
            raise UnknownAdapters("/v1/completions returned 404")
        prompt = asked["prompt"]
        if "prompt_logprobs" in asked:
            self.scored += 1
            (logp,) = self.policy.score([(prompt[:1], prompt[1:])])
            steps = [{str(token): {"logprob": float(value)}} for token, value in zip(prompt[1:], logp, strict=True)]
            return {"choices": [{"prompt_logprobs": [None, *steps]}]}
        end = self.policy.end_tokens[0]
        (logp,) = self.policy.score([(prompt, [end])])
        choice = {"token_ids": [end], "logprobs": {"token_logprobs": logp.tolist()}, "finish_reason": "stop"}
        return {"choices": [choice]}


def serve_by(fakes: dict[str, FakeVllm], monkeypatch: Any) -> None:
    """Sends the requests of every `Server` to the stand-in for its URL."""

    def call(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return fakes[server.url].call(method, path, body)

    monkeypatch.setattr(Server, "_call", call)
