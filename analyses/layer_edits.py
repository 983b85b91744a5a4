"""One fact edited at every layer at once: the single edits of fine-tuning, ROME and MEMIT as rows of one batch.

Row i of a batch is an edit that begins at its own layer, so all rows share the run below it, and an edit costs a fraction of what
it costs alone:

1. The prompt with its answer runs once; what enters every block is kept (`Ascent`).
2. Rows enter at their layer and go up together, each with its own addition to the MLPs' outputs, and down together in backward.
3. Rows whose loss is small enough leave the batch.

What comes out is what the editors give one by one for the prompt alone: `prefix_lengths=()` and `essence=()`. Values that two
edits look for at one layer are looked for once. Beside the editors', there is a goal that lowers the answer's probability (Hase et
al. 2023, arXiv 2301.04213, sec. 5.1): its loss is the probability itself, as in the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.editors._gradients import learning
from workbench.editors._values import ValueEditor, better, solve
from workbench.editors.fine_tune import FineTune
from workbench.editors.memit import Memit
from workbench.editors.rome import SMALLEST_COSINE, Rome
from workbench.facts import Fact
from workbench.hooks import capture_calls, run_block
from workbench.models import LM, ModelError, Tokens
from workbench.moments import second_moments
from workbench.sites import Site, window

MOST_NUMBERS = 2**27
"""Fine-tuning keeps so many numbers at once, changes and Adam's moments together; where rows need more they go in groups."""

_AGREES = 1e-3
"""How far the log-probability of an answer may be from the model's own when the blocks run one by one."""

Shift = tuple[Float[Tensor, "d_mlp rank"], Float[Tensor, "rank d_model"]] | Float[Tensor, "d_mlp d_model"]
"""What is added to a down projection, as a map from keys to values (x @ shift): two factors, or the whole."""

Shifts = Mapping[int, Shift]
"""By layer, one edit."""

