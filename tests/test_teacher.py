"""The teacher: its contexts, its weights, and its scores of the sampled tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rlrt_lightning import ConfigError, Policy, Problem, Rollout, Teacher, TeacherWeights, Verdict
from tests.helpers.tiny import tiny_policy

TEMPLATE = "{prompt}, so {context}"


def rollout(group: int, index: int, text: str = "guess 1", made: Policy | None = None) -> Rollout:
    ids = (made or Policy()).tokenizer(text)["input_ids"]
    return Rollout(group, index, [2, 3], [*ids, 1], torch.zeros(len(ids) + 1), False, text)


def problems(n: int = 1, **fields: Any) -> list[Problem]:
    return [Problem(str(i), f"tea {i} milk 2", **fields) for i in range(n)]


def contexts(
    teacher: Teacher, rollouts: list[Rollout], success: list[int], kind: Any = "sibling", seed: int = 0
) -> list:
    return teacher.contexts(kind, problems(9, answer=7), rollouts, torch.tensor(success).bool(), seed)


def test_one_sibling_is_shown_to_all_others_and_never_to_itself() -> None:
    rollouts = [rollout(g, k, f"guess {k}") for g in range(3) for k in range(4)]
    success = [1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0]
    for seed in range(20):
        got = contexts(Teacher(), rollouts, success, seed=seed)
        first = got[:4]
        assert all(text in ("guess 0", "guess 2", "guess 3") for text in first)
        assert all(text != r.text for text, r in zip(got, rollouts, strict=True) if text is not None)
        assert len(set(first)) == 2, "one demonstration for all others, and another for the demonstration itself"
        assert sorted(first.count(text) for text in set(first)) == [1, 3]
        assert got[4:8] == ["guess 2", "guess 2", None, "guess 2"], "the only success has no context"
        assert got[8:] == [None] * 4


def test_the_chosen_sibling_depends_on_seed_and_group_not_on_order() -> None:
    rollouts = [rollout(g, k, f"guess {k}") for g in range(8) for k in range(4)]
    chosen = [contexts(Teacher(), rollouts, [1] * 32, seed=s) for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert contexts(Teacher(), rollouts[::-1], [1] * 32) == chosen[0][::-1]


def test_context_answer_shows_the_ground_truth_if_there_is_one() -> None:
    rollouts = [rollout(0, 0), rollout(0, 1)]
    assert contexts(Teacher(), rollouts, [0, 1], "answer") == ["7", "7"]
    assert Teacher().contexts("answer", problems(1), rollouts, torch.tensor([True, True])) == [None, None]


def test_contexts_solution_and_feedback_are_shown_where_they_exist() -> None:
    rollouts = [rollout(0, 0), rollout(1, 0)]
    rollouts[0].verdict = Verdict(0.0, False, message="wrong: the sign")
    rollouts[1].verdict = Verdict(1.0, True)
    asked = [Problem("0", "a", solution="quickly: tea 1"), Problem("1", "b")]
    success = torch.tensor([False, True])
    assert Teacher().contexts("solution", asked, rollouts, success) == ["quickly: tea 1", None]
    assert Teacher().contexts("feedback", asked, rollouts, success) == ["wrong: the sign", None]


def test_the_default_template_depends_on_the_kind_of_context() -> None:
    made, shown = Policy(), []
    made.encode_prompt = lambda prompt, *_: shown.append(prompt) or [0]
    for kind in ("sibling", "solution", "answer", "feedback"):
        Teacher().prompt(made, problems()[0], "CONTEXT", kind)
    assert all(text.startswith("tea 0 milk 2") and "CONTEXT" in text for text in shown)
    assert "correct solution" in shown[0] == shown[1]
    assert "correct answer" in shown[2]
    assert "feedback" in shown[3]


def test_the_template_fills_the_last_message_and_keeps_other_braces() -> None:
    made = Policy(chat=True)
    teacher = Teacher(template="A {prompt}, so {context} B")
    fancy = Problem("x", [{"role": "user", "content": "tea 1"}, {"role": "user", "content": "b{context}{2}"}])
    ids, _ = teacher.prompt(made, fancy, "guess {prompt}")
    shown = []
    made.encode_prompt = lambda prompt, *_: shown.append(prompt) or [0]
    teacher.prompt(made, fancy, "guess {prompt}")
    assert shown[0][0] == fancy.prompt[0]
    assert shown[0][1]["content"] == "A b{context}{2}, so guess {prompt} B"
    assert ids[0] == made.tokenizer.convert_tokens_to_ids("<user>")


def test_thinking_is_removed_and_long_contexts_lose_their_middle() -> None:
    made, shown = Policy(), []
    encode = made.encode_prompt
    made.encode_prompt = lambda prompt, *_: shown.append(prompt) or encode(prompt)
    assert not Teacher(TEMPLATE).prompt(made, problems()[0], "<think>9a9</think>\n\nguess 1")[1]
    long = " ".join(["tea 0"] * 50 + ["milk 1"] * 8)
    assert Teacher(TEMPLATE, max_context_tokens=29).prompt(made, problems()[0], long)[1]
    Teacher(TEMPLATE, strip_think=False).prompt(made, problems()[0], "<think>9</think>guess 1")
    cut = "tea 0 " * 4 + "tea ... " + " milk 1" * 8
    assert shown == ["tea 0 milk 2, so guess 1", f"tea 0 milk 2, so {cut}", "tea 0 milk 2, so <think>9</think>guess 1"]


def test_scores_match_a_plain_forward_pass_after_the_teachers_prompt() -> None:
    made, teacher = tiny_policy(), Teacher(TEMPLATE)
    rollouts = [rollout(0, 0, "guess 1"), rollout(0, 1, "skip the last: tea 0, guess 2"), rollout(0, 2)]
    scores, truncated = teacher.score(made, problems(), rollouts, ["carefully: tea 2", None, "guess 3"], top_k=5)
    assert truncated == 0
    assert scores[1] is None
    for i, context in ((0, "carefully: tea 2"), (2, "guess 3")):
        ids = made.encode_prompt(f"tea 0 milk 2, so {context}") + rollouts[i].response_ids
        with made.evaluating() as model:
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        response = torch.tensor(rollouts[i].response_ids)
        logp = logp[-len(response) - 1 : -1]
        score = scores[i]
        torch.testing.assert_close(score.logp, logp.gather(-1, response[:, None])[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(score.entropy, -(logp.exp() * logp).sum(-1), rtol=0, atol=1e-5)
        assert not score.logp.requires_grad
        # the student's likeliest tokens, with the teacher's log-probs
        with made.evaluating() as model:
            plain = model(input_ids=torch.tensor([rollouts[i].prompt_ids + rollouts[i].response_ids])).logits[0]
        assert torch.equal(score.top_tokens, plain[-len(response) - 1 : -1].topk(5).indices.int())
        torch.testing.assert_close(score.top_logp, logp.gather(-1, score.top_tokens.long()), rtol=0, atol=1e-5)


def test_a_context_that_does_not_fit_the_model_is_dropped_and_counted() -> None:
    made = tiny_policy()
    made.config.max_position_embeddings = 12
    long = "carefully: tea 2 milk 2 (4), so 4"
    assert Teacher(TEMPLATE).score(made, problems(), [rollout(0, 0)], [long]) == ([None], 1)


def test_a_teacher_refreshed_each_epoch_has_no_parameters() -> None:
    made, teacher = tiny_policy(), Teacher(TEMPLATE)
    teacher.load(made)
    assert not list(teacher.parameters())


def test_own_weights_change_only_on_refresh_and_scoring_keeps_the_policys() -> None:
    made, teacher = tiny_policy(), Teacher(TEMPLATE)
    teacher.schedule = TeacherWeights(ema_decay=0.75)
    teacher.load(made)
    assert not any(p.requires_grad for p in teacher.parameters())
    rollouts = [rollout(0, 0), rollout(0, 1)]
    score = lambda: teacher.score(made, problems(), rollouts, ["guess 2", "guess 2"])[0][0].logp  # noqa: E731
    before, model = score(), made.model
    start = copy.deepcopy(list(made.parameters()))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1.1)
    torch.testing.assert_close(score(), before)
    assert made.model is model
    teacher.refresh(made, ema_decay=0.75)
    for ours, old, new in zip(teacher.parameters(), start, made.parameters(), strict=True):
        torch.testing.assert_close(ours, 0.75 * old + 0.25 * new)
    teacher.refresh(made)
    for ours, new in zip(teacher.parameters(), made.parameters(), strict=True):
        assert torch.equal(ours, new)
    assert not torch.allclose(score(), before)


@pytest.mark.parametrize("bad", [{"template": "{prompt}"}, {"template": "{context}"}, {"max_context_tokens": 0}])
def test_invalid_teacher_settings_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model.teacher.{next(iter(bad))}"):
        Teacher(**bad)
