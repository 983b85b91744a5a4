"""What the commands of `workbench.cli` share: facts and options from text, files, progress, errors in one sentence."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from workbench import zoo
from workbench.errors import InputError
from workbench.facts import Fact, FactError
from workbench.layouts import ModelError

if TYPE_CHECKING:
    from workbench.editors import Editor
    from workbench.forms import FormField
    from workbench.locators import Locator
    from workbench.models import LM
    from workbench.results import Footprint, Result


def bundled_facts(model: str) -> list[Fact]:
    if model not in zoo.NAMES:
        raise FactError(
            f"{model} comes without facts. Give a file with --facts, or a bundled model ({', '.join(zoo.NAMES)})."
        )
    return zoo.load_facts(model)


def choose_facts(
    model: str,
    prompt: str,
    subject: str,
    answer: str,
    ids: Sequence[str] | None,
    file: Path | None,
    *,
    every: int = 1,
    limit: int | None = None,
) -> Sequence[Fact]:
    """The facts the options name; some of the bundled ones where only `every` or `limit` is given.

    Raises:
        FactError: several sources, an unknown id, or none at all.
    """
    given = [name for name, value in (("--facts", file), ("--fact", ids), ("--prompt", prompt or subject)) if value]
    if len(given) > 1:
        raise FactError(f"Both {given[0]} and {given[1]} were given. Give one of them.")
    if file:
        from workbench.data import read_facts

        facts = read_facts(file)
    elif ids:
        known = {fact.id: fact for fact in bundled_facts(model)}
        unknown = [name for name in ids if name not in known]
        if unknown:
            raise FactError(f"{model} has no fact {unknown[0]!r}. `workbench facts --model {model}` lists them.")
        facts = [known[name] for name in ids]
    elif not given and (every > 1 or limit is not None):
        facts = bundled_facts(model)
    else:
        facts = [Fact.typed(text=prompt, subject=subject, target_true=answer)]
    return facts[::every][:limit]


def read_settings(cls: type, settings: Sequence[str] | None) -> dict[str, Any]:
    """The values of `--set name=value` for a method's dataclass.

    Raises:
        InputError: a setting that is no such pair, that the method does not have, or with a value it cannot have.
    """
    from workbench.forms import form_of

    return read_form(cls.__name__, form_of(cls.__module__, cls.__name__), settings)


def read_form(what: str, form: Sequence[FormField], settings: Sequence[str] | None) -> dict[str, Any]:
    """The values of `--set name=value` for a form.

    Raises:
        InputError: a setting that is no such pair, that the form does not have, or with a value it cannot have.
    """
    from workbench.forms import read_option

    known, values = {field.name: field for field in form}, {}
    for setting in settings or ():
        name, equals, text = setting.partition("=")
        if not equals:
            raise FactError(f"{setting!r} sets nothing. Write --set name=value.")
        if name not in known:
            raise FactError(f"{what} has no option {name}. It has {', '.join(known)}.")
        values[name] = read_option(known[name], text)
    return values


def check_model_name(name: str) -> None:
    """Raises ModelError where no folder and no model could have this name."""
    try:
        Path(name).exists()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name[:40]!r}... of {len(name)} characters cannot be a model's name. "
            f"Use a bundled one ({', '.join(zoo.NAMES)}), a folder or a hub name."
        ) from error


def prepare(
    model: str, chosen: Sequence[Fact], device: str, dtype: str, methods: Mapping[str, Mapping[str, Any]]
) -> tuple[LM, dict[str, Locator | InputError]]:
    """The loaded model, and each method with its options; or why it cannot be used on this model or these facts.

    A noise's scale and substitutes come from the bundled facts where the model is a bundled one.

    Raises:
        InputError: an unknown method or option, told before the model is loaded; a prompt that this model cannot read.
    """
    from workbench.loading import load
    from workbench.locators import locator_named

    for name, options in methods.items():
        locator_named(name).fitted(None, **options)
    check_model_name(model)
    lm = load(model, device=device, dtype=dtype)
    for fact in chosen:
        lm.encode([fact])
        if fact.target_true:
            lm.target_ids(fact.text, fact.target_true)
    known = zoo.load_facts(model) if model in zoo.NAMES else chosen
    ready: dict[str, Locator | InputError] = {}
    for name, options in methods.items():
        try:
            ready[name] = locator_named(name).fitted(lm, **options).resolved(lm, known)
        except InputError as error:
            ready[name] = error
    return lm, ready


def prepare_one(
    model: str, chosen: Sequence[Fact], device: str, dtype: str, method: str, options: Mapping[str, Any]
) -> tuple[LM, Locator]:
    """`prepare` of one method; raises where it cannot be used."""
    lm, ready = prepare(model, chosen, device, dtype, {method: options})
    found = ready[method]
    if isinstance(found, InputError):
        raise found
    return lm, found


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def locate_and_write(
    lm: LM,
    locator: Locator,
    chosen: Sequence[Fact],
    out: Path,
    model: str,
    formats: Sequence[str],
    memory: int | None,
) -> None:
    """Runs a method over facts, says where each fact's peaks are, and writes figures and tables."""
    from workbench import export
    from workbench.locators import locate
    from workbench.store import Store

    with progress_bar(len(chosen)):
        found = locate(locator, lm, chosen, store=Store(folder=out), memory=memory, skip=len(chosen) > 1)
    facts = found.extras["facts"].set_index("fact")
    for name in found.facts:
        row = facts.loc[name]
        said = "" if row["correct"] else f" (the model says {row['said']!r})"
        typer.echo(f"{name}: {row['prompt']} -> {row['answer']}{said}")
        scores = [f"{end} {row[end]:.3g}" for end in ("clean", "corrupted") if end in row]
        typer.echo(f"  {', '.join(scores)}")
        for kind in found.kinds:
            peak = found.peak(kind=kind, fact=name)
            at = f"({peak['text']!r}, {peak['token']})" if peak["text"] else ""
            typer.echo(f"  {kind:10} peak {peak['value']:+.3g} at {peak['site']} {at}".rstrip())
        for form in formats:
            figure = _figure(found, name, planted_band(model))
            write_file(out / f"{file_name(name)}.{form}", export.figure_bytes(figure, form))
    typer.echo(
        f"\nThe model knows {int(facts['correct'].sum())} of {counted(len(found.facts), 'fact')}{say_left_out(found)}."
    )
    for name, table in found.extras.items():
        if name != "samples":  # every noise sample of every cell; in the stored result
            table.to_csv(out / f"{name}.csv", index=False)
    typer.echo(f"\n{export.protocol_text(found)}\n{export.throughput_text(found)}\nWritten to {out}")


