"""The estimate of memory: exact for what training holds, close for what a pass needs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from benchmarks.memory import RecipeMemory
from rlrt_lightning import LastDigit, Policy, Sampling, Teacher, TransformersEngine
from rlrt_lightning.callbacks import TeacherRefresh, memory_estimate
from rlrt_lightning.callbacks.memory_estimate import Estimate, estimate
from rlrt_lightning.policy import memory
from rlrt_lightning.policy.lora import LoRA
from rlrt_lightning.runtime.optimizers import state_bytes
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE
from tests.helpers.epochs import fit_and_record
from tests.helpers.live_memory import LiveMemory, training_pass
from tests.helpers.processes import ROOT
from tests.helpers.recipes import RECIPES
from tests.helpers.tiny import tiny_policy

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": 3000}


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class Measure(Callback):
    """The estimate at the start, the bytes of weights, gradients and optimizer state at the end, and the padded tokens
    of the largest pass."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = estimate(trainer, pl_module, trainer.datamodule, None)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.tokens = max(self.tokens, batch.input_ids.numel())

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        weights = list(pl_module.policy.parameters())
        state = [value for values in optimizer.state.values() for value in values.values()]
        self.real = {
            "weights": nbytes(weights),
            "gradients": nbytes(p.grad for p in weights if p.grad is not None),
            "optimizer state": nbytes(state),
            "teacher's weights": nbytes(pl_module.teacher.parameters()),
        }


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["all weights", "adapters"])
def test_what_training_holds_is_estimated_exactly(lora: LoRA | None, tmp_path: Path) -> None:
    measure, policy = Measure(), Policy(lora=lora)
    adamw = lambda p: torch.optim.AdamW(p, lr=1e-3)  # noqa: E731
    fit_and_record(
        tmp_path,
        LastDigit(),
        callbacks=[measure, TeacherRefresh(ema_decay=0.5)],
        optimizer=adamw,
        policy=policy,
        minibatches=2,
    )
    held = measure.found.held
    assert "gradients" not in held
    estimated = {**held, "gradients": measure.found.phases["training pass"]["gradients"]}
    assert {name: estimated[name] for name in measure.real} == measure.real
    assert min(measure.real.values()) > 0
    assert held["gradient buckets"] == 0, "a single process has no DDP"


def test_gradients_exist_during_the_update_only(tmp_path: Path) -> None:
    class Rollouts(TransformersEngine):
        def sync(self, policy: Policy) -> None:
            note("rollouts", policy)
            super().sync(policy)

    class Update(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            note("end of the epoch", pl_module.policy)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            note("update", pl_module.policy)

    def note(phase: str, policy: Policy) -> None:
        seen.append((phase, any(p.grad is not None for p in policy.parameters())))

    seen: list[tuple[str, bool]] = []
    fit_and_record(tmp_path, LastDigit(), callbacks=[Update()], engine=Rollouts(), epochs=2, minibatches=2)
    epoch = [("rollouts", False), ("update", True), ("update", True), ("end of the epoch", False)]
    assert seen == 2 * epoch


@pytest.mark.parametrize("rest_on_cpu", [False, True])
def test_the_reference_of_the_kl_is_estimated_exactly(rest_on_cpu: bool, tmp_path: Path) -> None:
    measure, teacher = Measure(), Teacher(TEACHER_TEMPLATE, rest_on_cpu=rest_on_cpu)
    settings: dict[str, Any] = {"teacher": teacher, "reference_kl": 0.1}
    _, module = fit_and_record(tmp_path, LastDigit(), callbacks=[measure], model=settings)
    assert module.reference is not None
    found = {"reference's weights": nbytes(module.reference.parameters())}
    assert found["reference's weights"] == measure.found.held["weights"]
    if rest_on_cpu:
        assert measure.found.phases["scoring by the reference"] == found
        assert not found.items() & measure.found.held.items()
    else:
        assert found.items() <= measure.found.held.items()


@pytest.mark.parametrize("tokens_per_pass", [None, 128, 300, 10_000])
def test_no_pass_is_larger_than_the_estimated_one(tokens_per_pass: int | None, tmp_path: Path) -> None:
    measure = Measure()
    settings = {"max_prompt_tokens": 40, "prompts_per_epoch": 8, "tokens_per_pass": tokens_per_pass}
    fit_and_record(tmp_path, LastDigit(), callbacks=[measure], **settings)
    assert measure.found.length == 72
    assert 0 < measure.tokens <= measure.found.tokens
    assert measure.found.tokens == {None: 16 * 72, 128: 128, 300: 300, 10_000: 16 * 72}[tokens_per_pass]


@pytest.mark.parametrize(
    ("architecture", "attention", "checkpointing", "dtype", "half"),
    [
        ("qwen3", "sdpa", False, torch.float32, False),
        ("qwen3", "sdpa", True, torch.float32, False),
        ("qwen3", "sdpa", False, torch.float32, True),
        ("qwen3", "sdpa", True, torch.float32, True),
        ("qwen3", "sdpa", False, torch.bfloat16, False),
        ("llama", "sdpa", False, torch.float32, True),
        ("llama", "eager", False, torch.float32, False),
    ],
)
def test_a_training_pass_needs_about_as_much_as_estimated(
    architecture: str, attention: str, checkpointing: bool, dtype: torch.dtype, half: bool
) -> None:
    """Within 15 % of the bytes of the tensors that exist at the same time, with `half` under autocast."""
    policy = tiny_policy(architecture, {**SIZES, "max_position_embeddings": 512}, logits_chunk=64, attention=attention)
    policy.model.to(dtype)
    policy.gradient_checkpointing = checkpointing
    policy._prepared(policy.model)
    train, estimated = training_pass(policy, rows=4, length=256, half=half)
    train()  # the gradients exist from now on
    existing = [*policy.parameters(), *policy.buffers(), *(p.grad for p in policy.parameters())]
    with LiveMemory(existing) as live:
        train()
    assert 0.85 < estimated / live.peak < 1.15


@pytest.mark.parametrize(("checkpointing", "measured"), [(False, 11_195_712_512), (True, 2_172_905_472)])
def test_grouped_queries_in_float32_on_a_gpu_keep_all_pairs(checkpointing: bool, measured: int) -> None:
    """As measured by tests/gpu on an NVIDIA H200 with torch 2.11, which needs a GPU."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
    policy = tiny_policy("qwen3", {**sizes, "vocab_size": 32_000, "max_position_embeddings": 2048})
    chunk, estimated = policy.tokens_with_logits(8 * 2048), {}
    for device, computed in (("cuda", None), ("cuda", 2), ("cpu", None)):
        shape = memory.Shape.of(policy.model, "sdpa", device, computed)
        parts = memory.training_pass(shape, 8 * 2048, 2048, chunk, checkpointing=checkpointing)
        estimated[device, computed] = sum(parts.values())
    assert 0.85 < estimated["cuda", None] / measured < 1.15
    assert estimated["cuda", 2] == estimated["cpu", None] < 0.6 * measured


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-3),
        lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
    ids=["AdamW", "AMSGrad", "SGD", "momentum"],
)
def test_the_state_of_an_optimizer_is_known_before_it_exists(make: Any) -> None:
    layer = torch.nn.Linear(5, 7)
    optimizer = make(layer.parameters())
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    found = state_bytes(make, layer.parameters())
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert found == nbytes(value for value in state if value is not None)


def test_an_optimizer_that_reads_values_is_taken_for_adam() -> None:
    """As torch's fused implementations, which cannot take a step on the meta device."""
    layer = torch.nn.Linear(5, 7)
    assert state_bytes(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), layer.parameters()) is None
    assert memory.held(100.0)["optimizer state"] == 200.0