Add = Callable[[int, int, Float[Tensor, "pos d_mlp"]], Tensor | None]
"""Of a layer, a row and its keys: what is added to the MLP's output (pos, d_model), or None."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ascent:
    """A prompt with its answer, run once; rows of it can be run anew from any layer on."""

    lm: LM
    """The model."""

    tokens: Tokens
    """The prompt, with the answer's tokens but the last behind it."""

    ids: tuple[int, ...]
    """The answer's tokens."""

    calls: Mapping[int, Mapping[str, Any]]
    """By layer, what its block was called with."""

    own: Float[Tensor, " step"]
    """The log-probability of each of the answer's tokens without any change."""

    keys: Float[Tensor, "layer pos d_mlp"]
    """What entered the down projections."""

    values: Mapping[str, Float[Tensor, "layer pos d_model"]]
    """The MLPs' outputs (`mlp_out`) and the states after the blocks (`resid_post`)."""

    @classmethod
    def of(
        cls, lm: LM, prompt: Fact | str, answer: str, *, noise: Float[Tensor, "pos d_model"] | None = None
    ) -> Ascent:
        """Runs a prompt.

        Args:
            lm: the model.
            prompt: a fact or a text.
            answer: what is scored.
            noise: is added to the embeddings of the subject's tokens, of which there may be fewer; None: nothing.

        Raises:
            ModelError: the family normalises what its MLPs add, or its blocks cannot be run one by one.
        """
        if lm.layout.mlp_out.endswith("norm"):
            raise ModelError(
                f"{lm.layout.family} normalises what its MLPs add, so edits of several layers cannot share a run. "
                "Use another model."
            )
        tokens = lm.encode([prompt], targets=[answer])
        text = prompt.text if isinstance(prompt, Fact) else prompt
        ids = tuple(lm.target_ids(text, answer))
        write = {} if noise is None else {Site(layer=0, kind="embed"): noised(tokens, noise)}
        acts, calls = capture_calls(lm, tokens, read=["mlp_post", "mlp_out", "resid_post"], write=write)
        read = {
            kind: torch.stack([acts[site][0] for site in lm.sites(kind)])
            for kind in ("mlp_post", "mlp_out", "resid_post")
        }
        steps = int(tokens.last[0]) + torch.arange(len(ids), device=acts.logits.device)
        own = acts.logits[0, steps].to(better(lm)).log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        ascent = cls(
            lm=lm, tokens=tokens, ids=ids, calls=calls, own=own, keys=read.pop("mlp_post"), values=read
        )  # fmt: skip
        again = ascent.log_p([lm.n_layers - 1], lambda layer, row, x: None)[0]
        if not torch.allclose(again, own, atol=_AGREES, rtol=_AGREES):
            raise ModelError(
                f"{lm.layout.family} gives other answers when its last block and unembedding run alone. Use another model."
            )
        return ascent

    @property
    def subject_last(self) -> int:
        """The position of the subject's last token."""
        return int(self.tokens.at("subject_last")[0].int().argmax())

    def log_p(
        self, starts: Sequence[int], add: Add, *, after: Callable[[int, Sequence[int], Tensor], None] | None = None
    ) -> Float[Tensor, "row step"]:
        """The log-probability of each of the answer's tokens, with its graph where gradients are on.

        Args:
            starts: by row, the layer below which it is the model's own run.
            add: see `Add`; asked for every layer from a row's start on.
            after: sees layer, rows and states (row, pos, d_model) after each block.
        """
        active: list[int] = []
        hidden: Tensor | None = None
        for layer in range(min(starts), self.lm.n_layers):
            new = [row for row, start in enumerate(starts) if start == layer]
            if new:
                own = self.calls[layer]["hidden_states"].expand(len(new), -1, -1)
                hidden = own if hidden is None else torch.cat([hidden, own])
                active += new
            assert hidden is not None  # rows enter at the lowest start
            hidden = self._block(layer, hidden, active, add)
            if after is not None:
                after(layer, active, hidden)
        assert hidden is not None
        first = int(self.tokens.last[0])
        logits = self.lm.unembed(self.lm.final_norm(hidden[:, first : first + len(self.ids)])).to(better(self.lm))
        scale = getattr(self.lm.model.config.get_text_config(), "logit_scale", None) or 1.0  # Cohere has one
        log_p: Tensor = (logits * scale).log_softmax(-1)[
            :, torch.arange(len(self.ids)), torch.tensor(self.ids, device=logits.device)
        ]
        return log_p[torch.tensor(np.argsort(active), device=log_p.device)]

    def _block(self, layer: int, hidden: Tensor, rows: Sequence[int], add: Add) -> Tensor:
        """One block for all active rows."""
        call = {**self.calls[layer], "hidden_states": hidden}
        if (ids := call.get("position_ids")) is not None:
            call["position_ids"] = ids[:1].expand(len(rows), -1)
        if (mask := call.get("attention_mask")) is not None and mask.dim() == 4:
            call["attention_mask"] = mask[:1].expand(len(rows), -1, -1, -1)
        if (
            alibi := call.get("alibi")
        ) is not None and alibi.dim() == 3:  # BLOOM's has batch and heads in one dimension
            call["alibi"] = alibi[: self.lm.n_heads].repeat(len(rows), 1, 1)
        keys: list[Tensor] = []

        def note(x: Tensor) -> Tensor:
            keys.append(x)
            return x

        def put(y: Tensor) -> Tensor:
            parts = [add(layer, row, x) for row, x in zip(rows, keys[-1], strict=True)]
            if all(part is None for part in parts):
                return y
            return y + torch.stack([torch.zeros_like(y[0]) if part is None else part.to(y) for part in parts])

        above, _ = run_block(self.lm, layer, call, write={"mlp_post": note, "mlp_out": put})
        return above


def noised(tokens: Tokens, noise: Float[Tensor, "pos d_model"]) -> Callable[[Tensor], Tensor]:
    """Adds noise to the embeddings of the subject of one prompt, however many tokens follow it."""
    span = tokens.spans[0]
    assert span is not None  # noise is for facts

    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, span[0] : span[1]] += noise[: span[1] - span[0]].to(x)
        return x

    return write


def log_p_with(ascent: Ascent, edits: Sequence[Shifts]) -> Float[Tensor, "edit step"]:
    """The log-probability of the answer's tokens with each of some edits."""
    with torch.no_grad():
        return ascent.log_p([min(edit) for edit in edits], lambda layer, row, x: _shift(edits[row].get(layer), x))


def _shift(shift: Shift | None, x: Tensor) -> Tensor | None:
    """What a shift makes of keys."""
    if shift is None:
        return None
    return (x @ shift[0].to(x)) @ shift[1].to(x) if isinstance(shift, tuple) else x @ shift.to(x)


