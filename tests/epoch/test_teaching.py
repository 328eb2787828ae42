"""What the teacher sees and scores for each method, the loss with two means, and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from rlrt_lightning import (
    RLCSD,
    RLRT,
    RLSD,
    SDPO,
    AntiSD,
    EntropyGate,
    LastDigit,
    Policy,
    Problem,
    RLRTModule,
    Rollout,
    Sampling,
    Teacher,
    TransformersEngine,
    Verdict,
    two_path_surrogate,
)
from rlrt_lightning.callbacks.reversed_signal import signal_statistics
from rlrt_lightning.contexts import FEEDBACK, VERDICTS, Shown
from rlrt_lightning.epoch import teaching
from rlrt_lightning.epoch.batch import micro_batches, mini_batch_sizes
from rlrt_lightning.epoch.make import EpochSettings, Parts, assign_credit, judge, score
from rlrt_lightning.epoch.record import EpochRecord, Questions, Scored
from rlrt_lightning.objective import Method
from rlrt_lightning.teacher import TeacherScore
from tests.helpers.command_line import cli_exit_code
from tests.helpers.epochs import fit_and_record, random_epoch_record
from tests.helpers.tiny import tiny_policy

SETTINGS = EpochSettings(
    sampling=Sampling(max_new_tokens=64),
    rollouts_per_prompt=8,
    sampling_rounds=1,
    minibatches=1,
    accumulate_grad_batches=1,
    tokens_per_pass=None,
    rescore=False,
    max_fault_share=1.0,
    importance="token",
    importance_cap=2.0,
    aggregation="token-mean",
    mask_truncated=False,
    overlong_buffer=None,
    seed=0,
)
CORRECT = [True, False, True, True, False, False, True, False]
TEMPLATE = "{prompt}, so {context}"


class Watched(Teacher):
    """Keeps what it was asked to score, and its answers."""

    def score(self, policy: Any, problems: Any, rollouts: Any, contexts: Any, *args: Any, **settings: Any) -> Any:
        self.asked = list(zip(rollouts, contexts, strict=True))
        self.scores, truncated = super().score(policy, problems, rollouts, contexts, *args, **settings)
        return self.scores, truncated

    def of(self, row: int) -> list[Shown]:
        """What it saw of one rollout."""
        return [shown for rollout, shown in self.asked if rollout.index == row]


def rollouts(policy: Policy, correct: Sequence[bool], group: int = 0, message: str = "") -> list[Rollout]:
    found = []
    for k, right in enumerate(correct):
        text = f"carefully: {' '.join(f'tea {k} milk {i}' for i in range(6))}, so {k}"
        ids = [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], 1]
        logp = -torch.rand(len(ids), generator=torch.Generator().manual_seed(k))
        verdict = Verdict(float(right), right, message=message)
        found.append(Rollout(group, k, [2, 3, 4], ids, logp, False, text, verdict=verdict))
    return found


def scored(
    method: Method, policy: Policy, drawn: list[Rollout], solution: str | None = None, **settings: Any
) -> tuple[Scored, Watched]:
    """Judges and scores the rollouts of one problem."""
    teacher = Watched(**{"template": TEMPLATE, **settings})
    problems = [Problem("p", "tea 4 milk 5", "9", solution=solution)]
    judged = judge(Questions(0, problems, [[2, 3, 4]], [0], range(1)), drawn, {}, method, SETTINGS)
    return score(
        judged, Parts(policy, teacher, method, TransformersEngine()), SETTINGS, lambda _: nullcontext()
    ), teacher


def prefixes_read(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the number of tokens of each prompt that is read into a cache."""
    read: list[int] = []
    prefill = policy._prefill

    def counted(ids: Any, mask: Any) -> Any:
        read.extend(mask.sum(1).tolist())
        return prefill(ids, mask)

    monkeypatch.setattr(policy, "_prefill", counted)
    return read


# -- contexts ------------------------------------------------------------------------------------------------------


