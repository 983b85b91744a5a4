"""A language model as the workbench sees it (`LM`), and text as the model sees it (`Tokens`).

Padding, special tokens, the place of the subject, dtype and device are decided here and nowhere else. The Hugging Face model
stays what it is: names, `save_pretrained` and `deepcopy` keep working.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workbench.facts import Fact
from workbench.guard import reading
from workbench.layouts import Layout, ModelError, layout_of
from workbench.sites import Role, Site, SiteError, SiteKind

__all__ = ["LM", "Introduction", "ModelError", "Tokens", "introduced", "is_plain", "unintroduced"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """A batch of prompts, padded on the right; attention never sees the padding."""

    ids: Int[Tensor, "batch pos"]
    """Token ids; padding is id 0, which the mask hides."""

    mask: Bool[Tensor, "batch pos"]
    """True where there is a token."""

    lengths: tuple[int, ...]
    """Number of prompt tokens of each row, special tokens included; a target that was appended comes after them."""

    spans: tuple[tuple[int, int] | None, ...]
    """First and one-past-last token of each row's subject; None where no subject was given."""

    texts: tuple[tuple[str, ...], ...]
    """What each prompt token stands for, for labels."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Position of every token, counted from the row's first."""
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Position of each prompt's last token, where the answer is predicted."""
        return torch.tensor(self.lengths, device=self.ids.device) - 1

    def roles(self, row: int = 0) -> tuple[Role, ...]:
        """The role of each prompt token of a row: exactly one each, so that no average counts a token twice.

        The last prompt token is `last` whatever it follows; a one-token subject is `subject_last`. A subject that ends the prompt
        keeps `subject_last` for its end, and such a prompt has no `last`.
        """
        length, span = self.lengths[row], self.spans[row]
        if span is None:
            before: tuple[Role, ...] = ("before_subject",)
            return (*before * (length - 1), "last")
        start, stop = span

        def role(position: int) -> Role:
            if start <= position < stop:
                if position == stop - 1:
                    return "subject_last"
                return "subject_first" if position == start else "subject_middle"
            if position == length - 1:
                return "last"
            if position < start:
                return "before_subject"
            return "first_after_subject" if position == stop else "further"

        return tuple(role(position) for position in range(length))

    def at(self, token: Role | int | None) -> Bool[Tensor, "batch pos"]:
        """True at the tokens of a role, at one position, or (None) at every prompt token.

        `last` is the prompt's last token even where it belongs to the subject. A negative position counts from the end of each
        row's prompt.

        Raises:
            SiteError: a role of the subject in a row without subject, or a position outside of a prompt.
        """
        if token is None:
            return self.positions <= self.last[:, None]
        if token == "last":
            return self.positions == self.last[:, None]
        if isinstance(token, int):
            shortest = min(self.lengths)
            if not -shortest <= token < shortest:
                raise SiteError(
                    f"Position {token} is outside of a prompt of {shortest} tokens. Use 0 to {shortest - 1}."
                )
            return self.positions == (token if token >= 0 else self.last[:, None] + 1 + token)
        chosen = torch.zeros_like(self.mask)
        for row, length in enumerate(self.lengths):
            span = self.spans[row]
            if span is None:
                raise SiteError(f"The role {token!r} needs a subject, and row {row} was encoded without one.")
            if token == "subject":
                chosen[row, span[0] : span[1]] = True
            elif token == "subject_first":
                chosen[row, span[0]] = True
            else:
                chosen[row, :length] = torch.tensor([r == token for r in self.roles(row)], device=chosen.device)
        return chosen

    def repeat(self, n: int) -> Tokens:
        """The whole batch n times over, row order kept within each copy."""
        return replace(
            self,
            ids=self.ids.repeat(n, 1),
            mask=self.mask.repeat(n, 1),
            lengths=self.lengths * n,
            spans=self.spans * n,
            texts=self.texts * n,
        )


