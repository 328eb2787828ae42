"""The teacher: the same model, shown a privileged context. Whose weights, and what context."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, final

import torch
from torch import Tensor, nn

from rlrt_lightning.errors import ConfigError
from rlrt_lightning.log_probs import log_probs_at
from rlrt_lightning.lora import TeacherAdapters
from rlrt_lightning.objective.methods import Context
from rlrt_lightning.rollouts.base import Rollout, ScoringEngine
from rlrt_lightning.seeding import generator
from rlrt_lightning.sharding import local, move_weights
from rlrt_lightning.tasks.base import Messages, Problem

if TYPE_CHECKING:
    from rlrt_lightning.policy import Policy

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
    """What the teacher says of one roll-out's T tokens.

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

    While it is refreshed each epoch it is the policy that made the roll-outs, so it needs no weights of its own.

    With adapters (`model.policy.lora`) one that was never refreshed is the model without them, and one that follows the
    policy keeps a copy of them alone.

    Args:
        template: What the teacher is shown in place of the prompt; `{prompt}` and `{context}` are filled in. In a
            conversation it takes the place of the last user's message, and the chat template goes around it. Null:
            words for a mathematical problem that suit the method's kind of context.
        max_context_tokens: A longer context loses its end.
        strip_think: Leave out what the context has inside <think> and </think>.
        scored_by: "trainer", by a forward pass with the teacher's weights, or "engine", by the roll-out engine; both
            sides of D_t then come from the engine. Either reads a demonstration once for all of its siblings. The
            engine: for vLLM, a teacher that is refreshed each epoch, and methods that need no more than log-probs.
        rest_on_cpu: Keep the teacher's own weights, where it has a whole copy, in the CPU's memory except while it
            scores: frees the GPU of them while the policy is trained, and sends them twice an epoch.
    """

    def __init__(
        self,
        template: str | None = None,
        max_context_tokens: int = 8192,
        strip_think: bool = True,
        scored_by: Literal["trainer", "engine"] = "trainer",
        rest_on_cpu: bool = False,
    ) -> None:
        super().__init__()
        for name in ("{prompt}", "{context}"):
            if template is not None and name not in template:
                raise ConfigError(f"model.teacher.template has no {name}")
        if max_context_tokens < 1:
            raise ConfigError(f"model.teacher.max_context_tokens is {max_context_tokens}; it has to be at least 1")
        self.template = template
        self.max_context_tokens = max_context_tokens
        self.strip_think = strip_think
        self.scored_by = scored_by
        self.rest_on_cpu = rest_on_cpu
        self.weights: Literal["policy", "initial", "own"] = "policy"
        """Whose weights it has: the policy's, those that the policy began with, or its own, which follow the policy's;
        set before they are loaded, by `TeacherRefresh`."""
        self.adapters: TeacherAdapters | None = None

    # -- whose weights ---------------------------------------------------------------------------------------------

    def load(self, policy: Policy) -> None:
        """Takes a copy of the policy's weights where the teacher needs its own: of the adapters alone where the policy
        has some, and of nothing where these are initial ones."""
        if self.weights == "policy" or self.adapters is not None or "model" in self._modules:
            return
        if policy.lora is not None:
            self.adapters = TeacherAdapters(policy.model, off=self.weights == "initial")
        else:
            self.model = copy.deepcopy(policy.model).eval().requires_grad_(False)

    @contextmanager
    def _at_work(self, device: torch.device) -> Iterator[None]:
        """Brings a copy that rests on the CPU to the policy's device, and back."""
        if not self.rest_on_cpu or "model" not in self._modules:
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
        self, policy: Policy, problem: Problem, context: str, kind: Context = "sibling"
    ) -> tuple[list[int], bool]:
        """Tokens of what the teacher is shown, and whether the context had to be cut."""
        template = self.template or TEMPLATES[kind]
        if self.strip_think:
            context = re.sub(r".*</think>\s*", "", context, flags=re.DOTALL)
        ids = policy.tokenizer(context, add_special_tokens=False)["input_ids"]
        if cut := len(ids) > self.max_context_tokens:
            context = policy.decode(ids[: self.max_context_tokens])

        def fill(text: str) -> str:  # not str.format: prompts and solutions are full of braces
            parts = {"{prompt}": text, "{context}": context}
            return re.sub(r"\{prompt\}|\{context\}", lambda m: parts[m[0]], template)

        prompt: str | Messages = problem.prompt
        if isinstance(prompt, str):
            return policy.encode_prompt(fill(prompt)), cut
        return policy.encode_prompt([*prompt[:-1], {**prompt[-1], "content": fill(prompt[-1]["content"])}]), cut

    def contexts(
        self,
        kind: Context,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        successful: Tensor,
        *seed: int,
        places: Sequence[int] | None = None,
    ) -> list[str | None]:
        """The privileged context of each roll-out, None where there is none.

        A group's demonstration is one of its successful roll-outs, the same for all siblings; the demonstration itself
        gets another one, and nothing where it is the only success.

        Args:
            kind: "sibling"; "solution" or "answer", those of the problem; "feedback", what the verifier said of the
                roll-out itself.
            problems: The problems that `Rollout.group` counts.
            rollouts: N roll-outs.
            successful: Which of them count as r = 1, bool [N].
            seed: Names the stream that chooses the demonstrations.
            places: The number that each problem has in the stream, [P]; None: as they come. By its number over all
                ranks, the choice does not depend on which rank it is on.
        """
        if kind == "answer":
            return [problems[r.group].answer_text for r in rollouts]
        if kind == "solution":
            return [problems[r.group].solution for r in rollouts]
        if kind == "feedback":
            return [(r.verdict.message or None) if r.verdict is not None else None for r in rollouts]
        solved: dict[int, list[Rollout]] = defaultdict(list)
        for rollout, success in zip(rollouts, successful.tolist(), strict=True):
            if success:
                solved[rollout.group].append(rollout)
        for group, candidates in solved.items():
            candidates.sort(key=lambda r: r.index)  # whatever the order in which they finished
            place = places[group] if places is not None else group
            order = torch.randperm(len(candidates), generator=generator(*seed, "sibling", place)).tolist()
            solved[group] = [candidates[i] for i in order[:2]]
        contexts = []
        for rollout in rollouts:
            others = [r for r in solved[rollout.group] if r is not rollout]
            contexts.append(others[0].text if others else None)
        return contexts

    # -- what it says ----------------------------------------------------------------------------------------------

    def score(
        self,
        policy: Policy,
        problems: Sequence[Problem],
        rollouts: Sequence[Rollout],
        contexts: Sequence[str | None],
        temperature: float = 1.0,
        kind: Context = "sibling",
        top_k: int = 0,
        engine: ScoringEngine | None = None,
    ) -> tuple[list[TeacherScore | None], int]:
        """What the teacher says of each roll-out that has a context, its tokens exactly as they were sampled.

        Args:
            policy: The policy, whose tokenizer and, where the teacher has none of its own, weights are used.
            problems: The problems that `Rollout.group` counts.
            rollouts: N roll-outs.
            contexts: Their contexts, [N].
            temperature: Divides the logits, as it did when the tokens were sampled.
            kind: What the contexts are.
            top_k: Compare the student's so many likeliest tokens too; costs a forward pass of the student.
            engine: What scores in place of the policy's forward pass.

        Returns:
            For each roll-out the scores, None where it has no context or does not fit into the model with it; and how
            many contexts were cut, or did not fit.
        """
        prompts: dict[tuple[int, str], tuple[list[int], bool]] = {}
        sequences, which, truncated = [], [], 0
        for i, (rollout, context) in enumerate(zip(rollouts, contexts, strict=True)):
            if context is None:
                continue
            key = (rollout.group, context)
            if key not in prompts:
                prompts[key] = self.prompt(policy, problems[rollout.group], context, kind)
                truncated += prompts[key][1]
            ids, _ = prompts[key]
            if policy.max_positions is None or len(ids) + len(rollout.response_ids) <= policy.max_positions:
                sequences.append((ids, rollout.response_ids))
                which.append(i)
            else:
                truncated += 1  # no room in the model for context and response: the roll-out keeps weight 1

        scores: list[TeacherScore | None] = [None] * len(rollouts)
        if engine is not None:
            nothing = torch.zeros(0, 0)
            for i, logp in zip(which, engine.score(sequences, temperature), strict=True):
                scores[i] = TeacherScore(logp, None, nothing.int(), nothing)
            return scores, truncated

        chosen = [rollouts[i] for i in which]
        if top_k:
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


def _likeliest(k: int, logits: Tensor) -> tuple[Tensor]:
    return (logits.topk(min(k, logits.shape[-1]), -1).indices.int(),)


def _teacher_figures(logits: Tensor, targets: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp, entropy = log_probs_at(logits, torch.cat([targets[:, None], top], -1))
    return logp[:, 0], entropy, logp[:, 1:]
