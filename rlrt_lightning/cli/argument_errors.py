"""What is wrong with the words of a command line, in one line that names the setting."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import count
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from rlrt_lightning.cli.given import Given, given, meant
from rlrt_lightning.runtime.credentials import refuse_credentials
from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.runtime.private.jsonargparse import actions, own_defaults, value_type

COMMANDS = "fit, validate, test, predict, reflection, shift, serve, curves or pass_at_k"


@dataclass
class _Wrong:
    """What a parser could not take.

    Args:
        keys: Names of the setting, from the outermost class to the innermost.
        text: What is wrong with it; empty where it is the value.
        type: The type of the value.
    """

    keys: tuple[str, ...]
    text: str = ""
    type: Any = None


class _Inner(ValueError):
    """The failure of a parser of one class's settings.

    jsonargparse tries all types that a setting may have and puts what each attempt said into the text of one error.
    The message of this error is a mark, by which the outer parser finds the failure in that text."""

    _numbers = count()
    raised: dict[str, _Wrong] = {}  # noqa: RUF012 - of all parsers, until the outermost reports

    def __init__(self, wrong: _Wrong) -> None:
        mark = f"<wrong:{next(self._numbers)}>"
        super().__init__(mark)
        self.raised[mark] = wrong


class RLRTParser(LightningArgumentParser):
    """Says what is wrong in one line and ends with exit code 2."""

    given: Given = []  # noqa: RUF012 - shared: a command's parser is another one than the one that gets the words

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

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """See `jsonargparse.ArgumentParser.parse_args`; config files are looked at first."""
        if not self.class_name:
            RLRTParser.given = given(args or ())
            groups = {action.dest.rpartition(".")[0] for parser in self._parsers() for action in actions(parser)}
            for name, value in self.given:
                if name in groups and not isinstance(value, (dict, str)):
                    raise ConfigError(f"{name}: it has to hold settings by name; it is {_yaml(value)}")
        with own_defaults():
            return super().parse_args(args, *more, **kwargs)

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """See `jsonargparse.ArgumentParser.dump`, which also answers `--print_config`."""
        refuse_credentials(cfg)
        return super().dump(cfg, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See `argparse.ArgumentParser.error`. jsonargparse passes an inner parser's error on to the outer one."""
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise cause
            cause = cause.__cause__
        wrong = self._wrong(message)
        if self.class_name:
            raise _Inner(wrong)
        _Inner.raised.clear()
        raise ConfigError(_line(wrong, self.given))

    def _wrong(self, message: str) -> _Wrong:
        """What is wrong: what an inner parser said, where it was one, or else out of this parser's own message."""
        inner = next((mark for mark in _Inner.raised if mark in message), None)
        before = message.partition(inner)[0] if inner else message
        keys = [key for key in re.findall(r'Parser key "([\w.]+)"', before) if key != "config"]
        if inner:
            wrong = _Inner.raised[inner]
            return replace(wrong, keys=(*keys[-1:], *wrong.keys))
        if keys:
            return _Wrong((keys[0],), type=self._type(keys[0]))
        if found := re.search(r"option '([\w.]+)'", message, re.IGNORECASE):
            key, owner = ((found[1],), f"{self.class_name} has") if self.class_name else ((), "there is")
            return _Wrong(key, f"{owner} no setting {found[1]}{meant(found[1], self._settings())}")
        if found := re.search(r"unrecognized arguments: (--)?([^\s=]+)", message):
            known = [(found[1] or "") + name for name in self._settings()]
            return _Wrong(
                (), f"there is no setting {found[1] or ''}{found[2]}{meant((found[1] or '') + found[2], known)}"
            )
        if found := re.search(r"invalid choice: '(\S+)' \(choose from (.*)\)", message):
            known = re.findall(r"[a-z_]+", found[2])
            return _Wrong((), f"there is no command {found[1]}; there are {', '.join(known)}{meant(found[1], known)}")
        if message.startswith('expected "subcommand"'):
            return _Wrong((), f"which command? {COMMANDS}; each explains its settings with --help")
        if found := re.search(r"the following arguments are required: (.*)", message):
            one = (found[1],) if "," not in found[1] else ()
            return _Wrong(one, f"{self.class_name or 'this command'} needs a value for {found[1]}")
        return _Wrong((), message)

    def _type(self, key: str) -> Any:
        """The type of a setting."""
        for parser in self._parsers():
            for action in actions(parser):
                if action.dest == key:
                    return value_type(action)
        return None

    def _settings(self) -> Iterator[str]:
        """Names of all settings, those of the classes that are the defaults included."""
        for parser in self._parsers():
            for action in actions(parser):
                yield from (option.removeprefix("--") for option in action.option_strings)
                if isinstance(action.default, dict):
                    yield from (f"{action.dest}.{name}" for name in action.default.get("init_args", {}))

    def _parsers(self) -> list[Any]:
        commands = [action.choices for action in actions(self) if isinstance(action.choices, dict)]
        return [self, *(parser for choices in commands for parser in choices.values())]


