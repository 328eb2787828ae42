"""`TeacherEvaluation`: accuracies, D_t by kind of token, and that a run trains the same with it."""

from __future__ import annotations

import contextlib
import io
import math
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning import Trainer
from PIL import Image

from rlrt_lightning import GRPO, RLRT, LastDigit, Policy, RLRTModule, RolloutDataModule, Sampling, Teacher
from rlrt_lightning.analysis.events import event_log
from rlrt_lightning.callbacks import TeacherEvaluation, TeacherRefresh
from rlrt_lightning.datamodule import Benchmark
from rlrt_lightning.epoch.make import EpochSettings, Parts, collect_verdicts, draw
from rlrt_lightning.epoch.record import Questions
from rlrt_lightning.evaluation.metrics import mean_with_interval
from rlrt_lightning.evaluation.teacher import (
    KINDS,
    Taught,
    evaluate_teacher,
    teacher_metrics,
    teacher_table,
    token_kind,
)
from rlrt_lightning.objective import RLCSD, RLSD, SDPO, SRPO, AntiSD, Method
from rlrt_lightning.policy.lora import LoRA
from rlrt_lightning.rollouts import Rollout, TransformersEngine
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.progress import Progress
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE
from rlrt_lightning.tasks.verifier import Verifier
from tests.helpers.command_line import SMALL as SMALL_DATA
from tests.helpers.command_line import (
    cli_exit_code,
    evaluation_scalars,
    merged_curves,
    runs_in,
    scalars,
    weights,
)
from tests.helpers.processes import ROOT, run_cli

SMALL = ["--data.benchmarks={heldout: {samples: 2, limit: 5}}", "--trainer.check_val_every_n_epoch=1"]
SMALL += ["--reversed_signal.picture_every_n_epochs=0"]
ON = "--teacher_evaluation.problems=5"


def test_the_kind_of_a_token_follows_from_its_text() -> None:
    kinds = {
        "digits": ["7", " 12", " (9)", "3.5", "²", "½"],
        "operators": ["+", " =", "<=", "×", "−", "/", "^", "\\frac", " \\times", "*", "-", "=="],
        "words": ["the", " x2", "1st", "don't", "余", "�", "-step"],
        "formatting": ["", " ", "\n\n", ".", "),", "$", "**", "---", "#", "\\boxed", "\\", "{", "_", "<eos>"[:0]],
    }
    for kind, texts in kinds.items():
        assert {text: token_kind(text) for text in texts} == dict.fromkeys(texts, kind)


def taught(index: int, student: float, teacher: float | None, gap: float = 1.0) -> Taught:
    """A problem with 2 digits and 2 words; the digits have three quarters of |D|."""
    size = 0 if teacher is None else 1
    tokens = {"digits": 2 * size, "operators": 0, "words": 2 * size, "formatting": 0}
    gaps = {"digits": 3 * gap * size, "operators": 0.0, "words": gap * size, "formatting": 0.0}
    return Taught(index, student, teacher, 4 * size, size, cast(Any, tokens), cast(Any, gaps))


def test_both_accuracies_leave_out_problems_without_a_context() -> None:
    results = [taught(2, 0.5, 1.0), taught(0, 0.0, None), taught(1, 0.25, 0.75, 3.0), taught(3, 0.0, None)]
    metrics = teacher_metrics(results)
    assert metrics["with_context"] == 0.5
    for tag, values in (("accuracy", [1.0, 0.75]), ("student_accuracy", [0.5, 0.25])):
        expected = mean_with_interval(values)
        assert (metrics[tag], metrics[f"{tag}_low"], metrics[f"{tag}_high"]) == expected
    assert metrics["truncated"] == 0.25
    assert [metrics[f"tokens_{kind}"] for kind in KINDS] == [0.5, 0.0, 0.5, 0.0]
    assert [metrics[f"share_{kind}"] for kind in KINDS] == [0.75, 0.0, 0.25, 0.0]
    assert (metrics["asymmetry_digits"], metrics["asymmetry_words"]) == (3.0, 1.0)
    assert "asymmetry_operators" not in metrics, "no mean of nothing"
    title, header, *rows = teacher_table(metrics, "heldout", len(results))
    assert title.startswith("  teacher  2 of 4 problems of heldout with a context: student 0.375 [")
    assert header.split() == list(KINDS)
    assert [row.split()[-4:] for row in rows] == [
        ["50.0%", "0.0%", "50.0%", "0.0%"],
        ["75.0%", "0.0%", "25.0%", "0.0%"],
        ["3.000", "-", "1.000", "-"],
    ]


