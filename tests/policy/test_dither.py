"""Dither: the rounded weights stay those of the checkpoint, and small updates reach them in full on average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor

from rlrt_lightning import LastDigit, Policy
from rlrt_lightning.policy.dither import PERIOD, dithered
from rlrt_lightning.policy.lora import LoRA
from tests.helpers.epochs import fit_and_record
from tests.helpers.tiny import half_checkpoint, tiny_policy

HALVES = [torch.bfloat16, torch.float16]
SEQUENCES = [([3, 5, 7], [9, 11, 4, 8]), ([6], [10, 12])]


def weights(dtype: torch.dtype, count: int = 2 * PERIOD + 5) -> Tensor:
    """Float32 weights on the grid of `dtype`, of the size of a model's, with powers of two and zeros."""
    drawn = (0.05 * torch.randn(count, generator=torch.Generator().manual_seed(0))).to(dtype).float()
    powers = torch.tensor([2.0**n for n in range(-30, 8)]).to(dtype).float()
    return torch.cat([powers, -powers, torch.zeros(3), drawn])


@pytest.mark.parametrize("dtype", HALVES)
def test_the_rounded_weights_stay_the_same(dtype: torch.dtype) -> None:
    w = weights(dtype)
    moved = dithered(w, dtype)
    assert torch.equal(moved.to(dtype).float(), w)
    assert (moved[w != 0] != w[w != 0]).float().mean() > 0.99
    assert torch.equal(moved[w == 0], w[w == 0])


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_that_are_not_on_the_grid_stay_as_they_are(dtype: torch.dtype) -> None:
    w = weights(dtype) * 1.0001
    off = w.to(dtype).float() != w
    assert off.float().mean() > 0.9
    assert torch.equal(dithered(w, dtype)[off], w[off])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [0.01, 0.2, 3.0])
def test_an_update_arrives_in_the_rounded_weights_on_average(dtype: torch.dtype, size: float) -> None:
    """Updates of a hundredth of a rounding step, of a fifth, and of several."""
    w = weights(dtype)
    w = w[(w.abs() > 1e-3) & (w.abs() < 0.3)]
    step = torch.finfo(dtype).eps * 2 ** w.abs().log2().floor()
    update = size * step * torch.randn(len(w), generator=torch.Generator().manual_seed(1)).sign()

    def arrived(master: Tensor) -> float:
        change = (master + update).to(dtype).float() - master.to(dtype).float()
        return float((change * update).sum() / (update * update).sum())

    assert arrived(dithered(w, dtype)) == pytest.approx(1, abs=0.02)
    if size < 0.5:
        assert arrived(w) < 0.01  # without dither nothing changes except powers of two, towards zero


def test_a_shard_gets_the_offsets_of_the_whole_tensor() -> None:
    whole = weights(torch.bfloat16)[:1_300_000].view(1300, 1000)
    found = dithered(whole, torch.bfloat16)
    for rows in (slice(0, 700), slice(700, 1300), slice(1299, 1300), slice(1300, 1300)):
        shard = dithered(whole[rows], torch.bfloat16, start=rows.start * 1000)
        assert torch.equal(shard, found[rows])


# -- a run ---------------------------------------------------------------------------------------------------------


class Weights(Callback):
    """Keeps the decoder layers' matrices before and after training."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = self.now(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.after = self.now(pl_module)

    def now(self, module: Any) -> Tensor:
        named = module.policy.model.named_parameters()
        return torch.cat([p.detach().flatten() for name, p in named if ".layers." in name and p.ndim > 1])


@pytest.fixture(scope="module")
def half_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model as a bfloat16 checkpoint."""
    return half_checkpoint(tmp_path_factory.mktemp("half"))


