"""Where does a language model keep a fact, and where does an editor change it? List, locate, compare, edit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from workbench import zoo
from workbench.cli_parts import (
    bundled_facts,
    check_new_folders,
    check_writable,
    checkpoint_of,
    choose_facts,
    counted,
    edit_and_write,
    given,
    list_form,
    list_methods,
    list_options,
    locate_and_write,
    one_sentence,
    planted_band,
    prepare,
    prepare_one,
    progress_bar,
    read_form,
    read_formats,
    read_settings,
    read_size,
    run_and_write,
    say_left_out,
    write_diff,
    write_file,
)
from workbench.errors import InputError
from workbench.facts import FactError, spread

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
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the method, e.g. --set steps=5; `workbench locators METHOD` lists them."),
]
FactsFile = Annotated[
    Path | None,
    typer.Option("--facts", help="JSON file of facts: known_1000, CounterFact, or the workbench's own format."),
]


Prompt = Annotated[str, typer.Option(help="The text up to the answer.")]
Subject = Annotated[str, typer.Option(help="The words of the prompt the fact is about.")]
AnswerText = Annotated[str, typer.Option("--answer", help="The answer; default: the model's own.")]
FactIds = Annotated[
    list[str] | None,
    typer.Option("--fact", help="Id of a bundled fact, e.g. capital/France; may be given several times."),
]
Every = Annotated[int, typer.Option(min=1, help="Take every so-manieth fact, to spread over relations.")]
Out = Annotated[Path, typer.Option(help="Folder for results; a run that was stopped goes on from what is there.")]
Formats = Annotated[str, typer.Option("--figures", help="Formats of figures, comma-separated: pdf, svg, png.")]


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
    with one_sentence():
        chosen = [
            fact
            for fact in bundled_facts(model)
            if relation in ("", fact.relation) and find.lower() in f"{fact.text} {fact.target_true}".lower()
        ]
        if not chosen:
            raise FactError(f"No fact of {model} fits. Try `workbench facts --model {model}` without a filter.")
    for fact in chosen[:limit]:
        typer.echo(f"{fact.id:40} {fact.text} -> {fact.target_true}")
    typer.echo(counted(len(chosen), "fact") + (f", the first {limit} shown" if limit and limit < len(chosen) else ""))


@app.command()
def locators(
    method: Annotated[str, typer.Argument(help="Lists the options of this method; default: all methods.")] = "",
) -> None:
    """Lists the locating methods, or the options of one."""
    with one_sentence():
        from workbench.locators import all_locators, locator_named

        if method:
            list_options(locator_named(method))
        else:
            list_methods(all_locators())


@app.command("locate")
def locate_facts(
    method: Annotated[str, typer.Argument(help="A locating method; `workbench locators` lists them.")],
    out: Out,
    model: Model = zoo.NAMES[0],
    prompt: Prompt = "",
    subject: Subject = "",
    answer: AnswerText = "",
    fact: FactIds = None,
    facts: FactsFile = None,
    every: Every = 1,
    limit: Limit = None,
    settings: Settings = None,
    memory: Memory = "",
    figures: Formats = "pdf",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Where facts are by one method: one typed (--prompt, --subject), bundled (--fact, or --every, --limit), or of a file."""
    with one_sentence():
        check_writable(out)
        chosen = choose_facts(model, prompt, subject, answer, fact, facts, every=every, limit=limit)
        formats, budget = read_formats(figures), read_size(memory)
        from workbench.locators import locator_named

        options = read_settings(locator_named(method), settings)
        lm, locator = prepare_one(model, chosen, device, dtype, method, options)
        locate_and_write(lm, locator, chosen, out, model, formats, budget)


@app.command()
def editors(
    method: Annotated[str, typer.Argument(help="Lists the options of this editor; default: all editors.")] = "",
) -> None:
    """Lists the editors, or the options of one."""
    with one_sentence():
        from workbench.editors import all_editors, editor_named

        if method:
            list_options(editor_named(method))
        else:
            list_methods(all_editors())


