"""The least work that a causal trace can be done with, in multiply-adds of matrix products.

Every operation counted here feeds a score, and none is a copy of another:

1. The clean row once; the N corrupted rows without the tokens before the subject, whose states are the clean row's.
2. A lane is N rows with one output restored at token t. It differs from the corrupted run only above the restored layer, and only
   at tokens t and after. A restored state of the first corrupted token stays clean for good: that lane starts at t + 1.
3. In the first layer that a lane goes through, a query, key or value is known wherever the state is: after a restored state
   everywhere, after a restored attention or MLP output everywhere but at t.
4. Windows that start together are one lane until the shorter one ends. Inside its window the restored output is not computed at t.
5. In the last layer only the last token's query, attention and MLP are needed; the unembedding meets the last token only.

Norms, activations and softmax are left out, as they are by torch's FLOP counter (a multiply-add is two FLOPs). Of attention only
the keys up to the query are counted, where the usual kernels compute the masked ones too.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.models import LM
from workbench.sites import window


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a model's matrix products cost: multiply-adds for one token in one layer."""

    n_layers: int
    q: int
    """Projection to queries."""
    kv: int
    """Projections to keys and values."""
    o: int
    """Attention's output projection."""
    mlp: int
    """All matrices of the MLP."""
    key: int
    """One query meets one key: the score, and the value added."""
    unembed: int
    """Unembedding of one token; once, not in each layer."""

    @classmethod
    def of(cls, lm: LM) -> Sizes:
        """The sizes of a model whose layers are alike."""
        block = lm.blocks[0]
        o = lm.part(0, lm.layout.o_proj).get_parameter("weight").numel()
        attention = sum(p.numel() for p in block.get_submodule(lm.layout.attn).parameters() if p.ndim == 2)
        width = o // lm.d_model
        return cls(
            n_layers=lm.n_layers,
            q=lm.d_model * width,
            kv=attention - o - lm.d_model * width,
            o=o,
            mlp=sum(p.numel() for p in block.get_submodule(lm.layout.mlp_out).parameters() if p.ndim == 2),
            key=2 * width,
            unembed=lm.d_model * lm.d_vocab,
        )


def rome_work(sizes: Sizes, *, tokens: int, samples: int) -> int:
    """One map by ROME's loop: for each cell, and for the clean and the corrupted run, N + 1 rows with logits at every token."""
    per_token = sizes.n_layers * (sizes.q + sizes.kv + sizes.o + sizes.mlp + tokens * sizes.key) + sizes.unembed
    return (tokens * sizes.n_layers + 2) * (samples + 1) * tokens * per_token


def floor_work(sizes: Sizes, *, tokens: int, first: int, samples: int, width: int) -> dict[str, int]:
    """The dependency floor of `runs` (the clean and the corrupted run, shared by all maps) and of each map's lanes.

    Args:
        sizes: of the model.
        tokens: length T of the prompt.
        first: the first corrupted token b.
        samples: noise samples N.
        width: window of the `mlp_out` and `attn_out` maps; `resid_post` is restored one layer at a time.
    """
    one = _Counter(sizes=sizes, tokens=tokens)
    carried = range(first, tokens)
    return {
        "runs": one.run(0) + samples * one.run(first),
        "resid_post": samples * sum(one.states(t, t + 1 if t == first else t) for t in carried),
        "mlp_out": samples * sum(one.windows(t, "mlp_out", width) for t in carried),
        "attn_out": samples * sum(one.windows(t, "attn_out", width) for t in carried),
    }


@dataclass(frozen=True, kw_only=True)
class _Counter:
    """The work of one row."""

    sizes: Sizes
    tokens: int

    def run(self, first: int) -> int:
        """A whole run of the tokens from `first` on, behind known keys and values."""
        carried = self.tokens - first
        return sum(self._layer(layer, first, carried) for layer in range(self.sizes.n_layers)) + self.sizes.unembed

    def states(self, t: int, first: int) -> int:
        """The lanes of all layers' states at token t; `first` is the first token they carry.

        The last layer's state needs none: it is the clean run's at the last token, and before it nothing changes.
        """
        top = self.sizes.n_layers
        if first == self.tokens:
            return 0
        lanes = [
            sum(self._layer(layer, first, 0 if layer == start else self.tokens - first) for layer in range(start, top))
            for start in range(1, top)
        ]
        return sum(lanes) + len(lanes) * self.sizes.unembed

    def windows(self, t: int, kind: str, width: int) -> int:
        """The lanes of all windows at token t."""
        top = self.sizes.n_layers
        total, branches = 0, set[tuple[int, int]]()
        for layers in sorted({window(layer, width, top) for layer in range(top)}, key=lambda r: (r.start, r.stop)):
            shorter = [stop for start, stop in branches if start == layers.start]
            branch = max(shorter, default=layers.start)  # the layer in which its output becomes another's
            branches.add((layers.start, layers.stop))
            if branch == top - 1 and t < self.tokens - 1:
                continue  # no layer is left to carry the change to the last token
            total += self.sizes.unembed + (
                self.sizes.mlp if kind == "attn_out" else 0
            )  # the MLP reads what is restored
            for layer in range(branch + 1, top):
                changed = 1 if layer == branch + 1 else self.tokens - t
                total += self._layer(layer, t, changed, given=kind if layer < layers.stop else "")
        return total

    def _layer(self, layer: int, first: int, changed: int, *, given: str = "") -> int:
        """One layer on the tokens from `first` on.

        `changed` of them, from the first one, enter it with new states; `given` is the output that is put in place at `first`.
        """
        sizes, carried = self.sizes, self.tokens - first
        queries = range(first, self.tokens)
        if layer == sizes.n_layers - 1:
            queries = queries[-1:]
        new = range(first, first + changed)
        attended = [q for q in queries if not (given == "attn_out" and q == first)]
        mlps = len(queries) - (given == "mlp_out" and first in queries)
        assert carried > 0
        return (
            changed * sizes.kv
            + sum(q in new for q in attended) * sizes.q
            + sum(q + 1 for q in attended) * sizes.key
            + len(attended) * sizes.o
            + mlps * sizes.mlp
        )
