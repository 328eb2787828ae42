"""Gives a class named on the command line its own defaults. The only module that patches jsonargparse."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

# jsonargparse has no option for this, so one of its functions is replaced. It looks the function up in its module on
# every call: for flags, for merged configs and for nested classes. tests/cli/test_cli_defaults.py fails if a release
# renames the function or stops calling it.
import jsonargparse._typehints as typehints
from jsonargparse import Namespace


def _discard_settings_of_another_class(parser_or_action: Any, prev_val: Any, value: Any) -> None:
    """Discards the settings of the previous class when the class changes.

    jsonargparse keeps those that the new class also has: `--model.method=RLSD` over RLRT would keep RLRT's eps_w and
    silently distort a comparison.
    """
    if not prev_val or not prev_val.get("class_path") or _same_class(prev_val["class_path"], value["class_path"]):
        return
    for settings in ("init_args", "dict_kwargs"):
        if settings in prev_val:
            prev_val[settings] = Namespace() if isinstance(prev_val, Namespace) else {}


def _same_class(path: str, other: str) -> bool:
    """Whether two paths name the same class, such as rlrt_lightning.RLRT and rlrt_lightning.objective.RLRT."""
    if path == other:
        return True
    with suppress(Exception):  # import errors are reported elsewhere
        return typehints.import_object(path) is typehints.import_object(other)
    return False


def install() -> None:
    """Replaces jsonargparse's function. Idempotent."""
    typehints.discard_init_args_on_class_path_change = _discard_settings_of_another_class
