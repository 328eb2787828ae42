"""What ends a response: stop strings, special tokens, the model's positions; and tokens without embeddings."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from rlrt_lightning import (
    GRPO,
    Benchmark,
    ConfigError,
    Policy,
    Problem,
    RLRTModule,
    RolloutDataModule,
    Sampling,
    Teacher,
)
from rlrt_lightning.__main__ import main
from rlrt_lightning.callbacks import Evaluation
from rlrt_lightning.resume import of_object
from rlrt_lightning.rollouts.base import Rollout, Stops, room
from tests.helpers.epochs import RuleTask, fit_and_record
from tests.helpers.sampling import draw_rollouts, unbatched_logits
from tests.helpers.tiny import save_byte_level_model, tiny_policy

TEXT = "héllo ≠ 日本語<|im_end|>\n🙂END"


@pytest.fixture(scope="module")
def bytes_policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    made = Policy(path=save_byte_level_model(tmp_path_factory.mktemp("bytes")))
    made.load()
    return made


def say(made: Policy, text: str | Sequence[int], **sampling: Any) -> Rollout:
    """A rollout of a model that can only generate one text, over and over."""
    ids = made.tokenizer(text)["input_ids"] if isinstance(text, str) else list(text)
    forward, spoken = made.model.lm_head.forward, itertools.count()

    def head(states: torch.Tensor) -> torch.Tensor:
        logits = torch.full_like(forward(states), -1e4)
        logits[..., ids[next(spoken) % len(ids)]] = 0.0
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made.model.lm_head, "forward", head)
        (rollout,) = draw_rollouts(
            made, [made.encode_prompt("END? ")], 1, Sampling(**{"max_new_tokens": 80, **sampling})
        )
    return rollout


# -- stop strings --------------------------------------------------------------------------------------------------


def test_a_stop_string_that_is_a_special_token_works_as_an_end_token(bytes_policy: Policy) -> None:
    rollout = say(bytes_policy, TEXT, stop=["<|im_end|>"])
    assert bytes_policy.decode(rollout.response_ids, keep_special=True) == "héllo ≠ 日本語<|im_end|>"
    assert rollout.text == bytes_policy.decode(rollout.response_ids)
    assert not rollout.truncated
    stops = Stops.of(bytes_policy, Sampling(stop=["<|im_end|>", "END"]))
    assert (stops.ids, stops.strings) == ([256, 257], ["END"])


@pytest.mark.parametrize(
    ("stop", "end"),
    [
        ("END", "🙂END"),  # one token per byte
        ("日本", "日本"),
        ("≠", "≠"),
        ("🙂", "🙂"),
        ("語<|im_end|>\n", "<|im_end|>\n"),  # special tokens are in the text that is searched
        ("<|im_end|>\n🙂E", "🙂E"),
        ("éllo ≠ 日本語<|im_end|>\n🙂EN", "🙂EN"),
        (" ", "héllo "),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(bytes_policy: Policy, stop: str, end: str) -> None:
    rollout = say(bytes_policy, TEXT, stop=[stop])
    assert bytes_policy.decode(rollout.response_ids, keep_special=True) == TEXT[: TEXT.index(end) + len(end)]
    assert not rollout.truncated


def test_the_earliest_of_several_stop_strings_ends_the_response(bytes_policy: Policy) -> None:
    for stop in (["END", "日本", "<|im_end|>"], ["<|im_end|>", "日本語", "日本", "END"]):
        assert say(bytes_policy, TEXT, stop=stop).text == "héllo ≠ 日本"


def test_a_stop_string_does_not_begin_in_the_prompt(bytes_policy: Policy) -> None:
    """The prompt ends in "END? "."""
    assert say(bytes_policy, "abc? END", stop=["? a", "END"]).text == "abc? END"
    assert say(bytes_policy, "abc", stop=["? a"], max_new_tokens=4).truncated


def test_a_stop_string_is_found_across_tokens_without_text(bytes_policy: Policy) -> None:
    """Embeddings that only pad the vocabulary, here token 60, can be drawn and have no text."""
    made = tiny_policy("qwen3", {"vocab_size": 64})
    one, two = made.tokenizer.convert_tokens_to_ids([" 1", " 2"])
    rollout = say(made, [one, *[60] * 60, two], stop=[" 1 2"])
    assert len(rollout.response_ids) == 62
    assert rollout.text == " 1 2"


def test_a_special_token_spelt_out_in_letters_does_not_stop(bytes_policy: Policy) -> None:
    ids = [i for letter in "<|im_end|>a" for i in bytes_policy.tokenizer(letter)["input_ids"]]
    assert say(bytes_policy, ids, stop=["<|im_end|>"], max_new_tokens=20).truncated


@pytest.mark.parametrize("stop", [[""], ["a", ""], ["\ufffd"], "a", [5]])
def test_invalid_stop_strings_are_refused(stop: Any) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.stop "):
        Sampling(stop=stop)


def test_a_stop_string_that_can_never_occur_is_refused_before_the_run(tmp_path: Path, capfd: Any) -> None:
    flags = ["--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    for flag, named in (
        ("--data.sampling.stop=[END]", "data.sampling.stop: 'END' can never end"),
        ("--data.benchmarks={x: {sampling: {stop: [é]}}}", "data.benchmarks.x.sampling.stop: 'é' can never end"),
        ("--data.sampling.stop=['']", "sampling.stop has ''"),
    ):
        assert main(["fit", *flags, flag]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert named in line


# -- positions -----------------------------------------------------------------------------------------------------


def test_each_row_gets_the_positions_that_its_prompt_leaves() -> None:
    made = tiny_policy("qwen3", {"max_position_embeddings": 256})
    made.end_tokens = [1]
    prompts, sampling = [[5] * 255, [8, 16, 8], [6] * 256, [7] * 300, [5] * 200], Sampling(max_new_tokens=64)
    assert [room(made, prompt, sampling) for prompt in prompts] == [1, 64, 0, 0, 56]
    together = draw_rollouts(made, prompts, 3, sampling)
    for rollout in together:
        (alone,) = [r for r in draw_rollouts(made, [rollout.prompt_ids], 3, sampling) if r.index == rollout.index]
        assert rollout.response_ids == alone.response_ids
        most = room(made, rollout.prompt_ids, sampling)
        assert len(rollout.response_ids) <= most
        assert rollout.truncated == (1 not in rollout.response_ids)
    assert max(len(r.response_ids) for r in together if r.group == 1) > 1
    assert all(r.response_ids == [] and r.truncated and not len(r.logp_sampler) for r in together if r.group in (2, 3))


def test_max_positions_limits_responses_and_is_part_of_a_runs_settings() -> None:
    made = tiny_policy("qwen3", max_positions=16)
    assert made.max_positions == 16
    rollouts = draw_rollouts(made, [[5, 6, 7], [6] * 15, [7] * 30], 3, Sampling(max_new_tokens=25))
    assert max(len(r.response_ids) for r in rollouts[:3]) <= 13
    assert [len(r.response_ids) for r in rollouts[3:]] == [1, 1, 1, 0, 0, 0]
    assert of_object(made, "model.policy")["model.policy.max_positions"] == 16
    assert tiny_policy("qwen3").max_positions == 128
    with pytest.raises(ConfigError, match=r"model\.policy\.max_positions is 129, but .* has 128 positions"):
        _ = tiny_policy("qwen3", max_positions=129).max_positions
    with pytest.raises(ConfigError, match=r"model\.policy\.max_positions is 1; it has to be at least 2"):
        Policy(max_positions=1)


def test_a_long_row_does_not_change_the_positions_of_other_rows() -> None:
    """Longrope changes the frequencies of a whole batch if one of its rows is longer than 16."""
    made = tiny_policy("phi3")
    assert made.max_positions == 16
    rollouts = draw_rollouts(made, [[5, 6, 7], [6] * 15, [7] * 30], 3, Sampling(max_new_tokens=25))
    for rollout in rollouts[:6]:
        targets = torch.tensor([rollout.response_ids]).T
        expected = unbatched_logits(made, rollout).log_softmax(-1).gather(-1, targets)[:, 0]
        torch.testing.assert_close(rollout.logp_sampler, expected, rtol=0, atol=1e-4)
    assert [len(r.response_ids) for r in rollouts[3:]] == [1, 1, 1, 0, 0, 0]


class Lengths(RuleTask):
    """Short prompts, and some that leave few or none of the 128 positions of the embedded model."""

    def problems(self, split: str) -> Sequence[Problem]:
        sizes = [4, 124, 6, 125, 8, 60, 126, 4, 200, 6, 8]
        return [Problem(f"p{i}", ("a1b2c3d4" * 25)[:size], "6") for i, size in enumerate(sizes)]


@pytest.mark.filterwarnings("ignore:.*prompts of data.* are longer")
def test_evaluation_results_do_not_depend_on_batch_sizes(tmp_path: Path) -> None:
    def evaluate(eval_prompts: int, max_rows: int) -> list[Any]:
        data = RolloutDataModule(
            Lengths(lambda text: "1" in text),
            sampling=Sampling(max_new_tokens=30),
            benchmarks={"x": Benchmark(samples=3)},
            eval_prompts=eval_prompts,
        )
        data.engine.max_rows = max_rows  # type: ignore[attr-defined]
        folder = tmp_path / f"{eval_prompts}-{max_rows}"
        trainer = Trainer(
            logger=False, callbacks=[Evaluation(table=0)], default_root_dir=folder, enable_progress_bar=False
        )
        trainer.validate(RLRTModule(Policy(), Teacher()), datamodule=data, verbose=False)
        lines = (folder / "evaluation" / "step-0" / "x.jsonl").read_text(encoding="utf-8").splitlines()
        return sorted((json.loads(line) for line in lines), key=lambda row: (row["problem"], row["sample"]))

    reference = evaluate(64, 256)
    assert len(reference) == 33
    assert {row["problem"] for row in reference if not row["tokens"]} == {"p6", "p8"}
    assert max(row["tokens"] for row in reference) > 4
    for eval_prompts, max_rows in ((1, 256), (3, 256), (64, 1), (64, 5), (3, 2)):
        assert evaluate(eval_prompts, max_rows) == reference


# -- tokens without embeddings -------------------------------------------------------------------------------------


def task_of(*prompts: str) -> RuleTask:
    class Prompts(RuleTask):
        def problems(self, split: str) -> Sequence[Problem]:
            return [Problem(f"p{i}", prompt, "6") for i, prompt in enumerate(prompts)]

    return Prompts(lambda text: "1" in text)


@pytest.mark.parametrize("where", ["prompt", "later prompt", "teacher", "stop", "end", "benchmark"])
def test_tokens_without_embeddings_are_refused_before_rollouts(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    special = ("<new>", "<other>") if where != "end" else ()
    made = Policy(path=save_byte_level_model(tmp_path / "model", special, rows=257 if where != "end" else 256))
    monkeypatch.setattr(RolloutDataModule, "_roll_out", lambda *_: pytest.fail("rollouts are drawn"))
    prompts = {"prompt": ["<new>1", "2"], "later prompt": [*"12345678", "a <new>"]}.get(where, [" 1", " 2"])
    module = RLRTModule(made, Teacher("{prompt}<new>{context}" if where == "teacher" else None))
    benchmarks = {"x": Benchmark(task_of("1", "<new>"))} if where == "benchmark" else {}
    data = RolloutDataModule(
        task_of(*prompts),
        sampling=Sampling(max_new_tokens=4, stop=["<new>"] if where == "stop" else []),
        benchmarks=benchmarks,
        prompts_per_epoch=2,
    )
    trainer = Trainer(
        max_epochs=1, reload_dataloaders_every_n_epochs=1, logger=False, default_root_dir=tmp_path, barebones=False
    )
    beyond = "256 (<|endoftext|>)" if where == "end" else "257 (<new>)"
    message = rf"model\.policy\.path: the model at .* below {beyond[:3]}, .* beyond them: {re.escape(beyond)}; resize"
    with pytest.raises(ConfigError, match=message) as error:
        trainer.fit(module, datamodule=data)
    assert "\n" not in str(error.value)


def test_unused_tokens_without_embeddings_are_accepted(tmp_path: Path) -> None:
    made = Policy(path=save_byte_level_model(tmp_path / "model", ("<new>",), rows=257))
    assert made.lacks_embeddings
    recorder, _ = fit_and_record(tmp_path, task_of("1", "2", "3", "4"), policy=made, method=GRPO(), epochs=1)
    assert len(recorder.epochs[0].rollouts) == 16


def test_embeddings_without_tokens_can_be_drawn_and_have_no_text(tmp_path: Path) -> None:
    made = Policy(path=save_byte_level_model(tmp_path / "model", rows=384))
    assert not made.lacks_embeddings
    made.load()
    rollouts = draw_rollouts(made, [made.encode_prompt("1+1")], 8, Sampling(max_new_tokens=40))
    ids = [i for r in rollouts for i in r.response_ids]
    assert any(i >= 258 for i in ids)
    for rollout in rollouts:
        assert rollout.text == made.decode([i for i in rollout.response_ids if i < 258])
    made.score([(r.prompt_ids, r.response_ids) for r in rollouts])


def test_python_tokenizers_skip_ids_beyond_the_vocabulary() -> None:
    from transformers import ByT5Tokenizer

    made = Policy()
    made.tokenizer = ByT5Tokenizer()
    assert made.decode([*made.tokenizer("hi", add_special_tokens=False)["input_ids"], 70_000]) == "hi"
