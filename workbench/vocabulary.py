"""What MLP neurons say in words: every value vector of a model projected to the vocabulary, and searched by token.

The value vector v of a neuron is what a unit of its activation adds to the residual stream: its column of the down projection
(Geva et al. 2021, arXiv 2012.14913, sec. 4; Geva et al. 2022, arXiv 2203.14680, sec. 3; Dar et al. 2022, arXiv 2209.02535).

1. Layer by layer, some value vectors at a time are multiplied with the unembedding: a chunk of neurons x all tokens.
2. Of each neuron its top and bottom tokens are kept; of each token, merged chunk by chunk, the neurons with the largest values.
3. A layer that is done is written to disk, then the state of the tokens. A build that was stopped goes on after its last layer.
4. `index.json` is written last: without it the folder is no index. Every file is moved into its place as a whole.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from workbench.directions import frozen_norm, post_norm, unembedding
from workbench.errors import InputError
from workbench.models import LM
from workbench.progress import track
from workbench.store import results_folder

Projection = Literal["plain", "normed"]
"""How a value vector is read; e is a token's row of the unembedding:

- `plain`: e . v, as if there were no final norm
- `normed`: e . gain (v - mean(v)), through the final norm with a divisor of 1 and without its offset; for an RMSNorm nothing is
  subtracted. Activation / divisor times this is the neuron's direct contribution to the token's logit.

A norm between the MLP and the residual stream (Gemma 2 and 3, OLMo 2) is applied first, its divisor 1 too. Biases of the
unembedding and a softcap of the logits are left out, since they do not depend on the neuron.
"""

TOKENS_AT_ONCE = 8192
"""Rows of the unembedding that are converted to float32 at a time."""

_FORMAT = 1
"""Counts the layouts of the files; an index of another one is built again."""


_UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, RecursionError)
"""What reading a file raises that somebody cut or changed."""

_BUILDING = threading.Lock()
"""One index at a time in a process: each takes the memory it was given."""


class VocabularyError(InputError):
    """A neuron, a word or an index that does not exist."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenIndex:
    """The value vectors of a model in words, on disk; nothing is read before it is asked for."""

    folder: Path
    """Where the files are."""

    run: Mapping[str, Any]
    """The manifest: model, weight hash, projection, and how much was kept."""

    neurons: Int[np.ndarray, "d_vocab kept"]
    """By token the neurons with the largest values, the largest first, counted through the model: layer * d_mlp + neuron; -1 where
    the model has fewer. Memory-mapped."""

    values: Float[np.ndarray, "d_vocab kept"]
    """Their values. Memory-mapped."""

    def search(self, token: int, *, n: int = 20) -> pd.DataFrame:
        """The neurons of the model that promote a token most.

        Args:
            token: its id.
            n: how many neurons, at most; no more are found than were kept.

        Returns:
            A table with layer (0-based), neuron, value, and rank: the token's place among all that the neuron promotes, 0 for the
            first; NA beyond the tokens kept.

        Raises:
            VocabularyError: there is no such token.
        """
        if not 0 <= token < len(self.neurons):
            raise VocabularyError(f"There is no token {token}. Use 0 to {len(self.neurons) - 1}.")
        flat = self.neurons[token, :n]
        flat = flat[flat >= 0].astype(np.int64)
        layers, neurons = np.divmod(flat, int(self.run["d_mlp"]))
        loaded = {int(layer): self._layer(int(layer))[0][0] for layer in set(layers.tolist())}
        ranks = [
            next(iter(np.flatnonzero(loaded[layer][neuron] == token).tolist()), None)
            for layer, neuron in zip(layers.tolist(), neurons.tolist(), strict=True)
        ]
        found: pd.DataFrame = pd.DataFrame(
            {
                "layer": layers,
                "neuron": neurons,
                "value": self.values[token, : len(flat)].astype(float),
                "rank": pd.array(ranks, dtype="Int64"),
            }
        )
        return found

    def tokens(self, layer: int, neuron: int) -> pd.DataFrame:
        """The tokens that a neuron promotes and suppresses most when its activation is positive.

        Returns:
            A table with direction (promoted or suppressed), rank (0: the strongest), token_id, value.

        Raises:
            VocabularyError: there is no such neuron.
        """
        check_neuron(layer, neuron, int(self.run["n_layers"]), int(self.run["d_mlp"]))
        ids, values = self._layer(layer)
        return tokens_table(ids[:, neuron], values[:, neuron])

    def _layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, values = _arrays(self.folder / _layer_file(layer), "ids", "values")
        except _UNREADABLE as error:
            raise VocabularyError(
                f"{_layer_file(layer)} of the index cannot be read ({type(error).__name__}). Delete {self.folder} and build again."
            ) from error
        return ids, values


