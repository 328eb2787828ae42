"""The teacher: the same model with a privileged context. Its weights, its contexts and its scores."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor

from rlrt_lightning.contexts import TEMPLATES, Shown, assign
from rlrt_lightning.objective.methods import Context
from rlrt_lightning.policy.copies import FrozenWeights
from rlrt_lightning.policy.log_probs import log_probs_at
from rlrt_lightning.policy.texts import opens_thinking, shortened, without_thinking
from rlrt_lightning.rollouts.base import Rollout, ScoringEngine
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.seeding import generator
from rlrt_lightning.tasks.base import Messages, Problem

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy


@dataclass(frozen=True)
class TeacherScore:
    """The teacher's scores of one rollout's T response tokens.

    Args:
        logp: log P_T of the tokens, nats, float32 [T].
        entropy: H(P_T) at each position, nats, float32 [T]; None if an engine scored.
        top_tokens: The student's k most likely tokens at each position, int32 [T, k]; k is 0 unless requested.
        top_logp: log P_T of `top_tokens`, nats, float32 [T, k].
    """

    logp: Tensor
    entropy: Tensor | None
    top_tokens: Tensor
    top_logp: Tensor


@final
class Teacher(FrozenWeights):
    """The policy as of its last refresh (see `TeacherRefresh`), with a privileged context.

    If it is refreshed every epoch, it is the policy that generated the rollouts and stores no weights.

    With adapters (`model.policy.lora`), a teacher that is never refreshed is the model without adapters; one that
    follows the policy stores a copy of the adapters only.

    Args:
        template: The teacher's prompt, with the fields `{prompt}` and `{context}`. In a conversation it replaces the
            last user message, before the chat template is applied. Null uses a template for mathematical problems that
            fits the method's kind of context. Some methods append a remark about the rollout itself (`AntiSD`, `SDPO`).
        max_context_tokens: Maximum context length, in tokens; null limits it only by the model's maximum length minus
            prompt and response. Over-long contexts are truncated in their middle, because answers are at the end, or
            dropped if nothing useful is left; see `signal/context_truncated`.
        strip_think: Remove the text between <think> and </think> from demonstrations.
        scored_by: "trainer": the trainer's forward pass with the teacher's weights. "engine": the rollout engine, which
            then computes both log-probs in D_t; requires vLLM, a teacher that is refreshed every epoch, and a method
            that needs only log-probs. The trainer and VllmColocateEngine read a demonstration once for all siblings,
            VllmServerEngine once per sibling.
        rest_on_cpu: Keep the teacher's full copy of the weights, if it has one, in CPU memory except while it scores:
            frees GPU memory during training, for two transfers per epoch. Also that of `model.reference_kl`.
        chat_kwargs: Variables of the chat template in the teacher's prompts, such as `enable_thinking: true`, which
            override those of `model.policy.chat_kwargs`; null uses the policy's.
    """

    def __init__(
        self,
        template: str | None = None,
        max_context_tokens: int | None = None,
        strip_think: bool = True,
        scored_by: Literal["trainer", "engine"] = "trainer",
        rest_on_cpu: bool = False,
        chat_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(rest_on_cpu)
        for name in ("{prompt}", "{context}"):
            if template is not None and name not in template:
                raise ConfigError(f"model.teacher.template has no {name}")
        if max_context_tokens is not None and max_context_tokens < 1:
            raise ConfigError(
                f"model.teacher.max_context_tokens is {max_context_tokens}; it has to be at least 1, or null"
            )
        self.template = template
        self.max_context_tokens = max_context_tokens
        self.strip_think = strip_think
        self.scored_by = scored_by
        self.chat_kwargs = chat_kwargs or {}

    # -- context ---------------------------------------------------------------------------------------------------

    def prompt(
        self,
        policy: Policy,
        problem: Problem,
        context: str,
        kind: Context = "sibling",
        room: int | None = None,
        remark: str = "",
    ) -> tuple[list[int], bool]:
        """The teacher's prompt.

        Args:
            policy: The policy, whose tokenizer and chat template are used.
            problem: The problem.
            context: The privileged context.
            kind: The kind of context.
            room: Maximum number of tokens of the prompt; None for no limit.
            remark: See `Shown`.

        Returns:
            Token ids, empty if nothing useful of the context is left or fits, and whether the context was truncated or
            dropped.
        """
        context = self._readable(policy, problem, context, kind)
        if not context.strip():
            return [], True

        def excess(text: str) -> int:
            """Number of tokens by which the context or the whole prompt exceeds its limit."""
            over = 0
            if self.max_context_tokens is not None:
                over = _count(policy, text) - self.max_context_tokens
            return over if room is None else max(over, len(self._fill(policy, problem, text, kind, remark)) - room)

        cut = excess(context) > 0
        if cut:
            context = shortened(context, excess, _count(policy, context))
        return (self._fill(policy, problem, context, kind, remark) if context else []), cut

    def limited(self, policy: Policy, text: str) -> str:
        """A text truncated to `max_context_tokens`."""
        limit = self.max_context_tokens
        if limit is None or (tokens := _count(policy, text)) <= limit:
            return text
        return shortened(text, lambda part: _count(policy, part) - limit, tokens)

    def _readable(self, policy: Policy | None, problem: Problem, context: str, kind: Context) -> str:
        """The context without its thinking."""
        if not self.strip_think or kind in ("answer", "feedback"):
            return context  # answers have no reasoning, and feedback may mention the tags
        inside = kind == "sibling" and policy is not None and opens_thinking(policy.prompt_text(problem.prompt))
        return without_thinking(context, inside)

    def _fill(self, policy: Policy, problem: Problem, context: str, kind: Context, remark: str = "") -> list[int]:
        template = self.template or TEMPLATES[kind]

        def fill(text: str) -> str:  # not str.format, because prompts and solutions contain braces
            parts = {"{prompt}": text, "{context}": context}
            return re.sub(r"\{prompt\}|\{context\}", lambda m: parts[m[0]], template) + remark

        prompt: str | Messages = problem.prompt
        if isinstance(prompt, str):
            return policy.encode_prompt(fill(prompt), self.chat_kwargs)
        filled = [*prompt[:-1], {**prompt[-1], "content": fill(prompt[-1]["content"])}]
        return policy.encode_prompt(filled, self.chat_kwargs)

    def contexts(
        self,
        kind: Context,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        successful: Tensor,
        *seed: int,
        indices: Sequence[int] | None = None,
        policy: Policy | None = None,
    ) -> list[str | None]:
        """The privileged context of each rollout; None for rollouts without one.

        With kind "sibling", a successful rollout is the demonstration of as many siblings as it fits. It gets another
        successful rollout itself, or no context if it is the only one. Demonstrations that have to be truncated, or
        whose text is all thinking, are used only if there is no better one.

        Args:
            kind: "sibling"; "solution" or "answer" of the problem; "feedback", the verifier's message about the rollout
                itself, unless the verifier failed; or "sibling_or_solution", the solution only without a sibling.
            problems: The problems, indexed by `Rollout.group`.
            rollouts: N rollouts.
            successful: True for rollouts that count as r = 1, bool [N].
            seed: Names the random stream that selects the demonstrations.
            indices: Index of each problem among those of all ranks, [P], so that the selection does not depend on the
                rank; None numbers them in order.
            policy: The policy, whose maximum length limits demonstrations; None for no limit.
        """
        if kind == "answer":
            return [problems[r.group].answer_text for r in rollouts]
        if kind == "solution":
            return [problems[r.group].solution for r in rollouts]
        if kind == "feedback":
            verdicts = [r.verdict for r in rollouts]
            return [(v.message or None) if v is not None and not v.fault else None for v in verdicts]
        siblings = self.siblings(problems, rollouts, successful, 1, *seed, "sibling", indices=indices, policy=policy)
        contexts: list[str | None] = [shown[0] if shown else None for shown in siblings]
        if kind == "sibling_or_solution":
            contexts = [
                c if c is not None else problems[r.group].solution for c, r in zip(contexts, rollouts, strict=True)
            ]
        return contexts

    def siblings(
        self,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        shown: Tensor,
        count: int,
        *seed: int | str,
        indices: Sequence[int] | None = None,
        policy: Policy | None = None,
    ) -> list[list[str]]:
        """Up to `count` rollouts of each rollout's group as demonstrations, never the rollout itself. The siblings in a
        group get the same ones as far as possible, see `contexts`.

        Args:
            problems: See `contexts`.
            rollouts: See `contexts`.
            shown: True for rollouts that may serve as demonstrations, bool [N].
            count: Largest number of demonstrations for a rollout.
            seed: See `contexts`.
            indices: See `contexts`.
            policy: See `contexts`.

        Returns:
            The demonstrations of each of the N rollouts.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for i in sorted(range(len(rollouts)), key=lambda i: rollouts[i].index):  # not in the order they finished
            groups[rollouts[i].group].append(i)
        found: list[list[str]] = [[] for _ in rollouts]
        for group, members in groups.items():
            able = [i for i in members if shown[i]]
            index = indices[group] if indices is not None else group
            order = torch.randperm(len(able), generator=generator(*seed, index)).tolist()
            fitness = self._fitness(policy, problems[group], rollouts)
            for i, others in assign([able[n] for n in order], members, fitness, count).items():
                found[i] = [rollouts[other].text for other in others]
        return found

    def _fitness(
        self, policy: Policy | None, problem: Problem, rollouts: Sequence[Rollout]
    ) -> Callable[[int, int], int]:
        """A function of two rollout indices: how well the first serves as a demonstration for the second. 2 if shown
        whole, 1 if truncated, 0 if it has no text."""

        @cache
        def has_text(shown: int) -> bool:
            return bool(self._readable(policy, problem, rollouts[shown].text, "sibling").strip())

        @cache
        def prompt(shown: int) -> tuple[list[int], bool]:
            assert policy is not None
            return self.prompt(policy, problem, rollouts[shown].text)

        def fitness(shown: int, to: int) -> int:
            if policy is None or not has_text(shown):
                return 2 * has_text(shown)
            room, tokens = self.room(policy, rollouts[to]), len(rollouts[shown].response_ids)
            others = len(rollouts[to].prompt_ids) + len(self.template or TEMPLATES["sibling"])
            fits = self.max_context_tokens is None or tokens <= self.max_context_tokens
            if fits and (room is None or others + tokens <= room):  # certain without tokenizing the prompt
                return 2
            ids, cut = prompt(shown)
            return 1 if cut or (room is not None and len(ids) > room) else 2

        return fitness

    def room(self, policy: Policy, rollout: Rollout) -> int | None:
        """Maximum number of tokens of the teacher's prompt for a rollout; None if the model has no maximum length."""
        if policy.max_positions is None:
            return None
        extra = self.scored_by == "engine"  # vLLM generates a token after those that it scores
        return policy.max_positions - len(rollout.response_ids) - extra

    def prompts(
        self,
        policy: Policy,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        contexts: Sequence[Shown | str | None],
        kind: Context = "sibling",
    ) -> tuple[list[list[int]], int]:
        """The teacher's prompt for each rollout, with room for the rollout's response.

        Args:
            policy: See `score`.
            problems: See `score`.
            rollouts: See `score`.
            contexts: See `score`.
            kind: See `score`.

        Returns:
            Token ids, empty for a rollout that has no context or whose context was dropped, and the number of contexts
            that were truncated or dropped.
        """
        found: list[list[int]] = [[] for _ in rollouts]
        truncated = 0

        @cache
        def prompt(group: int, shown: Shown, room: int | None) -> tuple[list[int], bool]:
            return self.prompt(policy, problems[group], shown.context, shown.kind, room, shown.remark)

        for i, (rollout, context) in enumerate(zip(rollouts, contexts, strict=True)):
            if context is None:
                continue
            shown = Shown(context, kind) if isinstance(context, str) else context
            room = self.room(policy, rollout)
            ids, cut = prompt(rollout.group, shown, None)  # shared by all siblings for which it fits
            if room is not None and len(ids) > room:
                ids, cut = prompt(rollout.group, shown, room)
            truncated += cut
            found[i] = ids
        return found, truncated

    # -- scores ----------------------------------------------------------------------------------------------------

    def score(
        self,
        policy: Policy,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        contexts: Sequence[Shown | str | None],
        temperature: float = 1.0,
        kind: Context = "sibling",
        top_k: int | None = 0,
        engine: ScoringEngine | None = None,
    ) -> tuple[list[TeacherScore | None], int]:
        """Scores the response tokens, exactly as sampled, of each rollout with a context.

        Args:
            policy: The policy; its tokenizer is used, and its weights if the teacher has none of its own.
            problems: The problems, indexed by `Rollout.group`.
            rollouts: N rollouts. To score a rollout with several contexts, repeat it.
            contexts: Contexts of the N rollouts.
            temperature: Divides the logits; the sampling temperature.
            kind: The kind of contexts that are given as text only.
            top_k: Number of the student's most likely tokens to score too, which costs a forward pass of the student.
                None for the whole vocabulary, 0 for none.
            engine: Scores instead of the trainer's forward pass; None for the trainer.

        Returns:
            The scores of each rollout, None if it has no context or its context was dropped, and the number of contexts
            that were truncated or dropped.
        """
        prompts, truncated = self.prompts(policy, problems, rollouts, contexts, kind)
        which = [i for i, ids in enumerate(prompts) if ids]
        sequences = [(prompts[i], rollouts[i].response_ids) for i in which]
        scores: list[TeacherScore | None] = [None] * len(rollouts)
        if engine is not None:
            empty = torch.zeros(0, 0)
            for i, logp in zip(which, engine.score(sequences, temperature), strict=True):
                scores[i] = TeacherScore(logp, None, empty.int(), empty)
            return scores, truncated

        chosen = [rollouts[i] for i in which]
        if top_k != 0:
            students = [(r.prompt_ids, r.response_ids) for r in chosen]
            top = [tokens for (tokens,) in policy.score_by(partial(_most_likely, top_k), students, temperature)]
        else:
            top = [torch.zeros(len(r.response_ids), 0, dtype=torch.int32) for r in chosen]
        targets = [torch.tensor(r.response_ids) for r in chosen]
        with self.applied_to(policy):
            scored = policy.score_by(_token_scores, sequences, temperature, targets, top)
        for i, (logp, entropy, top_logp), tokens in zip(which, scored, top, strict=True):
            scores[i] = TeacherScore(logp, entropy, tokens, top_logp)
        return scores, truncated


def _count(policy: Policy, text: str) -> int:
    return len(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


def _most_likely(k: int | None, logits: Tensor) -> tuple[Tensor]:
    vocabulary = logits.shape[-1]
    return (logits.topk(vocabulary if k is None else min(k, vocabulary), -1).indices.int(),)


def _token_scores(logits: Tensor, targets: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy = log_probs_at(logits, torch.cat([targets[:, None], top], -1))
    return logp[:, 0], entropy, logp[:, 1:]
