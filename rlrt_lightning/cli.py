"""The command line: Lightning's, with our classes, short names, and one line for what the user can mend."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, cast

import jsonargparse._typehints as typehints
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.environments import SLURMEnvironment

from rlrt_lightning.analysis.trainer import InstrumentTrainer
from rlrt_lightning.callbacks import CHECKPOINT, WITH_SETTINGS, default_callbacks
from rlrt_lightning.checkpoints import disk_error, newest, problem
from rlrt_lightning.credentials import masked, refuse_credentials
from rlrt_lightning.datamodule import RELOAD, RolloutDataModule
from rlrt_lightning.errors import ConfigError
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.resume import check_file
from rlrt_lightning.run_files import own
from rlrt_lightning.sharding import FSDP2Strategy

TRAINER_DEFAULTS: dict[str, Any] = {
    # Each epoch trains on roll-outs of its own.
    "reload_dataloaders_every_n_epochs": 1,
    # Lightning's sanity check over all of the validation is our measurement before training.
    "num_sanity_val_steps": -1,
    # The data module deals the ranks their share itself.
    "use_distributed_sampler": False,
    "log_every_n_steps": 1,
    "enable_model_summary": False,
    "logger": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": "rlrt"},
    },
}

# What the constructors take for null, spelled out: `--print_config` shows it, and its parts can be set without naming
# it first (`--data.engine.max_rows=64`, `--data.benchmarks.heldout.samples=4`).
CLASS_DEFAULTS: dict[str, Any] = {
    "data.task": {"class_path": "rlrt_lightning.StrategySum"},
    "data.engine": {"class_path": "rlrt_lightning.TransformersEngine"},
    "data.benchmarks": {"heldout": {}},
}


def _forget_settings_of_another_class(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """jsonargparse keeps the settings of the old class that the new one knows as well, so `--model.method=RLSD` over
    RLRT would keep RLRT's eps_w: a silent error in somebody's comparison. Here a class comes with its own defaults."""
    if not prev_val or not prev_val.get("class_path") or _same_class(prev_val["class_path"], value["class_path"]):
        return
    for settings in ("init_args", "dict_kwargs"):
        if settings in prev_val:
            prev_val[settings] = Namespace() if isinstance(prev_val, Namespace) else {}


def _same_class(path: str, other: str) -> bool:
    """Whether two class paths lead to one class, as rlrt_lightning.RLRT and rlrt_lightning.objective.RLRT do."""
    if path == other:
        return True
    with suppress(Exception):  # a path that cannot be imported has its own error elsewhere
        return typehints.import_object(path) is typehints.import_object(other)
    return False


# jsonargparse has no setting for this. It looks the function up in its module at each of its calls: for the command
# line, for merged configs, and for classes nested in other classes. tests/test_cli_defaults.py fails if that changes.
typehints.discard_init_args_on_class_path_change = _forget_settings_of_another_class


class RLRTParser(LightningArgumentParser):
    """Says what is wrong in one line and ends with exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today means another setting, or none, once a new setting begins the same way.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.class_name = ""

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `jsonargparse.ArgumentParser.add_class_arguments`; a parser of one class's settings knows its name."""
        if nested_key is None:
            self.class_name = theclass.__name__
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """See `jsonargparse.ArgumentParser.dump`, which also answers `--print_config`."""
        refuse_credentials(cfg)
        return super().dump(cfg, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See `argparse.ArgumentParser.error`. jsonargparse passes an inner parser's error on to the outer one."""
        raise ConfigError(self._one_line(message))

    def _one_line(self, message: str) -> str:
        """What is wrong, out of jsonargparse's account of all that it tried."""
        if found := re.search(r"Option '([\w.]+)' is not accepted$", message):
            owner = f"{self.class_name} has" if self.class_name else "there is"
            return f"{owner} no setting {found[1]}{_meant(found[1], self._settings())}"
        if found := re.search(r"unrecognized arguments: (--)?([^\s=]+)", message):
            dashes = found[1] or ""
            known = [dashes + setting for setting in self._settings()]
            return f"there is no setting {dashes}{found[2]}{_meant(dashes + found[2], known)}"
        if found := re.search(r"does not accept option '([\w.]+)'", message):
            return f"there is no setting {found[1]}{_meant(found[1], self._settings())}"
        if found := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", message):
            return f"there is no command {found[1]}; there are {found[2]}".replace("'", "")
        if message.startswith('expected "subcommand"'):
            return (
                "which command? fit, validate, test, predict, reflection, shift, serve, curves or pass_at_k; each "
                "explains its settings with --help"
            )
        if found := re.search(r"the following arguments are required: (.*)", message):
            message = message.replace(found[0], f"{self.class_name or 'this command'} needs a value for {found[1]}")
        return self._of_one_setting(message)

    def _of_one_setting(self, message: str) -> str:
        key = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
        given = re.search(r"Given value: (?:NestedArg\(key='(?P<part>[\w.]+)'|(?P<plain>(?!Namespace).*))", message)
        lines = re.sub(r'Parser key "[\w.]+"( element \d+)?:|;', "\n", message).splitlines()
        noise = r"$|Expected a path but|Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
        reasons = [line for line in dict.fromkeys(line.strip(" -\t") for line in lines) if not re.match(noise, line)]
        # Of a union's types, the one that got as far as a class or an inner setting is the one that was meant.
        plain = [reason for reason in reasons if reason.startswith("Expected a <class")]
        text = "; ".join(r for r in reasons if r not in plain) or " or ".join(plain)
        text = re.sub(r"; \w+ has no setting [^;]*", "", text)
        if found := re.search(r"Expected a dot import path string: (\S+)", text):
            known = self._classes(key)
            hint = _meant(found[1], known)
            if not hint and 0 < len(known) <= 20:
                hint = f"; there are {', '.join(known)}, and class paths such as my_module.MyClass"
            text = f"there is no class {found[1]}{hint}"
        text = re.sub(r"Problem with given class_path '([\w.]+)':;", r"there is no class \1:", text)
        text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", re.sub(r"<class '([\w.]+)'>", r"\1", text))
        text = text.replace(" or Expected a ", " or ").replace("Expected a ", "it has to be ")
        text = text.replace(". Got value: ", "; it is ")
        if "it has to be" in text and "it is" not in text and given and given["plain"]:
            text += f"; it is {given['plain']}"
        # The setting's whole name: the option's, and what an inner parser said was wrong.
        inner = re.match(r"([\w.]+): (?=it has|there is)", text)
        for part in (given and given["part"], inner and inner[1]):
            if part and not key.endswith(part):
                key = f"{key}.{part}".strip(".")
        text = text[inner.end() :] if inner else text
        return re.sub(r"\s+", " ", f"{key}: {text}" if key else text).strip()

    def _settings(self) -> list[str]:
        return [o.removeprefix("--") for p in self._parsers() for action in p._actions for o in action.option_strings]

    def _classes(self, key: str) -> list[str]:
        """Short names of the classes that a setting takes."""
        for parser in self._parsers():
            for action in parser._actions:
                if action.dest == key and isinstance(action, typehints.ActionTypeHint):
                    paths = typehints.get_all_subclass_paths(action._typehint, closed_types=False)
                    return sorted({path.rsplit(".", 1)[1] for path in paths})
        return []

    def _parsers(self) -> list[Any]:
        commands = [action.choices for action in self._actions if isinstance(action.choices, dict)]
        return [self, *(parser for choices in commands for parser in choices.values())]


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder, and nowhere else."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See `SaveConfigCallback.setup`."""
        path = own(trainer, self.config_filename)
        if trainer.is_global_zero and not self.already_saved and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=self.multifile)
        self.already_saved = True


