"""The optimizer: what it is before there are weights, its warm-up, and its settings when a run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlrt_lightning.runtime.errors import ConfigError

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


class SharedFactory:
    """An optimizer factory that copies of a module share, such as `EMAWeightAveraging` makes: that of the command line
    holds its parser, which cannot be copied.

    Args:
        make: Makes an optimizer of parameters.
    """

    def __init__(self, make: OptimizerFactory) -> None:
        self.make = make

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        """Makes the optimizer."""
        return self.make(parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFactory:
        return self


def probe(factory: OptimizerFactory) -> tuple[Optimizer, list[str]] | None:
    """An optimizer of one weight and the names of what it keeps for it after a step; None where the factory makes none
    of such a weight.

    Args:
        factory: Makes an optimizer of parameters.
    """
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    try:
        optimizer = factory([weight])
        weight.grad = torch.zeros(1, 1)
        optimizer.step()
    except Exception:  # one of the user's own, that wants what a probe does not have
        return None
    return optimizer, sorted(map(str, optimizer.state[weight]))


class WarmUp(LambdaLR):
    """Rises linearly to the learning rate, and stays there. A resumed run goes on at the same step, with its own
    learning rate and its own length of the warm-up: torch's schedules take those of the checkpoint.

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
    """Has an optimizer keep its settings (weight decay, betas, ...) when it takes over a checkpoint's state; torch
    takes the checkpoint's."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    def keep(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = state_dict["param_groups"]
        if len(groups) != len(own):
            raise ConfigError(
                f"ckpt_path: its optimizer has {len(groups)} groups of weights and model.optimizer {len(own)}; set "
                "model.optimizer as in the run that made it"
            )
        merged = [{**group, **settings} for group, settings in zip(groups, own, strict=True)]
        return {**state_dict, "param_groups": merged}

    optimizer.register_load_state_dict_pre_hook(keep)
