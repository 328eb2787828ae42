"""What flags and config files set, read before they are parsed: for what a parser cannot say of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlrt_lightning.runtime.errors import ConfigError

Given = list[tuple[str, Any]]
"""Settings by their full names, in the order in which they are given."""


def given(words: Sequence[str]) -> Given:
    """The settings that a command line gives, those of its config files included.

    Args:
        words: Words of the command line.

    Returns:
        Names and values; of a setting that is a class its path, and the class's settings under the setting's name.

    Raises:
        ConfigError: If a config file cannot be read, or sets something twice.
    """
    found: Given = []
    for word, after in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else after
        if flag in ("--config", "-c"):
            found += _flat(read_config(value))
        elif flag.startswith("--"):
            found.append((flag[2:].rstrip("+").replace(".init_args", ""), value))
    return found


def read_config(path: str) -> dict[str, Any]:
    """A config file, or a config that stands on the command line itself.

    Args:
        path: Of the file, or the config's text.

    Raises:
        ConfigError: If it is no mapping in YAML, or a key stands in it twice.
    """
    inline = path.lstrip().startswith("{") or ": " in path
    name = "--config" if inline else f"--config={path}"
    text = path if inline else _text(path)
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None or node.tag == "tag:yaml.org,2002:null":
            raise ConfigError(f"{name}: it is empty")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name}: it is a {node.id}, and has to hold settings by name, such as `model: ...`")
        _refuse_twice(name, node)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        tabs = "; YAML is indented by spaces, not tabs" if r"\t" in problem else ""
        raise ConfigError(f"{name}: it is not YAML: {where}{problem}{tabs}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: it is nested too deeply") from error


def _text(path: str) -> str:
    if not path:
        raise ConfigError("--config: it needs the name of a file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = Path(path).parent
        others = [str(folder / p.name) for p in folder.iterdir()] if folder.is_dir() else []
        raise ConfigError(f"--config={path}: there is no such file{meant(path, others)}") from None
    except IsADirectoryError:
        raise ConfigError(f"--config={path}: it is a folder; name a file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config={path}: it is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config={path}: it cannot be read: {getattr(error, 'strerror', error)}") from error


def _refuse_twice(name: str, node: yaml.Node) -> None:
    """YAML's loaders take the last of two equal keys; the first then has no effect, and nobody says so."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    lines: dict[str, int] = {}
    for key, _ in pairs:
        line = key.start_mark.line + 1
        if key.value in lines and key.value != "<<":
            raise ConfigError(f"{name}: {key.value} stands in it twice, in lines {lines[key.value]} and {line}")
        lines[key.value] = line
    for child in [value for _, value in pairs] if pairs else node.value if isinstance(node, yaml.SequenceNode) else ():
        _refuse_twice(name, child)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            inside = name if key in ("class_path", "init_args", "dict_kwargs") else f"{name}.{key}".lstrip(".")
            yield from _flat(part, inside)
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for part in value:
            yield from _flat(part, name)
    else:
        yield name, value


def meant(word: str, known: Iterable[str]) -> str:
    """A question whether something similar was meant, to follow a word that nobody knows.

    Args:
        word: The word.
        known: Words that would be right.
    """
    known = list(known)
    # A setting is often given without what it belongs to: --lr for --model.optimizer.lr.
    close = [k for k in known if k.rpartition(".")[2] == word.lstrip("-")] or difflib.get_close_matches(
        word, known, n=1
    )
    return f" (did you mean {close[0]}?)" if close else ""