# --- ROME and MEMIT ---


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """The inverse second moments of the keys, each computed when a layer is first used; float64, d_mlp^2 numbers a layer."""

    lm: LM
    """The model."""

    options: ValueEditor
    """Says of which text."""

    known: dict[int, Tensor] = field(default_factory=dict)
    """Those that were used."""

    def direction(self, layer: int, key: Float[Tensor, " d_mlp"]) -> Float[Tensor, " d_mlp"]:
        """C^-1 k in float64; k itself where the options have no covariance.

        Raises:
            EditError: C cannot be inverted.
        """
        key = key.detach().double().cpu()
        if not self.options.covariance:
            return key
        if layer not in self.known:
            found = second_moments(
                self.lm, range(self.lm.n_layers), corpus=self.options.corpus, tokens=self.options.moment_tokens
            ).matrix(layer)
            alive = torch.diag((found.diagonal() > 0).double())  # neurons that no text activates have no direction
            self.known[layer] = solve(found, alive, what=f"The second moment of layer {layer}")[0]
        return self.known[layer] @ key


def find_deltas(
    ascent: Ascent, layers: Sequence[int], options: ValueEditor, *, place: str, lower: bool
) -> dict[int, Float[Tensor, " d_model"]]:
    """By layer, what added to the MLP's output at the subject's last token gives the answer: `find_values` for all layers at once.

    Args:
        ascent: the prompt and the answer.
        layers: where.
        options: the editor.
        place: of what the reference is the length where the options say `value`: `mlp_out` (ROME) or `resid_post` (MEMIT).
        lower: the answer's probability is to fall; the loss is the probability then.
    """
    lm, at = ascent.lm, ascent.subject_last
    kind = place if options.reference == "value" else "resid_post"
    todo = list(layers)
    reference = torch.stack([ascent.values[kind][layer, at].to(better(lm)).norm() for layer in todo])
    deltas = torch.zeros(len(todo), lm.d_model, dtype=better(lm), device=lm.device)
    here = torch.zeros(ascent.tokens.ids.shape[1], 1, dtype=better(lm), device=lm.device)
    here[at] = 1
    adam = _Adam(deltas, rate=options.learning_rate)
    found: dict[int, Tensor] = {}
    for step in range(options.steps + 1):
        free, own = adam.x.detach().requires_grad_(), todo

        def add(layer: int, row: int, x: Tensor, free: Tensor = free, own: list[int] = own) -> Tensor | None:
            return here * free[row] if layer == own[row] else None

        with learning():
            log_p = ascent.log_p(own, add).mean(1)
            size = free.square().sum(1).clamp(min=1e-30).sqrt()  # has a gradient at 0
            loss = (log_p.exp() if lower else -log_p) + options.weight_decay * size / reference**2
        done = loss.detach() < options.stop_below
        if step == options.steps:
            done = torch.ones_like(done)
        found |= {own[i]: adam.x[i].clone() for i in done.nonzero()[:, 0].tolist()}
        if bool(done.all()):
            break
        (slopes,) = torch.autograd.grad(loss.sum(), [free])
        adam.keep(~done)
        todo, reference = [layer for layer, over in zip(own, done.tolist(), strict=True) if not over], reference[~done]
        adam.step(slopes[~done])
        adam.x *= (options.clamp * reference / adam.x.norm(dim=1)).clamp(max=1.0)[:, None]
    return found


def rome_shifts(
    ascent: Ascent, deltas: Mapping[int, Tensor], moments: Moments
) -> tuple[dict[int, Shifts], dict[int, str]]:
    """By layer, ROME's edit that puts a delta there; and by layer, why there is none."""
    found: dict[int, Shifts] = {}
    refused = {}
    for layer, delta in deltas.items():
        key = ascent.keys[layer, ascent.subject_last].double().cpu()
        direction = moments.direction(layer, key)
        direction = direction / direction.norm()
        along = float(direction @ key)
        if abs(along) < SMALLEST_COSINE * float(key.norm()):
            refused[layer] = f"At layer {layer} the direction is orthogonal to the key, so the change would explode."
            continue
        found[layer] = {layer: _product(ascent.lm, direction, delta.double().cpu() / along)}
    return found, refused


