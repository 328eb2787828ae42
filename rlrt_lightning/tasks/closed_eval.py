"""A restricted `eval` for answers written by a model: literals and mathematics only.

Nine of reasoning-gym's scorers pass the answer to `eval`, directly or through `sympy.parse_expr`, with access to every
builtin function: the answer `__import__('os').system(...)` would be executed. The scorers expect lists of literals and
mathematical expressions, which still work. Any other name raises an error, which the scorers treat as a wrong answer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import CodeType
from typing import Any

_FUNCTIONS = {"abs", "sqrt", "cbrt", "root"}  # allowed in addition to sympy's classes


def closed_eval(source: str | CodeType, names: Any = None, more_names: Any = None) -> Any:
    """Evaluates an expression whose only names are those of sympy's classes and objects. Same signature as `eval`.

    Args:
        source: The expression.
        names: Global names.
        more_names: Local names, which take precedence.

    Raises:
        ValueError: If the expression uses any other name or an attribute, or defines a function.
        SyntaxError: If it is not an expression.
    """
    from sympy import Basic

    code = compile(source.lstrip(" \t"), "<answer>", "eval") if isinstance(source, str) else source
    if any(isinstance(constant, CodeType) for constant in code.co_consts):
        raise ValueError("an answer must not define a function")
    known: dict[str, Any] = {}
    for name in code.co_names:  # includes attributes, which are rejected unless they are named like a sympy class
        value = _resolve(name, more_names, names)
        if not (isinstance(value, Basic) or (isinstance(value, type) and issubclass(value, Basic))) and (
            name not in _FUNCTIONS or value is None
        ):
            raise ValueError(f"an answer must not use the name {name}")
        known[name] = value
    return eval(code, {"__builtins__": {}, **known})


def _resolve(name: str, *scopes: Mapping[str, Any] | None) -> Any:
    return next((scope[name] for scope in scopes if scope is not None and name in scope), None)


def close_eval() -> None:
    """Replaces `eval` by `closed_eval` in reasoning-gym's modules and in sympy's parser."""
    import sympy.parsing.sympy_parser  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name == "sympy.parsing.sympy_parser" or name.partition(".")[0] == "reasoning_gym":
            vars(module)["eval"] = closed_eval
