"""Private names of jsonargparse and of argparse."""

from __future__ import annotations

import pkgutil
from argparse import Action
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jsonargparse._typehints as typehints
from jsonargparse import ArgumentParser, Namespace


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


def actions(parser: ArgumentParser) -> list[Action]:
    """The settings of a parser, which error messages suggest. Neither library lists them publicly."""
    return list(parser._actions)


def value_type(action: Action) -> Any:
    """The type of a setting's value; without it, error messages do not name the type."""
    return getattr(action, "_typehint", action.type)
