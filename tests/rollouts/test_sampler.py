"""The transformers engine, compared with sampling each rollout alone and without a cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from rlrt_lightning import ConfigError, Policy, Rollout, Sampling, TransformersEngine
from rlrt_lightning.rollouts.cache import growing_cache
from rlrt_lightning.rollouts.transformers import NOISE_BLOCK, sample
from rlrt_lightning.runtime.seeding import generator
from tests.helpers.marks import slow_except
from tests.helpers.sampling import draw_rollouts, unbatched_logits
from tests.helpers.tiny import tiny_policy

WORDS = range(5, 57)  # the tokens of the embedded tokenizer that are not special tokens
POSITIONS = 96
COMPARED = ["qwen3", "llama", "gemma2", "mistral", "qwen2", "gpt2"]


class Case:
    """Random prompts, settings and end tokens."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        near = [POSITIONS - rng.randrange(0, 4) for _ in range(rng.choice([0, 0, 1]))]
        sizes = [*near, *(rng.choice([1, 2, 5, 9, 20]) for _ in range(rng.randint(1, 5)))]
        self.prompts = [[rng.choice(WORDS) for _ in range(size)] for size in sizes]
        rng.shuffle(self.prompts)
        self.n = rng.randint(1, 6)
        self.max_rows = rng.choice([1, 2, 3, 7, 256, 256])
        self.ends = rng.sample(WORDS, rng.choice([2, 4, 8, 14]))
        texts = Policy().tokenizer.convert_ids_to_tokens([rng.choice(WORDS) for _ in range(3)])
        stop = rng.choice([[], [], [texts[0]], [texts[1] + texts[2]], ["<assistant>", texts[0] + "<user>", texts[2]]])
        self.sampling = Sampling(
            max_new_tokens=rng.choice([1, 3, 8, 12, NOISE_BLOCK + 4]),
            temperature=rng.choice([1.0, 1.0, 0.7, 1.6, 0.0]),
            top_k=rng.choice([0, 0, 7]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
            stop=stop,
        )


def ended(made: Policy, ids: list[int], sampling: Sampling) -> bool:
    """Whether a response is finished."""
    text = made.tokenizer.decode(ids)
    return ids[-1] in made.end_tokens or any(stop in text for stop in sampling.stop)


def check(made: Policy, case: Case, rollout: Rollout) -> None:
    """Compares a rollout with the one that is drawn alone and without a cache."""
    sampling, length = case.sampling, len(rollout.response_ids)
    room = min(sampling.max_new_tokens, POSITIONS - len(rollout.prompt_ids))
    assert rollout.text == made.decode(rollout.response_ids)
    if not room:
        assert (length, rollout.truncated, rollout.text) == (0, True, "")
        return
    stream = generator(1000 * len(rollout.prompt_ids) + sum(rollout.prompt_ids), "sampling", rollout.index)
    noise = torch.cat([torch.rand(NOISE_BLOCK, generator=stream) for _ in range(2)])[:length]
    tokens, logp, entropy = sample(unbatched_logits(made, rollout), noise, sampling)
    assert rollout.response_ids == tokens.tolist()
    assert rollout.entropy is not None
    torch.testing.assert_close(rollout.logp_sampler, logp, rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout.entropy, entropy, rtol=0, atol=1e-4)
    over = [ended(made, rollout.response_ids[: t + 1], sampling) for t in range(length)]
    assert not any(over[:-1]), "a response must stop at the first end"
    assert rollout.truncated == (not over[-1])
    assert over[-1] or length == room


@pytest.mark.parametrize("least", slow_except([100, 350], 100))
@pytest.mark.parametrize("architecture", COMPARED)
def test_each_rollout_equals_the_one_drawn_alone(architecture: str, least: int) -> None:
    made = tiny_policy(architecture, {"max_position_embeddings": POSITIONS})
    if architecture != "gemma2":  # its attention has no softmax in float64
        made.model.double()  # in float32 a token could depend on the last bits, which differ between machines
    drawn, first, seed = 0, 0, 100 * COMPARED.index(architecture)  # each draws other cases
    while drawn < least:
        case, seed = Case(seed), seed + 1
        made.end_tokens = case.ends
        rollouts = draw_rollouts(made, case.prompts, case.n, case.sampling, case.max_rows)
        assert len(rollouts) == len(case.prompts) * case.n
        for rollout in rollouts:
            check(made, case, rollout)
        answered = [(r.prompt_ids, r.response_ids) for r in rollouts]
        temperature = case.sampling.temperature or 1.0
        for rollout, score in zip(rollouts, made.score(answered, temperature), strict=True):
            torch.testing.assert_close(rollout.logp_sampler, score, rtol=0, atol=1e-4)
        drawn += len(rollouts)
        first += sum(len(r.response_ids) == 1 and not r.truncated for r in rollouts)
    assert first > least / 20, "many must end at their first token"


def test_surviving_rows_keep_their_keys_when_as_many_as_the_prompts() -> None:
    """The number of rows does not identify the rows of a cache: here it is the same before the rows are repeated and
    after most of them have ended."""
    made = tiny_policy()
    made.end_tokens = list(range(1, 57, 2))
    as_many = 0
    for seed in range(40):
        prompts = [[6 + (seed + i) % 51] * (1 + 4 * i) for i in range(3)]
        rollouts = draw_rollouts(made, prompts, 2, Sampling(max_new_tokens=6))
        as_many += sum(len(r.response_ids) > 1 for r in rollouts) == 3
        for rollout in rollouts:
            expected = (
                unbatched_logits(made, rollout).log_softmax(-1).gather(-1, torch.tensor([rollout.response_ids]).T)
            )
            torch.testing.assert_close(rollout.logp_sampler, expected[:, 0], rtol=0, atol=1e-4)
    assert as_many >= 3


@pytest.mark.parametrize("change", ["reorder", "select", "repeat", "crop", "reset"])
def test_a_growing_cache_equals_transformers_dynamic_cache(change: str) -> None:
    """After each operation on a layer's rows or tokens, with as many rows as before."""
    config = tiny_policy().config
    caches: list[Any] = [growing_cache(config, 16), DynamicCache(config=config)]
    new = [torch.randn(2, 2, size, 8, generator=torch.Generator().manual_seed(size)) for size in (4, 1, 2)]
    for cache in caches:
        cache.update(new[0], -new[0], 0)
        cache.update(new[1], -new[1], 0)
        if change == "reorder":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "select":
            cache.batch_select_indices(torch.tensor([1, 1]))
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3]))
        elif change == "crop":
            cache.layers[0].crop(-2)
        else:
            cache.layers[0].reset()
    ours, theirs = (cache.update(new[2], -new[2], 0) for cache in caches)
    if change == "reset":  # older releases zero the cache instead of emptying it
        ours, theirs = ([kv[:, :, -2:] for kv in both] for both in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("architecture", ["lfm2", "jamba"])
def test_hybrid_models_sample_and_score_each_sequence_independently(architecture: str) -> None:
    """Jamba resets its states where several tokens follow a cached prompt, so its prompts are not shared."""
    made = tiny_policy(architecture, score_tokens=40)  # several batches continue the same cache
    linear = any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=made.config).layers)
    assert made.decodes_rows == linear
    if not linear:  # older releases of transformers have a different cache for these
        with pytest.raises(ConfigError, match="TransformersEngine cannot sample from"):
            TransformersEngine().sync(made)
        return
    prompts = [[5, 6, 7, 8, 9], [4], [10, 11, 12], [20, 21, 22, 23, 24, 25, 26]]
    made.end_tokens = [1, 8, 12, 16]
    rollouts = draw_rollouts(made, prompts, 4, Sampling(max_new_tokens=12), max_rows=9)
    scores = made.score([(r.prompt_ids, r.response_ids) for r in rollouts])
    assert not made.shares_prompts, "its cache leaves nothing for the backward pass"
    for rollout, score in zip(rollouts, scores, strict=True):
        expected = (
            unbatched_logits(made, rollout).log_softmax(-1).gather(-1, torch.tensor([rollout.response_ids]).T)[:, 0]
        )
        torch.testing.assert_close(rollout.logp_sampler, expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


def test_an_architecture_that_reads_padding_can_score_but_not_sample() -> None:
    made = tiny_policy("recurrent_gemma")
    with pytest.raises(ConfigError, match="cannot sample from RecurrentGemmaForCausalLM"):
        TransformersEngine().sync(made)
    sequences = [([5, 6, 7], [8, 9, 1]), ([5, 6, 7], [8, 9, 4]), ([4], [10, 11, 12])]
    for (prompt, response), score in zip(sequences, made.score(sequences), strict=True):
        alone = Rollout(0, 0, prompt, response, torch.zeros(0), False, "")
        expected = unbatched_logits(made, alone).log_softmax(-1).gather(-1, torch.tensor([response]).T)[:, 0]
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


def test_at_most_max_rows_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = tiny_policy(), []
    decoder = made.model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda **inputs: seen.append(len(inputs["input_ids"])) or forward(**inputs))
    draw_rollouts(made, [[5, 6], [7]], 9, Sampling(max_new_tokens=4), max_rows=4)
    assert max(seen) == 4
