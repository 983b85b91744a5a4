"""What an analysis gives back: a tidy table with the protocol that made it, on disk as parquet and JSON.

A `Result` is complete in itself: it says which weights, which parameters, which library versions. `Footprint` is the Result that
locators and edits share, one row per fact and site, so that the two can be joined.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from workbench.errors import InputError

FOOTPRINT_COLUMNS = (
    "fact", "site", "layer", "kind", "head", "neuron", "token", "position", "text", "value", "se", "score",
)  # fmt: skip
"""Columns of every footprint:

- `fact`: id; `site`: as `str(Site)` at this position; `layer` (0-based), `kind`: its parts
- `head`, `neuron`: where the row is one attention head or one MLP neuron; a row with neither is a *whole* row
- `token`: role of the token; `position`: its place in the prompt, from 0; `text`: the token itself. What belongs to no token has
  `all`, none and an empty text
- `value`: the effect there, in the unit the manifest names; `se`: its standard error, where there are samples
- `score`: the raw score from which `value` was taken, where there is one
"""

QUESTION = ("what", "weight_hash", "setup_hash", "dtype", "bos", "parameters", "facts")
"""The entries of a manifest that decide what comes out; runs that agree in them need not be computed twice."""

_ATTEMPTS = 50
"""How often a result is moved into its place while another process does the same."""

_LIBRARIES = ("torch", "transformers", "numpy", "pandas", "knowledge-location-workbench")

R = TypeVar("R", bound="Result")


class ResultError(InputError):
    """A result that cannot be read or used; the message says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """A table and where it came from."""

    table: pd.DataFrame
    """One row an observation, factors in columns, scalars in cells."""

    run: Mapping[str, Any]
    """The manifest: what, model and weight hash, parameters, seed, versions, self-checks."""

    extras: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """Further tables of the same run, by name, e.g. `samples` of a causal trace; `facts` has one row a fact."""

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name the question, not the answer: see `QUESTION`."""
        return question_key(self.run)

    def save(self, folder: Path | str) -> Path:
        """Writes `table.parquet`, one parquet per extra table and `run.json` into `folder`; all of it or nothing."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            new = Path(temporary) / folder.name
            new.mkdir()
            self.table.to_parquet(new / "table.parquet", index=False)
            for name, table in self.extras.items():
                table.to_parquet(new / f"{name}.parquet", index=False)
            manifest = {**self.run, "extras": sorted(self.extras), "class": type(self).__name__}
            (new / "run.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False, default=_plain) + "\n")
            for attempt in range(
                _ATTEMPTS
            ):  # a file may be there, or another process write the same at the same moment
                try:
                    new.replace(folder)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) or attempt == _ATTEMPTS - 1:
                        raise
                with contextlib.suppress(FileNotFoundError):
                    folder.replace(Path(temporary) / f"old-{attempt}")
        return folder

    @classmethod
    def load(cls: type[R], folder: Path | str) -> R:
        """Reads what `save` wrote.

        Raises:
            ResultError: the folder is missing or holds no complete result.
        """
        folder = Path(folder)
        try:
            run = json.loads((folder / "run.json").read_text())
            names = run.pop("extras")
            run.pop("class")
            table = pd.read_parquet(folder / "table.parquet")
            extras = {name: pd.read_parquet(folder / f"{name}.parquet") for name in names}
            if {path.stem for path in folder.glob("*.parquet")} != {"table", *extras}:
                raise ValueError("run.json names other tables than there are")
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:  # the last two: JSON of another shape
            raise ResultError(
                f"{str(folder)!r} holds no complete result ({type(error).__name__}), expected run.json and table.parquet. "
                "Compute it again."
            ) from error
        return cls(table=table, run=run, extras=extras)


