"""Keeps keys, tokens and passwords out of settings, which are saved, and out of printed errors."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

from rlrt_lightning.runtime.errors import ConfigError

_NAME = re.compile(r"api_?key|(api|auth|access|bearer|hf)_?token|^token$|secret|passw(or)?d", re.IGNORECASE)
_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def masked(text: str) -> str:
    """Replaces the user and password in each URL of a text by ***."""
    return _IN_URL.sub("***", text)


def refuse_credentials(settings: Any, name: str = "") -> None:
    """Refuses settings that hold a credential, because config.yaml and loggers record all settings.

    Args:
        settings: Settings by name, nested as in a config.
        name: Name of the setting that holds them.

    Raises:
        ConfigError: If a setting holds a credential. The message names the setting, not its value.
    """
    if isinstance(settings, (dict, Namespace)):
        for key, value in (settings if isinstance(settings, dict) else vars(settings)).items():
            refuse_credentials(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            refuse_credentials(value, name)
    elif isinstance(settings, str):
        named = settings and _NAME.search(name.rpartition(".")[2])
        if named or _IN_URL.search(settings):
            what = "a key, token or password" if named else "a URL with a user or password"
            raise ConfigError(
                f"{name} is {what}; settings are saved to config.yaml, so set an environment variable instead, such as "
                "HF_TOKEN, VLLM_API_KEY or WANDB_API_KEY"
            )
