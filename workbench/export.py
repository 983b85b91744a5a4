"""Results and figures as bytes of files, each with its protocol inside, for downloads.

| Format | Where the protocol is |
|---|---|
| csv | comment lines `# {"name": value}` before the table, one entry of the manifest each |
| parquet | the schema's metadata, under the key `workbench`, as JSON |
| pdf | document information: Title, Subject (sentences), Keywords (JSON) |
| svg | RDF: title, description (sentences), keywords (JSON) |
| png | text chunks Title, Description (sentences), Protocol (JSON) |
| html | the page's title, and a JSON script element with the id `protocol` |

Equal results and figures give equal bytes: no time of writing is put in.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq

from workbench.errors import InputError
from workbench.results import Result, ResultError

PARQUET_KEY = b"workbench"
"""Where a parquet file's schema keeps the manifest."""

FORMATS = ("pdf", "svg", "png", "html")
"""Formats of figures: the first three of `workbench.paper`, the last of `workbench.plots`."""


class Savable(Protocol):
    """A matplotlib figure; those of `workbench.paper` put their protocol into the file."""

    def savefig(self, fname: Any, *, format: str) -> None: ...  # noqa: A002  # matplotlib's word


# --- figures ---


def figure_bytes(figure: Savable | go.Figure, format: str, *, result: Result | None = None) -> bytes:  # noqa: A002
    """A figure as a file.

    Args:
        figure: of `workbench.paper` for pdf, svg and png; of `workbench.plots` for html.
        format: one of `FORMATS`.
        result: for html, the result whose protocol goes into the page; figures of `workbench.paper` have theirs.

    Raises:
        InputError: this kind of figure has no such format.
    """
    is_plotly = isinstance(figure, go.Figure)
    if format not in FORMATS or (format == "html") != is_plotly:
        raise InputError(
            f"A figure of workbench.{'plots' if is_plotly else 'paper'} cannot become {format!r}. "
            "Draw it with workbench.paper for pdf, svg and png, with workbench.plots for html."
        )
    if isinstance(figure, go.Figure):
        return _html(figure, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format)
    return buffer.getvalue()


def figure_metadata(run: Mapping[str, Any], *, title: str, format: str) -> dict[str, Any]:  # noqa: A002
    """What matplotlib's `savefig(metadata=...)` writes into a file of this format; times are left out."""
    sentences, entries = protocol_of(run), _json(without_times(run))
    if format == "pdf":
        return {"Title": title, "Subject": sentences, "Keywords": entries, "CreationDate": None}
    if format == "svg":
        return {"Title": title, "Description": sentences, "Keywords": [entries], "Date": None}
    if format == "png":
        return {"Title": title, "Description": sentences, "Protocol": entries}
    return {}


# --- tables ---


