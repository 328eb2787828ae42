"""Weights in shards, one on each rank (FSDP2): the strategy, and what computing with such weights takes."""

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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlrt_lightning.runtime.checkpoints import checkpoint_aside, no_code
from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.runtime.private.lightning import shard_over_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (torch's FSDP2): each rank keeps its share of weights, gradients and optimizer
    states, and has the others' send a decoder layer's weights when it computes with it.

    Args:
        reshard_after_forward: Give a layer's weights back after the forward pass and fetch them again for the backward
            pass: less memory, half as much again to send.
        save_distributed_checkpoint: A checkpoint is a folder to which each rank writes its share; off, one file that
            every strategy resumes from, which has to fit into the memory of the first rank's machine.
        process_group_backend: Backend of torch.distributed; null is nccl on GPUs, gloo on CPUs.
        timeout_s: How long a rank waits for the others in one collective before it takes them for lost, in seconds.
            Ranks wait for the slowest one's rollouts and verdicts.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout_s: float = 3600.0,
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ConfigError(f"FSDP2Strategy.timeout_s is {timeout_s}; it has to be above 0")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )
        self.reshard_after_forward = reshard_after_forward
        self.save_distributed_checkpoint = save_distributed_checkpoint

    @property
    def _computes_in_bf16(self) -> bool:
        precision = self.precision_plugin
        return isinstance(precision, MixedPrecision) and precision.precision == "bf16-mixed"

    def setup_environment(self) -> None:
        """See `Strategy.setup_environment`."""
        shard_over_all_ranks(self)
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """See `Strategy.save_checkpoint`. Written aside and then renamed, so that what bears the name is complete."""
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
            ConfigError: If it holds another model, or a shard is broken.
        """
        try:
            with no_code():
                return super().load_checkpoint(checkpoint_path, weights_only)
        except (Exception, CheckpointException) as error:
            raise ConfigError(f"ckpt_path: {checkpoint_path} does not fit this model: {first_line(error)}") from error

    def shard(self, model: PreTrainedModel) -> None:
        """Leaves this rank's share of each weight in the model; a decoder layer is what is fetched at once."""
        half = torch.bfloat16 if self._computes_in_bf16 else None
        settings: Any = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None),
        }
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **settings)
        fully_shard(model, **settings)  # embeddings, norm and head stay until the backward pass has used them
        cast(Any, model).decode = MethodType(lambda of, **inputs: of.get_decoder()(**inputs), model)
        register_fsdp_forward_method(model, "decode")


def check_strategy(strategy: Strategy) -> None:
    """Refuses the strategies under which rollouts or checkpoints would go wrong.

    Raises:
        ConfigError: Naming the strategy to take instead.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} is not supported; take ddp where model, gradients and "
            "optimizer fit one device, and fsdp2 where they do not"
        )


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=(FSDP2Strategy.__doc__ or "").split("\n\n")[0])


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules, those within other lists (experts of a layer) aside.

    Raises:
        ConfigError: If there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    layers = list(max(outer, key=len, default=[]))
    if not layers:
        raise ConfigError(f"trainer.strategy: no decoder layers to shard were found in {type(model).__name__}")
    return layers


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each rank has a share; all ranks have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def move_weights(model: nn.Module, device: torch.device) -> None:
    """Moves a model's weights to a device. Its buffers stay where they are unless it is sharded: DDP sends all buffers
    of a module to the other ranks, and can do so on one device only."""
    if isinstance(model, FSDPModule):
        model.to(device)
        return
    for weight in model.parameters():
        weight.data = weight.data.to(device)


def decoder_states(model: PreTrainedModel, **inputs: Any) -> Any:
    """The decoder's output, without the head. With sharded weights it is the whole model's forward pass that fetches
    them, so it goes in by that door."""
    if not isinstance(model, FSDPModule):
        return model.get_decoder()(**inputs)
    if getattr(model, "ranks_in_step", False):
        _tell(model)
    return cast(Any, model).decode(**inputs)


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Forward passes without gradient, as many as each rank needs: with sharded weights every pass needs all ranks, so
    those that are done go through the motions until the last one is. All ranks have to enter, also with nothing to do.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    hook = model.register_forward_pre_hook(lambda of, _: _tell(of), prepend=True)
    cast(Any, model).ranks_in_step = True
    try:
        yield
        hook.remove()
        cast(Any, model).ranks_in_step = False
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        while _anybody(False, model):
            model(input_ids=token, use_cache=False)
    finally:
        hook.remove()
        cast(Any, model).ranks_in_step = False
        model.reshard()  # nobody may compute with what an optimizer step has made old


def _tell(model: nn.Module) -> None:
    _anybody(True, model)


def _anybody(going_on: bool, model: nn.Module) -> bool:
    """Whether any rank has a forward pass to do; called by each before one, and by those that have none."""
    flag = torch.tensor(int(going_on), device=next(model.parameters()).device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
