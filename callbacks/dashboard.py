"""Arranges a run's metrics in TensorBoard, and gives its settings to the loggers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger

from rlrt_lightning import resume
from rlrt_lightning.runtime.run_files import is_continued, run_folder
from rlrt_lightning.runtime.tensorboard import adopt, shown_tag

from .boards import tensorboards
from .epoch_metrics import EpochMetrics
from .evaluation import Evaluation
from .parts import callbacks_of, data_of, without_folders
from .teacher_evaluation import TeacherEvaluation

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule

Layout = dict[str, dict[str, list[Any]]]
"""Charts by category and title, as `SummaryWriter.add_custom_scalars` takes them."""

Tags = list[str]

EVALUATION, SIGNAL = "2 evaluation, with 95 % intervals", "4 signal"

CHARTS: dict[str, dict[str, Tags]] = {
    "1 reward": {
        "reward": ["rollout/reward", "rollout/shaped_reward"],
        "rewards by name": ["rewards/.*"],
    },
    EVALUATION: {},
    "3 rollouts": {
        "length (tokens)": ["rollout/length"],
        "truncated (share)": ["rollout/truncated"],
        "entropy (nats)": ["rollout/entropy"],
        "groups (shares)": ["groups/(all_correct|all_wrong|mixed)"],
        "labels (shares)": ["labels/.*"],
    },
    SIGNAL: {
        "scored rollouts (shares)": ["signal/context", "signal/context_of_correct"],
        "reweighted tokens (shares)": ["signal/(up_weighted|down_weighted|clipped|selected|thoughts)"],
        "size of the step relative to GRPO": ["signal/effective_advantage"],
        "gate": ["signal/gate_.*"],
        "contrast e_t (nats)": ["signal/contrast_.*"],
    },
    "5 train": {
        "loss": ["train/loss"],
        "gradient norm before clipping": ["train/grad_norm"],
        "entropy (nats)": ["train/entropy"],
        "KL (nats)": ["train/kl", "train/reference_kl", "train/divergence"],
        "clipped tokens (share)": ["train/clip_fraction"],
        "learning rate": ["train/lr"],
        "sampler against trainer (nats)": ["rollout/mismatch_(mean|max|kl)"],
    },
    "6 speed": {
        "seconds": ["time/.*"],
        "tokens per second": ["speed/.*_per_s"],
        "padding (shares)": ["speed/.*_padding"],
    },
    "7 faults": {
        "faults": ["faults/.*", "rollout/faults"],
        "left out": ["rollout/overlong_prompts", "signal/context_truncated"],
        "steps without a signal": ["train/empty_steps"],
    },
}
"""Charts of the metrics of epochs, by category and title. Tags are regular expressions."""

QUANTILES = {
    "D_t in correct rollouts: median, 5 to 95 % (nats)": "signal/asymmetry_correct",
    "D_t in wrong rollouts: median, 5 to 95 % (nats)": "signal/asymmetry_wrong",
}
"""Charts of a median between two quantiles, by title, in the category of the signal."""

OF_UPDATES = ("train/clip_fraction", "train/entropy", "train/kl")
OF_RESCORING = ("rollout/mismatch_mean", "rollout/mismatch_max", "rollout/mismatch_kl")
"""Metrics of the rollouts that are trained on. In the first epoch, no group may have a learning signal yet."""

OF_TEACHER = ("signal/context", "signal/asymmetry_correct_p50", "signal/up_weighted", "signal/effective_advantage")
"""Metrics of every method with a teacher. In the first epoch, the teacher may have scored nothing yet."""

HPARAMS = re.compile(
    r"model\.(method(\..+)?|policy\.path|optimizer\.lr)|teacher_refresh\.every_n_epochs|"
    r"data\.(seed|prompts_per_epoch|rollouts_per_prompt|minibatches|task(\.(train|name))?)"
)
"""Settings in which runs are usually compared."""

COLUMNS = {
    "lr": "model.optimizer.lr",
    "method": "model.method",
    "model": "model.policy.path",
    "seed": "data.seed",
    "task": "data.task",
    "teacher refresh": "teacher_refresh.every_n_epochs",
}
"""Columns of the page HParams and their settings."""


class Dashboard(Callback):
    """Arranges TensorBoard, and gives the run's main settings to all loggers.

    In TensorBoard, the page Custom Scalars has the charts in the order in which one looks at them, and each score of an
    evaluation with its 95 % confidence interval; the page HParams compares runs by method, its settings, seed and
    learning rate, with their latest reward and scores. The bounds of confidence intervals are in the group
    `intervals/`, and there is no curve `epoch` (`BoardLogger`). W&B, MLflow and other loggers get the same settings as
    hyperparameters. A resumed run writes neither charts nor settings again.
    """

    def __init__(self) -> None:
        self._arranged = False
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adopts the TensorBoard loggers, before anything is logged."""
        adopt(trainer.loggers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the settings. Runs on all ranks, because the run's folder is broadcast."""
        folder = run_folder(trainer)
        if folder != self._folder and not is_continued(folder):
            self._arranged = False  # also of a run that is resumed in another folder
        self._folder = folder
        if not trainer.is_global_zero:
            return
        settings = _hyperparameters(trainer, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(settings, metrics={})  # only to hparams.yaml
            elif isinstance(logger, MLFlowLogger):
                # A run that is continued by its id keeps its parameters, which MLflow does not let change.
                known = logger.experiment.get_run(str(logger.run_id)).data.params
                logger.log_hyperparams({name: value for name, value in settings.items() if name not in known})
            else:
                logger.log_hyperparams(settings)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Arranges TensorBoard once, after the first epoch: only then it is known which metrics there are."""
        if self._arranged:
            return
        from torch.utils.tensorboard.summary import hparams  # slow to import

        self._arranged = True
        logged = {tag for metrics in callbacks_of(trainer, EpochMetrics)[:1] for tag in metrics.latest}
        scores = _scores(trainer)
        logged |= _of_later_epochs(cast("RLRTModule", pl_module), data_of(trainer).rescore)
        for board in tensorboards(trainer):
            board.add_custom_scalars(layout(logged, scores))
            # `SummaryWriter.add_hparams` would write another run, and `TensorBoardLogger.log_hyperparams` a second
            # value at a step; the page HParams itself reads the metrics' latest values.
            metrics = dict.fromkeys([*scores, "rollout/reward"], 0.0)
            assert board.file_writer is not None  # opened by `add_custom_scalars` if it was closed
            for summary in hparams(columns(_hyperparameters(trainer, pl_module)), metrics)[:2]:
                board.file_writer.add_summary(summary)

    def state_dict(self) -> dict[str, Any]:
        """Whether TensorBoard is arranged, so that a resumed run does not do it again."""
        return {"arranged": self._arranged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._arranged = state_dict["arranged"]


def _of_later_epochs(module: RLRTModule, rescores: bool) -> set[str]:
    """Tags that the run logs, but maybe not in its first epoch."""
    tags = {*OF_UPDATES, *(OF_RESCORING if rescores else ())}
    if module.method.context != "none":
        tags.update(OF_TEACHER)
    if module.method.needs.top_k != 0:
        tags.add("train/divergence")
    if module.reference is not None:
        tags.add("train/reference_kl")
    return tags


def layout(logged: Collection[str], scores: Collection[str]) -> Layout:
    """The charts of the page Custom Scalars, by category and title; those without metrics are left out.

    Empty categories stay: TensorBoard merges the layouts of all runs, and appends categories that the first one does
    not have. In a category it shows charts with a margin last, and in reverse order.

    Args:
        logged: Tags of an epoch's metrics.
        scores: Tags of the scores of evaluations.
    """
    found: Layout = {}
    for category, charts in CHARTS.items():
        found[category] = {}
        for title, patterns in charts.items():
            present = [pattern for pattern in patterns if any(re.fullmatch(pattern, tag) for tag in logged)]
            if present:
                found[category][title] = ["Multiline", [f"{pattern}$" for pattern in present]]
    for tag in reversed(list(scores)):
        bounds = [shown_tag(f"{tag}_{bound}") for bound in ("low", "high")]
        found[EVALUATION][tag.removeprefix("eval/")] = ["Margin", [tag, *bounds]]
    for title, tag in reversed(QUANTILES.items()):
        if f"{tag}_p50" in logged:
            found[SIGNAL][title] = ["Margin", [f"{tag}_p50", f"{tag}_p05", f"{tag}_p95"]]
    return found


def _hyperparameters(trainer: Trainer, module: LightningModule) -> dict[str, bool | float | str]:
    """The settings in which runs are usually compared, by their names on the command line."""
    return {
        name: without_folders(value)
        for name, value in resume.settings(trainer, module, data_of(trainer)).items()
        if HPARAMS.fullmatch(name) and isinstance(value, (bool, int, float, str))
    }


def columns(settings: Mapping[str, Any]) -> dict[str, float | str]:
    """The columns of the page HParams. It shows the first five in alphabetical order, unless others are selected, and
    has those of one run for all runs; so they begin with what every run has, the method's settings in one cell.

    Args:
        settings: The settings in which runs are compared, by their names on the command line.
    """
    of_method = {name[13:]: value for name, value in settings.items() if name.startswith("model.method.")}
    cells = (f"{name}={value}" for name, value in of_method.items())
    numbers = {name: v for name, v in of_method.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {
        **{name: settings[key] for name, key in COLUMNS.items() if key in settings},
        "settings": " ".join(cells),
        **{f"settings.{name}": value for name, value in numbers.items()},
    }


def _scores(trainer: Trainer) -> list[str]:
    """Tags of the scores of evaluations within the run."""
    if not trainer.limit_val_batches:
        return []
    ks = next((evaluation.ks for evaluation in callbacks_of(trainer, Evaluation)), None)
    found = [
        f"eval/{name}/{score}"
        for name, spec in data_of(trainer).benchmarks.items()
        for score in (f"avg@{spec.samples}", *(f"pass@{k}" for k in ks or [spec.samples]))
    ]
    if any(of_teacher.problems for of_teacher in callbacks_of(trainer, TeacherEvaluation)):
        found += ["teacher/accuracy", "teacher/student_accuracy"]
    return found
