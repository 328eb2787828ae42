"""What the vLLM engines share, tested without vLLM: requests, the prefix cache, and outdated weights."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlrt_lightning import ConfigError, LoRA, Policy, Sampling, VllmColocateEngine, VllmServerEngine
from rlrt_lightning.rollouts.base import Stops
from rlrt_lightning.rollouts.vllm_client import Server, Target
from rlrt_lightning.rollouts.vllm_colocate import part_ends
from rlrt_lightning.rollouts.vllm_common import request
from rlrt_lightning.rollouts.vllm_serve import server_command
from rlrt_lightning.runtime.precision import half_precision


def test_a_vllm_request_sets_stops_and_room_and_no_defaults_of_the_model() -> None:
    policy, sampling = Policy(), Sampling(stop=["<user>", ",", " so<user>"])
    asked = request(sampling, Stops.of(policy, sampling), 7, 0, 0)
    assert asked["stop_token_ids"] == [1, policy.tokenizer.convert_tokens_to_ids("<user>")]
    assert asked["stop"] == [",", " so<user>"]
    assert asked["skip_special_tokens"] is False
    assert asked["max_tokens"] == 7
    assert asked["repetition_penalty"] == 1.0


def test_a_temperature_above_vllms_limit_is_refused_before_drawing() -> None:
    engine = CachedEngine(16)
    engine._policy, engine._awake = Policy(), True
    with pytest.raises(ConfigError, match=r"sampling\.temperature is 2\.5; vLLM takes at most 2"):
        next(engine.generate([[3]], 1, Sampling(temperature=2.5), [0]))


@pytest.mark.parametrize(
    ("precision", "half"),
    [
        ("bf16-mixed", "bfloat16"),
        ("bf16-true", "bfloat16"),
        ("16-mixed", "float16"),
        ("32-true", None),
        ("64-true", None),
    ],
)
def test_vllms_dtype_follows_the_trainers_precision(precision: str, half: Any) -> None:
    engine = VllmServerEngine(["http://127.0.0.1:8000"])
    engine.half = half_precision(SimpleNamespace(precision=precision))
    assert engine.half == half
    flags = server_command(Policy(), engine, "127.0.0.1", 8000, [])
    assert flags[flags.index("--dtype") + 1] == engine.dtype_for(Policy()) == (half or "float32")
    assert flags[flags.index("--hf-overrides") + 1] == '{"head_dtype": "float32"}'
    assert "--hf-overrides" not in server_command(Policy(head_dtype=None), engine, "127.0.0.1", 8000, [])
    assert VllmServerEngine(["http://127.0.0.1:8000"], dtype="float16").dtype_for(Policy()) == "float16"


@pytest.mark.parametrize("cuda", [True, False])
def test_a_server_that_scores_has_few_tokens_in_a_step(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They bound the logits that it holds at the same time. Without a GPU prompts cannot be split into chunks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    policy, engine, flag = Policy(), VllmServerEngine(["http://127.0.0.1:8000"]), "--max-num-batched-tokens"
    assert flag not in server_command(policy, engine, "127.0.0.1", 8000, [])
    command = server_command(policy, engine, "127.0.0.1", 8000, [flag, "4096"], scores=True)
    assert [command[i + 1] for i, word in enumerate(command) if word == flag] == (["2048"] if cuda else []) + ["4096"]
    assert ("--no-enable-chunked-prefill" in command) != cuda


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_of_head_and_embeddings_are_merged(target: str) -> None:
    engine, policy = VllmServerEngine(["http://127.0.0.1:8000"]), Policy(lora=LoRA(targets=["q_proj", target]))
    policy.load()
    assert f"{target} has an adapter" in (engine._obstacle(policy) or "")
    plain = Policy(lora=LoRA())
    plain.load()
    assert engine._obstacle(plain) is None


class CachedEngine(VllmColocateEngine):
    """Its log-probs are checksums of the tokens that they depend on.

    Its prefix cache holds whole blocks of everything read; there is no log-prob after a cached token.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.cache: set[tuple[int, ...]] = set()
        self.read = 0

    def _score(self, sequences: Sequence[tuple[list[int], list[int]]], alone: bool) -> list[torch.Tensor]:
        scores = []
        for prompt, response in sequences:
            tokens, found = tuple(prompt + response), 0
            while not alone and found + self.block < len(tokens) and tokens[: found + self.block] in self.cache:
                found += self.block
            self.read += len(tokens) - found
            self.cache |= {tokens[:end] for end in range(self.block, len(tokens) + 1, self.block)}
            score = checksums(prompt, response)
            score[: max(0, found + 1 - len(prompt))] = torch.nan
            scores.append(score)
        return scores


