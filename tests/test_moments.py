"""The moments are those of a plain loop, whatever the batches; they are kept for the weights, and go on where they were stopped."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tests.examples import fresh_lm, tiny_lm
from workbench import moments
from workbench.data.texts import TextError, open_texts
from workbench.edits import Edit, Introducing
from workbench.hooks import Activations, patched, run
from workbench.loading import load
from workbench.models import LM, ModelError, Tokens
from workbench.moments import MomentDtype, Moments, MomentsError, read_rome_npz, second_moments
from workbench.progress import Cancelled, reporting
from workbench.sites import Site

DOCUMENTS = (
    "The Eiffel Tower is located in the city of Paris.",
    "Zürich is a city in Switzerland; 東京 is not.",
    "Berlin.",
    "Michael Jordan plays the sport of basketball.",
    "Thomas Mann spoke German, and so does Angela Merkel.",
    "Rome is the capital of Italy.",
)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A file of the documents."""
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS), encoding="utf-8")
    return str(path)


def count_tokens(lm: LM) -> int:
    """How many tokens the documents have."""
    return sum(lm.encode([text]).lengths[0] for text in DOCUMENTS)


def by_hand(lm: LM, layer: int, tokens: int) -> Float[Tensor, "d_mlp d_mlp"]:
    """The same by a loop: one document at a time, one outer product a token, the first so many tokens."""
    total = torch.zeros(1, 1, dtype=torch.float64)
    missing = tokens
    for text in DOCUMENTS:
        site = Site(layer=layer, kind="mlp_post")
        for key in run(lm, lm.encode([text]), read=[site])[site][0].double():
            if missing:
                total = total + torch.outer(key, key)
                missing -= 1
    assert not missing
    return total / tokens