class RLRTCli(LightningCLI):
    """LightningCLI with `RLRTModule` and `RolloutDataModule`.

    `TeacherRefresh`, `ReversedSignalLogger`, `Evaluation`, `RankGuard`, `NumberGuard`, `CollapseGuard` and
    `ModelCheckpoint` are always there, and set by the short keys `teacher_refresh`, `reversed_signal`, `evaluation`,
    `rank_guard`, `number_guard`, `collapse_guard` and `checkpoint`; one of the same class under `trainer.callbacks`
    takes their place. So are `SafeStop` and `PromptPreview`, which have no settings.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        words = sys.argv[1:] if args is None else args
        commands = self.subcommands()
        if words and words[0] in commands:
            # A parser takes a fifth of a second to build; those of the other commands are of no use.
            commands = {words[0]: commands[words[0]]}
            cast(Any, self).subcommands = lambda: commands
        super().__init__(
            RLRTModule,
            RolloutDataModule,
            trainer_class=InstrumentTrainer,
            parser_class=RLRTParser,
            parser_kwargs={
                "prog": "rlrt_lightning",
                "description": "RLRT (arXiv:2605.10781) and its relatives: train, evaluate, predict, look inside. "
                "Two further commands compare what runs have written: curves and pass_at_k.",
                # The full list of flags would take four screens before the first word of help.
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
        """See `LightningCLI.parse_arguments`, which warns of what `__main__` does: words of its own beside sys.argv."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning would merge settings that a checkpoint holds into the config, and with them import the classes that
        it names. Here the user's config alone decides what runs."""

    def before_instantiate_classes(self) -> None:
        """See `LightningCLI.before_instantiate_classes`; what must not be saved is refused."""
        refuse_credentials(self.config[self.subcommand])

    def instantiate_classes(self) -> None:
        """See `LightningCLI.instantiate_classes`; what a constructor refuses is a wrong setting."""
        try:
            super().instantiate_classes()
        except ConfigError:
            raise
        except (ValueError, TypeError, ImportError) as error:  # the last: a device or strategy that is not installed
            raise ConfigError(str(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """See `LightningCLI.instantiate_trainer`. A callback of `trainer.callbacks` takes the place of ours."""
        made = self.config_init[self.subcommand]
        settings = made["trainer"]
        if settings["reload_dataloaders_every_n_epochs"] != 1:
            raise ConfigError(RELOAD)
        own = settings["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        ours = {name: made[name] for name in WITH_SETTINGS}
        kwargs["callbacks"] = own + default_callbacks(own, settings["enable_checkpointing"] is not False, ours)
        if settings["strategy"] == "fsdp":
            kwargs["strategy"] = "fsdp2"  # torch's first FSDP is on its way out, and runs on no CPU
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """Finds the checkpoint that `--ckpt_path` names before anything is loaded."""
        settings = self.config[self.subcommand]
        path = settings.get("ckpt_path")
        if path == "last":
            # Lightning looks in the folder of this run, which is new, and goes on without a checkpoint.
            path = settings["ckpt_path"] = str(last_checkpoint(self.trainer, resume=self.subcommand == "fit"))
        elif path == "best":
            raise ConfigError("ckpt_path: best is known only within the run that made it; give the checkpoint's path")
        elif path and "://" not in path and not Path(path).exists():
            raise ConfigError(f"ckpt_path: there is no checkpoint at {path}")
        if path and Path(path).is_dir() and not isinstance(self.trainer.strategy, FSDP2Strategy):
            raise ConfigError(
                f"ckpt_path: {path} is a folder of shards; load it with --trainer.strategy=fsdp2, on any number of "
                "devices (one file for all strategies is written by FSDP2Strategy.save_distributed_checkpoint=false)"
            )
        if path and "://" not in path and (wrong := problem(Path(path), resume=self.subcommand == "fit")):
            raise ConfigError(f"ckpt_path: {path} {wrong}")
        self.config_init[self.subcommand]["ckpt_path"] = path
        if path and "://" not in path:
            check_file(Path(path), self.trainer, self.model, self.datamodule, fit=self.subcommand == "fit")
        if settings.get("weights_only", False) is None:
            # Lightning leaves it to torch, and turns it off for an address of the web.
            settings["weights_only"] = self.config_init[self.subcommand]["weights_only"] = True
        if self.subcommand == "fit" and path:
            self.trainer.num_sanity_val_steps = 0  # the measurement before training has been made


def last_checkpoint(trainer: Trainer, resume: bool = True) -> Path:
    """The newest complete checkpoint of the runs that share the trainer's logger, or its checkpoints' folder; under
    SLURM also the one that a job was put in the queue again with.

    Args:
        trainer: The trainer.
        resume: It has to hold all that training needs, not weights alone.

    Raises:
        ConfigError: If there is none.
    """
    logger = trainer.logger
    folder = Path((logger.save_dir if logger else None) or trainer.default_root_dir)
    if logger is not None and logger.name:
        folder = folder / logger.name
    own = [Path(c.dirpath) for c in cast(Any, trainer).callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    folders = own or [folder]
    requeued = Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt") if SLURMEnvironment.detect() else ()
    found = newest(folders, requeued, resume)
    if found is None:
        looked = " or ".join(map(str, folders))
        raise ConfigError(f"ckpt_path is last, but there is no checkpoint in {looked}; give the checkpoint's path")
    return found


def _stream_seed(seed: bool | int) -> int:
    """The seed of our own random streams: for true the one that Lightning is going to take, the same on all ranks."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is True else int(seed)


def run(command: Callable[[], Any]) -> int:
    """Runs a command; what the user can mend becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        command()
    except (ConfigError, MisconfigurationException) as error:
        line = re.sub(r"\s+", " ", str(error))
        print(f"error: {masked(line)}", file=sys.stderr)
        return 2
    except OSError as error:
        if disk_error(error) is None:
            raise
        print(f"error: {error.filename or 'a file'} cannot be written or read: {error.strerror}", file=sys.stderr)
        return 2
    except SystemExit as end:
        # Lightning stops gracefully at a Ctrl-C, and then ends with 1 as if something had failed.
        if isinstance(end.__context__, KeyboardInterrupt):
            return 130
        raise
    except KeyboardInterrupt:
        return 130
    return 0