class LM:
    """A causal Hugging Face model with its tokenizer and the names of its parts.

    Args:
        model: any `transformers` causal language model of a known family; it is not changed, only put in eval mode.
        tokenizer: its fast tokenizer.
        name: label in results; the folder or hub name.
        bos: put the tokenizer's BOS in front of prompts: True, False, or None for what the tokenizer itself does.

    Raises:
        ModelError: an unknown family, a slow tokenizer, `bos=True` without a BOS token.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "", bos: bool | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"The tokenizer {type(tokenizer).__name__} is a slow one and tells no character offsets. "
                "Load its fast version (a tokenizer.json)."
            )
        if bos and tokenizer.bos_token_id is None:
            raise ModelError(f"bos=True was asked for, but {type(tokenizer).__name__} has no BOS token. Use bos=None.")
        self.model: PreTrainedModel = model.eval()
        self.tokenizer: Any = tokenizer
        self.layout: Layout = layout_of(model)
        self.name = name or model.config._name_or_path or self.layout.family
        self.bos = bos
        self._hashed: tuple[tuple[tuple[int, int, float], ...], str] | None = None
        self._parts: dict[tuple[int, SiteKind], nn.Module] = {}
        config = model.config.get_text_config()
        self.n_layers = len(self.blocks)
        self.n_heads = int(config.num_attention_heads)
        self.d_model = int(config.hidden_size)
        self.d_vocab = int(self.unembed.get_parameter("weight").shape[0])
        self.n_positions: int | None = getattr(config, "max_position_embeddings", None)
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def __repr__(self) -> str:
        return f"LM({self.name}: {self.layout.family}, {self.n_layers} layers x {self.d_model}, {self.dtype}, {self.device})"

    # --- parts ---

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks, from the first layer (0) up."""
        blocks = self.model.get_submodule(self.layout.blocks)
        assert isinstance(blocks, nn.ModuleList)  # as the layout says
        return blocks

    @cached_property
    def embed(self) -> nn.Module:
        """The token embedding; its output is where noise is added."""
        embed: nn.Module = self.model.get_input_embeddings()
        return embed

    @cached_property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding."""
        norm: nn.Module = self.model.get_submodule(self.layout.final_norm)
        return norm

    @cached_property
    def unembed(self) -> nn.Module:
        """The output embedding; its weight is (d_vocab, d_model)."""
        unembed: nn.Module = self.model.get_output_embeddings()
        return unembed

    @cached_property
    def d_mlp(self) -> int:
        """How many neurons the MLP of a block has: the width of `mlp_post`."""
        down = self.part(0, self.layout.down_proj)
        return int(down.in_features if isinstance(down, nn.Linear) else down.get_parameter("weight").shape[0])

    def part(self, layer: int, path: str) -> nn.Module:
        """The module at `path` in block `layer`, e.g. `lm.part(3, lm.layout.down_proj)`."""
        part: nn.Module = self.blocks[layer].get_submodule(path)
        return part

    def sites(self, kind: SiteKind, token: Role | int | None = None) -> tuple[Site, ...]:
        """The sites of a kind, one per layer (one in all for `embed`).

        Raises:
            ModelError: `resid_mid` in a family whose attention and MLP read the same residual.
        """
        if kind == "embed":
            return (Site(layer=0, kind=kind, token=token),)
        if kind == "resid_mid" and self.layout.parallel:
            raise ModelError(
                f"{self.layout.family} runs attention and MLP in parallel on the same residual, so there is no resid_mid. "
                "Use resid_pre or resid_post."
            )
        return tuple(Site(layer=layer, kind=kind, token=token) for layer in range(self.n_layers))

    # --- properties of the weights ---

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding."""
        return next(self.embed.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.embed.parameters()).dtype

    @property
    def weight_hash(self) -> str:
        """16 hexadecimal digits that name these very weights: of every parameter's name, dtype, shape and bytes.

        Computed once, and again after a parameter was changed or replaced. A change is seen by autograd's own count and, since
        `parameter.data` slips past that, by a sum over some thousand numbers of each parameter.
        """
        with reading(self.model):
            state = tuple(_state(parameter) for parameter in self.model.parameters())
            if self._hashed is None or self._hashed[0] != state:
                digest = hashlib.blake2b(digest_size=8)
                for name, parameter in sorted(self.model.named_parameters()):
                    digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
                    digest.update(parameter.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
                self._hashed = state, digest.hexdigest()
            return self._hashed[1]

    @property
    def setup_hash(self) -> str:
        """16 hexadecimal digits that name what besides the weights decides the numbers: config, tokenizer and buffers."""
        config = self.model.config.to_diff_dict()
        for name in ("_name_or_path", "dtype", "torch_dtype", "transformers_version"):
            config.pop(name, None)
        digest = hashlib.blake2b(self._tokenizer_text, digest_size=8)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, buffer in sorted(self.model.named_buffers()):
            digest.update(f"{name} {tuple(buffer.shape)} {float(_sample(buffer)):.9g}".encode())
        return digest.hexdigest()

    @cached_property
    def _tokenizer_text(self) -> bytes:
        text: str = self.tokenizer.backend_tokenizer.to_str()
        return text.encode()

    @property
    def protocol(self) -> dict[str, Any]:
        """What a result has to say about the model that it came from."""
        return {
            "model": self.name,
            "family": self.layout.family,
            "weight_hash": self.weight_hash,
            "setup_hash": self.setup_hash,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "d_model": self.d_model,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "attention": self.model.config._attn_implementation,
            "float32_products": torch.get_float32_matmul_precision(),  # "highest" unless TF32 was allowed
            "bos": self.bos,
        }

    # --- text to tokens ---

    def encode(self, items: Sequence[Fact | str], *, targets: Sequence[str] | None = None) -> Tokens:
        """Prompts as a right-padded batch.

        Args:
            items: facts (their subject is located) or complete prompts.
            targets: one answer per item to append for teacher forcing; all of its tokens but the last are appended, since the
                last one is only predicted.

        Raises:
            ModelError: an empty prompt or batch, a prompt longer than the model's positions, a target that the tokenizer does not
                keep apart from the prompt.
        """
        if not items:
            raise ModelError("There is no prompt to encode. Give at least one fact or text.")
        rows, lengths, spans, texts = [], [], [], []
        for index, item in enumerate(items):
            plain = item.text if isinstance(item, Fact) else item
            text = _introduced(self.model, plain)
            ids, offsets = self._tokenize(text)
            moved = len(text) - len(plain)
            spans.append(self._token_span(item, ids, offsets, moved) if isinstance(item, Fact) else None)
            texts.append(self._labels(ids, offsets, text))
            lengths.append(len(ids))
            rows.append(ids + self.target_ids(text, targets[index])[:-1] if targets else ids)
            if max(rows[-1]) >= self.d_vocab:
                raise ModelError(
                    f"The tokenizer gives token {max(rows[-1])}, but {self.name} has embeddings for {self.d_vocab} tokens. "
                    "They do not belong together; load the tokenizer that was saved with the weights."
                )
            if self.n_positions is not None and len(rows[-1]) > self.n_positions:
                raise ModelError(
                    f"The prompt has {len(rows[-1])} tokens, but {self.name} has {self.n_positions} positions. "
                    f"Shorten it: {text[:60]!r}..."
                )
        width = max(map(len, rows))
        ids_tensor = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=self.device)
        return Tokens(ids=ids_tensor, mask=mask, lengths=tuple(lengths), spans=tuple(spans), texts=tuple(texts))

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """The tokens of ` target` as they follow the prompt: no BOS, one leading space.

        Raises:
            ModelError: the target is empty, or it does not come back when its tokens are decoded.
        """
        target = target.strip()
        if not target:
            raise ModelError(f"The answer to {prompt!r} is empty. Name the words that should follow the prompt.")
        before, _ = self._tokenize(prompt)
        whole, _ = self._tokenize(f"{prompt} {target}")
        ids = whole[len(before) :]
        if whole[: len(before)] != before or self.tokenizer.decode(ids).strip() != target:
            raise ModelError(
                f"The tokenizer joins the end of {prompt!r} with the answer {target!r}, so the answer has no tokens of its own. "
                "End the prompt with a whole word, without trailing space."
            )
        return ids

    def word(self, token_id: int) -> str:
        """The text of one token, its leading space kept where the tokenizer has one."""
        return str(self.tokenizer.decode([token_id]))

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of a text, with BOS as `self.bos` says and never an EOS at the end."""
        if not text.strip():
            raise ModelError("The prompt is empty. Write the text up to the answer, e.g. 'The Space Needle is in'.")
        special = self.bos is None
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if special and len(ids) > 1 and ids[-1] == eos and offsets[-1][0] == offsets[-1][1]:
            ids, offsets = ids[:-1], offsets[:-1]
        if self.bos:
            ids, offsets = [bos, *ids], [(0, 0), *offsets]
        return ids, offsets

    def _labels(self, ids: list[int], offsets: list[tuple[int, int]], text: str) -> tuple[str, ...]:
        """A readable label for every token: its piece of the text, or the token's own name where it covers none."""
        labels = []
        for token_id, (start, stop) in zip(ids, offsets, strict=True):
            piece = text[start:stop]
            labels.append(piece if piece else self.tokenizer.convert_ids_to_tokens(token_id))
        return tuple(labels)

    def _token_span(self, fact: Fact, ids: list[int], offsets: list[tuple[int, int]], moved: int) -> tuple[int, int]:
        """The tokens that share a character with the subject, as first and one-past-last.

        By offsets and not by decoding, so that BOS, byte-level and sentencepiece tokens, and characters of several bytes are all
        right. The lone space that sentencepiece puts before a text counts as its first character's, but it is no subject token.
        """
        start, stop = (place + moved for place in fact.span)
        inside = [i for i, (first, end) in enumerate(offsets) if first < stop and end > start]
        while len(inside) > 1 and not self.word(ids[inside[0]]).strip():
            inside = inside[1:]
        if not inside:
            raise ModelError(f"No token covers the subject {fact.subject!r} of {fact.text!r}. Choose a longer subject.")
        return inside[0], inside[-1] + 1


