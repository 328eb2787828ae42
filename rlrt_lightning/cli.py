"""The command line: Lightning's, with our classes, short names, and one line for what the user can mend."""

from __future__ import annotations

import difflib
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse._typehints as typehints
from jsonargparse import Namespace
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import rlrt_lightning
from rlrt_lightning import callbacks
from rlrt_lightning.callbacks import Evaluation, ReversedSignalLogger, TeacherRefresh
from rlrt_lightning.datamodule import RolloutDataModule
from rlrt_lightning.errors import ConfigError
from rlrt_lightning.module import RLRTModule

TRAINER_DEFAULTS: dict[str, Any] = {
    # Each epoch trains on roll-outs of its own.
    "reload_dataloaders_every_n_epochs": 1,
    # Lightning's sanity check over all of the validation is our measurement before training.
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": "rlrt"},
    },
}


def _forget_settings_of_another_class(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """jsonargparse keeps the settings of the old class that the new one knows as well, so `--model.method=RLSD` over
    RLRT would keep RLRT's eps_w: a silent error in somebody's comparison. Here a class comes with its own defaults."""
    if prev_val and "init_args" in prev_val and prev_val["class_path"] != value["class_path"]:
        prev_val["init_args"] = Namespace() if isinstance(prev_val, Namespace) else {}


typehints.discard_init_args_on_class_path_change = _forget_settings_of_another_class


class RLRTParser(LightningArgumentParser):
    """Says what is wrong in one line and ends with exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise ConfigError(_one_line(message, self._known_options()))

    def _known_options(self) -> list[str]:
        parsers = [self, *(getattr(self, "_subparsers_by_name", {}).values())]
        return [option for parser in parsers for action in parser._actions for option in action.option_strings]


def _one_line(message: str, options: list[str]) -> str:
    """jsonargparse's message without its repetitions, with what the user may have meant."""
    lines = [line.strip(" -\t") for line in message.splitlines() if line.strip(" -\t")]
    text = re.sub(r"\s+", " ", "; ".join(dict.fromkeys(lines)))
    for pattern, known in (
        (r"unrecognized arguments: (--[\w.]+)", options),
        (r"Expected a dot import path string: (\w+)$", [*rlrt_lightning.__all__, *callbacks.__all__]),
    ):
        if unknown := re.search(pattern, text):
            close = difflib.get_close_matches(unknown[1], known, n=1)
            text += f" (did you mean {close[0]}?)" if close else ""
    return text


class RLRTCli(LightningCLI):
    """LightningCLI with `RLRTModule` and `RolloutDataModule`.

    `TeacherRefresh`, `ReversedSignalLogger`, `Evaluation` and `ModelCheckpoint` are always there, and set by the short
    keys `teacher_refresh`, `reversed_signal`, `evaluation` and `checkpoint`; one of the same class under
    `trainer.callbacks` takes their place.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            RLRTModule,
            RolloutDataModule,
            parser_class=RLRTParser,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See `LightningCLI.add_arguments_to_parser`."""
        parser.add_lightning_class_args(TeacherRefresh, "teacher_refresh")
        parser.add_lightning_class_args(ReversedSignalLogger, "reversed_signal")
        parser.add_lightning_class_args(Evaluation, "evaluation")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "epoch-{epoch}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
                "checkpoint.save_on_train_epoch_end": True,
            }
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_stream_seed)

    def instantiate_classes(self) -> None:
        """See `LightningCLI.instantiate_classes`; what a constructor refuses is a wrong setting."""
        try:
            super().instantiate_classes()
        except ConfigError:
            raise
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        own = config.get("callbacks") or []
        named = {type(callback) for callback in (own if isinstance(own, list) else [own])}
        if config.get("enable_checkpointing") is False:
            named.add(ModelCheckpoint)
        return super()._instantiate_trainer(config, [c for c in callbacks if type(c) not in named])

    def after_instantiate_classes(self) -> None:
        """Finds the checkpoint that `--ckpt_path` names before anything is loaded."""
        settings = self.config[self.subcommand]
        if settings.get("ckpt_path") == "last":
            # Lightning looks in the folder of this run, which is new, and goes on without a checkpoint.
            settings["ckpt_path"] = str(last_checkpoint(self.trainer))
        elif settings.get("ckpt_path") and not Path(settings["ckpt_path"]).exists():
            raise ConfigError(f"ckpt_path: there is no checkpoint at {settings['ckpt_path']}")
        self.config_init[self.subcommand]["ckpt_path"] = settings.get("ckpt_path")
        if self.subcommand == "fit" and settings.get("ckpt_path"):
            self.trainer.num_sanity_val_steps = 0  # the measurement before training has been made


def last_checkpoint(trainer: Trainer) -> Path:
    """The newest `last.ckpt` among the runs that share the trainer's logger.

    Raises:
        ConfigError: If there is none.
    """
    logger = trainer.logger
    folder = Path((logger.save_dir if logger else None) or trainer.default_root_dir)
    if logger is not None and logger.name:
        folder = folder / logger.name
    found = sorted(folder.glob("**/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"ckpt_path is last, but there is no last.ckpt in {folder}; give the checkpoint's path")
    return found[-1]


def _stream_seed(seed: bool | int) -> int:
    if seed is True:  # Lightning's word for a random seed
        return random.randrange(2**31)
    return int(seed)


def run(command: Callable[[], Any]) -> int:
    """Runs a command; what the user can mend becomes one line on stderr and exit code 2."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        command()
    except (ConfigError, MisconfigurationException) as error:
        line = re.sub(r"\s+", " ", str(error))
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0
