"""The exact text that the model and its teacher read, and the text of their responses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from rlrt_lightning import (
    RLRT,
    ConfigError,
    ExactMatch,
    LastDigit,
    Policy,
    Problem,
    RLRTModule,
    Rollout,
    RolloutDataModule,
    Sampling,
    Teacher,
    Verdict,
)
from rlrt_lightning.analysis.events import event_log
from rlrt_lightning.callbacks import PromptPreview
from rlrt_lightning.callbacks.boards import CONTINUED
from rlrt_lightning.epoch.prompts import PromptReader
from rlrt_lightning.policy.chat import template_variables
from rlrt_lightning.policy.texts import MARK, without_thinking
from tests.helpers.byte_model import CHATML, END, byte_policy, decoded
from tests.helpers.command_line import TRAIN_ONLY, cli_exit_code
from tests.helpers.epochs import RuleTask, fit_and_record

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
OPENS_THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NO_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
LAST_ONLY = CHATML.replace("for m in messages", "for m in messages[-1:]")
PROBLEM = Problem("p", "2+2?")


def ids_of(policy: Policy, text: str) -> list[int]:
    return list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


# -- text of responses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, OPENS_THINKING, None])
def test_tags_that_are_special_tokens_stay_in_the_text(template: str | None, tmp_path: Path) -> None:
    policy = byte_policy(tmp_path, template, TAGS)
    text = "<think>9</think>So <answer>é4</answer>"
    assert policy.decode(ids_of(policy, text + END)) == text
    reward = ExactMatch(r"<answer>(.*?)</answer>")
    assert reward(Problem("p", "", "é4"), policy.decode(ids_of(policy, text))).correct


def test_end_padding_and_chat_tokens_are_not_part_of_the_text(tmp_path: Path) -> None:
    policy = byte_policy(tmp_path, special=["<pad>", "<s>", "</s>"], bos="<s>")
    policy.tokenizer.pad_token = "<pad>"
    text = "<s>4<|im_end|>\n<|im_start|>user\n<pad>x" + END
    assert policy.decode(ids_of(policy, text)) == "4\nuser\nx"
    roles = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}<|end|>{% endfor %}<|assistant|>"
    policy = byte_policy(tmp_path, roles, special=["<|user|>", "<|assistant|>", "<|end|>", "<|note|>"])
    assert policy.decode(ids_of(policy, "4<|end|><|user|>5<|assistant|><|note|>")) == "45<|note|>"


# -- thinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("guess 1 ", "guess 1 "),
        ("<think>a</think>\n\nb", "b"),
        ("<think>the answer is 4</think>", ""),
        ("<think>the answer is 4", ""),
        ("First 2+1=3. <think>hm</think> So 4.", "First 2+1=3.  So 4."),
        ("First. <think>cut off", "First."),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a</think>b <think>c", "b"),
        ("<think>a</think>A </think> ends it: 4", "A </think> ends it: 4"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<think>a <think> tag</think>d", "d"),
        ("a</think>b", "b"),
        ("a</think>b<think>c</think>d", "bd"),
        ("a</think>A </think> ends it", "A </think> ends it"),
        ("a</think>", ""),
    ],
)
def test_only_the_text_inside_think_tags_is_removed(text: str, left: str) -> None:
    assert without_thinking(text) == left


@pytest.mark.parametrize("special", [TAGS, []], ids=["tags are tokens", "tags are several tokens"])
@pytest.mark.parametrize(
    ("text", "inside", "thought"),
    [
        ("é1<think>2é3</think>45", False, "2é3"),
        ("12</think>3", True, "12"),
        ("12</think>3", False, "12"),
        ("12", True, "12"),
        ("12", False, ""),
        ("1<think>2</think>3<think>4", False, "24"),
        ("<think>1<think>2</think>3</think>4", False, "1<think>2</think>3"),
    ],
)
def test_the_tokens_inside_thinking_tags_are_found(
    special: list[str], text: str, inside: bool, thought: str, tmp_path: Path
) -> None:
    policy = byte_policy(tmp_path, special=special)
    ids = ids_of(policy, text)
    assert (len(ids) < len(text.encode())) == bool(special and "<" in text), "a tag is one token, or one of each byte"
    found = policy.thoughts(ids, inside)
    assert policy.tokenizer.decode([i for i, yes in zip(ids, found, strict=True) if yes]) == thought


def test_thinking_opened_by_the_prompt_is_removed(tmp_path: Path) -> None:
    assert without_thinking("never closed", inside=True) == ""
    assert without_thinking("<think>a</think>b", inside=True) == "b"
    policy, teacher = byte_policy(tmp_path, OPENS_THINKING, TAGS), Teacher()
    assert teacher.prompt(policy, PROBLEM, "never closed") == ([], True)
    assert "never closed" in decoded(policy, teacher.prompt(policy, PROBLEM, "never closed", "solution")[0])
    shown = decoded(policy, teacher.prompt(policy, PROBLEM, "hm</think>\n4")[0])
    assert "correct solution to this problem:\n\n4\n\nNow" in shown
    assert teacher.prompt(policy, Problem("p", "Think in <think> and </think>"), "4") == ([], True)
    assert Teacher(strip_think=False).prompt(policy, PROBLEM, "never closed")[0]


def test_feedback_that_mentions_think_tags_is_kept(tmp_path: Path) -> None:
    feedback, policy = "wrong: nothing after </think>", byte_policy(tmp_path)
    assert feedback in decoded(policy, Teacher().prompt(policy, PROBLEM, feedback, "feedback")[0])


def test_a_context_of_only_thinking_is_dropped_and_counted(tmp_path: Path) -> None:
    policy = byte_policy(tmp_path, special=TAGS)
    policy.load()
    rollouts = [rollout(policy, k, text) for k, text in enumerate(("<think>4</think>", "<think>4", "no"))]
    contexts = Teacher().contexts("sibling", [PROBLEM], rollouts, torch.tensor([True, True, False]), 0)
    assert all(contexts)
    assert Teacher().score(policy, [PROBLEM], rollouts, contexts) == ([None] * 3, 3)


def test_rollouts_that_only_think_train_like_plain_grpo(tmp_path: Path) -> None:
    policy = Policy()
    policy.__dict__["decode"] = lambda ids: "<think>" + Policy.decode(policy, ids)
    recorder, _ = fit_and_record(tmp_path, RuleTask(lambda text: len(text) % 2), policy=policy, prompts_per_epoch=8)
    epoch = recorder.epochs[0]
    assert epoch.rewards.std() > 0
    assert not epoch.has_context.any()
    assert (epoch.credit.weights[epoch.mask] == 1).all()
    assert recorder.metrics[0]["signal/context_truncated"] > 0


# -- ends of prompts -----------------------------------------------------------------------------------------------


def test_prompts_do_not_end_with_tokens_that_the_tokenizer_appends(tmp_path: Path) -> None:
    policy = byte_policy(tmp_path, None, single=f"$A {END}")
    assert decoded(policy, policy.encode_prompt("2+2?")) == "2+2?"
    assert decoded(policy, Teacher("{prompt} {context}").prompt(policy, PROBLEM, f"4{END}")[0]) == "2+2? 4"
    assert decoded(policy, policy.encode_prompt([{"role": "user", "content": "a"}])) == "a"
    with pytest.raises(ConfigError, match="has no tokens"):
        PromptReader(policy, "drop").tokens(Problem("p", ""))
    begun = byte_policy(tmp_path, None, ["<s>"], single=f"<s> <s> $A {END}", bos="<s>")
    assert decoded(begun, begun.encode_prompt("a")) == "<s>a", "the token that begins a text stays, once"


def test_prompts_have_only_one_bos_token(tmp_path: Path) -> None:
    policy = byte_policy(tmp_path, "{{ bos_token }}" + CHATML, ["<s>"], single="<s> $A", bos="<s>")
    assert decoded(policy, policy.encode_prompt("a")).count("<s>") == 1
    policy = byte_policy(tmp_path, None, ["<s>"], single="<s> $A", bos="<s>")
    assert decoded(policy, policy.encode_prompt("<s>a")) == "<s>a"


# -- chat templates ------------------------------------------------------------------------------------------------


def test_template_settings_without_a_chat_template_are_refused(tmp_path: Path) -> None:
    for settings in ({"system_prompt": "Be brief."}, {"system_prompt": ""}, {"chat_kwargs": {"enable_thinking": True}}):
        name = next(iter(settings))
        with pytest.raises(ConfigError, match=f"model.policy.{name} requires a chat template, but model.policy.chat"):
            Policy(chat=False, **settings)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"model.policy.{name} is set, but the tokenizer of .* has no chat templ"):
            _ = byte_policy(tmp_path, None, **settings).tokenizer


@pytest.mark.parametrize("name", ["enable_thinkin", "tokenize", "add_generation_prompt", "messages", "ns", "loop"])
def test_chat_kwargs_must_be_variables_of_the_template(name: str, tmp_path: Path) -> None:
    reads = (
        "{% set ns = namespace(a=bos_token) %}"
        "{% if date is not defined %}{% set date = strftime_now('%Y') %}{% endif %}"
        "{% generation %}{% endgeneration %}{{ date }}{% if enable_thinking %}hm{% endif %}" + CHATML
    )
    kwargs = {"enable_thinking": True, "date": "today"}
    policy = byte_policy(tmp_path, reads, chat_kwargs=kwargs)
    assert decoded(policy, policy.encode_prompt("a")).startswith("todayhm<|im_start|>user")
    message = rf"model\.policy\.chat_kwargs sets {name}, which the chat .* its variables: date, enable_thinking$"
    with pytest.raises(ConfigError, match=message):
        _ = byte_policy(tmp_path, reads, chat_kwargs={name: True, **kwargs}).tokenizer
    with pytest.raises(ConfigError, match="its variables: none"):
        _ = Policy(chat_kwargs={"enable_thinking": True}).tokenizer


def test_the_teacher_has_its_own_chat_kwargs(tmp_path: Path) -> None:
    reads = "{% if enable_thinking %}hm{% endif %}{{ date }}" + CHATML
    policy = byte_policy(tmp_path / "reads", reads, chat_kwargs={"enable_thinking": False, "date": "today"})
    shown = {
        own: decoded(policy, Teacher("{prompt} {context}", chat_kwargs=kwargs).prompt(policy, PROBLEM, "4")[0])
        for own, kwargs in (("none", None), ("thinks", {"enable_thinking": True}))
    }
    assert shown["none"].startswith("today<|im_start|>user\n2+2? 4")
    assert shown["thinks"] == f"hm{shown['none']}", "the others are the policy's"
    assert decoded(policy, policy.encode_prompt("2+2?")).startswith("today"), "the student's prompt stays as it is"

    wrong = Teacher(chat_kwargs={"enable_thinkin": True})
    for own, message in (
        (policy, r"model\.teacher\.chat_kwargs sets enable_thinkin, which the chat template of .* does not read"),
        (byte_policy(tmp_path / "none", None), r"model\.teacher\.chat_kwargs is set, but no chat template is applied"),
    ):
        trainer = Trainer(logger=False, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path)
        with pytest.raises(ConfigError, match=message):
            trainer.fit(RLRTModule(own, wrong), datamodule=RolloutDataModule(RuleTask(bool), benchmarks={}))


def test_an_invalid_chat_template_is_refused() -> None:
    with pytest.raises(ConfigError, match="the chat template cannot be parsed"):
        template_variables("{% for %}")


@pytest.mark.parametrize(
    ("template", "message"), [(NO_SYSTEM, "ignores the system message"), (REFUSES, "no system role")]
)
def test_system_messages_are_refused_by_a_template_without_that_role(
    template: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"model\.policy\.system_prompt: .*{message}"):
        _ = byte_policy(tmp_path, template, system_prompt="Be brief.").tokenizer
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    with pytest.raises(ConfigError, match=r"ignores the message with the role system|no system role"):
        byte_policy(tmp_path, template).encode_prompt(conversation)


def test_a_template_that_drops_a_message_is_refused(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "<think>hm</think>b"), ("user", " c\n")]
    conversation = [{"role": role, "content": text} for role, text in turns]
    silent = CHATML.replace("for m in messages", "for m in messages if m.role != 'assistant'")
    with pytest.raises(ConfigError, match="ignores the message with the role assistant"):
        byte_policy(tmp_path, silent).encode_prompt(conversation)
    with pytest.raises(ConfigError, match="ignores the message with the role user"):
        byte_policy(tmp_path, LAST_ONLY).encode_prompt(conversation)
    own_way = CHATML.replace("{{ m.content }}", "{{ m.content.replace('a', '1').split('</think>')[-1] | trim }}")
    shown = byte_policy(tmp_path, own_way)
    assert "user\n1<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>" in decoded(
        shown, shown.encode_prompt(conversation)
    )


def test_a_second_system_message_is_refused_or_warned_of(tmp_path: Path) -> None:
    asked: Any = [{"role": "system", "content": "A"}, {"role": "user", "content": "a"}]
    policy = byte_policy(tmp_path, system_prompt="Be brief.")
    assert decoded(policy, policy.encode_prompt("a")).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    with pytest.raises(ConfigError, match=r"problem p: .*model\.policy\.system_prompt is set, and the prompt has"):
        PromptReader(policy, "drop").tokens(Problem("p", asked))
    only_last = CHATML.replace("{{ m.content }}", "{{ m.content if loop.index > 1 }}")
    with (
        pytest.raises(ConfigError, match="ignores the message with the role system"),
        pytest.warns(UserWarning, match="several system messages"),
    ):
        byte_policy(tmp_path, only_last).encode_prompt([asked[0], *asked])
    with pytest.warns(UserWarning, match="several system messages"):
        byte_policy(tmp_path).encode_prompt([asked[0], *asked])


def test_unknown_roles_are_refused_unless_the_template_names_them(tmp_path: Path) -> None:
    asked = [{"role": "human", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ConfigError, match="a message has the role 'human'"):
        byte_policy(tmp_path).encode_prompt(asked)
    assert byte_policy(tmp_path, "{% if messages[0].role == 'human' %}{% endif %}" + CHATML).encode_prompt(asked)


# -- room for a context --------------------------------------------------------------------------------------------


def rollout(policy: Policy, index: int, text: str, tokens: int | None = None) -> Rollout:
    """A rollout with a text, padded with letters to a number of tokens."""
    ids = ids_of(policy, text)
    ids = [*ids, *[65] * ((tokens or 0) - len(ids))]
    return Rollout(0, index, policy.encode_prompt(PROBLEM.prompt), ids, torch.zeros(len(ids)), False, text)


LONG = "BEGIN " + "so é🙂 " * 200 + r"END \boxed{4}"


@pytest.mark.parametrize("room", range(180, 220))
def test_a_long_context_loses_its_middle_between_characters_and_keeps_its_end(room: int, tmp_path: Path) -> None:
    policy = byte_policy(tmp_path)
    ids, cut = Teacher().prompt(policy, PROBLEM, LONG, room=room)
    assert cut
    assert room - 16 < len(ids) <= room
    text = decoded(policy, ids)
    assert "BEGIN" in text
    assert MARK in text
    assert r"END \boxed{4}" + "\n\nNow solve" in text
    assert "\ufffd" not in text
    capped, cut = Teacher(max_context_tokens=room - 100).prompt(policy, PROBLEM, LONG)
    empty = len(Teacher().prompt(policy, PROBLEM, "x")[0]) - 1
    assert cut
    assert 0 <= empty + room - 100 - len(capped) < 16


def test_a_context_without_enough_room_is_dropped(tmp_path: Path) -> None:
    policy = byte_policy(tmp_path)
    assert Teacher().prompt(policy, PROBLEM, LONG, room=0) == ([], True)
    assert Teacher().prompt(policy, PROBLEM, LONG, room=-5) == ([], True)
    assert Teacher(max_context_tokens=4).prompt(policy, PROBLEM, LONG) == ([], True)


def test_each_context_gets_the_room_that_its_response_leaves(tmp_path: Path) -> None:
    policy = byte_policy(tmp_path, positions=512)
    policy.load()
    rollouts = [rollout(policy, 0, "x" * 200), *(rollout(policy, k, "no", n) for k, n in enumerate((10, 250, 420), 1))]
    contexts: list[Any] = [None, *[rollouts[0].text] * 3]
    lengths, score = [], policy.score_by

    def spy(compute: Any, sequences: Any, *rest: Any) -> Any:
        lengths.extend((len(p), len(r)) for p, r in sequences)
        return score(compute, sequences, *rest)

    policy.__dict__["score_by"] = spy
    scores, truncated = Teacher().score(policy, [PROBLEM], rollouts, contexts)
    assert [s is not None for s in scores] == [False, True, True, False]
    assert truncated == 2
    (whole, _), (short, of_long) = lengths
    assert whole > short
    assert 500 < short + of_long <= 512
    engine = Teacher(scored_by="engine")
    assert engine.room(policy, rollouts[0]) == 512 - 200 - 1, "vLLM draws one more token"


def context_initials(
    policy: Policy, rollouts: list[Rollout], solved: list[int], seed: int, **settings: Any
) -> list[str | None]:
    """The first letter of each rollout's context."""
    success = torch.tensor([i in solved for i in range(len(rollouts))])
    texts = Teacher(**settings).contexts("sibling", [PROBLEM], rollouts, success, seed, policy=policy)
    return [None if text is None else text[:1] for text in texts]


