"""Sharded loading: each rank reads only its shard of each tensor from the safetensors files of a Hugging Face folder.

The model is built with its parameters on the meta device, sharded, and filled tensor by tensor, so a rank's host memory
peaks at its shards and the slice of one tensor. `transformers` reads every tensor whole, and also renames, converts
and dequantizes; a folder that needs any of this is refused with `NeedsTransformers`.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from rlrt_lightning.policy.sharding import local, shard_rows
from rlrt_lightning.runtime.private.transformers import kept_in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Args:
        name: Its name.
        file: The safetensors file that contains it.
        shape: Its shape.
    """

    name: str
    file: Path
    shape: tuple[int, ...]


Files = dict[str, Stored]
"""The tensors of a checkpoint by name."""


class NeedsTransformers(Exception):
    """`from_pretrained` has to load this checkpoint; the message says why."""


def meta_model(path: str, config: Any, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model as `from_pretrained` builds it, with its parameters on the meta device. Its buffers are computed by the
    model's own initialization, because those that a checkpoint does not contain (rotary frequencies) are not loaded.

    Args:
        path: Folder or Hugging Face id, for the generation config.
        config: The model's config.
        dtype: Data type of the parameters.
        attention: Attention implementation of transformers.

    Raises:
        NeedsTransformers: If the model's initialization needs the parameters' values.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    settings: Any = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    config = copy.deepcopy(config)
    config.dtype = dtype  # which `from_config` records in later releases only
    try:
        with _parameters_on_meta(), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, **settings)
        model.init_weights()  # recomputes buffers and ties weights; on the meta device it draws no random numbers
    except (NotImplementedError, RuntimeError) as error:
        raise NeedsTransformers("its initialization needs the values of weights") from error
    model.config.name_or_path = path
    with suppress(OSError):  # without the file, transformers derives it from the config too
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Moves each new parameter to the meta device. Until then it is uninitialized memory, which the operating system
    does not allocate."""

    def to_meta(module: nn.Module, name: str, weight: Tensor | None) -> Tensor | None:
        if weight is None or weight.is_meta:
            return None  # unchanged; a new object would separate tied weights
        return nn.Parameter(weight.detach().to("meta"), weight.requires_grad)

    hook = register_module_parameter_registration_hook(cast(Any, to_meta))  # its annotation allows no result
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Replaces parameters on the meta device by zeros of the same shape that take no memory, and restores the meta
    device on exit. Code that adds parameters (peft) puts them on the device of the existing ones."""
    on_meta = {weight for weight in model.parameters() if weight.is_meta}
    replaced = _replace(model, on_meta, lambda weight: torch.zeros((), dtype=weight.dtype).expand(weight.shape))
    try:
        yield
    finally:
        _replace(model, replaced, lambda weight: weight.detach().to("meta"))


def _replace(model: nn.Module, weights: set[nn.Parameter], by: Callable[[nn.Parameter], Tensor]) -> set[nn.Parameter]:
    """Replaces some of a model's parameters, and returns the new ones; tied parameters stay tied."""
    made = {weight: nn.Parameter(by(weight), weight.requires_grad) for weight in weights}
    for names, weight in _named_parameters(model):
        if weight in made:
            for owner, _, name in (full.rpartition(".") for full in names):
                setattr(model.get_submodule(owner), name, made[weight])
    return set(made.values())


