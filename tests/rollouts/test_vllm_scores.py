"""Real vLLM on the CPU with its prefix cache: scores and samples are the policy's, whatever the cache holds."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlrt_lightning import Policy, Sampling, VllmColocateEngine
from rlrt_lightning.rollouts import vllm_colocate
from rlrt_lightning.rollouts.vllm_common import EngineError

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tests/install_vllm_cpu.sh)"
    ),
    pytest.mark.filterwarnings("default"),  # vLLM emits many warnings
]

BLOCK = 128  # tokens in a block of vLLM's prefix cache on a CPU
POSITIONS = 1024


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The embedded tokenizer and a random model with positions for several blocks."""
    folder, embedded = tmp_path_factory.mktemp("model"), Policy()
    config = copy.deepcopy(embedded.config)
    config.max_position_embeddings = POSITIONS
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    embedded.tokenizer.save_pretrained(folder)
    made = Policy(path=str(folder))
    made.load()
    randomize(made, 0)
    return made


@pytest.fixture(scope="module")
def started() -> Iterator[VllmColocateEngine]:
    made = VllmColocateEngine()
    yield made
    made.close()


@pytest.fixture
def engine(started: VllmColocateEngine, policy: Policy) -> VllmColocateEngine:
    started.sync(policy)
    return started


def randomize(policy: Policy, seed: int) -> None:
    """Replaces the weight matrices by random ones."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.dim() > 1:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 28, (n,), generator=torch.Generator().manual_seed(1000 * n + seed)).tolist()


def score_difference(engine: VllmColocateEngine, policy: Policy, sequences: list[tuple[list[int], list[int]]]) -> float:
    """Largest difference in nats between the engine's scores and the policy's."""
    pairs = zip(engine.score(sequences), policy.score(sequences), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if len(b) or len(a))


COMMON = tokens(2 * BLOCK + 3)
RESPONSES = {
    "share two blocks": [COMMON + tokens(7, i) for i in range(4)],
    "share a few tokens": [COMMON[:5] + tokens(2 * BLOCK, i) for i in range(4)],
    "differ from the first token": [[5 + i, *COMMON] for i in range(4)],
    "are equal": [COMMON] * 3,
    "are prefixes of others": [COMMON, COMMON[:BLOCK], COMMON[: BLOCK + 1], COMMON[: BLOCK - 1], COMMON[:1]],
    "are short or empty": [[], [7], [7, 8], [7], []],
}


@pytest.mark.parametrize("part", [100, vllm_colocate.PART_TOKENS])
@pytest.mark.parametrize("kind", RESPONSES)
def test_scores_of_siblings_equal_the_policys(
    kind: str, part: int, engine: VllmColocateEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With prompts shorter than a block, of exactly one or two blocks, and of one token more or less; whole and in
    parts."""
    monkeypatch.setattr(vllm_colocate, "PART_TOKENS", part)
    for length in (5, BLOCK - 1, BLOCK, BLOCK + 1, 133, 2 * BLOCK):
        sequences = [(tokens(length), response) for response in RESPONSES[kind]]
        for _ in range(2):  # the second round is cached
            assert score_difference(engine, policy, sequences) < 1e-3, length


def test_scores_equal_the_policys_where_a_prompt_contains_anothers_response(
    engine: VllmColocateEngine, policy: Policy
) -> None:
    prompt = tokens(133)
    sequences = [(prompt, COMMON), (prompt + COMMON[:BLOCK], COMMON[BLOCK:]), (prompt + COMMON[:200], COMMON[200:])]
    for order in (sequences, sequences[::-1]):
        assert score_difference(engine, policy, order) < 1e-3


def test_a_shared_prompt_is_computed_once_for_its_siblings(
    engine: VllmColocateEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    finished = VllmColocateEngine._finished

    def watched(self: VllmColocateEngine, keys: set[str]) -> Iterator[tuple[str, Any]]:
        for key, done in finished(self, keys):
            found.append(done.num_cached_tokens)
            yield key, done

    monkeypatch.setattr(VllmColocateEngine, "_finished", watched)
    prompt = tokens(3 * BLOCK + 20)
    assert score_difference(engine, policy, [(prompt, tokens(30, i)) for i in range(5)]) < 1e-3
    assert sorted(found) == [0] + [3 * BLOCK] * 4


def test_long_sequences_are_scored_in_parts(
    engine: VllmColocateEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request computes logits of few response tokens, and none of the prompt; the rest is cached."""
    monkeypatch.setattr(vllm_colocate, "PART_TOKENS", 100)
    logits: list[int] = []
    finished = VllmColocateEngine._finished

    def watched(self: VllmColocateEngine, keys: set[str]) -> Iterator[tuple[str, Any]]:
        for key, done in finished(self, keys):
            if done.prompt_logprobs is not None:
                logits.append(len(done.prompt_token_ids) - done.num_cached_tokens)
            yield key, done

    monkeypatch.setattr(VllmColocateEngine, "_finished", watched)
    sequences = [(tokens(300, i), tokens(650, i)) for i in range(6)]
    assert score_difference(engine, policy, sequences) < 1e-3
    assert len(logits) == 6 * 7
    assert max(logits) < 100 + BLOCK


def test_after_a_sync_no_cache_of_old_weights_is_used(engine: VllmColocateEngine, policy: Policy) -> None:
    """Neither by samples nor by scores, even while an abandoned round is running."""
    prompts = [tokens(2 * BLOCK + 9, i) for i in range(3)]
    sampling = Sampling(max_new_tokens=40)
    abandoned = engine.generate(prompts, 8, Sampling(max_new_tokens=400), [1, 2, 3])
    next(abandoned)
    for seed in (1, 2):
        randomize(policy, seed)
        engine.sync(policy)
        rollouts = list(engine.generate(prompts, 4, sampling, [4, 5, 6]))
        sequences = [(r.prompt_ids, r.response_ids) for r in rollouts]
        for rollout, logp in zip(rollouts, policy.score(sequences), strict=True):
            torch.testing.assert_close(rollout.logp_sampler, logp, rtol=0, atol=1e-3)
        assert score_difference(engine, policy, sequences) < 1e-3
    with pytest.raises(RuntimeError, match="aborted"):
        list(abandoned)


def test_a_prefix_cache_that_vllm_does_not_empty_ends_the_run(
    engine: VllmColocateEngine, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(EngineError, match="vLLM did not reset its prefix cache"):
        engine.sync(policy)


def test_each_prompt_gets_the_positions_that_it_leaves(engine: VllmColocateEngine, policy: Policy) -> None:
    """Also next to prompts that fill the model almost or completely."""
    prompts = [tokens(3), tokens(POSITIONS - 2), tokens(POSITIONS), tokens(POSITIONS - 1)]
    sampling = Sampling(max_new_tokens=300, temperature=2.0)
    drawn = {(r.group, r.index): r for r in engine.generate(prompts, 2, sampling, [0, 1, 2, 3])}
    assert len(drawn) == 8
    alone = {r.index: r for r in engine.generate(prompts[:1], 2, sampling, [0])}
    for index in range(2):
        assert drawn[0, index].response_ids == alone[index].response_ids
        for group, room in ((1, 2), (2, 0), (3, 1)):
            rollout = drawn[group, index]
            assert len(rollout.response_ids) == room or rollout.response_ids[-1] in policy.end_tokens
            assert rollout.truncated == (rollout.response_ids[-1:] != [1])
    assert max(len(r.response_ids) for r in alone.values()) > 2
