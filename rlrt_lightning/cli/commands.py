"""LightningCLI with our classes, short setting names and one-line errors."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger

from rlrt_lightning.analysis.trainer import InstrumentTrainer
from rlrt_lightning.callbacks import CHECKPOINT, WITH_SETTINGS, default_callbacks
from rlrt_lightning.cli.argument_errors import RLRTParser
from rlrt_lightning.cli.config_names import with_config_files
from rlrt_lightning.cli.places import Place, checkpoint_of, is_first_process, logger_settings, make_folder, place_of
from rlrt_lightning.cli.refusals import constructor_error, setting_of
from rlrt_lightning.datamodule import RolloutDataModule
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.policy.sharding import FSDP2Strategy
from rlrt_lightning.resume import check_file
from rlrt_lightning.runtime.checkpoints import problem
from rlrt_lightning.runtime.credentials import refuse_credentials
from rlrt_lightning.runtime.errors import ConfigError, check_finite
from rlrt_lightning.runtime.files import RUNS
from rlrt_lightning.runtime.run_files import choose_folder, claim_path, free_path, is_continued
from rlrt_lightning.runtime.trainer_checks import RELOAD
from rlrt_lightning.runtime.trainer_limits import check_folders, check_limits

TRAINER_DEFAULTS: dict[str, Any] = {
    # Each epoch trains on new rollouts.
    "reload_dataloaders_every_n_epochs": 1,
    # Lightning's sanity check, over the whole validation set, is the evaluation before training.
    "num_sanity_val_steps": -1,
    # The data module assigns each rank its share.
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
    # The run's folder is in `places.py`.
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(RUNS), "name": None},
    },
}

# The constructors use these for null. Set explicitly, they appear in `--print_config`, and their settings can be given
# without the class (`--data.engine.max_rows=64`, `--data.benchmarks.heldout.samples=4`).
CLASS_DEFAULTS: dict[str, Any] = {
    "data.task": {"class_path": "rlrt_lightning.LastDigit"},
    "data.engine": {"class_path": "rlrt_lightning.TransformersEngine"},
    "data.benchmarks": {"heldout": {}},
}


EVALUATIONS = ("validate", "test", "predict")

NO_CONFIG = (
    "fit needs a config: `python -m rlrt_lightning fit --config configs/rlrt.yaml` trains the small model that ships "
    "with the package, in about a minute; configs/recipes has configs for language models"
)


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` to the run's folder; a resumed run writes `config-2.yaml`, `config-3.yaml`, ..."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See `SaveConfigCallback.setup`."""
        path = claim_path(trainer, self.config_filename)
        path = free_path(path) if is_continued(path.parent) else path
        if trainer.is_global_zero and not self.already_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        self.already_saved = True