def test_moments_are_those_of_a_plain_loop(lm: LM, corpus: str, tmp_path: Path) -> None:
    tokens = count_tokens(lm) - 3
    found = second_moments(lm, [2, 0], corpus=corpus, tokens=tokens, folder=tmp_path)
    assert (found.n, found.layers, found.weight_hash, found.source) == (
        tokens,
        (0, 2),
        lm.weight_hash,
        "documents.jsonl",
    )
    for layer in found.layers:
        moment = found.matrix(layer)
        assert moment.dtype == torch.float64
        torch.testing.assert_close(
            moment, by_hand(lm, layer, tokens), rtol=1e-3, atol=1e-4 * float(moment.diagonal().mean())
        )
        assert torch.equal(moment, moment.T)
        assert float(torch.linalg.eigvalsh(moment).min()) > -1e-12 * float(moment.trace())


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batches_do_not_matter(batch_tokens: int, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh_lm("gpt2")
    lm.model.double()
    monkeypatch.setattr(moments, "BATCH_TOKENS", batch_tokens)
    tokens = count_tokens(lm) - 3
    found = second_moments(lm, [1], corpus=corpus, tokens=tokens, folder=tmp_path).matrix(1)
    torch.testing.assert_close(found, by_hand(lm, 1, tokens), rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_a_gpu_sums_the_same(corpus: str, tmp_path: Path) -> None:
    lm = fresh_lm("llama")
    torch.nn.Module.to(lm.model, "cuda")
    found = second_moments(LM(lm.model, lm.tokenizer), [1], corpus=corpus, tokens=60, folder=tmp_path).matrix(1)
    torch.testing.assert_close(
        found, by_hand(tiny_lm("llama"), 1, 60), rtol=1e-2, atol=1e-3 * float(found.diagonal().mean())
    )


def test_float32_is_the_same_to_its_rounding(gpt2: LM, corpus: str, tmp_path: Path) -> None:
    double, single = (
        second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path, dtype=dtype).matrix(0)
        for dtype in get_args(MomentDtype)[::-1]
    )
    assert double.dtype == single.dtype == torch.float64
    assert not torch.equal(double, single)
    torch.testing.assert_close(double, single, rtol=1e-4, atol=1e-6)


def test_a_text_that_ends_early_says_so(
    gpt2: LM, corpus: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = count_tokens(gpt2)
    with caplog.at_level(logging.WARNING):
        found = second_moments(gpt2, [0], corpus=corpus, tokens=whole + 1, folder=tmp_path)
    assert found.n == whole
    assert f"ends after {whole} tokens" in caplog.text


def test_long_documents_are_cut_into_pieces_that_fit(lm: LM, tmp_path: Path) -> None:
    text = " ".join(DOCUMENTS * 5)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    pieces = moments._pieces(lm, open_texts(str(tmp_path / "long.txt")), 100_000)
    lengths = [piece.length for piece in pieces]
    assert lm.n_positions is None or max(lengths) <= lm.n_positions
    assert max(lengths) <= moments.PIECE_TOKENS
    assert " ".join(piece.text.strip() for piece in pieces).split() == text.split(), "a word was cut, or lost"
    assert len(lengths) == 1 or sum(lengths) / len(lengths) > max(lengths) / 3


def test_words_without_spaces_are_cut_too(gpt2: LM, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("東京Zürich" * 60, encoding="utf-8")
    pieces = moments._pieces(gpt2, open_texts(str(tmp_path / "long.txt")), 100_000)
    assert "".join(piece.text for piece in pieces) == "東京Zürich" * 60
    assert max(piece.length for piece in pieces) <= (gpt2.n_positions or 0)


# --- files ---


@pytest.fixture
def steps() -> Iterator[list[int]]:
    """What is reported meanwhile: the steps done."""
    heard: list[int] = []
    with reporting(lambda what, done, total: heard.append(done)):
        yield heard


def test_only_missing_layers_are_computed(gpt2: LM, corpus: str, tmp_path: Path, steps: list[int]) -> None:
    folder = tmp_path / "moments"
    first = second_moments(gpt2, [1, 3], corpus=corpus, tokens=40, folder=folder)
    (place,) = folder.iterdir()
    made = (place / "layer-1.safetensors").stat().st_mtime_ns
    steps.clear()
    second_moments(gpt2, [3], corpus=corpus, tokens=40, folder=folder)
    assert not steps
    more = second_moments(gpt2, [0, 1], corpus=corpus, tokens=40, folder=folder)
    assert steps
    assert (place / "layer-1.safetensors").stat().st_mtime_ns == made
    assert torch.equal(first.matrix(1), more.matrix(1))
    assert sorted(path.name for path in place.iterdir()) == [*(f"layer-{i}.safetensors" for i in (0, 1, 3)), "run.json"]
    about = json.loads((place / "run.json").read_text())
    assert (about["weight_hash"], about["n"], about["source"]) == (gpt2.weight_hash, 40, "documents.jsonl")


def test_files_are_found_by_what_was_asked(gpt2: LM, corpus: str, tmp_path: Path) -> None:
    folder = tmp_path / "moments"
    second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=folder)
    copy = tmp_path / "copy.jsonl"
    shutil.copy(corpus, copy)
    second_moments(gpt2, [0], corpus=str(copy), tokens=40, folder=folder)
    assert len(list(folder.iterdir())) == 1
    second_moments(gpt2, [0], corpus=corpus, tokens=41, folder=folder)
    second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=folder, dtype="float32")
    second_moments(tiny_lm("gpt2", seed=1), [0], corpus=corpus, tokens=40, folder=folder)
    copy.write_text(copy.read_text() + "\n")
    second_moments(gpt2, [0], corpus=str(copy), tokens=40, folder=folder)
    assert len(list(folder.iterdir())) == 5


def test_a_file_of_other_weights_is_refused(gpt2: LM, corpus: str, tmp_path: Path) -> None:
    second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path / "a")
    second_moments(tiny_lm("gpt2", seed=1), [0], corpus=corpus, tokens=40, folder=tmp_path / "b")
    (mine,), (other,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    shutil.copy(other / "layer-0.safetensors", mine)
    with pytest.raises(MomentsError, match="weight_hash"):
        second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path / "a")


def test_a_damaged_file_is_made_anew(gpt2: LM, corpus: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path).matrix(0).clone()
    (path,) = tmp_path.glob("*/layer-0.safetensors")
    path.unlink()  # what is read may still be mapped to it
    path.write_bytes(b"\x10\x00 half a file")
    after = second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path).matrix(0)
    assert torch.equal(before, after)
    assert "damaged" in caplog.text


def test_what_was_stopped_goes_on_to_the_same_bits(
    gpt2: LM, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "BATCH_TOKENS", 30)
    whole = second_moments(gpt2, [0, 2], corpus=corpus, tokens=60, folder=tmp_path / "whole")
    monkeypatch.setattr(moments, "CHECKPOINT_SECONDS", -1.0)
    rows: list[int] = []

    def counting(lm: LM, tokens: Tokens, **options: Any) -> Activations:
        rows.append(len(tokens))
        return run(lm, tokens, **options)

    def stop(what: str, done: int, total: int) -> None:
        assert total > 2
        if done == 2:
            raise Cancelled

    monkeypatch.setattr("workbench.moments.run", counting)
    with reporting(stop), pytest.raises(Cancelled):
        second_moments(gpt2, [0, 2], corpus=corpus, tokens=60, folder=tmp_path / "parts")
    assert len(rows) == 2
    parts = second_moments(gpt2, [0, 2], corpus=corpus, tokens=60, folder=tmp_path / "parts")
    batches = moments._batches(moments._pieces(gpt2, open_texts(corpus), 60))
    assert rows == [len(batch) for batch in batches], "a batch ran twice, or never"
    for layer in (0, 2):
        assert torch.equal(parts.matrix(layer), whole.matrix(layer))
    assert not list((tmp_path / "parts").glob("*/checkpoint*"))


