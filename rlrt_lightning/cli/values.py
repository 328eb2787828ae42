"""How the text of a setting becomes its value, and how values are written to config files.

jsonargparse reads the text of a flag, and each string in a config file, as YAML before it looks at the setting's type.
A setting that may be null would then lose any text that is a comment in YAML: `answer_pattern: '####(.*)'` would be
null. Our parser uses this loader and dumper instead, which keep all texts.
"""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader

MODE = "rlrt_yaml"
"""Name of loader and dumper, for a parser's `parser_mode`."""

_read = get_loader("yaml")


def load(text: str) -> Any:
    """Reads YAML.

    Args:
        text: The text. If it has no value, such as `####(.*)`, `---` or `~`, it is returned unchanged; jsonargparse has
            read `null` before.
    """
    value = _read(text)
    return text if value is None and text.strip() else value


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `load` reads as another value, such as 1e-5, which PyYAML itself reads as a string."""


def _represent(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    node = dumper.represent_str(text)
    try:
        if not isinstance(_read(text), str):
            node.style = "'"
    except yaml.YAMLError:
        pass  # not a plain scalar, so PyYAML quotes it
    return node


_Dumper.add_representer(str, _represent)


def dump(data: Any) -> str:
    """Writes YAML that `load` reads as the same data."""
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


set_loader(MODE, load, (yaml.YAMLError,))
set_dumper(MODE, dump)
