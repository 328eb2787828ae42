"""Sharded loading gives the model that transformers gives, or leaves loading to transformers and says why.

One rank with FSDP2; tests/runtime/test_strategies.py compares whole runs of two ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlrt_lightning.objective import TeacherWeights
from rlrt_lightning.policy.loading import stand_ins
from rlrt_lightning.policy.lora import LoRA
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.sharding import FSDP2Strategy, whole
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.teacher import Teacher
from tests.helpers.marks import slow_except
from tests.helpers.tiny import ARCHITECTURES, tiny_policy

SEQUENCES = [([3, 5, 7], [9, 11, 4, 8]), ([6], [10, 12])]
DIRECT = [*ARCHITECTURES, "qwen2", "gpt2", "lfm2", "phi3"]


def one_rank(precision: str, **settings: Any) -> FSDP2Strategy:
    """The strategy of a trainer, ready to shard."""
    trainer: Any = Trainer(
        accelerator="cpu", devices=1, strategy=FSDP2Strategy(**settings), precision=cast(Any, precision), logger=False
    )
    trainer.strategy.connect(LightningModule())
    trainer.strategy.setup_environment()
    return trainer.strategy


@pytest.fixture
def strategy(request: pytest.FixtureRequest) -> Iterator[FSDP2Strategy]:
    """FSDP2 on one rank; its parameter is the trainer's precision."""
    yield one_rank(getattr(request, "param", "32-true"))
    torch.distributed.destroy_process_group()


def folder_of(architecture: str, folder: Path, size: str = "20KB", **config: Any) -> str:
    """Saves a tiny model, in several files."""
    tiny_policy(architecture, config).model.save_pretrained(folder, max_shard_size=size)
    return str(folder)


def both(strategy: FSDP2Strategy, path: str, **settings: Any) -> tuple[Policy, Policy]:
    """The model read as shards, and as a whole by transformers."""
    policies = []
    for where in (strategy, None):
        torch.manual_seed(1)  # adapters are initialized at random
        policies.append(Policy(path, **settings))
        policies[-1].load(where)
    return policies[0], policies[1]


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Compares all parameters and buffers by name, shape, dtype and bit."""
    for kind in ("named_parameters", "named_buffers"):
        got = {name: whole(value.detach()) for name, value in getattr(ours, kind)(remove_duplicate=False)}
        expected = dict(getattr(theirs, kind)(remove_duplicate=False))
        assert list(got) == list(expected)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", slow_except(DIRECT, "qwen3", "gemma2", "gpt2", "phi3"))
def test_sharded_loading_gives_the_model_that_transformers_gives(
    strategy: FSDP2Strategy, tmp_path: Path, architecture: str, dtype: str
) -> None:
    """With tied and untied heads, linear layers, transposed ones and convolutions, and several kinds of rotary
    frequencies, which no file contains."""
    attention = "eager" if architecture == "gemma2" else "sdpa"
    ours, theirs = both(strategy, folder_of(architecture, tmp_path), dtype=dtype, attention=attention)
    assert isinstance(ours.model, FSDPModule)
    assert_same(ours.model, theirs.model)
    tied = ours.model.get_output_embeddings().weight is ours.model.get_input_embeddings().weight
    assert tied == theirs.config.tie_word_embeddings
    for name in ("config", "generation_config"):
        assert getattr(ours.model, name).to_dict() == getattr(theirs.model, name).to_dict()
    assert ours.model.config.name_or_path == str(tmp_path)
    for name in ("_applies_head", "_caches_prompts", "decodes_rows"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for got, expected in zip(ours.score(SEQUENCES), theirs.score(SEQUENCES), strict=True):
        assert torch.equal(got, expected)


def test_adapters_start_from_the_same_values(strategy: FSDP2Strategy, tmp_path: Path) -> None:
    path = folder_of("qwen3", tmp_path)
    ours, theirs = both(strategy, path, lora=LoRA(rank=4), gradient_checkpointing=True)
    assert_same(ours.model, theirs.model)
    trained = [[n for n, p in policy.model.named_parameters() if p.requires_grad] for policy in (ours, theirs)]
    assert trained[0] == trained[1]
    assert any(m.gradient_checkpointing for m in ours.model.modules() if hasattr(m, "gradient_checkpointing"))


@pytest.mark.parametrize("strategy", ["bf16-mixed", "bf16-true"], indirect=True)
@pytest.mark.parametrize("head_dtype", ["float32", None])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_half_precision_does_not_hide_the_head(
    strategy: FSDP2Strategy, tmp_path: Path, architecture: str, head_dtype: Any
) -> None:
    """The checks of an architecture run on the shards, so in the trainer's precision."""
    attention = "eager" if architecture == "gemma2" else "sdpa"
    ours = Policy(folder_of(architecture, tmp_path), head_dtype=head_dtype, attention=attention)
    ours.load(strategy)
    assert ours._applies_head
    # FSDP casts the float32 mask of eager attention to bfloat16, so that it has -inf and rows of padding give NaN.
    assert ours.decodes_rows or attention == "eager"