@app.command("edit")
def edit_facts(
    method: Annotated[str, typer.Argument(help="An editor; `workbench editors` lists them.")],
    out: Annotated[Path, typer.Option(help="A new folder for the edit.")],
    model: Model = zoo.NAMES[0],
    prompt: Prompt = "",
    subject: Subject = "",
    answer: AnswerText = "",
    target: Annotated[str, typer.Option(help="The new answer; default: what the facts bring as target_new.")] = "",
    fact: FactIds = None,
    facts: FactsFile = None,
    every: Every = 1,
    limit: Limit = None,
    settings: Settings = None,
    one_by_one: Annotated[
        bool,
        typer.Option(help="Edit the facts one after the other, each on top of those before, instead of as one batch."),
    ] = False,
    merge: Annotated[Path | None, typer.Option(help="A new folder for the edited model as a checkpoint.")] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Edits facts, shows what the model says before and after, and writes the edit. Facts as for `locate`."""
    with one_sentence():
        from workbench.editors import EditError, editor_named

        editor = editor_named(method)
        options = read_settings(editor, settings)
        editor(**options)
        if merge is not None and editor.beside_weights:
            raise EditError(f"What {method} adds stands beside the weights, which cannot hold it. Leave out --merge.")
        check_new_folders([out] if merge is None else [out, merge])
        chosen = choose_facts(model, prompt, subject, answer, fact, facts, every=every, limit=limit)
        chosen = [dataclasses.replace(one, target_new=target) for one in chosen] if target else chosen
        edit_and_write(
            editor, options, chosen, out, model=model, device=device, dtype=dtype, one_by_one=one_by_one, merge=merge
        )


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help="The checkpoint before: a folder, a bundled model, or a hub name.")],
    edited: Annotated[str, typer.Argument(help="The checkpoint after, or the folder of a LoRA adapter.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the table, as csv and parquet, and the figure.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many of the most changed tensors are shown.")] = 20,
    figures: Formats = "pdf",
) -> None:
    """What differs between two checkpoints: which tensors, how much, of which rank. Neither model is held in memory."""
    with one_sentence():
        import pandas as pd

        from workbench.checkpoint_diff import diff_checkpoints

        formats = read_formats(figures)
        if out is not None:
            check_writable(out)
        folders = [checkpoint_of(name) for name in (base, edited)]
        with progress_bar(1):
            found = diff_checkpoints(*folders)
        table = found.table[found.table["changed"]].sort_values("relative", ascending=False)
        for row in table.head(limit).itertuples():
            rank = "" if pd.isna(row.rank) else f"  rank {row.rank}"
            typer.echo(
                f"{row.tensor:48} |dW|/|W| {row.relative:.3g}  largest {row.largest:.3g}  cosine {row.cosine:.6f}{rank}"
            )
        for name in ("only_base", "only_edited"):
            if found.run[name]:
                typer.echo(f"{name.replace('_', ' ')}: {', '.join(found.run[name][:5])}")
        typer.echo(f"{found.run['verdict']} Layers count from 0.")
        if out is not None:
            write_diff(found, out, formats)
            typer.echo(f"Written to {out}")


@app.command()
def compare(
    out: Out,
    methods: Annotated[
        str, typer.Option(help="Locating methods, comma-separated; default: all that run on this model.")
    ] = "",
    model: Model = zoo.NAMES[0],
    prompt: Prompt = "",
    subject: Subject = "",
    answer: AnswerText = "",
    fact: FactIds = None,
    facts: FactsFile = None,
    every: Every = 1,
    limit: Limit = None,
    memory: Memory = "",
    figures: Formats = "pdf",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Several methods on the same facts: one figure by layer, and how far they agree. Facts as for `locate`."""
    with one_sentence():
        from workbench.locators import all_locators, locate

        check_writable(out)
        chosen = choose_facts(model, prompt, subject, answer, fact, facts, every=every, limit=limit)
        formats, budget = read_formats(figures), read_size(memory)
        names = [name.strip() for name in methods.split(",") if name.strip()] or list(all_locators())
        if len(set(names)) < max(2, len(names)):
            raise FactError(
                f"The methods are {', '.join(names)}; expected two different ones or more, to compare them."
            )
        lm, ready = prepare(model, chosen, device, dtype, {name: {} for name in names})
        from analyses.locator_agreement import agreement
        from workbench import export, paper
        from workbench.store import Store

        found = []
        for name, locator in ready.items():
            try:
                if isinstance(locator, InputError):
                    raise locator
                with progress_bar(len(chosen)):
                    one = locate(locator, lm, chosen, store=Store(folder=out / "footprints"), memory=budget, skip=True)
            except InputError as error:
                typer.echo(f"{name} is left out: {error}", err=True)
            else:
                found.append(one)
                told = one.run["throughput"]
                typer.echo(
                    f"{name}: {counted(told['facts'], 'fact')} computed in {told['seconds']} s{say_left_out(one)}"
                )
        if not found:
            raise FactError("None of the methods could locate these facts. The lines above say why.")
        agreed = agreement(found)
        agreed.save(out / "agreement")
        write_file(out / "agreement.csv", export.csv_bytes(agreed))
        for form in formats:
            figure = paper.compare(found, form="lines" if len(found) < 3 else "strips", planted=planted_band(model))
            write_file(out / f"compare.{form}", export.figure_bytes(figure, form))
            write_file(out / f"agreement.{form}", export.figure_bytes(paper.agreement(agreed), form))
        typer.echo(f"\nWritten to {out}")


@app.command()
def analyses(
    name: Annotated[str, typer.Argument(help="Lists the options of this analysis; default: all analyses.")] = "",
) -> None:
    """Lists the analyses that `run` knows, or the options of one."""
    with one_sentence():
        from analyses.catalogue import all_analyses, analysis_named

        if name:
            typer.echo(f"{analysis_named(name).explained}\n")
            list_form(analysis_named(name).form)
            return
        for one in all_analyses().values():
            typer.echo(f"{one.name:32} {one.title}")


@app.command("run")
def run_analysis(
    name: Annotated[str, typer.Argument(help="An analysis; `workbench analyses` lists them.")],
    out: Out,
    model: Model = zoo.NAMES[0],
    prompt: Prompt = "",
    subject: Subject = "",
    answer: AnswerText = "",
    target: Annotated[str, typer.Option(help="The new answer of edits; default: what the facts bring.")] = "",
    fact: FactIds = None,
    facts: FactsFile = None,
    every: Every = 1,
    limit: Limit = None,
    settings: Settings = None,
    figures: Formats = "pdf",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Runs an analysis: its table, its figure, and what it found in words.

    Facts as for `locate`; with none named, 20 bundled ones (or as many as --limit says), spread over all relations.
    """
    with one_sentence():
        from analyses.catalogue import analysis_named

        check_writable(out)
        options, formats = read_form(name, analysis_named(name).form, settings), read_formats(figures)
        if "editors" in options:
            from analyses.editing import fitted_editors

            fitted_editors(None, options["editors"])
        if prompt or fact or facts or every > 1:
            chosen = choose_facts(model, prompt, subject, answer, fact, facts, every=every, limit=limit)
        else:
            chosen = spread(bundled_facts(model), limit or 20)
        chosen = [dataclasses.replace(one, target_new=target) for one in chosen] if target else chosen
        run_and_write(name, options, chosen, out, model=model, device=device, dtype=dtype, formats=formats)


@app.command()
def trace(
    out: Out,
    model: Model = zoo.NAMES[0],
    prompt: Prompt = "",
    subject: Subject = "",
    answer: AnswerText = "",
    fact: FactIds = None,
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
    figures: Formats = "pdf",
    device: Device = "auto",
    dtype: Dtype = "float32",
) -> None:
    """Causal traces; `locate CausalTrace` with an option for each setting. Facts as for `locate`."""
    with one_sentence():
        check_writable(out)
        chosen = choose_facts(model, prompt, subject, answer, fact, facts, limit=limit)
        formats, budget = read_formats(figures), read_size(memory)
        options = {"noise": noise, "samples": samples, "seed": seed, "score": score, "sever": sever}
        shortcuts = {"screen": screen, "screen_more": screen_more, "adaptive": adaptive, "tolerance": tolerance}
        options = given(window=window, **options, **shortcuts)
        lm, tracer = prepare_one(model, chosen, device, dtype, "CausalTrace", options)
        locate_and_write(lm, tracer, chosen, out, model, formats, budget)


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
    with one_sentence():
        from workbench.data import read_facts

        check_writable(out)
        pool = read_facts(facts) if facts else bundled_facts(model)
        chosen = pool[::every][:limit]
        formats, budget = read_formats(figures), read_size(memory)
        options = {"noise": noise, "samples": samples, "seed": seed, "score": score}
        shortcuts = {"screen": screen, "screen_more": screen_more, "adaptive": adaptive, "tolerance": tolerance}
        options = given(window=window, **options, **shortcuts)
        lm, tracer = prepare_one(model, chosen, device, dtype, "CausalTrace", options)
        from analyses.average_trace import average_trace
        from workbench import export, paper
        from workbench.store import Store

        with progress_bar(len(chosen)):
            result = average_trace(lm, chosen, trace=tracer, store=Store(folder=out / "traces"), memory=budget)
        result.save(out / "average")
        planted = planted_band(model)
        for form in formats:
            write_file(out / f"average.{form}", export.figure_bytes(paper.average(result, planted=planted), form))
        write_file(out / "average.csv", export.csv_bytes(result))
        for kind, rows in result.table.groupby("kind", sort=False):
            peak = rows.iloc[int(rows["value"].argmax())]
            typer.echo(
                f"{kind:10} peak {peak['value']:+.3f} [{peak['low']:+.3f}, {peak['high']:+.3f}] "
                f"at layer {peak['layer']}, {peak['token']}"
            )
        typer.echo(f"\n{export.protocol_text(result)}\n{export.throughput_text(result)}\nWritten to {out}")