def _line(wrong: _Wrong, settings: Given) -> str:
    """The failure in one line, with the setting's full name and value, as they were given."""
    if not wrong.keys:
        return wrong.text
    # Between a dict and what is in it stands a name that the parsers do not know: data.benchmarks.NAME.samples.
    pattern = re.compile(r"(\.[^.]+)*?\.".join(map(re.escape, wrong.keys)))
    found = [(name, value) for name, value in settings if pattern.fullmatch(name)]
    name, value = found[-1] if found else (".".join(wrong.keys), None)
    return f"{name}: {wrong.text or _of_value(wrong.type, value, known=bool(found))}"


def _of_value(type_: Any, value: Any, known: bool) -> str:
    classes = [part for part in _parts(type_) if _is_component(part)]
    if known and isinstance(value, str) and classes and re.fullmatch(r"[A-Za-z_][\w.]*", value) and value != "null":
        return _no_class(value, classes)
    wanted = "hold settings by name" if type_ is None else f"be {_words(type_)}"
    return f"it has to {wanted}" + (f"; it is {_yaml(value)}" if known else "")


def _no_class(path: str, classes: list[Any]) -> str:
    module, _, name = path.rpartition(".")
    if module:
        try:
            found = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            return f"there is no class {path}: {first_line(error)}"
        names = " or ".join(c.__name__ for c in classes)
        return f"{path} cannot be taken: it is no {names}" if isinstance(found, type) else f"{path} is no class"
    known = sorted({sub.__name__ for c in classes for sub in _subclasses(c)})
    hint = meant(path, known)
    if not hint and 0 < len(known) <= 20:
        hint = f"; there are {', '.join(known)}, and class paths such as my_module.MyClass"
    return f"there is no class {path}{hint}"


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for sub in subclasses:
        if not sub.__name__.startswith("_"):
            yield sub
        yield from _subclasses(sub)


def _parts(type_: Any) -> Iterator[Any]:
    """The types that a type consists of; of a function the one that it returns."""
    if get_origin(type_) is Literal:
        return
    args = get_args(type_)
    if args and isinstance(args[0], list):
        args = args[1:]
    if not args:
        yield type_
    for part in args:
        yield from _parts(part)


def _is_component(type_: Any) -> bool:
    """Whether a type is a class that the command line takes by name."""
    return isinstance(type_, type) and type_.__module__ not in ("builtins", "pathlib") and not issubclass(type_, Tensor)


def _words(type_: Any) -> str:
    """A type in words: `int or null`, `one of drop, error`, `list of str`."""
    origin, args = get_origin(type_), get_args(type_)
    if type_ is type(None):
        return "null"
    if origin is Literal:
        return f"one of {', '.join(dict.fromkeys(map(str, args)))}"
    if origin in (Union, types.UnionType):
        options = tuple(option for arg in args if get_origin(arg) is Literal for option in get_args(arg))
        names = [_words(arg) for arg in args if get_origin(arg) is not Literal]
        return " or ".join([*([_words(Literal[options])] if options else []), *names])
    if origin in (list, tuple, set) and args:
        return f"{origin.__name__} of {' and '.join(_words(arg) for arg in args if arg is not ...)}"
    if origin is dict:
        return f"dict of {_words(args[1])} by name"
    if isinstance(origin, type) and args and not isinstance(args[0], list):
        return f"{origin.__name__} of {_words(args[0])}"
    if classes := [part.__name__ for part in _parts(type_) if isinstance(part, type)]:
        return " or ".join(dict.fromkeys(classes))
    return "of another type"


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