def test_rlcsd_shows_one_correct_and_up_to_four_wrong_siblings_and_never_the_rollout_itself() -> None:
    policy = tiny_policy()
    drawn = rollouts(policy, CORRECT)
    right = {r.text for r in drawn if r.verdict and r.verdict.correct}
    for method in (RLCSD(), RLRT(gated=False, contrast=True)):
        record, teacher = scored(method, policy, drawn)
        for i, rollout in enumerate(drawn):
            first, *wrong = teacher.of(i)
            assert first.context in right - {rollout.text}
            others = {r.text for r in drawn} - right - {rollout.text}
            assert {shown.context for shown in wrong} == others
            assert len(wrong) == len(others) == (4 if CORRECT[i] else 3)
            assert {shown.kind for shown in (first, *wrong)} == {"sibling"}, "the same template"
        assert record.wrong_valid is not None
        assert record.wrong_valid.sum(1).tolist() == [4 if right else 3 for right in CORRECT]
    _, teacher = scored(RLRT(contrast=True), policy, drawn)
    assert {r.index for r, _ in teacher.asked} == {0, 2, 3, 6}, "gated: correct rollouts only"


def test_a_rollout_without_both_kinds_of_siblings_is_not_scored() -> None:
    policy = tiny_policy()
    for correct, expected in (([True, False, False], {1, 2}), ([True, True, False], {0, 1}), ([True] * 3, set())):
        record, teacher = scored(RLCSD(), policy, rollouts(policy, correct))
        assert {r.index for r, _ in teacher.asked} == expected
        assert set(record.has_context.nonzero()[:, 0].tolist()) == expected


def test_a_rollout_on_which_the_verifier_failed_is_not_shown_as_wrong() -> None:
    policy = tiny_policy()
    drawn = rollouts(policy, CORRECT)
    drawn[4].verdict = Verdict(0.0, False, message="it hung", fault=True)
    _, teacher = scored(RLCSD(), policy, drawn)
    assert all(shown.context != drawn[4].text for _, shown in teacher.asked)


def test_each_wrong_siblings_scores_are_those_of_a_plain_forward_pass() -> None:
    policy = tiny_policy()
    drawn = rollouts(policy, CORRECT)
    record, teacher = scored(RLCSD(), policy, drawn)
    assert record.logp_teacher_wrong is not None
    for i, rollout in enumerate(drawn):
        first, *wrong = teacher.of(i)
        found = [record.logp_teacher[i], *record.logp_teacher_wrong[i]]
        for shown, got in zip((first, *wrong), found, strict=False):
            prompt = policy.encode_prompt(f"tea 4 milk 5, so {shown.context}")
            with policy.evaluating() as model:
                logits = model(input_ids=torch.tensor([prompt + rollout.response_ids])).logits[0]
            targets = torch.tensor(rollout.response_ids)[:, None]
            expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, targets)[:, 0]
            torch.testing.assert_close(got[: len(expected)], expected, rtol=0, atol=1e-4)


def test_the_choice_of_wrong_siblings_does_not_depend_on_the_order_of_the_rollouts() -> None:
    policy = tiny_policy()
    drawn = rollouts(policy, [True, True, *[False] * 6])
    _, one = scored(RLCSD(), policy, drawn)
    _, other = scored(RLCSD(), policy, drawn[::-1])
    for i in range(8):
        assert one.of(i) == other.of(i)
        assert len(one.of(i)) == 5
    assert len({shown.context for _, shown in one.asked}) == 2 + 5, "few demonstrations for all siblings"


def test_non_finite_scores_with_one_wrong_sibling_drop_only_that_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    score_ = Watched.score

    def poisoned(self: Watched, *args: Any, **settings: Any) -> Any:
        found, truncated = score_(self, *args, **settings)
        found[1].logp[2] = torch.nan  # the first rollout's first wrong sibling
        return found, truncated

    monkeypatch.setattr(Watched, "score", poisoned)
    record, _ = scored(RLCSD(), policy, rollouts(policy, CORRECT))
    assert record.faults == {0: "the teacher's logp is nan at token 2"}
    assert record.wrong_valid is not None
    assert record.wrong_valid.sum(1).tolist()[:2] == [3, 3]
    assert assign_credit(record, RLCSD(), SETTINGS).credit.advantages.isfinite().all()


