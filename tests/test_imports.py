"""The order of the code, read from its syntax trees: who may import whom, and who alone may touch what.

Imports point to the same or to a lower level and run in no circle. A new locator, editor, analysis, page or reader
of data needs nothing here; any other new module gets its level in `LEVELS`.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LEVELS: dict[int, tuple[str, ...]] = {
    0: (
        "workbench.errors",
        "workbench.facts",
        "workbench.forms",
        "workbench.guard",
        "workbench.options",
        "workbench.products",
        "workbench.progress",
        "workbench.registry",
        "workbench.sites",
        "workbench.subjects",
    ),
    1: (
        "workbench.data",
        "workbench.layouts",
        "workbench.loading",
        "workbench.models",
        "workbench.results",
        "workbench.zoo",
        "workbench.zoo.corpus",  # and what makes its documents
        "workbench.zoo.organisms",
        "workbench.zoo.tokenization",
        "workbench.zoo.truth",
        "workbench.zoo.world",
    ),
    2: (
        "workbench.above",
        "workbench.charts",
        "workbench.charts_paper",
        "workbench.charts_screen",
        "workbench.checkpoint_diff",
        "workbench.directions",
        "workbench.drawing",
        "workbench.export",
        "workbench.figures_circuit",
        "workbench.figures_edits",
        "workbench.figures_neurons",
        "workbench.generation",
        "workbench.gradients",
        "workbench.hooks",
        "workbench.jobs",
        "workbench.metrics",
        "workbench.paper",
        "workbench.plots",
        "workbench.profiles",
        "workbench.restoring",
        "workbench.shortcuts",
        "workbench.sweep",
    ),
    3: (
        "workbench.checks",
        "workbench.edits",
        "workbench.moments",
        "workbench.noise",
        "workbench.store",
        "workbench.vocabulary",
    ),
    4: (
        "workbench",  # only the names it offers
        "workbench.asked",
        "workbench.easyedit",
        "workbench.edit_footprints",
        "workbench.editors",
        "workbench.lens_bridge",
        "workbench.locators",
        "workbench.path_patching",
        "workbench.remote",
        "workbench.zoo.*",  # the scripts that train and verify the bundled models
    ),
    5: ("analyses", "workbench.cli_parts"),
    6: ("pages", "streamlit_app", "workbench.__main__", "workbench.cli"),
}
"""A name stands for a module, or for a package with everything inside; `name.*` for everything inside alone.

Where several names fit, the longest one counts. `workbench` itself stands for its `__init__` only, so that each new
module has to be placed.
"""

PACKAGES = ("workbench", "analyses", "pages")
HOOK_FILE = "workbench.hooks"
HOOK_NAME = re.compile(r"register_(module_)?(forward|full_backward|backward)(_pre)?_hook")
TOP = max(LEVELS)


@dataclass(frozen=True, kw_only=True)
class Module:
    """One file of the project."""

    name: str
    """Dotted name; the `__init__` of a package has the package's."""

    tree: ast.Module
    """Its syntax tree."""

    is_package: bool = False
    """Whether the file is an `__init__`."""


# -- what the trees say ------------------------------------------------------------------------------------------------


@cache
def read_project() -> Mapping[str, Module]:
    """All modules of the project by name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    app = ROOT / "streamlit_app.py"
    modules = (read_module(path) for path in [*paths, *([app] if app.exists() else [])])
    return {module.name: module for module in modules}


def read_module(path: Path) -> Module:
    """Parse one file of the project."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if is_package else parts)
    return Module(name=name, tree=ast.parse(path.read_text(encoding="utf-8"), str(path)), is_package=is_package)


def level_of(name: str) -> int | None:
    """The level of a module, or None where `LEVELS` has no place for it."""
    found = [(len(entry), level) for level, entries in LEVELS.items() for entry in entries if _covers(entry, name)]
    return max(found)[1] if found else None


def _covers(entry: str, name: str) -> bool:
    if entry.endswith(".*"):
        return name.startswith(entry[:-1])
    return name == entry or (entry != "workbench" and name.startswith(entry + "."))


def imports_of(module: Module, names: Mapping[str, Module]) -> Iterator[str]:
    """The project's modules that one module imports, anywhere in it.

    `from package import name` means package.name where that is a file or a folder, and package otherwise.
    """
    places = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 2)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base_of(node, module)
            inner = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if name in places else base for name in inner]
        else:
            continue
        yield from (target for target in targets if target.partition(".")[0] in {*PACKAGES, "streamlit_app"})


def _base_of(node: ast.ImportFrom, module: Module) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    here = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*here, node.module] if node.module else here)


def upward_imports(names: Mapping[str, Module]) -> list[str]:
    """One sentence for each import that points to a higher level."""
    wrong = []
    for name, module in names.items():
        for target in imports_of(module, names):
            low, high = level_of(name), level_of(target)
            if low is not None and high is not None and high > low:
                wrong.append(f"{name} (level {low}) imports {target} (level {high})")
    return wrong