def edit_and_write(
    cls: type[Editor], options: Mapping[str, Any], facts: Sequence[Fact], out: Path, *,
    model: str, device: str, dtype: str, one_by_one: bool, merge: Path | None,
) -> None:  # fmt: skip
    """Edits, says what the model says before and after, and writes the edit (and, with `merge`, the edited model)."""
    from workbench.editors import LowRank, edit_stream
    from workbench.loading import load

    check_model_name(model)
    lm = load(model, device=device, dtype=dtype)
    editor = cls.fitted(lm, **options)
    before = _says(lm, facts)
    with progress_bar(1):
        edit = [*edit_stream(editor, lm, facts)][-1] if one_by_one else editor(lm, facts)
    edit.save(out)
    with edit.on(lm):
        after = _says(lm, facts)
    for fact, old, new in zip(facts, before, after, strict=True):
        typer.echo(f"{fact.text} -> {old.strip()!r}, now {new.strip()!r} (asked for {fact.target_new!r})")
    ranks = {
        name: f" (rank {change.rank})" if isinstance(change, LowRank) else "" for name, change in edit.changes.items()
    }
    shapes = ", ".join(name + rank for name, rank in ranks.items())
    sides = ", ".join(type(side).__name__ for side in edit.sides)
    typer.echo(f"\n{edit.label}\nChanged: {shapes or 'no weight'}{f'; beside the weights: {sides}' if sides else ''}")
    typer.echo(f"{edit.run['seconds']} s. Layers count from 0. Written to {out}")
    if merge is not None:
        typer.echo(f"The edited model is in {edit.merge(lm, merge)}")


