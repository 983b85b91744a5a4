"""Second moments of MLP keys, C = E[k k^T] (ROME, arXiv 2202.05262, App. E): the directions that text uses, for edits to spare.

A key is what enters the down projection of a block's MLP (site kind `mlp_post`). The moment is not centred.

1. Documents are cut into pieces of at most 512 tokens, or the model's positions, each tokenised by `LM.encode`; the last piece is
   cut so that there are exactly as many tokens as asked for. A BOS that the tokenizer adds counts: it is a key of every prompt.
2. The pieces are sorted by length and run in batches, up to the highest layer asked for; each token is one key.
3. Each layer's sum of k k^T is kept in float64 (or 32) where the layer is, on the GPU or on the CPU, and divided by n at the end.

Files are found by the weights that ran, the tokenizer, the content of the text, the number of tokens and the dtype; never by a
name. A model within `edit.on(lm)` has other weights, and so other moments. All files are put in place whole: what is killed goes on
from its last checkpoint, and processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.linalg import lapack
from torch import Tensor

from workbench import zoo
from workbench.data.texts import BUNDLED, TextError, Texts, open_texts
from workbench.edits import edits_on
from workbench.errors import InputError
from workbench.guard import reading
from workbench.hooks import is_patched, run
from workbench.models import LM, ModelError, Tokens, unintroduced
from workbench.progress import track
from workbench.sites import Site
from workbench.store import results_folder

_log = getLogger(__name__)

FORMAT = 1
"""Of the files, and of how text becomes keys; it is a part of what names them."""

PIECE_TOKENS = 512
"""A document is cut into pieces of at most so many tokens."""

BATCH_TOKENS = 2048
"""A batch has at most so many tokens, padding included; they decide how much memory a pass takes."""

CHECKPOINT_SECONDS = 60.0
"""After so many seconds the sums so far are written, at the end of a batch."""

MomentDtype = Literal["float32", "float64"]
"""In which dtype is summed."""


class MomentsError(InputError):
    """Moments that cannot be computed or used; the message says what was expected, what came and what to do."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Second moments of the keys of some layers."""

    matrices: Mapping[int, Float[Tensor, "d_mlp d_mlp"]]
    """By layer (0-based) the mean of k k^T, on the CPU; those from files are read when they are used."""

    n: int
    """Over how many keys the mean is."""

    source: str
    """Of which text, in words."""

    weight_hash: str
    """`LM.weight_hash` of the weights that gave the keys; empty where a foreign file does not say."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in order."""
        return tuple(sorted(self.matrices))

    def matrix(self, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """The mean of k k^T in a layer: float64, on the CPU, symmetric. Not to be written to.

        Raises:
            MomentsError: the layer was not asked for.
        """
        if layer not in self.matrices:
            raise MomentsError(f"There is no moment of layer {layer}, only of {self.layers}. Ask for that layer too.")
        return self.matrices[layer].double()

    def condition(self, layer: int) -> float:
        """The condition number of a layer's moment in the 1-norm; infinite where it is not positive definite.

        LAPACK's estimate from a Cholesky factor: seldom more than three times too small. With fewer keys than neurons the moment
        is singular, whatever rounding makes of it, and infinity comes back.
        """
        moment = self.matrix(layer).numpy()
        if self.n < len(moment):
            return float("inf")
        norm = float(np.abs(moment).sum(axis=0).max())
        factor, failed = lapack.dpotrf(moment, lower=1)
        if failed:
            return float("inf")
        reciprocal, _ = lapack.dpocon(factor, norm, uplo="L")
        return 1 / float(reciprocal) if reciprocal else float("inf")


def second_moments(
    lm: LM,
    layers: Sequence[int],
    *,
    corpus: str = "",
    tokens: int = 20_000,
    folder: Path | str | None = None,
    dtype: MomentDtype = "float64",
) -> Moments:
    """The second moments of the keys of some layers, from files where they are there, and else computed in one pass over the text.

    Args:
        lm: the model, as it is now: within `edit.on(lm)` the edited one.
        layers: which (0-based).
        corpus: `bundled`, the path of a .txt, .jsonl or .parquet file, or `datasets:NAME[:CONFIG]`; see `workbench.data.texts`.
            Empty means `bundled` for a bundled model. Or statistics that ROME or MEMIT published: the path of their .npz files,
            `{}` in the place of the layer's number; then `tokens`, `folder` and `dtype` are of no matter.
        tokens: over how many keys; fewer, with a warning, where the text ends before.
        folder: where the files are; `moments` in the folder of results by default.
        dtype: in which they are summed and kept. Float32 halves memory and files.

    Raises:
        MomentsError: no corpus for a model that is not bundled, no tokens, keys that are not finite, files of other weights, or a
            model that is patched or in training mode.
        ModelError: no layers, or one that the model has not.
        TextError: the corpus cannot be read, or holds no text.
    """
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= lm.n_layers:
        raise ModelError(f"Layers {tuple(layers)} were asked for, expected some of 0 to {lm.n_layers - 1}.")
    if tokens < 1 or dtype not in get_args(MomentDtype):
        raise MomentsError(f"{tokens} tokens in {dtype!r} were asked for, expected 1 or more in float64 or float32.")
    if is_patched() and not edits_on(lm):
        raise MomentsError("Inside of patched() the model's keys are not its own. Compute the moments outside.")
    if lm.model.training:
        raise MomentsError("The model is in training mode, so its keys are random. Call lm.model.eval() first.")
    if corpus.endswith(".npz"):
        return _published(lm, wanted, corpus)
    texts = _texts(lm, corpus)
    with reading(lm.model):  # no other thread edits the model between two batches
        question = _question(lm, texts, tokens=tokens, dtype=dtype)
        place = Path(folder) if folder is not None else results_folder() / "moments"
        place = place / _digest(json.dumps(question, sort_keys=True))
        files = _Files(place=place, question=question)
        if missing := [layer for layer in wanted if files.find(layer) is None]:
            _compute(lm, missing, texts, tokens=tokens, files=files)
    found = {layer: files.find(layer) for layer in wanted}
    matrices = {layer: one[0] for layer, one in found.items() if one}
    assert len(matrices) == len(wanted), f"a file was taken away from {place} while it was in use"
    return Moments(
        matrices=matrices,
        n=next(one[1] for one in found.values() if one),
        source=texts.source,
        weight_hash=question["weight_hash"],
    )


def read_rome_npz(path: Path | str, lm: LM, layer: int) -> Moments:
    """The second moment of one layer from a statistics file of ROME or MEMIT (`..._mom2_....npz`).

    Such a file holds `mom2.mom2`, the sum of k k^T, and `mom2.count`, the number of keys. It does not say of which weights; only
    its shape can be checked.

    Args:
        path: the file.
        lm: the model that it is meant for.
        layer: the layer that it is of (0-based), which its name says.

    Raises:
        MomentsError: there is no such file, it holds something else, or its shape is not that of the model's keys.
        ModelError: the model has no such layer.
    """
    path = Path(path)
    if not 0 <= layer < lm.n_layers:
        raise ModelError(f"Layer {layer} was named, expected one of 0 to {lm.n_layers - 1}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            total, count = torch.from_numpy(file["mom2.mom2"]), int(file["mom2.count"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise MomentsError(
            f"{str(path)!r} holds no second moment ({type(error).__name__}), expected an .npz with mom2.mom2 and mom2.count as "
            "ROME writes it."
        ) from error
    if tuple(total.shape) != (lm.d_mlp, lm.d_mlp) or count < 1 or not bool(torch.isfinite(total).all()):
        raise MomentsError(
            f"{path.name} holds {tuple(total.shape)} numbers of {count} keys, expected finite ones of shape "
            f"{(lm.d_mlp, lm.d_mlp)} for {lm.name}. Take the file of this model."
        )
    mean = total.double().div_(count)
    return Moments(matrices={layer: (mean + mean.T).div_(2)}, n=count, source=path.name, weight_hash="")


def _published(lm: LM, layers: Sequence[int], path: str) -> Moments:
    """What ROME's files say of some layers."""
    if "{}" not in path and len(layers) > 1:
        raise MomentsError(
            f"{path!r} names one file for layers {layers}. Write {{}} in the place of the layer's number."
        )
    found = [read_rome_npz(path.replace("{}", str(layer)), lm, layer) for layer in layers]
    matrices = {layer: one.matrices[layer] for layer, one in zip(layers, found, strict=True)}
    return Moments(matrices=matrices, n=min(one.n for one in found), source=Path(path).name, weight_hash="")


# --- what is asked ---


def _texts(lm: LM, corpus: str) -> Texts:
    """The corpus, or the bundled models' documents where none is named for one of them."""
    name = Path(lm.name).name
    organism = name if name in zoo.NAMES else None
    if not corpus and organism is None:
        raise MomentsError(
            f"{lm.name} is no bundled model, so its second moments need a corpus. Name a .txt, .jsonl or .parquet file or "
            f"datasets:NAME[:CONFIG], or {BUNDLED!r} if the bundled models' documents shall do."
        )
    return open_texts(corpus or BUNDLED, organism=organism or zoo.NAMES[0])


def _question(lm: LM, texts: Texts, *, tokens: int, dtype: MomentDtype) -> dict[str, str]:
    """Everything that decides the numbers. What stands beside the weights counts too, since later keys depend on it."""
    return {
        "format": f"{FORMAT} {PIECE_TOKENS} {BATCH_TOKENS}",
        "weight_hash": lm.weight_hash,
        "setup_hash": lm.setup_hash,
        "bos": str(lm.bos),
        "beside": " ".join(edit.key for edit in edits_on(lm) if edit.sides),
        "corpus": texts.digest,
        "tokens": str(tokens),
        "dtype": dtype,
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# --- text to batches ---


@dataclass(frozen=True, kw_only=True)
class _Piece:
    text: str
    """As `LM.encode` takes it."""

    length: int
    """Its tokens."""

    kept: int
    """How many of them count, from the first on."""


def _pieces(lm: LM, texts: Texts, tokens: int) -> list[_Piece]:
    """The pieces of the first documents that have so many tokens, in order; the last one counts in part."""
    longest = min(PIECE_TOKENS, lm.n_positions or PIECE_TOKENS)
    pieces, missing = [], tokens
    for document in texts.read():
        for text in _cut(lm, document, longest):
            length = _encode(lm, [text]).lengths[0]
            pieces.append(_Piece(text=text, length=length, kept=min(length, missing)))
            missing -= pieces[-1].kept
            if not missing:
                return pieces
    if not pieces:
        raise TextError(f"There is no text in {texts.source}. Name another corpus.")
    _log.warning("The text of %s ends after %d tokens; %d were asked for.", texts.source, tokens - missing, tokens)
    return pieces


def _cut(lm: LM, text: str, longest: int) -> Iterator[str]:
    """The text in pieces of at most so many tokens, special ones included; cut before words where there are any."""
    room = longest - 1 - lm.tokenizer.num_special_tokens_to_add()  # 1: a BOS that the LM adds itself
    encoded = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    if len(starts) <= room:
        if text.strip():
            yield text
        return
    middle = room * max(1, -(-len(starts) // room) // 2)  # a whole number of full pieces before it
    words = (i for i in range(middle, middle // 2, -1) if text[starts[i] - 1].isspace() or text[starts[i]].isspace())
    cut = starts[next(words, middle)]
    cut = cut if 0 < cut < len(text) else len(text) // 2
    yield from _cut(lm, text[:cut], longest)  # a piece may have more tokens on its own than it had within
    yield from _cut(lm, text[cut:].lstrip(" "), longest)


def _encode(lm: LM, texts: Sequence[str]) -> Tokens:
    """The texts alone, without what an edit puts before prompts."""
    with unintroduced():
        return lm.encode(texts)


def _batches(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces of like length together."""
    batches: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda piece: piece.length):  # stable: equal lengths stay in the order of the text
        if batches and (len(batches[-1]) + 1) * piece.length <= BATCH_TOKENS:
            batches[-1].append(piece)
        else:
            batches.append([piece])
    return batches


# --- the sums ---


def _compute(lm: LM, layers: Sequence[int], texts: Texts, *, tokens: int, files: _Files) -> None:
    """Sums k k^T of the layers over the text, and writes their means."""
    pieces = _pieces(lm, texts, tokens)
    batches = _batches(pieces)
    n = sum(piece.kept for piece in pieces)
    _log.info("Second moments of %d layers of %s over %d tokens of %s.", len(layers), lm.name, n, texts.source)
    done, sums = files.read_checkpoint(layers)
    written = time.monotonic()
    for number, batch in enumerate(track(batches, "second moments", len(batches))):
        if number < done:
            continue
        _add_batch(lm, batch, layers, sums, getattr(torch, files.question["dtype"]))
        if time.monotonic() - written > CHECKPOINT_SECONDS:
            files.write_checkpoint(number + 1, sums)
            written = time.monotonic()
    for layer in layers:
        total = sums.pop(layer)
        if not bool(torch.isfinite(total).all()):
            raise MomentsError(
                f"Keys of layer {layer} are not finite in {lm.protocol['dtype']}. Load {lm.name} in float32."
            )
        files.write(layer, (total + total.T).div_(2 * n).cpu(), n=n)
    files.describe(source=texts.source, n=n, lm=lm)


class _Enough(Exception):
    """Raised at the highest layer that is asked for, so that the pass ends there."""


def _add_batch(
    lm: LM, batch: Sequence[_Piece], layers: Sequence[int], sums: dict[int, Tensor], dtype: torch.dtype
) -> None:
    """Adds k k^T of the tokens that count to the layers' sums, each layer as soon as its keys are there."""
    tokens = _encode(lm, [piece.text for piece in batch])
    kept = torch.tensor([piece.kept for piece in batch], device=tokens.ids.device)
    counted = tokens.mask & (tokens.positions < kept[:, None])

    def note(layer: int, keys: Float[Tensor, "batch pos d_mlp"]) -> Tensor:
        _add(sums, layer, keys[counted.to(keys.device)], dtype)
        if layer == max(layers):
            raise _Enough
        return keys

    with suppress(_Enough):
        run(lm, tokens, write={Site(layer=layer, kind="mlp_post"): partial(note, layer) for layer in layers})


def _add(sums: dict[int, Tensor], layer: int, keys: Float[Tensor, "key d_mlp"], dtype: torch.dtype) -> None:
    """Adds k k^T of some keys to a layer's sum, in place. It lies with the layer on a GPU, else on the CPU."""
    place = keys.device if keys.device.type == "cuda" else torch.device("cpu")
    keys = keys.to(place, dtype)
    total = sums[layer].to(place) if layer in sums else keys.new_zeros(keys.shape[1], keys.shape[1])
    sums[layer] = total.addmm_(keys.T, keys)


# --- files ---


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The moments that answer one question: one file a layer, a checkpoint while they are computed, and a manifest for readers."""

    place: Path
    """Their folder, named by the question."""

    question: Mapping[str, str]
    """Also in every file, so that a file that was moved is not taken for another."""

    def find(self, layer: int) -> tuple[Float[Tensor, "d_mlp d_mlp"], int] | None:
        """A layer's moment and the number of its keys; None where it is not there or damaged."""
        found = self._read(self.place / f"layer-{layer}.safetensors")
        return None if found is None else (found[0]["moment"], int(found[1]["n"]))

    def write(self, layer: int, moment: Float[Tensor, "d_mlp d_mlp"], *, n: int) -> None:
        """Puts a layer's moment in place."""
        self._write(self.place / f"layer-{layer}.safetensors", {"moment": moment}, n=n)

    def read_checkpoint(self, layers: Sequence[int]) -> tuple[int, dict[int, Tensor]]:
        """How many batches are done and the sums over them; none where the checkpoint is of other layers."""
        found = self._read(self.place / "checkpoint.safetensors")
        if found is None or not {str(layer) for layer in layers} <= set(found[0]):
            return 0, {}
        return int(found[1]["n"]), {layer: found[0][str(layer)].clone() for layer in layers}

    def write_checkpoint(self, done: int, sums: Mapping[int, Tensor]) -> None:
        """Notes the sums over the first batches."""
        tensors = {str(layer): total.cpu() for layer, total in sums.items()}
        self._write(self.place / "checkpoint.safetensors", tensors, n=done)

    def describe(self, *, source: str, n: int, lm: LM) -> None:
        """Writes the manifest, and takes the checkpoint away."""
        about = {"what": "second moments of MLP keys", "model": lm.name, "source": source, "n": n, **self.question}
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        self._put(self.place / "run.json", lambda path: path.write_text(text, encoding="utf-8"))
        (self.place / "checkpoint.safetensors").unlink(missing_ok=True)

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors, which are read from the disk when they are used, and what is noted with them."""
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            _log.warning("%s is damaged (%s) and is made anew.", path, type(error).__name__)
            return None
        wrong = [name for name, value in self.question.items() if about.get(name) != value]
        if wrong:
            raise MomentsError(
                f"{str(path)!r} has {wrong[0]} {about.get(wrong[0])!r}, expected {self.question[wrong[0]]!r}: it was made for "
                "something else and put there. Take it away."
            )
        return tensors, about

    def _write(self, path: Path, tensors: Mapping[str, Tensor], *, n: int) -> None:
        about = {**self.question, "n": str(n)}
        self._put(path, lambda new: save_file(dict(tensors), new, metadata=about))

    def _put(self, path: Path, write: Callable[[Path], Any]) -> None:
        """Writes a file beside its place and moves it there, so that others see all of it or nothing."""
        self.place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.place, prefix=".writing-") as temporary:
            write(Path(temporary) / path.name)
            (Path(temporary) / path.name).replace(path)
