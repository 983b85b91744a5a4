"""Where in a transformer something is read or written, and how that is spelled.

Grammar of a site: `L17.mlp_out@subject_last`, `L5.z[3]@last` (a head), `L5.mlp_post[17]@last` (a neuron), `L0.resid_pre@4`,
`embed@subject_first`, `L3.attn_out`.
Layers are 0-based. Kinds are TransformerLens' hook names without their prefix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from workbench.errors import InputError

SiteKind = Literal["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "mlp_post"]
"""What is read:

- `embed`: output of the token embedding, before positions are added (d_model)
- `resid_pre`, `resid_mid`, `resid_post`: residual stream before the block, between its halves, after it (d_model)
- `attn_out`, `mlp_out`: what attention and MLP add to the residual stream, so after a post-norm where there is one (d_model)
- `z`: heads' outputs before the output projection (n_heads x d_head, flat)
- `mlp_post`: input of the MLP's down projection, the "key" k of the editing papers (d_mlp)
"""

KINDS: tuple[SiteKind, ...] = get_args(SiteKind)

Role = Literal[
    "subject_first",
    "subject_middle",
    "subject_last",
    "first_after_subject",
    "further",
    "last",
    "before_subject",
    "subject",
]
"""The place of a token in the prompt, as ROME's averages name it, and `subject` for all of the subject's tokens."""

ROLES: tuple[Role, ...] = get_args(Role)

TOKEN_ROLES: tuple[Role, ...] = (
    "before_subject", "subject_first", "subject_middle", "subject_last", "first_after_subject", "further", "last"
)  # fmt: skip
"""The roles that divide a prompt: every token has exactly one (`Tokens.roles`)."""

_GRAMMAR = re.compile(
    r"(?:L(?P<layer>\d{1,6})\.)?(?P<kind>[a-z_]+)(?:\[(?P<part>\d{1,6})\])?(?:@(?P<token>[a-z_]+|-?\d{1,6}))?", re.ASCII
)

_PARTS = {"z": "head", "mlp_post": "neuron"}
"""What a number in brackets counts."""


class SiteError(InputError):
    """A site that does not exist, or text that does not spell one."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place in a model. Sites sort by layer, then in the order of `KINDS`, all tokens before positions before roles.

    Raises:
        SiteError: an unknown kind or role, a head outside of `z`, a neuron outside of `mlp_post`, or a negative layer.
    """

    layer: int
    """0-based; 0 for `embed`, which has no layer."""

    kind: SiteKind
    """What is read there."""

    token: Role | int | None = None
    """A role, a position (negative counts from the prompt's last token), or None for all positions."""

    head: int | None = None
    """0-based attention head, for `z` only; None for all heads together."""

    neuron: int | None = None
    """0-based MLP neuron, for `mlp_post` only; None for all neurons together."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(f"Unknown kind {self.kind!r}. Use one of {', '.join(KINDS)}.")
        if self.layer < 0:
            raise SiteError(f"Layer {self.layer} is negative. Layers count from 0.")
        if isinstance(self.token, str) and self.token not in ROLES:
            raise SiteError(f"Unknown token role {self.token!r}. Use a position or one of {', '.join(ROLES)}.")
        if self.head is not None and self.kind != "z":
            raise SiteError(f"A head was given for {self.kind!r}. Heads exist at 'z' only.")
        if self.neuron is not None and self.kind != "mlp_post":
            raise SiteError(f"A neuron was given for {self.kind!r}. Neurons exist at 'mlp_post' only.")

    @property
    def part(self) -> int | None:
        """The head or the neuron, whichever the kind has; None for the whole."""
        return self.neuron if self.head is None else self.head

    def __lt__(self, other: Site) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, ...]:
        token = (
            (0, 0)
            if self.token is None
            else (2, ROLES.index(self.token))
            if isinstance(self.token, str)
            else (1, self.token)
        )
        return self.layer, KINDS.index(self.kind), *token, -1 if self.part is None else self.part

    def __str__(self) -> str:
        place = self.kind if self.kind == "embed" else f"L{self.layer}.{self.kind}"
        part = "" if self.part is None else f"[{self.part}]"
        return place + part + ("" if self.token is None else f"@{self.token}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site spelled by `text`; the inverse of `str(site)`.

        Raises:
            SiteError: the text does not follow the grammar.
        """
        match = _GRAMMAR.fullmatch(text)
        if match is None or (match["layer"] is None) != (match["kind"] == "embed"):
            raise SiteError(f"{text!r} is no site. Write it like 'L17.mlp_out@subject_last' or 'embed@last'.")
        token = match["token"]
        part = {} if match["part"] is None else {_PARTS.get(match["kind"], "head"): int(match["part"])}
        return cls(
            layer=int(match["layer"] or 0),
            kind=match["kind"],  # type: ignore[arg-type]  # checked in __post_init__
            **part,
            token=int(token) if token and token.lstrip("-").isdigit() else token,  # type: ignore[arg-type]
        )


def window(centre: int, width: int, n_layers: int, *, rule: Literal["rome", "paper"] = "rome") -> range:
    """The layers restored together around `centre`, clipped to the model.

    An odd width is centred. An even one has one layer more below the centre in ROME's code (`rome`: [l-5, l+4] for 10) and one
    more above it in the paper's text (`paper`: [l-4, l+5]; arXiv 2202.05262, App. B.2).
    """
    if width < 1:
        raise SiteError(f"The window is {width} layers wide, expected 1 or more.")
    below, above = (width // 2, (width + 1) // 2) if rule == "rome" else ((width - 1) // 2, width // 2 + 1)
    return range(max(0, centre - below), min(n_layers, centre + above))


def default_window(n_layers: int, published: int = 10) -> int:
    """A paper's window (ROME's: 10) for models of 24 layers and more; at most 3 for smaller ones, which 10 would mostly cover."""
    return published if n_layers >= 24 else min(published, 3)