def test_without_contexts_there_is_no_accuracy_and_without_differences_no_share() -> None:
    metrics = teacher_metrics([taught(0, 0.0, None), taught(1, 1.0, None)])
    assert metrics == {"with_context": 0.0}
    assert teacher_table(metrics, "heldout", 2) == [
        "  teacher  0 of 2 problems of heldout with a context: no accuracy and no D"
    ]
    assert teacher_metrics([taught(0, 0.0, 1.0, gap=0.0)])["share_digits"] == 0.0


# -- the stages ----------------------------------------------------------------------------------------------------


def student_rollouts(policy: Policy, count: int) -> tuple[Questions, list[Rollout], Parts, EpochSettings]:
    """Rollouts of the embedded policy on held-out problems, K = 8."""
    problems = list(LastDigit().problems("heldout")[:count])
    prompts = [policy.encode_prompt(problem.prompt) for problem in problems]
    questions = Questions(0, problems, prompts, list(range(count)), range(count))
    engine, sampling = TransformersEngine(), Sampling(max_new_tokens=32)
    engine.sync(policy)
    drawn = draw(questions, engine, Verifier(LastDigit()).submit, 8, sampling)
    rollouts = collect_verdicts(problems, drawn, 0.5, Progress())
    parts = Parts(policy, Teacher(TEACHER_TEMPLATE), RLRT(), engine)
    data = RolloutDataModule(sampling=sampling)
    return questions, rollouts, parts, EpochSettings.of(data, RLRTModule(policy, parts.teacher), 1)


def test_the_teacher_answers_after_the_prompts_with_which_it_scores() -> None:
    policy = Policy()
    policy.load()
    questions, rollouts, parts, settings = student_rollouts(policy, 6)
    asked: list[Questions] = []

    def answer(given: Questions) -> list[Rollout]:
        """Correct for even problems."""
        asked.append(given)
        right = next(rollout for rollout in rollouts if rollout.verdict and rollout.verdict.correct)
        wrong = next(rollout for rollout in rollouts if rollout.verdict and not rollout.verdict.correct)
        return [right if index % 2 == 0 else wrong for index in given.indices]

    results = evaluate_teacher(questions, rollouts, parts, settings, lambda _: nullcontext(), answer)
    (given,) = asked
    assert len(set(given.seeds)) == len(given.seeds)
    correct = [[r.verdict is not None and r.verdict.correct for r in rollouts[8 * g : 8 * g + 8]] for g in range(6)]
    assert {sum(group) for group in correct} >= {0, 1}, "problems with and without a context"
    for group, result in enumerate(results):
        solved = sum(correct[group])
        # A single correct rollout is the context of its siblings and has none itself.
        responses = {0: 0, 1: 7}.get(solved, 8)
        assert (result.index, result.responses, result.student) == (group, responses, solved / 8)
        assert result.teacher == (None if not responses else float(group % 2 == 0))
        contexts = {r.text for r, right in zip(rollouts[8 * group :], correct[group], strict=False) if right}
        prompts = [ids for ids, index in zip(given.prompts, given.indices, strict=True) if index == group]
        expected = [parts.teacher.prompt(policy, questions.problems[group], context)[0] for context in contexts]
        assert len(prompts) == responses
        assert all(ids in expected for ids in prompts)