@dataclass(frozen=True, kw_only=True, eq=False)
class Footprint(Result):
    """Where something is, per fact and site: found by a locator, or left by an edit.

    Raises:
        ResultError: a column of `FOOTPRINT_COLUMNS` is missing.
    """

    def __post_init__(self) -> None:
        missing = [column for column in FOOTPRINT_COLUMNS if column not in self.table.columns]
        if missing:
            raise ResultError(
                f"A footprint's table lacks {', '.join(missing)}; it has {', '.join(self.table.columns)}."
            )

    @property
    def facts(self) -> tuple[str, ...]:
        """Ids of the facts, in order of appearance."""
        return tuple(self.table["fact"].unique())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of sites, in order of appearance."""
        return tuple(self.table["kind"].unique())

    def of(self, *, fact: str | None = None, kind: str | None = None) -> pd.DataFrame:
        """The rows of one fact, of one kind, or both.

        Raises:
            ResultError: there is no such row.
        """
        rows = self._of(fact, kind)
        if rows.empty:
            raise ResultError(
                f"There is no row for fact {fact!r} and kind {kind!r}. "
                f"Facts: {', '.join(self.facts[:5])}...; kinds: {', '.join(self.kinds)}."
            )
        return rows

    def _of(self, fact: str | None, kind: str | None) -> pd.DataFrame:
        rows: pd.DataFrame = self.table
        for column, value in (("fact", fact), ("kind", kind)):
            rows = rows if value is None else rows.loc[rows[column] == value]
        return rows

    def whole(self, *, fact: str | None = None, kind: str | None = None) -> pd.DataFrame:
        """The rows that stand for all heads or all neurons of a site together.

        Raises:
            ResultError: there is no such row.
        """
        rows = self.of(fact=fact, kind=kind)
        whole: pd.DataFrame = rows[rows["head"].isna() & rows["neuron"].isna()]
        if whole.empty:
            raise ResultError(f"The rows of {kind!r} are single heads or neurons. Use heads() or neurons().")
        return whole

    def heads(self, *, fact: str | None = None, kind: str = "z") -> pd.DataFrame:
        """The rows of single attention heads; none, where the method looked at none."""
        rows: pd.DataFrame = self._of(fact, kind).dropna(subset="head")
        return rows

    def neurons(self, *, fact: str | None = None, kind: str = "mlp_post") -> pd.DataFrame:
        """The rows of single MLP neurons; none, where the method looked at none."""
        rows: pd.DataFrame = self._of(fact, kind).dropna(subset="neuron")
        return rows

    def grid(self, *, kind: str, fact: str | None = None, column: str = "value") -> pd.DataFrame:
        """A map of one fact: positions down, layers across (0-based), whole rows only. The only fact, where none is named.

        Raises:
            ResultError: there is no such row, or none that belongs to a token.
        """
        rows = self.whole(fact=self._only(fact), kind=kind)
        if rows["position"].isna().any():
            raise ResultError(f"{self.run.get('what')} belongs to no token, so it has no map. Use profile().")
        grid: pd.DataFrame = rows.pivot(index="position", columns="layer", values=column)
        return grid

    def tokens(self, fact: str | None = None) -> pd.DataFrame:
        """The prompt tokens of a fact: position (index), text, token (its role)."""
        rows = self.of(fact=self._only(fact)).drop_duplicates("position").set_index("position")
        tokens: pd.DataFrame = rows[["text", "token"]].sort_index()
        return tokens

    def profile(self, *, kind: str, token: str | None = None) -> pd.DataFrame:
        """The effect by layer: per fact the mean over the tokens of a role (default: the maximum over tokens), then over facts.

        From whole rows; where there are none, from each token's largest head or neuron.

        Returns:
            A table with layer, value (mean over facts), se (over facts) and n (facts).
        """
        rows: pd.DataFrame = self.of(kind=kind)
        whole = rows[rows["head"].isna() & rows["neuron"].isna()]
        if whole.empty:
            places = rows.groupby(["fact", "layer", "token", "position"], dropna=False)
            rows = places["value"].max().reset_index()
        else:
            rows = whole
        if token is not None:
            rows = rows[rows["token"] == token]
        per_fact = rows.groupby(["fact", "layer"])["value"].agg("mean" if token else "max")
        profile: pd.DataFrame = per_fact.groupby("layer").agg(value="mean", se="sem", n="count").reset_index()
        return profile

    def peak(self, *, kind: str, fact: str | None = None) -> pd.Series:
        """The row with the largest value of a fact's map."""
        rows = self.of(fact=self._only(fact), kind=kind)
        peak: pd.Series = rows.iloc[int(rows["value"].argmax())]
        return peak

    def _only(self, fact: str | None) -> str:
        if fact is None and len(self.facts) != 1:
            raise ResultError(
                f"This footprint has {len(self.facts)} facts. Name one of them, e.g. fact={self.facts[0]!r}."
            )
        return self.facts[0] if fact is None else fact


