"""The teacher: the same model, shown a privileged context. Whose weights, and what context."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Literal, final

import torch
from torch import Tensor, nn

from rlrt_lightning.objective.methods import Context, TeacherWeights
from rlrt_lightning.policy.log_probs import log_probs_at
from rlrt_lightning.policy.lora import TeacherAdapters
from rlrt_lightning.policy.sharding import local, move_weights
from rlrt_lightning.policy.texts import OPENING_TAG, shortened, without_thinking
from rlrt_lightning.rollouts.base import Rollout, ScoringEngine
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.seeding import generator
from rlrt_lightning.tasks.base import Messages, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlrt_lightning.policy.model import Policy

_SOLVE = "\n\nNow solve the problem yourself, step by step."
_SOLUTION = "{prompt}\n\nHere is a correct solution to this problem:\n\n{context}" + _SOLVE

TEMPLATES: dict[Context, str] = {
    "sibling": _SOLUTION,
    "solution": _SOLUTION,
    "answer": "{prompt}\n\nThe correct answer to this problem is: {context}" + _SOLVE,
    "feedback": "{prompt}\n\nThis is feedback on an earlier attempt at this problem:\n\n{context}" + _SOLVE,
}
"""What the teacher is shown where the user has written no template, for each kind of context."""


@dataclass(frozen=True)
class TeacherScore:
    """What the teacher says of one rollout's T tokens.

    Args:
        logp: log P_T of the tokens, nats, float32 [T].
        entropy: H(P_T) at each position, nats, float32 [T]; None where an engine scored.
        top_tokens: The k tokens that the student found likeliest at each position, int32 [T, k]; k is 0 unless asked
            for.
        top_logp: log P_T of these, nats, float32 [T, k].
    """

    logp: Tensor
    entropy: Tensor | None
    top_tokens: Tensor
    top_logp: Tensor


@final
class Teacher(nn.Module):
    """The policy as of its last refresh (`TeacherRefresh` decides when), with a solution in view.

    While it is refreshed each epoch it is the policy that made the rollouts, so it needs no weights of its own.

    With adapters (`model.policy.lora`) one that was never refreshed is the model without them, and one that follows the
    policy keeps a copy of them alone.

    Args:
        template: What the teacher is shown in place of the prompt; `{prompt}` and `{context}` are filled in. In a
            conversation it takes the place of the last user's message, and the chat template goes around it. Null:
            words for a mathematical problem that suit the method's kind of context.
        max_context_tokens: Longest context, in tokens; null leaves it to the room that the model's positions have
            beside the prompt and the response. A longer one is truncated in its middle, as answers stand at the end,
            and counted in `signal/context_truncated`; so is one of which nothing useful is left, which is not shown.
        strip_think: Leave out what a demonstration has inside <think> and </think>.
        scored_by: "trainer", by a forward pass with the teacher's weights, or "engine", by the rollout engine; both
            sides of D_t then come from the engine. The trainer and VllmColocateEngine read a demonstration once for all
            of its siblings; VllmServerEngine reads it again for each of them. The engine: for vLLM, a teacher that is
            refreshed each epoch, and methods that need no more than log-probs.
        rest_on_cpu: Keep the teacher's own weights, where it has a whole copy, in the CPU's memory except while it
            scores: frees the GPU of them while the policy is trained, and sends them twice an epoch.
    """

    model: PreTrainedModel
    """Its own weights, where it has a whole copy; not set otherwise."""

    def __init__(
        self,
        template: str | None = None,
        max_context_tokens: int | None = None,
        strip_think: bool = True,
        scored_by: Literal["trainer", "engine"] = "trainer",
        rest_on_cpu: bool = False,
    ) -> None:
        super().__init__()
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
        self.rest_on_cpu = rest_on_cpu
        self.schedule = TeacherWeights()
        """Whose weights it has; `TeacherRefresh` sets it before they are loaded."""
        self.adapters: TeacherAdapters | None = None

    # -- whose weights ---------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Literal["policy", "initial", "own"]:
        """See `TeacherWeights.kind`."""
        return self.schedule.kind

    def load(self, policy: Policy) -> None:
        """Takes a copy of the policy's weights where the teacher needs its own: of the adapters alone where the policy
        has some, and of nothing where these are initial ones. A copy that an earlier run needed is given back."""
        if self.weights == "policy" and hasattr(self, "model"):
            del self.model
        if self.adapters is not None and (self.weights == "policy" or self.adapters.off != (self.weights == "initial")):
            self.adapters = None
        if self.weights == "policy" or self.adapters is not None or hasattr(self, "model"):
            return
        if policy.lora is not None:
            self.adapters = TeacherAdapters(policy.model, off=self.weights == "initial")
        else:
            self.model = copy.deepcopy(policy.model).eval().requires_grad_(False)

    @contextmanager
    def _at_work(self, device: torch.device) -> Iterator[None]:
        """Brings a copy that rests on the CPU to the policy's device, and back."""
        if not self.rest_on_cpu or not hasattr(self, "model"):
            yield
            return
        move_weights(self.model, device)
        try:
            yield
        finally:
            move_weights(self.model, torch.device("cpu"))

    @torch.no_grad()
    def refresh(self, policy: Policy, ema_decay: float = 0.0) -> None:
        """teacher <- ema_decay * teacher + (1 - ema_decay) * policy."""
        followed = policy.model.named_parameters()
        if policy.lora is not None:
            followed = ((name, p) for name, p in followed if p.requires_grad)
        for ours, (_, theirs) in zip(self.parameters(), followed, strict=True):
            local(ours).lerp_(local(theirs).to(local(ours)), 1 - ema_decay)

    # -- what context ----------------------------------------------------------------------------------------------

    def prompt(
        self, policy: Policy, problem: Problem, context: str, kind: Context = "sibling", room: int | None = None
    ) -> tuple[list[int], bool]:
        """What the teacher is shown.

        Args:
            policy: Whose tokenizer and chat template are used.
            problem: The problem.
            context: The privileged context.
            kind: What the context is.
            room: Tokens that the prompt may have at most; None for any number.

        Returns:
            Its tokens, none where nothing useful of the context is left or fits; and whether it is not all shown.
        """
        context = self._readable(policy, problem, context, kind)
        if not context.strip():
            return [], True

        def excess(text: str) -> int:
            """Tokens that the context has too many, by itself or in the prompt."""
            over = 0
            if self.max_context_tokens is not None:
                over = _count(policy, text) - self.max_context_tokens
            return over if room is None else max(over, len(self._fill(policy, problem, text, kind)) - room)

        cut = excess(context) > 0
        if cut:
            context = shortened(context, excess, _count(policy, context))
        return (self._fill(policy, problem, context, kind) if context else []), cut

    def _readable(self, policy: Policy | None, problem: Problem, context: str, kind: Context) -> str:
        """A context without its thinking."""
        if not self.strip_think or kind not in ("sibling", "solution"):
            return context  # an answer is no reasoning, and feedback may speak of the tags
        inside = kind == "sibling" and policy is not None and _opens_thinking(policy.prompt_text(problem.prompt))
        return without_thinking(context, inside)

    def _fill(self, policy: Policy, problem: Problem, context: str, kind: Context) -> list[int]:
        template = self.template or TEMPLATES[kind]

        def fill(text: str) -> str:  # not str.format: prompts and solutions are full of braces
            parts = {"{prompt}": text, "{context}": context}
            return re.sub(r"\{prompt\}|\{context\}", lambda m: parts[m[0]], template)

        prompt: str | Messages = problem.prompt
        if isinstance(prompt, str):
            return policy.encode_prompt(fill(prompt))
        return policy.encode_prompt([*prompt[:-1], {**prompt[-1], "content": fill(prompt[-1]["content"])}])

    def contexts(
        self,
        kind: Context,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        successful: Tensor,
        *seed: int,
        places: Sequence[int] | None = None,
        policy: Policy | None = None,
    ) -> list[str | None]:
        """The privileged context of each rollout, None where there is none.

        A group's demonstration is one of its successful rollouts, the same for as many siblings as it fits; the
        demonstration itself gets another one, and nothing where it is the only success. One that has to be truncated,
        or whose text is all thinking, is taken only where there is no better one.

        Args:
            kind: "sibling"; "solution" or "answer", those of the problem; "feedback", what the verifier said of the
                rollout itself, unless it failed.
            problems: The problems that `Rollout.group` counts.
            rollouts: N rollouts.
            successful: Which of them count as r = 1, bool [N].
            seed: Names the stream that chooses the demonstrations.
            places: The number that each problem has in the stream, [P]; None: as they come. By its number over all
                ranks, the choice does not depend on which rank it is on.
            policy: Whose positions have room for a demonstration or not; None: any fits.
        """
        if kind == "answer":
            return [problems[r.group].answer_text for r in rollouts]
        if kind == "solution":
            return [problems[r.group].solution for r in rollouts]
        if kind == "feedback":
            verdicts = [r.verdict for r in rollouts]
            return [(v.message or None) if v is not None and not v.fault else None for v in verdicts]
        groups: dict[int, list[int]] = defaultdict(list)
        for i in sorted(range(len(rollouts)), key=lambda i: rollouts[i].index):  # in whatever order they finished
            groups[rollouts[i].group].append(i)
        contexts: list[str | None] = [None] * len(rollouts)
        for group, members in groups.items():
            solved = [i for i in members if successful[i]]
            place = places[group] if places is not None else group
            order = torch.randperm(len(solved), generator=generator(*seed, "sibling", place)).tolist()
            fitness = self._fitness(policy, problems[group], rollouts)
            for i, shown in _assign([solved[n] for n in order], members, fitness).items():
                contexts[i] = rollouts[shown].text
        return contexts

    def _fitness(
        self, policy: Policy | None, problem: Problem, rollouts: Sequence[Rollout]
    ) -> Callable[[int, int], int]:
        """How well one rollout of a problem serves another as a demonstration, both by their numbers: 2 whole,
        1 truncated, 0 not at all."""

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
            words = len(rollouts[to].prompt_ids) + len(self.template or TEMPLATES["sibling"])
            fits = self.max_context_tokens is None or tokens <= self.max_context_tokens
            if fits and (room is None or words + tokens <= room):  # without making tokens of it once more
                return 2
            ids, cut = prompt(shown)
            return 1 if cut or (room is not None and len(ids) > room) else 2

        return fitness

    def room(self, policy: Policy, rollout: Rollout) -> int | None:
        """Tokens that the teacher's prompt may have before a response; None where the model does not say."""
        if policy.max_positions is None:
            return None
        more = self.scored_by == "engine"  # vLLM draws a token after those that it scores
        return policy.max_positions - len(rollout.response_ids) - more

    # -- what it says ----------------------------------------------------------------------------------------------

    def score(
        self,
        policy: Policy,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        contexts: Sequence[str | None],
        temperature: float = 1.0,
        kind: Context = "sibling",
        top_k: int | None = 0,
        engine: ScoringEngine | None = None,
    ) -> tuple[list[TeacherScore | None], int]:
        """What the teacher says of each rollout that has a context, its tokens exactly as they were sampled.

        Args:
            policy: The policy, whose tokenizer and, where the teacher has none of its own, weights are used.
            problems: The problems that `Rollout.group` counts.
            rollouts: N rollouts.
            contexts: Their contexts, [N].
            temperature: Divides the logits, as it did when the tokens were sampled.
            kind: What the contexts are.
            top_k: Compare so many of the student's likeliest tokens too, None for all: another forward pass of the
                student. 0 for none.
            engine: What scores in place of the policy's forward pass.

        Returns:
            For each rollout the scores, None where it has no context or none that can be shown; and how many
            rollouts have a context that was truncated, or not shown since nothing useful of it was left or fits.
        """
        sequences, which, truncated = [], [], 0
        shown = cache(lambda group, context, room: self.prompt(policy, problems[group], context, kind, room))
        for i, (rollout, context) in enumerate(zip(rollouts, contexts, strict=True)):
            if context is None:
                continue
            room = self.room(policy, rollout)
            ids, cut = shown(rollout.group, context, None)  # the same for all siblings that have room for it
            if room is not None and len(ids) > room:
                ids, cut = shown(rollout.group, context, room)
            truncated += cut
            if ids:
                sequences.append((ids, rollout.response_ids))
                which.append(i)

        scores: list[TeacherScore | None] = [None] * len(rollouts)
        if engine is not None:
            nothing = torch.zeros(0, 0)
            for i, logp in zip(which, engine.score(sequences, temperature), strict=True):
                scores[i] = TeacherScore(logp, None, nothing.int(), nothing)
            return scores, truncated

        chosen = [rollouts[i] for i in which]
        if top_k != 0:
            asked = [(r.prompt_ids, r.response_ids) for r in chosen]
            top = [tokens for (tokens,) in policy.score_by(partial(_likeliest, top_k), asked, temperature)]
        else:
            top = [torch.zeros(len(r.response_ids), 0, dtype=torch.int32) for r in chosen]
        targets = [torch.tensor(r.response_ids) for r in chosen]
        with self._at_work(policy.device), policy.weights_of(self):
            scored = policy.score_by(_teacher_figures, sequences, temperature, targets, top)
        for i, (logp, entropy, top_logp), tokens in zip(which, scored, top, strict=True):
            scores[i] = TeacherScore(logp, entropy, tokens, top_logp)
        return scores, truncated


