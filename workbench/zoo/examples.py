"""The finished traces a first visit sees. `python -m workbench.zoo.examples` makes them, in `workbench/zoo/examples/`.

They are ordinary stored traces with default options. A change of the weights, of a fact or of a default makes new ones necessary.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from workbench import zoo
from workbench.asked import Asked
from workbench.store import Store

FOLDER = Path(__file__).parent / "examples"
"""Where they lie."""

FACTS = (
    "landmark_city/Space Needle",
    "capital/France",
    "landmark_city/Bridge of Sighs",
    "occupation/Wolfgang Amadeus Mozart",
)
"""Ids of the facts that are traced, on the first of the bundled models; the page begins with the first of them."""

_log = logging.getLogger(__name__)


def make_examples(model: str = zoo.NAMES[0], *, folder: Path = FOLDER) -> list[Asked]:
    """Traces the facts on a bundled model and stores them, in the place of what was there.

    Raises:
        KeyError: the model has no fact of this id.
    """
    from workbench.loading import load

    known = {fact.id: fact for fact in zoo.load_facts(model)}
    asked = [Asked(model=model, fact=known[name]) for name in FACTS]
    lm = load(model)
    if folder.exists():
        shutil.rmtree(folder)
    for one in asked:
        one.compute(lm, Store(folder=folder))
        _log.info("%s -> %s", one.fact.text, one.fact.target_true)
    return asked


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_examples()
