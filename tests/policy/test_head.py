"""The float32 head under autocast: training, scoring and sampling, with adapters and with bfloat16 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlrt_lightning import LastDigit, LoRA, Policy, Sampling, TransformersEngine
from rlrt_lightning.policy.padding import pad_sequences
from rlrt_lightning.rollouts.vllm_common import head_overrides
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE

SEQUENCES = [([2, 3, 4, 5], [6, 7, 8, 9]), ([5, 2], [3, 4, 6])]


def loaded(**settings: Any) -> Policy:
    policy = Policy(**settings)
    policy.load()
    return policy


def logits_of(policy: Policy) -> torch.Tensor:
    """Logits of the next token after two sequences, under autocast."""
    ids = torch.tensor([[2, 3, 4, 5], [5, 2, 3, 4]])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        return policy.next_logits(policy.model, input_ids=ids, use_cache=False)


SETTINGS: dict[str, dict[str, Any]] = {
    "tied": {},
    "weights in bfloat16": {"dtype": "bfloat16"},
    "adapters": {"lora": LoRA(rank=2)},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_logits_are_computed_from_states_and_weights_in_float32(kind: str) -> None:
    policy = loaded(**SETTINGS[kind])
    ids = torch.tensor([[2, 3, 4, 5], [5, 2, 3, 4]])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        states = policy.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    expected = states.double() @ policy.model.get_output_embeddings().weight.double().T
    torch.testing.assert_close(logits_of(policy).double(), expected, rtol=1e-5, atol=1e-5)
    assert policy.head_is_float32
    assert head_overrides(policy) == {"head_dtype": "float32"}


def test_null_computes_the_head_in_the_dtype_of_the_rest() -> None:
    policy = loaded(head_dtype=None)
    logits = logits_of(policy)
    assert logits.dtype == torch.bfloat16
    assert head_overrides(policy) == {}
    assert (logits - logits_of(loaded())).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["tied", "weights in bfloat16"])
def test_gradients_reach_head_and_embeddings_in_float32(kind: str) -> None:
    """Compared with autograd through the logits of whole sequences; chunks are smaller than the batch."""
    policy = loaded(logits_chunk=2, **SETTINGS[kind])
    ids, mask, asked = pad_sequences(SEQUENCES, policy.device)
    weight = policy.model.get_output_embeddings().weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, _ = policy.log_probs(ids, mask, asked)
        logp.sum().backward()
        got, weight.grad = weight.grad.clone(), None
        states = policy.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = states.float() @ weight.float().T
    whole = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    whole[asked[:, 1:].bool()].sum().backward()
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp[:, 1:][asked[:, 1:].bool()], whole[asked[:, 1:].bool()], rtol=1e-5, atol=1e-5)
    assert float((got - weight.grad).norm() / weight.grad.norm()) < (1e-2 if kind == "tied" else 3e-2)


@pytest.mark.parametrize("dtype", [None, "bfloat16"], ids=["own weights", "copy"])
def test_the_transformers_engine_samples_with_a_float32_head(dtype: Any) -> None:
    """Without the head's rounding, its log-probs are closer to those of the policy in float32."""
    problems, mean = LastDigit().problems("heldout")[:8], {}
    shown = [TEACHER_TEMPLATE.format(prompt=p.prompt, context=p.solution) for p in problems]  # long responses
    for head_dtype in ("float32", None):
        policy, engine = loaded(head_dtype=head_dtype), TransformersEngine(dtype=dtype)
        prompts = [policy.encode_prompt(prompt) for prompt in shown]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            engine.sync(policy)
            rollouts = list(engine.generate(prompts, 4, Sampling(max_new_tokens=20, temperature=1.5), list(range(8))))
        exact = torch.cat(policy.score([(r.prompt_ids, r.response_ids) for r in rollouts], 1.5))
        mean[head_dtype] = float((torch.cat([r.logp_sampler for r in rollouts]) - exact).abs().mean())
    assert mean["float32"] < mean[None]
