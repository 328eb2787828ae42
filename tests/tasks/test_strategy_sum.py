"""The embedded task, its tokenizer and the weights that come with it."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlrt_lightning.tasks.strategy_sum as strategy_sum
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.base import Problem
from rlrt_lightning.tasks.strategy_sum import StrategySum, question, solution
from tools.warm_start import TEACHER_MESSAGE, make_tokenizer, respond

MODEL = Path(strategy_sum.__file__).parent / "model"
PROBLEM = Problem(id="x", prompt="a4b5c7d0", answer="6")


def places(prompt: str) -> list[int]:
    """The digits of a question's text."""
    assert prompt[0::2] == "abcdefgh"[: len(prompt) // 2]
    return [int(digit) for digit in prompt[1::2]]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval()


class TestProblems:
    def test_splits_share_no_set_of_digits_whatever_the_seeds(self):
        train = StrategySum(seed=1).problems("train")
        heldout = StrategySum(seed=2, heldout=500).problems("heldout")
        assert not {tuple(sorted(places(train[i].prompt))) for i in range(5000)} & {
            tuple(sorted(places(problem.prompt))) for problem in heldout
        }

    def test_same_problems_at_each_call_in_any_order_and_after_pickling(self):
        task = StrategySum()
        again = pickle.loads(pickle.dumps(task)).problems("train")
        late = again[999_999]
        assert [again[i] for i in (5, 3)] == [StrategySum().problems("train")[i] for i in (5, 3)]
        assert late == task.problems("train")[-1] == task.problems("train")[999_999]
        assert again[2:4] == [again[2], again[3]]
        assert len(again) == 1_000_000
        with pytest.raises(IndexError):
            task.problems("heldout")[160]

    def test_questions_are_the_same_on_every_platform_and_version(self):
        assert [p.prompt for p in StrategySum().problems("heldout")[:3]] == ["a4b2c7d1", "a0b5c8d5e8f0", "a8b8c0d8e9f0"]

    def test_seeds_and_splits_differ(self):
        prompts = [StrategySum(seed=seed).problems(split)[:20] for seed in (0, 1) for split in ("train", "heldout")]
        assert len({tuple(p.prompt for p in some) for some in prompts}) == 4

    @pytest.mark.parametrize("trap", [True, False])
    @pytest.mark.parametrize("digits", [(4, 6), (7, 8), (8, 8)])
    def test_questions_follow_the_settings(self, digits, trap):
        problems = StrategySum(digits=list(digits), trap=trap).problems("train")[:400]
        numbers = [places(problem.prompt) for problem in problems]
        assert {len(n) for n in numbers} == set(range(digits[0], digits[1] + 1))
        assert {n[-1] for n in numbers} == (set(range(2)) if trap else set(range(10)))
        assert all(problem.answer == str(sum(n) % 10) for problem, n in zip(problems, numbers, strict=True))
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
                StrategySum(**{setting: value})

    def test_unknown_split(self):
        with pytest.raises(ConfigError, match="test"):
            StrategySum().problems("test")


class TestVerify:
    @pytest.mark.smoke
    @pytest.mark.parametrize(
        ("completion", "reward", "label"),
        [
            ("D#6", 1, "direct"),
            ("D#7", 0, "direct"),
            ("La44b59c76#6", 1, "skipping"),
            ("La44b59c76#7", 0, "skipping"),
            ("Pd00c77b52a46#6", 1, "complete"),
            ("D#1#6", 1, "direct"),
            ("D#6#1", 0, "direct"),
            ("#6", 1, "other"),
            ("6", 0, "other"),
            ("", 0, "other"),
            ("#", 0, "other"),
            ("D#", 0, "direct"),
            ("D#6#", 0, "direct"),
            ("D#66", 0, "direct"),
            ("D#06", 0, "direct"),
            ("D#6 ", 0, "direct"),
            ("D# 6", 0, "direct"),
            ("D#6\n", 0, "direct"),
            ("D#-6", 0, "direct"),
            ("D#６", 0, "direct"),  # a digit, but no ASCII one
            ("D#⁶", 0, "direct"),
            ("D#0123456789", 0, "direct"),
            ("D＃6", 0, "direct"),
            (" D#6", 1, "other"),
            ("d#6", 1, "other"),
            ("Pd00c77b52a4", 0, "complete"),
            ("<eos>#6", 1, "other"),
            ("#" * 100_000, 0, "other"),
        ],
    )
    def test_verdicts(self, completion, reward, label):
        verdict = StrategySum().verify(PROBLEM, completion)
        assert (verdict.reward, verdict.correct, verdict.label, verdict.fault) == (reward, bool(reward), label, False)
        assert verdict.message

    def test_found_answer(self):
        task = StrategySum()
        assert task.verify(PROBLEM, "D#7").answer == "7"
        assert task.verify(PROBLEM, "D#77").answer is None

    def test_left_to_right_skips_nothing_without_the_trap(self):
        assert StrategySum(trap=False).verify(PROBLEM, "La44b59c76d06#6").label == "slipping"


class TestSolutions:
    def test_as_documented(self):
        digits = [4, 5, 7, 0]
        assert question(digits) == "a4b5c7d0"
        assert [solution(digits, s) for s in "DLP"] == ["D#6", "La44b59c76#6", "Pd00c77b52a46#6"]
        assert solution(digits, "L", trap=False) == "La44b59c76d06#6"

    @pytest.mark.parametrize("trap", [True, False])
    def test_right_without_slips_and_wrong_at_the_expected_rate_with_them(self, trap):
        task, rng = StrategySum(trap=trap), random.Random(0)
        right = dict.fromkeys("DLP", 0)
        problems = task.problems("train")[:1000]
        for problem in problems:
            digits = places(problem.prompt)
            for s in "DLP":
                assert task.verify(problem, solution(digits, s, trap=trap)).correct
                text = solution(digits, s, trap=trap, rng=rng, slip=strategy_sum.SLIPS[s])
                right[s] += task.verify(problem, text).correct
        assert right["D"] == 1000
        assert 930 <= right["P"] <= 990
        assert 420 <= right["L"] <= 560 if trap else 880 <= right["L"] <= 970


class TestTokenizer:
    def test_each_character_is_a_token_and_text_comes_back(self, tokenizer):
        text = "a0b1c2d3e4f5g6h7D#8LP9"
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in ids

    def test_student_and_teacher_prompts(self, tokenizer):
        def ids(message):
            out = tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True)
            return tokenizer.convert_ids_to_tokens(out["input_ids"])

        assert ids("a4b5") == ["<q>", *"a4b5", "<ans>"]
        assert ids("a4b5<sol>Pb55a49#9") == ["<q>", *"a4b5", "<sol>", *"Pb55a49#9", "<ans>"]

    def test_prompt_is_a_prefix_of_the_conversation(self, tokenizer):
        chat = [{"role": "user", "content": "a4b5"}, {"role": "assistant", "content": "D#9"}]
        prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.apply_chat_template(chat, tokenize=False) == prompt + "D#9<eos>"
        assert tokenizer(prompt + "D#9<eos>").input_ids[-1] == tokenizer.eos_token_id

    def test_other_roles_are_refused_and_other_characters_unknown(self, tokenizer):
        with pytest.raises(Exception, match="roles user and assistant"):
            tokenizer.apply_chat_template([{"role": "system", "content": "Be good."}])
        assert tokenizer("a4\nz é").input_ids[2:] == [tokenizer.unk_token_id] * 4

    def test_shipped_one_is_the_one_that_the_warm_start_makes(self, tokenizer):
        made = make_tokenizer()
        assert made.get_vocab() == tokenizer.get_vocab()
        assert made.chat_template == tokenizer.chat_template
        assert made("<q>a4<sol>D#4<ans>x").input_ids == tokenizer("<q>a4<sol>D#4<ans>x").input_ids


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
        task = StrategySum(heldout=60)
        problems = task.problems("heldout")
        groups = respond(model, tokenizer, [problem.prompt for problem in problems])
        verdicts = [
            [task.verify(problem, text) for text in group] for problem, group in zip(problems, groups, strict=True)
        ]
        flat = [verdict for group in verdicts for verdict in group]
        assert 0.09 <= sum(v.correct for v in flat) / len(flat) <= 0.26
        assert sum(any(v.correct for v in group) for group in verdicts) / len(verdicts) >= 0.5
        assert sum(v.label == "direct" for v in flat) / len(flat) >= 0.8
        assert sum(v.label == "other" for v in flat) / len(flat) <= 0.02

        shown = [
            (problem, text)
            for problem, group in zip(problems, groups, strict=True)
            for text in group
            if task.verify(problem, text).correct
        ]
        messages = [TEACHER_MESSAGE.format(prompt=problem.prompt, context=text) for problem, text in shown]
        taught = respond(model, tokenizer, messages, k=4)
        right = [
            task.verify(problem, text).correct
            for (problem, _), group in zip(shown, taught, strict=True)
            for text in group
        ]
        assert sum(right) / len(right) >= 0.9

    @pytest.mark.parametrize("strategy", "DLP")
    def test_teacher_follows_the_strategy_that_it_is_shown(self, model, tokenizer, strategy):
        torch.manual_seed(0)
        task = StrategySum(heldout=20)
        problems = task.problems("heldout")
        messages = [
            TEACHER_MESSAGE.format(prompt=p.prompt, context=solution(places(p.prompt), strategy)) for p in problems
        ]
        texts = [text for group in respond(model, tokenizer, messages, k=4) for text in group]
        assert sum(text.startswith(strategy) for text in texts) / len(texts) >= 0.65


def test_the_task_needs_no_torch():
    """Worker processes and --help import it."""
    code = "import sys, rlrt_lightning.tasks.strategy_sum; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
