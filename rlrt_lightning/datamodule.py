"""The data module: Lightning's hooks around an epoch of fresh rollouts (`epoch/make.py`) and around evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning import LightningDataModule

from rlrt_lightning.epoch.ahead import Ahead
from rlrt_lightning.epoch.batch import Batches, MicroBatch
from rlrt_lightning.epoch.checks import check_ahead, check_context, check_cuts, check_teacher_tokens, scoring_engine
from rlrt_lightning.epoch.make import EpochSettings, Parts, collect_verdicts, draw, make_epoch
from rlrt_lightning.epoch.metrics import Clock, epoch_metrics
from rlrt_lightning.epoch.prompts import PromptReader, read_problems
from rlrt_lightning.epoch.record import Drawn, EpochRecord, Questions
from rlrt_lightning.epoch.stream import MOST_MISSES, Position, PromptStream
from rlrt_lightning.evaluation.sets import Benchmark, EvaluationLoader, read_set
from rlrt_lightning.policy.forward import TokenCounter
from rlrt_lightning.rollouts import Rollout, RolloutEngine, Sampling, TransformersEngine
from rlrt_lightning.rollouts.base import Stops
from rlrt_lightning.runtime.errors import ConfigError, check_ranges
from rlrt_lightning.runtime.precision import computing
from rlrt_lightning.runtime.progress import Progress
from rlrt_lightning.runtime.ranks import gather, mean_over_ranks, rank, world_size
from rlrt_lightning.runtime.run_files import claim_metrics
from rlrt_lightning.runtime.seeding import derive_seed
from rlrt_lightning.runtime.stopping import StopSignal
from rlrt_lightning.runtime.trainer_checks import set_up_trainer
from rlrt_lightning.tasks import Problem, StrategySum, Task
from rlrt_lightning.tasks.sending import pickled
from rlrt_lightning.tasks.verifier import Verifier

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule


class RolloutDataModule(LightningDataModule):
    """Makes the rollouts that each epoch trains on, and those that evaluations count.

    Args:
        task: Problems and their verifier.
        engine: What draws the rollouts.
        sampling: How tokens are drawn.
        prompts_per_epoch: Problems in an epoch, over all ranks.
        rollouts_per_prompt: Rollouts of each problem, the K of the group.
        minibatches: Optimizer steps in an epoch; each takes an equal share of the problems, and is cut into
            `--trainer.accumulate_grad_batches` micro-batches of about equal size.
        benchmarks: What is evaluated, by name; null is the training task's held-out problems, as `heldout`.
        eval_prompts: Problems in one batch of an evaluation, and what one that is stopped loses at most.
        max_prompt_tokens: Longest prompt, in tokens.
        overlong_prompts: What to do with a longer one: drop it and count it, or stop with an error. Data from files is
            counted at the start. Benchmarks keep all problems; there `error` stops at what is too long for the model.
        rescore: Take the policy's log-probs from the trainer's forward pass instead of from the sampler, and correct
            for the difference (`model.importance`). One more forward pass; needed where the two differ, as in bfloat16.
        ahead: Draw the next epoch's rollouts while this one trains, on vLLM servers. They come from the weights before
            this epoch's updates; `model.importance` corrects for that, which takes `rescore`. Checkpoints hold them.
        verifier_workers: Processes that check completions, for tasks whose verifier is not trusted code.
        verifier_timeout_s: Time limit of one verdict, in seconds.
        verifier_memory_gb: Memory limit of a verifier process, in GiB; on Linux only.
        max_fault_share: Stop when the verifier itself fails on more than this share of an epoch's rollouts; below it
            they count as wrong.
        seed: Seed of every random stream; the command line sets it by `--seed_everything`.
    """

    makes_rollouts = True
    """What `RLRTModule` wants of its data module."""

    def __init__(
        self,
        task: Task | None = None,
        engine: RolloutEngine | None = None,
        sampling: Sampling = Sampling(),
        prompts_per_epoch: int = 256,
        rollouts_per_prompt: int = 8,
        minibatches: int = 2,
        benchmarks: dict[str, Benchmark] | None = None,
        eval_prompts: int = 64,
        max_prompt_tokens: int = 2048,
        overlong_prompts: Literal["drop", "error"] = "drop",
        rescore: bool = False,
        ahead: bool = False,
        verifier_workers: int = 2,
        verifier_timeout_s: float = 5.0,
        verifier_memory_gb: float = 4.0,
        max_fault_share: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rollouts_per_prompt < 2:
            raise ConfigError(
                f"data.rollouts_per_prompt is {rollouts_per_prompt}; it has to be at least 2: the advantage compares "
                "the rollouts of a prompt with each other"
            )
        if minibatches < 1 or prompts_per_epoch < 1 or prompts_per_epoch % minibatches:
            raise ConfigError(
                f"data.prompts_per_epoch ({prompts_per_epoch}) has to be a multiple of data.minibatches ({minibatches})"
            )
        check_ranges(
            "data",
            {
                "eval_prompts": (eval_prompts, eval_prompts >= 1, "1 or more"),
                "max_prompt_tokens": (max_prompt_tokens, max_prompt_tokens >= 1, "1 or more"),
                "verifier_workers": (verifier_workers, verifier_workers >= 1, "1 or more"),
                "verifier_timeout_s": (verifier_timeout_s, 0 < verifier_timeout_s < math.inf, "above 0"),
                "verifier_memory_gb": (verifier_memory_gb, 0 < verifier_memory_gb < math.inf, "above 0"),
                "max_fault_share": (max_fault_share, 0 <= max_fault_share <= 1, "from 0 to 1"),
            },
        )
        if sampling.temperature == 0:
            raise ConfigError("data.sampling.temperature is 0: K equal rollouts teach nothing; take 1 for training")
        self.task: Task = task or StrategySum()
        self.engine: RolloutEngine = engine or TransformersEngine()
        self.sampling = sampling
        self.prompts_per_epoch = prompts_per_epoch
        self.rollouts_per_prompt = rollouts_per_prompt
        self.minibatches = minibatches
        self.benchmarks = benchmarks if benchmarks is not None else {"heldout": Benchmark()}
        self.eval_prompts = eval_prompts
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong_prompts = overlong_prompts
        self.rescore = rescore
        self.ahead = ahead
        self.verifier_workers = verifier_workers
        self.verifier_timeout_s = verifier_timeout_s
        self.verifier_memory_gb = verifier_memory_gb
        self.max_fault_share = max_fault_share
        self.seed = seed

        self.epoch: EpochRecord | None = None
        """The rollouts of the epoch that is being trained on; callbacks read them."""
        self.evaluated: dict[str, set[str]] = {name: set() for name in self.benchmarks}
        """Names of the problems whose results are known already, by evaluation set; the `Evaluation` callback knows
        them."""
        self.stop_signal = StopSignal()
        """Whether the run was asked to end; the `SafeStop` callback listens for that."""
        self.rollout_metrics: dict[str, float] = {}
        """Metrics of the newest epoch's rollouts over all ranks, by tag; callbacks may add theirs."""
        self._clock = Clock()
        self._ahead = Ahead()
        self._restored: list[dict[str, Any]] = []  # rollouts that were drawn ahead, from a checkpoint
        self._synced: int | None = None  # optimizer step whose weights the engine has
        self._made: Batches[MicroBatch] | None = None
        self._position = Position()
        self._begun: dict[str, Any] | None = None  # the state at the beginning of the epoch that is made or trained on
        self._stream: PromptStream | None = None
        self._eval_problems: dict[str, Sequence[Problem]] = {}
        self._verifiers: dict[int, Verifier] = {}

    # -- an epoch --------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Batches[MicroBatch]:
        """The micro-batches of the next epoch.

        When Lightning resumes, it asks twice before the first step; the second time it gets the same ones.
        """
        if self._made is None:
            self._begun = dict(vars(self._position))
            with self.computing():
                self._made = self._make_epoch()
        return self._made

    def newest_batches(self, n: int) -> list[MicroBatch]:
        """The micro-batches that were trained on last, on the CPU.

        Args:
            n: How many.
        """
        return self._made.newest(n) if self._made is not None else []

    def finish_epoch(self) -> None:
        """The epoch was trained on; the `EpochMetrics` callback says so at its end."""
        self._made = self._begun = None

    def _make_epoch(self) -> Batches[MicroBatch]:
        module, trainer = self._module, self._trainer
        self._clock, counter = Clock(), TokenCounter()
        module.policy.counter = counter
        parts = Parts(module.policy, module.teacher, module.method.at(trainer.global_step), self.engine)
        settings = EpochSettings(
            sampling=self.sampling,
            rollouts_per_prompt=self.rollouts_per_prompt,
            minibatches=self.minibatches,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            rescore=self.rescore,
            max_fault_share=self.max_fault_share,
            importance=module.importance,
            importance_cap=module.importance_cap,
            aggregation=module.aggregation,
            seed=self.seed,
        )
        questions, seconds = self._questions(), list[float]()
        drawn = partial(self._draw_epoch, questions, seconds)
        self.epoch, batches = make_epoch(questions, drawn, parts, settings, self._phase, Progress.beside(trainer))
        self.engine.release()
        metrics = epoch_metrics(self.epoch, self._clock, counter, module.importance_cap if self.rescore else None)
        metrics["rollout/overlong_prompts"] = float(self._position.overlong)
        if seconds:  # not known of rollouts that a checkpoint held
            metrics["speed/rollout_tokens_per_s"] = float(self.epoch.mask.sum()) / seconds[0]
        self.rollout_metrics = mean_over_ranks(metrics)
        return batches

    def _questions(self) -> Questions:
        assert self._stream is not None
        return self._stream.questions(self.prompts_per_epoch)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase of the epoch, which leaves the weights as they are: a run that was asked to stop may end in it."""
        with self.stop_signal.interruptible(self._trainer), self._clock(name):
            yield

    def _draw_epoch(self, questions: Questions, seconds: list[float]) -> list[Drawn]:
        """The epoch's rollouts: what was drawn ahead where there is something, and then the next epoch's are begun.
        Adds the seconds that drawing them took."""
        start, restored, self._restored = time.perf_counter(), self._restored, []
        if restored:
            drawn = self._restore(restored, questions)
        elif (taken := self._ahead.take()) is not None:
            drawn = taken[0]
            seconds.append(taken[1])
        else:
            drawn = self._roll_out(self.task, questions, self.rollouts_per_prompt, self.sampling)
            seconds.append(time.perf_counter() - start - self._clock.seconds.get("time/sync", 0.0))
        if self.ahead and self._trainer.current_epoch + 1 != self._trainer.max_epochs:
            self._begin_next_epoch()
        return drawn

    def _begin_next_epoch(self) -> None:
        """Leaves no trace in what decides the next epoch, which comes to the same prompts and seeds by itself."""
        assert self._stream is not None
        self._stream.position = replace(self._position)
        questions = self._questions()
        self._stream.position = self._position
        self._sync_engine()
        verify = self.verifier(self.task).submit
        self._ahead.begin(draw(questions, self.engine, verify, self.rollouts_per_prompt, self.sampling))

    def _restore(self, rows: Sequence[dict[str, Any]], questions: Questions) -> list[Drawn]:
        """What had been drawn ahead when the checkpoint was saved."""
        policy, verifier, drawn = self._module.policy, self.verifier(self.task), list[Drawn]()
        for row in rows:
            group, of_rank = divmod(row["place"], world_size())
            if of_rank == rank():
                values = {name: value for name, value in row.items() if name not in ("place", "group")}
                text = policy.decode(row["response_ids"])
                rollout = Rollout(group, prompt_ids=questions.prompts[group], text=text, **values)
                drawn.append((rollout, verifier.submit(questions.problems[group], text)))
        return drawn

    def _roll_out(self, task: Task, questions: Questions, n: int, sampling: Sampling) -> list[Drawn]:
        """Rollouts by the policy as it is now, in the order in which they finish."""
        self._ahead.wait()
        self._sync_engine()
        coming = draw(questions, self.engine, self.verifier(task).submit, n, sampling)
        return list(Progress.beside(self._trainer)("rollouts", coming, len(questions.prompts) * n))

    def _sync_engine(self) -> None:
        if self._synced != self._trainer.global_step or not self.engine.ready:
            with self._clock("sync"):
                self.engine.sync(self._module.policy)
            self._synced = self._trainer.global_step

    # -- evaluation ------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> list[EvaluationLoader]:
        """A loader for each evaluation set, whose batches are rollouts with verdicts."""
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
        """The seeds depend on the problem alone: evaluations of one run differ by the policy only."""
        problems = [self._eval_problems[name][i] for i in numbers]
        seeds = [derive_seed(self.seed, "evaluation", name, i) for i in numbers]
        with self.stop_signal.interruptible(self._trainer):
            return self.draw(spec.task or self.task, problems, spec.samples, spec.sampling or self.sampling, seeds)

    def draw(
        self, task: Task, problems: Sequence[Problem], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Rollouts with their verdicts, ordered by problem.

        Args:
            task: Whose verifier judges them.
            problems: The problems, which `Rollout.group` counts.
            n: Rollouts of each problem.
            sampling: How they are drawn.
            seeds: A seed for each problem.
        """
        with self.computing():
            prompts = [self._reader.tokens(p) for p in problems]
            questions = Questions(0, list(problems), prompts, list(seeds), range(len(problems)))
            drawn = self._roll_out(task, questions, n, sampling)
        return collect_verdicts(problems, drawn, self.max_fault_share, Progress.beside(self._trainer))

    @property
    def training_problems(self) -> Sequence[Problem]:
        """The problems that are trained on, over all ranks; known after `setup` for training."""
        return () if self._stream is None else self._stream.problems

    def benchmark_problems(self, name: str) -> Sequence[Problem]:
        """The problems of an evaluation set, over all ranks; known after `setup`."""
        return self._eval_problems[name]

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Lightning's first hook, before the loggers write anything."""
        if self._trainer.is_global_zero:
            claim_metrics(self._trainer)

    def setup(self, stage: str) -> None:
        """Reads the data and checks what can be checked before the weights are loaded."""
        self._synced = self._made = self._begun = None
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
                pickled(task)  # one that cannot be sent to the verifier's processes is refused before any rollout

    def _set_up_training(self) -> None:
        module, positions = self._module, self._module.policy.max_positions
        if self._trainer.current_epoch == 0:  # a run that is resumed loads its place after this
            self._position = Position()
        problems = read_problems(self.task, "train", "data.task")
        if not len(problems):
            raise ConfigError("data.task: there are no problems to train on")
        check_context(module.method, problems)
        check_teacher_tokens(module.policy, module.teacher, module.method, problems, self._reader)
        check_cuts(self.engine, self.sampling, self.rescore)
        if self.ahead:
            check_ahead(self.engine, self.rescore, module.importance, module.teacher)
        scoring_engine(module.teacher, module.method, self.engine, self.sampling)
        limit = self.max_prompt_tokens if positions is None else min(self.max_prompt_tokens, positions - 1)
        self._reader.check_lengths("data.task", problems, "data.max_prompt_tokens", limit, "they are left out")
        self._stream = PromptStream(problems, self._reader, limit, self.seed, self._position)

    def example(self, stage: str) -> Problem | None:
        """The first problem of a stage whose prompt is not too long, to be shown; None where there is none."""
        evaluated = chain.from_iterable(self._eval_problems.values())
        problems = iter(self._stream) if stage == "fit" and self._stream is not None else evaluated
        first, most = islice(problems, MOST_MISSES), self.max_prompt_tokens
        return next((p for p in first if self._reader.measured(p, most)[0] <= most), None)

    def teardown(self, stage: str) -> None:
        """Ends the engine and the verifier's worker processes."""
        self.engine.close()  # rollouts that are drawn ahead end with it
        self._ahead = Ahead()
        for verifier in self._verifiers.values():
            verifier.close()
        self._verifiers.clear()

    def state_dict(self) -> dict[str, Any]:
        """How far the prompts have been read (`Position`), and the rollouts that were drawn ahead. In the middle of the
        updates also what is left of the epoch, on each rank: its rollouts are from outdated weights by then. All ranks
        have to ask."""
        if self._made is None:
            return self._begun or {**vars(self._position), **self._drawn_ahead()}
        if not self._made.given:
            return self._begun or dict(vars(self._position))
        left = [vars(batch) for batch in self._made.left]
        own = {"given": self._made.given, "left": left, "rollout_metrics": self.rollout_metrics}
        state = {"under_way": gather(own), "accumulate": self._trainer.accumulate_grad_batches}
        return {**vars(self._position), **self._drawn_ahead(), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`.

        Raises:
            ConfigError: If the rest of an epoch cannot be dealt out as it was.
        """
        for name in vars(self._position):
            setattr(self._position, name, state_dict[name])
        self._restored = state_dict.get("ahead", []) if self.ahead else []
        ranks, trainer = state_dict.get("under_way"), self._trainer
        if trainer.state.fn != "fit":
            return
        trainer.num_sanity_val_steps = 0  # the measurement before training has been made
        if ranks is None:
            return
        if (len(ranks), state_dict["accumulate"]) != (world_size(), trainer.accumulate_grad_batches):
            raise ConfigError(
                f"ckpt_path: this checkpoint was saved in the middle of an epoch that is dealt out to {len(ranks)} "
                f"ranks with trainer.accumulate_grad_batches={state_dict['accumulate']}; go on with the same, or from "
                "the checkpoint of the end of an epoch"
            )
        own = ranks[rank()]
        self._made = Batches([MicroBatch(**batch) for batch in own["left"]], own["given"])
        self.rollout_metrics = own["rollout_metrics"]

    def _drawn_ahead(self) -> dict[str, Any]:
        """The next epoch's rollouts of all ranks, waited for unless there is no time: who resumes then draws anew."""
        if not self.ahead:
            return {}
        rows = [] if self.stop_signal.number is not None else self._ahead.rows()
        every = gather([{**row, "place": row["group"] * world_size() + rank()} for row in rows])
        return {"ahead": [row for rows in every for row in rows] if all(every) else []}

    # -- small parts -----------------------------------------------------------------------------------------------

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module has no trainer: pass it to Trainer.fit, validate, test or predict")
        return self.trainer

    @property
    def _module(self) -> RLRTModule:
        return cast("RLRTModule", self._trainer.lightning_module)

    def verifier(self, task: Task) -> Verifier:
        """The verifier of a task; all share their worker processes, which end with `teardown`."""
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