class RLRTCli(LightningCLI):
    """LightningCLI with `RLRTModule` and `RolloutDataModule`.

    Every run has the callbacks `TeacherRefresh`, `ReversedSignalLogger`, `Evaluation`, `TeacherEvaluation`,
    `RankGuard`, `NumberGuard`, `CollapseGuard` and `ModelCheckpoint`, configured by the short keys `teacher_refresh`,
    `reversed_signal`, `evaluation`, `teacher_evaluation`, `rank_guard`, `number_guard`, `collapse_guard` and
    `checkpoint`. A callback of the same class under `trainer.callbacks` replaces the default one. `SafeStop`,
    `Dashboard` and `PromptPreview` have no settings and are always added.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        args = words = with_config_files(sys.argv[1:] if args is None else args)
        commands = self.subcommands()
        if words and words[0] in commands:
            # Building a parser takes 0.2 s; the other commands' parsers are not needed.
            commands = {words[0]: commands[words[0]]}
            cast(Any, self).subcommands = lambda: commands
        self._failure: Exception | None = None  # the first error raised by a constructor
        self._has_config = any(word.startswith(("--config", "-c")) for word in words)
        self._place: Place | None = None
        self._folder: Path | None = None  # of the run
        super().__init__(
            RLRTModule,
            RolloutDataModule,
            trainer_class=InstrumentTrainer,
            parser_class=RLRTParser,
            parser_kwargs={
                "prog": "rlrt_lightning",
                "description": "RLRT (arXiv:2605.10781) and related methods: train, evaluate, predict, analyze. "
                "Two more commands compare the results of runs: curves and pass_at_k.",
                # The full list of flags fills four screens.
                **{c: {"usage": "%(prog)s [--config FILE]... [--SETTING=VALUE]..."} for c in commands},
            },
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            auto_configure_optimizers=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """See `LightningCLI.subcommands`."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "reflection": own, "shift": own, "serve": own}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See `LightningCLI.add_arguments_to_parser`."""
        for name, callback in WITH_SETTINGS.items():
            parser.add_class_arguments(callback, name, fail_untyped=False, sub_configs=True)
        parser.set_defaults({**{f"checkpoint.{name}": value for name, value in CHECKPOINT.items()}, **CLASS_DEFAULTS})
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_stream_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """See `LightningCLI.parse_arguments`, which would warn that `__main__` passes arguments besides sys.argv.

        Hides `ckpt_path` from Lightning until the next hook: Lightning would merge the checkpoint's settings into the
        config and import the classes they name. Here only the user's config decides what runs.
        """
        self.config = parser.parse_args(args)
        settings = self.config[self.config.subcommand]
        self._ckpt_path = settings.get("ckpt_path")
        if self._ckpt_path is not None:
            settings.ckpt_path = None

    def before_instantiate_classes(self) -> None:
        """See `LightningCLI.before_instantiate_classes`; what no setting may be is refused. Resolves `--ckpt_path` and
        chooses the run's folder."""
        settings = self.config[self.subcommand]
        refuse_credentials(settings)
        check_finite(settings)
        if settings.trainer.logger in (True, None):
            settings.trainer.logger = Namespace(**TRAINER_DEFAULTS["logger"])
        self._place = place_of(settings)
        fit = self.subcommand == "fit"
        path = checkpoint_of(self._ckpt_path, self._place, settings.trainer.default_root_dir, resume=fit)
        if path is not None:
            if "://" not in path and (wrong := problem(Path(path), resume=fit)):
                raise ConfigError(f"ckpt_path: {path} {wrong}")
            settings.ckpt_path = path
        if fit or self.subcommand in EVALUATIONS:
            self._folder = self._place.parent / self._place.version
            if is_first_process():
                self._folder = make_folder(str(self.subcommand), self._place, path)
        self.parser.add_instantiator(self._make, object)
        # Lightning fills it with a dump of all settings, of which only `LightningCLI.save_hyperparameters` makes use.
        self.config_dump: dict[str, Any] = {}

    def instantiate_classes(self) -> None:
        """See `LightningCLI.instantiate_classes`. Raises the first error of a constructor."""
        try:
            super().instantiate_classes()
        except Exception:
            # jsonargparse treats a constructor's error as a type mismatch and hides it.
            if self._failure is None:
                raise
            raise self._failure from None
        self._failure = None

    def _make(self, cls: type, /, *args: Any, **settings: Any) -> Any:
        """Calls a constructor. The optimizer's is called when the run starts."""
        placed = settings
        if issubclass(cls, Logger) and self._place is not None and self._folder is not None:
            placed = logger_settings(cls, settings, self._place, self._folder)
        try:
            return cls(*args, **placed)
        except Exception as error:
            setting = setting_of(cls, settings, self.config[self.subcommand]) or cls.__name__
            refused = constructor_error(error, setting, partial(cls, *args), settings)
            self._failure = self._failure or refused or error
            if refused is None:
                raise
            raise refused from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """See `LightningCLI.instantiate_trainer`. A callback in `trainer.callbacks` replaces ours of the same class."""
        made = self.config_init[self.subcommand]
        settings = made["trainer"]
        if settings["reload_dataloaders_every_n_epochs"] != 1:
            raise ConfigError(RELOAD)
        own = settings["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        ours = {name: made[name] for name in WITH_SETTINGS}
        checkpoints = settings["enable_checkpointing"] is not False
        bar = settings["enable_progress_bar"] is not False and not settings["barebones"]
        kwargs["callbacks"] = own + default_callbacks(own, checkpoints, ours, bar)
        if settings["strategy"] == "fsdp":
            kwargs["strategy"] = "fsdp2"  # FSDP1 is deprecated in torch and does not run on CPUs
        try:
            return super().instantiate_trainer(**kwargs)
        except Exception as error:
            refused = constructor_error(error, "trainer", self.trainer_class, {**vars(settings), **kwargs})
            if refused is None:
                raise
            raise refused from error

    def after_instantiate_classes(self) -> None:
        """Checks the trainer, and `--ckpt_path` against it, before anything is loaded or any process is started."""
        check_limits(self.trainer)
        check_folders(self.trainer)
        settings = self.config[self.subcommand]
        path = settings.get("ckpt_path")
        if path and Path(path).is_dir() and not isinstance(self.trainer.strategy, FSDP2Strategy):
            raise ConfigError(
                f"ckpt_path: {path} is a folder of shards; load it with --trainer.strategy=fsdp2, on any number of "
                "devices (FSDP2Strategy.save_distributed_checkpoint=false writes one file for all strategies)"
            )
        if path and "://" not in path:
            check_file(Path(path), self.trainer, self.model, self.datamodule, fit=self.subcommand == "fit")
        if settings.get("weights_only", False) is None:
            # Lightning would leave it to torch, and turn it off for URLs.
            settings["weights_only"] = self.config_init[self.subcommand]["weights_only"] = True
        if self.subcommand == "fit" and path:
            self.trainer.num_sanity_val_steps = 0  # the first run evaluated before training
        if self._folder is not None:
            choose_folder(self.trainer, self._folder)

    def before_fit(self) -> None:
        """Refuses a run without a config and without an end: Lightning's default is a thousand epochs."""
        if not self._has_config and not _has_end(self.config.fit.trainer):
            raise ConfigError(NO_CONFIG)


def _has_end(trainer: Any) -> bool:
    """Whether the trainer's settings say when a run ends."""
    ends = (trainer.max_epochs, trainer.max_time, trainer.fast_dev_run or None, trainer.max_steps)
    return any(end not in (None, -1) for end in ends)


def _stream_seed(seed: bool | int) -> int:
    """The seed of our random streams. For true it is the one that Lightning will use, equal on all ranks."""
    value = os.environ.get("PL_GLOBAL_SEED", "0") if seed is True else str(int(seed))
    if not (value.isdecimal() and int(value) < 2**32):
        name = "seed_everything: the environment's PL_GLOBAL_SEED" if seed is True else "seed_everything"
        raise ConfigError(f"{name} is {value}; it has to be an integer from 0 to {2**32 - 1}")
    return int(value)