def memit_shifts(
    ascent: Ascent, windows: Mapping[int, range], deltas: Mapping[int, Tensor], options: Memit, moments: Moments
) -> dict[int, Shifts]:
    """By a window's name, MEMIT's edit of these layers for a delta at the last of them; see `workbench.editors.memit`."""
    lm, at = ascent.lm, ascent.subject_last
    names = list(windows)
    shifts: list[dict[int, Shift]] = [{} for _ in names]
    for turn in range(max(map(len, windows.values()))):
        taken: list[tuple[Tensor, Tensor] | None] = [None] * len(names)
        keys: dict[int, Tensor] = {}

        def add(layer: int, row: int, x: Tensor, turn: int = turn, keys: dict[int, Tensor] = keys) -> Tensor | None:
            window = windows[names[row]]
            if turn < len(window) and layer == window[turn]:
                keys[row] = x[at]
            return _shift(shifts[row].get(layer), x)

        states: dict[int, Tensor] = {}

        def after(layer: int, rows: Sequence[int], hidden: Tensor, states: dict[int, Tensor] = states) -> None:
            states.update({row: hidden[i, at] for i, row in enumerate(rows) if layer == windows[names[row]][-1]})

        with torch.no_grad():
            ascent.log_p([windows[name].start for name in names], add, after=after)
        for row, name in enumerate(names):
            window = windows[name]
            if turn >= len(window):
                continue
            layer, last = window[turn], window[-1]
            wanted = ascent.values["resid_post"][last, at].double().cpu() + deltas[last].double().cpu()
            missing = (wanted - states[row].double().cpu()) * options.share(len(window) - turn)
            key = keys[row].double().cpu()
            plain = moments.direction(layer, key) / options.ridge
            taken[row] = plain / (1 + key @ plain), missing  # (ridge C + k k^T)^-1 k
        for row, name in enumerate(names):
            if (one := taken[row]) is not None:
                shifts[row][windows[name][turn]] = _product(lm, *one)
    return dict(zip(names, shifts, strict=True))


def _product(lm: LM, right: Float[Tensor, " d_mlp"], left: Float[Tensor, " d_model"]) -> Shift:
    return right[:, None].to(lm.device, better(lm)), left[None].to(lm.device, better(lm))


# --- fine-tuning ---


