"""Where does a language model keep a fact? List models and facts, trace one fact or a file of them, average over facts."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from workbench import zoo
from workbench.errors import InputError
from workbench.facts import Fact, FactError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)

Model = Annotated[str, typer.Option(help="A bundled model, a folder, or a hub name.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, float64, auto.")]
Window = Annotated[
    int | None,
    typer.Option(min=1, help="Layers of MLP or attention restored together. Default: 10, and 3 below 24 layers."),
]
Noise = Annotated[str, typer.Option(help="s3, 0.1, u0.1, us3, m, t5; see workbench/noise.py.")]
Samples = Annotated[int, typer.Option(min=1, help="Noise samples of every cell.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Score = Annotated[
    Literal["p", "p_target", "logp", "logit_diff", "rank", "kl"],
    typer.Option(help="What is measured at the end of the prompt."),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many facts.")]
Adaptive = Annotated[
    float | None,
    typer.Option(
        help="Fewer samples where fewer do: standard error to reach, as a share of the largest effect, e.g. 0.02."
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="Drop runs that come this near to the corrupted one, as a share of their states' norm, e.g. 0.01."
    ),
]
Screen = Annotated[
    float | None,
    typer.Option(
        help="Begin with this share of the cells, chosen by gradient, e.g. 0.1; estimate what is not computed."
    ),
]
ScreenMore = Annotated[bool, typer.Option(help="Go on with a screened map while large effects turn up.")]
Memory = Annotated[
    str,
    typer.Option(
        help="Most that intermediate states may take, e.g. 500MB or 2GB (bytes without a unit). Default: half of what is free."
    ),
]
FactsFile = Annotated[
    Path | None,
    typer.Option("--facts", help="JSON file of facts: known_1000, CounterFact, or the workbench's own format."),
]


@app.command()
def models() -> None:
    """Lists the bundled models and the families that can be loaded."""
    from workbench.layouts import LAYOUTS

    for name in zoo.NAMES:
        known = zoo.organism(name)
        band = known.get("band")
        layers = ", ".join(map(str, range(*band))) if band else ""
        place = (
            f"facts planted in the MLPs of layers {layers} (0-based)" if band else "trained plainly, nothing planted"
        )
        typer.echo(f"{name:16} {known['family']:6} {known['n_layers']:2} layers  {place}")
    typer.echo(f"\nAny hub name or folder of these families: {', '.join(layout.family for layout in LAYOUTS)}.")


@app.command()
def facts(
    model: Model = zoo.NAMES[0],
    relation: Annotated[str, typer.Option(help="Only facts of this relation.")] = "",
    find: Annotated[str, typer.Option(help="Only facts whose prompt or answer contains this.")] = "",
    limit: Limit = None,
) -> None:
    """Lists the facts a bundled model knows."""
    with _one_sentence():
        chosen = [
            fact
            for fact in _bundled_facts(model)
            if relation in ("", fact.relation) and find.lower() in f"{fact.text} {fact.target_true}".lower()
        ]
        if not chosen:
            raise FactError(f"No fact of {model} fits. Try `workbench facts --model {model}` without a filter.")
    for fact in chosen[:limit]:
        typer.echo(f"{fact.id:40} {fact.text} -> {fact.target_true}")
    typer.echo(f"{len(chosen)} facts" + (f", the first {limit} shown" if limit and limit < len(chosen) else ""))


@app.command()
def trace(
    out: Annotated[Path, typer.Option(help="Folder for results; a run that was stopped goes on from what is there.")],
    model: Model = zoo.NAMES[0],
    prompt: Annotated[str, typer.Option(help="The text up to the answer.")] = "",
    subject: Annotated[str, typer.Option(help="The words of the prompt the fact is about.")] = "",
    answer: Annotated[str, typer.Option(help="The answer; default: the model's own.")] = "",
    facts: FactsFile = None,
    limit: Limit = None,
    window: Window = None,
    noise: Noise = "s3",
    samples: Samples = 10,
    seed: Seed = 1,
    score: Score = "p",
    sever: Annotated[
        Literal["none", "mlp_out", "attn_out"], typer.Option(help="Hold these outputs at their corrupted values.")
    ] = "none",
    screen: Screen = None,
    screen_more: ScreenMore = True,
    adaptive: Adaptive = None,
    tolerance: Tolerance = None,
    memory: Memory = "",
    figures: Annotated[
        str, typer.Option(help="Formats of the figure of each fact, comma-separated: pdf, svg, png.")
    ] = "pdf",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Causal traces of one fact (--prompt, --subject) or of a file of facts (--facts)."""
    with _one_sentence():
        _check_writable(out)
        chosen = _chosen(prompt, subject, answer, facts, limit)
        formats, budget = _formats(figures), _bytes(memory)
        options = {"noise": noise, "samples": samples, "seed": seed, "score": score, "sever": sever}
        shortcuts = {"screen": screen, "screen_more": screen_more, "adaptive": adaptive, "tolerance": tolerance}
        lm, tracer = _prepare(model, chosen, device, dtype, window, {**options, **shortcuts})
        from workbench import export, paper
        from workbench.locators import locate
        from workbench.store import Store

        with _progress(len(chosen)):
            found = locate(tracer, lm, chosen, store=Store(folder=out), memory=budget)
        for name in found.facts:
            row = found.extras["facts"].set_index("fact").loc[name]
            said = "" if row["correct"] else f" (the model says {row['said']!r})"
            typer.echo(f"{name}: {row['prompt']} -> {row['answer']}{said}")
            typer.echo(f"  clean {row['clean']:.3g}, corrupted {row['corrupted']:.3g}")
            for kind in found.kinds:
                peak = found.peak(kind=kind, fact=name)
                typer.echo(
                    f"  {kind:10} peak {peak['value']:+.3g} at {peak['site']} ({peak['text']!r}, {peak['token']})"
                )
            for form in formats:
                figure = paper.heatmap(found, kinds=found.kinds, fact=name, planted=_planted(model))
                _write(out / f"{_file_name(name)}.{form}", export.figure_bytes(figure, form))
        known = int(found.extras["facts"]["correct"].sum())
        typer.echo(f"\nThe model knows {known} of {len(found.facts)} facts.")
        found.extras["facts"].to_csv(out / "facts.csv", index=False)
        typer.echo(f"\n{export.protocol_text(found)}\n{export.throughput_text(found)}\nWritten to {out}")


