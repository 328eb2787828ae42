"""The settings of the loss: their denominators are those of the mini-batch, whatever its split, and a run uses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrt_lightning import (
    GRPO,
    SDPO,
    ConfigError,
    LastDigit,
    Policy,
    RLRTModule,
    Sampling,
    Teacher,
    cispo_surrogate,
    clipped_surrogate,
    overlong_penalty,
    reference_kl,
)
from rlrt_lightning.callbacks import TeacherRefresh
from rlrt_lightning.epoch.batch import micro_batches, mini_batch_sizes
from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.policy.lora import LoRA
from rlrt_lightning.policy.padding import pad_rows
from tests.helpers.epochs import RuleTask, fit_and_record, random_epoch_record, record_of_rank, weights_changed
from tests.helpers.tiny import tiny_policy

LENGTH = 11
LOSSES: dict[str, dict[str, Any]] = {
    "token-mean": {},
    "seq-mean-token-mean": {"aggregation": "seq-mean-token-mean"},
    "constant-length": {"aggregation": "constant-length", "length": LENGTH},
    "GSPO": {"aggregation": "seq-mean-token-mean", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    "CISPO": {"surrogate": "cispo"},
    "dual clip": {"dual_clip": 1.5},
    "KL": {"reference_kl": 0.3},
    "KL, constant-length": {"reference_kl": 0.3, "aggregation": "constant-length", "length": LENGTH},
    "truncated left out": {"mask_truncated": True},
    "truncated left out, by sequence": {"mask_truncated": True, "aggregation": "seq-mean-token-mean"},
}


def epoch_of(settings: dict[str, Any], policy: Policy) -> EpochRecord:
    """A random epoch, some of whose rollouts are truncated, with a reference that is 0.5 nats from the policy, if the
    settings need them."""
    data = random_epoch_record()
    if settings.get("reference_kl"):
        now = pad_rows(policy.score([(r.prompt_ids, r.response_ids) for r in data.rollouts]))
        data.logp_reference = now + 0.5 * torch.randn(now.shape, generator=torch.Generator().manual_seed(5))
    if settings.get("mask_truncated"):
        for i, r in enumerate(data.rollouts):
            r.truncated = i % 3 == 1
        data.credit = replace(data.credit.without(data.truncated), counted=~data.truncated)
    return data


def expected_gradient(policy: Policy, data: EpochRecord, step: int, settings: dict[str, Any]) -> Tensor:
    """The gradient of the public functions on a whole mini-batch of two groups, with every rollout in it."""
    rows = [i for i, r in enumerate(data.rollouts) if r.group // 2 == step]
    if settings.get("mask_truncated"):
        rows = [i for i in rows if not data.rollouts[i].truncated]
    new = torch.zeros(len(rows), data.mask.shape[1])
    for row, i in enumerate(rows):
        r = data.rollouts[i]
        logits = policy.model(input_ids=torch.tensor([r.prompt_ids + r.response_ids])).logits[0]
        logp = logits[len(r.prompt_ids) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(r.response_ids)[:, None])
        new[row, : len(r.response_ids)] = logp[:, 0]
    mask, old = data.mask[rows], data.logp_old[rows]
    mean = {"aggregation": settings.get("aggregation", "token-mean"), "length": LENGTH}
    inputs = new, old, data.credit.advantages[rows], mask
    if settings.get("surrogate") == "cispo":
        loss = cispo_surrogate(*inputs, **mean).loss
    else:
        own = {name: settings[name] for name in ("ratio", "clip_low", "clip_high", "dual_clip") if name in settings}
        loss = clipped_surrogate(*inputs, **own, **mean).loss
    if data.logp_reference is not None:
        loss = loss + settings["reference_kl"] * reference_kl(new, data.logp_reference[rows], mask, **mean)
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_split_into_micro_batches_and_ranks_changes_no_gradient(name: str, accumulate: int, ranks: int) -> None:
    settings = LOSSES[name]
    module = RLRTModule(tiny_policy(), Teacher(), **settings)
    data = epoch_of(settings, module.policy)
    aggregation = settings.get("aggregation", "token-mean")
    parts = [record_of_rank(data, rank, ranks) for rank in range(ranks)]
    totals = sum(mini_batch_sizes(part, 2) for part in parts)
    assert isinstance(totals, Tensor)
    cut = [micro_batches(part, 2, accumulate, aggregation, world_size=ranks, totals=totals).batches for part in parts]
    for step in range(2):
        expected = expected_gradient(module.policy, data, step, settings)
        assert expected.norm() > 0.01
        module.zero_grad()
        for batches in cut:  # Lightning averages over micro-batches, and DDP over ranks
            for batch in batches[step * accumulate : (step + 1) * accumulate]:
                (module.training_step(batch, 0)["loss"] / accumulate / ranks).backward()
        got = torch.cat([p.grad.flatten() for p in module.policy.parameters()])
        assert (got - expected).norm() < 1e-6 * expected.norm()


# -- runs ----------------------------------------------------------------------------------------------------------


def half(text: str) -> bool:
    return len(text) % 2 == 0


@pytest.mark.slow
def test_the_kl_trains_all_rollouts_and_pulls_towards_the_initial_weights(tmp_path: Path) -> None:
    recorder, module = fit_and_record(tmp_path, RuleTask(lambda _: True), 2, GRPO(), model={"reference_kl": 1.0})
    epoch = recorder.epochs[0]
    assert epoch.trains.all()
    torch.testing.assert_close(epoch.logp_reference, epoch.logp_old, rtol=0, atol=1e-4)
    assert module.reference_weights is module.reference

    distance = []
    for coefficient in (1e-9, 0.1):
        recorder, _ = fit_and_record(
            tmp_path,
            RuleTask(half),
            epochs=8,
            method=GRPO(),
            model={"reference_kl": coefficient},
            rollouts_per_prompt=8,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.003),
        )
        last = recorder.epochs[-1]
        distance.append(float((last.logp_old - last.logp_reference)[last.mask].mean()))  # estimates the KL
    assert 0 < distance[1] < 0.8 * distance[0]


def test_a_frozen_teacher_and_adapters_need_no_copy_for_the_reference(tmp_path: Path) -> None:
    frozen = TeacherRefresh(every_n_epochs=None)
    small = {"epochs": 2, "model": {"reference_kl": 0.1}, "prompts_per_epoch": 2}
    recorder, module = fit_and_record(tmp_path, RuleTask(half), callbacks=[frozen], **small)
    assert module.reference_weights is module.teacher
    assert not list(module.reference.parameters())
    plain, own = fit_and_record(tmp_path, RuleTask(half), **small)
    assert [e.logp_reference.tolist() for e in recorder.epochs][:1] == [
        e.logp_reference.tolist() for e in plain.epochs
    ][:1]
    assert sum(p.numel() for p in own.reference.parameters()) == sum(p.numel() for p in own.policy.parameters())

    recorder, module = fit_and_record(tmp_path, RuleTask(half), policy=Policy(lora=LoRA(rank=2)), **small)
    assert not list(module.reference.parameters())
    second = recorder.epochs[1]
    start = Policy()
    start.load()
    sequences = [(r.prompt_ids, r.response_ids) for r in second.rollouts]
    for row, logp in enumerate(start.score(sequences)):
        torch.testing.assert_close(second.logp_reference[row, : len(logp)], logp, rtol=0, atol=1e-4)
    assert (second.logp_reference - second.logp_old)[second.mask].abs().max() > 1e-2


class Poisoned(TeacherRefresh):
    """Sets the reference's weights to NaN."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for p in pl_module.reference.parameters():
            p.data.fill_(torch.nan)