def _named_parameters(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter with all its names; a tied parameter has several."""
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        names[weight].append(name)
    return [(found, weight) for weight, found in names.items()]


# -- the files -----------------------------------------------------------------------------------------------------


def tensor_files(path: str, config: Any) -> Files:
    """Finds the safetensors files as transformers does.

    Args:
        path: Folder or Hugging Face id.
        config: The model's config.

    Raises:
        NeedsTransformers: If there are none, or they contain quantized weights.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise NeedsTransformers("its weights are quantized")
    if getattr(config, "transformers_weights", None) is not None or _find(path, "adapter_config.json"):
        raise NeedsTransformers("its config.json or adapter_config.json names other files")
    if (single := _find(path, "model.safetensors")) is not None:
        parts = [single]
    elif (index := _find(path, "model.safetensors.index.json")) is not None:
        names = sorted(set(json.loads(index.read_text()).get("weight_map", {}).values()))
        parts = [found for name in names if (found := _find(path, name))]
        if len(parts) < len(names):
            raise NeedsTransformers("files of its index are missing")
    else:
        raise NeedsTransformers("it has no safetensors files")
    return {tensor.name: tensor for part in parts for tensor in _header(part)}


def _find(path: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        return Path(cast(str, cached_file(path, name)))
    except OSError:
        return None


def _header(file: Path) -> list[Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            return [Stored(name, file, tuple(tensors.get_slice(name).get_shape())) for name in names]
    except SafetensorError as error:
        raise NeedsTransformers(f"{file.name} cannot be read") from error


def check_names(model: PreTrainedModel, files: Files, dtype: torch.dtype) -> None:
    """Compares a model without adapters with the tensors of the files.

    Args:
        model: The model.
        files: The files of the tensors.
        dtype: Data type in which all tensors are loaded.

    Raises:
        NeedsTransformers: If the tensors do not match the model's parameters one to one, in name, shape and dtype.
    """
    from transformers import WeightConverter
    from transformers.conversion_mapping import get_model_conversion_mapping

    if kept_in_float32(model, dtype):
        raise NeedsTransformers("the model keeps some weights in float32")
    if any(isinstance(change, WeightConverter) for change in get_model_conversion_mapping(model)):
        raise NeedsTransformers("transformers converts its tensors")
    parameters = _named_parameters(model)
    tied = {name for names, _ in parameters for name in names if len(names) > 1}
    for names, _ in parameters:
        stored = [files[name] for name in names if name in files]
        if not stored:
            raise NeedsTransformers(f"it has no tensor {names[0]}")
        if not all(_equal(stored[0], other) for other in stored[1:]):
            raise NeedsTransformers(f"its tied weights {' and '.join(names)} differ")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in files.items()}
    differ = {n for n in found.keys() | (shapes.keys() - tied) if found.get(n) != shapes.get(n)}
    if differ:
        raise NeedsTransformers(f"{len(differ)} of its tensors do not match the model, such as {min(differ)}")


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors are equal, compared in parts to keep them out of memory: some checkpoints contain a tied head
    and the embeddings."""
    from safetensors import safe_open

    if one.shape != other.shape:
        return False
    for start in range(0, one.shape[0], 4096):
        rows = slice(start, start + 4096)
        with safe_open(one.file, framework="pt") as ours, safe_open(other.file, framework="pt") as theirs:
            if not torch.equal(ours.get_slice(one.name)[rows], theirs.get_slice(other.name)[rows]):
                return False
    return True


# -- the shards ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(model: nn.Module, files: Files, device: torch.device) -> None:
    """Reads this rank's shards of the parameters on the meta device, and the buffers that the files contain.

    Args:
        model: The sharded model.
        files: The files of the tensors.
        device: The device of the shards.
    """
    filled: dict[str, nn.Parameter] = {}
    for names, weight in _named_parameters(model):
        if weight.is_meta:
            stored = (name.replace(".base_layer.", ".") for name in names)  # a layer that got an adapter
            tensor = next(files[name] for name in stored if name in files)
            filled |= dict.fromkeys(names, _read_shard(cast(DTensor, weight), tensor, device))
    model.load_state_dict(filled, strict=False, assign=True)
    for name, buffer in model.named_buffers():
        if name in files:
            _read(buffer, files[name], slice(None))


def _read_shard(weight: DTensor, tensor: Stored, device: torch.device) -> nn.Parameter:
    """This rank's shard of a parameter."""
    shard = torch.empty_like(local(weight), device=device)
    _read(shard, tensor, shard_rows(weight))
    return _as_sharded(shard, weight)


def _read(into: Tensor, tensor: Stored, rows: slice) -> None:
    """Copies rows of a tensor from a file. The file is opened for each tensor: it is mapped into memory, and pages that
    were read count as this process's memory until it is closed."""
    from safetensors import safe_open

    if into.numel():
        with safe_open(tensor.file, framework="pt") as tensors:
            into.copy_(tensors.get_slice(tensor.name)[rows])


def _as_sharded(shard: Tensor, like: DTensor) -> nn.Parameter:
    """A sharded parameter from this rank's shard."""
    layout: Any = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return nn.Parameter(DTensor.from_local(shard, like.device_mesh, like.placements, **layout), like.requires_grad)


@torch.no_grad()
def copy_shards(model: nn.Module, source: nn.Module) -> None:
    """Gives a sharded model on the meta device a copy of another's shards and buffers.

    Args:
        model: The model that is filled.
        source: A model of the same class and sharding.
    """
    theirs = dict(source.named_parameters())
    filled: dict[str, nn.Parameter] = {}
    for names, weight in _named_parameters(model):
        filled |= dict.fromkeys(names, _as_sharded(local(theirs[names[0]]).clone(), cast(DTensor, weight)))
    model.load_state_dict(filled, strict=False, assign=True)
    for ours, buffer in zip(model.buffers(), source.buffers(), strict=True):
        ours.copy_(buffer)