def fine_tune_shifts(
    ascent: Ascent, windows: Mapping[int, range], options: FineTune, *, lower: bool
) -> dict[int, Shifts]:
    """By a window's name, what fine-tuning of these layers' down projections gives: `FineTune` for all windows at once."""
    size = ascent.lm.d_mlp * ascent.lm.d_model * max(map(len, windows.values()))
    at_once = max(1, MOST_NUMBERS // (5 * size))  # the change, two moments, a gradient and a step
    names = list(windows)
    found: dict[int, Shifts] = {}
    for first in range(0, len(names), at_once):
        found |= _fine_tuned(ascent, {name: windows[name] for name in names[first : first + at_once]}, options, lower)
    return found


def _fine_tuned(ascent: Ascent, windows: Mapping[int, range], options: FineTune, lower: bool) -> dict[int, Shifts]:
    lm, todo = ascent.lm, list(windows)
    width = max(map(len, windows.values()))
    adam = _Adam(
        torch.zeros(len(todo), width, lm.d_mlp, lm.d_model, dtype=better(lm), device=lm.device),
        rate=options.learning_rate,
    )
    found: dict[int, Shifts] = {}
    for step in range(options.steps + 1):
        own = todo
        free = [[part.detach().requires_grad_() for part in row] for row in adam.x]

        def add(
            layer: int, row: int, x: Tensor, free: list[list[Tensor]] = free, own: list[int] = own
        ) -> Tensor | None:
            window = windows[own[row]]
            return x @ free[row][layer - window.start].to(x) if layer in window else None

        with learning():
            log_p = ascent.log_p([windows[name].start for name in own], add).mean(1)
            loss = log_p.exp() if lower else -log_p
        done = loss.detach() < options.stop_below
        if step == options.steps:
            done = torch.ones_like(done)
        for i in done.nonzero()[:, 0].tolist():
            found[own[i]] = {layer: adam.x[i, j].clone() for j, layer in enumerate(windows[own[i]])}
        if bool(done.all()):
            break
        used = [
            (i, j)
            for i, name in enumerate(own)
            for j in range(len(windows[name]))
        ]  # fmt: skip
        slopes = torch.zeros_like(adam.x)
        for (i, j), slope in zip(used, torch.autograd.grad(loss.sum(), [free[i][j] for i, j in used]), strict=True):
            slopes[i, j] = slope
        todo = [name for name, over in zip(own, done.tolist(), strict=True) if not over]
        if len(todo) < len(own):
            adam.keep(~done)
            slopes = slopes[~done]
        adam.step(slopes)
        if options.norm_constraint is not None:
            adam.x.clamp_(-options.norm_constraint, options.norm_constraint)
    return found


# --- editors by name ---

EditorName = Literal["FT", "FT5", "ROME", "MEMIT"]
"""FT and ROME change one layer, FT5 and MEMIT a window of layers."""

LayerEditor = FineTune | Rome | Memit

_SEARCH = ("steps", "learning_rate", "stop_below", "weight_decay", "clamp", "reference")
"""What the search for a value depends on."""


def layer_editor(lm: LM, name: EditorName, *, bound: float | None, **options: Any) -> LayerEditor:
    """An editor with its settings for the model, for the prompt alone; `bound` is that of fine-tuning, of which FT5 has half."""
    if name == "ROME":
        return Rome.fitted(lm, prefix_lengths=(), essence=(), **options)
    if name == "MEMIT":
        return Memit.fitted(lm, prefix_lengths=(), essence=(), **options)
    half = bound if bound is None or name == "FT" else bound / 2
    return replace(FineTune.fitted(lm, **options), layers=None, norm_constraint=half)


def spans_of(lm: LM, name: EditorName, *, width: int) -> dict[int, range]:
    """By layer, what an edit of this layer changes: itself, or the window around it, clipped to the model."""
    return {layer: window(layer, 1 if name in ("FT", "ROME") else width, lm.n_layers) for layer in range(lm.n_layers)}


def edit_every_layer(
    ascent: Ascent,
    editors: Mapping[EditorName, LayerEditor],
    moments: dict[str, Moments],
    *,
    width: int,
    lower: bool = False,
    done: Callable[[EditorName], None] = lambda name: None,
) -> dict[EditorName, dict[int, Shifts]]:
    """By editor and layer, the edit; a layer where ROME would explode is left out.

    Args:
        ascent: the prompt and the answer.
        editors: by name.
        moments: those that earlier calls used, by corpus; more are put in.
        width: layers of a window.
        lower: the answer's probability is to fall.
        done: is told when an editor is done.

    Raises:
        EditError: a second moment cannot be inverted.
    """
    lm = ascent.lm
    found: dict[EditorName, dict[int, Shifts]] = {}
    deltas: dict[Any, dict[int, Tensor]] = {}
    for name, editor in editors.items():
        spans = spans_of(lm, name, width=width)
        if isinstance(editor, FineTune):
            made = fine_tune_shifts(ascent, spans, editor, lower=lower)
        else:
            place = "mlp_out" if isinstance(editor, Rome) else "resid_post"
            key = (*(getattr(editor, option) for option in _SEARCH), place if editor.reference == "value" else "")
            known = deltas.setdefault(
                key, {}
            )  # MEMIT looks for the values that ROME looks for, at the last of its layers
            if layers := sorted({span[-1] for span in spans.values()} - set(known)):
                known |= find_deltas(ascent, layers, editor, place=place, lower=lower)
            inverse = moments.setdefault(f"{editor.covariance} {editor.corpus}", Moments(lm=lm, options=editor))
            if isinstance(editor, Memit):
                made = memit_shifts(ascent, spans, known, editor, inverse)
            else:
                made, _ = rome_shifts(ascent, {layer: known[layer] for layer in spans}, inverse)
        found[name] = dict(sorted(made.items()))
        done(name)
    return found


class _Adam:
    """`torch.optim.Adam` with its defaults for rows that may leave; every entry of x has its own steps."""

    def __init__(self, x: Tensor, *, rate: float) -> None:
        self.x, self.rate, self.steps = x, rate, 0
        self.first, self.second = torch.zeros_like(x), torch.zeros_like(x)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.x, self.first, self.second = (y[rows] for y in (self.x, self.first, self.second))

    def step(self, slope: Tensor) -> None:
        """One step along the gradient."""
        self.steps += 1
        self.first.lerp_(slope, 0.1)
        self.second.mul_(0.999).addcmul_(slope, slope, value=0.001)
        scale = (self.second / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        self.x.addcdiv_(self.first, scale, value=-self.rate / (1 - 0.9**self.steps))
