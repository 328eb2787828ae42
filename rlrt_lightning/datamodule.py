"""The data module: generates the rollouts of training epochs (`epoch/make.py`) and of evaluations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning import LightningDataModule

from rlrt_lightning.epoch.ahead import Ahead, restore, tokens_of
from rlrt_lightning.epoch.batch import Batches, MicroBatch
from rlrt_lightning.epoch.checks import (
    check_ahead,
    check_cuts,
    check_data_settings,
    check_method,
    check_teacher_tokens,
    scoring_engine,
)
from rlrt_lightning.epoch.make import EpochSettings, Parts, collect_verdicts, draw, make_epoch
from rlrt_lightning.epoch.metrics import Clock, epoch_metrics
from rlrt_lightning.epoch.passes import Passes
from rlrt_lightning.epoch.prompts import PromptReader, read_problems
from rlrt_lightning.epoch.record import Drawn, EpochRecord, Questions
from rlrt_lightning.epoch.rounds import Source
from rlrt_lightning.epoch.stream import MOST_MISSES, Position, PromptStream
from rlrt_lightning.evaluation.sets import Benchmark, EvaluationLoader, read_set
from rlrt_lightning.policy.work import TokenCounter
from rlrt_lightning.rollouts import Rollout, RolloutEngine, Sampling, TransformersEngine
from rlrt_lightning.rollouts.base import Stops
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.precision import computing, half_precision
from rlrt_lightning.runtime.progress import Progress
from rlrt_lightning.runtime.ranks import gather, mean_over_ranks, rank, world_size
from rlrt_lightning.runtime.run_files import claim_metrics
from rlrt_lightning.runtime.seeding import derive_seed
from rlrt_lightning.runtime.stopping import StopSignal
from rlrt_lightning.runtime.trainer_checks import set_up_trainer
from rlrt_lightning.tasks import LastDigit, Problem, Task
from rlrt_lightning.tasks.base import has_curriculum, task_state
from rlrt_lightning.tasks.sending import pickled
from rlrt_lightning.tasks.verifier import Verifier

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule


class RolloutDataModule(LightningDataModule):
    """Generates the rollouts for training epochs and evaluations.

    Args:
        task: Problems and their verifier.
        engine: Generates the rollouts.
        sampling: Sampling parameters.
        prompts_per_epoch: Number of problems per epoch, over all ranks.
        rollouts_per_prompt: Number of rollouts per problem, the group size K.
        sampling_rounds: Dynamic sampling (DAPO, arXiv:2503.14476): draw further rounds of `prompts_per_epoch` problems,
            at most this many in all, until that many groups have different rewards, and train on these; others fill the
            epoch only if there are too few. See `groups/rounds`, `groups/drawn` and `groups/missing`. 1: no dynamic
            sampling.
        minibatches: Optimizer steps per epoch. Each gets an equal number of problems, which are split into
            `--trainer.accumulate_grad_batches` micro-batches of similar size, or as `tokens_per_pass` allows.
        tokens_per_pass: Maximum number of tokens in a forward and backward pass, padding included (rollouts times the
            longest prompt and response). Each epoch uses the fewest micro-batches per optimizer step that satisfy it,
            the same number on all ranks; gradients do not depend on it. A longer rollout has a pass of its own. null:
            `--trainer.accumulate_grad_batches` sets the number. For scoring see `model.policy.score_tokens`.
        benchmarks: Evaluation sets by name; null is the training task's held-out problems, named `heldout`.
        eval_prompts: Number of problems per evaluation batch; an interrupted evaluation loses at most one batch.
        max_prompt_tokens: Maximum prompt length, in tokens.
        overlong_prompts: Whether longer prompts are dropped and counted, or an error. Data from files is checked at the
            start. Evaluation sets keep all problems; `error` refuses prompts there that are too long for the model.
        overlong_buffer: Soft overlong punishment (DAPO, arXiv:2503.14476, Eq. 13): the reward of a response falls
            linearly by up to 1 over the last `overlong_buffer` tokens before `sampling.max_new_tokens`; logged as
            `rollout/shaped_reward`. null for none.
        rescore: Compute the policy's log-probs by a forward pass of the trainer instead of using the sampler's, and
            correct for the difference (`model.importance`). Needed if the two differ, as in bfloat16.
        ahead: Generate the next epoch's rollouts while the current epoch trains; requires vLLM servers. They come from
            the weights before the current epoch's updates, for which `model.importance` corrects; requires `rescore`.
            Checkpoints contain these rollouts.
        verifier_workers: Number of processes that verify completions, for tasks whose verifier is not trusted code.
        verifier_timeout_s: Time limit of one verdict, in seconds.
        verifier_memory_gb: Memory limit of a verifier process in GB, on top of its memory after start-up; Linux only.
        max_fault_share: Stop if the verifier itself fails on more than this fraction of an epoch's rollouts; otherwise
            these rollouts count as wrong.
        seed: Seed of all random streams; set by `--seed_everything` on the command line.
    """

    makes_rollouts = True
    """Checked by `RLRTModule`."""

    def __init__(
        self,
        task: Task | None = None,
        engine: RolloutEngine | None = None,
        sampling: Sampling = Sampling(),
        prompts_per_epoch: int = 256,
        rollouts_per_prompt: int = 8,
        sampling_rounds: int = 1,
        minibatches: int = 2,
        tokens_per_pass: int | None = None,
        benchmarks: dict[str, Benchmark] | None = None,
        eval_prompts: int = 64,
        max_prompt_tokens: int = 2048,
        overlong_prompts: Literal["drop", "error"] = "drop",
        overlong_buffer: int | None = None,
        rescore: bool = False,
        ahead: bool = False,
        verifier_workers: int = 2,
        verifier_timeout_s: float = 5.0,
        verifier_memory_gb: float = 4.0,
        max_fault_share: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.task: Task = task or LastDigit()
        self.engine: RolloutEngine = engine or TransformersEngine()
        self.sampling = sampling
        self.prompts_per_epoch = prompts_per_epoch
        self.rollouts_per_prompt = rollouts_per_prompt
        self.sampling_rounds = sampling_rounds
        self.minibatches = minibatches
        self.tokens_per_pass = tokens_per_pass
        self.benchmarks = benchmarks if benchmarks is not None else {"heldout": Benchmark()}
        self.eval_prompts = eval_prompts
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong_prompts = overlong_prompts
        self.overlong_buffer = overlong_buffer
        self.rescore = rescore
        self.ahead = ahead
        self.verifier_workers = verifier_workers
        self.verifier_timeout_s = verifier_timeout_s
        self.verifier_memory_gb = verifier_memory_gb
        self.max_fault_share = max_fault_share
        self.seed = seed
        check_data_settings(self)

        self.epoch: EpochRecord | None = None
        """The record of the current epoch, for callbacks."""
        self.evaluated: dict[str, set[str]] = {name: set() for name in self.benchmarks}
        """Ids of problems that are already evaluated, by evaluation set; filled by the `Evaluation` callback."""
        self.stop_signal = StopSignal()
        """Whether the run was asked to stop; set by the `SafeStop` callback."""
        self.rollout_metrics: dict[str, float] = {}
        """Metrics of the current epoch's rollouts over all ranks, by tag; callbacks may add metrics."""
        self._clock = Clock()
        self._passes = Passes(tokens_per_pass)
        self._ahead = Ahead()
        self._restored: list[dict[str, Any]] = []  # rollouts that were generated ahead, from a checkpoint
        self._synced: int | None = None  # optimizer step whose weights the engine has
        self._made: Batches[MicroBatch] | None = None
        self._position = Position()
        self._begun: dict[str, Any] | None = None  # state at the start of the current epoch
        self._stream: PromptStream | None = None
        self._eval_problems: dict[str, Sequence[Problem]] = {}
        self._verifiers: dict[int, Verifier] = {}

    # -- an epoch --------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Batches[MicroBatch]:
        """The micro-batches of the next epoch.

        Lightning calls this twice before the first step of a resumed run; the second call returns the same batches.
        """
        if self._made is None:
            self._begun = self._state()
            with self.computing():
                self._made = self._make_epoch()
        self._passes.begin(self._trainer, self._made)
        return self._made

    def newest_batches(self, n: int) -> list[MicroBatch]:
        """The micro-batches that were trained on last, on the CPU.

        Args:
            n: Number of micro-batches.
        """
        return self._made.latest(n) if self._made is not None else []

    def finish_epoch(self) -> None:
        """Ends the current epoch; called by the `EpochMetrics` callback."""
        self._made = self._begun = None

    def _make_epoch(self) -> Batches[MicroBatch]:
        module, trainer = self._module, self._trainer
        self._clock, counter = Clock(), TokenCounter()
        module.policy.counter = counter
        method, gate = module.method.at(trainer.global_step), module.next_gate()
        parts = Parts(module.policy, module.teacher, method, self.engine, gate, module.reference_weights)
        settings = EpochSettings.of(self, module, trainer.accumulate_grad_batches)
        spent: list[tuple[int, float]] = []
        observe = self.task.observe if has_curriculum(self.task) else None
        source = Source(self._questions, partial(self._draw_epoch, spent), observe)
        self.epoch, batches = make_epoch(source, parts, settings, self._phase, Progress.for_trainer(trainer))
        self.engine.release()
        metrics = epoch_metrics(self.epoch, self._clock, counter, module.importance_cap if self.rescore else None)
        metrics["rollout/overlong_prompts"] = float(self._position.overlong)
        if spent:  # unknown for rollouts from a checkpoint
            tokens, seconds = (sum(values) for values in zip(*spent, strict=True))
            metrics["speed/rollout_tokens_per_s"] = tokens / seconds
        self.rollout_metrics = mean_over_ranks(metrics)
        return batches

    def _questions(self, drawn: int = 0) -> Questions:
        assert self._stream is not None
        return self._stream.questions(self.prompts_per_epoch, drawn)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Times a phase that does not change the weights; a run that was asked to stop may end within it."""
        with self.stop_signal.interruptible(self._trainer), self._clock(name):
            yield

    def _draw_epoch(self, spent: list[tuple[int, float]], questions: Questions) -> list[Drawn]:
        """Returns the rollouts of an epoch's problems, from a checkpoint or generated ahead if available, and starts
        generating the next epoch's with `ahead`. Appends their tokens and the seconds that generating them took to
        `spent`."""
        start, restored, self._restored = time.perf_counter(), self._restored, []
        if restored:
            drawn = restore(restored, questions, self._module.policy, self.verifier(self.task).submit)
        elif (taken := self._ahead.take()) is not None:
            drawn = taken[0]
            spent.append((tokens_of(drawn), taken[1]))
        else:
            synced = self._clock.seconds.get("time/sync", 0.0)
            drawn = self._roll_out(self.task, questions, self.rollouts_per_prompt, self.sampling)
            synced = self._clock.seconds.get("time/sync", 0.0) - synced
            spent.append((tokens_of(drawn), time.perf_counter() - start - synced))
        if self.ahead and self._trainer.current_epoch + 1 != self._trainer.max_epochs:
            self._begin_next_epoch()
        return drawn

    def _begin_next_epoch(self) -> None:
        """Starts generating ahead. The position is not moved, so the next epoch uses the same prompts and seeds."""
        assert self._stream is not None
        self._stream.position = replace(self._position)
        questions = self._questions()
        self._stream.position = self._position
        self._sync_engine()
        verify = self.verifier(self.task).submit
        self._ahead.begin(draw(questions, self.engine, verify, self.rollouts_per_prompt, self.sampling))

    def _roll_out(self, task: Task, questions: Questions, n: int, sampling: Sampling, what: str = "") -> list[Drawn]:
        """Generates rollouts with the current policy, in the order in which they finish."""
        self._ahead.wait()
        self._sync_engine()
        drawing = draw(questions, self.engine, self.verifier(task).submit, n, sampling)
        return Progress.for_trainer(self._trainer).rollouts(drawing, len(questions.prompts) * n, what)

    def _sync_engine(self) -> None:
        if self._synced != self._trainer.global_step or not self.engine.ready:
            with self._clock("sync"):
                self.engine.sync(self._module.policy)
            self._synced = self._trainer.global_step

    # -- evaluation ------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> list[EvaluationLoader]:
        """One loader per evaluation set; its batches are rollouts with verdicts."""
        return [
            EvaluationLoader(
                name,
                spec.samples,
                self._eval_problems[name],
                self.eval_prompts,
                self.evaluated[name],
                partial(self._evaluate, name, spec),
            )
            for name, spec in self.benchmarks.items()
        ]

    test_dataloader = predict_dataloader = val_dataloader

    def _evaluate(self, name: str, spec: Benchmark, numbers: Sequence[int]) -> list[Rollout]:
        """Seeds depend on the problem only, so that evaluations in one run differ by the policy only."""
        every, sampling = self._eval_problems[name], spec.sampling or self.sampling
        seeds = [derive_seed(self.seed, "evaluation", name, i) for i in numbers]
        what = f"{name}, problems {numbers[0] + 1} to {numbers[-1] + 1} of {len(every)}" if numbers else name
        with self.stop_signal.interruptible(self._trainer):
            return self.draw(spec.task or self.task, [every[i] for i in numbers], spec.samples, sampling, seeds, what)

    def draw(
        self, task: Task, problems: Sequence[Problem], n: int, sampling: Sampling, seeds: Sequence[int], what: str = ""
    ) -> list[Rollout]:
        """Generates rollouts with verdicts, ordered by problem.

        Args:
            task: The task whose verifier judges them.
            problems: The problems, indexed by `Rollout.group`.
            n: Number of rollouts per problem.
            sampling: Sampling parameters.
            seeds: A seed for each problem.
            what: What the progress bar shows.
        """
        with self.computing():
            prompts = [self._reader.tokens(p) for p in problems]
            questions = Questions(0, list(problems), prompts, list(seeds), range(len(problems)))
            drawn = self._roll_out(task, questions, n, sampling, what)
        return collect_verdicts(problems, drawn, self.max_fault_share, Progress.for_trainer(self._trainer))

    @property
    def training_problems(self) -> Sequence[Problem]:
        """The training problems, over all ranks; available after `setup("fit")`."""
        return () if self._stream is None else self._stream.problems

    def benchmark_problems(self, name: str) -> Sequence[Problem]:
        """The problems of an evaluation set, over all ranks; available after `setup`."""
        return self._eval_problems[name]

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Claims the metrics folder; this is Lightning's first hook, called before loggers write."""
        if self._trainer.is_global_zero:
            claim_metrics(self._trainer)

    def setup(self, stage: str) -> None:
        """Reads the data and checks the settings before the weights are loaded."""
        self._synced = self._made = self._begun = None
        self.engine.half = half_precision(self._trainer)
        policy = self._module.policy
        _ = policy.tokenizer, policy.end_tokens, Stops.of(policy, self.sampling)
        self._reader = PromptReader(policy, self.overlong_prompts)
        if stage == "fit":
            set_up_trainer(self._trainer, self)
            self._set_up_training()
        for name, spec in self.benchmarks.items():
            self._eval_problems[name] = read_set(f"data.benchmarks.{name}", spec, self.task, self._reader)
        for task in (self.task, *(spec.task for spec in self.benchmarks.values())):
            if task is not None and task.isolated:
                pickled(task)  # refuses a task that cannot be sent to the verifier's processes

    def _set_up_training(self) -> None:
        module, positions = self._module, self._module.policy.max_positions
        self._passes.check(self._trainer)
        if self._trainer.current_epoch == 0:  # a resumed run loads its position after this
            self._position = Position()
        problems = read_problems(self.task, "train", "data.task")
        if not len(problems):
            raise ConfigError("data.task: there are no problems to train on")
        check_method(module.method, module.aggregation, self.rollouts_per_prompt, problems)
        check_teacher_tokens(module.policy, module.teacher, module.method, problems, self._reader)
        check_cuts(self.engine, self.sampling, self.rescore)
        if self.ahead:
            check_ahead(self, module.importance, module.teacher)
        scoring_engine(module.teacher, module.method, self.engine, self.sampling)
        limit = self.max_prompt_tokens if positions is None else min(self.max_prompt_tokens, positions - 1)
        self._reader.check_lengths("data.task", problems, "data.max_prompt_tokens", limit, "they are dropped")
        self._stream = PromptStream(problems, self._reader, limit, self.seed, self._position, self.task.admits)

    def example(self, stage: str) -> Problem | None:
        """The first problem of a stage whose prompt is not too long, for display; None if there is none."""
        evaluated = chain.from_iterable(self._eval_problems.values())
        problems = iter(self._stream) if stage == "fit" and self._stream is not None else evaluated
        first, most = islice(problems, MOST_MISSES), self.max_prompt_tokens
        return next((p for p in first if self._reader.measure(p, most)[0] <= most), None)

    def teardown(self, stage: str) -> None:
        """Stops the engine and the verifier's worker processes."""
        self.engine.close()  # also stops generating ahead
        self._passes.end(self._trainer)
        self._ahead = Ahead()
        for verifier in self._verifiers.values():
            verifier.close()
        self._verifiers.clear()

    def state_dict(self) -> dict[str, Any]:
        """The position in the prompts (`Position`), the task's state, and the rollouts generated ahead. Between an
        epoch's updates also each rank's remaining micro-batches: their rollouts come from outdated weights and cannot
        be generated again. Collective: all ranks have to call it."""
        if self._made is None:
            return self._begun or {**self._state(), **self._drawn_ahead()}
        if not self._made.served:
            return self._begun or self._state()
        remaining = [vars(batch) for batch in self._made.remaining]
        own = {"given": self._made.served, "left": remaining, "rollout_metrics": self.rollout_metrics}
        state = {"under_way": gather(own), "accumulate": self._trainer.accumulate_grad_batches}
        return {**self._state(), **self._drawn_ahead(), **state}

    def _state(self) -> dict[str, Any]:
        return {**vars(self._position), **task_state(self.task)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`.

        Raises:
            ConfigError: If the checkpoint is from within an epoch, and ranks or gradient accumulation have changed.
        """
        for name in vars(self._position):
            setattr(self._position, name, state_dict[name])
        if task_state(self.task) and "task" in state_dict:
            cast(Any, self.task).load_state_dict(state_dict["task"])
        self._restored = state_dict.get("ahead", []) if self.ahead else []
        ranks, trainer = state_dict.get("under_way"), self._trainer
        if trainer.state.fn != "fit":
            return
        trainer.num_sanity_val_steps = 0  # the evaluation before training was already done
        if ranks is None:
            return
        accumulate = self._passes.resumed(trainer, state_dict["accumulate"])
        if (len(ranks), state_dict["accumulate"]) != (world_size(), accumulate):
            raise ConfigError(
                f"ckpt_path: this checkpoint was saved in the middle of an epoch on {len(ranks)} ranks with "
                f"trainer.accumulate_grad_batches={state_dict['accumulate']}; use the same settings, or resume from a "
                "checkpoint of the end of an epoch"
            )
        own = ranks[rank()]
        self._made = Batches([MicroBatch(**batch) for batch in own["left"]], own["given"], accumulate)
        self.rollout_metrics = own["rollout_metrics"]

    def _drawn_ahead(self) -> dict[str, Any]:
        """All ranks' rollouts generated ahead; none after a stop signal, to save time: a resumed run repeats them."""
        if not self.ahead:
            return {}
        rows = [] if self.stop_signal.number is not None else self._ahead.rows()
        every = gather([{**row, "place": row["group"] * world_size() + rank()} for row in rows])
        return {"ahead": [row for rows in every for row in rows] if all(every) else []}

    # -- helpers ---------------------------------------------------------------------------------------------------

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module has no trainer; pass it to Trainer.fit, validate, test or predict")
        return self.trainer

    @property
    def _module(self) -> RLRTModule:
        return cast("RLRTModule", self._trainer.lightning_module)

    def verifier(self, task: Task) -> Verifier:
        """The verifier of a task. All verifiers share their worker processes, which `teardown` stops."""
        if id(task) not in self._verifiers:
            first = next(iter(self._verifiers.values()), None)
            self._verifiers[id(task)] = (
                first.for_task(task)
                if first is not None
                else Verifier(task, self.verifier_workers, self.verifier_timeout_s, self.verifier_memory_gb)
            )
        return self._verifiers[id(task)]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See `runtime.precision.computing`."""
        with computing(self._trainer):
            yield
