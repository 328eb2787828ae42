"""A class named on the command line comes with its own defaults: the one place that reaches into jsonargparse."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

# jsonargparse has no setting for this, so one of its functions is replaced. It looks the function up in its module at
# each call: for the command line, for merged configs, and for classes nested in other classes.
# tests/cli/test_cli_defaults.py fails where a release renames it or stops calling it.
import jsonargparse._typehints as typehints
from jsonargparse import Namespace


def _discard_settings_of_another_class(parser_or_action: Any, prev_val: Any, value: Any) -> None:
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


def install() -> None:
    """Replaces jsonargparse's function; a second call changes nothing."""
    typehints.discard_init_args_on_class_path_change = _discard_settings_of_another_class