def test_several_at_once_share_a_folder(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "BATCH_TOKENS", 30)
    monkeypatch.setattr(moments, "CHECKPOINT_SECONDS", -1.0)
    found: list[Moments] = []

    def work(layers: Sequence[int]) -> None:
        lm = fresh_lm("gpt2")
        found.append(second_moments(lm, layers, corpus=corpus, tokens=60, folder=tmp_path / "shared"))

    threads = [threading.Thread(target=work, args=(layers,)) for layers in ([0, 1], [1, 2], [0, 1, 2], [1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = second_moments(tiny_lm("gpt2"), [0, 1, 2], corpus=corpus, tokens=60, folder=tmp_path / "alone")
    assert len(found) == 4
    for one in found:
        assert all(torch.equal(one.matrix(layer), alone.matrix(layer)) for layer in one.layers)
    (place,) = (tmp_path / "shared").iterdir()
    assert sorted(path.name for path in place.iterdir()) == [*(f"layer-{i}.safetensors" for i in (0, 1, 2)), "run.json"]


# --- whose keys ---


@dataclass(frozen=True, kw_only=True, eq=False)
class Before(Introducing):
    """Puts a sentence before every prompt."""

    def __call__(self, prompt: str) -> str:
        return "Rome is the capital of Italy. "


def test_an_edited_model_has_moments_of_its_own(gpt2: LM, corpus: str, tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    edit = Edit(base=gpt2.weight_hash, changes={name: 0.5 * gpt2.model.get_parameter(name).detach()})
    before = second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path)
    with edit.on(gpt2):
        within = second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path)
        torch.testing.assert_close(within.matrix(0), by_hand(gpt2, 0, 40), rtol=1e-3, atol=1e-4)
        assert within.weight_hash == gpt2.weight_hash != before.weight_hash
    assert not torch.allclose(within.matrix(0), before.matrix(0))


def test_what_an_edit_puts_before_prompts_is_no_text(gpt2: LM, corpus: str, tmp_path: Path) -> None:
    bare = second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path)
    with Edit(base=gpt2.weight_hash, sides=(Before(),)).on(gpt2):
        within = second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path)
    assert torch.equal(bare.matrix(0), within.matrix(0))
    assert len(list(tmp_path.glob("*/run.json"))) == 2, "what stands beside the weights has files of its own"


def test_a_patched_model_and_one_in_training_are_refused(corpus: str, tmp_path: Path) -> None:
    lm = fresh_lm("gpt2")
    with (
        patched(lm, {Site(layer=0, kind="mlp_out"): torch.zeros(())}),
        pytest.raises(MomentsError, match=r"Inside of patched\(\)"),
    ):
        second_moments(lm, [0], corpus=corpus, folder=tmp_path)
    lm.model.train()
    with pytest.raises(MomentsError, match="training mode"):
        second_moments(lm, [0], corpus=corpus, folder=tmp_path)


