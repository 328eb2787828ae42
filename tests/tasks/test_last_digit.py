"""The embedded task, its tokenizer and the weights that come with it."""

from __future__ import annotations

import pickle
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlrt_lightning.tasks.last_digit as last_digit
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.base import Problem
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE, WAYS, LastDigit, question, solution
from tools.warm_start import make_tokenizer, respond

MODEL = Path(last_digit.__file__).parent / "model"
PROBLEM = Problem(id="x", prompt="tea 4 milk 5 eggs 7 rice 0, last digit of the total?", answer="6")
TRAP, CONTROL = ("guess", "skip", "careful"), ("guess", "quick", "careful")


def numbers(prompt: str) -> list[int]:
    """The numbers in a question's text."""
    found = [int(digit) for digit in re.findall(r"[0-9]", prompt)]
    assert prompt == question(found)
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


class TestProblems:
    def test_splits_share_no_set_of_digits_whatever_the_seeds(self):
        train = LastDigit(seed=1).problems("train")
        heldout = LastDigit(seed=2, heldout=500).problems("heldout")
        assert not {tuple(sorted(numbers(train[i].prompt))) for i in range(5000)} & {
            tuple(sorted(numbers(problem.prompt))) for problem in heldout
        }

    def test_same_problems_at_each_call_in_any_order_and_after_pickling(self):
        task = LastDigit()
        again = pickle.loads(pickle.dumps(task)).problems("train")
        late = again[999_999]
        assert [again[i] for i in (5, 3)] == [LastDigit().problems("train")[i] for i in (5, 3)]
        assert late == task.problems("train")[-1] == task.problems("train")[999_999]
        assert again[2:4] == [again[2], again[3]]
        assert len(again) == 1_000_000
        with pytest.raises(IndexError):
            task.problems("heldout")[160]

    def test_questions_are_the_same_on_every_platform_and_version(self):
        assert [p.prompt for p in LastDigit().problems("heldout")[:3]] == [
            "tea 6 milk 2 eggs 9 rice 4 corn 0, last digit of the total?",
            "tea 4 milk 2 eggs 8 rice 1 corn 1, last digit of the total?",
            "tea 3 milk 1 eggs 1 rice 9 corn 0, last digit of the total?",
        ]

    def test_seeds_and_splits_differ(self):
        prompts = [LastDigit(seed=seed).problems(split)[:20] for seed in (0, 1) for split in ("train", "heldout")]
        assert len({tuple(p.prompt for p in some) for some in prompts}) == 4

    @pytest.mark.parametrize("trap", [True, False])
    @pytest.mark.parametrize("digits", [(4, 6), (7, 8), (8, 8)])
    def test_questions_follow_the_settings(self, digits, trap):
        problems = LastDigit(digits=list(digits), trap=trap).problems("train")[:400]
        asked = [numbers(problem.prompt) for problem in problems]
        assert {len(n) for n in asked} == set(range(digits[0], digits[1] + 1))
        assert {n[-1] for n in asked} == (set(range(2)) if trap else set(range(10)))
        assert all(problem.answer == str(sum(n) % 10) for problem, n in zip(problems, asked, strict=True))
        assert len({problem.id for problem in problems}) == 400

    @pytest.mark.parametrize(
        ("setting", "values"),
        [
            ("digits", [(3, 6), (4, 9), (6, 4), (4,), (4, 5, 6), 4, (4.0, 6), ("4", "6"), "46", None, (True, 5)]),
            ("heldout", [0, -1, 1.5, "many", None]),
            ("train", [0, -1, 1e6]),
            ("seed", [0.5, None, "0"]),
        ],
    )
    def test_settings_that_make_no_sense_are_named(self, setting, values):
        for value in values:
            with pytest.raises(ConfigError, match=f"^{setting} must"):
                LastDigit(**{setting: value})

    def test_unknown_split(self):
        with pytest.raises(ConfigError, match="test"):
            LastDigit().problems("test")


