"""Private names of jsonargparse, and of argparse, which it builds on."""

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
    """Parses such that a class named on the command line or in a config comes with its own defaults.

    jsonargparse has no setting for this, so the function that decides it is replaced while our parser parses; other
    parsers of the process are not affected. jsonargparse keeps those settings of the old class that the new one has as
    well: `--model.method=RLSD` over RLRT would keep RLRT's eps_w, a silent error in somebody's comparison.
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
    """Whether two class paths lead to one class, as rlrt_lightning.RLRT and rlrt_lightning.objective.RLRT do."""
    if path == other:
        return True
    with suppress(Exception):  # a path that cannot be imported has its own error elsewhere
        return pkgutil.resolve_name(path) is pkgutil.resolve_name(other)
    return False


def actions(parser: ArgumentParser) -> list[Action]:
    """The settings of a parser, for the messages about wrong ones; neither argparse nor jsonargparse lists them."""
    return list(parser._actions)


def value_type(action: Action) -> Any:
    """The type of a setting's value, for the messages about wrong ones; without it they do not name the type."""
    return getattr(action, "_typehint", action.type)
