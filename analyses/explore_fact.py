"""What the page on one fact shows beside its maps: the model's next tokens, and one site with its logit lens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench import zoo
from workbench.drawing import restored_layers
from workbench.facts import Fact
from workbench.results import Footprint
from workbench.sites import Site, SiteError

if TYPE_CHECKING:
    from workbench.jobs import ModelChoice
    from workbench.models import LM


@dataclass(frozen=True, kw_only=True)
class Look:
    """A fact as the model sees it, before any tracing."""

    top: tuple[tuple[str, float], ...]
    """Next tokens and their probabilities, the most probable first."""

    answer: str
    """The fact's answer, or the model's own where the fact names none."""

    answer_p: float
    """Probability of the answer's first token."""

    answer_rank: int
    """How many tokens are more probable than it; 0: the model says the answer."""

    answer_tokens: tuple[str, ...]
    """The answer as tokens; scores of one token use the first."""

    subject_tokens: tuple[str, ...]
    """The tokens that count as the subject."""


@dataclass(frozen=True, kw_only=True)
class SiteNumbers:
    """What a trace says about one cell of a map."""

    site: Site
    """Where."""

    text: str
    """The token there."""

    role: str
    """The token's role in the prompt."""

    restored: range
    """The layers restored together for this cell."""

    score: float
    """Mean score with the cell restored."""

    se: float
    """Standard error of `change` over the noise samples; NaN for one sample."""

    change: float
    """What the score gained over the corrupted run (its sign turned where lower is better)."""

    share: str
    """`change` as a part of what the corruption took, in words; empty where it took nothing."""

    samples: tuple[float, ...]
    """The score of every noise sample with the cell restored."""

    corrupted: tuple[float, ...]
    """The same samples' scores with nothing restored."""

    clean: float
    """The clean run's score."""


@dataclass(frozen=True, kw_only=True)
class Lens:
    """The logit lens at one site of the clean run: what the final norm and the unembedding read there."""

    top: tuple[tuple[str, float], ...]
    """Tokens and probabilities, the most probable first."""

    answer: str
    """The answer that is looked for."""

    answer_p: float
    """Probability of its first token."""

    answer_rank: int
    """How many tokens are more probable."""


def load_model(choice: ModelChoice) -> LM:
    """The model, checked; runs in a worker, and is the first to import torch.

    Raises:
        ModelError: it cannot be loaded, or does not have the shape of its family.
    """
    from workbench.checks import self_checks
    from workbench.loading import load

    lm = load(choice.name, dtype=choice.dtype)
    self_checks(lm)
    return lm


def look(lm: LM, fact: Fact, *, k: int = 8) -> Look:
    """What the model says after the prompt.

    Raises:
        ModelError: the prompt is too long, or the tokenizer does not keep subject or answer apart.
    """
    from workbench.hooks import run
    from workbench.locators.tracing import find_answer
    from workbench.metrics import top_tokens

    tokens = lm.encode([fact])
    clean = run(lm, tokens)
    answer = find_answer(lm, fact, clean)
    logits = clean.last_logits[0].float()
    span = tokens.spans[0] or (0, 0)
    return Look(
        top=tuple(top_tokens(lm, logits, k)),
        answer=answer.text,
        answer_p=float(logits.softmax(-1)[answer.ids[0]]),
        answer_rank=int((logits > logits[answer.ids[0]]).sum()),
        answer_tokens=tuple(lm.word(i) for i in answer.ids),
        subject_tokens=tokens.texts[0][span[0] : span[1]],
    )


def numbers_at(footprint: Footprint, site: Site) -> SiteNumbers:
    """A cell of a traced fact.

    Raises:
        SiteError: the trace has no such cell.
    """
    rows = footprint.table[footprint.table["site"] == str(site)]
    if rows.empty:
        raise SiteError(f"{site} is not in this trace. Click on a cell of a map.")
    row, fact = rows.iloc[0], footprint.extras["facts"].iloc[0]
    samples = footprint.extras["samples"]
    samples = samples[samples["site"] == str(site)]
    gap = float(fact["total_effect"])
    return SiteNumbers(
        site=site,
        text=str(row["text"]),
        role=str(row["token"]).replace("_", " "),
        restored=restored_layers(footprint, kind=site.kind, layer=site.layer),
        score=float(row["score"]),
        se=float(row["se"]),
        change=float(row["value"]),
        share=f"{round(100 * float(row['value']) / gap)} % of what was lost." if not doubt(footprint) else "",
        samples=tuple(samples["score"]),
        corrupted=tuple(samples["corrupted"]),
        clean=float(fact["clean"]),
    )


def lens_at(lm: LM, fact: Fact, *, site: Site, k: int = 8) -> Lens:
    """What one site of the clean run says, read as if it were the last layer's output.

    For `attn_out` and `mlp_out` it reads that layer's own addition alone, whatever window the map used.
    """
    from workbench.hooks import run
    from workbench.locators.tracing import find_answer
    from workbench.metrics import lens_logits, top_tokens

    clean = run(lm, lm.encode([fact]), read=(site,))
    answer = find_answer(lm, fact, clean)
    logits = lens_logits(lm, clean[site])[0].float()
    return Lens(
        top=tuple(top_tokens(lm, logits, k)),
        answer=answer.text,
        answer_p=float(logits.softmax(-1)[answer.ids[0]]),
        answer_rank=int((logits > logits[answer.ids[0]]).sum()),
    )


def doubt(footprint: Footprint) -> str:
    """Why the maps say nothing about the fact, in a sentence; empty where the corruption did what it is for.

    That is where the gap between clean and corrupted run is not larger than two standard errors of the corrupted score.
    """
    fact = footprint.extras["facts"].iloc[0]
    noise = 2 * float(fact["corrupted_se"]) if fact["corrupted_se"] == fact["corrupted_se"] else 0.0
    if float(fact["total_effect"]) > noise:
        return ""
    return (
        "The corruption did not take the answer away, so there is nothing to restore and the maps say nothing about the fact. "
        "Use more noise, or a sentence whose answer depends on the subject."
    )


def default_site(footprint: Footprint) -> Site:
    """The cell with the largest effect in the map of the MLP's output, or in the first map where that is not among them."""
    kind = "mlp_out" if "mlp_out" in footprint.kinds else footprint.kinds[0]
    return Site.parse(str(footprint.peak(kind=kind)["site"]))


def planted_band(model: str) -> range | None:
    """The layers whose MLPs a bundled model's facts were trained into; None where nothing was planted."""
    if model not in zoo.NAMES:
        return None
    band = zoo.organism(model).get("band")
    return None if band is None else range(int(band[0]), int(band[1]))
