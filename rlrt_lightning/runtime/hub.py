"""Finds out quickly whether the Hugging Face Hub can be reached, instead of waiting for many requests to time out."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.runtime.terminal import waiting_for

log = logging.getLogger(__name__)

TIMEOUT_S = 8.0
"""Seconds within which the hub has to answer."""


def check_reachable(setting: str, name: str, kind: Literal["model", "dataset"]) -> None:
    """Refuses a name on the hub if the hub does not answer and no earlier download is in the cache. With one in the
    cache, the libraries use it from now on.

    Args:
        setting: The setting that has the name.
        name: A local path, or a name on the hub.
        kind: What the name is of.

    Raises:
        ConfigError: If the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if Path(name).exists() or constants.is_offline_mode() or not _is_repository(name):
        return
    host = urlsplit(constants.ENDPOINT).netloc
    with waiting_for(f"{host}, to find the {kind} {name}"):
        reason = _obstacle(name, kind)
    if reason is None:
        return
    if kind == "model" and isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        log.warning("%s cannot be reached (%s); using the cached files of %s", host, reason, name)
        constants.HF_HUB_OFFLINE = True
        return
    raise ConfigError(
        f"{setting}: {name!r} is not a local path, and the {kind} cannot be looked up at {host}: {reason}; check the "
        "network and HF_ENDPOINT, or set it to a local path"
    )


def _is_repository(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _obstacle(name: str, kind: str) -> str | None:
    """Why the hub does not answer; None if it does, even with an error. In a thread, because resolving the name of a
    host has no time limit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    found: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
        except HfHubHTTPError:  # it answered
            found.append(None)
        except Exception as error:  # of requests or httpx, depending on the release
            found.append(first_line(error) or type(error).__name__)
        else:
            found.append(None)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return found[0] if found else f"no answer within {TIMEOUT_S:g} s"