def test_a_sibling_that_fits_is_preferred_and_shown_to_most_rollouts(tmp_path: Path) -> None:
    policy = byte_policy(tmp_path, positions=512)
    texts = [("a" * 300, None), ("b" * 40, None), ("c" * 60, None), ("no", 200), ("no", 250), ("no", 5)]
    rollouts = [rollout(policy, k, *text) for k, text in enumerate(texts)]
    for seed in range(8):
        first = context_initials(policy, rollouts, [0, 1, 2], seed)
        assert set(first) == {"b", "c"}, "a fits only some of them"
        assert max(map(first.count, ("b", "c"))) == 5, "one is shown to all but itself"
        assert context_initials(policy, rollouts[::-1], [3, 4, 5], seed)[::-1] == first, "in any order of completion"
        assert set(context_initials(policy, rollouts, [0, 1], seed, max_context_tokens=100)) == {"a", "b"}
        # without a sibling that fits, one that has to be truncated
        assert context_initials(policy, rollouts, [0], seed) == [None, "a", "a", "a", "a", "a"]
    thinking = [rollout(policy, 0, "<think>4</think>"), rollout(policy, 1, "so 4"), rollout(policy, 2, "no")]
    for seed in range(8):
        assert context_initials(policy, thinking, [0, 1], seed) == ["s", "<", "s"]