def test_differences_are_summed_over_the_scored_tokens_of_each_kind() -> None:
    policy = Policy()
    policy.load()
    questions, rollouts, parts, settings = student_rollouts(policy, 2)
    method = RLRT(context="solution")
    parts = Parts(policy, parts.teacher, method, parts.engine)
    results = evaluate_teacher(
        questions, rollouts, parts, settings, lambda _: nullcontext(), lambda given: rollouts[: len(given.prompts)]
    )
    for group, result in enumerate(results):
        tokens, gaps = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0.0)
        problem = questions.problems[group]
        prompt, _ = parts.teacher.prompt(policy, problem, str(problem.solution), "solution")
        for rollout in rollouts[8 * group : 8 * group + 8]:
            (logp,) = policy.score([(prompt, rollout.response_ids)])
            for token, student, teacher in zip(rollout.response_ids, rollout.logp_sampler, logp, strict=True):
                kind = token_kind(policy.decode([token]))
                tokens[kind] += 1
                gaps[kind] += abs(float(student - teacher))
        assert result.tokens == tokens
        assert result.disagreement == pytest.approx(gaps, rel=1e-4)
        assert tokens["formatting"] >= 8 - sum(r.truncated for r in rollouts), "end tokens"


# -- the teacher's weights -----------------------------------------------------------------------------------------


def untrained(
    folder: Path, refresh: TeacherRefresh, method: Method, lora: LoRA | None = None
) -> tuple[TeacherEvaluation, RLRTModule, Callable[[], Any]]:
    """A callback, a module, and a function that evaluates them."""
    torch.manual_seed(0)  # of the adapters
    callback, sampling = TeacherEvaluation(problems=4), Sampling(max_new_tokens=32)
    benchmarks = {"heldout": Benchmark(samples=1, limit=4)}
    data = RolloutDataModule(sampling=sampling, rollouts_per_prompt=4, benchmarks=benchmarks)
    module = RLRTModule(Policy(lora=lora), Teacher(TEACHER_TEMPLATE), method)
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[callback, refresh], default_root_dir=folder, **cast(Any, quiet))
    return callback, module, lambda: trainer.validate(module, datamodule=data, verbose=False)


def validated(
    folder: Path, refresh: TeacherRefresh, lora: LoRA | None = None
) -> tuple[dict[str, float], dict[str, float], bool]:
    """The scores of an untrained policy and, with the same teacher if it has its own weights, of a damaged policy; and
    whether the policy's weights stay the same."""
    callback, module, validate = untrained(folder, refresh, RLRT(context="solution"), lora)
    validate()
    before = dict(callback.scores)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.policy.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=noise)
    damaged = [p.detach().clone() for p in module.policy.parameters()]
    validate()
    same = all(torch.equal(p, q) for p, q in zip(module.policy.parameters(), damaged, strict=True))
    return before, dict(callback.scores), same


@pytest.mark.parametrize(
    ("refresh", "lora"),
    [
        ({"ema_decay": 0.5}, None),
        pytest.param({"every_n_epochs": None}, LoRA(rank=2), marks=pytest.mark.slow),
        pytest.param({"every_n_epochs": 2}, LoRA(rank=2), marks=pytest.mark.slow),
        pytest.param({}, None, marks=pytest.mark.slow),
    ],
)
def test_the_teacher_answers_with_its_own_weights_if_it_has_some(
    refresh: dict[str, Any], lora: LoRA | None, tmp_path: Path
) -> None:
    before, after, same = validated(tmp_path, TeacherRefresh(**refresh), lora)
    assert same
    assert before["student_accuracy"] > after["student_accuracy"] == 0.0
    assert before["accuracy"] > 0.5
    assert after["accuracy"] == (before["accuracy"] if refresh else 0.0)
    assert (tmp_path / "evaluation" / "step-0" / "teacher.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [AntiSD(), RLCSD(), RLSD(), SDPO(feedback=True), SRPO(), RLRT(contrast=True)], ids=lambda m: str(m)[:12]
)
def test_the_teacher_of_every_method_can_be_evaluated(method: Method, tmp_path: Path) -> None:
    callback, _, validate = untrained(tmp_path, TeacherRefresh(), method)
    validate()
    assert 0 <= callback.scores["student_accuracy"] < callback.scores["accuracy"] <= 1
    assert all(math.isfinite(value) for value in callback.scores.values())