def test_the_copy_of_the_transformers_engine_is_part_of_the_rollouts() -> None:
    policy, engine = tiny_policy(), TransformersEngine(dtype="bfloat16")
    engine.sync(policy)
    assert engine.device_bytes(policy, None) == (nbytes(engine._copy.parameters()), 0)
    assert TransformersEngine().device_bytes(policy, None) == (0, 0)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_of_lightning_are_counted(tmp_path: Path) -> None:
    measure = Measure()
    fit_and_record(tmp_path, LastDigit(), callbacks=[measure, EMAWeightAveraging()])
    assert measure.found.held["averaged weights"] == measure.real["weights"]


def test_the_peak_is_that_of_the_largest_phase() -> None:
    found = Estimate({"weights": 4e9}, {"training pass": {"logits": 1e9}, "rollouts": {"engine": 2e9}}, 1234, 100)
    assert found.peak == 6e9
    lines = found.lines(8 * 10**9)
    assert lines[0] == "estimated memory in GB, at most 1,234 tokens in a training pass:"
    assert [line.split() for line in lines[1:]] == [
        ["weights", "4.0"],
        ["logits", "(training", "pass)", "1.0"],
        ["engine", "(rollouts)", "2.0"],
        ["peak", "6.0", "of", "the", "device's", "8.0"],
    ]


def test_an_architecture_without_an_estimate_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one without attention, whose config has no number of heads."""
    monkeypatch.setattr(memory.Shape, "of", Mock(side_effect=AttributeError("num_attention_heads")))
    measure = Measure()
    with caplog.at_level(logging.INFO):
        fit_and_record(tmp_path, LastDigit(), callbacks=[measure])
    assert measure.found.phases["training pass"] == {"gradients": measure.found.held["weights"], "engine": 0}
    assert "the training pass of Qwen3ForCausalLM is not estimated" in caplog.text


@pytest.mark.parametrize("enough", [True, False])
def test_a_run_that_may_not_fit_is_warned_about_and_continues(
    enough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_estimate.memory, "device_memory", lambda *_: 10**12 if enough else 10**6)
    with caplog.at_level(logging.INFO):
        _, module = fit_and_record(tmp_path, LastDigit(), sampling=Sampling(max_new_tokens=8), minibatches=2)
    assert module.trainer.global_step == 2
    table = [record.getMessage() for record in caplog.records if record.name.startswith("lightning")]
    assert any(("estimated memory: " if enough else "activations (training pass)") in line for line in table)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "may need" in r.getMessage()]
    assert len(warned) == (0 if enough else 1)
    if warned:
        for setting in ("data.tokens_per_pass", "model.policy.gradient_checkpointing=true", "trainer.strategy=fsdp"):
            assert setting in warned[0]
        assert warned[0].index("data.tokens_per_pass") < warned[0].index("trainer.strategy"), "the largest part first"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_the_estimate_and_fits_on_its_gpu(name: str) -> None:
    path = ROOT / "configs/recipes" / f"{name}.yaml"
    found = RecipeMemory.of(path)
    paragraph = path.read_text(encoding="utf-8").split("\n#\n")[1]
    stated = [float(size) for size in re.findall(r"([\d.]+) GB", paragraph.replace("\n#", ""))]
    assert stated == [round(size / 1e9, 1) for size in (found.peak, found.held, found.training, found.rollouts)]
    assert found.peak < 0.9 * found.gpu, "the CUDA context and fragmentation need some"


def test_the_memory_of_a_cpu_is_shared_by_its_processes() -> None:
    whole = memory.device_memory(torch.device("cpu"), 1)
    assert whole is not None
    assert whole > 10**8
    assert memory.device_memory(torch.device("cpu"), 2) == whole // 2
    assert memory.device_memory(torch.device("meta"), 1) is None
