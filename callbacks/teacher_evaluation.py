"""Evaluates the teacher: whether it solves problems with its context, and on which tokens it and the student differ."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.epoch.checks import check_cuts, scoring_engine
from rlrt_lightning.epoch.make import EpochSettings, Parts, collect_verdicts, draw
from rlrt_lightning.epoch.record import Questions
from rlrt_lightning.evaluation.teacher import Taught, evaluate_teacher, teacher_metrics, teacher_table
from rlrt_lightning.rollouts import Rollout, TransformersEngine
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.progress import Progress
from rlrt_lightning.runtime.ranks import gather
from rlrt_lightning.runtime.run_files import claim_path
from rlrt_lightning.runtime.seeding import derive_seed
from rlrt_lightning.tasks import Task

from .boards import log_picture, log_scores, log_text
from .evaluation import Evaluation, evaluated_steps
from .parts import callbacks_of, data_of
from .teacher_picture import draw_teacher
from .teacher_refresh import TeacherRefresh, check_scored_by

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule
    from rlrt_lightning.module import RLRTModule

ROWS = 256
"""Responses at once of a teacher with its own weights, if `data.engine` has no such limit."""

FOLDER = "teacher"
"""Folder of a run for the pictures."""


class TeacherEvaluation(Callback):
    """Evaluates the teacher with each evaluation, the first of which precedes training: can it teach at all?

    The student generates a group of `data.rollouts_per_prompt` rollouts for each held-out problem, which get contexts
    as in training (`model.method.context`). For each rollout with a context, the teacher writes a response of its own,
    sampled as in training. Both accuracies are over the problems with a context, so that they are paired; a problem of
    which the student solves no rollout has no sibling as a context. It changes nothing in training, and costs at most
    twice as many responses as the student's `problems` groups, and their scores.

    Logs `teacher/accuracy` and `teacher/student_accuracy` with the bounds of their 95 % confidence intervals over
    problems (`_low`, `_high`), `teacher/with_context` (share of problems), `teacher/truncated` (share of the teacher's
    responses) and, for each kind of tokens (digits, operators, words, formatting) of the scored rollouts, its share of
    the tokens, its share of |D_t|, and its mean |D_t| in nats (`teacher/tokens_<kind>`, `share_<kind>`,
    `asymmetry_<kind>`), D_t = log P_S - log P_T. Prints them, and draws them: `teacher/step-N.png` in the run's folder
    (`teacher.png` among the results of `validate`, `test` and `predict`), and the image in TensorBoard.

    A teacher with other weights than the policy's generates with transformers, whatever `data.engine` is.

    Args:
        problems: Number of held-out problems, the first ones of the evaluation set, over all ranks; 0 disables it.
        benchmark: Name of the evaluation set (`data.benchmarks`); null is the first one.
    """

    def __init__(self, problems: int = 0, benchmark: str | None = None) -> None:
        if problems < 0:
            raise ConfigError(f"teacher_evaluation.problems is {problems}; it has to be 0 or more")
        self.problems = problems
        self.benchmark = benchmark
        self.scores: dict[str, float] = {}
        """The metrics of the latest evaluation, by tag without the prefix `teacher/`."""
        self.lines: list[str] = []
        """The latest evaluation as printed by `RunReport`."""

    # -- checks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the teacher can be evaluated.

        Raises:
            ConfigError: If it cannot.
        """
        self.scores, self.lines = {}, []
        if not self.problems:
            return
        module, data = cast("RLRTModule", pl_module), data_of(trainer)
        setting = f"teacher_evaluation.problems is {self.problems}"
        if module.method.context == "none":
            raise ConfigError(
                f"{setting}, but model.method ({type(module.method).__name__}) has no teacher; set "
                "teacher_evaluation.problems=0"
            )
        if stage == "fit" and not trainer.limit_val_batches:
            raise ConfigError(
                f"{setting}, but trainer.limit_val_batches is 0: nothing is evaluated; set one of them to another value"
            )
        name, problems = self._problems(data)
        if len(problems) < trainer.world_size:
            raise ConfigError(
                f"teacher_evaluation: there are {len(problems)} problems, but each of the {trainer.world_size} ranks "
                f"needs one; raise teacher_evaluation.problems, or data.benchmarks.{name}.limit"
            )
        kind = module.method.context
        if kind in ("solution", "answer") and all(getattr(problem, kind) is None for problem in problems):
            raise ConfigError(
                f"{setting} and model.method.context is {kind}, but none of the {len(problems)} problems of "
                f"data.benchmarks.{name} has one; use another evaluation set (teacher_evaluation.benchmark), or set "
                "teacher_evaluation.problems=0"
            )
        refresh = next(iter(callbacks_of(trainer, TeacherRefresh)), TeacherRefresh())
        check_scored_by(module, refresh.schedule(module))
        scoring_engine(module.teacher, module.method, data.engine, data.sampling)
        check_cuts(data.engine, data.sampling, data.rescore)
        if stage == "fit":
            claim_path(trainer, FOLDER)

    def _problems(self, data: RolloutDataModule) -> tuple[str, list[Any]]:
        """The evaluation set and its problems, over all ranks."""
        if not data.benchmarks:
            raise ConfigError(
                f"teacher_evaluation.problems is {self.problems}, but data.benchmarks is empty; add an evaluation set"
            )
        name = self.benchmark or next(iter(data.benchmarks))
        if name not in data.benchmarks:
            raise ConfigError(
                f"teacher_evaluation.benchmark is {name}; it has to be one of {', '.join(data.benchmarks)}"
            )
        return name, list(data.benchmark_problems(name)[: self.problems])

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.problems:
            return
        module, data = cast("RLRTModule", pl_module), data_of(trainer)
        name, problems = self._problems(data)
        # Lightning evaluates in inference mode. Weights that move between devices or adapters that are swapped there
        # could not be trained or refreshed afterwards.
        with torch.inference_mode(False), torch.no_grad(), data.stop_signal.interruptible(trainer):
            own = self._compare(trainer, module, data, name, problems)
        results = list(chain(*gather(own)))
        self.scores = teacher_metrics(results)
        self.lines = teacher_table(self.scores, name, len(results))
        step = evaluated_steps(trainer)
        log_scores(trainer, pl_module, {f"{FOLDER}/{tag}": value for tag, value in self.scores.items()}, step)
        log_text(trainer, f"{FOLDER}/table", "\n".join(self.lines), step)
        if trainer.is_global_zero and "accuracy" in self.scores:
            title = f"{type(module.method).__name__}, step {step}: "
            self._draw(trainer, title + self.lines[0].strip().partition(":")[0].removeprefix("teacher  "), step)

    def _compare(
        self, trainer: Trainer, module: RLRTModule, data: RolloutDataModule, name: str, problems: list[Any]
    ) -> list[Taught]:
        """This rank's results."""
        numbers = range(trainer.global_rank, len(problems), trainer.world_size)
        own = [problems[i] for i in numbers]
        seeds = [derive_seed(data.seed, "teacher evaluation", name, i) for i in numbers]
        task, n = data.benchmarks[name].task or data.task, data.rollouts_per_prompt
        rollouts = data.draw(task, own, n, data.sampling, seeds, "the student's responses")
        prompts = [rollouts[group * n].prompt_ids for group in range(len(own))]
        questions = Questions(0, own, prompts, seeds, numbers)
        parts = Parts(module.policy, module.teacher, module.method.at(trainer.global_step), data.engine)
        settings = EpochSettings.of(data, module, trainer.accumulate_grad_batches)
        answer = partial(self._answer, trainer, module, data, task)
        with data.computing():
            return evaluate_teacher(questions, rollouts, parts, settings, lambda _: nullcontext(), answer)

    def _answer(
        self, trainer: Trainer, module: RLRTModule, data: RolloutDataModule, task: Task, questions: Questions
    ) -> list[Rollout]:
        """The teacher's responses: from the engine, which has the policy's weights from the student's rollouts, or with
        the teacher's own weights."""
        policy, engine, progress = module.policy, data.engine, Progress.for_trainer(trainer)
        shares = module.teacher.weights == "policy"
        if not shares:
            if not policy.decodes_rows:
                raise ConfigError(
                    f"teacher_evaluation.problems: the teacher has {module.teacher.schedule}, with which only "
                    f"transformers can generate, but not for {type(policy.model).__name__}, whose key-value cache does "
                    "not allow padded batches; set teacher_evaluation.problems=0 or teacher_refresh.every_n_epochs=1"
                )
            data.engine.release()  # the memory that the sampling needs
            engine = TransformersEngine(engine.max_rows if isinstance(engine, TransformersEngine) else ROWS)
        with nullcontext() if shares else module.teacher.applied_to(policy):
            if not shares:
                engine.sync(policy)
            drawing = draw(questions, engine, data.verifier(task).submit, 1, data.sampling)
            drawn = progress.rollouts(drawing, len(questions.prompts), "the teacher's responses")
        return collect_verdicts(questions.problems, drawn, data.max_fault_share, progress)

    def _draw(self, trainer: Trainer, title: str, step: int) -> None:
        figure = draw_teacher(self.scores, title)
        path = self._path(trainer, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        image = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        log_picture(trainer, f"{FOLDER}/evaluation", image, step)

    def _path(self, trainer: Trainer, step: int) -> Path:
        folder = next((evaluation.folder for evaluation in callbacks_of(trainer, Evaluation)), None)
        if trainer.state.fn != "fit" and folder is not None:
            return folder / f"{FOLDER}.png"
        return claim_path(trainer, FOLDER) / f"step-{step}.png"

    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _evaluate
