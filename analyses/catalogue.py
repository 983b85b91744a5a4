"""The analyses that run from the command line and from a page by their name.

Such an analysis is a module with a function of the module's own name, `(lm, facts, *, options, store) -> Result`, and the functions
`chart(result) -> Chart` and `summary(result) -> str`. A new file is in the catalogue without an entry anywhere.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from workbench.charts import Chart
from workbench.facts import Fact, FactError
from workbench.forms import FormField, form_of_function
from workbench.models import LM
from workbench.results import Result, manifest
from workbench.store import Store


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
            FactError: there is no such option, or the analysis cannot use these facts.
            InputError: whatever else the analysis cannot use.
        """
        from workbench.locators.base import peak_memory

        known = [field.name for field in self.form]
        if unknown := sorted(set(options) - set(known)):
            raise FactError(f"{self.name} has no option {unknown[0]!r}. It has {', '.join(known) or 'none'}.")
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

    def question(self, model: Mapping[str, Any], facts: Sequence[Fact], options: Mapping[str, Any]) -> dict[str, Any]:
        """What is asked, as the store knows it: of this model and these facts, by the code as it is now."""
        known = {field.name: field.default for field in self.form}
        parameters = json.loads(json.dumps({**known, **options}))  # as they are read back
        return manifest(self.name, model=model, parameters={**parameters, "revision": _revision()}, facts=facts)

    def chart(self, result: Result) -> Chart:
        """Its figure."""
        chart: Chart = self._module.chart(result)
        return chart

    def summary(self, result: Result) -> str:
        """What it found, in lines of text."""
        text: str = self._module.summary(result)
        return text

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"analyses.{self.name}")


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