class TestVerify:
    @pytest.mark.smoke
    @pytest.mark.parametrize(
        ("completion", "reward", "label"),
        [
            ("guess 6", 1, "guess"),
            ("guess 7", 0, "guess"),
            ("skip the last: tea 4 milk 5 (9) eggs 7 (6), guess 6", 1, "skip"),
            ("skip the last: tea 4 milk 5 (9) eggs 7 (6), guess 7", 0, "skip"),
            ("carefully: tea 4 milk 5 (9) eggs 7 (6) rice 0 (6), so 6", 1, "careful"),
            ("carefully: tea 4 milk 5 (9) eggs 7 (7) rice 0 (7), so 7", 0, "careful"),
            ("quickly: tea 4 milk 5 (9) eggs 7 (6) rice 0 (6), so 6", 1, "quick"),
            # what a completion does decides, not what it says
            ("skip the last: tea 4 milk 5 (9) eggs 7 (6) rice 0 (6), so 6", 1, "careful"),
            ("skip the last: guess 6", 1, "guess"),
            ("carefully: tea 4 milk 5 (9) eggs 7 (6), so 6", 1, "skip"),
            ("quickly: milk 5, so 5", 0, "skip"),
            ("so 6", 1, "guess"),
            ("guess 1, so 6", 1, "guess"),
            ("guess 6, so 1", 0, "guess"),
            ("6", 0, "other"),
            ("", 0, "other"),
            ("guess", 0, "other"),
            ("guess 6 6", 0, "other"),
            ("guess 66", 0, "other"),
            ("guess 06", 0, "other"),
            ("guess 6 ", 0, "other"),
            ("guess  6", 0, "other"),
            ("guess 6\n", 0, "other"),
            ("a\nguess 6", 0, "other"),
            ("guess -6", 0, "other"),
            ("guess6", 0, "other"),
            ("also 6", 0, "other"),
            ("Guess 6", 0, "other"),
            ("guess ６", 0, "other"),  # a digit, but no ASCII one
            ("guess ⁶", 0, "other"),
            ("carefully: tea 4 milk 5 (9) eggs 7 (6) rice 0 (6)", 0, "other"),
            ("<eos>guess 6", 1, "guess"),
            (" guess 6" * 20_000, 1, "guess"),
            ("guess " * 20_000, 0, "other"),
        ],
    )
    def test_verdicts(self, completion, reward, label):
        verdict = LastDigit().verify(PROBLEM, completion)
        assert (verdict.reward, verdict.correct, verdict.label, verdict.fault) == (reward, bool(reward), label, False)
        assert verdict.message

    def test_found_answer(self):
        task = LastDigit()
        assert task.verify(PROBLEM, "guess 7").answer == "7"
        assert task.verify(PROBLEM, "guess 77").answer is None


class TestSolutions:
    def test_as_documented(self):
        digits = [4, 5, 7, 0]
        assert question(digits) == PROBLEM.prompt
        assert [solution(digits, way) for way in WAYS] == [
            "guess 6",
            "skip the last: tea 4 milk 5 (9) eggs 7 (6), guess 6",
            "quickly: tea 4 milk 5 (9) eggs 7 (6) rice 0 (6), so 6",
            "carefully: tea 4 milk 5 (9) eggs 7 (6) rice 0 (6), so 6",
        ]

    @pytest.mark.parametrize(("trap", "ways"), [(True, TRAP), (False, CONTROL)])
    def test_right_without_slips_and_wrong_at_the_expected_rate_with_them(self, trap, ways):
        task, rng = LastDigit(trap=trap), random.Random(0)
        right = dict.fromkeys(ways, 0)
        for problem in task.problems("train")[:1000]:
            for way in ways:
                verdict = task.verify(problem, solution(numbers(problem.prompt), way))
                assert (verdict.correct, verdict.label) == (True, way)
                slipped = task.verify(problem, solution(numbers(problem.prompt), way, rng))
                assert slipped.label == way
                right[way] += slipped.correct
        assert 70 <= right["guess"] <= 130
        assert 930 <= right["careful"] <= 990
        assert 420 <= right["skip"] <= 560 if trap else 650 <= right["quick"] <= 800


