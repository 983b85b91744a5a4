"""Results on disk, found again by the question they answer.

A store is a folder with one folder a result, named by `Result.key`. Writing is atomic (a folder is renamed into place), so a run
that is killed leaves whole results or none, and two processes may share a store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from workbench.results import Result, ResultError, question_key

R = TypeVar("R", bound=Result)


def results_folder() -> Path:
    """Where results go: the environment variable WORKBENCH_RESULTS, or `results/` in the current folder."""
    return Path(os.environ.get("WORKBENCH_RESULTS") or "results")


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of results."""

    folder: Path
    """Where results are written and looked for."""

    bundled: Path | None = None
    """A second folder that is only looked into: the examples that come with the package."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))  # a text does as well

    def find(self, run: Mapping[str, Any], kind: type[R]) -> R | None:
        """The stored result of the question that a manifest asks, or None; an incomplete one counts as none."""
        return self.get(question_key(run), kind)

    def get(self, key: str, kind: type[R]) -> R | None:
        """The stored result of a key, or None."""
        for folder in (self.folder, self.bundled):
            if folder is not None and (folder / key / "run.json").is_file():
                try:
                    return kind.load(folder / key)
                except ResultError:
                    continue
        return None

    def save(self, result: Result) -> Path:
        """Writes a result and returns its folder."""
        return result.save(self.folder / result.key)

    def manifests(self) -> list[tuple[str, dict[str, Any]]]:
        """Key and manifest of every result in `folder`, the newest first; what is no manifest is passed over."""
        found = []
        for path in self.folder.glob("*/run.json"):
            try:
                run = json.loads(path.read_text())
                if isinstance(run, dict):
                    found.append((path.stat().st_mtime, path.parent.name, run))
            except (OSError, ValueError, RecursionError):
                continue
        return [(key, run) for _, key, run in sorted(found, key=lambda entry: entry[0], reverse=True)]