def find_index(
    lm: LM, *, projection: Projection = "normed", tokens: int = 10, neurons: int = 50, folder: Path | None = None
) -> TokenIndex | None:
    """The finished index of these weights, or None, also where a file of it is missing or cut; arguments as of `build_index`."""
    where = _folder(lm, projection, tokens, neurons, folder)
    try:
        run = json.loads((where / "index.json").read_text())
        by_token = [np.load(where / f"{name}.npy", mmap_mode="r") for name in ("neurons", "values")]
    except _UNREADABLE:
        return None
    sizes = {"n_layers": lm.n_layers, "d_mlp": lm.d_mlp, "d_vocab": lm.d_vocab}
    whole = isinstance(run, dict) and {name: run.get(name) for name in sizes} == sizes
    if not (
        whole and all(part.shape == (lm.d_vocab, neurons) for part in by_token) and _layers_there(where, lm.n_layers)
    ):
        return None
    return TokenIndex(folder=where, run=run, neurons=by_token[0], values=by_token[1])


def build_index(
    lm: LM,
    *,
    projection: Projection = "normed",
    tokens: int = 10,
    neurons: int = 50,
    folder: Path | None = None,
    memory: int = 2**29,
) -> TokenIndex:
    """Projects every value vector of the model to the vocabulary, or finds that it was done.

    Args:
        lm: the model.
        projection: how value vectors are read.
        tokens: how many promoted, and how many suppressed tokens are kept of each neuron.
        neurons: how many neurons are kept of each token.
        folder: where indices are kept; None: `vocabulary/` in the results folder.
        memory: bytes for the values of a chunk of neurons on all tokens; the neurons kept, and a few million numbers of
            the unembedding in float32, come on top.

    Returns:
        The index. On disk it takes 8 bytes for each token and neuron kept.

    Raises:
        VocabularyError: an unknown projection, nothing to be kept, or no memory.
        ModelError: a norm that is neither a LayerNorm nor an RMSNorm.
        Cancelled: whoever listens to the progress stopped it; the next build goes on after the last finished layer.
    """
    if min(tokens, neurons, memory) < 1:
        raise VocabularyError(f"tokens, neurons and memory are {tokens}, {neurons}, {memory}, expected 1 or more.")
    with _BUILDING:
        found = find_index(lm, projection=projection, tokens=tokens, neurons=neurons, folder=folder)
        if found is None:
            _build(lm, projection, tokens, neurons, _folder(lm, projection, tokens, neurons, folder), memory)
            found = find_index(lm, projection=projection, tokens=tokens, neurons=neurons, folder=folder)
        assert found is not None
        return found


