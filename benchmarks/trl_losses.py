"""Our losses and TRL's on the same rollouts: `python benchmarks/trl_losses.py`.

The embedded model draws rollouts, then its weights are moved, so that ratios differ from 1 and clips bind. For each
loss the table has the difference of the gradient of one optimizer step, with three micro-batches of ours, from that of
TRL's `GRPOTrainer.compute_loss` on all rollouts at once: the norm of the difference relative to that of TRL's gradient.
Needs TRL: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from typing import Any

import torch
from common import ask, right, trl_trainer
from torch import Tensor

from rlrt_lightning import GRPO, Policy, Problem, RLRTModule, Rollout, Sampling, Teacher, TransformersEngine, Verdict
from rlrt_lightning.epoch.make import EpochSettings, Parts, assign_credit, judge, pack, score
from rlrt_lightning.epoch.record import EpochRecord, Questions
from rlrt_lightning.policy.padding import pad_rows

PROMPTS, K, TOKENS = 8, 8, 12
CLIPS = {"clip_low": 0.05, "clip_high": 0.1}
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token mean": ({}, {"loss_type": "dapo"}),
    "sequence mean": ({"aggregation": "seq-mean-token-mean"}, {"loss_type": "grpo"}),
    "constant length": ({"aggregation": "constant-length", "length": TOKENS}, {"loss_type": "dr_grpo"}),
    "GSPO": (
        {"aggregation": "seq-mean-token-mean", "ratio": "sequence"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "CISPO": ({"surrogate": "cispo"}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "dual clip": ({"dual_clip": 1.2}, {"loss_type": "dapo", "delta": 1.2}),
    "token mean, KL": ({"reference_kl": 0.1}, {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False}),
    "sequence mean, KL": (
        {"reference_kl": 0.1, "aggregation": "seq-mean-token-mean"},
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    ),
    "constant length, KL": (
        {"reference_kl": 0.1, "aggregation": "constant-length", "length": TOKENS},
        {"loss_type": "dr_grpo", "beta": 0.1, "use_bias_correction_kl": False},
    ),
    "token mean, truncated left out": ({"mask_truncated": True}, {"loss_type": "dapo"}),
}
"""Settings of `RLRTModule` and of TRL's `GRPOConfig`."""


class Settings:
    """The data module's settings of an epoch."""

    sampling = Sampling(max_new_tokens=TOKENS)
    rollouts_per_prompt, sampling_rounds, minibatches, tokens_per_pass = K, 1, 1, None
    rescore, max_fault_share, overlong_buffer, seed = False, 0.5, None, 0


def draw(policy: Policy) -> tuple[Questions, list[Rollout]]:
    engine = TransformersEngine()
    engine.sync(policy)
    problems = [Problem(str(i), ask("embedded", i)) for i in range(PROMPTS)]
    prompts = [policy.encode_prompt(p.prompt) for p in problems]
    drawn = engine.generate(prompts, K, Settings.sampling, list(range(PROMPTS)))
    rollouts = sorted(drawn, key=lambda r: (r.group, r.index))
    for r in rollouts:
        r.verdict = Verdict(float(right(r.text)), right(r.text))
    return Questions(0, problems, prompts, list(range(PROMPTS)), range(PROMPTS)), rollouts


def gradient_of(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def ours(module: RLRTModule, record: EpochRecord, settings: EpochSettings) -> Tensor:
    module.zero_grad()
    batches = pack(record, settings, None).batches
    for batch in batches:
        (module.training_step(batch, 0)["loss"] / len(batches)).backward()
    return gradient_of(module.policy)


def theirs(policy: Policy, record: EpochRecord, kept: Tensor, reference: Tensor, settings: dict[str, Any]) -> Tensor:
    rollouts, width = record.rollouts, max(len(r.prompt_ids) for r in record.rollouts)
    prompt_ids = torch.tensor([[0] * (width - len(r.prompt_ids)) + r.prompt_ids for r in rollouts])
    prompt_mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in rollouts])
    mask = record.mask & kept[:, None]
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": pad_rows([torch.tensor(r.response_ids) for r in rollouts]).long(),
        "completion_mask": mask.long(),
        "advantages": record.advantages,
        "old_per_token_logps": record.logp_old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    with tempfile.TemporaryDirectory() as folder:
        batch = {"per_device_train_batch_size": len(rollouts), "epsilon": CLIPS["clip_low"]}
        model = copy.deepcopy(policy.model)
        tokenizer = copy.deepcopy(policy.tokenizer)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        own = {"epsilon_high": CLIPS["clip_high"], **batch, **settings}
        trainer = trl_trainer(model, tokenizer, ["x"] * PROMPTS, lambda **_: [0.0], folder, K, TOKENS, **own)
        trainer.current_gradient_accumulation_steps = 1  # set by its training loop
        model.train().zero_grad()
        trainer.compute_loss(model, inputs).backward()
    return gradient_of(model)


def main() -> None:
    policy = Policy("embedded")
    policy.load()
    questions, rollouts = draw(policy)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.02 * p.std() * torch.randn(p.shape, generator=g) if p.dim() > 1 else 0
    now = pad_rows(policy.score([(r.prompt_ids, r.response_ids) for r in rollouts]))
    reference = now + 0.3 * torch.randn(now.shape, generator=g)
    print("| loss | tokens clipped | difference from TRL's gradient |\n| --- | --- | --- |")
    for name, (settings, of_trl) in LOSSES.items():
        module = RLRTModule(policy, Teacher(), GRPO(normalize_std=True), **{**CLIPS, **settings})
        epoch = EpochSettings.of(Settings, module, accumulate_grad_batches=3)
        parts = Parts(policy, module.teacher, module.method, TransformersEngine())
        judged = judge(questions, rollouts, {}, module.method, epoch)
        record = assign_credit(score(judged, parts, epoch, lambda name: nullcontext()), module.method, epoch)
        if module.reference_kl:
            record.logp_reference, record.trainable = reference * record.mask, record.nonempty
        kept = ~record.truncated if module.mask_truncated else record.nonempty
        mine, other = ours(module, record, epoch), theirs(policy, record, kept, reference, of_trl)
        rho = (now - record.logp_old).exp()[record.mask]
        share = float(((rho < 1 - CLIPS["clip_low"]) | (rho > 1 + CLIPS["clip_high"])).float().mean())
        print(f"| {name} | {share:.0%} | {float((mine - other).norm() / other.norm()):.1e} |", flush=True)
    print(f"\n{int(record.truncated.sum())} of {len(rollouts)} rollouts are truncated")


if __name__ == "__main__":
    main()