def csv_bytes(result: Result) -> bytes:
    """The table as CSV in UTF-8, after its protocol in comment lines.

    `pd.read_csv(file, comment="#")` reads the table: all text is quoted, so a `#` in a token starts no comment. That call takes a
    token `NA` or `nan` for a missing value, though; `read_csv` of this module does not, and gives the manifest too.
    """
    buffer = io.StringIO()
    for name, value in result.run.items():
        buffer.write(f"# {_json({name: value})}\n")
    buffer.write(f"# {_json({'columns': {str(name): str(dtype) for name, dtype in result.table.dtypes.items()}})}\n")
    result.table.to_csv(buffer, index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    return buffer.getvalue().encode()


def read_csv(data: bytes) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Table and manifest of what `csv_bytes` wrote; numbers come back to the last bit.

    Raises:
        ResultError: it has no protocol.
    """
    entries: dict[str, Any] = {}
    for line in data.decode().split("\n"):
        if not line.startswith("# "):
            break
        entries.update(json.loads(line[2:]))
    if "columns" not in entries:
        raise ResultError("This CSV has no protocol in comment lines. Export it from the workbench again.")
    columns: dict[str, str] = entries.pop("columns")
    table = pd.read_csv(io.BytesIO(data), comment="#", dtype=str, keep_default_na=False)
    return table.assign(**{name: _parsed(table[name], dtype) for name, dtype in columns.items()}), entries


def parquet_bytes(result: Result) -> bytes:
    """The table as parquet, its protocol in the schema's metadata; `pd.read_parquet` reads it as it was."""
    table = pa.Table.from_pandas(result.table, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), PARQUET_KEY: _json(result.run).encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def read_parquet(data: bytes) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Table and manifest of what `parquet_bytes` wrote.

    Raises:
        ResultError: it has no protocol.
    """
    metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
    if PARQUET_KEY not in metadata:
        raise ResultError("This parquet file has no protocol in its schema. Export it from the workbench again.")
    return pd.read_parquet(io.BytesIO(data)), json.loads(metadata[PARQUET_KEY])


# --- protocol ---


def protocol_text(result: Result) -> str:
    """The protocol in sentences, for a caption."""
    return protocol_of(result.run)


def protocol_of(run: Mapping[str, Any]) -> str:
    """`protocol_text` of a manifest."""
    options = dict(run.get("parameters", {}))
    said = [phrase for name, words in _PHRASES.items() if name in options and (phrase := words(options, run))]
    rest = [
        f"{name} {_plain(value)}"
        for name, value in options.items()
        if name not in _PHRASES and name not in _SILENT and value not in ("", None, [], ())
    ]
    facts = run.get("facts", ())
    number = run.get("n_facts", len(facts))
    if number == 1 and facts:
        about = f"fact “{_prompt(facts[0])}”"
    else:
        about = f"{number} facts" + (f" ({run['n_left_out']} left out)" if run.get("n_left_out") else "")
    model = ", ".join(
        [
            f"weights {run.get('weight_hash', 'unknown')}",
            *(str(run[key]) for key in ("dtype", "attention") if run.get(key)),
        ]
    )
    sentences = [f"{run.get('of') or run.get('what', 'Result')} of {run.get('model', 'a model')} ({model}), {about}"]
    if said or rest:
        sentences.append("; ".join([*said, *rest]))
    if "bootstrap" in run:
        level = round(100 * run["bootstrap"]["level"])
        sentences.append(
            f"means over facts, {level} % bootstrap intervals ({run['bootstrap']['resamples']} resamples, "
            f"seed {run['bootstrap']['seed']})"
        )
    sentences.append("layers are 0-based")
    versions = run.get("versions", {})
    used = [
        f"{name} {versions[name]}"
        for name in ("knowledge-location-workbench", "torch", "transformers")
        if versions.get(name, "not installed") != "not installed"
    ]
    if used:
        sentences.append(", ".join(used))
    return " ".join(f"{sentence[:1].upper()}{sentence[1:]}." for sentence in sentences)


def throughput_text(result: Result) -> str:
    """How long it took and what memory, in a sentence."""
    told = result.run["throughput"]
    kept = len(result.run["facts"]) - told["facts"]
    if not told["facts"]:
        return "Nothing was computed: all facts were there already."
    n, seconds = told["facts"], told["seconds"]
    took = f"{seconds:.3g} s" if n == 1 else f"{seconds / n:.2g} s a fact, {seconds:.0f} s in all"
    before = f", {kept} {'was' if kept == 1 else 'were'} there already" if kept else ""
    memory = f"Peak memory of the process {told['peak_memory_mib']} MiB."
    return f"{n} fact{'s' if n > 1 else ''} computed{before}: {took}. {memory}"


def without_times(run: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without when it was made and how long that took, so that equal runs give equal files."""
    return {name: value for name, value in run.items() if name not in ("made", "throughput")}


# --- parts ---


def _noise(options: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    if options.get("corrupt") == "swap":
        return _counterfactual(options, run)
    note = f" ({options['sigma_note']})" if options.get("sigma_note") else ""
    per_prompt = ", sigma_t of each prompt" if options.get("sigma_from") == "prompt" else ""
    how = "in the place of" if options.get("replace") else "on"
    return f"noise {_rounded(options['noise'])}{note}{per_prompt} {how} the subject's embeddings"


def _counterfactual(options: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Of a single fact the other prompt itself, where the manifest has it."""
    facts = run.get("facts", ())
    prompt = run.get("counterfactuals", {}).get(facts[0].get("id")) if len(facts) == 1 else None
    return f"counterfactual prompt “{prompt}”" if prompt else "subject swapped for another of equal length"


def _rounded(noise: Any) -> str:
    """A noise like `u0.2252962813` in four digits; the manifest has them all."""
    return re.sub(r"\d*\.\d+(e-?\d+)?", lambda number: f"{float(number[0]):.4g}", str(noise))


def _samples(options: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    most = "up to " if options.get("adaptive") else ""
    return (
        ""
        if options.get("corrupt") == "swap"
        else f"{most}{options['samples']} sample{'s' * (options['samples'] != 1)}"
    )


def _window(options: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    if options["window"] is None:
        return ""
    rule = (
        f" (even windows as in {options['window_rule']})"
        if options["window"] % 2 == 0 and "window_rule" in options
        else ""
    )
    return (
        f"MLP and attention outputs in windows of {options['window']} layer{'s' if options['window'] > 1 else ''}{rule}"
    )


def _screen(options: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    told = run.get("screened")
    if not options["screen"] or not told:
        return ""
    others = "the others" if "bootstrap" in run else "the others (dotted)"
    error = (
        f"off by {told['rms_error_there']:.2g} (rms, in the score's unit) on the computed ones, which are the largest"
    )
    return (
        f"{100 * told['computed']:.0f} % of the cells computed, {others} estimated by gradient; estimates are {error}"
    )


def _adaptive(options: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    share = options["adaptive"]
    return (
        f"fewer samples where standard errors came below {100 * share:g} % of the map's largest effect" if share else ""
    )


_PHRASES: Mapping[str, Any] = {
    "noise": _noise,
    "direction": lambda options, run: f"{_counterfactual(options, run)}; direction {options['direction']}",
    "samples": _samples,
    "seed": lambda options, run: f"seed {options['seed']}",
    "window": _window,
    "sever": lambda options, run: "" if options["sever"] == "none" else f"{options['sever']} severed",
    "score": lambda options, run: f"score {options['score']}",
    "screen": _screen,
    "adaptive": _adaptive,
    "engine": lambda options, run: f"engine {run.get('engine') or options['engine']}",
}
"""How the parameters that many methods share are said; any other is named with its value."""

_SILENT = (
    "kinds",
    "corrupt",
    "sigma_note",
    "sigma_from",
    "replace",
    "window_rule",
    "substitutes",
    "relations",
    "token",
    "screen_more",
)
"""Parameters that stand in another one's phrase, or in the figure itself."""


def _prompt(fact: Mapping[str, Any]) -> str:
    return str(fact.get("prompt", fact.get("id", ""))).replace("{}", str(fact.get("subject", "{}")))


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _parsed(column: pd.Series, dtype: str) -> pd.Series:
    """A column of text as what it was; Python's own conversion keeps every bit of a float."""
    lower, values = dtype.lower(), list[Any](column)
    if "float" in lower:
        values = [float(value or "nan") for value in column]
    elif "int" in lower:
        values = [int(value) if value else pd.NA for value in column]
    elif "bool" in lower:
        values = [value == "True" for value in column]
    else:
        return column
    parsed: pd.Series = pd.Series(values, index=column.index, dtype=dtype)
    return parsed


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _html(figure: go.Figure, result: Result | None) -> bytes:
    run = result.run if result else {}
    body = figure.to_html(full_html=False, include_plotlyjs=True, div_id="figure", config={"displaylogo": False})
    data = _json(without_times(run)).replace("</", "<\\/")
    caption = html.escape(protocol_of(run)) if run else ""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(str(run.get('what', 'Figure')))}</title>\n"
        f'<script type="application/json" id="protocol">{data}</script>\n</head>\n'
        f"<body>\n{body}\n<p>{caption}</p>\n</body>\n</html>\n"
    )
    return page.encode()