def find_cycle(names: Mapping[str, Module]) -> list[str]:
    """The modules of one circle of imports, its first one again at the end; empty if there is none."""
    graph = {
        name: sorted({target for target in imports_of(module, names) if target in names})
        for name, module in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in graph[name]:
            if circle := visit(target, [*trail, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in graph if (circle := visit(name, []))), [])


def hook_names(module: Module) -> set[str]:
    """The names of torch's hook registration that one module spells out, as an attribute, a name or a string."""
    words = {
        word
        for node in ast.walk(module.tree)
        for word in (getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "value", None))
        if isinstance(word, str)
    }
    return {word for word in words if HOOK_NAME.fullmatch(word)}


def print_lines(module: Module) -> list[int]:
    """The lines on which one module calls print()."""
    calls = (node for node in ast.walk(module.tree) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def imports_torch(module: Module) -> bool:
    """Whether one module imports torch or a part of it."""
    names: list[str] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return any(name.partition(".")[0] == "torch" for name in names)


# -- the project -------------------------------------------------------------------------------------------------------


def test_every_module_has_a_level() -> None:
    missing = [name for name in read_project() if level_of(name) is None]
    assert not missing, (
        f"{', '.join(missing)} has no level. Write its name into LEVELS in tests/test_imports.py, "
        "at the highest level among the modules that it imports, or above."
    )


def test_imports_point_down() -> None:
    wrong = upward_imports(read_project())
    assert not wrong, "Move what is needed to a lower level, or pass it in:\n" + "\n".join(wrong)


def test_imports_run_in_no_circle() -> None:
    circle = find_cycle(read_project())
    assert not circle, "Imports run in a circle; move what both need into a third module: " + " -> ".join(circle)


def test_one_file_registers_hooks() -> None:
    others = {
        name: found for name, module in read_project().items() if name != HOOK_FILE and (found := hook_names(module))
    }
    assert not others, f"Only {HOOK_FILE} registers hooks: read and write sites with its run() instead in {others}"


def test_nothing_below_the_top_prints() -> None:
    prints = {
        name: lines
        for name, module in read_project().items()
        if (level_of(name) or 0) < TOP and (lines := print_lines(module))
    }
    assert not prints, f"Below pages and command line use logging, or return the text: print() at {prints}"


def test_pages_know_no_torch() -> None:
    pages = {
        name: module for name, module in read_project().items() if name.partition(".")[0] in {"pages", "streamlit_app"}
    }
    wrong = [name for name, module in pages.items() if imports_torch(module)]
    assert not wrong, (
        f"A page picks inputs and calls an analysis; move what needs torch into workbench or analyses: {wrong}"
    )


def test_notebooks_define_nothing() -> None:
    """A notebook calls the package; a function that it needs belongs there."""
    wrong = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(line for line in cell["source"] if not line.lstrip().startswith(("%", "!")))
            if cell["cell_type"] == "code" and any(
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                for node in ast.walk(ast.parse(source))
            ):
                wrong.append(path.name)
    assert not wrong, f"Move the functions of {sorted(set(wrong))} into workbench or analyses"


# -- the checks themselves find what they are for ----------------------------------------------------------------------


def project_of(**sources: str) -> dict[str, Module]:
    """A project made of sources; a double underscore in a name stands for the dot."""
    names = {name.replace("__", "."): source for name, source in sources.items()}
    return {name: Module(name=name, tree=ast.parse(source)) for name, source in names.items()}


def test_an_upward_import_is_found_even_inside_a_function() -> None:
    names = project_of(
        workbench__facts="def f():\n    from workbench import hooks",
        workbench__hooks="from workbench.facts import Fact",
    )
    assert upward_imports(names) == ["workbench.facts (level 0) imports workbench.hooks (level 2)"]


def test_a_circle_is_found() -> None:
    names = project_of(
        workbench__hooks="from workbench.sweep import a",
        workbench__sweep="import workbench.metrics",
        workbench__metrics="from . import hooks",
    )
    circle = find_cycle(names)
    assert circle == ["workbench.hooks", "workbench.sweep", "workbench.metrics", "workbench.hooks"]
    names["workbench.metrics"] = project_of(workbench__metrics="")["workbench.metrics"]
    assert find_cycle(names) == []


def test_hooks_prints_and_torch_are_found() -> None:
    module = project_of(
        m="import torch.nn\nprint(1)\nx.register_forward_hook(f)\ngetattr(x, 'register_forward_pre_hook')(f)"
    )["m"]
    assert hook_names(module) == {"register_forward_hook", "register_forward_pre_hook"}
    assert print_lines(module) == [2]
    assert imports_torch(module)


def test_levels_of_new_files() -> None:
    assert level_of("workbench.editors.rome") == 4
    assert level_of("workbench.zoo") == 1
    assert level_of("workbench.zoo.train") == 4
    assert level_of("pages.1_trace") == TOP
    assert level_of("workbench.new") is None