def test_antisd_shows_a_sibling_or_else_the_solution_and_ends_with_the_verdict() -> None:
    policy = tiny_policy()
    texts: list[str] = []
    encode = policy.encode_prompt
    policy.__dict__["encode_prompt"] = lambda prompt, *more: texts.append(prompt) or encode(prompt, *more)
    _, teacher = scored(AntiSD(), policy, rollouts(policy, [True, False, False]), solution="quickly: tea 1, so 9")
    own, first, second = (teacher.of(i)[0] for i in range(3))
    assert own == Shown("quickly: tea 1, so 9", "solution", VERDICTS[True]), "the only correct rollout"
    assert first == second == Shown(rollouts(policy, [True])[0].text, "sibling", VERDICTS[False])
    assert f"tea 4 milk 5, so {own.context}\n\nYour answer is correct." in texts
    assert f"tea 4 milk 5, so {first.context}\n\nYour answer is incorrect." in texts
    record, _ = scored(AntiSD(), policy, rollouts(policy, [False] * 3))
    assert not record.has_context.any(), "neither a sibling nor a solution"


def test_sdpo_shows_success_and_feedback_together_or_the_one_that_there_is() -> None:
    policy = tiny_policy()
    drawn = rollouts(policy, [True, False, False], message="so 3, 4 milk")
    drawn[2].verdict = Verdict(0.0, False)
    _, teacher = scored(SDPO(feedback=True), policy, drawn)
    only, both, success = (teacher.of(i)[0] for i in range(3))
    assert only == Shown("so 3, 4 milk", "feedback")
    assert both == Shown(drawn[0].text, "sibling", FEEDBACK + "so 3, 4 milk")
    assert success == Shown(drawn[0].text, "sibling")
    drawn[1].verdict = Verdict(0.0, False, message="tea 1 milk 2 " * 40)
    _, teacher = scored(SDPO(feedback=True), policy, drawn, max_context_tokens=30)
    assert len(policy.tokenizer(teacher.of(1)[0].remark.removeprefix(FEEDBACK))["input_ids"]) <= 30
    _, teacher = scored(SDPO(), policy, drawn)
    assert teacher.of(1)[0].remark == ""


