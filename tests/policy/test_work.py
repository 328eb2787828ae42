"""The work of forward passes, and that long sequences take the kernels whose memory grows linearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from work import epoch_work, recipes_table

from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.padding import pad_sequences, share_prompts
from rlrt_lightning.policy.work import Work
from tests.helpers.processes import ROOT
from tests.helpers.tiny import tiny_policy

LONG_BESIDE_SHORT = [([3, 4, 5], [6] * 40), ([7] * 30, [8, 9]), ([3] * 9, [4] * 15), ([5], [6])]


class Attention:
    """Records the mask and causality of each call of scaled_dot_product_attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[bool, bool]] = []
        kernel = torch.nn.functional.scaled_dot_product_attention

        def recorded(query: Any, key: Any, value: Any, attn_mask: Any = None, **settings: Any) -> Any:
            self.calls.append((attn_mask is not None, bool(settings.get("is_causal"))))
            return kernel(query, key, value, attn_mask=attn_mask, **settings)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "granite"])
def test_rows_padded_on_the_right_take_the_causal_kernel(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_policy(architecture)
    attention = Attention(monkeypatch)
    made.score(LONG_BESIDE_SHORT)
    ids, mask, response = pad_sequences(LONG_BESIDE_SHORT)
    made.log_probs(ids, mask, response)[0].sum().backward()
    assert len(attention.calls) >= 2 * 2
    assert set(attention.calls) == {(False, True)}, "(has a mask, is causal)"


def test_padding_on_the_right_without_a_mask_changes_no_log_prob_and_no_gradient() -> None:
    made = tiny_policy()

    def gradient_of(sequences: list[tuple[list[int], list[int]]]) -> tuple[list[torch.Tensor], torch.Tensor]:
        made.zero_grad()
        ids, mask, response = pad_sequences(sequences)
        logp, _ = made.log_probs(ids, mask, response)
        logp.sum().backward()
        rows = [logp[row][response[row]].detach() for row in range(len(sequences))]
        return rows, torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])

    together, gradient = gradient_of(LONG_BESIDE_SHORT)
    one_by_one = [gradient_of([sequence]) for sequence in LONG_BESIDE_SHORT]
    for got, (want, _) in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(got, want[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, torch.stack([g for _, g in one_by_one]).sum(0), rtol=1e-4, atol=1e-4)


def counted(made: Policy, sequences: list[tuple[list[int], list[int]]]) -> int:
    """Floating point operations of the decoder while the sequences are scored."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for _ in made._states_in_batches(sequences):
            pass
    return counter.get_total_flops()


@pytest.mark.parametrize("prompt", [8, 120])
def test_work_is_that_of_the_flop_counter(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With eager attention, because the counter knows no fused kernels of the CPU; it computes all pairs."""
    made = tiny_policy()
    made.model.set_attn_implementation("eager")
    sequences = [([3 + group] * prompt, [4] * 16) for group in range(2) for _ in range(4)]
    per_token, per_pair = made.work
    lengths = [prompt + 16] * 8
    monkeypatch.setattr(Work, "worth_sharing", lambda self, sequences: False)
    separate = per_token * sum(lengths) + per_pair * sum(n * n for n in lengths)
    assert counted(made, sequences) == pytest.approx(separate, rel=0.02)
    monkeypatch.setattr(Work, "worth_sharing", lambda self, sequences: True)
    # The last token of a response is not an input.
    shared = made.work.sharing([(prompt, response[1:]) for prompt, response in sequences])
    assert counted(made, sequences) == pytest.approx(shared, rel=0.02)


@pytest.mark.parametrize("shares", [False, True])
def test_a_training_step_takes_three_times_its_work_and_four_times_the_head(shares: bool) -> None:
    """The backward pass takes twice the forward pass, and the head's logits are recomputed in it. What is counted and
    what is predicted for a step in benchmarks/work.py agree for the same reasons."""
    made = tiny_policy(overrides={"vocab_size": 512})
    made.model.set_attn_implementation("eager")
    prompt, response = 40, 16
    sequences = [([3 + group] * prompt, [4] * response) for group in range(2) for _ in range(4)]
    ids, mask, responses = pad_sequences(sequences)
    shared = share_prompts([row[0] for row in sequences]) if shares else None
    blocks = [(len(sequences), response if shares else prompt + response)]
    with FlopCounterMode(display=False) as counter:
        made.log_probs(ids, mask, responses, blocks=blocks, shared=shared)[0].sum().backward()
    per_token, per_pair = made.work
    head = 2 * made.model.get_output_embeddings().weight.numel() * response * len(sequences)
    if shares:
        decoder = made.work.sharing([(first, then[1:]) for first, then in sequences])
    else:  # eager attention computes all pairs
        decoder = len(sequences) * (per_token * (prompt + response) + per_pair * (prompt + response) ** 2)
    assert head > 0.2 * decoder
    assert counter.get_total_flops() == pytest.approx(3 * decoder + 4 * head, rel=0.02)


QWEN3_4B = Work(per_token=2 * 3.6e9, per_pair=4 * 36 * 32 * 128)


@pytest.mark.parametrize(
    ("prompt", "response", "shares"),
    [
        (300, 100, True),
        (2000, 500, True),
        (300, 20_000, False),  # the prompt is 1.5 % of the tokens
        (3000, 8000, False),  # saves 24 % of the tokens, but the mask costs more in attention
        (3000, 1000, True),
        (0, 100, False),
    ],
)
def test_prompts_are_shared_where_counted_work_says_that_it_pays(prompt: int, response: int, shares: bool) -> None:
    sequences = [([1 + group] * prompt, [2] * response) for group in range(4) for _ in range(8)]
    assert QWEN3_4B.worth_sharing(sequences) == shares


def test_prompts_without_siblings_are_not_shared() -> None:
    assert not QWEN3_4B.worth_sharing([([1 + i] * 300, [2] * 100) for i in range(8)])


def test_the_docs_have_the_work_of_the_recipes() -> None:
    """docs/recipes.md has the cells of the benchmark's table."""
    rows = [row.split(" | ", 2)[2] for row in recipes_table().splitlines()[2:]]
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert len(rows) == 12
    assert all(row in page for row in rows)


def test_training_takes_three_forward_passes_and_a_fourth_with_checkpointing() -> None:
    recipes = ROOT / "configs" / "recipes"
    small, paper = (
        epoch_work(recipes / name, 10_000) for name in ("gsm8k-qwen3-1.7b.yaml", "paper-qwen3-4b-base.yaml")
    )
    assert small["training"] / small["rollouts"] == pytest.approx(3, rel=0.05)  # besides the prompts
    assert paper["training"] / paper["rollouts"] == pytest.approx(4, rel=0.05)
