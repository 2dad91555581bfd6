"""Plain data -> typed dataclasses, with every mistake of a file reported at once."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def nearest(word: str, options: typing.Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `options`, or an empty string."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def build(cls: type[T], data: Any, where: str = "", errors: list[str] | None = None) -> T:
    """Make a `cls` from nested plain data.

    Unknown keys, wrong types and values outside a `Literal` are appended to `errors` (dotted key, what was expected,
    the nearest valid name), never raised one by one; the returned object then holds defaults in their place.
    """
    errors = [] if errors is None else errors
    if data is None:
        data = {}
    if not isinstance(data, dict):
        errors.append(f"{where or 'the config'}: expected a mapping, got {data!r}")
        data = {}
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            errors.append(f"{path}: unknown key{nearest(str(key), fields) or ' (valid: ' + ', '.join(fields) + ')'}")
            continue
        try:
            values[key] = _convert(hints[key], value, path, errors)
        except TypeError as problem:
            errors.append(f"{path}: {problem}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            errors.append(f"{f'{where}.' if where else ''}{name}: required, but not given")
            values[name] = None
    return cls(**values)


def _convert(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path, errors)
    if origin is Literal:
        if value is False and "off" in args:
            value = "off"  # YAML reads a bare off as a truth value
        if value not in args or isinstance(value, bool) != any(isinstance(a, bool) and a == value for a in args):
            options = ", ".join(map(str, args))
            raise TypeError(f"{value!r} is not one of {options}{nearest(str(value), map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path, errors)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"expected a list, got {value!r}")
        fixed = origin is tuple and Ellipsis not in args
        if fixed and len(value) != len(args):
            raise TypeError(f"expected {len(args)} values, got {value!r}")
        kinds = args if fixed else (args[0],) * len(value)
        items = (_convert(k, v, f"{path}[{i}]", errors) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
        return origin(items)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise TypeError(f"expected a mapping, got {value!r}")
        kind = args[1] if args else Any
        return {str(k): _convert(kind, v, f"{path}.{k}", errors) for k, v in value.items()}
    return _convert_scalar(hint, value)


def _convert_union(args: tuple[Any, ...], value: Any, path: str, errors: list[str]) -> Any:
    if value is None and type(None) in args:
        return None
    problems = []
    for arg in args:
        if arg is type(None):
            continue
        nested: list[str] = []
        try:
            converted = _convert(arg, value, path, nested)
        except TypeError as problem:
            problems.append(str(problem))
            continue
        if not nested:
            return converted
        problems += nested
    raise TypeError(" or ".join(problems))


def _convert_scalar(hint: Any, value: Any) -> Any:
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 (no dot) as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise TypeError(f"expected a finite number, got {value!r}")
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError(f"expected {hint.__name__}, got {value!r}")


def flattened(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested settings; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= (
            flattened(value, f"{where}{key}.") if isinstance(value, Mapping) and value else {f"{where}{key}": value}
        )
    return found
