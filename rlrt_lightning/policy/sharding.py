"""Sharded weights (FSDP2): the strategy, and forward passes with sharded weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlrt_lightning.runtime.checkpoints import checkpoint_aside, no_code
from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.runtime.private.lightning import shard_over_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (torch's FSDP2): each rank stores a shard of weights, gradients and optimizer
    states, and the weights of a decoder layer are gathered while it computes.

    Args:
        reshard_after_forward: Free a layer's gathered weights after the forward pass and gather them again for the
            backward pass: less memory, 1.5 times the communication.
        save_distributed_checkpoint: Save checkpoints as a folder to which each rank writes its shard. False saves one
            file that every strategy can resume; it has to fit into the memory of the first rank's machine.
        dp_shard_size: Number of ranks that share one copy of the weights (hybrid sharding, HSDP), usually the GPUs of a
            machine: layers are gathered within these ranks, and only gradients are averaged between the groups. It has
            to divide the number of ranks; null shards over all ranks.
        process_group_backend: Backend of torch.distributed; null is nccl on GPUs, gloo on CPUs.
        timeout_s: Timeout of a collective, in seconds. Ranks wait for the slowest one's rollouts and verdicts.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        dp_shard_size: int | None = None,
        process_group_backend: str | None = None,
        timeout_s: float = 3600.0,
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ConfigError(f"FSDP2Strategy.timeout_s is {timeout_s}; it has to be above 0")
        if dp_shard_size is not None and dp_shard_size < 1:
            raise ConfigError(f"FSDP2Strategy.dp_shard_size is {dp_shard_size}; it has to be at least 1, or null")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )
        self.reshard_after_forward = reshard_after_forward
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.dp_shard_size = dp_shard_size

    @property
    def gathers_in_bf16(self) -> bool:
        """Whether the float32 weights of decoder layers are gathered in bfloat16."""
        precision = self.precision_plugin
        return isinstance(precision, MixedPrecision) and precision.precision == "bf16-mixed"

    def setup_environment(self) -> None:
        """See `Strategy.setup_environment`. Creates the mesh of the ranks that share the weights.

        Raises:
            ConfigError: If the ranks cannot be divided into groups of `dp_shard_size`.
        """
        ranks = self.num_nodes * self.num_processes
        size = self.dp_shard_size or ranks
        if ranks % size:
            raise ConfigError(
                f"FSDP2Strategy.dp_shard_size is {size}, which does not divide the number of ranks, {ranks}; set it to "
                "the number of GPUs of a machine, or null to shard over all ranks"
            )
        shard_over_all_ranks(self)
        super().setup_environment()
        shape, names = ((ranks,), ("shard",)) if size == ranks else ((ranks // size, size), ("replicate", "shard"))
        self.mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        """The ranks over which weights are sharded, in the last dimension, and replicated, in the first of two."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """See `Strategy.save_checkpoint`. Writes to a temporary path and renames it, so that checkpoints are always
        complete."""
        if not self.save_distributed_checkpoint:
            super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        if self.is_global_zero:
            with checkpoint_aside(path) as aside:
                self.broadcast(aside)
                super().save_checkpoint(checkpoint, aside, storage_options)
                self.barrier()
        else:
            super().save_checkpoint(checkpoint, self.broadcast(path), storage_options)
            self.barrier()
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """See `Strategy.load_checkpoint`.

        Raises:
            ConfigError: If the checkpoint is of another model, or a shard is corrupt.
        """
        try:
            with no_code():
                return super().load_checkpoint(checkpoint_path, weights_only)
        except (Exception, CheckpointException) as error:
            raise ConfigError(f"ckpt_path: {checkpoint_path} does not fit this model: {first_line(error)}") from error

    def shard(self, model: PreTrainedModel, head_in_float32: bool = False) -> None:
        """Shards the model's weights; the weights of a decoder layer are gathered together.

        Args:
            model: The model.
            head_in_float32: Whether to gather the head, the embeddings and the last norm in the weights' dtype, even if
                decoder layers are gathered in bfloat16.
        """
        self.precision_plugin.convert_module(model)  # Lightning would do so when FSDP has recorded the dtype
        half = torch.bfloat16 if self.gathers_in_bf16 else None
        settings: Any = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None),
        }
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **settings)
        if head_in_float32:
            settings["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
        fully_shard(model, **settings)  # embeddings, norm and head stay gathered until the backward pass has used them
        cast(Any, model).decode = MethodType(lambda self, **inputs: self.get_decoder()(**inputs), model)
        register_fsdp_forward_method(model, "decode")


def check_strategy(strategy: Strategy) -> None:
    """Refuses strategies that do not support rollouts and checkpoints.

    Raises:
        ConfigError: If the strategy is not supported.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} is not supported; use ddp if model, gradients and optimizer "
            "states fit on one device, otherwise fsdp2"
        )


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=(FSDP2Strategy.__doc__ or "").split("\n\n")[0])


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers: the longest module list that is not inside another one (such as a layer's experts).

    Raises:
        ConfigError: If no decoder layers are found.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    layers = list(max(outer, key=len, default=[]))
    if not layers:
        raise ConfigError(f"trainer.strategy: no decoder layers to shard were found in {type(model).__name__}")
    return layers


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_rows(tensor: DTensor) -> slice:
    """The rows of the full tensor in this rank's shard; FSDP splits the first dimension as `torch.chunk` does."""
    mesh, rows, sharded = tensor.device_mesh, tensor.shape[0], tensor.device_mesh.ndim - 1
    size = math.ceil(rows / mesh.size(sharded))
    start = min(size * mesh.get_local_rank(sharded), rows)
    return slice(start, min(start + size, rows))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def move_weights(model: nn.Module, device: torch.device) -> None:
    """Moves a model's weights to a device. Unless the model is sharded, its buffers stay: DDP broadcasts all buffers of
    a module, and they have to be on one device for that."""
    if isinstance(model, FSDPModule):
        model.to(device)
        return
    for weight in model.parameters():
        weight.data = weight.data.to(device)


def decoder_states(model: PreTrainedModel, **inputs: Any) -> Any:
    """The decoder's output, without the head. FSDP gathers the root module's weights in registered forward methods
    only, so sharded models call `decode`."""
    if not isinstance(model, FSDPModule):
        return model.get_decoder()(**inputs)
    if getattr(model, "in_lockstep", False):
        _announce_forward(model)
    return cast(Any, model).decode(**inputs)


@contextmanager
def lockstep(model: nn.Module) -> Iterator[None]:
    """Lets ranks run different numbers of forward passes without gradients. With sharded weights every pass needs all
    ranks, so ranks that are done run dummy passes until all are done. Collective: all ranks have to enter, even without
    a pass to run."""
    if not isinstance(model, FSDPModule):
        yield
        return
    hook = model.register_forward_pre_hook(lambda module, _: _announce_forward(module), prepend=True)
    cast(Any, model).in_lockstep = True
    try:
        yield
        hook.remove()
        cast(Any, model).in_lockstep = False
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        while _any_rank_active(False, model):
            model(input_ids=token, use_cache=False)
    finally:
        hook.remove()
        cast(Any, model).in_lockstep = False
        for module in model.modules():  # gathered weights are outdated after the next optimizer step
            if isinstance(module, FSDPModule):
                module.reshard()


def _announce_forward(model: nn.Module) -> None:
    _any_rank_active(True, model)


def _any_rank_active(active: bool, model: nn.Module) -> bool:
    """Whether any rank runs a forward pass; each rank calls this before its passes, and in a loop once it is done."""
    flag = torch.tensor(int(active), device=next(model.parameters()).device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