def join(parts: Iterable[R]) -> R:
    """Results of the same method on the same weights as one; tables are stacked, `facts` of the manifests joined.

    Raises:
        ResultError: there is nothing to join, or the parts differ in weights or method.
    """
    parts = list(parts)
    if not parts:
        raise ResultError("There is no result to join.")
    first = parts[0]
    for part in parts[1:]:
        for name in ("what", "weight_hash"):
            if part.run.get(name) != first.run.get(name):
                raise ResultError(
                    f"Results of different {name} cannot be joined: {first.run.get(name)} and {part.run.get(name)}."
                )
        if set(part.extras) != set(first.extras):
            tables = [", ".join(sorted(one.extras)) or "none" for one in (first, part)]
            raise ResultError(f"Results with different extra tables cannot be joined: {tables[0]} and {tables[1]}.")
    if len(parts) == 1:
        return first
    facts = list(
        {json.dumps(fact, sort_keys=True): fact for part in parts for fact in part.run.get("facts", ())}.values()
    )
    extras = {name: pd.concat([part.extras[name] for part in parts], ignore_index=True) for name in first.extras}
    if "facts" in extras:
        extras["facts"] = extras["facts"].drop_duplicates("fact", ignore_index=True)
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return type(first)(table=table, run={**first.run, "facts": facts}, extras=extras)


def manifest(
    what: str, *, model: Mapping[str, Any], parameters: Any, facts: Iterable[Any], **more: Any
) -> dict[str, Any]:
    """The manifest of a run: everything a reader needs to repeat it.

    Args:
        what: the method's name.
        model: `LM.protocol`.
        parameters: the method's hyperparameters, a dataclass or a mapping.
        facts: the facts it ran on.
        more: what else the method records, e.g. sigma, seed, self-checks.
    """
    return {
        "what": what,
        **model,
        "parameters": record(parameters),
        "facts": [record(fact) for fact in facts],
        "layer_base": 0,
        **more,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
    }


def record(thing: Any) -> Any:
    """A dataclass as plain JSON data, without the fields that are empty."""
    if not is_dataclass(thing) or isinstance(thing, type):
        return _plain(thing) if not isinstance(thing, Mapping) else dict(thing)
    values = {f.name: getattr(thing, f.name) for f in fields(thing)}
    empty = (type(None), tuple)
    return {key: _nested(value) for key, value in values.items() if value or not isinstance(value, empty)}


def question_key(run: Mapping[str, Any]) -> str:
    """A short name for the question a manifest asks: equal where `QUESTION` is equal."""
    question = {name: run.get(name) for name in QUESTION}
    text = json.dumps(question, sort_keys=True, default=_plain, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _nested(value: Any) -> Any:
    return [record(v) if is_dataclass(v) else v for v in value] if isinstance(value, tuple) else _plain(value)


def _plain(value: Any) -> Any:
    """JSON's form of what JSON does not know."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, set, frozenset, range)):
        return list(value)
    if value is None or isinstance(value, (str, int, float, bool, list, dict)):
        return value
    return str(value)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"
