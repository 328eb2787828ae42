"""A restricted `eval` for answers written by a model: literals and mathematics only.

Nine of reasoning-gym's scorers pass the answer to `eval`, directly or through `sympy.parse_expr`, with access to every
builtin function: the answer `__import__('os').system(...)` would be executed. The scorers expect lists of literals and
mathematical expressions, which still work. Any other name raises an error, which the scorers treat as a wrong answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from types import CodeType
from typing import Any

from rlrt_lightning.runtime.errors import ConfigError

CANARY = f"exec('import sys; sys.modules[\"{__name__}\"].ran.append(1)')"
"""An answer that appends to `ran` if it is executed."""
ran: list[int] = []

_FUNCTIONS = {"abs", "sqrt", "cbrt", "root"}  # beside sympy's classes


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


def close_eval(score: Callable[[str], Any]) -> None:
    """Replaces `eval` by `closed_eval` in reasoning-gym's modules and in sympy's parser, for the life of the process.
    Call it in the processes that score answers: the verifier's workers.

    Neither library has an option for this. A test answer then checks that no answer is executed, because a release may
    evaluate answers elsewhere.

    Args:
        score: Scores an answer.

    Raises:
        ConfigError: If an answer can still execute code.
    """
    import sympy.parsing.sympy_parser as parser

    for name, module in list(sys.modules.items()):
        if name == parser.__name__ or name.partition(".")[0] == "reasoning_gym":
            vars(module)["eval"] = closed_eval
    ran.clear()
    for evaluate in (parser.parse_expr, score):
        with suppress(Exception):
            evaluate(CANARY)
    if ran:
        versions = " and ".join(f"{name} {version(name)}" for name in ("reasoning-gym", "sympy"))
        raise ConfigError(f"data.task: {versions} execute code in answers; install earlier releases")