def test_a_teacher_that_cannot_generate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = TransformersEngine.sync

    def as_recurrent(self: TransformersEngine, policy: Policy) -> None:
        sync(self, policy)
        policy.decodes_rows = False

    monkeypatch.setattr(TransformersEngine, "sync", as_recurrent)
    with pytest.raises(ConfigError, match=r"teacher_evaluation.problems: the teacher has the initial weights, with"):
        validated(tmp_path, TeacherRefresh(every_n_epochs=None))


# -- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of one epoch, resumed for a second, both with the callback; its folder and what it printed."""
    folder, printed = tmp_path_factory.mktemp("evaluated"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli_exit_code("fit", folder, *SMALL, ON, "--trainer.max_epochs=1") == 0
        assert cli_exit_code("fit", folder, *SMALL, ON, "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    return folder, printed.getvalue()


def test_a_run_trains_the_same_with_it(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    """Every metric and weight, also after a resume."""
    folder, _ = evaluated
    assert cli_exit_code("fit", tmp_path, *SMALL, "--trainer.max_epochs=2") == 0
    curves = merged_curves(folder)
    own = {tag for tag in curves if tag.startswith("teacher/")}
    assert {tag: curve for tag, curve in curves.items() if tag not in own} == merged_curves(tmp_path)
    final = weights(folder)
    assert all(torch.equal(value, final[name]) for name, value in weights(tmp_path).items())


def test_a_run_logs_prints_and_draws_the_teacher_with_each_evaluation(evaluated: tuple[Path, str]) -> None:
    folder, printed = evaluated
    (run,) = runs_in(folder)
    curves = merged_curves(folder)
    expected = {"with_context", "truncated"} | {f"{a}{b}" for a in ("accuracy", "student_accuracy") for b in _BOUNDS}
    expected |= {f"{name}_{kind}" for name in ("tokens", "share") for kind in KINDS}
    expected |= {f"asymmetry_{kind}" for kind in KINDS if kind != "operators"}
    assert {f"teacher/{tag}" for tag in expected} == {tag for tag in curves if tag.startswith("teacher/")}
    for tag in expected:
        assert sorted(curves[f"teacher/{tag}"]) == sorted(curves["eval/heldout/avg@2"]), tag
        assert all(value >= 0 for value in curves[f"teacher/{tag}"].values())
    assert sum(curves[f"teacher/share_{kind}"][0] for kind in KINDS) == pytest.approx(1)
    tables = re.findall(r"^  teacher  \d of 5 problems of heldout with a context: student (\S+) .*$", printed, re.M)
    assert [float(value) for value in tables] == pytest.approx(
        [value for _, value in sorted(curves["teacher/student_accuracy"].items())], abs=5e-4
    )
    assert printed.index("before training") < printed.index("  teacher  ") < printed.index("epoch 1/1")
    pictures = sorted(path.name for path in (run / "teacher").iterdir())
    assert pictures == ["step-0.png", "step-2.png", "step-4.png"]
    for name in pictures:
        with Image.open(run / "teacher" / name) as image:
            assert image.width > 1000
    log = event_log(run, "images", "tensors")
    assert "teacher/evaluation" in log.Tags()["images"]
    assert any(tag.startswith("teacher/table") for tag in log.Tags()["tensors"])


_BOUNDS = ("", "_low", "_high")


@pytest.mark.parametrize("name", ["validate", pytest.param("predict", marks=pytest.mark.slow)])
def test_an_evaluation_shows_the_teacher_of_the_run(name: str, evaluated: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = evaluated
    shutil.copytree(runs_in(folder)[0], tmp_path / "last-digit" / "rlrt-0")
    again = io.StringIO()
    with contextlib.redirect_stdout(again):
        assert cli_exit_code(name, tmp_path, *SMALL, ON, "--ckpt_path=last") == 0
    last = [line for line in printed.splitlines() if line.startswith("  teacher  ")][-1]
    assert last in again.getvalue()
    assert (tmp_path / "last-digit" / "rlrt-0" / "evaluation" / "step-4" / "teacher.png").exists()
    if name == "validate":
        trained = scalars(folder)["teacher/accuracy"][-1]
        assert evaluation_scalars(tmp_path)["teacher/accuracy"][0] == trained, "at the same step"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "flags"), [("ddp", []), ("fsdp", ["--teacher_refresh.ema_decay=0.5"])])
def test_two_ranks_share_the_problems(strategy: str, flags: list[str], tmp_path: Path) -> None:
    """5 problems, of which the second rank has 2; with the policy's weights, and with sharded weights of the teacher's
    own."""
    flags = [*SMALL, ON, "--trainer.accelerator=cpu", *flags]
    assert cli_exit_code("validate", tmp_path / "one", *flags, "--trainer.devices=1") == 0
    args = [f"--config={ROOT / 'configs' / 'rlrt.yaml'}", *SMALL_DATA, *flags]
    args += [f"--trainer.strategy={strategy}", "--trainer.devices=2", f"--trainer.logger.save_dir={tmp_path / 'two'}"]
    run_cli("validate", *args, timeout=300)
    one, two = (
        {tag: curve[0][1] for tag, curve in scalars(tmp_path / name).items() if tag.startswith("teacher/")}
        for name in ("one", "two")
    )
    assert one.keys() == two.keys() != set()
    assert two == pytest.approx(one, rel=1e-4)


# -- refusals ------------------------------------------------------------------------------------------------------


def refusal(
    callback: TeacherEvaluation,
    method: Method = RLRT(),
    task: Any = None,
    benchmarks: Any = None,
    callbacks: Sequence[Any] = (),
    scored_by: Any = "trainer",
    **trainer: Any,
) -> str:
    """The message with which the callback refuses a run."""
    data = RolloutDataModule(task, benchmarks={"heldout": Benchmark(limit=4)} if benchmarks is None else benchmarks)
    data._eval_problems = {name: data.task.problems("heldout")[: spec.limit] for name, spec in data.benchmarks.items()}
    module = RLRTModule(Policy(), Teacher(TEACHER_TEMPLATE, scored_by=scored_by), method)
    settings = {"limit_val_batches": 1.0, "world_size": 1, "callbacks": callbacks, "datamodule": data, **trainer}
    with pytest.raises(ConfigError) as refused:
        callback.setup(cast(Any, SimpleNamespace(**settings)), module, "fit")
    assert "\n" not in str(refused.value)
    return str(refused.value)


class NoSolutions(LastDigit):
    def _problem(self, split: Any, i: int) -> Any:
        return replace(super()._problem(split, i), solution=None)


def test_what_cannot_be_evaluated_is_refused_by_the_name_of_its_setting() -> None:
    on = TeacherEvaluation(problems=3)
    assert "model.method (GRPO) has no teacher; set teacher_evaluation.problems=0" in refusal(on, GRPO())
    assert "trainer.limit_val_batches is 0" in refusal(on, limit_val_batches=0)
    assert "there are 3 problems, but each of the 4 ranks needs one" in refusal(on, world_size=4)
    assert "data.benchmarks is empty" in refusal(on, benchmarks={})
    named = TeacherEvaluation(problems=3, benchmark="longer")
    assert refusal(named) == "teacher_evaluation.benchmark is longer; it has to be one of heldout"
    message = refusal(on, RLRT(context="solution"), NoSolutions())
    assert "model.method.context is solution, but none of the 3 problems of data.benchmarks.heldout has one" in message
    ema = [TeacherRefresh(ema_decay=0.5)]
    assert "model.teacher.scored_by is engine, which has" in refusal(on, callbacks=ema, scored_by="engine")
    assert "TransformersEngine cannot score" in refusal(on, scored_by="engine")
    with pytest.raises(ConfigError, match=r"teacher_evaluation.problems is -1; it has to be 0 or more"):
        TeacherEvaluation(problems=-1)


def test_it_is_off_by_default() -> None:
    callback = TeacherEvaluation()
    callback.setup(cast(Any, SimpleNamespace()), cast(Any, None), "fit")
    callback.on_validation_epoch_end(cast(Any, None), cast(Any, None))
    assert callback.lines == []
