"""Optimizer factories, learning rate warm-up, and the optimizer's settings when a run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlrt_lightning.runtime.errors import ConfigError

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class SharedFactory:
    """An optimizer factory that copies of a module share, as `EMAWeightAveraging` makes them. The command line's
    factory holds its parser, which cannot be copied.

    Args:
        make: Creates an optimizer for the given parameters.
    """

    def __init__(self, make: OptimizerFactory) -> None:
        self.make = make

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        """Creates the optimizer."""
        return self.make(parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFactory:
        return self


def probe(factory: OptimizerFactory) -> tuple[Optimizer, list[str]] | None:
    """Creates an optimizer for a single weight to inspect its settings and state.

    Args:
        factory: Creates an optimizer for the given parameters.

    Returns:
        The optimizer and the names of its per-parameter state after one step, or None if the factory or the step fails
        for such a weight.
    """
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    try:
        optimizer = factory([weight])
        weight.grad = torch.zeros(1, 1)
        optimizer.step()
    except Exception:  # a user's optimizer may need more than one bare weight
        return None
    return optimizer, sorted(map(str, optimizer.state[weight]))


def state_bytes(factory: OptimizerFactory, weights: Iterable[Tensor]) -> int | None:
    """Bytes of the state that an optimizer will keep, found by a step on the meta device, where tensors have no data.

    Args:
        factory: Creates an optimizer for the given parameters.
        weights: The weights that it is to optimize.

    Returns:
        The bytes, or None if the optimizer cannot take such a step.
    """
    meta = [torch.nn.Parameter(torch.empty_like(weight, device="meta")) for weight in weights]
    for weight in meta:
        weight.grad = torch.empty_like(weight)
    try:
        optimizer = factory(meta)
        optimizer.step()
    except Exception:  # a user's optimizer may read values
        return None
    state = (value for values in optimizer.state.values() for value in values.values())
    return sum(value.nbytes for value in state if isinstance(value, Tensor))


class WarmUp(LambdaLR):
    """Raises the learning rate linearly to its full value, then keeps it constant.

    A resumed run continues at the same step with the learning rate and warm-up length of its own settings; torch's
    schedulers restore those of the checkpoint.

    Args:
        optimizer: The optimizer.
        steps: Length of the warm-up in optimizer steps.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        super().__init__(optimizer, lambda step: min(1.0, (step + 1) / max(1, steps)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `LambdaLR.load_state_dict`."""
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, base, at in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * at(self.last_epoch)

    def get_last_lr(self) -> list[Any]:
        """See `LambdaLR.get_last_lr`, which would give a checkpoint's learning rates after `load_state_dict`."""
        return [group["lr"] for group in self.optimizer.param_groups]


def keep_settings(optimizer: Optimizer) -> None:
    """Makes an optimizer keep its settings (weight decay, betas, ...) when it loads a checkpoint's state. By default
    torch overwrites them with the checkpoint's."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    def keep(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = state_dict["param_groups"]
        if len(groups) != len(own):
            raise ConfigError(
                f"ckpt_path: the checkpoint's optimizer has {len(groups)} parameter groups and model.optimizer has "
                f"{len(own)}; set model.optimizer as in the run that saved it"
            )
        merged = [{**group, **settings} for group, settings in zip(groups, own, strict=True)]
        return {**state_dict, "param_groups": merged}

    optimizer.register_load_state_dict_pre_hook(keep)
