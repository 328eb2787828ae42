"""The undocumented names of other libraries that we rely on; `rlrt_lightning/runtime/private/` says what for.

A test fails by name if a release renames or changes one.
"""

from __future__ import annotations

import inspect
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse._typehints as typehints
import pytest
import torch
from jsonargparse import ArgumentParser
from jsonargparse._util import NestedArg
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemWriter, save
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlrt_lightning.cli.argument_errors import RLRTParser
from rlrt_lightning.runtime.checkpoints import Index
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.private.jsonargparse import actions, exact_values, own_defaults, value_type
from rlrt_lightning.runtime.private.torch import INDEX_CLASSES
from rlrt_lightning.runtime.private.transformers import kept_in_float32
from tests.helpers.processes import ROOT


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


# -- names and signatures ------------------------------------------------------------------------------------------

SIGNATURES: dict[str, tuple[Callable[[], Callable[..., Any]], list[str]]] = {
    "jsonargparse._typehints.discard_init_args_on_class_path_change": (
        lambda: typehints.discard_init_args_on_class_path_change,
        ["parser_or_action", "prev_val", "value"],
    ),
    "jsonargparse._typehints.adapt_typehints": (
        lambda: typehints.adapt_typehints,
        ["val", "typehint", "serialize", "instantiate_classes", "prev_val", "orig_val"],
    ),
    "jsonargparse._typehints.basic_json_or_yaml_load": (lambda: typehints.basic_json_or_yaml_load, ["value"]),
    "jsonargparse._util.NestedArg": (lambda: NestedArg, ["key", "val"]),
    "ModelCheckpoint._save_last_checkpoint": (
        lambda: ModelCheckpoint._save_last_checkpoint,
        ["self", "trainer", "monitor_candidates"],
    ),
    "ModelCheckpoint._monitor_candidates": (lambda: ModelCheckpoint._monitor_candidates, ["self", "trainer"]),
    "DynamicLayer.lazy_initialization": (
        lambda: DynamicLayer.lazy_initialization,
        ["self", "key_states", "value_states"],
    ),
    "DynamicLayer.get_seq_length": (lambda: DynamicLayer.get_seq_length, ["self"]),
    "Cache.reorder_cache": (lambda: DynamicCache.reorder_cache, ["self", "beam_idx"]),
}

VALUES: dict[str, tuple[Callable[[], Any], Any]] = {
    "ModelCheckpoint._every_n_train_steps": (lambda: ModelCheckpoint(every_n_train_steps=3)._every_n_train_steps, 3),
    "ModelCheckpoint._train_time_interval": (lambda: ModelCheckpoint()._train_time_interval, None),
    "ModelCheckpoint._last_global_step_saved": (lambda: ModelCheckpoint()._last_global_step_saved, 0),
    "ModelParallelStrategy._data_parallel_size": (lambda: ModelParallelStrategy()._data_parallel_size, "auto"),
    "argparse.ArgumentParser._actions": (lambda: [action.dest for action in actions(parser())], ["help", "n"]),
    "jsonargparse's Action._typehint": (lambda: value_type(actions(parser())[1]), list[int]),
    "DynamicLayer.is_initialized": (lambda: DynamicLayer().is_initialized, False),
    "DynamicLayer.keys and values": (lambda: (DynamicLayer().keys, DynamicLayer().values), (None, None)),
    "DynamicCache.layers": (lambda: [type(layer) for layer in empty_cache().layers], [DynamicLayer] * 2),
}


@pytest.mark.parametrize("name", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_transformers_keeps_the_weights_in_float32_that_a_class_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, name, ["o_proj"])
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.float32} == {
        "model.layers.0.self_attn.o_proj.weight"
    }
    assert kept_in_float32(model, torch.float16)
    assert not kept_in_float32(model, torch.float32)
    monkeypatch.undo()
    assert not kept_in_float32(LlamaForCausalLM(config), torch.float16)


def parser() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--n", type=list[int])
    return parser


def empty_cache() -> DynamicCache:
    return DynamicCache(config=LlamaConfig(num_hidden_layers=2))


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_private_method_has_the_parameters_that_it_is_called_with(name: str) -> None:
    function, expected = SIGNATURES[name]
    assert parameters(function())[: len(expected)] == expected


