"""Shows what the models read before anything is drawn."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlrt_lightning.objective.methods import Context
from rlrt_lightning.policy.chat import is_tag, special_tokens
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.texts import CLOSING_TAG, MARK, OPENING_TAG
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.tasks import Problem
from rlrt_lightning.teacher import Teacher

from .boards import tensorboards

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule
    from rlrt_lightning.module import RLRTModule

LONGEST = 4000
"""Characters of a prompt that are shown; a longer one is truncated in its middle."""

PLACEHOLDERS = {"feedback": "(what the verifier says of a response)"}
"""Stand for contexts that are not known before there are rollouts; for any other kind, `(a correct response)`."""

# Chat templates write special tokens in these forms; as plain text, a model would hardly have seen them.
_MARKER = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|<(?:start|end)_of_\w+>")


class PromptPreview(Callback):
    """Shows one prompt as the model reads it, special tokens included, and in training one of the teacher's.

    They go to the log before the weights are loaded, and to TensorBoard's text page as `prompts/student` and
    `prompts/teacher`, with the problem's solution or answer where the data has one. Warns of prompts that end in an
    end token, of stop strings and thinking tags that are special tokens, and of special tokens in a prompt that the
    tokenizer does not have.
    """

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Shows the prompts. On all ranks, since what is wrong with one has to end them all."""
        module, data = cast("RLRTModule", pl_module), cast("RolloutDataModule", cast(Any, trainer).datamodule)
        problem, policy = data.example(stage), module.policy
        if problem is None:
            return
        prompts = {"student": policy.encode_prompt(problem.prompt)}
        if stage == "fit" and module.method.context != "none":
            prompts["teacher"] = _teacher_prompt(module.teacher, policy, problem, module.method.context)
        self._texts = {who: _clipped(_written(policy, ids)) for who, ids in prompts.items()}
        for who, text in self._texts.items():
            rank_zero_info("a prompt of the %s, %d tokens:\n%s", who, len(prompts[who]), textwrap.indent(text, "    "))
        samplings = [data.sampling, *(spec.sampling for spec in data.benchmarks.values())]
        stops = dict.fromkeys(stop for sampling in samplings if sampling is not None for stop in sampling.stop)
        if trainer.is_global_zero:
            for doubt in doubts(policy, prompts, list(stops)):
                logging.getLogger(__name__).warning(doubt)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once; not before the run is sure to start, as it makes the run's folder."""
        for who, text in self._texts.items():
            for board in tensorboards(trainer):
                as_code = textwrap.indent(text, "    ", lambda line: True)
                board.add_text(f"prompts/{who}", as_code, trainer.global_step)
        self._texts = {}

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _write


def doubts(policy: Policy, prompts: dict[str, list[int]], stops: Sequence[str]) -> Iterator[str]:
    """What is seldom meant, a line each.

    Args:
        policy: Whose tokenizer reads the prompts.
        prompts: Token ids, by who reads them.
        stops: The stop strings.
    """
    special, known = special_tokens(policy.tokenizer), policy.tokenizer.get_vocab()
    for who, ids in prompts.items():
        last = next((i for i in reversed(ids) if _written(policy, [i]).strip()), None)
        if last in policy.end_tokens:
            yield (
                f"the prompt of the {who} ends in the end token {_written(policy, [last])!r}: does the chat template "
                "open the response (add_generation_prompt)?"
            )
        for marker in dict.fromkeys(_MARKER.findall(_written(policy, ids))):
            if marker not in known:
                pieces = len(policy.tokenizer(marker, add_special_tokens=False)["input_ids"])
                yield f"the prompt of the {who} has {marker!r}, which is no token of this tokenizer but {pieces}"
    for stop in stops:
        if found := [token for token in special if token in stop]:
            seen = "show it" if policy.decode([special[found[0]]]) else "leave it out"
            yield f"the stop string {stop!r} has the special token {found[0]!r}; the texts that are judged {seen}"
    for token, id in special.items():
        if id in policy.end_tokens and is_tag(token, known):
            yield f"responses end at {token!r}, which the texts that are judged leave out, as any end token"
    for tag in (OPENING_TAG, CLOSING_TAG):
        if tag in special:
            yield f"{tag} is a special token of this tokenizer; the texts that are judged show it all the same"


def _teacher_prompt(teacher: Teacher, policy: Policy, problem: Problem, kind: Context) -> list[int]:
    placeholder = PLACEHOLDERS.get(kind, "(a correct response)")
    nobody = Rollout(0, 0, [], [], torch.zeros(0), False, "")
    (context,) = teacher.contexts(kind, [problem], [nobody], torch.tensor([False]))
    if kind == "sibling":
        context = problem.solution
    ids, _ = teacher.prompt(policy, problem, context or placeholder, kind, policy.max_positions)
    return ids or teacher.prompt(policy, problem, placeholder, kind)[0]


def _written(policy: Policy, ids: Sequence[int]) -> str:
    """Tokens as text, special ones included."""
    text = policy.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text)


def _clipped(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}{MARK}{text[-half:]}"
