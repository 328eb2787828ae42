"""RLRT (RLVR with Reversed Teacher, arXiv:2605.10781) and related methods on PyTorch Lightning.

All public names can be imported from here. Modules are imported on first use, so that worker processes and `--help`
start quickly.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import Benchmark, RolloutDataModule
    from rlrt_lightning.evaluation.metrics import AvgAtK, PassAtK
    from rlrt_lightning.module import RLRTModule
    from rlrt_lightning.objective import (
        DIVER,
        GRPO,
        RLCSD,
        RLRT,
        RLSD,
        SDPO,
        SRPO,
        AntiSD,
        Credit,
        DivergenceSettings,
        EntropyBonus,
        EntropyGate,
        Method,
        Needs,
        Signals,
        TeacherWeights,
        cispo_surrogate,
        clipped_surrogate,
        distillation_loss,
        divergence,
        dynamic_weights,
        group_advantages,
        importance_weights,
        overlong_penalty,
        pass_at_k,
        reference_kl,
        two_path_surrogate,
    )
    from rlrt_lightning.policy.lora import LoRA
    from rlrt_lightning.policy.model import Policy
    from rlrt_lightning.policy.sharding import FSDP2Strategy
    from rlrt_lightning.rollouts import (
        Rollout,
        RolloutEngine,
        Sampling,
        TransformersEngine,
        VllmColocateEngine,
        VllmServerEngine,
    )
    from rlrt_lightning.runtime.errors import ConfigError
    from rlrt_lightning.tasks import (
        DatasetTask,
        ExactMatch,
        LastDigit,
        MathReward,
        Problem,
        ReasoningGym,
        Task,
        Verdict,
    )
    from rlrt_lightning.teacher import Teacher


def _modules_of_names() -> dict[str, str]:
    """Maps public names to modules, parsed from the imports above, which only type checkers execute."""
    source = cast(Any, __spec__).loader.get_source(__name__)
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {name.name: str(node.module) for node in imports for name in node.names}


_MODULE_OF = _modules_of_names()
__all__ = sorted(_MODULE_OF)

if not TYPE_CHECKING:  # with `__getattr__`, type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            return getattr(import_module(_MODULE_OF[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _CallbacksFinder:
    """Imports `rlrt_lightning.callbacks` from the top-level folder callbacks/ of a clone. In the installed package, it
    is a subfolder (see pyproject.toml)."""

    folder = Path(__file__).resolve().parents[1] / "callbacks"

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        if name != f"{__name__}.callbacks":
            return None
        return spec_from_file_location(name, cls.folder / "__init__.py", submodule_search_locations=[str(cls.folder)])


if not (Path(__file__).parent / "callbacks" / "__init__.py").exists() and _CallbacksFinder.folder.exists():
    sys.meta_path.insert(0, _CallbacksFinder)  # before the finder of an editable install of another clone
