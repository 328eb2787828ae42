"""Keys, tokens and passwords: not taken as settings, since settings are saved, and not printed."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

from rlrt_lightning.runtime.errors import ConfigError

_NAME = re.compile(r"api_?key|(api|auth|access|bearer|hf)_?token|^token$|secret|passw(or)?d", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def masked(text: str) -> str:
    """A text without the users and passwords of the addresses in it."""
    return _IN_ADDRESS.sub("***", text)


def refuse_credentials(settings: Any, name: str = "") -> None:
    """Refuses settings that hold a credential: they are written to config.yaml, and loggers send them on.

    Args:
        settings: Settings by name, nested as in a config.
        name: What they are the value of.

    Raises:
        ConfigError: Naming the setting, not the value.
    """
    if isinstance(settings, (dict, Namespace)):
        for key, value in (settings if isinstance(settings, dict) else vars(settings)).items():
            refuse_credentials(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            refuse_credentials(value, name)
    elif isinstance(settings, str):
        named = settings and _NAME.search(name.rpartition(".")[2])
        if named or _IN_ADDRESS.search(settings):
            what = "a key, token or password" if named else "an address with a user or password in it"
            raise ConfigError(
                f"{name} is {what}; settings are saved to config.yaml, so it has to come from the environment instead, "
                "such as HF_TOKEN, VLLM_API_KEY or WANDB_API_KEY"
            )