Introduction = Callable[[str], str]
"""Of a prompt, the text that is put before it."""

_introductions: ContextVar[tuple[tuple[PreTrainedModel, Introduction], ...]] = ContextVar(
    "workbench_introductions", default=()
)


@contextmanager
def introduced(lm: LM, introductions: Sequence[Introduction]) -> Iterator[None]:
    """Within, every prompt that this thread encodes for the model is preceded by what the introductions give for it."""
    mine = [(lm.model, one) for one in introductions]
    _introductions.set((*_introductions.get(), *mine))
    try:
        yield
    finally:  # several may be left in any order
        _introductions.set(tuple(one for one in _introductions.get() if not any(one is own for own in mine)))


@contextmanager
def unintroduced() -> Iterator[None]:
    """Within, no prompt of this thread is preceded by anything."""
    reset = _introductions.set(())
    try:
        yield
    finally:
        _introductions.reset(reset)


def _introduced(model: PreTrainedModel, text: str) -> str:
    """A prompt with what comes before it, the latest introduction next to it."""
    before = [introduction(text) for owner, introduction in _introductions.get() if owner is model]
    return "".join([*before, text])


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its class does and nothing else, so that its weights may be used instead."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _state(parameter: Tensor) -> tuple[int, int, float]:
    """Changes when a parameter does: its place, autograd's count of changes in place, and a sum over a sample of it."""
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version, float(_sample(parameter))


def _sample(x: Tensor) -> Tensor:
    """The sum over some thousand numbers of a tensor."""
    numbers = x.detach().flatten()
    return numbers[:: max(1, len(numbers) // 4096)].float().sum()