def _says(lm: LM, facts: Sequence[Fact]) -> list[str]:
    """What the model says after each prompt: as many tokens as the new answer has."""
    from workbench.generation import continue_prompts

    n = max(len(lm.target_ids(fact.text, fact.target_new or "?")) for fact in facts)
    return continue_prompts(lm, facts, n=n)


def say_left_out(found: Footprint) -> str:
    """How many facts a method could not take, and why the first of them; empty where it took all."""
    left_out = found.run.get("left_out", {})
    return f"; {len(left_out)} left out, e.g. {next(iter(left_out.items()))}" if left_out else ""


def _figure(found: Footprint, fact: str, planted: range | None) -> Any:
    """The maps of a fact; where the method has none, its profile by layer."""
    from workbench import paper
    from workbench.drawing import mapped_kinds

    if mapped_kinds(found):
        return paper.heatmap(found, fact=fact, planted=planted)
    rows = found.of(fact=fact)
    return paper.compare([dataclasses.replace(found, table=rows)], planted=planted)


def counted(n: int, noun: str) -> str:
    """A number with its noun, e.g. `1 fact` or `2 facts`."""
    return f"{n} {noun}{'s' * (n != 1)}"


def list_methods(classes: Mapping[str, type]) -> None:
    """Says the name and the first sentence of every method."""
    for name, cls in classes.items():
        typer.echo(f"{name:24} {first_sentence(cls)}")


def list_options(cls: type) -> None:
    """Says what a method is and what can be set."""
    from workbench.forms import form_of

    typer.echo(first_sentence(cls))
    list_form(form_of(cls.__module__, cls.__name__))


def list_form(form: Sequence[FormField]) -> None:
    """Says what can be set."""
    for field in form:
        among = f", one of {', '.join(map(str, field.choices))}" if field.choices else ""
        typer.echo(f"\n--set {field.name}=...  (default {field.default!r}{among})\n    {field.help}")


