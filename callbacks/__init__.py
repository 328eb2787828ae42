"""Lightning callbacks, imported as `rlrt_lightning.callbacks`."""

from rlrt_lightning.callbacks.collapse_guard import CollapseGuard
from rlrt_lightning.callbacks.evaluation import Evaluation
from rlrt_lightning.callbacks.hf_export import HFExport
from rlrt_lightning.callbacks.number_guard import NumberGuard
from rlrt_lightning.callbacks.prompt_preview import PromptPreview
from rlrt_lightning.callbacks.rank_guard import RankGuard
from rlrt_lightning.callbacks.reversed_signal import ReversedSignalLogger
from rlrt_lightning.callbacks.safe_stop import SafeStop
from rlrt_lightning.callbacks.teacher_refresh import TeacherRefresh

__all__ = [
    "CollapseGuard",
    "Evaluation",
    "HFExport",
    "NumberGuard",
    "PromptPreview",
    "RankGuard",
    "ReversedSignalLogger",
    "SafeStop",
    "TeacherRefresh",
]
