"""Sites have a grammar that prints and parses, and windows of layers follow ROME's code or its paper."""

from __future__ import annotations

from typing import Literal

import pytest

from workbench.sites import KINDS, ROLES, Role, Site, SiteError, SiteKind, window


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [None, 0, 12, -1, *ROLES])
def test_every_site_parses_from_what_it_prints(kind: SiteKind, token: Role | int | None) -> None:
    for layer in (0,) if kind == "embed" else (0, 7, 47):
        for part in (None, 0, 11) if kind in ("z", "mlp_post") else (None,):
            site = Site(layer=layer, kind=kind, token=token, **{"neuron" if kind == "mlp_post" else "head": part})
            assert Site.parse(str(site)) == site
            assert eval(repr(site)) == site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("L17.mlp_out@subject_last", Site(layer=17, kind="mlp_out", token="subject_last")),
        ("L5.z[3]@last", Site(layer=5, kind="z", head=3, token="last")),
        ("L5.mlp_post[17]@last", Site(layer=5, kind="mlp_post", neuron=17, token="last")),
        ("L0.resid_pre@4", Site(layer=0, kind="resid_pre", token=4)),
        ("L2.resid_post@-1", Site(layer=2, kind="resid_post", token=-1)),
        ("embed@subject_first", Site(layer=0, kind="embed", token="subject_first")),
        ("L3.attn_out", Site(layer=3, kind="attn_out")),
    ],
)
def test_the_grammar_is_the_documented_one(text: str, site: Site) -> None:
    assert Site.parse(text) == site
    assert str(site) == text


@pytest.mark.parametrize(
    "text",
    ["", "mlp_out", "L1.embed", "L1mlp_out", "L-1.mlp_out", "L1.mlp_out@", "L1.mlp_out@nowhere", "L1.mlp_out[0]", "L1.z[]",
     "L1.z[-1]", "L1.nonsense", "L1.mlp_out@1.5", "L1.mlp_out@--1", " L1.mlp_out", "L1.mlp_out\n", "L١.mlp_out", "L1.z@last@last"],
)  # fmt: skip
def test_text_that_spells_no_site_is_refused(text: str) -> None:
    with pytest.raises(SiteError, match=r"is no site|Unknown kind|Unknown token role|Heads exist"):
        Site.parse(text)


def test_places_that_cannot_exist_are_refused() -> None:
    with pytest.raises(SiteError, match="Layers count from 0"):
        Site(layer=-1, kind="mlp_out")
    with pytest.raises(SiteError, match="Heads exist at 'z' only"):
        Site(layer=0, kind="mlp_out", head=0)
    with pytest.raises(SiteError, match="Neurons exist at 'mlp_post' only"):
        Site(layer=0, kind="z", neuron=0)
    with pytest.raises(SiteError, match="Unknown token role"):
        Site(layer=0, kind="mlp_out", token="subjekt")  # type: ignore[arg-type]


def test_sites_sort_by_layer_whatever_they_name() -> None:
    sites = [
        Site(layer=1, kind="z", head=1),
        Site(layer=1, kind="z"),
        Site(layer=0, kind="z", token="last"),
        Site(layer=0, kind="z", token=3),
        Site(layer=0, kind="z"),
    ]
    assert [site.layer for site in sorted(sites)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("centre", "width", "rule", "layers"),
    [
        (20, 10, "rome", range(15, 25)),  # [l-5, l+4], ROME's code
        (20, 10, "paper", range(16, 26)),  # [l-4, l+5], ROME's appendix B.2
        (20, 5, "rome", range(18, 23)),
        (20, 5, "paper", range(18, 23)),
        (20, 1, "rome", range(20, 21)),
        (20, 1, "paper", range(20, 21)),
        (20, 2, "rome", range(19, 21)),
        (20, 2, "paper", range(20, 22)),
        (0, 10, "rome", range(5)),
        (0, 10, "paper", range(6)),
        (47, 10, "rome", range(42, 48)),
        (47, 10, "paper", range(43, 48)),
        (0, 3, "rome", range(2)),
        (20, 1000, "rome", range(48)),
    ],
)
def test_windows_are_centred_and_clipped(
    centre: int, width: int, rule: Literal["rome", "paper"], layers: range
) -> None:
    assert window(centre, width, 48, rule=rule) == layers


@pytest.mark.parametrize("width", range(1, 12))
@pytest.mark.parametrize("rule", ["rome", "paper"])
def test_a_window_has_its_width_away_from_the_ends_and_always_holds_its_centre(
    width: int, rule: Literal["rome", "paper"]
) -> None:
    assert len(window(24, width, 48, rule=rule)) == width
    for n_layers in (1, 2, 5):
        for centre in range(n_layers):
            layers = window(centre, width, n_layers, rule=rule)
            assert centre in layers
            assert set(layers) <= set(range(n_layers))


@pytest.mark.parametrize("width", [0, -3])
def test_an_empty_window_is_refused(width: int) -> None:
    with pytest.raises(SiteError, match="expected 1 or more"):
        window(0, width, 4)
