"""The form of a method's hyperparameters, read from its source: name, type, choices, default, and the docstring as help.

Read with `ast` and not by importing, so that a page can show a form before torch is loaded. A field's docstring is the string
that follows it; a `Literal` is followed through names and imports of this package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from workbench.errors import InputError

FieldType = Literal["choice", "choices", "integer", "number", "text", "texts", "integers", "switch"]
"""How a field is asked for: one of its choices or several, a whole number, a number, a text or several, on or off."""

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class FormField:
    """One hyperparameter."""

    name: str
    """Name of the dataclass field."""

    type: FieldType
    """How it is asked for."""

    default: Any
    """Value that is taken when nothing is chosen."""

    help: str
    """The field's docstring."""

    choices: tuple[Any, ...] = ()
    """What can be chosen, for `choice` and `choices`."""

    optional: bool = False
    """Whether None is a value too."""

    @property
    def label(self) -> str:
        """The name as words, e.g. `Window rule`."""
        return self.name.replace("_", " ").capitalize()


def form_of(module: str, name: str) -> tuple[FormField, ...]:
    """The fields of the dataclass `name` in `module`, e.g. `form_of("workbench.locators.causal_trace", "CausalTrace")`.

    Those of its bases come first, as in the dataclass.

    Raises:
        ValueError: the module has no such class, a field's type has no form, or a default is no constant.
    """
    found: dict[str, FormField] = {}
    node = _class(module, name)
    for base in node.bases:
        home = _home(module, ast.unparse(base))
        if home is not None:
            found |= {field.name: field for field in form_of(*home)}
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.value is not None
        ):
            field = _field(module, statement, _docstring(after))
            found[field.name] = field
    return tuple(found.values())


@cache  # also since Python 3.11 cannot parse in two threads at once
def form_of_function(module: str, name: str) -> tuple[FormField, ...]:
    """The keyword-only parameters of a function that have a default, but for `store`; help is their line under `Args:`.

    Raises:
        ValueError: the module has no such function, a parameter's type has no form, or a default is no constant.
    """
    path = _path(module)
    body = ast.parse(path.read_text(encoding="utf-8")).body if path else []
    node = next((one for one in body if isinstance(one, ast.FunctionDef) and one.name == name), None)
    if node is None:
        raise ValueError(f"{module!r} has no function {name!r}.")
    helps = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", ast.get_docstring(node) or "", re.MULTILINE))
    fields = []
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if default is not None and argument.annotation is not None and argument.arg != "store":
            statement = ast.AnnAssign(ast.Name(argument.arg), argument.annotation, default, simple=1)
            fields.append(_field(module, statement, re.sub(r"\s*\n\s*", " ", helps.get(argument.arg, ""))))
    return tuple(fields)


def read_option(field: FormField, text: str) -> Any:
    """A field's value from text, as it is typed in a command line; several are separated by commas, `none` is None.

    Raises:
        InputError: the text spells no such value.
    """
    text = text.strip()
    if field.optional and text.lower() == "none":
        return None
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    wrong = InputError(f"{field.name} is {text!r}, expected {_EXPECTED[field.type].format(choices=field.choices)}.")
    if field.type in ("choice", "choices"):
        named = {str(choice): choice for choice in field.choices}
        if not parts or not set(parts) <= set(named) or (field.type == "choice" and len(parts) > 1):
            raise wrong
        return named[text] if field.type == "choice" else tuple(named[part] for part in parts)
    if field.type == "switch":
        if text.lower() not in _SWITCH:
            raise wrong
        return _SWITCH[text.lower()]
    if field.type in ("integer", "number"):
        try:
            return int(text) if field.type == "integer" else float(text)
        except ValueError:
            raise wrong from None
    if field.type == "integers":
        try:
            return tuple(int(part) for part in parts)
        except ValueError:
            raise wrong from None
    return parts if field.type == "texts" else text


_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

_EXPECTED: dict[FieldType, str] = {
    "choice": "one of {choices}",
    "choices": "one or several of {choices}, separated by commas",
    "integer": "a whole number",
    "number": "a number",
    "text": "text",
    "texts": "one or several, separated by commas",
    "integers": "whole numbers, separated by commas",
    "switch": "true or false",
}


