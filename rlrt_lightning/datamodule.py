"""The data module: an epoch is a batch of fresh roll-outs, from prompts to micro-batches.

`RolloutDataModule._make_epoch` reads top to bottom as the way of the data.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning import LightningDataModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from rlrt_lightning.batch import Batches, EpochBatch, MicroBatch, micro_batches, mini_batch_sizes
from rlrt_lightning.epoch_figures import Clock, log_probs, mismatch, non_finite_log_probs, not_finite, statistics
from rlrt_lightning.errors import ConfigError, check_ranges
from rlrt_lightning.objective import Signals, group_advantages, importance_weights
from rlrt_lightning.padding import pad_rows
from rlrt_lightning.policy import Scored
from rlrt_lightning.prompts import PromptReader, read_problems
from rlrt_lightning.ranks import Mean, gather
from rlrt_lightning.rollouts import Rollout, RolloutEngine, Sampling, ScoringEngine, TransformersEngine
from rlrt_lightning.rollouts.ahead import Ahead, Drawn
from rlrt_lightning.rollouts.base import Stops
from rlrt_lightning.run_files import own_metrics
from rlrt_lightning.seeding import derive_seed, generator
from rlrt_lightning.stopping import StopSignal
from rlrt_lightning.tasks import Problem, StrategySum, Task, Verdict
from rlrt_lightning.tasks.verifier import Verifier
from rlrt_lightning.trainer_checks import check_trainer
from rlrt_lightning.trainer_limits import check_limits

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule

log = logging.getLogger(__name__)

TRAINER: dict[str, tuple[float, float]] = {
    # Each epoch trains on roll-outs of its own.
    "reload_dataloaders_every_n_epochs": (0, 1),
    # Lightning's sanity check over all of the validation is our measurement before training.
    "num_sanity_val_steps": (2, math.inf),
    "log_every_n_steps": (50, 1),
}
"""Attributes of the trainer: Lightning's default, and ours. The loops read them after the data module's `setup`."""

RELOAD = "trainer.reload_dataloaders_every_n_epochs has to be 1: each epoch trains on roll-outs of its own"

MOST_MISSES = 1000
"""So many prompts in a row that are too long: the limit is wrong."""


@dataclass
class Benchmark:
    """Held-out problems that the policy is evaluated on.

    Args:
        task: Whose held-out problems; null takes those of the training task.
        samples: Roll-outs of each problem, the n of avg@n and pass@k.
        limit: Take the first so many problems only; null takes all.
        sampling: How they are drawn; null draws as in training.
    """

    task: Task | None = None
    samples: int = 8
    limit: int | None = None
    sampling: Sampling | None = None


class Evaluated:
    """Some problems of a benchmark with their roll-outs, verdicts included; `Rollout.group` counts the problems.

    No dataclass: Lightning takes those apart, looking for tensors to move.
    """

    def __init__(self, benchmark: str, samples: int, problems: list[Problem], rollouts: list[Rollout]) -> None:
        self.benchmark, self.samples, self.problems, self.rollouts = benchmark, samples, problems, rollouts


class RolloutDataModule(LightningDataModule):
    """Makes the roll-outs that each epoch trains on, and those that evaluations count.

    Args:
        task: Problems and their verifier.
        engine: What draws the roll-outs.
        sampling: How tokens are drawn.
        prompts_per_epoch: Problems in an epoch, over all ranks.
        rollouts_per_prompt: Roll-outs of each problem, the K of the group.
        minibatches: Optimiser steps in an epoch; each takes an equal share of the problems, and is cut into
            `--trainer.accumulate_grad_batches` micro-batches of about equal size.
        benchmarks: What is evaluated, by name; null is the training task's held-out problems, as `heldout`.
        eval_prompts: Problems in one batch of an evaluation, and what one that is stopped loses at most.
        max_prompt_tokens: Longest prompt, in tokens.
        overlong_prompts: What to do with a longer one: drop it and count it, or stop with an error. Data from files is
            counted at the start. Benchmarks keep all problems; there `error` stops at what is too long for the model.
        rescore: Take the policy's log-probs from the trainer's forward pass instead of from the sampler, and correct
            for the difference (`model.importance`). One more forward pass; needed where the two differ, as in bfloat16.
        ahead: Draw the next epoch's roll-outs while this one trains, on vLLM servers. They come from the weights before
            this epoch's updates; `model.importance` corrects for that, which takes `rescore`. Checkpoints hold them.
        verifier_workers: Processes that check completions, for tasks whose verifier is not trusted code.
        verifier_timeout_s: Time limit of one verdict, in seconds.
        verifier_memory_gb: Memory limit of a verifier process, in GiB; on Linux only.
        max_fault_share: Stop when the verifier itself fails on more than this share of an epoch's roll-outs; below it
            they count as wrong.
        seed: Seed of every random stream; the command line sets it by `--seed_everything`.
    """

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
                "the roll-outs of a prompt with each other"
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
            raise ConfigError("data.sampling.temperature is 0: K equal roll-outs teach nothing; take 1 for training")
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

        self.epoch: EpochBatch | None = None
        """The roll-outs of the epoch that is being trained on; callbacks read them."""
        self.evaluated: dict[str, set[str]] = {}
        """Names of the problems whose results are known already, by benchmark; the `Evaluation` callback knows them."""
        self.stop_signal = StopSignal()
        """Whether the run was asked to end; the `SafeStop` callback listens for that."""
        self._clock = Clock()
        self._ahead = Ahead()
        self._restored: list[dict[str, Any]] = []
        self._synced: int | None = None
        self._made: Batches[MicroBatch] | None = None
        self._begun: dict[str, Any] | None = None  # the state at the beginning of the epoch that is made or trained on
        self._epochs = 0
        self._cursor = 0
        self._overlong = 0
        self._longest = max_prompt_tokens  # as far as the model has positions
        self._problems: Sequence[Problem] = ()
        self._order: tuple[int, Tensor] | None = None
        self._eval_problems: dict[str, Sequence[Problem]] = {}
        self._verifiers: dict[int, Verifier] = {}

    # -- the way of the data ---------------------------------------------------------------------------------------

    def train_dataloader(self) -> Batches[MicroBatch]:
        """The batch of roll-outs that the next epoch trains on.

        When Lightning resumes, it asks twice before the first step; the second time it gets the same batch.
        """
        if self._made is None:
            self._begun = self._position()
            self._made = self._make_epoch()
        return self._made

    def newest_batches(self, n: int) -> list[MicroBatch]:
        """The micro-batches that were trained on last, on the CPU.

        Args:
            n: How many.
        """
        return self._made.newest(n) if self._made is not None else []

    def finish_epoch(self) -> None:
        """The epoch was trained on; the module says so at its end."""
        self._made = self._begun = None

    def _make_epoch(self) -> Batches[MicroBatch]:
        """Prompts, roll-outs, verdicts, advantages, teacher, credit, micro-batches."""
        trainer, module = self._trainer, self._module
        method = module.method.at(trainer.global_step)
        clock = self._clock = Clock()
        with self.computing():
            problems, prompts, seeds = self._draw_prompts(self._epochs)

            with self.stop_signal.may_end(trainer):
                with clock("rollout"):
                    drawn, sampling_s = self._draw_epoch(problems, prompts, seeds)
                with clock("verify"):
                    rollouts = self._collect_verdicts(problems, drawn)
            rewards = torch.tensor([r.verdict.reward for r in rollouts if r.verdict])
            groups = torch.tensor([r.group for r in rollouts])
            with clock("advantages"):
                shaped = method.shape_rewards(rewards, groups, [r.text for r in rollouts])
                advantages = group_advantages(shaped, groups, method.normalize_std)

            # A response without any token has its share in rewards and advantages, and nothing that could be learnt.
            spoken = torch.tensor([len(r.response_ids) > 0 for r in rollouts])
            wanted = method.uses_teacher(advantages, rewards) & spoken
            scored = module.policy.scored = Scored()
            trainable = method.may_train(advantages, rewards) & spoken
            with self.stop_signal.may_end(trainer), clock("rescore"):
                if self.rescore:
                    self._rescore(rollouts, trainable)
            faults = non_finite_log_probs(rollouts)
            unusable = torch.tensor([i in faults for i in range(len(rollouts))])
            logp_sampler, logp_old, rescored = log_probs(rollouts, unusable)
            advantages, wanted = advantages.masked_fill(unusable, 0.0), wanted & ~unusable
            with self.stop_signal.may_end(trainer), clock("teacher"):
                contexts = module.teacher.contexts(
                    method.context,
                    problems,
                    rollouts,
                    method.successful(rewards) & ~unusable,
                    self.seed,
                    self._epochs,
                    0,
                    places=range(trainer.global_rank, self.prompts_per_epoch, trainer.world_size),
                    policy=module.policy,
                )
                contexts = [c if w else None for c, w in zip(contexts, wanted.tolist(), strict=True)]
                teacher, truncated = module.teacher.score(
                    module.policy,
                    problems,
                    rollouts,
                    contexts,
                    self.sampling.temperature,
                    method.context,
                    top_k=method.needs.top_k,
                    engine=self._scoring_engine(),
                )
                self.engine.release()

        for i, score in enumerate(teacher):
            if score is not None and (wrong := not_finite(vars(score))):
                faults[i], teacher[i] = f"the teacher's {wrong}", None
        contexts = [None if score is None else c for c, score in zip(contexts, teacher, strict=True)]
        mask = pad_rows([torch.ones(len(r.response_ids)) for r in rollouts]).bool()
        importance = importance_weights(logp_old, logp_sampler, mask, module.importance, module.importance_cap)
        logp_teacher = pad_rows([s.logp if s else None for s in teacher], width=mask.shape[1])
        has_context = torch.tensor([c is not None for c in contexts])
        # Both sides of D_t from the same arithmetic.
        logp_student = logp_sampler if module.teacher.scored_by == "engine" else logp_old
        teacher_entropy = None
        if method.needs.entropy:
            teacher_entropy = pad_rows([s.entropy if s else None for s in teacher], width=mask.shape[1])
        figures = advantages, rewards, logp_student, logp_teacher, mask, has_context
        credit = method.credit(Signals(*figures, teacher_entropy, self._sum_over_ranks)).without(unusable)
        if self.rescore and (credit.trains & ~trainable).any():
            raise ConfigError(
                f"model.method: {type(method).__name__} trains on rollouts that its may_train leaves out, which "
                "data.rescore has therefore not corrected for the sampler; override may_train"
            )

        stats = {**statistics(rollouts, rewards, groups), **clock.stats}
        stats["faults/rollouts"] = float(self._sum_over_ranks(torch.tensor(float(len(faults)))))
        if self.rescore:
            compared = mask & rescored[:, None]
            stats |= mismatch((logp_old - logp_sampler)[compared], importance[compared] == module.importance_cap)
        if sampling_s:  # not known of roll-outs that a checkpoint held
            stats["speed/rollout_tokens_per_s"] = float(mask.sum()) / sampling_s
        if scored.places:
            tokens, seconds = float(scored.tokens), stats["time/rescore"] + stats["time/teacher"]
            stats["speed/score_tokens_per_s"] = tokens / max(seconds, 1e-9)
            stats["speed/score_padding"] = Mean(1 - tokens / scored.places, scored.places)
        stats["rollout/overlong_prompts"] = float(self._overlong)
        stats["rollout/shaped_reward"] = float(shaped.mean())
        stats["signal/context_truncated"] = float(truncated)
        self._epochs += 1
        self.epoch = EpochBatch(
            problems=problems,
            rollouts=rollouts,
            rewards=rewards,
            advantages=advantages,
            mask=mask,
            logp_old=logp_old,
            importance=importance,
            contexts=contexts,
            teacher=teacher,
            logp_student=logp_student,
            logp_teacher=logp_teacher,
            credit=credit,
            stats=stats,
            faults=faults,
        )
        return micro_batches(
            self.epoch,
            self.minibatches,
            trainer.accumulate_grad_batches,
            module.aggregation,
            self.sampling.temperature,
            trainer.world_size,
            self._sum_over_ranks(mini_batch_sizes(self.epoch, self.minibatches)),
            partial(gather, trainer),
            module.policy.shares_prompts,
        )

    def _draw_prompts(self, epoch: int) -> tuple[list[Problem], list[list[int]], list[int]]:
        """The epoch's problems with the tokens of their prompts and a seed each, this rank's share of them."""
        problems: list[Problem] = []
        prompts: list[list[int]] = []
        missed = 0
        while len(problems) < self.prompts_per_epoch:
            if missed >= min(len(self._problems), MOST_MISSES):
                raise ConfigError(
                    f"data.max_prompt_tokens is {self._longest}: each of {missed} prompts in a row was longer"
                )
            problem = self._problems[self._row(self._cursor)]
            self._cursor += 1
            ids = self._encode(problem)
            if ids is None:
                self._overlong, missed = self._overlong + 1, missed + 1
            else:
                problems.append(problem)
                prompts.append(ids)
                missed = 0
        ranks = slice(self._trainer.global_rank, None, self._trainer.world_size)
        seeds = [derive_seed(self.seed, "rollouts", epoch, i) for i in range(len(problems))]
        return problems[ranks], prompts[ranks], seeds[ranks]

    def _draw_epoch(
        self, problems: Sequence[Problem], prompts: Sequence[list[int]], seeds: Sequence[int]
    ) -> tuple[list[Drawn], float]:
        """The epoch's roll-outs, and the seconds that drawing them took: what was drawn ahead where there is something,
        and then the next epoch's are begun."""
        start = time.perf_counter()
        epoch = self.task, problems, prompts, self.rollouts_per_prompt, self.sampling, seeds
        restored, self._restored = self._restored, []
        if restored:
            drawn, seconds = self._restore(restored, problems, prompts), 0.0
        elif (taken := self._ahead.take()) is not None:
            drawn, seconds = taken
        else:
            drawn = self._roll_out(*epoch)
            seconds = time.perf_counter() - start - self._clock.stats.get("time/sync", 0.0)
        if self.ahead and self._trainer.current_epoch + 1 != self._trainer.max_epochs:
            self._begin_next_epoch()
        return drawn, seconds

    def _begin_next_epoch(self) -> None:
        """Leaves no trace in what decides the next epoch, which comes to the same prompts and seeds by itself."""
        before = self._cursor, self._overlong
        problems, prompts, seeds = self._draw_prompts(self._epochs + 1)
        self._cursor, self._overlong = before
        self._sync_engine()
        self._ahead.begin(self._drawing(self.task, problems, prompts, self.rollouts_per_prompt, self.sampling, seeds))

    def _restore(
        self, rows: Sequence[dict[str, Any]], problems: Sequence[Problem], prompts: Sequence[list[int]]
    ) -> list[Drawn]:
        """What had been drawn ahead when the checkpoint was saved."""
        policy, verifier = self._module.policy, self.verifier(self.task)
        rank, ranks = self._trainer.global_rank, self._trainer.world_size
        drawn = []
        for row in rows:
            group, of_rank = divmod(row["place"], ranks)
            if of_rank != rank:
                continue
            figures = {name: value for name, value in row.items() if name not in ("place", "group")}
            rollout = Rollout(group, prompt_ids=prompts[group], text=policy.decode(row["response_ids"]), **figures)
            drawn.append((rollout, verifier.submit(problems[group], rollout.text)))
        return drawn

    def _roll_out(
        self,
        task: Task,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Drawn]:
        """Roll-outs by the policy as it is now, in the order in which they finished."""
        self._ahead.wait()
        self._sync_engine()
        drawn = []
        with self._progress("roll-outs", len(prompts) * n) as bar:
            for pair in self._drawing(task, problems, prompts, n, sampling, seeds):
                drawn.append(pair)
                bar.update()
        return drawn

    def _drawing(
        self,
        task: Task,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> Iterator[Drawn]:
        """Roll-outs as they finish. Each goes to the verifier at once, so that verification runs beside generation."""
        verifier = self.verifier(task)
        for rollout in self.engine.generate(prompts, n, sampling, seeds):
            yield rollout, verifier.submit(problems[rollout.group], rollout.text)

    def _sync_engine(self) -> None:
        if self._synced != self._trainer.global_step or not self.engine.ready:
            with self._clock("sync"):
                self.engine.sync(self._module.policy)
            self._synced = self._trainer.global_step

    def _collect_verdicts(
        self, problems: Sequence[Problem], drawn: Sequence[tuple[Rollout, Future[Verdict]]]
    ) -> list[Rollout]:
        """The roll-outs with their verdicts, by problem; says which verdicts are the verifier's own failures."""
        rollouts, faults = [], []
        with self._progress("verdicts", len(drawn)) as bar:
            for rollout, pending in sorted(drawn, key=lambda pair: (pair[0].group, pair[0].index)):
                rollout.verdict = pending.result()
                rollouts.append(rollout)
                if rollout.verdict.fault:
                    faults.append(f"{problems[rollout.group].id}: {rollout.verdict.message}")
                bar.update()
        if not faults:
            return rollouts
        log.warning("the verifier failed on %d of %d roll-outs, such as %s", len(faults), len(rollouts), faults[0])
        if len(faults) > self.max_fault_share * len(rollouts):
            raise ConfigError(
                f"the verifier failed on {len(faults)} of {len(rollouts)} roll-outs, more than data.max_fault_share "
                f"({self.max_fault_share}) allows; the first: {faults[0]}"
            )
        return rollouts

    def _rescore(self, rollouts: Sequence[Rollout], needed: Tensor) -> None:
        """Computes the policy's own log-probs of the rollouts that use them (`Rollout.logp_policy`)."""
        chosen = [r for r, used in zip(rollouts, needed.tolist(), strict=True) if used]
        scores = self._module.policy.score([(r.prompt_ids, r.response_ids) for r in chosen], self.sampling.temperature)
        for rollout, logp in zip(chosen, scores, strict=True):
            rollout.logp_policy = logp

    # -- evaluation ------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> list[Batches[list[int]]]:
        """For each benchmark its problems' numbers in batches; `evaluate` does the work."""
        rank, ranks = self._trainer.global_rank, self._trainer.world_size
        loaders = []
        for problems in self._eval_problems.values():
            mine = list(range(rank, len(problems), ranks))
            # All ranks take as many batches, or one would wait for the others for ever; the last may be empty.
            starts = range(0, -(-len(problems) // ranks), self.eval_prompts)
            loaders.append(Batches([mine[i : i + self.eval_prompts] for i in starts]))
        return loaders

    test_dataloader = predict_dataloader = val_dataloader

    def evaluate(self, benchmark: int, indices: Sequence[int]) -> Evaluated:
        """Rolls some problems of a benchmark out, those that are not in `evaluated` yet. The seeds depend on the
        problem alone: evaluations of one run differ by the policy only.

        Args:
            benchmark: Number of the benchmark.
            indices: Numbers of its problems.
        """
        name, spec = list(self.benchmarks.items())[benchmark]
        task, sampling = spec.task or self.task, spec.sampling or self.sampling
        finished = self.evaluated.get(name, set())
        indices = [i for i in indices if self._eval_problems[name][i].id not in finished]
        problems = [self._eval_problems[name][i] for i in indices]
        if not any(gather(self._trainer, bool(problems))):  # ranks may share an engine, or each other's weights
            return Evaluated(name, spec.samples, [], [])
        seeds = [derive_seed(self.seed, "evaluation", name, i) for i in indices]
        with self.stop_signal.may_end(self._trainer):
            return Evaluated(name, spec.samples, problems, self.draw(task, problems, spec.samples, sampling, seeds))

    def draw(
        self, task: Task, problems: Sequence[Problem], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Roll-outs with their verdicts, ordered by problem.

        Args:
            task: Whose verifier judges them.
            problems: The problems, which `Rollout.group` counts.
            n: Roll-outs of each problem.
            sampling: How they are drawn.
            seeds: A seed for each problem.
        """
        with self.computing():
            prompts = [self._reader.tokens(p) for p in problems]
            drawn = self._roll_out(task, problems, prompts, n, sampling, seeds)
        return self._collect_verdicts(problems, drawn)

    @property
    def training_problems(self) -> Sequence[Problem]:
        """The problems that are trained on, over all ranks; known after `setup` for training."""
        return self._problems

    def benchmark_problems(self, name: str) -> Sequence[Problem]:
        """The problems of a benchmark, over all ranks; known after `setup`."""
        return self._eval_problems[name]

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Lightning's first hook, before the loggers write anything."""
        if self._trainer.is_global_zero:
            own_metrics(self._trainer)

    def setup(self, stage: str) -> None:
        """Reads the data and checks what can be checked before the weights are loaded."""
        self._synced = self._made = self._begun = self._order = None
        policy = self._module.policy
        _ = policy.tokenizer, policy.end_tokens, Stops.of(policy, self.sampling)
        self._reader = PromptReader(policy, self.overlong_prompts)
        limit = policy.max_positions
        self._longest = self.max_prompt_tokens if limit is None else min(self.max_prompt_tokens, limit - 1)
        if stage == "fit":
            self._set_up_trainer()
            if self._trainer.current_epoch == 0:  # a run that is resumed loads its place after this
                self._epochs = self._cursor = self._overlong = 0
            self._problems = read_problems(self.task, "train", "data.task")
            if not len(self._problems):
                raise ConfigError("data.task: there are no problems to train on")
            self._check_context()
            self._check_embeddings()
            self._check_cuts()
            self._check_ahead()
            self._scoring_engine()
            self._reader.check_lengths(
                "data.task", self._problems, "data.max_prompt_tokens", self._longest, "they are left out"
            )
        for name, spec in self.benchmarks.items():
            where = f"data.benchmarks.{name}"
            ranges = {
                "samples": (spec.samples, spec.samples >= 1, "at least 1"),
                "limit": (spec.limit, spec.limit is None or spec.limit >= 1, "at least 1, or null"),
            }
            check_ranges(where, ranges)
            problems = read_problems(spec.task or self.task, "heldout", where)
            if not len(problems):
                raise ConfigError(f"{where}: there are no problems to evaluate on")
            problems = problems[: spec.limit] if spec.limit is not None else problems
            if limit is not None:
                self._reader.check_lengths(
                    where, problems, "the longest prompt of the model", limit - 1, "they count like the others"
                )
            self._reader.check_embeddings(problems)
            if spec.sampling is not None:
                Stops.of(policy, spec.sampling, f"{where}.sampling")
            self._eval_problems[name] = problems
        for task in (self.task, *(spec.task for spec in self.benchmarks.values())):
            if task is not None:
                self.verifier(task)  # refuses one that cannot be sent to its processes before any rollout is drawn

    def teardown(self, stage: str) -> None:
        """Ends the engine and the verifier's worker processes."""
        self.engine.close()  # what is on its way ahead ends with it
        self._ahead = Ahead()
        for verifier in self._verifiers.values():
            verifier.close()
        self._verifiers.clear()

    def state_dict(self) -> dict[str, Any]:
        """How far the prompts have been read: with the seed, all that an exact resume needs between two epochs, beside
        the roll-outs that were drawn ahead. In the middle of the updates also what is left of the epoch, on each rank:
        its roll-outs were made by weights that are no more. All ranks have to ask."""
        if self._made is None:
            return self._begun or {**self._position(), **self._drawn_ahead()}
        if not self._made.given:
            return self._begun or self._position()
        own = {
            "given": self._made.given,
            "left": [vars(batch) for batch in self._made.left],
            "figures": self._module.figures_so_far(),
        }
        state = {"under_way": gather(self._trainer, own), "accumulate": self._trainer.accumulate_grad_batches}
        return {**self._position(), **self._drawn_ahead(), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`.

        Raises:
            ConfigError: If the rest of an epoch cannot be dealt out as it was.
        """
        self._epochs, self._cursor, self._overlong = (state_dict[k] for k in ("epochs", "cursor", "overlong"))
        self._restored = state_dict.get("ahead", []) if self.ahead else []
        ranks, trainer = state_dict.get("under_way"), self._trainer
        if trainer.state.fn != "fit":
            return
        trainer.num_sanity_val_steps = 0  # the measurement before training has been made
        if ranks is None:
            return
        if (len(ranks), state_dict["accumulate"]) != (trainer.world_size, trainer.accumulate_grad_batches):
            raise ConfigError(
                f"ckpt_path: this checkpoint was saved in the middle of an epoch that is dealt out to {len(ranks)} "
                f"ranks with trainer.accumulate_grad_batches={state_dict['accumulate']}; go on with the same, or from "
                "the checkpoint of the end of an epoch"
            )
        own = ranks[trainer.global_rank]
        self._made = Batches([MicroBatch(**batch) for batch in own["left"]], own["given"])
        self._module.go_on_with(own["figures"])

    def _position(self) -> dict[str, Any]:
        return {"epochs": self._epochs, "cursor": self._cursor, "overlong": self._overlong}

    def _drawn_ahead(self) -> dict[str, Any]:
        """The next epoch's roll-outs of all ranks, waited for unless there is no time: who resumes then draws anew."""
        if not self.ahead:
            return {}
        rank, ranks = self._trainer.global_rank, self._trainer.world_size
        rows = [] if self.stop_signal.number is not None else self._ahead.rows()
        every = gather(self._trainer, [{**row, "place": row["group"] * ranks + rank} for row in rows])
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

    def _set_up_trainer(self) -> None:
        """Puts our defaults in the place of Lightning's, where a script left these as they are, and checks them."""
        trainer = self._trainer
        changed = []
        for name, (theirs, ours) in TRAINER.items():
            if getattr(trainer, name) == theirs:
                setattr(trainer, name, ours)
                changed.append(f"{name}={-1 if ours == math.inf else ours}")
        if changed:
            rank_zero_info("trainer: %s, in place of Lightning's defaults", ", ".join(changed))
        check_trainer(trainer, self)
        check_limits(trainer)
        steps = self.minibatches * trainer.accumulate_grad_batches
        interval = trainer.val_check_interval
        if isinstance(interval, int) and interval > steps and trainer.check_val_every_n_epoch is not None:
            raise ConfigError(
                f"trainer.val_check_interval is {interval}; an epoch has {steps} batches, data.minibatches times "
                "trainer.accumulate_grad_batches"
            )
        if trainer.reload_dataloaders_every_n_epochs != 1:
            raise ConfigError(RELOAD)
        if self.prompts_per_epoch % (self.minibatches * trainer.world_size):
            raise ConfigError(
                f"data.prompts_per_epoch ({self.prompts_per_epoch}) has to be a multiple of data.minibatches "
                f"({self.minibatches}) times the number of ranks ({trainer.world_size})"
            )

    def _scoring_engine(self) -> ScoringEngine | None:
        """The engine, where it scores for the teacher.

        Raises:
            ConfigError: If it cannot.
        """
        if self._module.teacher.scored_by == "trainer":
            return None
        wrong = None
        if not isinstance(self.engine, ScoringEngine):
            wrong = f"{type(self.engine).__name__} does not score; take a vLLM engine"
        elif self._module.method.needs.entropy or self._module.method.needs.top_k != 0:
            wrong = f"{type(self._module.method).__name__} needs the teacher's whole distribution"
        elif self.sampling.temperature != 1:
            wrong = "vLLM scores at temperature 1 only"
        elif self.engine.cuts_before_logp and self.sampling.cuts:
            wrong = (
                "data.sampling cuts the distribution (top_p, top_k or min_p): the engine gives the student's log-probs "
                "after the cut, and the teacher's before it"
            )
        if wrong is not None:
            raise ConfigError(f"model.teacher.scored_by is engine, but {wrong}; or set it to trainer")
        return cast(ScoringEngine, self.engine)

    def _check_cuts(self) -> None:
        if self.engine.cuts_before_logp and self.sampling.cuts and not self.rescore:
            raise ConfigError(
                "data.sampling cuts the distribution (top_p, top_k or min_p), and this engine gives log-probs after "
                "the cut: set data.rescore=true, so that the trainer computes those of the policy"
            )

    def _check_ahead(self) -> None:
        if not self.ahead:
            return
        wrong = None
        if not self.engine.beside_training:
            wrong = f"{type(self.engine).__name__} cannot draw while the policy trains; take VllmServerEngine"
        elif not self.rescore or self._module.importance == "off":
            wrong = "the roll-outs are an epoch old: set data.rescore=true, and model.importance to token or sequence"
        elif self._module.teacher.scored_by == "engine":
            wrong = "the engine scores with newer weights than it sampled with: set model.teacher.scored_by=trainer"
        if wrong is not None:
            raise ConfigError(f"data.ahead is true, but {wrong}")

    def _check_context(self) -> None:
        """A teacher without any context would make the method plain GRPO without a word."""
        kind = self._module.method.context
        if kind not in ("solution", "answer"):
            return
        first = self._problems[:100]
        if all(getattr(problem, kind) is None for problem in first):
            raise ConfigError(
                f"model.method.context is {kind}, but none of the first {len(first)} training problems has one; name "
                f"the data's column in data.task.{kind}, or take another context"
            )

    def _check_embeddings(self) -> None:
        """Finds prompts of the policy and the teacher that hold tokens which the model has no embedding for."""
        module, kind = self._module, self._module.method.context

        def teachers(problem: Problem) -> None:
            if kind != "none":
                context = getattr(problem, kind, None) if kind in ("solution", "answer") else None
                module.teacher.prompt(module.policy, problem, "1" if context is None else str(context), kind)

        teachers(Problem("template", "?"))
        self._reader.check_embeddings(self._problems, teachers)

    def example(self, stage: str) -> Problem | None:
        """The first problem of a stage whose prompt is not too long, to be shown; None where there is none."""
        problems = chain.from_iterable(self._eval_problems.values())
        if stage == "fit":
            problems = chain(self._problems[self._row(i)] for i in range(len(self._problems)))
        first, most = islice(problems, MOST_MISSES), self.max_prompt_tokens
        return next((p for p in first if self._reader.measured(p, most)[0] <= most), None)

    def _row(self, position: int) -> int:
        """Which row comes at a position of the endless, shuffled order of prompts."""
        round_, place = divmod(position, len(self._problems))
        if self._order is None or self._order[0] != round_:
            shuffle = generator(self.seed, "prompts", round_)
            self._order = round_, torch.randperm(len(self._problems), generator=shuffle)
        return int(self._order[1][place])

    def _encode(self, problem: Problem) -> list[int] | None:
        """Tokens of a prompt, or None where it is too long and dropped."""
        tokens, ids = self._reader.measured(problem, self._longest)
        if tokens <= self._longest:
            return ids
        if self.overlong_prompts == "error":
            raise ConfigError(
                f"problem {problem.id}: its prompt has {tokens} tokens, more than data.max_prompt_tokens or the "
                f"model allow ({self._longest}); shorten it or set data.overlong_prompts to drop"
            )
        return None

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
        """The trainer's autocast, which Lightning itself enters for its own steps only; new tensors are float32, which
        Lightning changes under `--trainer.precision=bf16-true`."""
        precision = self._trainer.precision_plugin
        context = precision.forward_context() if isinstance(precision, MixedPrecision) else nullcontext()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with context:
                yield
        finally:
            torch.set_default_dtype(before)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        trainer = self._trainer
        return trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op="sum").cpu()

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Any]:
        shown = self._trainer.progress_bar_callback
        hidden = shown is None or getattr(shown, "is_disabled", False) or self._trainer.sanity_checking
        with tqdm(total=total, desc=what, leave=False, disable=hidden, dynamic_ncols=True) as bar:
            yield bar
