"""The hyperparameters of a method are the fields of its dataclass; here their values are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from workbench.facts import FactError


def check_fields(method: Any) -> None:
    """Raises FactError where a field of a method's dataclass has a value that is not one of its choices, or of another type."""
    for name, hint in get_type_hints(type(method)).items():
        value = getattr(method, name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if choices and value not in choices:
            raise FactError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}.")
        if hint is int and not (isinstance(value, int) and not isinstance(value, bool)):
            raise FactError(f"{name} is {value!r}, expected a whole number.")
        if hint is bool and not isinstance(value, bool):
            raise FactError(f"{name} is {value!r}, expected True or False.")
        if hint is float and not number:
            raise FactError(f"{name} is {value!r}, expected a number.")
        if hint == float | None and not (value is None or number):
            raise FactError(f"{name} is {value!r}, expected a number, or None.")
        if get_origin(hint) is tuple and not isinstance(value, tuple):
            raise FactError(f"{name} is {value!r}, expected a tuple, e.g. ({value!r},).")
        whole = isinstance(value, tuple) and all(type(one) is int for one in value)
        if hint in (tuple[int, ...], tuple[int, ...] | None) and value is not None and not whole:
            raise FactError(f"{name} is {value!r}, expected a tuple of whole numbers, e.g. (4, 5).")


def check_options(cls: type, options: Mapping[str, Any]) -> None:
    """Raises FactError where a method has no option of a name."""
    unknown = sorted(set(options) - {field.name for field in fields(cls)})
    if unknown:
        names = ", ".join(field.name for field in fields(cls))
        raise FactError(f"{cls.__name__} has no option {', '.join(unknown)}. It has {names}.")
