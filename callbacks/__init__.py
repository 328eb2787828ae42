"""Lightning callbacks, imported as `rlrt_lightning.callbacks`."""

from .collapse_guard import CollapseGuard
from .dashboard import Dashboard
from .defaults import CHECKPOINT, WITH_SETTINGS, adopt_checkpoints, default_callbacks
from .epoch_metrics import EpochMetrics
from .evaluation import Evaluation
from .hf_export import HFExport
from .memory_estimate import MemoryEstimate
from .number_guard import NumberGuard
from .phase_bar import PhaseBar, adopt_progress_bar
from .prompt_preview import PromptPreview
from .rank_guard import RankGuard
from .reversed_signal import ReversedSignalLogger
from .run_report import RunReport
from .safe_stop import SafeStop
from .teacher_evaluation import TeacherEvaluation
from .teacher_refresh import TeacherRefresh

__all__ = [
    "CHECKPOINT",
    "WITH_SETTINGS",
    "CollapseGuard",
    "Dashboard",
    "EpochMetrics",
    "Evaluation",
    "HFExport",
    "MemoryEstimate",
    "NumberGuard",
    "PhaseBar",
    "PromptPreview",
    "RankGuard",
    "ReversedSignalLogger",
    "RunReport",
    "SafeStop",
    "TeacherEvaluation",
    "TeacherRefresh",
    "adopt_checkpoints",
    "adopt_progress_bar",
    "default_callbacks",
]