def _opens_thinking(prompt: str) -> bool:
    """Whether a response to a prompt begins inside a block of thinking."""
    return prompt.rstrip().endswith(OPENING_TAG)


def _count(policy: Policy, text: str) -> int:
    return len(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


def _assign(
    demonstrations: Sequence[int], members: Sequence[int], fitness: Callable[[int, int], int]
) -> dict[int, int]:
    """Which demonstration each member of a group is shown: never itself, and of those that serve it best the one that
    serves most, so that few are read.

    Args:
        demonstrations: In the order in which they are taken otherwise.
        members: The group.
        fitness: How well a demonstration serves a member.
    """
    fit = {(d, m): fitness(d, m) for d in demonstrations for m in members if d != m}
    served = {d: sum(fit.get((d, m), 0) == 2 for m in members) for d in demonstrations}
    assigned = {}
    for m in members:
        others = [d for d in demonstrations if d != m]
        if others:
            assigned[m] = max(others, key=lambda d: (fit[d, m], served[d]))  # the first of equals
    return assigned


def _likeliest(k: int | None, logits: Tensor) -> tuple[Tensor]:
    vocabulary = logits.shape[-1]
    return (logits.topk(vocabulary if k is None else min(k, vocabulary), -1).indices.int(),)


def _teacher_figures(logits: Tensor, targets: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy = log_probs_at(logits, torch.cat([targets[:, None], top], -1))
    return logp[:, 0], entropy, logp[:, 1:]
