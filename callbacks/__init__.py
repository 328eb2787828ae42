"""Lightning callbacks, imported as `rlrt_lightning.callbacks`."""

from .collapse_guard import CollapseGuard
from .defaults import CHECKPOINT, WITH_SETTINGS, adopt_checkpoints, default_callbacks
from .epoch_metrics import EpochMetrics
from .evaluation import Evaluation
from .hf_export import HFExport
from .memory_estimate import MemoryEstimate
from .number_guard import NumberGuard
from .prompt_preview import PromptPreview
from .rank_guard import RankGuard
from .reversed_signal import ReversedSignalLogger
from .safe_stop import SafeStop
from .teacher_refresh import TeacherRefresh

__all__ = [
    "CHECKPOINT",
    "WITH_SETTINGS",
    "CollapseGuard",
    "EpochMetrics",
    "Evaluation",
    "HFExport",
    "MemoryEstimate",
    "NumberGuard",
    "PromptPreview",
    "RankGuard",
    "ReversedSignalLogger",
    "SafeStop",
    "TeacherRefresh",
    "adopt_checkpoints",
    "default_callbacks",
]
