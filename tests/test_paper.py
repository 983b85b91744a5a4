"""Paper figures are vector through and through, carry their protocol, and do not change; exports read back as they were."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import QuadMesh

from analyses.locator_agreement import agreement
from tests.footprints import ODD, average, footprint, of_values, several
from workbench import drawing, export, paper, plots
from workbench.errors import InputError
from workbench.results import Footprint, ResultError, join


def methods(n: int = 3) -> list[Footprint]:
    """Made-up profiles of so many methods."""
    rng = np.random.default_rng(1)
    return [
        join([of_values([list(rng.normal(size=6))], fact=f"fact-{i}", what=f"Method{way}") for i in range(3)])
        for way in range(n)
    ]


def heads() -> Footprint:
    """Three heads in two layers, with both signs."""
    return of_values([[0.5, -1.0], [0.25, 2.0], [0.0, -3.0]], kind="z", part="head")


FIGURES = {
    "heatmap": lambda: paper.heatmap(footprint(), planted=range(2, 4)),
    "one map": lambda: paper.heatmap(footprint(), kind="mlp_out"),
    "average": lambda: paper.average(average()),
    "profile": lambda: paper.profile(several(), planted=range(2, 4)),
    "comparison": lambda: paper.compare(methods(), planted=range(2, 4)),
    "strips": lambda: paper.compare(methods(), form="strips", planted=range(2, 4)),
    "heads": lambda: paper.heads(heads()),
    "odd": lambda: paper.heatmap(footprint(ODD, subject=(5, 6), answer="$a$ <b>"), kind="mlp_out"),
}


def pdf_content(data: bytes) -> bytes:
    """A PDF with its streams inflated."""
    streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL)
    inflated = []
    for stream in streams:
        try:
            inflated.append(zlib.decompress(stream))
        except zlib.error:
            inflated.append(stream)
    return data + b"\n".join(inflated)


def meshes(figure: paper.PaperFigure) -> list[QuadMesh]:
    """The maps of a figure, without the colour bars."""
    return [ax.collections[0] for ax in figure.axes if ax.get_label() != "<colorbar>"]  # type: ignore[misc]


# --- figures ---


@pytest.mark.parametrize("column", ["score", "value"])
def test_a_map_draws_the_table(column: drawing.Column) -> None:
    result = footprint()
    for kind, mesh in zip(result.kinds, meshes(paper.heatmap(result, column=column)), strict=True):
        drawn = np.asarray(mesh.get_array()).reshape(9, 6)
        assert np.array_equal(drawn, result.grid(kind=kind, column=column).to_numpy())


def test_shares_of_a_whole_are_drawn_rather_than_raw_scores() -> None:
    traced = footprint()
    shares = type(traced)(
        table=traced.table,
        run={**traced.run, "unit": "share of the total effect in p"},
        extras=traced.extras,
    )
    for result, column in ((traced, "score"), (shares, "value")):
        (mesh,) = meshes(paper.heatmap(result, kind="mlp_out"))
        drawn = np.asarray(mesh.get_array()).reshape(9, 6)
        assert np.array_equal(drawn, result.grid(kind="mlp_out", column=column).to_numpy())


def test_screen_and_paper_agree() -> None:
    result = footprint()
    on_screen = plots.heatmap(result, kind="attn_out").data[0]
    (on_paper,) = meshes(paper.heatmap(result, kind="attn_out"))
    assert np.array_equal(np.asarray(on_paper.get_array()).reshape(9, 6), on_screen.z)
    assert on_paper.get_clim() == (on_screen.zmin, on_screen.zmax)


def test_maps_share_one_scale_unless_told_otherwise() -> None:
    result = footprint()
    assert {mesh.get_clim() for mesh in meshes(paper.heatmap(result))} == {plots.shared_range(result)}
    assert len({mesh.get_clim() for mesh in meshes(paper.heatmap(result, shared=False))}) == 3
    assert {mesh.get_clim() for mesh in meshes(paper.heatmap(result, vmin=0, vmax=1))} == {(0, 1)}


def test_the_first_token_is_on_top_and_the_subject_is_marked() -> None:
    ax = paper.heatmap(footprint(), kind="mlp_out").axes[0]
    low, high = ax.get_ylim()
    assert low > high
    assert [label.get_text() for label in ax.get_yticklabels()][:5] == ["The", "Eiff*", "el*", "Tower*", "is"]


@pytest.mark.parametrize("name", FIGURES)
def test_layers_say_that_they_are_0_based(name: str) -> None:
    figure = FIGURES[name]()
    titled = [ax.get_xlabel() for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert titled
    assert all("0-based" in title for title in titled)


@pytest.mark.parametrize("name", FIGURES)
def test_a_pdf_has_no_picture_and_truetype_fonts(name: str) -> None:
    content = pdf_content(export.figure_bytes(FIGURES[name](), "pdf"))
    assert content.startswith(b"%PDF")
    assert not re.search(rb"/Subtype\s*/Image|\bBI\b.*?\bID\b.*?\bEI\b", content)
    assert b"/FontFile2" in content
    assert b"/Type3" not in content


@pytest.mark.parametrize("name", FIGURES)
def test_an_svg_has_no_picture_and_text_as_text(name: str) -> None:
    svg = export.figure_bytes(FIGURES[name](), "svg")
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
    assert "image" not in tags
    assert "text" in tags
    assert b"Times New Roman" in svg


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("format_", ["pdf", "svg", "png"])
def test_equal_figures_give_equal_bytes(name: str, format_: str) -> None:
    assert export.figure_bytes(FIGURES[name](), format_) == export.figure_bytes(FIGURES[name](), format_)


@pytest.mark.parametrize("format_", ["pdf", "svg", "png"])
def test_a_figure_carries_its_protocol_and_no_time(format_: str) -> None:
    data = export.figure_bytes(FIGURES["heatmap"](), format_)
    for word in (b"0123456789abcdef", b"10 samples", b"sigma_t = 0.06", b"0-based"):
        assert any(form in data for form in (word, b"".join(b"\0" + bytes([c]) for c in word))), word
    assert b"2026-01-02" not in data
    assert b"CreationDate" not in data


def test_savefig_alone_carries_the_protocol_too(tmp_path: Path) -> None:
    figure = FIGURES["one map"]()
    for name in ("a.pdf", "a.svg", "a.png"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).read_bytes() == export.figure_bytes(figure, name[2:])
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_the_callers_style_changes_nothing() -> None:
    plain = export.figure_bytes(FIGURES["profile"](), "svg")
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "text.color": "red", "svg.fonttype": "path"}):
        assert export.figure_bytes(FIGURES["profile"](), "svg") == plain
        assert mpl.rcParams["font.size"] == 30


def test_figures_can_be_made_in_several_threads() -> None:
    expected = export.figure_bytes(FIGURES["heatmap"](), "svg")
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda _: export.figure_bytes(FIGURES["heatmap"](), "svg"), range(3)))
    assert all(data == expected for data in made)


def test_pyplot_is_left_alone() -> None:
    import subprocess

    code = "import sys, workbench.paper, workbench.plots, workbench.export; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_odd_tokens_stand_as_they_are() -> None:
    figure = FIGURES["odd"]()
    svg = export.figure_bytes(figure, "svg").decode()
    export.figure_bytes(figure, "png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:5] == ["<s>", "↵", "$5", "$x$", "#1"]
    assert labels[5] in ("東京*", "□□*")
    assert ">$x$<" in svg


def test_letters_that_no_font_has_become_boxes(caplog: pytest.LogCaptureFixture) -> None:
    paper._with_fonts.cache_clear()
    private = "\U0010fffd\U0010fffc"
    with caplog.at_level(logging.WARNING, logger="workbench.paper"):
        figure = paper.heatmap(footprint(("a", f"b{private}"), subject=(0, 1), answer=private), kind="mlp_out")
        svg = export.figure_bytes(figure, "svg").decode()
    assert ">b□□<" in svg
    assert "p(□□)" in svg
    assert "No installed font has" in caplog.text
    assert "Last Resort" not in svg


@pytest.mark.parametrize(
    ("texts", "n_layers", "size", "width"),
    [
        ([" A"], 1, None, 3.5),
        ([" A"], 6, "column", 3.5),
        (["a", "b"], 1, "page", 7),
        (["a", "b"], 2, (5.0, 3.0), 5),
        ([f" t{i}" for i in range(40)], 48, "page", 7),
    ],
)
def test_small_and_large_maps(texts: list[str], n_layers: int, size: paper.Size | None, width: float) -> None:
    figure = paper.heatmap(footprint(texts, subject=(0, 1), n_layers=n_layers, samples=1), kind="mlp_out", size=size)
    assert export.figure_bytes(figure, "png").startswith(b"\x89PNG")
    assert figure.get_size_inches()[0] == width


def test_a_missing_cell_stays_empty() -> None:
    result = footprint()
    table = result.table[result.table["site"] != "L2.mlp_out@3"]
    holed = type(result)(table=table, run=result.run, extras=result.extras)
    (mesh,) = meshes(paper.heatmap(holed, kind="mlp_out"))
    assert np.ma.getmaskarray(np.ma.masked_invalid(np.asarray(mesh.get_array(), dtype=float))).sum() <= 1
    export.figure_bytes(paper.heatmap(holed, kind="mlp_out"), "pdf")
    markers = plots.heatmap(holed, kind="mlp_out").data[1]
    assert len(markers.customdata) == 53


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(ResultError, match="4 facts"):
        paper.heatmap(several())
    with pytest.raises(InputError, match=r"workbench\.plots for html"):
        export.figure_bytes(FIGURES["one map"](), "html")
    with pytest.raises(InputError, match=r"workbench\.paper for pdf"):
        export.figure_bytes(plots.heatmap(footprint(), kind="mlp_out"), "pdf")


# --- several methods ---


def test_a_comparison_on_paper_is_that_on_the_screen() -> None:
    ways = methods(5)
    on_screen = {line.name: line for line in plots.compare(ways).data if line.name}
    figure = paper.compare(ways)
    drawn = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    for line, other in zip(drawn, on_screen.values(), strict=True):
        assert np.array_equal(np.asarray(line.get_ydata()), np.asarray(other.y))
        assert line.get_color() == other.line.color
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(on_screen)
    (mesh,) = meshes(paper.compare(ways, form="strips"))
    assert np.array_equal(np.asarray(mesh.get_array()).reshape(5, 6), plots.compare(ways, form="strips").data[0].z)


def test_a_comparison_carries_the_protocol_of_every_method() -> None:
    ways = methods(2)
    run = paper.compare(ways, token="last").run
    assert [method["method"] for method in run["methods"]] == ["Method0", "Method1"]
    text = export.protocol_of(run)
    assert "Comparison of tiny (weights 0123456789abcdef, float32, sdpa), 3 facts." in text
    assert "Of Method0, Method1; role last" in text
    assert all(way.key in text for way in ways)


def test_heads_and_signs_on_paper_are_those_on_the_screen() -> None:
    (mesh,) = meshes(paper.heads(heads()))
    on_screen = plots.heads(heads()).data[0]
    assert np.array_equal(np.asarray(mesh.get_array()).reshape(3, 2), on_screen.z)
    assert mesh.get_clim() == (on_screen.zmin, on_screen.zmax) == (-3, 3)
    assert mesh.cmap is not None
    middle = mesh.cmap(0.5)[:3]
    assert np.allclose(middle, 1, atol=0.01)


def test_without_a_kind_all_maps_are_drawn_and_nothing_else() -> None:
    both = join([footprint(kinds=("mlp_out",)), heads()])
    assert len(meshes(paper.heatmap(both))) == 1
    with pytest.raises(ResultError, match="No kind of this footprint has a map"):
        paper.heatmap(heads())


@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("measure", ["spearman", "distance"])
def test_agreement_on_paper_is_that_on_the_screen(n: int, measure: str) -> None:
    result = agreement(methods(n))
    figure = paper.agreement(result, measure=measure)
    (mesh,) = meshes(figure)
    on_screen, numbers = plots.agreement(result, measure=measure).data
    drawn = np.ma.filled(np.ma.masked_invalid(np.asarray(mesh.get_array(), dtype=float)), np.nan).reshape(n, n)
    assert np.array_equal(drawn, on_screen.z, equal_nan=True)
    assert [text.get_text() for text in figure.axes[0].texts] == list(numbers.text)
    content = pdf_content(export.figure_bytes(figure, "pdf"))
    assert not re.search(rb"/Subtype\s*/Image|\bBI\b.*?\bID\b.*?\bEI\b", content)
    assert b"Locator_agreement of tiny" in content


def test_labels_are_not_cut_and_a_long_unit_is_folded() -> None:
    result = footprint(kinds=("mlp_out",), texts=[f" a{i} long token" for i in range(4)], subject=(0, 1))
    run = {**result.run, "unit": "direct contribution to the centred logit of the answer"}
    facts = result.extras["facts"].drop(columns="corrupted")
    figure = paper.heatmap(type(result)(table=result.table, run=run, extras={"facts": facts}), kind="mlp_out")
    export.figure_bytes(figure, "png")
    left, right = 0.0, figure.get_figwidth() * figure.dpi
    bar = next(ax for ax in figure.axes if ax.get_label() == "<colorbar>")
    assert "\n" in bar.get_ylabel()
    for text in [*figure.axes[0].get_yticklabels(), bar.yaxis.label]:
        box = text.get_window_extent()
        assert left <= box.x0
        assert box.x1 <= right
    assert bar.yaxis.label.get_window_extent().height < figure.get_figheight() * figure.dpi


# --- tables ---


def test_csv_reads_back_with_its_protocol() -> None:
    result = footprint(ODD, subject=(5, 6))
    table, run = export.read_csv(export.csv_bytes(result))
    assert run == result.run
    pd.testing.assert_frame_equal(table, result.table, check_dtype=False)
    assert list(table["text"]) == list(result.table["text"])
    assert list(table["score"]) == list(result.table["score"])


def test_plain_pandas_reads_the_csv() -> None:
    result = footprint(("#1", " a#b", '"#"', " x\ny", ",", " last"), subject=(0, 1))
    table = pd.read_csv(io.BytesIO(export.csv_bytes(result)), comment="#")
    assert list(table["text"]) == list(result.table["text"])
    assert list(table.columns) == list(result.table.columns)
    assert np.allclose(table["score"], result.table["score"])


def test_csv_of_an_average_and_of_missing_numbers() -> None:
    result = footprint(samples=1)
    table, _ = export.read_csv(export.csv_bytes(result))
    assert table["se"].isna().all()
    table, run = export.read_csv(export.csv_bytes(average()))
    assert run["bootstrap"]["level"] == 0.95
    pd.testing.assert_frame_equal(table, average().table, check_dtype=False)


def test_parquet_reads_back_with_its_protocol() -> None:
    result = footprint(ODD, subject=(5, 6))
    data = export.parquet_bytes(result)
    table, run = export.read_parquet(data)
    assert run == result.run
    pd.testing.assert_frame_equal(table, result.table)
    assert export.parquet_bytes(result) == data
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(data)), result.table)


def test_files_of_others_are_refused() -> None:
    with pytest.raises(ResultError, match="no protocol"):
        export.read_csv(b"a,b\n1,2\n")
    buffer = io.BytesIO()
    pd.DataFrame({"a": [1]}).to_parquet(buffer)
    with pytest.raises(ResultError, match="no protocol"):
        export.read_parquet(buffer.getvalue())


def test_html_is_whole_and_carries_its_protocol() -> None:
    result = footprint(answer="</script>")
    figure = plots.heatmap(result, kind="mlp_out")
    page = export.figure_bytes(figure, "html", result=result)
    assert page == export.figure_bytes(figure, "html", result=result)
    found = re.search(rb'<script type="application/json" id="protocol">(.*?)</script>', page, re.DOTALL)
    assert found
    assert json.loads(found[1])["weight_hash"] == "0123456789abcdef"
    assert b"https://cdn" not in page.split(b"</head>")[0]
    assert export.protocol_text(result).encode()[:40] in page


# --- protocol ---


def test_the_protocol_in_sentences() -> None:
    assert export.protocol_text(footprint()) == (
        "CausalTrace of tiny (weights 0123456789abcdef, float32, sdpa), fact “The Eiffel Tower is in the city of”. "
        "Noise 0.18 (s3: sigma_t = 0.06 of 12 subjects) on the subject's embeddings; 10 samples; seed 1; "
        "MLP and attention outputs in windows of 3 layers; score p. Layers are 0-based. Torch 2.13.0."
    )
    text = export.protocol_text(average())
    assert "CausalTrace of tiny" in text
    assert "4 facts (1 left out)" in text
    assert "95 % bootstrap intervals (2000 resamples, seed 0)" in text


def test_parameters_of_other_methods_are_named() -> None:
    result = footprint()
    other = {**result.run, "what": "Zeroing", "parameters": {"kind": "mlp_out", "share": 0.5, "note": "", "window": 4}}
    text = export.protocol_text(type(result)(table=result.table, run=other))
    assert "kind mlp_out; share 0.5" in text
    assert "windows of 4 layers" in text
    assert "note" not in text