def test_where_all_siblings_fit_only_the_seed_chooses(tmp_path: Path) -> None:
    policy = byte_policy(tmp_path, positions=4096)
    rollouts = [rollout(policy, k, f"{k}" * (k + 1)) for k in range(6)]
    success = torch.ones(6, dtype=torch.bool)
    seen = set()
    for seed in range(20):
        asked = "sibling", [PROBLEM], rollouts, success, seed
        shown = Teacher().contexts(*asked)
        assert Teacher().contexts(*asked, policy=policy) == shown
        seen.add(max(set(shown), key=shown.count))
    assert len(seen) > 3


def test_a_verifier_fault_is_not_shown_as_feedback() -> None:
    rollouts = [rollout(Policy(), k, "guess 1") for k in range(3)]
    rollouts[0].verdict = Verdict(0.0, False, message="the verifier exceeded its time limit of 5 s", fault=True)
    rollouts[1].verdict = Verdict(0.0, False, message="wrong: the answer is 4")
    assert Teacher().contexts("feedback", [PROBLEM], rollouts, torch.zeros(3).bool()) == [
        None,
        "wrong: the answer is 4",
        None,
    ]


# -- preview at the start ------------------------------------------------------------------------------------------


def texts_of(folder: Path) -> dict[str, str]:
    (events,) = folder.rglob("events.out.tfevents.*")
    log = event_log(events.parent, "tensors")
    tags = [tag for tag in log.Tags()["tensors"] if tag.endswith("/text_summary")]
    texts = {tag: log.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags}
    return {tag.removesuffix("/text_summary"): text.replace(f"\n    {CONTINUED}", "") for tag, text in texts.items()}


