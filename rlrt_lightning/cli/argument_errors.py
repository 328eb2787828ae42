"""Reduces jsonargparse's errors to one line that names the setting."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from itertools import count
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from rlrt_lightning.cli import class_help
from rlrt_lightning.cli.given import Given, did_you_mean, given
from rlrt_lightning.cli.types import is_component, parts, subclasses, words
from rlrt_lightning.cli.values import MODE
from rlrt_lightning.runtime.credentials import refuse_credentials
from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.runtime.private.jsonargparse import actions, exact_values, own_defaults, value_type

COMMANDS = "fit, validate, test, predict, reflection, shift, serve, curves or pass_at_k"
DATA_FILES = (".parquet", ".jsonl", ".json", ".csv")


@dataclass
class _Problem:
    """Why a parser rejected a setting.

    Args:
        keys: The parts of the setting's name, outermost class first.
        text: What is wrong; empty if the value is.
        type: The expected type of the value.
    """

    keys: tuple[str, ...]
    text: str = ""
    type: Any = None


class _NestedError(ValueError):
    """An error in the settings of a nested class.

    jsonargparse tries every type that a setting may have and joins the error texts of all attempts. The message of this
    exception is a marker by which the outer parser finds the problem in that text.
    """

    _ids = count()
    raised: dict[str, _Problem] = {}  # noqa: RUF012 - shared by all parsers; cleared by the outermost

    def __init__(self, problem: _Problem) -> None:
        marker = f"<problem:{next(self._ids)}>"
        super().__init__(marker)
        self.raised[marker] = problem


class RLRTParser(LightningArgumentParser):
    """Reports errors in one line; the command line then exits with code 2."""

    given: Given = []  # noqa: RUF012 - set by the top-level parser, read by the commands' parsers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A new setting with the same prefix would break an abbreviation or change its meaning.
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("parser_mode", MODE)
        super().__init__(*args, **kwargs)
        self.class_name, self._class = "", type(None)

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `jsonargparse.ArgumentParser.add_class_arguments`. Records the class name for error messages."""
        if nested_key is None:
            self.class_name, self._class = theclass.__name__, theclass
        return super().add_class_arguments(theclass, nested_key, *args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """See `jsonargparse.ArgumentParser.parse_args`. Checks config files first."""
        if not self.class_name:
            RLRTParser.given = given(args or ())
            groups = {action.dest.rpartition(".")[0] for parser in self._parsers() for action in actions(parser)}
            # `.help` makes a group of a setting such as trainer.callbacks, which is null in most runs' config.yaml.
            groups -= {name for name in groups if type(None) in get_args(self._type(name))}
            for name, value in self.given:
                if name in groups and not isinstance(value, (dict, str)):
                    raise ConfigError(f"{name}: it has to be a mapping of settings; it is {_yaml(value)}")
            if asked := class_help.setting_of(args or ()):
                self._list_classes(asked)
        with own_defaults(), exact_values():
            return super().parse_args(args, *more, **kwargs)

    def _list_classes(self, setting: str) -> None:
        """Prints the classes that a setting accepts and exits, as `--help` does."""
        text = class_help.class_list(setting, self._type(setting))
        if text is None:
            owner = setting.rpartition(".")[0]
            raise ConfigError(f"{setting}.help: name a class, as in --{owner}.help NAME, which shows its settings")
        print(text)
        self.exit()

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """See `jsonargparse.ArgumentParser.dump`, which also implements `--print_config`. Refuses credentials."""
        refuse_credentials(cfg)
        with exact_values():
            return super().dump(cfg, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See `argparse.ArgumentParser.error`. jsonargparse passes a nested parser's error to the outer parser."""
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise cause
            cause = cause.__cause__
        problem = self._diagnose(message)
        if self.class_name:
            raise _NestedError(problem)
        _NestedError.raised.clear()
        raise ConfigError(_message(problem, self.given))

    def _diagnose(self, message: str) -> _Problem:
        """Finds the problem in a nested parser's error, or else in this parser's own message."""
        nested = next((marker for marker in _NestedError.raised if marker in message), None)
        before = message.partition(nested)[0] if nested else message
        keys = [key for key in re.findall(r'Parser key "([\w.]+)"', before) if key != "config"]
        if nested:
            problem = _NestedError.raised[nested]
            return replace(problem, keys=(*keys[-1:], *problem.keys))
        if keys:
            return _Problem((keys[0],), type=self._type(keys[0]))
        if found := re.search(r"option '([\w.]+)'", message, re.IGNORECASE):
            key, owner = ((found[1],), f"{self.class_name} has") if self.class_name else ((), "there is")
            hint = _class_with(found[1], self._class) or did_you_mean(found[1], self._settings())
            return _Problem(key, f"{owner} no setting {found[1]}{hint}")
        if found := re.search(r"unrecognized arguments: (--)?([^\s=]+)", message):
            known = [(found[1] or "") + name for name in self._settings()]
            name = (found[1] or "") + found[2]
            return _Problem((), f"there is no setting {name}{did_you_mean(name, known)}")
        if found := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", message):
            known = re.findall(r"[a-z_]+", COMMANDS.replace(" or ", ", "))
            hint = did_you_mean(found[1], known)
            return _Problem((), f"there is no command {found[1]}; choose from {', '.join(known)}{hint}")
        if message.startswith('expected "subcommand"'):
            return _Problem((), f"no command given; choose {COMMANDS} (each lists its settings with --help)")
        if found := re.search(r"the following arguments are required: (.*)", message):
            required = (found[1],) if "," not in found[1] else ()
            return _Problem(required, f"{self.class_name or 'this command'} needs a value for {found[1]}")
        return _Problem((), message)

    def _type(self, key: str) -> Any:
        """The type of a setting; without it, messages do not name the type."""
        for parser in self._parsers():
            for action in actions(parser):
                if action.dest == key:
                    return value_type(action)
        return None

    def _settings(self) -> Iterator[str]:
        """Names of all settings, including those of the default classes."""
        for parser in self._parsers():
            for action in actions(parser):
                yield from (option.removeprefix("--") for option in action.option_strings)
                if isinstance(action.default, dict):
                    yield from (f"{action.dest}.{name}" for name in action.default.get("init_args", {}))

    def _parsers(self) -> list[Any]:
        commands = [action.choices for action in actions(self) if isinstance(action.choices, dict)]
        return [self, *(parser for choices in commands for parser in choices.values())]


def _message(problem: _Problem, settings: Given) -> str:
    """Describes a problem in one line, with the setting's full name and value as given by the user."""
    if not problem.keys:
        return problem.text
    # Parsers do not report the keys of a dict, such as NAME in data.benchmarks.NAME.samples.
    pattern = re.compile(r"(\.[^.]+)*?\.".join(map(re.escape, problem.keys)))
    found = [(name, value) for name, value in settings if pattern.fullmatch(name)]
    name, value = found[-1] if found else (".".join(problem.keys), None)
    return f"{name}: {problem.text or _value_problem(problem.type, value, known=bool(found))}"


def _value_problem(type_: Any, value: Any, known: bool) -> str:
    classes = [part for part in parts(type_) if is_component(part)]
    if known and isinstance(value, str) and classes and re.fullmatch(r"[A-Za-z_][\w.]*", value) and value != "null":
        return _class_problem(value, classes)
    expected = "a mapping of settings" if type_ is None else words(type_)
    hint = "; data files are read by DatasetTask: --data.task=DatasetTask" if str(value).endswith(DATA_FILES) else ""
    return f"it has to be {expected}" + (f"; it is {_yaml(value)}{hint}" if known else "")


def _class_problem(path: str, classes: list[Any]) -> str:
    module, _, name = path.rpartition(".")
    if module:
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            return f"there is no class {path}: {first_line(error)}"
        names = " or ".join(c.__name__ for c in classes)
        return f"{path} is not a {f'subclass of {names}' if isinstance(found, type) else 'class'}"
    known = sorted({sub.__name__ for c in classes for sub in subclasses(c)})
    hint = did_you_mean(path, known)
    if not hint and 0 < len(known) <= 20:
        hint = f"; choose from {', '.join(known)}, or give a class path such as my_module.MyClass"
    return f"there is no class {path}{hint}"


def _class_with(setting: str, without: type) -> str:
    """Names the classes that have a setting, among those that can take the place of a class without it."""
    bases = [base for base in without.__mro__[1:] if base.__module__.startswith("rlrt_lightning")]
    others = subclasses(bases[-1]) if bases else ()
    ours = (cls for cls in others if cls.__module__.startswith("rlrt_lightning"))
    names = sorted(cls.__name__ for cls in ours if setting in signature(cls).parameters)
    return f"; {' and '.join(names)} {'has' if len(names) == 1 else 'have'} it" if names else ""


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