# -- counted work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [RLCSD(), AntiSD(), RLRT(gated=False), RLRT(gated=False, contrast=True)], ids=lambda m: type(m).__name__
)
def test_each_demonstration_is_read_once_for_all_rollouts_that_share_it(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with five contexts, or with another remark on each rollout, in tokens that the teacher reads."""
    policy = tiny_policy()
    drawn = rollouts(policy, CORRECT)
    read = prefixes_read(policy, monkeypatch)
    before = float(policy.counter.tokens)
    _, teacher = scored(method, policy, drawn)
    shown = {s.context for _, s in teacher.asked}
    assert len(read) == len(shown) == (6 if method.needs.wrong_siblings else 2)
    assert len(teacher.asked) == (8 + 4 * 4 + 4 * 3 if method.needs.wrong_siblings else 8)
    responses = sum(len(r.response_ids) - 1 for r, _ in teacher.asked)
    remarks = float(policy.counter.tokens) - before - sum(read) - responses
    longest = len(policy.encode_prompt(VERDICTS[False])) if method.needs.remark == "verdict" else 0
    assert bool(longest) <= remarks <= 8 * longest, "only the end of a remark is read for each rollout"


def test_scores_after_a_shared_prefix_are_those_of_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy()
    shared, _ = scored(AntiSD(), policy, rollouts(policy, CORRECT))
    read = prefixes_read(policy, monkeypatch)
    monkeypatch.setattr(type(policy.work), "worth_sharing", lambda self, sequences: False)
    whole, _ = scored(AntiSD(), policy, rollouts(policy, CORRECT))
    assert not read
    torch.testing.assert_close(shared.logp_teacher, whole.logp_teacher, rtol=0, atol=1e-4)
    for one, other in zip(shared.teacher, whole.teacher, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.entropy, other.entropy, rtol=0, atol=1e-4)


# -- the loss with two means ---------------------------------------------------------------------------------------


def with_rlcsds_credit(seed: int) -> EpochRecord:
    data, g = random_epoch_record(seed, prompts=6), torch.Generator().manual_seed(seed)
    n, t = data.mask.shape
    wrong, valid = -3 * torch.rand(n, 2, t, generator=g), torch.rand(n, 2, generator=g) < 0.7
    method = RLCSD(beta=1.0, tau=0.5, eta=0.6)
    signals = data.advantages, data.rewards, data.logp_old, data.logp_teacher, data.mask, torch.ones(n)
    data.credit = method(*signals, logp_teacher_wrong=wrong, wrong_valid=valid)
    return data


@pytest.mark.parametrize("accumulate", [1, 3])
def test_any_split_into_micro_batches_gives_the_two_means_of_the_mini_batch(accumulate: int) -> None:
    """Over all ranks: here two, each with half of the groups."""
    policy, data = tiny_policy(), with_rlcsds_credit(0)
    assert data.credit.selected is not None
    cut = list(micro_batches(data, 2, accumulate, "token-mean"))
    sizes = mini_batch_sizes(data, 2)
    assert sizes[:, 2].tolist() == [int(data.credit.selected[half].sum()) for half in (slice(9), slice(9, 18))]
    for step in range(2):
        rows = list(range(9 * step, 9 * step + 9))
        policy.zero_grad()
        new = torch.zeros(9, data.mask.shape[1])
        for n, r in enumerate(data.rollouts[i] for i in rows):
            logits = policy.model(input_ids=torch.tensor([r.prompt_ids + r.response_ids])).logits[0]
            logp = logits[len(r.prompt_ids) - 1 : -1].log_softmax(-1)
            new[n, : len(r.response_ids)] = logp.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]
        credit = data.credit.advantages[rows], data.mask[rows], data.credit.selected[rows]
        two_path_surrogate(new, data.logp_old[rows], *credit, 0.2, 0.28, eta=0.6).loss.backward()
        expected = [p.grad.clone() for p in policy.parameters()]
        policy.zero_grad()
        module = RLRTModule(policy, Teacher(), RLCSD())
        for batch in cut[step * accumulate : (step + 1) * accumulate]:
            (module.training_step(batch, 0)["loss"] / accumulate).backward()
        for p, gradient in zip(policy.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)


def test_rlcsds_metrics_are_logged() -> None:
    data = with_rlcsds_credit(1)
    data.wrong_valid = torch.ones(len(data.rollouts), 2, dtype=torch.bool)
    data.wrong_valid[0] = False
    stats = signal_statistics(data)
    assert data.credit.selected is not None
    assert stats["signal/selected"] == pytest.approx(float(data.credit.selected[data.mask].float().mean()))
    assert stats["signal/contrasted"] == pytest.approx(17 / 18)


# -- the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "others", "median"), [([3.0, 1.0], [9.0], 3.0), ([5.0], [1.0, 2.0, 9.0], 3.5)])
def test_the_gate_takes_the_exact_median_over_all_ranks(
    own: list[float], others: list[float], median: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, gate = random_epoch_record(), EntropyGate(1)
    empty = torch.zeros(0, 0)
    data.teacher = [None, *(TeacherScore(torch.zeros(1), torch.tensor([h]), empty, empty) for h in own)]
    monkeypatch.setattr(teaching, "gather", lambda mine: [torch.tensor(others), mine])
    teaching.step_gate(data, gate)
    assert gate.warm_entropy == median
    assert data.gate_metrics == {
        "signal/gate_open": 0.0,
        "signal/gate_entropy": median,
        "signal/gate_warm_entropy": median,
    }


def test_an_epoch_without_scored_tokens_is_no_step_of_the_gate() -> None:
    data, gate = random_epoch_record(), EntropyGate(1)
    teaching.step_gate(data, gate)
    assert gate.warm_entropy is None
    assert data.gate_metrics == {}


class Lengths(Callback):
    """Collects the number of the gate's steps before each epoch's first update and after its last."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.steps.append(len(pl_module.gate.state_dict()["warmup"]))

    on_train_epoch_end = on_train_epoch_start


def test_the_gate_takes_its_step_when_the_epoch_begins_to_train(tmp_path: Path) -> None:
    """A checkpoint before then has the epoch's prompts still to come, so that a resumed run makes the epoch again."""
    lengths = Lengths()
    fit_and_record(tmp_path, LastDigit(), 2, AntiSD(), callbacks=[lengths])
    assert lengths.steps == [0, 1, 1, 2]


def test_the_gate_turns_antisd_off_and_on_during_training(tmp_path: Path) -> None:
    recorder, module = fit_and_record(tmp_path, LastDigit(), 4, AntiSD(warmup_steps=2, close_at=1.0))
    entropies = [metrics["signal/gate_entropy"] for metrics in recorder.metrics]
    expected = EntropyGate(2, close_at=1.0)
    for epoch, metrics, entropy in zip(recorder.epochs, recorder.metrics, entropies, strict=True):
        scored_tokens = torch.cat([s.entropy for s in epoch.teacher if s is not None])
        assert entropy == pytest.approx(float(scored_tokens.quantile(0.5)))
        opened = expected.step(entropy)
        assert metrics["signal/gate_open"] == epoch.gate_open == opened
        plain = epoch.advantages[:, None] * epoch.mask
        assert torch.equal(epoch.credit.advantages, plain) == (not opened)
    assert module.gate is not None
    assert module.gate.warm_entropy == sum(entropies[:2]) / 2


# -- refused settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["AntiSD", "--model.teacher.scored_by=engine", "--data.engine=VllmServerEngine"],
            "model.teacher.scored_by is engine, but AntiSD needs the teacher's whole distribution",
        ),
        (["RLCSD", "--model.aggregation=seq-mean-token-mean"], "the loss of RLCSD is defined for token-mean"),
        (["RLCSD", "--data.rollouts_per_prompt=2"], "data.rollouts_per_prompt is 2; it has to be at least 3"),
        (["RLRT", "--model.method.contrast=true", "--data.rollouts_per_prompt=2"], "has to be at least 3"),
        (["AntiSD", "--model.method.close_at=2"], "close_at is 2"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_method_are_refused_in_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data.engine.urls=[http://127.0.0.1:9]"] if "VllmServerEngine" in flags[-1] else []
    assert cli_exit_code("fit", tmp_path, f"--model.method={flags[0]}", *flags[1:], *more) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


# -- thinking ------------------------------------------------------------------------------------------------------


def test_rlsd_weighs_only_the_thinking_of_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    policy = tiny_policy()
    drawn = rollouts(policy, CORRECT)
    method = RLSD(context="sibling", thoughts_only=True)
    scored(method, policy, drawn)
    assert "no rollout of this epoch has text between <think> and </think>" in caplog.text
    policy.__dict__["thoughts"] = lambda ids, inside: [i % 3 == 0 for i in range(len(ids))]
    record, _ = scored(method, policy, drawn)
    credit = assign_credit(record, method, SETTINGS).credit
    inside = torch.arange(record.mask.shape[1]) % 3 == 0
    assert (credit.weights[:, inside] != 1)[record.mask[:, inside]].all()
    assert (credit.weights[:, ~inside] == 1)[record.mask[:, ~inside]].all()
