"""The index of value vectors is the dense projection, however it was cut, stopped and gone on with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.examples import fresh_lm, tiny_lm
from workbench import vocabulary
from workbench.models import LM
from workbench.progress import Cancelled, reporting
from workbench.vocabulary import (
    Projection,
    TokenIndex,
    VocabularyError,
    build_index,
    find_index,
    neuron_tokens,
    project,
    readable,
    spellings,
    value_vectors,
)

PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


def dense(lm: LM, projection: Projection = "normed") -> Tensor:
    """Every value vector times every token: (layer x neuron, d_vocab)."""
    layers = range(lm.n_layers)
    return torch.cat(
        [project(lm, readable(lm, layer, value_vectors(lm, layer), projection=projection)) for layer in layers]
    )


def tables(index: TokenIndex) -> list[pd.DataFrame]:
    """All that an index says."""
    n_layers, d_mlp = index.run["n_layers"], index.run["d_mlp"]
    neurons = [index.tokens(layer, neuron) for layer in range(n_layers) for neuron in range(0, d_mlp, 7)]
    return [*neurons, *(index.search(token) for token in range(0, index.run["d_vocab"], 11))]


def assert_equal(one: TokenIndex, other: TokenIndex) -> None:
    for mine, its in zip(tables(one), tables(other), strict=True):
        pd.testing.assert_frame_equal(mine, its, rtol=1e-5, atol=1e-6)


def test_a_value_vector_is_what_a_unit_of_activation_adds(lm: LM) -> None:
    for layer in (0, lm.n_layers - 1):
        down = lm.part(layer, lm.layout.down_proj)
        with torch.no_grad():
            units = down(torch.eye(lm.d_mlp)) - down(torch.zeros(1, lm.d_mlp))
        torch.testing.assert_close(value_vectors(lm, layer), units, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(value_vectors(lm, 1, [5, 2]), value_vectors(lm, 1)[[5, 2]])


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_projection_is_the_models_own_reading_but_for_a_norms_divisor(lm: LM, projection: Projection) -> None:
    """Norms divide and shift: what is left of them after the shift is proportional, neuron by neuron, to the projection."""
    some = value_vectors(lm, 2, slice(0, 9))
    parts = [lm.part(2, lm.layout.mlp_out)] if not lm.layout.down_proj.startswith(lm.layout.mlp_out) else []
    bias = getattr(lm.unembed, "bias", None)
    with torch.no_grad():
        read = some
        for norm in [*parts, *([lm.final_norm] if projection == "normed" else [])]:
            read = norm(read) - norm(torch.zeros_like(read))
        logits = lm.unembed(read) - (0 if bias is None else bias)
    found = project(lm, readable(lm, 2, some, projection=projection))
    ratio = found.norm(dim=1, keepdim=True) / logits.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, ratio * logits, atol=1e-4, rtol=1e-3)
    if projection == "plain" and not parts:
        torch.testing.assert_close(found, logits * getattr(lm.model.config, "logit_scale", 1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi"])
def test_the_index_is_the_dense_projection(family: str, projection: Projection, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    expected = dense(lm, projection).numpy()
    index = build_index(lm, projection=projection, tokens=4, neurons=6, folder=tmp_path, memory=8 * lm.d_vocab * 30)
    for flat in range(0, len(expected), 13):
        layer, neuron = divmod(flat, lm.d_mlp)
        table = index.tokens(layer, neuron)
        values = np.sort(expected[flat])
        np.testing.assert_allclose(table["value"], [*values[::-1][:4], *values[:4]], atol=1e-5)
        np.testing.assert_allclose(expected[flat][table["token_id"]], table["value"], atol=1e-5)
        assert list(table["direction"]) == ["promoted"] * 4 + ["suppressed"] * 4
        pd.testing.assert_frame_equal(neuron_tokens(lm, layer, neuron, projection=projection, k=4), table)
    for token in range(0, lm.d_vocab, 17):
        found = index.search(token)
        np.testing.assert_allclose(found["value"], np.sort(expected[:, token])[::-1][:6], atol=1e-5)
        flat_ids = found["layer"] * lm.d_mlp + found["neuron"]
        np.testing.assert_allclose(expected[flat_ids, token], found["value"], atol=1e-5)
        places = (expected[flat_ids] > expected[flat_ids, token][:, None]).sum(1)
        assert found["rank"].isna().tolist() == (places >= 4).tolist()
        assert found["rank"].dropna().tolist() == places[places < 4].tolist()
        pd.testing.assert_frame_equal(index.search(token, n=2), found.head(2))


def test_chunks_are_as_small_as_memory_asks_and_make_no_difference(
    gpt2: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def noted(lm: LM, vectors: Tensor) -> Tensor:
        rows.append(len(vectors))
        return project(lm, vectors)

    whole = build_index(gpt2, folder=tmp_path / "whole")
    monkeypatch.setattr(vocabulary, "project", noted)
    for width in (1, 7, 80):
        rows.clear()
        index = build_index(gpt2, folder=tmp_path / str(width), memory=8 * gpt2.d_vocab * width)
        assert max(rows) == width
        assert sum(rows) == gpt2.n_layers * gpt2.d_mlp
        assert_equal(index, whole)
    rows.clear()
    assert_equal(build_index(gpt2, folder=tmp_path / "whole"), whole)
    assert not rows


@pytest.mark.parametrize("stop", range(1, 12, 2))
def test_a_stopped_build_leaves_no_index_and_goes_on_after_its_last_layer(gpt2: LM, tmp_path: Path, stop: int) -> None:
    memory = 8 * gpt2.d_vocab * 27  # three chunks a layer
    totals: list[int] = []

    def listen(what: str, done: int, total: int) -> None:
        if done == stop:
            raise Cancelled

    with pytest.raises(Cancelled), reporting(listen):
        build_index(gpt2, folder=tmp_path, memory=memory)
    assert find_index(gpt2, folder=tmp_path) is None
    with reporting(lambda what, done, total: totals.append(total)):
        index = build_index(gpt2, folder=tmp_path, memory=memory)
    assert set(totals) == {3 * (gpt2.n_layers - stop // 3)}
    assert_equal(index, build_index(gpt2, folder=tmp_path / "whole"))
    assert not list(index.folder.glob(".*"))


@pytest.mark.parametrize("name", ["index.json", "neurons.npy", "values.npy", "layer-001.npz"])
@pytest.mark.parametrize("kept", [0, 7, -9, None])
def test_an_index_of_which_a_file_is_broken_is_none_and_built_again(
    gpt2: LM, tmp_path: Path, name: str, kept: int | None
) -> None:
    index, whole = (build_index(gpt2, folder=tmp_path / name) for name in ("one", "other"))
    broken = index.folder / name
    if kept is None:
        broken.unlink()
    else:
        broken.write_bytes(broken.read_bytes()[:kept])
    assert find_index(gpt2, folder=tmp_path / "one") is None
    assert_equal(build_index(gpt2, folder=tmp_path / "one"), whole)


def test_an_index_belongs_to_its_weights_and_settings(gpt2: LM, tmp_path: Path) -> None:
    index = build_index(gpt2, folder=tmp_path, neurons=3)
    assert index.run["weight_hash"] == gpt2.weight_hash
    assert index.run["layer_base"] == 0
    assert find_index(gpt2, folder=tmp_path, neurons=3) is not None
    assert find_index(gpt2, folder=tmp_path, neurons=4) is None
    assert find_index(gpt2, folder=tmp_path, neurons=3, projection="plain") is None
    changed = fresh_lm("gpt2")
    with torch.no_grad():
        changed.part(0, changed.layout.down_proj).get_parameter("weight")[0] += 1
    assert find_index(changed, folder=tmp_path, neurons=3) is None


def test_indices_lie_in_the_results_folder(gpt2: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    assert build_index(gpt2).folder.parent == tmp_path / "vocabulary"


def test_more_than_there_is_is_not_found(gpt2: LM, tmp_path: Path) -> None:
    n = gpt2.n_layers * gpt2.d_mlp
    index = build_index(gpt2, folder=tmp_path, neurons=n + 5, tokens=10**6)
    everything = index.search(3, n=10**6)
    assert len(everything) == len(everything[["layer", "neuron"]].drop_duplicates()) == n
    assert everything["rank"].notna().all()
    assert len(index.tokens(0, 0)) == 2 * gpt2.d_vocab


def test_a_words_token_comes_with_its_space_first(gpt2: LM) -> None:
    ids = {text: gpt2.tokenizer(text)["input_ids"] for text in (" The", "The", " is", "is")}
    assert {text: len(pieces) for text, pieces in ids.items()} == {" The": 1, "The": 1, " is": 1, "is": 2}
    assert spellings(gpt2, "The") == (*ids[" The"], *ids["The"])
    assert spellings(gpt2, " is ") == spellings(gpt2, "is") == tuple(ids[" is"])
    assert spellings(tiny_lm("mistral"), "is") == (325,)  # whose tokenizer brings the space itself
    with pytest.raises(VocabularyError, match="no single token of tiny-gpt2, but"):
        spellings(gpt2, "incomprehensible")
    with pytest.raises(VocabularyError, match="empty"):
        spellings(gpt2, " ")


def test_what_does_not_exist_is_refused(gpt2: LM, tmp_path: Path) -> None:
    index = build_index(gpt2, folder=tmp_path)
    for token in (-1, gpt2.d_vocab):
        with pytest.raises(VocabularyError, match=f"no token {token}"):
            index.search(token)
    for layer, neuron in ((-1, 0), (4, 0), (0, 80), (0, -1)):
        with pytest.raises(VocabularyError, match="layers 0 to 3 and neurons 0 to 79"):
            index.tokens(layer, neuron)
        with pytest.raises(VocabularyError, match="layers 0 to 3 and neurons 0 to 79"):
            neuron_tokens(gpt2, layer, neuron, projection="plain")
    with pytest.raises(VocabularyError, match="one of plain, normed"):
        build_index(gpt2, projection="other")  # type: ignore[arg-type]
    with pytest.raises(VocabularyError, match="expected 1 or more"):
        build_index(gpt2, memory=0)


@pytest.mark.parametrize("text", ["{}", "[]", "3"])
def test_an_index_that_says_nothing_of_itself_is_built_again(gpt2: LM, tmp_path: Path, text: str) -> None:
    index = build_index(gpt2, folder=tmp_path)
    (index.folder / "index.json").write_text(text)
    assert find_index(gpt2, folder=tmp_path) is None
    assert build_index(gpt2, folder=tmp_path).run == index.run


@pytest.mark.parametrize("name", ["state.npz", "layer-000.npz"])
def test_a_stopped_build_of_which_a_file_is_cut_begins_anew(gpt2: LM, tmp_path: Path, name: str) -> None:
    def listen(what: str, done: int, total: int) -> None:
        if done == gpt2.n_layers - 1:
            raise Cancelled

    with pytest.raises(Cancelled), reporting(listen):
        build_index(gpt2, folder=tmp_path / "one")
    (cut,) = (tmp_path / "one").glob(f"*/{name}")
    cut.write_bytes(cut.read_bytes()[:100])
    assert_equal(build_index(gpt2, folder=tmp_path / "one"), build_index(gpt2, folder=tmp_path / "other"))


def test_a_layer_that_is_damaged_later_is_told_in_a_sentence(gpt2: LM, tmp_path: Path) -> None:
    index = build_index(gpt2, folder=tmp_path)
    (index.folder / "layer-001.npz").write_bytes(b"PK")
    with pytest.raises(VocabularyError, match=r"layer-001\.npz of the index cannot be read"):
        index.tokens(1, 0)


def test_threads_that_build_the_same_index_both_get_it(gpt2: LM, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        built = list(threads.map(lambda _: build_index(gpt2, folder=tmp_path / "one"), range(4)))
    whole = build_index(gpt2, folder=tmp_path / "other")
    for index in built:
        assert_equal(index, whole)
    assert not list(built[0].folder.glob(".*"))
