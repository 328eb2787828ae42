"""The transformers engine: it samples from the policy, and returns the log-probs of its samples."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlrt_lightning import (
    ConfigError,
    Policy,
    Rollout,
    Sampling,
    TransformersEngine,
    VllmColocateEngine,
    VllmServerEngine,
)
from rlrt_lightning.rollouts.transformers import sample
from tests.helpers.tiny import ARCHITECTURES, tiny_policy

PROMPTS = [[5, 6, 7, 8, 9], [4], [10, 11, 12], [20, 21, 22, 23, 24, 25, 26]]


@pytest.fixture(scope="module")
def embedded() -> Policy:
    made = Policy()
    made.load()
    return made


PROMPT = "tea 4 milk 5 eggs 7 rice 1, last digit of the total?"


def draw_rollouts(made: Policy, prompts: list[list[int]], n: int, sampling: Sampling, **engine: Any) -> list[Rollout]:
    sampler = TransformersEngine(**engine)
    sampler.sync(made)
    drawn = sampler.generate(prompts, n, sampling, seeds=[sum(p) for p in prompts])
    return sorted(drawn, key=lambda r: (r.group, r.index))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_log_probs_equal_the_policys_scores(architecture: str, temperature: float) -> None:
    made = tiny_policy(architecture)
    rollouts = draw_rollouts(made, PROMPTS, 3, Sampling(max_new_tokens=20, temperature=temperature))
    assert len(rollouts) == 12
    assert len({len(r.response_ids) for r in rollouts}) > 1, "rows must leave the batch at different times"
    scores = made.score([(r.prompt_ids, r.response_ids) for r in rollouts], temperature)
    for rollout, score in zip(rollouts, scores, strict=True):
        torch.testing.assert_close(rollout.logp_sampler, score, rtol=0, atol=1e-4)


@pytest.mark.smoke
def test_a_rollout_depends_only_on_its_prompt_and_seed() -> None:
    made, sampling = tiny_policy(), Sampling(max_new_tokens=12)
    reference = draw_rollouts(made, PROMPTS, 4, sampling)
    backwards = draw_rollouts(made, PROMPTS[::-1], 4, sampling)
    for rows in (1, 4, 9):
        small = draw_rollouts(made, PROMPTS, 4, sampling, max_rows=rows)
        assert [r.response_ids for r in small] == [r.response_ids for r in reference]
    by_prompt = {(tuple(r.prompt_ids), r.index): r.response_ids for r in backwards}
    assert by_prompt == {(tuple(r.prompt_ids), r.index): r.response_ids for r in reference}
    assert len({tuple(r.response_ids) for r in reference[:4]}) > 1, "siblings differ"


def test_samples_are_distributed_like_those_of_transformers_generate(embedded: Policy) -> None:
    """Chi-square test of whole responses to one prompt, 3,000 of each side, with a false-positive rate of 1e-4."""
    sampling = Sampling(max_new_tokens=6, temperature=1.3, top_k=12, top_p=0.97, min_p=0.005)
    prompt = embedded.encode_prompt(PROMPT)
    ours = Counter(tuple(r.response_ids) for r in draw_rollouts(embedded, [prompt], 3000, sampling, max_rows=3000))
    torch.manual_seed(0)
    with embedded.evaluating() as model:
        ids = model.generate(
            torch.tensor([prompt]),
            do_sample=True,
            num_return_sequences=3000,
            max_new_tokens=6,
            temperature=1.3,
            top_k=12,
            top_p=0.97,
            min_p=0.005,
        )[:, len(prompt) :]
    theirs: Counter[tuple[int, ...]] = Counter()
    for row in ids.tolist():
        theirs[tuple(row[: row.index(1) + 1]) if 1 in row else tuple(row)] += 1
    common = [key for key in ours | theirs if ours[key] + theirs[key] >= 20]
    rest = (3000 - sum(ours[k] for k in common), 3000 - sum(theirs[k] for k in common))
    pairs = [(ours[k], theirs[k]) for k in common] + ([rest] if sum(rest) else [])
    chi2 = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    freedom = len(pairs) - 1
    assert freedom >= 5
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert chi2 < limit


@pytest.mark.parametrize(
    ("settings", "warper"),
    [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"top_k": 9, "top_p": 0.7, "min_p": 0.1}, [TopKLogitsWarper(9), TopPLogitsWarper(0.7), MinPLogitsWarper(0.1)]),
    ],
)
def test_top_k_top_p_and_min_p_keep_the_same_tokens_as_transformers(
    settings: dict[str, Any], warper: list[Any]
) -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3)) * 2
    grid = (torch.arange(20000) + 0.5) / 20000
    tokens, logp, _ = sample(logits.expand(20000, -1), grid, Sampling(**settings))
    expected = LogitsProcessorList(warper)(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)[0]
    frequency = torch.bincount(tokens, minlength=30) / 20000
    torch.testing.assert_close(frequency, expected, rtol=0, atol=2e-4)
    assert torch.equal(logp, logits.log_softmax(-1)[0][tokens]), "log-probs are of the full distribution"


def test_the_largest_random_number_draws_a_possible_token() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    tokens, _, entropy = sample(logits, torch.tensor([1 - 2**-24]), Sampling())
    assert tokens.item() == 1
    assert torch.isfinite(entropy).all()


def test_temperature_zero_takes_the_likeliest_token(embedded: Policy) -> None:
    prompt = embedded.encode_prompt(PROMPT)
    (rollout,) = draw_rollouts(embedded, [prompt], 1, Sampling(max_new_tokens=8, temperature=0.0))
    with embedded.evaluating() as model:
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :]
    assert rollout.response_ids == expected.tolist()


def test_truncated_and_ended_responses_are_distinguished(embedded: Policy) -> None:
    rollouts = draw_rollouts(embedded, [embedded.encode_prompt(PROMPT)], 200, Sampling(max_new_tokens=4))
    for rollout in rollouts:
        assert rollout.truncated == (rollout.response_ids[-1] != 1)
        assert 1 not in rollout.response_ids[:-1]
        assert len(rollout.response_ids) == 4 or not rollout.truncated
    assert {r.truncated for r in rollouts} == {True, False}


def test_stop_strings_end_a_response_and_stay_in_it(embedded: Policy) -> None:
    rollouts = draw_rollouts(
        embedded, [embedded.encode_prompt(PROMPT)], 60, Sampling(max_new_tokens=30, stop=[" (1)", " 7"])
    )
    ended = [r for r in rollouts if " (1)" in r.text or " 7" in r.text]
    assert ended
    for rollout in ended:
        assert rollout.text.endswith((" (1)", " 7"))
        assert not rollout.truncated


def test_responses_end_at_the_models_last_position() -> None:
    made = tiny_policy("qwen3")
    made.config.max_position_embeddings = 10
    for rollout in draw_rollouts(made, [[5] * 8], 8, Sampling(max_new_tokens=50)):
        assert len(rollout.response_ids) <= 2


def test_a_copy_in_another_dtype_follows_the_policy() -> None:
    made = tiny_policy()
    engine = TransformersEngine(dtype="bfloat16")
    engine.sync(made)
    with torch.no_grad():
        for p in made.model.parameters():
            p.add_(0.05)
    engine.sync(made)
    rollouts = list(engine.generate(PROMPTS, 2, Sampling(max_new_tokens=8), seeds=[0] * 4))
    scores = made.score([(r.prompt_ids, r.response_ids) for r in rollouts])
    difference = torch.cat([(r.logp_sampler - s).abs() for r, s in zip(rollouts, scores, strict=True)])
    assert 0 < difference.mean() < 0.1
    assert next(made.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.0}, {"max_new_tokens": 0}]
)
def test_sampling_settings_out_of_range_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Sampling(**bad)


def test_a_vllm_engine_without_vllm_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"VllmColocateEngine needs vLLM.*pip install 'rlrt-lightning\[vllm\]'"):
        VllmColocateEngine()


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        (VllmColocateEngine, {"memory": 1.5}, "data.engine.memory is 1.5"),
        (VllmColocateEngine, {"tensor_parallel": 0}, "data.engine.tensor_parallel is 0"),
        (VllmColocateEngine, {"tolerance": 0.0}, "data.engine.tolerance is 0.0"),
        (VllmServerEngine, {"urls": []}, r"data.engine.urls is \[\]"),
        (VllmServerEngine, {"urls": ["localhost:8000"]}, "data.engine.urls"),
        (VllmServerEngine, {"urls": ["http://a"], "patience_s": 0}, "data.engine.patience_s is 0"),
        (VllmServerEngine, {"urls": ["http://a"], "check_rollouts": 0}, "data.engine.check_rollouts is 0"),
    ],
)
def test_invalid_settings_of_vllm_engines_are_refused_by_name(
    engine: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(**settings)