def test_a_run_logs_example_prompts_of_student_and_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert cli_exit_code("fit", tmp_path / "fit", "--trainer.max_epochs=1", *TRAIN_ONLY) == 0
    texts = texts_of(tmp_path / "fit")
    student, teacher = texts["prompts/student"].strip(), texts["prompts/teacher"].strip()
    assert student.startswith("<user>tea ")
    assert student.endswith("<assistant>")
    assert teacher.startswith(student.removesuffix("<assistant>") + " a correct solution: carefully: tea ")
    assert student in caplog.text
    assert teacher in caplog.text
    assert "WARNING" not in caplog.text
    caplog.clear()
    assert cli_exit_code("validate", tmp_path / "validate") == 0
    texts = texts_of(tmp_path / "validate")
    assert texts["prompts/student"].strip() in caplog.text
    assert "prompts/teacher" not in texts, "an evaluation has no teacher"


def preview(folder: Path, policy: Policy, caplog: pytest.LogCaptureFixture, **parts: Any) -> str:
    caplog.set_level(logging.INFO)
    problem = parts.pop("problem", PROBLEM)
    task = LastDigit()
    task.problems = lambda split: [problem]  # type: ignore[method-assign]
    sampling = Sampling(stop=parts.pop("stop", []))
    data = RolloutDataModule(
        task=task, sampling=sampling, prompts_per_epoch=1, max_prompt_tokens=9_999, minibatches=1, benchmarks={}
    )
    trainer = Trainer(
        default_root_dir=folder, logger=False, reload_dataloaders_every_n_epochs=1, callbacks=[PromptPreview()]
    )
    module = RLRTModule(policy, Teacher(**parts.pop("teacher", {})), parts.pop("method", RLRT()))
    trainer.strategy.connect(module)
    data.trainer = module.trainer = trainer
    trainer.datamodule = data
    data.setup("fit")
    PromptPreview().setup(trainer, module, "fit")
    return caplog.text