@pytest.mark.parametrize("strategy", ["bf16-mixed"], indirect=True)
def test_half_precision_does_not_hide_a_missing_soft_cap(
    strategy: FSDP2Strategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlrt_lightning.policy import forward, head

    path = folder_of("gemma2", tmp_path)
    monkeypatch.setattr(forward, "logits_from_states", lambda model, *args: head.apply_head(model.lm_head, *args))
    ours = Policy(path, attention="eager")
    ours.load(strategy)
    assert not ours._applies_head


@pytest.mark.parametrize("strategy", ["bf16-mixed"], indirect=True)
def test_shards_are_dithered_as_the_whole_model_is(strategy: FSDP2Strategy, tmp_path: Path) -> None:
    tiny_policy("qwen3").model.bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    plain, ours, theirs = (Policy(str(tmp_path)) for _ in range(3))
    plain.load()
    for policy, where in ((ours, strategy), (theirs, None)):
        policy.load(where)
        policy.dither_once(torch.bfloat16, strategy)
    assert_same(ours.model, theirs.model)
    before = dict(plain.model.named_parameters())
    moved = {name for name, weight in theirs.model.named_parameters() if not torch.equal(weight, before[name])}
    ones = {name for name in before if "norm" in name}  # their offsets are small enough to be lost only by chance
    assert {name for name in before if ".layers." in name} - ones <= moved <= {n for n in before if ".layers." in n}
    assert moved & ones


def test_gathered_weights_are_freed_before_the_optimizer_sees_them(tmp_path: Path) -> None:
    """With `reshard_after_forward=false` the checks of the architecture leave the layers gathered."""
    made = Policy(folder_of("qwen3", tmp_path))
    try:
        made.load(one_rank("bf16-mixed", reshard_after_forward=False))
        assert all(isinstance(weight, DTensor) for weight in made.model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_a_teacher_copies_the_shards(strategy: FSDP2Strategy, tmp_path: Path) -> None:
    ours, theirs = both(strategy, folder_of("qwen3", tmp_path))
    teacher = Teacher()
    teacher.schedule = TeacherWeights(ema_decay=0.5)
    teacher.load(ours, strategy)
    assert isinstance(teacher.model, FSDPModule)
    assert_same(teacher.model, theirs.model)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    with torch.no_grad():
        for weight in ours.model.parameters():
            weight.zero_()
    assert_same(teacher.model, theirs.model)
    teacher.refresh(ours, ema_decay=0.5)
    torch.testing.assert_close(whole(teacher.model.lm_head.weight), theirs.model.lm_head.weight / 2)


# -- what transformers has to load ---------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Changes the tensors of a folder."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def without_prefix(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def head_is_stored(tensors: dict[str, Any], difference: float = 0.0) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += difference


LEFT_TO_TRANSFORMERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "base_model_prefix": (edited(without_prefix), "it has no tensor model.embed_tokens.weight"),
    "pickle": (pickled, "it has no safetensors files"),
    "tied_weights": (edited(partial(head_is_stored, difference=1e-3)), "its tied weights "),
    "one_more": (edited(lambda tensors: tensors.update(extra=torch.ones(1))), "do not match the model, such as extra"),
}


@pytest.mark.parametrize("case", LEFT_TO_TRANSFORMERS)
def test_transformers_loads_what_does_not_match_one_to_one(
    strategy: FSDP2Strategy, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    change, why = LEFT_TO_TRANSFORMERS[case]
    path = folder_of("qwen3", tmp_path, size="1GB", tie_word_embeddings=True)
    change(tmp_path)
    with caplog.at_level(logging.INFO):
        ours, theirs = both(strategy, path)
    assert "each rank first loads the whole model: " in caplog.text
    assert why in caplog.text
    assert not isinstance(ours.model, FSDPModule)
    assert_same(ours.model, theirs.model)


def test_a_tied_head_may_be_stored_as_well(strategy: FSDP2Strategy, tmp_path: Path) -> None:
    path = folder_of("qwen3", tmp_path, size="1GB", tie_word_embeddings=True)
    edited(head_is_stored)(tmp_path)
    ours, theirs = both(strategy, path)
    assert isinstance(ours.model, FSDPModule)
    assert_same(ours.model, theirs.model)


def test_transformers_loads_experts_because_it_merges_them(
    strategy: FSDP2Strategy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "pad_token_id": 0}
    config = Qwen3MoeConfig(vocab_size=57, num_key_value_heads=2, eos_token_id=1, **sizes, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        Policy(str(tmp_path)).load(strategy)
    assert "the whole model: transformers converts its tensors" in caplog.text


def test_quantized_weights_are_left_to_transformers(strategy: FSDP2Strategy, tmp_path: Path) -> None:
    from rlrt_lightning.policy.loading import NeedsTransformers, tensor_files

    config = Policy(folder_of("qwen3", tmp_path)).config
    assert tensor_files(str(tmp_path), config)
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(NeedsTransformers, match="quantized"):
        tensor_files(str(tmp_path), config)


def lacks_a_norm(folder: Path) -> None:
    edited(lambda tensors: tensors.pop("model.norm.weight"))(folder)


def has_another_shape(folder: Path) -> None:
    edited(lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))(folder)


def lacks_a_file(folder: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "missing.safetensors"),
    }
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lacks_a_norm, r"lacks 1 weights, such as model\.norm\.weight"),
        (has_another_shape, r"has other shapes for 1 weights, such as model\.norm\.weight"),
        (lacks_a_file, r"missing\.safetensors"),
    ],
)
def test_an_incomplete_folder_is_refused_in_one_line(
    strategy: FSDP2Strategy, tmp_path: Path, sharded: bool, change: Callable[[Path], Any], why: str
) -> None:
    path = folder_of("qwen3", tmp_path, size="1GB")
    change(tmp_path)
    with pytest.raises(ConfigError, match=why) as refused:
        Policy(path).load(strategy if sharded else None)
    assert "\n" not in str(refused.value)


def test_stand_ins_take_no_memory_and_keep_ties() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, device="meta"), "b": nn.Linear(3, 3, bias=False, device="meta")})
    cast(Any, model["b"]).weight = cast(Any, model["a"]).weight
    with stand_ins(model):
        weights = list(model.parameters())
        assert [w.untyped_storage().nbytes() for w in weights] == [4, 4]
        assert weights[0].shape == (3, 3)
        model["c"] = nn.Linear(3, 3)
    assert [name for name, w in model.named_parameters() if not w.is_meta] == ["c.weight", "c.bias"]
    assert cast(Any, model["b"]).weight is cast(Any, model["a"]).weight
