"""Shows example prompts before any rollout is drawn."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlrt_lightning.contexts import FEEDBACK, VERDICTS
from rlrt_lightning.objective import Method
from rlrt_lightning.policy.chat import is_tag, special_tokens
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.texts import CLOSING_TAG, MARK, OPENING_TAG
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.tasks import Problem
from rlrt_lightning.teacher import Teacher

from .boards import log_text
from .parts import data_of

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule

MAX_CHARACTERS = 4000
"""Characters of a prompt that are shown; the middle of a longer one is omitted."""

PLACEHOLDERS = {"feedback": "(the verifier's message on a response)"}
"""Placeholders for contexts that come from rollouts; `(a correct response)` for any other kind."""


class PromptPreview(Callback):
    """Shows an example prompt as the model reads it, with special tokens, and in training one of the teacher.

    Prompts are logged before the weights are loaded, and given to the loggers (TensorBoard, W&B, MLflow) as the texts
    `prompts/student` and `prompts/teacher`, with the problem's solution or answer if the data has one. Warns of prompts
    that end in an end token, of words that the tokenizer does not know, of stop strings and thinking tags that are
    special tokens, and of special tokens in a prompt that the tokenizer does not have.
    """

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Shows the prompts. Runs on all ranks, so that an error ends all of them."""
        module, data = cast("RLRTModule", pl_module), data_of(trainer)
        problem, policy = data.example(stage), module.policy
        if problem is None:
            return
        prompts = {"student": policy.encode_prompt(problem.prompt)}
        if stage == "fit" and module.method.context != "none":
            prompts["teacher"] = _teacher_prompt(module.teacher, policy, problem, module.method)
        self._texts = {who: _truncate(_as_text(policy, ids)) for who, ids in prompts.items()}
        for who, text in self._texts.items():
            rank_zero_info("%s prompt, %d tokens:\n%s", who, len(prompts[who]), textwrap.indent(text, "    "))
        samplings = [data.sampling, *(spec.sampling for spec in data.benchmarks.values())]
        stops = dict.fromkeys(stop for sampling in samplings if sampling is not None for stop in sampling.stop)
        if trainer.is_global_zero:
            for message in warnings(policy, prompts, list(stops)):
                logging.getLogger(__name__).warning(message)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the prompts to the loggers once. This creates the run's folder, so it waits until the run starts."""
        for who, text in self._texts.items():
            log_text(trainer, f"prompts/{who}", text, trainer.global_step)
        self._texts = {}

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _write


def warnings(policy: Policy, prompts: dict[str, list[int]], stops: Sequence[str]) -> Iterator[str]:
    """Yields a message for each likely mistake in the prompts and stop strings.

    Args:
        policy: The policy, with the tokenizer.
        prompts: Token ids, by reader (student, teacher).
        stops: The stop strings.
    """
    special, known = special_tokens(policy.tokenizer), policy.tokenizer.get_vocab()
    for who, ids in prompts.items():
        last = next((i for i in reversed(ids) if _as_text(policy, [i]).strip()), None)
        if last in policy.end_tokens:
            yield (
                f"the {who} prompt ends in the end token {_as_text(policy, [last])!r}; check that the chat template "
                "starts the response (add_generation_prompt)"
            )
    yield from _unknown_words(policy, prompts["student"])
    for stop in stops:
        if found := [token for token in special if token in stop]:
            seen = "include" if policy.decode([special[found[0]]]) else "omit"
            yield f"the stop string {stop!r} has the special token {found[0]!r}, which completions {seen}"
    for token, id in special.items():
        if id in policy.end_tokens and is_tag(token, known):
            yield f"{token!r} ends responses, and completions omit it like any end token"
    for tag in (OPENING_TAG, CLOSING_TAG):
        if tag in special:
            yield f"{tag} is a special token of this tokenizer, but completions include it"


def _unknown_words(policy: Policy, ids: list[int]) -> Iterator[str]:
    """The teacher's prompt is not checked: in the preview, its context is a placeholder."""
    tokenizer = policy.tokenizer
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}  # as in GPT-2's tokenizer
    if (unknown := tokenizer.unk_token_id) not in others and (count := ids.count(cast(int, unknown))):
        yield (
            f"{count} of the {len(ids)} tokens of the student prompt are {tokenizer.unk_token}: the tokenizer does not "
            "have these words, and the model reads the same token for all of them; use other words or another model"
        )


def _teacher_prompt(teacher: Teacher, policy: Policy, problem: Problem, method: Method) -> list[int]:
    kind = method.context
    placeholder = PLACEHOLDERS.get(kind, "(a correct response)")
    dummy = Rollout(0, 0, [], [], torch.zeros(0), False, "")
    (context,) = teacher.contexts(kind, [problem], [dummy], torch.tensor([False]))
    if kind == "sibling":
        context = problem.solution
    remarks = {"none": "", "verdict": VERDICTS[True], "feedback": FEEDBACK + PLACEHOLDERS["feedback"]}
    remark = remarks[method.needs.remark]
    ids, _ = teacher.prompt(policy, problem, context or placeholder, kind, policy.max_positions, remark)
    return ids or teacher.prompt(policy, problem, placeholder, kind, remark=remark)[0]


def _as_text(policy: Policy, ids: Sequence[int]) -> str:
    """Decodes tokens, including special ones."""
    text = policy.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _truncate(text: str) -> str:
    half = MAX_CHARACTERS // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]}{MARK}{text[-half:]}"