def checksums(prompt: list[int], response: list[int]) -> torch.Tensor:
    ends = range(len(prompt) + 1, len(prompt) + len(response) + 1)
    return torch.tensor([float(hash(tuple(prompt + response)[:end]) % 9973) for end in ends])


@pytest.mark.parametrize("block", [1, 2, 3, 5, 16])
def test_log_probs_after_cached_tokens_are_taken_from_a_sibling(block: int) -> None:
    """With siblings that are equal, share a beginning, are empty or a prefix of another, and with prompts that continue
    another prompt."""
    g = random.Random(block)
    for _ in range(50):
        prompts = [[g.randrange(2) for _ in range(g.randrange(1, 9))] for _ in range(3)]
        responses = [[g.randrange(2) for _ in range(g.randrange(9))] for _ in range(6)]
        sequences = [(g.choice(prompts), g.choice(responses)) for _ in range(25)]
        engine = CachedEngine(block)
        for _ in range(2):  # the second round is cached
            for got, sequence in zip(engine.score(sequences), sequences, strict=True):
                assert torch.equal(got, checksums(*sequence))


def test_parts_of_long_sequences_never_end_at_a_block_boundary() -> None:
    for prompt in range(1, 40):
        for response in range(1, 40):
            *ends, last = part_ends(prompt, response, 8)
            assert last == prompt + response
            assert all(end % 2 and 0 < end < last for end in ends)
            after = [end for end in (*ends, last) if end > prompt]
            begins = [max(end for end in (0, *ends) if end < stop) for stop in after]
            assert all(stop - begin <= 8 + 1 for begin, stop in zip(begins, after, strict=True))
    assert part_ends(5, 2, 8) == [7]


@pytest.mark.parametrize("length", [160, 170, 175])
def test_a_prompt_is_read_once_for_siblings_with_a_common_beginning(length: int) -> None:
    """Such as "To solve this problem, we". A prompt that ends with a block is read again for each further beginning."""
    g = random.Random(0)
    prompt = [g.randrange(100) for _ in range(length)]
    beginnings = [[g.randrange(100) for _ in range(30)] for _ in range(2)]
    sequences = [(prompt, beginnings[i % 2] + [g.randrange(100) for _ in range(20)]) for i in range(8)]
    engine = CachedEngine(16)
    engine.score(sequences)
    assert engine.read < (3 if length % 16 == 0 else 2) * length + 8 * 50


def test_a_completion_begun_by_old_weights_is_requested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker loads the weights into a restarted server during this request."""
    server = Server("http://127.0.0.1:9", 1.0, 1.0, 1)
    server.target = Target(tmp_path / "7")
    version, answers = "", ["begun by old weights", "by new ones"]

    def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        nonlocal version
        if path == "/weight_info":
            return {"weight_version": version}
        if path == "/update_weight_version" and body is not None:
            version = body["new_version"]
        if path == "/v1/completions":
            answer = answers.pop(0)
            if answers:
                server._load()
            return {"text": answer}
        return {}

    monkeypatch.setattr(server, "_call", call)
    assert server.complete({}, threading.Event()) == {"text": "by new ones"}
    assert not answers