@cache
def methods_of(package: str, base: str = "Locator") -> Mapping[str, str]:
    """The methods of a folder, as `registry.discover` finds them: class name, and the module where it is written.

    Args:
        package: e.g. `workbench.locators`.
        base: the class in its module `base` that they all descend from.
    """
    root = _path(package)
    assert root is not None, package
    found: dict[str, str] = {}
    for path in root.parent.glob("*.py"):
        module = f"{package}.{path.stem}"
        if path.stem.startswith("_") or path.stem == "base":
            continue
        own = (node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
        found |= {name: module for name in own if _unfinished(module, name, (f"{package}.base", base)) == set()}
    return dict(sorted(found.items()))


def _unfinished(module: str, name: str, base: tuple[str, str]) -> set[str] | None:
    """The abstract methods that a class leaves to others; None where it does not descend from `base`."""
    node = _class(module, name)
    homes = [_home(module, ast.unparse(parent)) for parent in node.bases]
    inherited = [found for home in homes if home is not None and (found := _unfinished(*home, base)) is not None]
    if not inherited and (module, name) != base:
        return None
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    abstract = {one.name for one in methods if any("abstract" in ast.unparse(mark) for mark in one.decorator_list)}
    return (set().union(*inherited) - {one.name for one in methods}) | abstract


def _field(module: str, statement: ast.AnnAssign, explained: str) -> FormField:
    assert isinstance(statement.target, ast.Name)
    name, annotation = statement.target.id, ast.unparse(statement.annotation)
    try:
        default = ast.literal_eval(statement.value or ast.Constant(None))
    except ValueError as error:
        raise ValueError(f"The default of {name!r} in {module} is no constant: {ast.unparse(statement)}.") from error
    members = [_resolve(module, part) for part in _union(statement.annotation)]
    optional = any(isinstance(part, ast.Constant) and part.value is None for _, part in members)
    kept = [(home, part) for home, part in members if not (isinstance(part, ast.Constant) and part.value is None)]
    choices: tuple[Any, ...] = ()
    names = {ast.unparse(part) for _, part in kept}
    several = [part for _, part in kept if isinstance(part, ast.Subscript) and ast.unparse(part.value) == "tuple"]
    literals = [choice for home, part in kept for choice in _literal(home, part)]
    kind: FieldType
    if several and len(kept) == 1:
        inner = several[0].slice.elts[0] if isinstance(several[0].slice, ast.Tuple) else several[0].slice
        home, part = _resolve(module, inner)
        choices = tuple(_literal(home, part))
        kind = "choices" if choices else "integers" if ast.unparse(part) == "int" else "texts"
    elif literals:
        kind, choices = "choice", tuple(literals)
    elif names == {"bool"}:
        kind = "switch"
    elif names == {"int"}:
        kind = "integer"
    elif names <= {"int", "float"} and names:
        kind = "number"
    elif names <= {"str", "int", "float"} and "str" in names:
        kind = "text"
    else:
        raise ValueError(
            f"The type {annotation!r} of {name!r} in {module} has no form. Use Literal, int, float, str, bool, tuple."
        )
    return FormField(name=name, type=kind, default=default, help=explained, choices=choices, optional=optional)


def _docstring(node: ast.stmt | None) -> str:
    """The string that a statement consists of, on one line; empty for any other statement."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return re.sub(r"\s*\n\s*", " ", node.value.value.strip())
    return ""


def _union(node: ast.expr) -> Iterator[ast.expr]:
    """The members of `a | b | c`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _union(node.left)
        yield from _union(node.right)
    else:
        yield node


def _literal(module: str, node: ast.expr) -> list[Any]:
    """The values of `Literal[...]`; nothing for another type."""
    if not (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"):
        return []
    values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return [ast.literal_eval(value) for value in values]


def _resolve(module: str, node: ast.expr) -> tuple[str, ast.expr]:
    """A type with the name it goes by replaced by what the name stands for, and the module where that is written."""
    while isinstance(node, ast.Name):
        home = _home(module, node.id)
        if home is None:
            return module, node
        module, name = home
        value = _names(module).get(name)
        if not isinstance(value, ast.expr):
            return module, node
        node = value
    return module, node


def _home(module: str, name: str) -> tuple[str, str] | None:
    """Module and name where a name of `module` is defined; None for what is not of this project."""
    found = _names(module).get(name)
    if isinstance(found, tuple):
        return _home(*found) if _path(found[0]) is not None else None
    return None if found is None else (module, name)


def _class(module: str, name: str) -> ast.ClassDef:
    found = _names(module).get(name) if _path(module) else None
    if not isinstance(found, ast.ClassDef):
        raise ValueError(f"{module!r} has no class {name!r}.")
    return found


@cache
def _names(module: str) -> dict[str, ast.expr | ast.ClassDef | tuple[str, str]]:
    """What the names of a module's top level stand for: a value, a class, or a name of another module."""
    path = _path(module)
    assert path is not None
    names: dict[str, ast.expr | ast.ClassDef | tuple[str, str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.col_offset == 0:
            names[node.targets[0].id] = node.value
    return names


def _path(module: str) -> Path | None:
    """The file of a module of this project, or None."""
    place = _ROOT.joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
