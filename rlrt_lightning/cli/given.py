"""The settings in flags and config files, read before parsing to allow checks and messages that the parser lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlrt_lightning.runtime import errors
from rlrt_lightning.runtime.errors import ConfigError

Given = list[tuple[str, Any]]
"""Full names and values of settings, in the order given."""


def given(words: Sequence[str]) -> Given:
    """The settings on a command line, including those in its config files.

    Args:
        words: The arguments of the command line.

    Returns:
        Names and values. The value of a class setting is its path; the settings of the class follow under that name.

    Raises:
        ConfigError: If a config file cannot be read, is wrong as YAML or names another config.
    """
    found: Given = []
    for word, after in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else after
        if flag in ("--config", "-c"):
            found += _in_file(value)
        elif flag.startswith("--"):
            name = flag[2:].rstrip("+").replace(".init_args", "")
            found += _in_file(value, name) if _is_config(value) else [(name, value)]
    return found


def _in_file(path: str, section: str = "") -> Iterator[tuple[str, Any]]:
    """The settings in a config file, and in the files that it names for its sections, such as `data: data.yaml`."""
    for name, value in _flatten(read_config(path), section):
        if name == "config":  # the parser would read it, but drop those settings that this file sets as well
            raise ConfigError(f"--config={path}: a config cannot name another one; give each with --config")
        named = str(Path(path).parent / value) if isinstance(value, str) else ""
        if _is_config(named):
            yield from _in_file(named, name)
        else:
            yield name, value


def _is_config(value: str) -> bool:
    return value.endswith((".yaml", ".yml")) and Path(value).is_file()


def read_config(path: str) -> dict[str, Any]:
    """Reads a config file, or a config given inline on the command line.

    Args:
        path: Path of the file, or the inline YAML.

    Raises:
        ConfigError: If it is not a YAML mapping, has a duplicate key or a value that is a comment.
    """
    inline = path.lstrip().startswith("{") or ": " in path
    name = "--config" if inline else f"--config={path}"
    text = path if inline else _text(path)
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None or node.tag == "tag:yaml.org,2002:null":
            raise ConfigError(f"{name}: it is empty")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name}: it is a {node.id}; it has to be a mapping of settings, such as `model: ...`")
        _refuse_duplicates(name, node)
        _refuse_comments_as_values(name, node, text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        tabs = "; indent YAML with spaces, not tabs" if r"\t" in problem else ""
        raise ConfigError(f"{name}: it is not YAML: {where}{problem}{tabs}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: it is nested too deeply") from error


def _text(path: str) -> str:
    if not path:
        raise ConfigError("--config: give the name of a file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = Path(path).parent
        others = [str(folder / p.name) for p in folder.iterdir()] if folder.is_dir() else []
        raise ConfigError(f"--config={path}: there is no such file{did_you_mean(path, others)}") from None
    except IsADirectoryError:
        raise ConfigError(f"--config={path}: it is a folder; name a file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config={path}: it is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config={path}: it cannot be read: {getattr(error, 'strerror', error)}") from error


def _refuse_duplicates(name: str, node: yaml.Node) -> None:
    """Refuses duplicate keys: YAML loaders silently keep only the last one."""
    for mapping in _mappings(node):
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            line = key.start_mark.line + 1
            if key.value in lines and key.value != "<<":
                raise ConfigError(f"{name}: {key.value} is set twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line


def _refuse_comments_as_values(name: str, node: yaml.Node, text: str) -> None:
    """Refuses `answer_pattern: ####(.*)`, which YAML reads as null with a comment. A comment after a setting without a
    value begins with `# `."""
    for key, value in (pair for mapping in _mappings(node) for pair in mapping.value):
        after = text[value.end_mark.index :].partition("\n")[0].strip()
        if value.tag == "tag:yaml.org,2002:null" and not value.value and re.match(r"#+[^#\s]|##", after):
            line = key.start_mark.line + 1
            raise ConfigError(f"{name}: {key.value} in line {line}: {after} is a comment in YAML; put it in quotes")


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """All mappings in a document, outer ones first."""
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _mappings(part)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            inside = name if key in ("class_path", "init_args", "dict_kwargs") else f"{name}.{key}".lstrip(".")
            yield from _flatten(part, inside)
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for part in value:
            yield from _flatten(part, name)
    else:
        yield name, value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`errors.did_you_mean` for a setting, which is often given without a part of its prefix: --lr or --model.lr
    for --model.optimizer.lr.

    Args:
        word: The unknown name.
        known: The valid names.
    """
    known = list(known)
    section, _, last = word.lstrip("-").rpartition(".")
    same = [name for name in known if name.rpartition(".")[2] == last]
    nearest = next((name for name in same if name.lstrip("-").startswith(section)), None)
    return errors.did_you_mean(nearest or word, known)