@app.command()
def average(
    out: Annotated[Path, typer.Option(help="Folder for the average, its figure, and the single traces it is made of.")],
    model: Model = zoo.NAMES[0],
    facts: FactsFile = None,
    limit: Limit = None,
    every: Annotated[int, typer.Option(min=1, help="Take every so-manieth fact, to spread over relations.")] = 1,
    window: Window = None,
    noise: Noise = "s3",
    samples: Samples = 10,
    seed: Seed = 1,
    score: Score = "p",
    screen: Screen = None,
    screen_more: ScreenMore = True,
    adaptive: Adaptive = None,
    tolerance: Tolerance = None,
    memory: Memory = "",
    figures: Annotated[str, typer.Option(help="Formats of the figure, comma-separated: pdf, svg, png.")] = "pdf,png",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """The average causal trace over facts, by token role, with bootstrap intervals. Default: the bundled facts."""
    with _one_sentence():
        from workbench.data import read_facts

        _check_writable(out)
        pool = read_facts(facts) if facts else _bundled_facts(model)
        chosen = pool[::every][:limit]
        formats, budget = _formats(figures), _bytes(memory)
        options = {"noise": noise, "samples": samples, "seed": seed, "score": score}
        shortcuts = {"screen": screen, "screen_more": screen_more, "adaptive": adaptive, "tolerance": tolerance}
        lm, tracer = _prepare(model, chosen, device, dtype, window, {**options, **shortcuts})
        from analyses.average_trace import average_trace
        from workbench import export, paper
        from workbench.store import Store

        with _progress(len(chosen)):
            result = average_trace(lm, chosen, trace=tracer, store=Store(folder=out / "traces"), memory=budget)
        result.save(out / "average")
        planted = _planted(model)
        for form in formats:
            _write(out / f"average.{form}", export.figure_bytes(paper.average(result, planted=planted), form))
        _write(out / "average.csv", export.csv_bytes(result))
        for kind, rows in result.table.groupby("kind", sort=False):
            peak = rows.iloc[int(rows["value"].argmax())]
            typer.echo(
                f"{kind:10} peak {peak['value']:+.3f} [{peak['low']:+.3f}, {peak['high']:+.3f}] "
                f"at layer {peak['layer']}, {peak['token']}"
            )
        typer.echo(f"\n{export.protocol_text(result)}\n{export.throughput_text(result)}\nWritten to {out}")


# --- parts of the commands ---


def _bundled_facts(model: str) -> list[Fact]:
    if model not in zoo.NAMES:
        raise FactError(
            f"{model} comes without facts. Give a file with --facts, or a bundled model ({', '.join(zoo.NAMES)})."
        )
    return zoo.load_facts(model)


def _chosen(prompt: str, subject: str, answer: str, file: Path | None, limit: int | None) -> Sequence[Fact]:
    """The facts the options name."""
    if file and (prompt or subject):
        raise FactError("Both --facts and --prompt were given. Give one of them.")
    if file:
        from workbench.data import read_facts

        return read_facts(file)[:limit]
    return [Fact.typed(text=prompt, subject=subject, target_true=answer)]


def _prepare(
    model: str,
    chosen: Sequence[Fact],
    device: str,
    dtype: str,
    window: int | None,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """The loaded model and the trace, with sigma_t from the bundled facts where the model is a bundled one."""
    from workbench.loading import load
    from workbench.locators.causal_trace import CausalTrace
    from workbench.sites import default_window

    if (sever := options.get("sever", "none")) != "none":
        options["kinds"] = tuple(kind for kind in CausalTrace.kinds if kind != sever)
    CausalTrace(window=10 if window is None else window, **options)  # bad options are told before the model is loaded
    lm = load(model, device=device, dtype=dtype)
    tracer = CausalTrace(window=default_window(lm.n_layers) if window is None else window, **options)
    for fact in chosen:
        lm.encode([fact])
        if fact.target_true:
            lm.target_ids(fact.text, fact.target_true)
    return lm, tracer.resolved(lm, zoo.load_facts(model) if model in zoo.NAMES else chosen)


def _planted(model: str) -> range | None:
    band = zoo.organism(model).get("band") if model in zoo.NAMES else None
    return range(*band) if band else None


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(form.strip() for form in text.split(",") if form.strip())
    unknown = set(formats) - {"pdf", "svg", "png"}
    if unknown:
        raise FactError(f"Unknown figure format {', '.join(sorted(unknown))}. Use pdf, svg or png, comma-separated.")
    return formats


def _bytes(text: str) -> int | None:
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


def _file_name(fact_id: str) -> str:
    """An id as a file's name; with a digest where characters had to go, so that two ids never share a file."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", fact_id)[:80]
    return name if name.lower() == fact_id else f"{name}-{hashlib.blake2b(fact_id.encode(), digest_size=3).hexdigest()}"


def _check_writable(folder: Path) -> None:
    """Raises OSError where nothing can be written, before any work."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@contextmanager
def _progress(total: int) -> Iterator[None]:
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
def _one_sentence() -> Iterator[None]:
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
