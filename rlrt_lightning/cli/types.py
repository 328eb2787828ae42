"""The types of settings: the classes in them, and how messages describe them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from inspect import isabstract
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor


def subclasses(base: type) -> Iterator[type]:
    """The public subclasses of a class, and those of its subclasses, as far as they can be instantiated."""
    known: list[type] = base.__subclasses__()
    for sub in known:
        if not sub.__name__.startswith("_") and not isabstract(sub):
            yield sub
        yield from subclasses(sub)


def parts(type_: Any) -> Iterator[Any]:
    """The types that a type is composed of; for a callable, its return type."""
    if get_origin(type_) is Literal:
        return
    args = get_args(type_)
    if args and isinstance(args[0], list):
        args = args[1:]
    if not args:
        yield type_
    for part in args:
        yield from parts(part)


def is_component(type_: Any) -> bool:
    """Whether a type is a class that the command line accepts by name."""
    return isinstance(type_, type) and type_.__module__ not in ("builtins", "pathlib") and not issubclass(type_, Tensor)


def words(type_: Any) -> str:
    """A readable description of a type: `int or null`, `one of drop, error`, `list of str`."""
    origin, args = get_origin(type_), get_args(type_)
    if type_ is type(None):
        return "null"
    if origin is Literal:
        return f"one of {', '.join(dict.fromkeys(map(str, args)))}"
    if origin in (Union, types.UnionType):
        options = tuple(option for arg in args if get_origin(arg) is Literal for option in get_args(arg))
        names = [words(arg) for arg in args if get_origin(arg) is not Literal]
        return " or ".join([*([words(Literal[options])] if options else []), *names])
    if origin in (list, tuple, set) and args:
        return f"{origin.__name__} of {' and '.join(words(arg) for arg in args if arg is not ...)}"
    if origin is dict:
        return f"dict of {words(args[1])} by name"
    if isinstance(origin, type) and args and not isinstance(args[0], list):
        return f"{origin.__name__} of {words(args[0])}"
    if classes := [part.__name__ for part in parts(type_) if isinstance(part, type)]:
        return " or ".join(dict.fromkeys(classes))
    return "of another type"