@pytest.mark.parametrize("name", VALUES)
def test_a_private_attribute_holds_what_is_read_from_it(name: str) -> None:
    read, expected = VALUES[name]
    assert read() == expected


# -- behaviour -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_index_of_shards_names_the_classes_that_are_allowed(tmp_path: Path) -> None:
    """If torch named another private class, our own sharded checkpoints would be refused."""
    save({"w": torch.ones(3), "step": 1}, storage_writer=FileSystemWriter(str(tmp_path)), no_dist=True)
    named: set[tuple[str, str]] = set()

    class Recorder(Index):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    with (tmp_path / ".metadata").open("rb") as file:
        Recorder(file).load()
    assert named >= INDEX_CLASSES
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.eval"):
        Index(file).find_class("builtins", "eval")


class Base: ...


class One(Base):
    def __init__(self, a: int = 1, b: int = 1) -> None: ...


class Two(Base):
    def __init__(self, a: int = 2, c: int = 2) -> None: ...


def test_other_parsers_keep_the_behaviour_of_jsonargparse() -> None:
    theirs = typehints.discard_init_args_on_class_path_change
    words = [f"--base={__name__}.One", "--base.a=5", f"--base={__name__}.Two"]

    def parsed(parser: ArgumentParser) -> int:
        parser.add_argument("--base", type=Base)
        return parser.parse_args(words).base.init_args.a

    assert parsed(ArgumentParser()) == 5
    assert parsed(RLRTParser()) == 2, "a class has its own defaults"
    assert typehints.discard_init_args_on_class_path_change is theirs
    with pytest.raises(KeyError), own_defaults():
        raise KeyError
    assert typehints.discard_init_args_on_class_path_change is theirs


class Texts(Base):
    def __init__(self, text: str | None = "", limit: int | None = 1) -> None: ...


def test_other_parsers_keep_the_way_in_which_jsonargparse_reads_texts() -> None:
    theirs = typehints.basic_json_or_yaml_load, typehints.adapt_typehints

    def parsed(parser: ArgumentParser, *flags: str) -> Any:
        parser.add_argument("--base", type=Base)
        return vars(parser.parse_args([f"--base={__name__}.Texts", *flags]).base.init_args)

    flags = "--base.text=####(.*)", "--base.limit=null"
    assert parsed(ArgumentParser(), *flags) == {"text": None, "limit": None}
    assert parsed(RLRTParser(), *flags) == {"text": "####(.*)", "limit": None}
    assert parsed(ArgumentParser(), "--base.limit=#5")["limit"] is None
    with pytest.raises(ConfigError, match=r"base\.limit: it has to be int or null; it is #5"):
        parsed(RLRTParser(), "--base.limit=#5")
    with pytest.raises(KeyError), exact_values():
        raise KeyError
    assert theirs == (typehints.basic_json_or_yaml_load, typehints.adapt_typehints)


class Handlers(BoringModel):
    """Records the signal handlers at the hooks in which `StopSignal` reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        self.seen["setup"] = signal.getsignal(signal.SIGTERM)

    def train_dataloader(self) -> Any:
        self.seen["loader"] = signal.getsignal(signal.SIGTERM)
        return super().train_dataloader()


def test_lightning_installs_its_handlers_between_setup_and_loaders_and_removes_them(tmp_path: Path) -> None:
    def before(*_: Any) -> None: ...

    handler = signal.signal(signal.SIGTERM, before)
    try:
        model = Handlers()
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            max_steps=1, limit_val_batches=0, enable_checkpointing=False, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(model)
        assert model.seen["setup"] is before
        assert model.seen["loader"] is not before
        assert type(model.seen["loader"]).__module__.partition(".")[0] == "lightning", "recognized by module"
        assert trainer.received_sigterm is False
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_sympys_parser_evaluates_by_the_name_eval_of_its_module() -> None:
    """In a new process, because the name stays replaced. tests/tasks/test_reasoning_gym.py tests reasoning-gym's."""
    code = """
import sympy.parsing.sympy_parser as parser
from rlrt_lightning.tasks import closed_eval as closing
assert 'eval' not in vars(parser)
parser.parse_expr(closing.CANARY)
assert closing.ran, 'the canary must run before eval is replaced'
closing.close_eval(parser.parse_expr)
assert not closing.ran and str(parser.parse_expr('2*x + x')) == '3*x'
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
