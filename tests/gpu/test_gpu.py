"""What only a GPU shows: `python -m pytest -m gpu`, in a few minutes. Skipped where torch finds no CUDA device.

Needs torch, transformers, lightning and pytest, no other package and no download. The test of vLLM runs where vLLM is
installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlrt_lightning import Policy, RLRTModule, RolloutDataModule, Sampling, Teacher
from rlrt_lightning.evaluation.sets import Benchmark
from rlrt_lightning.policy.padding import pad_sequences
from rlrt_lightning.policy.sharding import FSDP2Strategy
from rlrt_lightning.rollouts import TransformersEngine
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE, LastDigit
from tests.helpers.live_memory import training_pass
from tests.helpers.sampling import draw_rollouts
from tests.helpers.tiny import tiny_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
    pytest.mark.filterwarnings("default"),  # those of CUDA and of the installed releases
]

LONG_BESIDE_SHORT = [([3, 4, 5], [6] * 40), ([7] * 60, [8, 9]), ([3] * 9, [4] * 15), ([5], [6])]


def fit(folder: Path, epochs: int, ckpt_path: Path | None = None, **settings: Any) -> dict[str, list[float]]:
    """Trains the small model on the GPU, and returns the final weights' norms and the last epoch's metrics."""
    dtype = "bfloat16" if settings.get("precision") == "bf16-mixed" else None
    module = RLRTModule(
        Policy(),
        Teacher(TEACHER_TEMPLATE),
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4, weight_decay=0.0),
        warmup_steps=0,
    )
    data = RolloutDataModule(
        engine=TransformersEngine(dtype=dtype),
        rescore=dtype is not None,
        sampling=Sampling(max_new_tokens=32),
        prompts_per_epoch=16,
        benchmarks={"heldout": Benchmark(limit=20, samples=4)},
    )
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert trainer.strategy.root_device.type == "cuda"
    metrics = {tag: [float(value)] for tag, value in trainer.callback_metrics.items()}
    norms = [float(p.detach().double().norm()) for p in module.policy.model.parameters()]
    return {**metrics, "weights": norms}


def on_gpu(policy: Policy) -> Policy:
    policy.model.to("cuda")
    return policy


def prompts_of(policy: Policy, n: int) -> list[list[int]]:
    return [policy.encode_prompt(str(p.prompt)) for p in LastDigit().problems("heldout")[:n]]


@pytest.mark.parametrize(("dtype", "mean", "largest"), [(None, 1e-5, 1e-3), ("bfloat16", 0.02, 1.0)])
def test_sampler_and_policy_agree_on_the_device(dtype: Any, mean: float, largest: float) -> None:
    policy = Policy()
    policy.load()
    rollouts = draw_rollouts(on_gpu(policy), prompts_of(policy, 24), 8, Sampling(max_new_tokens=32), dtype=dtype)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is not None):
        scores = policy.score([(r.prompt_ids, r.response_ids) for r in rollouts])
    difference = (torch.cat([r.logp_sampler.cpu() for r in rollouts]) - torch.cat(scores)).abs()
    assert difference.mean() < mean
    assert difference.max() < largest


def test_log_probs_and_gradients_equal_those_of_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        policy = tiny_policy()
        policy.model.to(device)
        ids, mask, response = (x.to(device) for x in pad_sequences(LONG_BESIDE_SHORT))
        logp, entropy = policy.log_probs(ids, mask, response)
        (logp.sum() + entropy.sum()).backward()
        found.append((logp.detach().cpu(), [p.grad.cpu() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-4)
    for cpu, cuda in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-3, atol=1e-3)


def long_pass(policy: Policy, length: int) -> int:
    """Trains on two sequences of which one is shorter, with the flash kernel alone; returns the peak memory, bytes."""
    sequences = [([3] * 16, [4] * (length - 16)), ([5] * 32, [6] * (length * 3 // 4))]
    ids, mask, response = (x.to("cuda") for x in pad_sequences(sequences))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        policy.log_probs(ids, mask, response)[0].sum().backward()
    policy.model.zero_grad()
    return torch.cuda.max_memory_allocated() - before


def test_long_sequences_take_the_flash_kernel_and_memory_grows_linearly() -> None:
    """With a padding mask, torch would refuse: the flash kernel takes none."""
    overrides = {"max_position_embeddings": 16_384, "head_dim": 32, "hidden_size": 128}
    policy = on_gpu(tiny_policy("qwen3", overrides))
    long_pass(policy, 1024)  # allocates what is kept
    peaks = [long_pass(policy, length) for length in (4096, 8192, 16_384)]
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[2] < 2.2 * peaks[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_training_pass_needs_about_as_much_memory_as_estimated(half: bool, checkpointing: bool) -> None:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "head_dim": 64,
        "vocab_size": 32_000,
    }
    policy = tiny_policy("qwen3", {**sizes, "max_position_embeddings": 2048}, gradient_checkpointing=checkpointing)
    policy._prepared(on_gpu(policy).model)
    train, estimated = training_pass(policy, rows=8, length=2048, half=half)
    train()  # the gradients exist from now on, and cuBLAS has its workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    assert 0.85 < estimated / (torch.cuda.max_memory_allocated() - before) < 1.15


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_raises_the_reward(precision: str, tmp_path: Path) -> None:
    metrics = fit(tmp_path, epochs=24, precision=precision)
    assert metrics["rollout/reward"][0] > 0.35, "it begins near 0.12"
    if precision == "bf16-mixed":
        assert 0 < metrics["rollout/mismatch_mean"][0] < 0.05


def test_fsdp2_on_one_gpu_trains_the_same(tmp_path: Path) -> None:
    plain, sharded = fit(tmp_path / "plain", epochs=2), fit(tmp_path / "fsdp2", epochs=2, strategy=FSDP2Strategy())
    for tag in ("rollout/reward", "rollout/length", "train/grad_norm", "eval/heldout/avg@4"):
        assert sharded[tag] == pytest.approx(plain[tag], rel=1e-3, abs=1e-4), tag


def test_a_resumed_run_equals_an_uninterrupted_one_within_rounding(tmp_path: Path) -> None:
    """CUDA adds in no fixed order, so a token may differ; the weights of the two runs stay close."""
    whole = fit(tmp_path / "whole", epochs=4)
    fit(tmp_path / "first", epochs=2)
    (last,) = (tmp_path / "first").glob("**/last.ckpt")
    resumed = fit(tmp_path / "second", epochs=4, ckpt_path=last)
    assert resumed["weights"] == pytest.approx(whole["weights"], rel=1e-3)
    assert resumed["rollout/reward"] == pytest.approx(whole["rollout/reward"], abs=0.05)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_frees_its_memory_in_its_sleep_and_has_the_new_weights_after_it() -> None:
    from rlrt_lightning import VllmColocateEngine

    policy = Policy()
    policy.load()
    on_gpu(policy)
    engine = VllmColocateEngine(memory=0.2)
    prompts = prompts_of(policy, 8)
    free = []
    for scale in (1.0, 1.05):
        with torch.no_grad():
            for p in policy.model.parameters():
                p.mul_(scale)
        engine.sync(policy)
        rollouts = list(engine.generate(prompts, 4, Sampling(max_new_tokens=32), list(range(8))))
        free.append(torch.cuda.mem_get_info()[0])
        engine.release()
        assert torch.cuda.mem_get_info()[0] > free[-1] + 0.1 * torch.cuda.mem_get_info()[1], "the cache is freed"
        scores = torch.cat(policy.score([(r.prompt_ids, r.response_ids) for r in rollouts]))
        difference = (torch.cat([r.logp_sampler.cpu() for r in rollouts]) - scores).abs()
        assert difference.mean() < 0.01
    engine.close()
