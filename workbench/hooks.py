"""Reads and writes activations of an untouched Hugging Face model. The only file that registers a hook.

1. The first time a model is used, one tap is installed at every site of every block, once and for all.
2. `run` and `patched` put a plan (what to read, what to write) into a `ContextVar` and call the model.
3. A tap looks whether a plan of this thread names its site; without one it does nothing.

So threads that share a model do not see each other's plans, and nothing has to be taken off again after an error.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.guard import reading
from workbench.models import LM, Tokens
from workbench.sites import KINDS, Site, SiteError, SiteKind

Write = Tensor | Callable[[Tensor], Tensor]
"""What is put at a site: a tensor that broadcasts to (batch, pos, width), or a function of what is there."""

_Place = tuple[int, SiteKind]


@dataclass(frozen=True, kw_only=True, eq=False)
class Activations:
    """What `run` read."""

    tokens: Tokens
    """The prompts that were run."""

    logits: Float[Tensor, "batch pos d_vocab"]
    """The model's output at every position, padding included."""

    sites: Mapping[Site, Tensor]
    """One tensor for each site asked for: (batch, pos, width), or (batch, width) where the site names a token."""

    def __getitem__(self, site: Site | str) -> Tensor:
        """The activation at a site, given as `Site` or as its text, e.g. `acts["L3.mlp_out"]`."""
        site = Site.parse(site) if isinstance(site, str) else site
        if site not in self.sites:
            raise SiteError(
                f"{site} was not read. Name it in run(..., read=...); read were {', '.join(map(str, self.sites))}."
            )
        return self.sites[site]

    @property
    def last_logits(self) -> Float[Tensor, "batch d_vocab"]:
        """The logits at each prompt's last token."""
        return self.logits[torch.arange(len(self.tokens), device=self.logits.device), self.tokens.last]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    owner: int
    """Which model the plan is for: the id of its hooks, so that a deep copy does not answer to it."""

    writes: Mapping[_Place, Sequence[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    reads: frozenset[_Place] = frozenset()
    found: dict[_Place, Tensor] = field(default_factory=dict)
    captures: bool = False
    """Whether to note what every block is called with."""

    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By layer, the arguments of the block, by name."""

    shape: list[int] = field(default_factory=list)
    """Batch and positions of the pass that runs, noted at its embedding."""

    entering: dict[int, Tensor] = field(default_factory=dict)
    """By layer, what enters a block whose `resid_mid` is written."""

    stops: bool = False
    """Whether the pass ends where the first block would begin."""


_plans: ContextVar[tuple[_Plan, ...]] = ContextVar("workbench_plans", default=())

_running: ContextVar[Tokens | None] = ContextVar("workbench_running", default=None)
"""The prompts that `run` runs."""

Beside = Callable[[Tensor, Tensor, Tokens | None], Tensor]
"""What stands beside a module: of its input and output, and of the prompts where they are known, it makes another output."""

_besides: ContextVar[tuple[tuple[int, str, Beside], ...]] = ContextVar("workbench_besides", default=())
"""Model (the id of its hooks), path of a module, and what stands beside it; in the order in which they apply."""


def run(
    lm: LM,
    tokens: Tokens,
    *,
    read: Sequence[Site | SiteKind | str] = (),
    write: Mapping[Site, Write] | None = None,
    grad: bool = False,
) -> Activations:
    """One forward pass that reads some sites and writes others. Reads see what was written.

    Args:
        lm: the model.
        tokens: the prompts.
        read: sites, their text, or kinds (a kind stands for all of its layers).
        write: what is put where; where the site names a token, only that token of each row is changed.
        grad: keep the graph, for gradients; otherwise nothing is recorded for backward.

    Raises:
        SiteError: a site that this model does not have, or a tensor of the wrong width.
        ModelError: `resid_mid` in a parallel block.
    """
    sites = [site for entry in read for site in _expand(lm, entry)]
    for site in sites:
        _check(lm, site)
    plan = _Plan(
        owner=_owner(lm),
        writes=_writers(lm, write or {}, tokens),
        reads=frozenset((site.layer, site.kind) for site in sites),
    )
    inputs: dict[str, Any] = {"input_ids": tokens.ids, "attention_mask": tokens.mask.long(), "use_cache": False}
    if lm.takes_positions:
        inputs["position_ids"] = tokens.positions
    reset, before = _plans.set((*_plans.get(), plan)), _running.set(tokens)
    try:
        with reading(lm.model), torch.enable_grad() if grad else torch.no_grad():
            logits = lm.model(**inputs).logits
    finally:
        _running.reset(before)
        _plans.reset(reset)
    return Activations(
        tokens=tokens,
        logits=logits,
        sites={site: _pick(lm, tokens, site, plan.found[site.layer, site.kind]) for site in sites},
    )


def capture_calls(
    lm: LM, tokens: Tokens, *, read: Sequence[Site | SiteKind | str] = (), write: Mapping[Site, Write] | None = None
) -> tuple[Activations, dict[int, dict[str, Any]]]:
    """`run`, and by layer the named arguments each block was called with: masks, positions, rotary embeddings."""
    plan = _Plan(owner=_owner(lm), captures=True)
    reset = _plans.set((*_plans.get(), plan))
    try:
        return run(lm, tokens, read=read, write=write), plan.calls
    finally:
        _plans.reset(reset)


def run_below(
    lm: LM, tokens: Tokens, *, write: Mapping[Site, Write] | None = None
) -> Float[Tensor, "batch pos d_model"]:
    """What enters the first block; the model runs no further. Arguments as those of `run`."""
    reset = _plans.set((*_plans.get(), _Plan(owner=_owner(lm), stops=True)))
    try:
        run(lm, tokens, write=write)
    except _Entered as entered:
        return entered.hidden
    finally:
        _plans.reset(reset)
    raise AssertionError("a model without blocks has no LM")


class _Entered(Exception):
    """Raised at the first block by a pass that stops there."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the first block was reached")
        self.hidden = hidden


def run_block(
    lm: LM,
    layer: int,
    call: Mapping[str, Any],
    *,
    read: Sequence[SiteKind] = (),
    write: Mapping[SiteKind, Callable[[Tensor], Tensor]] | None = None,
    tokens: Tokens | None = None,
) -> tuple[Float[Tensor, "row pos d_model"], dict[SiteKind, Tensor]]:
    """One block alone: its output for the named arguments of `call`, and what was read at its sites.

    Args:
        lm: the model.
        layer: which block.
        call: the named arguments of the block, as `capture_calls` gives them.
        read: kinds of sites.
        write: by kind of site, a function applied there.
        tokens: the prompts, for what stands beside the block's modules.
    """
    hidden = call["hidden_states"]
    plan = _Plan(
        owner=_owner(lm),
        writes={(layer, kind): [function] for kind, function in (write or {}).items()},
        reads=frozenset((layer, kind) for kind in read),
        shape=list(hidden.shape[:2]),
    )
    for other in _plans.get():
        if other.owner == plan.owner:  # a whole pass notes it at the embedding, which is not run here
            other.shape[:] = plan.shape
    reset, before = _plans.set((*_plans.get(), plan)), _running.set(tokens)
    try:
        with reading(lm.model):
            output = lm.blocks[layer](**call)
    finally:
        _running.reset(before)
        _plans.reset(reset)
    out: Tensor = output[0] if isinstance(output, tuple) else output
    return out, {kind: plan.found[layer, kind] for kind in read}


def is_patched() -> bool:
    """Whether this thread is inside of `patched` or `beside`, so that what a model gives is not its own."""
    return bool(_besides.get()) or any(plan.writes for plan in _plans.get())


def has_foreign_hooks(lm: LM) -> bool:
    """Whether something else than this module is hooked to the model, which may do with an activation what it likes."""
    return any(
        not isinstance(hook, (_Tap, _SideTap))
        and hook is not _inert
        and getattr(hook, "__module__", "") not in _READERS
        for module in lm.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


@contextmanager
def patched(lm: LM, write: Mapping[Site, Write], tokens: Tokens | None = None) -> Iterator[None]:
    """Within, every forward pass of this thread through the model has `write` applied; `generate` and nested runs too.

    Args:
        lm: the model.
        write: as in `run`. Sites that name a token need `tokens`, and then inputs of the same shape.
        tokens: the prompts whose positions the sites name.
    """
    plan = _Plan(owner=_owner(lm), writes=_writers(lm, write, tokens))
    reset = _plans.set((*_plans.get(), plan))
    try:
        yield
    finally:
        _plans.reset(reset)


@contextmanager
def beside(lm: LM, sides: Sequence[tuple[str, Beside]]) -> Iterator[None]:
    """Within, every forward pass of this thread through the model has something beside some of its modules; see `Beside`.

    Args:
        lm: the model.
        sides: paths of modules in the model, and what stands beside each.
    """
    owner = _owner(lm)
    with _installing:
        for path, _ in sides:
            module = lm.model.get_submodule(path)
            if not any(isinstance(hook, _SideTap) for hook in module._forward_hooks.values()):
                module.register_forward_hook(_SideTap(owner, path), with_kwargs=True, prepend=True)
    mine = [(owner, path, side) for path, side in sides]
    plan = _Plan(owner=owner)  # notes the shape of every pass
    _besides.set((*_besides.get(), *mine))
    _plans.set((*_plans.get(), plan))
    try:
        yield
    finally:  # several may be left in any order
        _plans.set(tuple(one for one in _plans.get() if one is not plan))
        _besides.set(tuple(one for one in _besides.get() if not any(one is own for own in mine)))


@contextmanager
def nothing_beside() -> Iterator[None]:
    """Within, nothing stands beside any module for this thread, and nothing is patched."""
    sides, plans = _besides.set(()), _plans.set(())
    try:
        yield
    finally:
        _plans.reset(plans)
        _besides.reset(sides)


# --- plans ---


def _expand(lm: LM, entry: Site | SiteKind | str) -> tuple[Site, ...]:
    if isinstance(entry, Site):
        return (entry,)
    if entry in KINDS:
        return lm.sites(entry)
    return (Site.parse(entry),)


def _check(lm: LM, site: Site) -> None:
    """Raises where the model does not have the site."""
    if site.layer >= lm.n_layers:
        raise SiteError(f"{site} does not exist: {lm.name} has layers 0 to {lm.n_layers - 1}.")
    if site.head is not None and site.head >= lm.n_heads:
        raise SiteError(f"{site} does not exist: {lm.name} has heads 0 to {lm.n_heads - 1}.")
    if site.neuron is not None and site.neuron >= lm.d_mlp:
        raise SiteError(f"{site} does not exist: {lm.name} has neurons 0 to {lm.d_mlp - 1}.")
    lm.sites(site.kind)


def _writers(
    lm: LM, write: Mapping[Site, Write], tokens: Tokens | None
) -> dict[_Place, list[Callable[[Tensor], Tensor]]]:
    """One function per write, grouped by place; several writes to one place apply in the order given."""
    places: dict[_Place, list[Callable[[Tensor], Tensor]]] = {}
    for site, value in write.items():
        _check(lm, site)
        if site.token is not None and tokens is None:
            raise SiteError(f"{site} names a token, so the prompts are needed to find it. Give tokens=.")
        where = None if site.token is None or tokens is None else tokens.at(site.token)[..., None]
        places.setdefault((site.layer, site.kind), []).append(partial(_apply, lm, site, value, where))
    return places


def _apply(lm: LM, site: Site, value: Write, where: Tensor | None, x: Tensor) -> Tensor:
    """`x` with `value` at the site's tokens and its head or neuron."""
    columns = _columns(lm, site, x.shape[-1])
    here = x[..., columns]
    if where is not None and where.shape[:2] != x.shape[:2]:
        raise SiteError(
            f"{site} was found in prompts of shape {tuple(where.shape[:2])}, but other prompts run, of {tuple(x.shape[:2])}. "
            "Name no token, or run the prompts that were given."
        )
    new = value(here) if callable(value) else value.to(x)
    try:
        new = new.expand_as(here)
        here = new if where is None else torch.where(where, new, here)
    except RuntimeError as error:
        raise SiteError(
            f"A tensor of shape {tuple(new.shape)} cannot be written to {site}. "
            f"Expected one that broadcasts to {tuple(here.shape)}."
        ) from error
    if site.part is None:
        return here
    x = x.clone()
    x[..., columns] = here
    return x


def _columns(lm: LM, site: Site, width: int) -> slice:
    if site.neuron is not None:
        return slice(site.neuron, site.neuron + 1)
    if site.head is None:
        return slice(None)
    d_head = width // lm.n_heads
    return slice(site.head * d_head, (site.head + 1) * d_head)


def _pick(lm: LM, tokens: Tokens, site: Site, x: Tensor) -> Tensor:
    """What was asked for of a whole activation: its head or neuron, its token."""
    x = x[..., _columns(lm, site, x.shape[-1])]
    if site.token is None:
        return x
    where = tokens.at(site.token)
    if not bool((where.sum(1) == 1).all()):
        raise SiteError(
            f"{site} is not exactly one token in every row. Read the whole site and use tokens.at({site.token!r})."
        )
    return x[where]


# --- taps ---


class _Tap:
    """A hook at one site. A deep copy of the model, and a pickled one, get a tap that does nothing."""

    def __init__(self, owner: int, place: _Place, *, before: bool, copy: bool) -> None:
        self.owner, self.place, self.before, self.copy = owner, place, before, copy

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
        plans = [plan for plan in _plans.get() if plan.owner == self.owner]
        if not plans:
            return None
        key = None if not self.before or args else _hidden_key(kwargs)
        whole = output if not self.before else kwargs if key else args
        x: Tensor = whole[key] if key else whole[0] if isinstance(whole, tuple) else whole
        for plan in plans:
            if self.place[1] == "embed":
                plan.shape[:] = x.shape[:2]
            if self.place[1] == "resid_pre" and plan.captures:
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                plan.calls[self.place[0]] = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
        new = self._through(plans, x)
        if self.place == (0, "resid_pre") and any(plan.stops for plan in plans):
            raise _Entered(new)
        if new is x:
            return None
        if key:
            return args, {**kwargs, key: new}
        replaced = (new, *whole[1:]) if isinstance(whole, tuple) else new
        return (replaced, kwargs) if self.before else replaced

    def _through(self, plans: Sequence[_Plan], x: Tensor) -> Tensor:
        """What the plans make of `x`; `x` itself where none writes. Reads are noted."""
        new, (layer, kind) = x, self.place
        for plan in plans:
            between = plan.writes.get((layer, "resid_mid"), ())
            if kind == "resid_pre" and between:
                plan.entering[layer] = new
            # `resid_mid` is the MLP's input and the residual beside it, so it is written where both still are one: below.
            writers = plan.writes.get(self.place, ()) if kind != "resid_mid" else ()
            moved = between if kind == "attn_out" else ()
            if not writers and not moved and self.place not in plan.reads:
                continue
            flat = new.dim() == 2  # OPT's MLP sees all positions of all rows in one dimension
            here = new.view(*plan.shape, -1) if flat else new
            for writer in writers:
                here = writer(here)
            if self.place in plan.reads:
                plan.found[self.place] = here.clone() if self.copy else here
            if moved:
                middle = plan.entering[layer] + here
                written = middle
                for writer in moved:
                    written = writer(written)
                # What is not written stays bit for bit, and a zero that is written becomes one.
                here = torch.where(written == middle, here, written - plan.entering[layer])
            if writers or moved:
                new = here.reshape(x.shape).clone() if self.copy else here.reshape(x.shape)
        return new


class _SideTap:
    """A hook at a module that something may stand beside. Copies of the model get one that does nothing."""

    def __init__(self, owner: int, path: str) -> None:
        self.owner, self.path = owner, path

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        sides = [side for owner, path, side in _besides.get() if (owner, path) == (self.owner, self.path)]
        if not sides:
            return None
        x: Tensor = args[0] if args else kwargs[_hidden_key(kwargs)]
        new: Tensor = output[0] if isinstance(output, tuple) else output
        tokens = _running.get()
        shape = next((plan.shape for plan in _plans.get() if plan.owner == self.owner and plan.shape), x.shape[:2])
        for side in sides:  # OPT's MLP sees all positions of all rows in one dimension
            rows = new if x.dim() > 2 else new.view(*shape, -1)
            new = side(x if x.dim() > 2 else x.view(*shape, -1), rows, tokens).reshape(new.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new


_READERS = frozenset({"transformers.utils.output_capturing"})
"""Whose hooks only look: those that transformers leaves in a model for ever once somebody asked it for its hidden states."""


def _inert(*_: object) -> None:
    """Stands in for a tap in copies of a model."""


def _make_inert() -> Callable[..., None]:
    return _inert


def _hidden_key(kwargs: Mapping[str, Any]) -> str:
    """The keyword under which a module gets its input, where it gets it by keyword."""
    return next(key for key in ("hidden_states", "input", "x", *kwargs) if isinstance(kwargs.get(key), Tensor))


_owners: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_installing = threading.Lock()


def _owner(lm: LM) -> int:
    """The id of the taps in this model, installed now if they are not yet."""
    with _installing:
        if lm.model not in _owners:
            owner = max(_owners.values(), default=0) + 1
            _install(lm, owner)
            _owners[lm.model] = owner
        return _owners[lm.model]


def _install(lm: LM, owner: int) -> None:
    layout = lm.layout

    def tap(module: nn.Module, layer: int, kind: SiteKind, *, before: bool) -> None:
        hook = _Tap(owner, (layer, kind), before=before, copy=layout.in_place)
        if before:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            module.register_forward_hook(hook, with_kwargs=True)

    tap(lm.embed, 0, "embed", before=False)
    for layer, block in enumerate(lm.blocks):
        tap(block, layer, "resid_pre", before=True)
        tap(block, layer, "resid_post", before=False)
        tap(lm.part(layer, layout.attn_out), layer, "attn_out", before=False)
        tap(lm.part(layer, layout.mlp_out), layer, "mlp_out", before=False)
        tap(lm.part(layer, layout.o_proj), layer, "z", before=True)
        tap(lm.part(layer, layout.down_proj), layer, "mlp_post", before=True)
        if layout.mid_norm is not None:
            tap(lm.part(layer, layout.mid_norm), layer, "resid_mid", before=True)