def first_sentence(cls: type) -> str:
    return (cls.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip()


def planted_band(model: str) -> range | None:
    band = zoo.organism(model).get("band") if model in zoo.NAMES else None
    return range(*band) if band else None


def read_formats(text: str) -> tuple[str, ...]:
    formats = tuple(form.strip() for form in text.split(",") if form.strip())
    unknown = set(formats) - {"pdf", "svg", "png"}
    if unknown:
        raise FactError(f"Unknown figure format {', '.join(sorted(unknown))}. Use pdf, svg or png, comma-separated.")
    return formats


def read_size(text: str) -> int | None:
    """A number of bytes, spelled with or without a unit; None for an empty text."""
    if not text.strip():
        return None
    match = re.fullmatch(r"(\d+\.?\d*)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None or float(match[1]) == 0:
        raise InputError(f"{text!r} is no size of memory. Write e.g. 500MB or 2GB.")
    base = 1024 if match[3] else 1000
    if len(match[1]) > 30:
        raise InputError("That is more memory than there is. Write e.g. 500MB or 2GB.")
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def file_name(fact_id: str) -> str:
    """An id as a file's name; with a digest where characters had to go, so that two ids never share a file."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", fact_id)[:80]
    return name if name.lower() == fact_id else f"{name}-{hashlib.blake2b(fact_id.encode(), digest_size=3).hexdigest()}"


def check_writable(folder: Path) -> None:
    """Makes the folder; raises InputError where nothing can be written into it, before any work."""
    try:
        _check_no_file(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{str(folder)[:200]!r} cannot be written into: {error.strerror}. Name another folder."
        ) from error


def _check_no_file(folder: Path) -> None:
    """Raises InputError where the folder, or one that it would lie in, is a file."""
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        raise InputError(f"{str(there)!r} is a file. Name another folder.")


def check_new_folders(folders: Sequence[Path]) -> None:
    """Raises InputError where these cannot all be made, each new or empty, before any work."""
    for i, folder in enumerate(folders):
        try:
            _check_no_file(folder)
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"{str(folder)!r} is there already and not empty. Name a new folder.")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-"):
                pass
        except OSError as error:
            raise InputError(f"{str(folder)[:200]!r} cannot be made: {error.strerror}. Name another folder.") from error
        for other in folders[:i]:
            if folder.resolve() in (other.resolve(), *other.resolve().parents):
                raise InputError(
                    f"{str(other)!r} and {str(folder)!r} would be written into each other. Name two folders."
                )


def run_and_write(
    name: str, options: Mapping[str, Any], facts: Sequence[Fact], out: Path, *,
    model: str, device: str, dtype: str, formats: Sequence[str],
) -> None:  # fmt: skip
    """Runs an analysis of the catalogue, says what it found, and writes table, manifest and figures."""
    from analyses.catalogue import analysis_named
    from workbench import charts_paper, export
    from workbench.loading import load
    from workbench.results import Result
    from workbench.store import Store

    analysis = analysis_named(name)
    options = analysis.checked(options)
    check_model_name(model)
    lm = load(model, device=device, dtype=dtype)
    store = Store(folder=out / "store")
    was_there = store.find(analysis.question(lm.protocol, facts, options), Result) is not None
    with progress_bar(1):
        result = analysis(lm, facts, store=store, **options)
    result.save(out / name)
    write_file(out / f"{name}.csv", export.csv_bytes(result))
    chart = analysis.chart(result)
    figures = {name: chart}
    if len(chart.plots) > 1:
        figures |= {
            f"{name}-{i + 1}": dataclasses.replace(chart.alone(i), title=chart.title, caption=chart.caption)
            for i in range(len(chart.plots))
        }
    for stem, figure in figures.items():
        for form in formats:
            write_file(out / f"{stem}.{form}", export.figure_bytes(charts_paper.draw(figure, run=result.run), form))
    typer.echo(analysis.summary(result))
    for what, why in result.run.get("left_out", {}).items():
        typer.echo(f"left out: {what}: {why}", err=True)
    cost = result.run["cost"]
    took = f"{cost['seconds']} s, peak {cost['peak_mb']:.0f} MB"
    how = f"from the store; it took {took} when it was made" if was_there else f"in {took}"
    typer.echo(f"\n{counted(len(facts), 'fact')} {how}. Layers count from 0.")
    if files := analysis.write(result, out / "easyedit"):
        typer.echo(f"For EasyEdit: {', '.join(file.name for file in files)} in {out / 'easyedit'}")
    typer.echo(f"Written to {out}")


def checkpoint_of(name: str) -> Path:
    """The folder of a checkpoint's files."""
    from workbench.loading import checkpoint_folder

    check_model_name(name)
    return checkpoint_folder(name)


def write_diff(found: Result, out: Path, formats: Sequence[str]) -> None:
    """Writes what differs between two checkpoints: table, manifest and figure."""
    from workbench import charts_paper, export
    from workbench.checkpoint_diff import chart

    found.save(out / "diff")
    found.table.to_csv(out / "diff.csv", index=False)
    for form in formats:
        write_file(out / f"diff.{form}", export.figure_bytes(charts_paper.draw(chart(found), run=found.run), form))


def write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@contextmanager
def progress_bar(total: int) -> Iterator[None]:
    """A bar over facts, or over cells where there is one fact."""
    from tqdm import tqdm

    from workbench.progress import reporting

    with tqdm(total=None, leave=False, delay=0.3) as bar:

        def listen(what: str, done: int, of: int) -> None:
            if total == 1 or what == "facts":
                if done == 0:
                    bar.reset(total=of)
                bar.total, bar.n = of, done
                bar.set_description(what, refresh=False)
                bar.refresh()

        with reporting(listen):
            yield


@contextmanager
def one_sentence() -> Iterator[None]:
    """Says what is wrong with the input in one sentence, without a traceback, and exits with 2."""
    try:
        yield
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"A file cannot be written or read: {error}. What was finished is kept; give the same command again.")
    except KeyboardInterrupt:
        _fail("Stopped. Give the same command again to go on.", code=130)


def _fail(sentence: str, *, code: int = 2) -> NoReturn:
    typer.echo(sentence, err=True)
    raise typer.Exit(code)
