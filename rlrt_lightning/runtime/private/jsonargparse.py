"""Private names of jsonargparse and of argparse."""

from __future__ import annotations

import pkgutil
from argparse import Action
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, get_origin

import jsonargparse._typehints as typehints
from jsonargparse import ArgumentParser, Namespace
from jsonargparse._util import NestedArg


@contextmanager
def own_defaults() -> Iterator[None]:
    """Gives a class named on the command line or in a config its own defaults.

    When a class replaces another, jsonargparse keeps the old class's settings that the new one also has:
    `--model.method=RLSD` over RLRT would silently keep RLRT's eps_w. There is no public option, so the function that
    decides this is replaced while our parser runs; other parsers in the process are not affected.
    """
    theirs = typehints.discard_init_args_on_class_path_change
    typehints.discard_init_args_on_class_path_change = _discard_settings_of_another_class
    try:
        yield
    finally:
        typehints.discard_init_args_on_class_path_change = theirs


def _discard_settings_of_another_class(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    if not prev_val or not prev_val.get("class_path") or _same_class(prev_val["class_path"], value["class_path"]):
        return
    for settings in ("init_args", "dict_kwargs"):
        if settings in prev_val:
            prev_val[settings] = Namespace() if isinstance(prev_val, Namespace) else {}


def _same_class(path: str, other: str) -> bool:
    """Whether two class paths name the same class, such as rlrt_lightning.RLRT and rlrt_lightning.objective.RLRT."""
    if path == other:
        return True
    with suppress(Exception):  # a path that cannot be imported raises its own error elsewhere
        return pkgutil.resolve_name(path) is pkgutil.resolve_name(other)
    return False


@contextmanager
def exact_values() -> Iterator[None]:
    """Reads and writes values unchanged where jsonargparse would change them.

    Two of its functions are replaced while our parser parses or writes a config; there is no public option for these:

    - A setting that may be null accepts any text that YAML reads as null, also a comment: `--trainer.max_epochs=#5`
      would silently mean no limit. Here only `null`, `~` and nothing are null.
    - `--data.task.answer_pattern=[0-9]` is read before the class of `data.task` is known, as a list. Here the class's
      own parser gets the text and reads it by the type of its setting.
    - A dict of several rewards is written as a text that says it cannot be written, because a callable, the type that
      is tried before, accepts anything. Here a callable does not accept a dict without a class.
    """
    read, adapt = typehints.basic_json_or_yaml_load, typehints.adapt_typehints

    def read_nulls(text: str) -> Any:
        value = read(text)
        return text if value is None and text.strip().lower() not in ("", "null", "~") else value

    def adapt_texts(val: Any, typehint: Any, *args: Any, **kwargs: Any) -> Any:
        text, is_callable = kwargs.get("orig_val"), get_origin(typehint) is Callable
        if kwargs.get("serialize") and is_callable and isinstance(val, dict) and "class_path" not in val:
            raise ValueError("not a callable")
        of_class = isinstance(typehint, type) or is_callable
        if of_class and isinstance(val, NestedArg) and isinstance(text, NestedArg) and val.key == text.key:
            val = val if val.key in ("init_args", "dict_kwargs") else text
        return adapt(val, typehint, *args, **kwargs)

    typehints.basic_json_or_yaml_load, typehints.adapt_typehints = read_nulls, adapt_texts
    try:
        yield
    finally:
        typehints.basic_json_or_yaml_load, typehints.adapt_typehints = read, adapt


def actions(parser: ArgumentParser) -> list[Action]:
    """The settings of a parser, which error messages suggest. Neither library lists them publicly."""
    return list(parser._actions)


def value_type(action: Action) -> Any:
    """The type of a setting's value; without it, error messages do not name the type."""
    return getattr(action, "_typehint", action.type)