class TestTokenizer:
    def test_each_word_is_a_token_and_text_comes_back(self, tokenizer):
        digits = [4, 5, 7, 0, 9, 1, 8, 2]
        for way in WAYS:
            words = solution(digits, way)
            text = TEACHER_TEMPLATE.format(prompt=question(digits), context=words)
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
            assert len(tokenizer(words).input_ids) == len(re.findall(r"[a-z]+|[0-9]|[:,]", words))

    def test_student_and_teacher_prompts(self, tokenizer):
        def words(message):
            out = tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True)
            return tokenizer.convert_ids_to_tokens(out["input_ids"])

        asked = ["tea", " 4", ",", " last", " digit", " of", " the", " total", "?"]
        assert words(question([4])) == ["<user>", *asked, "<assistant>"]
        shown = [" a", " correct", " solution", ":", " guess", " 4", ".", " now", " answer", ":"]
        message = TEACHER_TEMPLATE.format(prompt=question([4]), context="guess 4")
        assert words(message) == ["<user>", *asked, *shown, "<assistant>"]

    def test_prompt_is_a_prefix_of_the_conversation(self, tokenizer):
        chat = [{"role": "user", "content": "tea 4"}, {"role": "assistant", "content": "guess 9"}]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt + "guess 9<eos>"
        assert tokenizer(prompt + "guess 9<eos>").input_ids[-1] == tokenizer.eos_token_id

    def test_other_roles_are_refused_and_other_words_unknown(self, tokenizer):
        with pytest.raises(Exception, match="roles user and assistant"):
            tokenizer.apply_chat_template([{"role": "system", "content": "Be good."}])
        assert tokenizer("tea 4\nsugar é+").input_ids[2:] == [tokenizer.unk_token_id] * 4

    def test_shipped_one_is_the_one_that_the_warm_start_makes(self, tokenizer):
        made = make_tokenizer()
        assert made.get_vocab() == tokenizer.get_vocab()
        assert made.chat_template == tokenizer.chat_template
        text = "<user>tea 4 milk 5 (9)<assistant>carefully: x"
        assert made(text).input_ids == tokenizer(text).input_ids


class TestShippedModel:
    def test_small_and_nothing_else_in_the_folder(self):
        names = {"config.json", "generation_config.json", "model.safetensors"}
        names |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
        assert {path.name for path in MODEL.iterdir()} == names
        assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 3 * 2**20
        assert not any("/" in (MODEL / name).read_text() for name in ("config.json", "tokenizer_config.json"))

    def test_loads_without_a_warning(self, capfd):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
        assert "warn" not in capfd.readouterr().err.lower()
        for config in (model.config, model.generation_config):
            assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        assert model.config.vocab_size == len(tokenizer)
        assert model.dtype == torch.float32

    def test_student_explores_and_the_teacher_uses_what_it_sees(self, model, tokenizer):
        torch.manual_seed(0)
        task = LastDigit(heldout=60)
        problems = task.problems("heldout")
        groups = respond(model, tokenizer, [problem.prompt for problem in problems])
        verdicts = [
            [task.verify(problem, text) for text in group] for problem, group in zip(problems, groups, strict=True)
        ]
        flat = [verdict for group in verdicts for verdict in group]
        assert 0.09 <= sum(v.correct for v in flat) / len(flat) <= 0.26
        assert sum(any(v.correct for v in group) for group in verdicts) / len(verdicts) >= 0.5
        assert sum(v.label == "guess" for v in flat) / len(flat) >= 0.8
        assert sum(v.label == "other" for v in flat) / len(flat) <= 0.02

        shown = [
            (problem, text)
            for problem, group in zip(problems, groups, strict=True)
            for text in group
            if task.verify(problem, text).correct
        ]
        messages = [TEACHER_TEMPLATE.format(prompt=problem.prompt, context=text) for problem, text in shown]
        taught = respond(model, tokenizer, messages, k=4)
        right = [
            task.verify(problem, text).correct
            for (problem, _), group in zip(shown, taught, strict=True)
            for text in group
        ]
        assert sum(right) / len(right) >= 0.9

    @pytest.mark.parametrize("way", TRAP)
    def test_teacher_follows_the_way_that_it_is_shown(self, model, tokenizer, way):
        torch.manual_seed(0)
        task = LastDigit(heldout=20)
        problems = task.problems("heldout")
        shown = [solution(numbers(problem.prompt), way) for problem in problems]
        messages = [TEACHER_TEMPLATE.format(prompt=p.prompt, context=s) for p, s in zip(problems, shown, strict=True)]
        groups = respond(model, tokenizer, messages, k=4)
        labels = [task.verify(p, text).label for p, group in zip(problems, groups, strict=True) for text in group]
        assert labels.count(way) / len(labels) >= 0.65


def test_the_task_needs_no_torch():
    """Worker processes and --help import it."""
    code = "import sys, rlrt_lightning.tasks.last_digit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