def test_the_preview_warns_of_likely_mistakes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = byte_policy(tmp_path, CHATML.partition("{% if add")[0].replace("<|im_end|>", END), ["<think>", "</think>"])
    log = preview(tmp_path, policy, caplog, stop=["<|im_end|>", "4"], teacher={"template": "{prompt}, {context}"})
    assert "<|im_start|>user\n    2+2?, (a correct response)<|endoftext|>" in log
    assert "the student prompt ends in the end token '<|endoftext|>'" in log
    assert "the stop string '<|im_end|>' has the special token '<|im_end|>'" in log
    assert "<think> is a special token" in log


def test_the_preview_warns_of_words_that_the_tokenizer_does_not_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = preview(tmp_path, Policy(), caplog, problem=Problem("p", "tea 4 coffee 8", answer="2"))
    assert "1 of the 6 tokens of the student prompt are <unk>: the tokenizer does not have these words" in log


def test_the_preview_warns_of_a_tag_that_ends_responses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = byte_policy(tmp_path, special=["<answer>", "</answer>"])
    policy.end_tokens.append(policy.tokenizer.convert_tokens_to_ids("</answer>"))
    assert "'</answer>' ends responses, and completions omit it" in preview(tmp_path, policy, caplog)


def test_the_preview_warns_of_nothing_in_an_ordinary_model_and_is_truncated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = byte_policy(tmp_path, positions=20_000)
    long = Problem("p", "x" * 9_000, solution="<think>only this</think>")
    log = preview(tmp_path, policy, caplog, problem=long, teacher={"max_context_tokens": None})
    assert "WARNING" not in log
    assert MARK in log
    assert len(log) < 2 * 4_500
    assert "(a correct response)" in log


@pytest.mark.parametrize("setting", ["model.teacher.template", "data.task.prompt_template"])
def test_markers_of_another_models_chat_format_are_refused(
    setting: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "tea 1 milk 2", "answer": "3"}\n')
    flags = [
        "--data.task=DatasetTask",
        f"--data.task.train={data}",
        "--data.task.answer=answer",
        "--data.benchmarks={}",
    ]
    template = "<|im_start|>user {prompt}" + (" {context}" if "teacher" in setting else "")
    assert cli_exit_code("fit", tmp_path, *flags, f"--{setting}={template}", *TRAIN_ONLY) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "contains <|im_start|>, which is not a token of the model" in error
    assert setting in error