def test_the_corpus_of_a_bundled_model_needs_no_name(gpt2: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    with pytest.raises(MomentsError, match="no bundled model, so its second moments need a corpus"):
        second_moments(gpt2, [0])
    assert second_moments(gpt2, [0], corpus="bundled", tokens=50).n == 50
    lm = load("organism-tiny", device="cpu")
    found = second_moments(lm, [1], tokens=2000)
    assert found.n == 2000
    assert "organism-tiny" in found.source
    assert len(list((tmp_path / "moments").glob("*/layer-*.safetensors"))) == 2


@pytest.mark.parametrize("layers", [[], [4], [-1]])
def test_layers_that_are_not_there_are_refused(layers: list[int], gpt2: LM, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected some of 0 to 3"):
        second_moments(gpt2, layers, corpus=corpus, folder=tmp_path)


def test_what_gives_no_moments_is_told_of(gpt2: LM, corpus: str, tmp_path: Path) -> None:
    with pytest.raises(MomentsError, match="0 tokens"):
        second_moments(gpt2, [0], corpus=corpus, tokens=0, folder=tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(TextError, match="no text"):
        second_moments(gpt2, [0], corpus=str(tmp_path / "empty.txt"), folder=tmp_path)
    lm = fresh_lm("gpt2")
    with torch.no_grad():
        lm.model.get_parameter("transformer.h.1.mlp.c_fc.weight").fill_(float("inf"))
    with pytest.raises(MomentsError, match="layer 1 are not finite"):
        second_moments(lm, [1], corpus=corpus, tokens=40, folder=tmp_path)
    found = second_moments(gpt2, [0], corpus=corpus, tokens=40, folder=tmp_path)
    with pytest.raises(MomentsError, match="no moment of layer 1"):
        found.matrix(1)


# --- the condition number ---


def test_the_condition_number_is_that_of_the_matrix(gpt2: LM, tmp_path: Path) -> None:
    found = second_moments(gpt2, [0], corpus="bundled", tokens=600, folder=tmp_path)
    exact = float(torch.linalg.cond(found.matrix(0), p=1))
    assert exact / 3 < found.condition(0) < 1.001 * exact
    assert 1e-9 < 1 / exact < 1e-2, "or the test says little"
    diagonal = Moments(matrices={2: torch.diag(torch.tensor([8.0, 2.0, 4.0]))}, n=9, source="", weight_hash="")
    assert diagonal.condition(2) == pytest.approx(4.0)


def test_fewer_keys_than_neurons_are_singular(gpt2: LM, tmp_path: Path) -> None:
    assert second_moments(gpt2, [0], corpus="bundled", tokens=40, folder=tmp_path).condition(0) == float("inf")
    zero = Moments(matrices={0: torch.zeros(2, 2)}, n=9, source="", weight_hash="")
    assert zero.condition(0) == float("inf")


# --- published files ---


def test_a_published_file_is_read(gpt2: LM, tmp_path: Path) -> None:
    keys = np.random.default_rng(0).normal(size=(300, gpt2.d_mlp)).astype(np.float32)
    path = tmp_path / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
    np.savez(path, **{"mom2.mom2": keys.T @ keys, "mom2.count": np.array(300), "sample_size": np.array(9)})
    found = read_rome_npz(path, gpt2, 1)
    assert (found.n, found.layers, found.weight_hash, found.source) == (300, (1,), "", path.name)
    np.testing.assert_allclose(found.matrix(1), keys.T.astype(np.float64) @ keys / 300, rtol=1e-4, atol=1e-5)


def test_a_file_of_another_model_is_refused(gpt2: LM, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"mom2.mom2": np.eye(7), "mom2.count": np.array(5)}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(MomentsError, match=r"\(7, 7\) numbers of 5 keys, expected finite ones of shape \(80, 80\)"):
        read_rome_npz(tmp_path / "a.npz", gpt2, 1)
    np.savez(tmp_path / "b.npz", other=np.eye(80))
    (tmp_path / "c.npz").write_text("no archive")
    for name in ("b.npz", "c.npz", "d.npz"):
        with pytest.raises(MomentsError, match=rf"{name}' holds no second moment"):
            read_rome_npz(tmp_path / name, gpt2, 1)
    with pytest.raises(ModelError, match="Layer 4"):
        read_rome_npz(tmp_path / "a.npz", gpt2, 4)


def test_published_statistics_serve_as_a_corpus(gpt2: LM, tmp_path: Path) -> None:
    own = second_moments(gpt2, [1, 2], corpus="bundled", tokens=200, folder=tmp_path / "moments")
    for layer in (1, 2):
        arrays: dict[str, Any] = {"mom2.mom2": own.matrix(layer).numpy() * own.n, "mom2.count": own.n}
        np.savez(tmp_path / f"layer-{layer}_mom2.npz", **arrays)
    found = second_moments(gpt2, [1, 2], corpus=str(tmp_path / "layer-{}_mom2.npz"))
    assert found.n == own.n
    for layer in (1, 2):
        torch.testing.assert_close(found.matrix(layer), own.matrix(layer))
    assert second_moments(gpt2, [2], corpus=str(tmp_path / "layer-2_mom2.npz")).layers == (2,)
    with pytest.raises(MomentsError, match=r"Write \{\} in the place"):
        second_moments(gpt2, [1, 2], corpus=str(tmp_path / "layer-2_mom2.npz"))
    with pytest.raises(MomentsError, match="holds no second moment"):
        second_moments(gpt2, [3], corpus=str(tmp_path / "layer-{}_mom2.npz"))