def test_non_finite_log_probs_of_the_reference_end_the_run_and_are_reported(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"callbacks": [Poisoned()], "model": {"reference_kl": 0.1}}
    with pytest.raises(ConfigError, match="all rollouts of epoch 1 have non-finite log-probs"):
        fit_and_record(tmp_path, RuleTask(half), **settings)
    (report,) = tmp_path.glob("bad_numbers/*.jsonl")
    assert "logp of the reference is nan" in report.read_text(encoding="utf-8")


@pytest.mark.parametrize("method", [GRPO(), SDPO()], ids=["GRPO", "SDPO"])
def test_truncated_rollouts_count_in_advantages_but_not_in_the_loss(method: Any, tmp_path: Path) -> None:
    recorder, _ = fit_and_record(
        tmp_path,
        RuleTask(half),
        method=method,
        model={"mask_truncated": True, "reference_kl": 0.1},
        sampling=Sampling(max_new_tokens=6),
        rollouts_per_prompt=8,
        rescore=True,
    )
    epoch = recorder.epochs[0]
    assert 0 < epoch.truncated.sum() < len(epoch.rollouts)
    assert epoch.advantages[epoch.truncated].any()
    assert not epoch.trains[epoch.truncated].any()
    assert not epoch.counted[epoch.truncated].any()
    assert not epoch.rescored[epoch.truncated].any(), "they need no forward pass"
    if isinstance(method, GRPO):
        assert epoch.trains[~epoch.truncated].all()
        assert int(mini_batch_sizes(epoch, 2)[:, 1].sum()) == int((~epoch.truncated).sum())


def test_an_epoch_of_truncated_rollouts_changes_no_weight(tmp_path: Path) -> None:
    recorder, module = fit_and_record(
        tmp_path, LastDigit(), model={"mask_truncated": True}, sampling=Sampling(max_new_tokens=1), method=GRPO()
    )
    assert recorder.epochs[0].truncated.all()
    assert not weights_changed(module)


def test_the_overlong_penalty_is_added_to_the_reward_of_long_responses(tmp_path: Path) -> None:
    recorder, _ = fit_and_record(tmp_path, RuleTask(half), sampling=Sampling(max_new_tokens=8), overlong_buffer=4)
    epoch = recorder.epochs[0]
    added = epoch.shaped_rewards - epoch.rewards
    expected = overlong_penalty(epoch.mask.sum(-1), 8, 4)
    torch.testing.assert_close(added.double(), expected)
    assert -1 <= float(added.min()) < 0
    assert recorder.metrics[0]["rollout/shaped_reward"] < recorder.metrics[0]["rollout/reward"]


def test_constant_length_defaults_to_the_longest_response_allowed(tmp_path: Path) -> None:
    weights = []
    for length in (None, 32):
        _, module = fit_and_record(
            tmp_path, RuleTask(half), model={"aggregation": "constant-length", "length": length}, method=GRPO()
        )
        weights.append(torch.cat([p.flatten() for p in module.policy.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 5}, "model.length is 5, but model.aggregation is token-mean"),
        ({"length": 0, "aggregation": "constant-length"}, "model.length is 0; it has to be 1 or more, or null"),
        ({"reference_kl": -0.1}, "model.reference_kl is -0.1; it has to be 0 or more"),
        ({"surrogate": "cispo", "ratio": "sequence"}, "model.surrogate is cispo, which has neither"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "model.surrogate is cispo, which has neither"),
    ],
)
def test_settings_that_do_not_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RLRTModule(Policy(), Teacher(), **settings)


def test_a_buffer_beyond_the_longest_response_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.overlong_buffer is 33; it has to be from 1 to .* \(32\), or null"):
        fit_and_record(tmp_path, LastDigit(), overlong_buffer=33)
