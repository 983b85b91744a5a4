"""The analyses that run from the command line and from a page by their name.

Such an analysis is a module with a function of the module's own name, `(lm, facts, *, options, store) -> Result`, and the functions
`chart(result) -> Chart` and `summary(result) -> str`. A new file is in the catalogue without an entry anywhere.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.charts import Chart
from workbench.facts import Fact, FactError
from workbench.forms import FormField, form_of_function
from workbench.results import Result, manifest
from workbench.store import Store

if TYPE_CHECKING:  # the pages import this module, and torch is a matter of their workers
    from workbench.models import LM


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """One analysis of the catalogue."""

    name: str
    """Name of its module and function."""

    explained: str
    """The module's docstring."""

    @property
    def title(self) -> str:
        """What it asks, the first sentence of the docstring."""
        return re.split(r"(?<=[.?!])\s", " ".join(self.explained.split("\n\n")[0].split()))[0]

    @property
    def form(self) -> tuple[FormField, ...]:
        """Its options."""
        return form_of_function(f"analyses.{self.name}", self.name)

    def __call__(self, lm: LM, facts: Sequence[Fact], *, store: Store | None = None, **options: Any) -> Result:
        """Runs it, or gives what the store has; `cost` in the manifest has seconds and the peak of memory.

        Raises:
            FactError: there is no such option, it cannot have this value, or the analysis cannot use these facts.
            InputError: whatever else the analysis cannot use.
        """
        from workbench.locators.base import peak_memory

        options = self.checked(options)
        asked = self.question(lm.protocol, facts, options)
        if store is not None and (found := store.find(asked, Result)) is not None:
            return found
        began = time.perf_counter()
        result: Result = getattr(self._module, self.name)(lm, facts, store=store, **options)
        cost = {"seconds": round(time.perf_counter() - began, 2), "peak_mb": peak_memory(lm)}
        own = {name: asked[name] for name in ("what", "parameters", "facts")}
        found = replace(result, run={**result.run, **own, "cost": cost})
        if store is not None:
            store.save(found)
        return found

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options as the analysis takes them: of what is named twice in a list, the first; told without a model.

        Raises:
            FactError: there is no such option, a number is below the least that makes sense or not finite, or a list is empty.
        """
        known = {field.name: field for field in self.form}
        if unknown := sorted(set(options) - set(known)):
            raise FactError(f"{self.name} has no option {unknown[0]!r}. It has {', '.join(known) or 'none'}.")
        for name, value in options.items():
            _check(known[name], value)
        return _without_doubles(options)

    def question(self, model: Mapping[str, Any], facts: Sequence[Fact], options: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked, as the store knows it: of this model and these facts, by the code as it is now."""
        known = {field.name: field.default for field in self.form}
        parameters = json.loads(json.dumps({**known, **_without_doubles(options)}))  # as they are read back
        return manifest(self.name, model=model, parameters={**parameters, "revision": _revision()}, facts=facts)

    def chart(self, result: Result) -> Chart:
        """Its figure."""
        chart: Chart = self._module.chart(result)
        return chart

    def summary(self, result: Result) -> str:
        """What it found, in lines of text."""
        text: str = self._module.summary(result)
        return text

    def write(self, result: Result, folder: Path) -> list[Path]:
        """Writes what other programs can read of it, and returns the files; none where the analysis or this result has nothing."""
        from workbench.edits import EditError

        write = getattr(self._module, "write_recommended", None)
        try:
            return [] if write is None else list(write(result, folder))
        except EditError:
            return []

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"analyses.{self.name}")


LEAST: Mapping[str, int] = {
    "checkpoints": 1, "columns": 1, "contexts": 0, "dropped": 1, "edits": 0, "essence": 0, "folds": 2, "held_out": 1, "hits": 1,
    "inserted": 0, "layers": 0, "moment_tokens": 1, "others": 0, "permutations": 1, "probes": 1, "resamples": 1, "samples": 1,
    "seed": 0, "sentences": 1, "steps": 1, "stumps": 1, "sweep_facts": 1, "tokens": 1, "traced": 0, "width": 1,
}  # fmt: skip
"""The least value of a whole number, or of each of several, by the option's name, which means the same in every analysis."""

MOST: Mapping[str, int] = {"seed": 2**32 - 1}
"""The largest value, likewise."""


def _check(field: FormField, value: Any) -> None:
    """Raises FactError where an option cannot have this value."""
    several = field.type in ("integers", "texts", "choices")
    if value is None and field.optional:
        return
    if several and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise FactError(f"{field.name} is {value!r}, expected several of a kind. Give a list.")
    if several and not value and field.default != ():
        raise FactError(f"{field.name} is empty, expected one or more. Name some, e.g. {_spelled(field)}.")
    if field.type in ("integer", "integers"):
        least, most = LEAST.get(field.name), MOST.get(field.name)
        asked = f"{'whole numbers' if several else 'a whole number'}" + (f" from {least}" if least is not None else "")
        asked += f" to {most}" if most is not None else " on" if least is not None else ""
        for one in value if several else [value]:
            if not isinstance(one, int) or (least is not None and one < least) or (most is not None and one > most):
                raise FactError(f"{field.name} is {one!r}, expected {asked}. Give e.g. {_spelled(field)}.")
    if field.type == "number" and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        none = ", or none" if field.optional else ""
        raise FactError(f"{field.name} is {value!r}, expected a number above 0{none}. Give e.g. {_spelled(field)}.")


def _spelled(field: FormField) -> str:
    """A value that the option can have, as it is typed: its default, or its least value where that is none."""
    if isinstance(field.default, Sequence) and not isinstance(field.default, str):
        return ",".join(map(str, field.default)) or str(LEAST.get(field.name, 0))
    return str(LEAST.get(field.name, 0.01) if field.default is None else field.default)


def _without_doubles(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the first of what a list has twice."""
    return {name: tuple(dict.fromkeys(one)) if isinstance(one, list | tuple) else one for name, one in options.items()}


@cache
def _revision() -> str:
    """Changes with the code of the analyses, so that no table outlives it; edits, traces and other pieces of one are kept."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=4).hexdigest()


@cache
def all_analyses() -> Mapping[str, Analysis]:
    """Every analysis by name; read from the source, so that nothing is imported before it is needed."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if {path.stem, "chart", "summary"} <= functions:
            found[path.stem] = Analysis(name=path.stem, explained=ast.get_docstring(tree) or "")
    return found


def analysis_named(name: str) -> Analysis:
    """The analysis of a name.

    Raises:
        FactError: there is none.
    """
    known = all_analyses()
    if name not in known:
        raise FactError(f"No analysis is called {name!r}. Use one of {', '.join(known)}.")
    return known[name]