def trained(path: str, folder: Path, precision: str, dither: bool = True) -> Weights:
    """The weights of a run of two epochs."""
    seed_everything(0)
    kept = Weights()
    fit_and_record(
        folder,
        LastDigit(),
        epochs=2,
        callbacks=[kept],
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-6),
        policy=Policy(path, dither=dither),
        precision=precision,
        model={"warmup_steps": 0},
        prompts_per_epoch=8,
        rollouts_per_prompt=8,
        minibatches=2,
    )
    return kept


def arrived(run: Weights) -> float:
    """The share of the float32 weights' change that is in the rounded weights."""
    change, rounded = run.after - run.before, run.after.bfloat16().float() - run.before.bfloat16().float()
    return float((change * rounded).sum() / (change * change).sum())


def test_a_run_in_bf16_mixed_trains_the_model_that_it_computes_with(half_model: str, tmp_path: Path) -> None:
    plain = trained(half_model, tmp_path, "bf16-mixed", dither=False)
    dithered = trained(half_model, tmp_path, "bf16-mixed")
    assert torch.equal(dithered.before.bfloat16(), plain.before.bfloat16())
    assert arrived(plain) < 0.2
    assert arrived(dithered) == pytest.approx(1, abs=0.1)


def test_a_run_in_float32_starts_from_the_checkpoint(half_model: str, tmp_path: Path) -> None:
    plain = Policy(half_model)
    plain.load()
    kept = trained(half_model, tmp_path, "32-true")
    assert torch.equal(kept.before, Weights().now(type("Module", (), {"policy": plain})))


@pytest.mark.parametrize(("precision", "warns"), [("bf16-true", True), ("bf16-mixed", False)])
def test_training_of_half_precision_weights_is_warned_of(
    half_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: str, warns: bool
) -> None:
    trained(half_model, tmp_path, precision)
    assert ("rounds away steps" in caplog.text) == warns


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "qwen3_moe", "gpt2"])
def test_forward_passes_in_half_precision_are_those_of_the_checkpoint(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    """Also with biases, transposed weights, and experts, which autocast does not round."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "moe" in architecture else {}
    model = tiny_policy(architecture, experts).model
    for name, p in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(p)
    model.to(dtype).save_pretrained(tmp_path)
    plain, moved = Policy(str(tmp_path)), Policy(str(tmp_path))
    for policy in (plain, moved):
        policy.load()
    moved.dither_once(dtype)
    start = dict(plain.model.named_parameters())
    changed = {name for name, p in moved.model.named_parameters() if not torch.equal(p, start[name])}
    assert any("q_proj" in name or "c_attn" in name for name in changed)
    assert any("bias" in name for name in changed) == (architecture in ("qwen2", "gpt2"))
    assert not any("embed" in name or "norm" in name or "expert" in name for name in changed)
    with torch.autocast("cpu", dtype):
        for got, expected in zip(moved.score(SEQUENCES), plain.score(SEQUENCES), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_that_is_merged_into_half_precision_is_not_rounded_away(half_model: str, dtype: Any) -> None:
    made = {dither: Policy(half_model, dtype=dtype, lora=LoRA(rank=4), dither=dither) for dither in (True, False)}
    changes = {}
    for dither, policy in made.items():
        policy.load()
        before = dict(policy.merged_weights(torch.bfloat16))
        assert all(
            torch.equal(before[name], weight.to(before[name])) for name, weight in policy.base_weights()
        )  # new adapters have no effect
        torch.manual_seed(0)
        for name, p in policy.model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=1e-3)
        after, exact = dict(policy.merged_weights(torch.bfloat16)), dict(policy.merged_weights(torch.float32))
        adapted = [name for name in before if "proj" in name]
        change = torch.cat([(after[n].float() - before[n].float()).flatten() for n in adapted])
        wanted = torch.cat([(exact[n] - before[n].float()).flatten() for n in adapted])
        assert 0 < wanted.abs().median() < 1e-4
        changes[dither] = float((change * wanted).sum() / (wanted * wanted).sum())
    assert changes[True] == pytest.approx(1, abs=0.15)
    assert changes[False] < 0.5
