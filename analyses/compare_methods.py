"""What the page that compares methods needs: one fact put to many methods, their stored answers, figure, table and agreement.

Nothing here loads a model, so what is stored is shown at once; `agree` alone imports the locators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workbench.asked import Asked, Listed
from workbench.facts import Fact
from workbench.jobs import ModelChoice
from workbench.profiles import comparison_manifest, layer_profiles
from workbench.results import Footprint, Result, join
from workbench.sites import Role
from workbench.store import Store

QUICK = (
    "ActivationPatching", "AttentionKnockout", "AttributionPatching", "CausalTrace", "DirectLogitAttribution",
    "KnowledgeNeurons", "LogitLens", "RepresentationZeroing", "ValueVectors",
)  # fmt: skip
"""Methods that take seconds for one fact on a bundled model."""


def questions(choice: ModelChoice, fact: Fact, *, methods: Iterable[str]) -> tuple[Asked, ...]:
    """One fact as a question to each method, with the method's own defaults."""
    return tuple(Asked(model=choice.name, dtype=choice.dtype, fact=fact, method=method) for method in methods)


def collect(store: Store, asked: Sequence[Asked], *, others: Sequence[Listed] = ()) -> dict[str, Footprint]:
    """The whole answers that a store has, by method; what is only stored in part is left out.

    Args:
        store: where results are.
        asked: one question a method.
        others: questions about further facts. Their answers are joined where weights and parameters are the same.
    """
    found: dict[str, Footprint] = {}
    for one in asked:
        own = _whole(store, one)
        if own is None:
            continue
        same = [
            piece
            for other in others
            if _differs_in_fact(other.asked, one) and (piece := _whole(store, other.asked)) is not None
            if _setting(piece) == _setting(own)
        ]
        found[one.method] = join([own, *{piece.facts: piece for piece in same}.values()])
    return found


def compared(
    footprints: Sequence[Footprint], *, kinds: Sequence[str] | None = None, token: Role | None = None
) -> Result:
    """`layer_profiles` with a protocol: the numbers behind `plots.compare`.

    Raises:
        ResultError: nothing to compare, other weights, no fact or no such kind in common, or one series twice.
    """
    run = comparison_manifest("Comparison", footprints, kinds=kinds, token=token)
    return Result(table=layer_profiles(footprints, kinds=kinds, token=token), run=run)


def agree(footprints: Sequence[Footprint], *, kinds: Sequence[str] | None = None, token: Role | None = None) -> Result:
    """`locator_agreement.agreement`, imported when it is needed."""
    from analyses.locator_agreement import agreement

    return agreement(footprints, kinds=kinds, token=token)


def _whole(store: Store, asked: Asked) -> Footprint | None:
    stored = asked.find(store)
    return stored.footprint if stored is not None and not stored.missing else None


def _differs_in_fact(one: Asked, other: Asked) -> bool:
    """Whether two questions differ in the fact and in nothing else."""
    told = [(asked.model, asked.dtype, asked.method, dict(asked.options)) for asked in (one, other)]
    return told[0] == told[1] and one.fact.id != other.fact.id


def _setting(footprint: Footprint) -> tuple[object, ...]:
    return footprint.run.get("weight_hash"), footprint.run.get("parameters")
