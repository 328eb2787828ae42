"""Refuses incompatible settings before the first rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from rlrt_lightning.contexts import FEEDBACK, VERDICTS
from rlrt_lightning.epoch.prompts import PromptReader
from rlrt_lightning.objective import Aggregation, Importance, Method
from rlrt_lightning.policy.chat import unknown_markers
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.rollouts import RolloutEngine, Sampling, ScoringEngine
from rlrt_lightning.runtime.errors import ConfigError, check_ranges
from rlrt_lightning.tasks import Problem
from rlrt_lightning.tasks.base import has_curriculum
from rlrt_lightning.teacher import Teacher


def check_data_settings(data: Any) -> None:
    """Checks the settings of a `RolloutDataModule` that need nothing else.

    Raises:
        ConfigError: If one is out of its range.
    """
    if data.rollouts_per_prompt < 2:
        raise ConfigError(
            f"data.rollouts_per_prompt is {data.rollouts_per_prompt}; it has to be at least 2, because advantages "
            "compare the rollouts of a prompt"
        )
    if data.minibatches < 1 or data.prompts_per_epoch < 1 or data.prompts_per_epoch % data.minibatches:
        raise ConfigError(
            f"data.prompts_per_epoch ({data.prompts_per_epoch}) has to be a multiple of data.minibatches "
            f"({data.minibatches})"
        )
    least = {
        "tokens_per_pass": 1 if data.tokens_per_pass is None else data.tokens_per_pass,
        "eval_prompts": data.eval_prompts,
        "sampling_rounds": data.sampling_rounds,
        "max_prompt_tokens": data.max_prompt_tokens,
        "verifier_workers": data.verifier_workers,
    }
    above = {"verifier_timeout_s": data.verifier_timeout_s, "verifier_memory_gb": data.verifier_memory_gb}
    check_ranges(
        "data",
        {
            **{name: (value, value >= 1, "1 or more") for name, value in least.items()},
            **{name: (value, 0 < value < math.inf, "above 0") for name, value in above.items()},
            "max_fault_share": (data.max_fault_share, 0 <= data.max_fault_share <= 1, "from 0 to 1"),
        },
    )
    buffer, longest = data.overlong_buffer, data.sampling.max_new_tokens
    if buffer is not None and not 1 <= buffer <= longest:
        raise ConfigError(
            f"data.overlong_buffer is {buffer}; it has to be from 1 to data.sampling.max_new_tokens ({longest}), or "
            "null"
        )
    if data.sampling.temperature == 0:
        raise ConfigError("data.sampling.temperature is 0, so all rollouts of a prompt are equal; set it to 1")


def scoring_engine(teacher: Teacher, method: Method, engine: RolloutEngine, sampling: Sampling) -> ScoringEngine | None:
    """The engine if it scores for the teacher, else None.

    Raises:
        ConfigError: If the engine cannot score with these settings.
    """
    if teacher.scored_by == "trainer":
        return None
    wrong = None
    if not isinstance(engine, ScoringEngine):
        wrong = f"{type(engine).__name__} cannot score; use a vLLM engine"
    elif method.needs.entropy or method.needs.top_k != 0:
        wrong = f"{type(method).__name__} needs the teacher's whole distribution"
    elif sampling.temperature != 1:
        wrong = "vLLM scores at temperature 1 only"
    elif engine.cuts_before_logp and sampling.cuts:
        wrong = (
            "data.sampling cuts the distribution (top_p, top_k or min_p): the engine returns the student's log-probs "
            "after the cut and the teacher's before it"
        )
    if wrong is not None:
        raise ConfigError(f"model.teacher.scored_by is engine, but {wrong}; or set it to trainer")
    return cast(ScoringEngine, engine)


def check_cuts(engine: RolloutEngine, sampling: Sampling, rescore: bool) -> None:
    """Refuses an engine whose log-probs are those of the truncated distribution, unless they are recomputed.

    Raises:
        ConfigError: If `data.rescore` is needed.
    """
    if engine.cuts_before_logp and sampling.cuts and not rescore:
        raise ConfigError(
            "data.sampling cuts the distribution (top_p, top_k or min_p), and this engine returns log-probs after "
            "the cut; set data.rescore=true, so that the trainer computes the policy's log-probs"
        )


def check_ahead(data: Any, importance: Importance, teacher: Teacher) -> None:
    """Checks that the next epoch's rollouts can be generated during training.

    Raises:
        ConfigError: If `data.ahead` does not work with the other settings.
    """
    wrong, engine, rescore = None, data.engine, data.rescore
    if not engine.beside_training:
        wrong = f"{type(engine).__name__} cannot generate while the policy trains; use VllmServerEngine"
    elif not rescore or importance == "off":
        wrong = "the rollouts are one epoch old; set data.rescore=true, and model.importance to token or sequence"
    elif teacher.scored_by == "engine":
        wrong = "the engine would score with newer weights than it sampled with; set model.teacher.scored_by=trainer"
    elif data.sampling_rounds > 1:
        wrong = "the next epoch's problems depend on how many rounds this one needs; set data.sampling_rounds=1"
    elif has_curriculum(data.task):
        wrong = (
            f"{type(data.task).__name__} chooses the next epoch's problems by this one's rewards; set data.ahead=false"
        )
    if wrong is not None:
        raise ConfigError(f"data.ahead is true, but {wrong}")


def check_method(method: Method, aggregation: Aggregation, rollouts: int, problems: Sequence[Problem]) -> None:
    """Checks a method against the other settings and the data.

    Args:
        method: The method.
        aggregation: `model.aggregation`.
        rollouts: `data.rollouts_per_prompt`.
        problems: The training problems.

    Raises:
        ConfigError: If they do not fit together.
    """
    name, needed = type(method).__name__, method.needs.aggregation
    if needed is not None and aggregation != needed:
        raise ConfigError(
            f"model.aggregation is {aggregation}, but the loss of {name} is defined for {needed}; set that"
        )
    if method.needs.wrong_siblings and rollouts < 3:
        raise ConfigError(
            f"data.rollouts_per_prompt is {rollouts}; it has to be at least 3, because model.method ({name}) compares "
            "each rollout with a successful and a failed sibling"
        )
    check_context(method, problems)


def check_context(method: Method, problems: Sequence[Problem]) -> None:
    """Refuses data without the method's context; training on it would silently be GRPO.

    Raises:
        ConfigError: If the problems have no solution or answer for the teacher.
    """
    kind = method.context
    if kind not in ("solution", "answer"):
        return
    first = problems[:100]
    if all(getattr(problem, kind) is None for problem in first):
        raise ConfigError(
            f"model.method.context is {kind}, but none of the first {len(first)} training problems has one; set "
            f"data.task.{kind} to the data's column, or use another context"
        )


def check_teacher_tokens(
    policy: Policy, teacher: Teacher, method: Method, problems: Sequence[Problem], reader: PromptReader
) -> None:
    """Checks that the chat template reads `Teacher.chat_kwargs`, and that the model has tokens for the markers of a
    chat format, and embeddings for all tokens, in the prompts of policy and teacher.

    Raises:
        ConfigError: If the template ignores a variable, or a prompt has a marker that is no token, or a token without
            an embedding.
    """
    policy.check_chat_kwargs(teacher.chat_kwargs, "model.teacher.chat_kwargs")
    kind = method.context
    remarks = {"none": "", "verdict": "".join(VERDICTS), "feedback": FEEDBACK}

    def teacher_prompt(problem: Problem) -> None:
        if kind != "none":
            shown = {"answer": problem.answer, "solution": problem.solution, "sibling_or_solution": problem.solution}
            context = shown.get(kind)
            remark = remarks[method.needs.remark]
            teacher.prompt(policy, problem, "1" if context is None else str(context), kind, remark=remark)

    teacher_prompt(Problem("template", "?"))
    reader.check_embeddings(problems, teacher_prompt)
    texts = {
        "model.teacher.template": teacher.template,
        "model.policy.system_prompt": policy.system_prompt,
        "the prompt of the first training problem (data.task.prompt_template)": str(problems[0].prompt),
    }
    for name, text in texts.items():
        if markers := unknown_markers(text or "", policy.tokenizer):
            raise ConfigError(
                f"{name} contains {markers[0]}, which is not a token of the model at {policy.path!r}: it belongs to "
                "another model's chat format; remove it, and the model's own chat template is used"
            )
