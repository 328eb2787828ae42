"""Batches of sequences of different lengths: optimal splits, little padding, and results that depend on neither."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrt_lightning.policy.padding import (
    MAX_PADDING,
    balance,
    batches,
    blocks,
    pad_sequences,
    share_prompts,
    split_prompts,
)
from tests.helpers.tiny import ARCHITECTURES, tiny_policy


@given(st.lists(st.integers(1, 50), max_size=9), st.integers(1, 4))
@settings(max_examples=100)
def test_balance_finds_the_optimal_partition_of_the_sorted_lengths(lengths: list[int], parts: int) -> None:
    dealt = balance(lengths, parts)
    assert len(dealt) == parts
    assert sorted(i for part in dealt for i in part) == list(range(len(lengths)))
    if lengths:
        ranked = sorted(lengths, reverse=True)
        cuts = itertools.combinations_with_replacement(range(len(ranked) + 1), parts - 1)
        best = min(
            max((b - a) * ranked[a] for a, b in itertools.pairwise([0, *cut, len(ranked)]) if b > a) for cut in cuts
        )
        assert max(len(p) * max(lengths[i] for i in p) for p in dealt if p) == best


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
@settings(max_examples=100)
def test_blocks_cover_all_rows_with_little_padding(lengths: list[int]) -> None:
    ranked = sorted(lengths, reverse=True)
    cut = blocks(ranked)
    assert sum(rows for rows, _ in cut) == len(ranked)
    start = 0
    for rows, width in cut:
        assert ranked[start] == width
        start += rows
    assert sum(lengths) >= (1 - MAX_PADDING) * sum(rows * width for rows, width in cut)


@given(st.lists(st.integers(1, 50), min_size=4, max_size=20), st.integers(1, 4))
@settings(max_examples=50)
def test_blocks_returns_the_requested_number_of_blocks(lengths: list[int], count: int) -> None:
    cut = blocks(sorted(lengths, reverse=True), count)
    assert len(cut) == count
    assert all(rows > 0 for rows, _ in cut)


@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 1000))
@settings(max_examples=100)
def test_batches_contain_each_sequence_once_within_the_limit(lengths: list[int], most: int) -> None:
    dealt = list(batches(lengths, most))
    assert sorted(i for part in dealt for i in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= most for part in dealt)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_change_no_log_prob_and_no_gradient(architecture: str) -> None:
    made = tiny_policy(architecture, logits_chunk=3)
    made.model.eval()
    sequences = [
        ([5, 6, 7, 2, 9, 4], [8, 9, 11, 3, 5, 1]),
        ([4, 5, 7], [10, 11, 12, 13, 1]),
        ([5, 9], [20, 4]),
        ([3], [7]),
    ]
    given_ = pad_sequences(sequences)
    gradients = []
    for cut in (None, [(1, 12), (1, 8), (2, 4)]):
        made.model.zero_grad()
        logp, entropy = made.log_probs(*given_, blocks=cut)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        gradients.append(
            (logp.detach(), entropy.detach(), [p.grad for p in made.model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prompts_change_no_log_prob_and_no_gradient(architecture: str) -> None:
    made = tiny_policy(architecture, logits_chunk=3)
    made.model.eval()
    prompts = [[5, 6, 7, 2, 9, 4, 8, 3], [4, 5, 7]]
    sequences = [
        (prompts[1], [10, 11, 12, 13, 14, 2, 15, 1]),
        (prompts[0], [8, 9, 11, 3, 5, 1]),
        (prompts[0], [20, 4]),
        (prompts[1], [7]),
        (prompts[0], [1]),
    ]
    given_, shared = pad_sequences(sequences), share_prompts([prompt for prompt, _ in sequences])
    assert len(shared[0]) == 2
    results = []
    for how in ({}, {"shared": shared, "blocks": [(1, 8), (2, 6), (2, 1)]}):
        made.model.zero_grad()
        logp, entropy = made.log_probs(*given_, **how)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
        results.append((logp.detach(), entropy.detach(), gradients))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score_tokens", [1, 30, 4096])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_responses_that_share_a_prompt_score_the_same_as_alone(architecture: str, score_tokens: int) -> None:
    made = tiny_policy(architecture, score_tokens=score_tokens)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(2, 28, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(n) for n in (9, 14, 3)]
    sequences = [(prompts[i % 3], draw(n)) for i, n in enumerate([1, 5, 12, 7, 1, 9, 4, 0, 3])]
    read = []
    states = made._all_states
    made._all_states = lambda mask, **inputs: read.append(len(mask)) or states(mask, **inputs)  # type: ignore[method-assign, func-returns-value]
    together = made.score(sequences, 0.7)
    assert len(read) < 2 * len(sequences)
    for sequence, got in zip(sequences, together, strict=True):
        (alone,) = made.score([sequence], 0.7)
        assert got.shape == (len(sequence[1]),)
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


def test_prompts_share_a_prefix_where_this_reduces_the_tokens() -> None:
    begin = list(range(10, 50))
    twice = [(([*begin, 1]), [5]), ([*begin, 2], [5]), ([*begin, 1], [6, 7])]
    assert split_prompts(twice) == [(begin, [1], [5]), (begin, [2], [5]), (begin, [1], [6, 7])]
    apart = [(([7, *begin]), [5]), ([7, *reversed(begin)], [5]), ([7, *begin], [6]), ([7, *reversed(begin)], [6])]
    assert split_prompts(apart) == [(prompt, [], response) for prompt, response in apart], (
        "the rest would be read twice"
    )
    contained = [(begin, [5]), ([*begin, 9], [5])]
    assert split_prompts(contained) == [(begin, [], [5]), (begin, [9], [5])]
    assert split_prompts([]) == []
    assert split_prompts([([], [1]), ([], [2])]) == [([], [], [1]), ([], [], [2])]