def _build(lm: LM, projection: Projection, tokens: int, neurons: int, where: Path, memory: int) -> None:
    """Writes an index, from where an earlier build was stopped."""
    where.mkdir(parents=True, exist_ok=True)
    width = min(lm.d_mlp, max(1, memory // (8 * lm.d_vocab)))  # values and what topk makes of them, 4 bytes each
    first, top = _state(where, lm.d_vocab, neurons)
    chunks = [(layer, start) for layer in range(first, lm.n_layers) for start in range(0, lm.d_mlp, width)]
    done: list[tuple[np.ndarray, np.ndarray]] = []
    for layer, start in track(chunks, "value vectors", len(chunks)):
        vectors = value_vectors(lm, layer, slice(start, start + width))
        values = project(lm, readable(lm, layer, vectors, projection=projection))
        done.append(_extremes(values, tokens))
        top = _merged(top, values, layer * lm.d_mlp + start)
        if start + width >= lm.d_mlp:
            ids, kept = (np.concatenate(parts, 1) for parts in zip(*done, strict=True))
            _put(where / _layer_file(layer), {"ids": ids, "values": kept})
            state = {"layers": np.array(layer + 1), "values": top[0].cpu().numpy(), "neurons": top[1].cpu().numpy()}
            _put(where / "state.npz", state)
            done = []
    for name, part in zip(("values", "neurons"), top, strict=True):
        _put(where / f"{name}.npy", np.ascontiguousarray(part.T.cpu().numpy()))
    run = {
        **lm.protocol,
        "what": "vocabulary",
        "projection": projection,
        "tokens": tokens,
        "neurons": neurons,
        "d_mlp": lm.d_mlp,
        "d_vocab": lm.d_vocab,
        "layer_base": 0,
    }
    _put(where / "index.json", (json.dumps(run, indent=1) + "\n").encode())
    (where / "state.npz").unlink(missing_ok=True)


def value_vectors(lm: LM, layer: int, neurons: Sequence[int] | slice = slice(None)) -> Float[Tensor, "neuron d_model"]:
    """Value vectors of a layer as rows: columns of the down projection, in its dtype, before a post-norm."""
    down = lm.part(layer, lm.layout.down_proj)
    weight = down.get_parameter("weight").detach()
    chosen = neurons if isinstance(neurons, slice) else list(neurons)
    return weight[chosen] if isinstance(down, Conv1D) else weight[:, chosen].T  # Conv1D is (in, out)


def readable(
    lm: LM, layer: int, vectors: Float[Tensor, "neuron d_model"], *, projection: Projection
) -> Float[Tensor, "neuron d_model"]:
    """Value vectors of a layer as the unembedding meets them in a projection; float64, on the CPU.

    Raises:
        VocabularyError: an unknown projection.
        ModelError: a norm that is neither a LayerNorm nor an RMSNorm.
    """
    _check_projection(projection)
    signs = 1.0 - 2.0 * (torch.arange(lm.d_model)[None] % 2)  # a state that a norm divides by 1
    for norm in (post_norm(lm, layer, "mlp_out"), lm.final_norm if projection == "normed" else None):
        if norm is not None:
            vectors = frozen_norm(norm, signs).push(vectors[None])[0]
    return vectors.cpu().double()


def project(lm: LM, vectors: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "neuron d_vocab"]:
    """Each vector times every row of the unembedding; float32, on the unembedding's device."""
    device = lm.unembed.get_parameter("weight").device
    vectors = vectors.to(device, torch.float32)
    values = torch.empty(len(vectors), lm.d_vocab, device=device)
    for first in range(0, lm.d_vocab, TOKENS_AT_ONCE):
        some = slice(first, first + TOKENS_AT_ONCE)
        values[:, some] = vectors @ unembedding(lm, some)[0].float().T
    return values


def extreme_tokens(
    lm: LM, layer: int, neurons: Sequence[int], *, projection: Projection, k: int = 10
) -> tuple[Int[np.ndarray, "2 neuron k"], Float[np.ndarray, "2 neuron k"]]:
    """The k tokens that some neurons of a layer promote and suppress most, straight from the weights: ids and values.

    Raises:
        VocabularyError: there is no such neuron or projection.
    """
    for neuron in neurons:
        check_neuron(layer, neuron, lm.n_layers, lm.d_mlp)
    vectors = value_vectors(lm, layer, neurons)
    return _extremes(project(lm, readable(lm, layer, vectors, projection=projection)), k)


def neuron_tokens(lm: LM, layer: int, neuron: int, *, projection: Projection, k: int = 10) -> pd.DataFrame:
    """`extreme_tokens` of one neuron as the table that `TokenIndex.tokens` gives; no index is needed."""
    ids, values = extreme_tokens(lm, layer, [neuron], projection=projection, k=k)
    return tokens_table(ids[:, 0], values[:, 0])


def tokens_table(ids: Int[np.ndarray, "2 k"], values: Float[np.ndarray, "2 k"]) -> pd.DataFrame:
    """One neuron's promoted and suppressed tokens as a table, see `TokenIndex.tokens`."""
    k = ids.shape[1]
    table: pd.DataFrame = pd.DataFrame(
        {
            "direction": np.repeat(["promoted", "suppressed"], k),
            "rank": np.tile(np.arange(k), 2),
            "token_id": ids.ravel().astype(np.int64),
            "value": values.ravel().astype(float),
        }
    )
    return table


def words(lm: LM, token_ids: Iterable[int]) -> str:
    """Tokens in one line, without their spaces; a token that is nothing else is quoted."""
    texts = [lm.word(int(token)) for token in token_ids]
    return ", ".join(text.strip() or repr(text) for text in texts)


def spellings(lm: LM, text: str) -> tuple[int, ...]:
    """The tokens that a word may be: as it follows another word (with its space) first, then as it is written.

    Raises:
        VocabularyError: no single token is that word.
    """
    if not text.strip():
        raise VocabularyError("The word is empty. Write one that is a single token, e.g. 'Paris'.")
    tries = [f" {text.strip()}", text]
    pieces = [list(lm.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in tries]
    found = dict.fromkeys(ids[0] for ids in pieces if len(ids) == 1)
    if not found:
        parts = " + ".join(repr(lm.word(i)) for i in pieces[0])
        raise VocabularyError(
            f"{text!r} is no single token of {lm.name}, but {len(pieces[0])}: {parts}. Search for one of them."
        )
    return tuple(found)


def check_neuron(layer: int, neuron: int, n_layers: int, d_mlp: int) -> None:
    """Raises where a model of this size has no such neuron.

    Raises:
        VocabularyError: it has not.
    """
    if not (0 <= layer < n_layers and 0 <= neuron < d_mlp):
        raise VocabularyError(
            f"There is no neuron {neuron} in layer {layer}. Use layers 0 to {n_layers - 1} and neurons 0 to {d_mlp - 1}."
        )


def _check_projection(projection: str) -> None:
    if projection not in get_args(Projection):
        raise VocabularyError(f"projection is {projection!r}, expected one of {', '.join(get_args(Projection))}.")


def _extremes(values: Float[Tensor, "neuron d_vocab"], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) and values (float32) of each neuron's k top and k bottom tokens: (2, neuron, k), the strongest first."""
    both = [values.topk(min(k, values.shape[1]), largest=largest) for largest in (True, False)]
    ids = torch.stack([found.indices.to(torch.int32) for found in both])
    return ids.cpu().numpy(), torch.stack([found.values for found in both]).cpu().numpy()


def _merged(
    top: tuple[Float[Tensor, "kept d_vocab"], Int[Tensor, "kept d_vocab"]],
    values: Float[Tensor, "neuron d_vocab"],
    first: int,
) -> tuple[Float[Tensor, "kept d_vocab"], Int[Tensor, "kept d_vocab"]]:
    """Each token's neurons with the largest values, of those known and of a chunk that begins with neuron `first`."""
    known, neurons = (part.to(values.device) for part in top)
    some = values.topk(min(len(known), len(values)), dim=0, sorted=False)
    both = torch.cat([known, some.values])
    which = torch.cat([neurons, (some.indices + first).to(neurons.dtype)])
    best = both.topk(len(known), dim=0)
    return best.values, which.gather(0, best.indices)


def _state(where: Path, d_vocab: int, neurons: int) -> tuple[int, tuple[Tensor, Tensor]]:
    """How many layers are done, and the tokens' neurons so far; none, where a file of them cannot be read."""
    with contextlib.suppress(*_UNREADABLE):
        layers, values, which = _arrays(where / "state.npz", "layers", "values", "neurons")
        if values.shape == which.shape == (neurons, d_vocab) and _layers_there(where, int(layers)):
            return int(layers), (torch.from_numpy(values), torch.from_numpy(which))
    none = torch.full((neurons, d_vocab), -1, dtype=torch.int32)
    return 0, (torch.full((neurons, d_vocab), -torch.inf), none)


def _arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Some arrays of a file; numpy would leave one open that it cannot read."""
    with path.open("rb") as file, np.load(file) as kept:
        return [kept[name] for name in names]


def _layers_there(where: Path, n: int) -> bool:
    """Whether the files of the first n layers are whole, as far as their lists of contents, which are written last, tell."""
    with contextlib.suppress(*_UNREADABLE):
        for layer in range(n):
            with zipfile.ZipFile(where / _layer_file(layer)) as file:
                if set(file.namelist()) != {"ids.npy", "values.npy"}:
                    return False
        return True
    return False


def _put(path: Path, content: bytes | np.ndarray | Mapping[str, np.ndarray]) -> None:
    """Writes a file as a whole or not at all, whoever else writes the same."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        elif isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            np.savez(file, allow_pickle=False, **content)
    temporary.replace(path)


def _layer_file(layer: int) -> str:
    return f"layer-{layer:03}.npz"


def _folder(lm: LM, projection: str, tokens: int, neurons: int, folder: Path | None) -> Path:
    _check_projection(projection)
    base = results_folder() / "vocabulary" if folder is None else folder
    return base / f"{lm.weight_hash}-{projection}-{tokens}-{neurons}-v{_FORMAT}"
