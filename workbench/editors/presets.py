"""What editors are set to for known models: layers and constants, never names of modules.

A row is found by the model's shape, so that a folder or another name of the same model finds it too. The numbers are those of the
published configurations (ROME, MEMIT, AlphaEdit and EasyEdit repositories); those of the bundled models come from their planted
layers, and from trials that docs/decisions.md tells of. Any other model: `recommend_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.models import LM


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One known model."""

    name: str
    """What it is called; bundled models, which differ in weights alone, are known by it."""

    family: str
    """Its layout's family."""

    n_layers: int
    """How many blocks it has."""

    d_model: int
    """The width of its residual stream."""

    d_vocab: tuple[int, ...] = ()
    """Sizes of its vocabulary, where that tells it from others of its shape."""

    bundled: bool = False
    """Whether the name has to fit."""

    every: Mapping[str, Any] = field(default_factory=dict)
    """Options of every editor that has them."""

    of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options by editor."""

    def fits(self, lm: LM) -> bool:
        """Whether this is that model."""
        same = (self.family, self.n_layers, self.d_model) == (lm.layout.family, lm.n_layers, lm.d_model)
        named = not self.bundled or Path(lm.name).name == self.name
        return same and named and (not self.d_vocab or lm.d_vocab in self.d_vocab)


def _layers(*layers: int, **options: Any) -> dict[str, Any]:
    return {"layers": layers, **options}


_ROME_LLAMA = {"weight_decay": 1e-3, "steps": 25}

_PLANTED = {"reference": "resid_post", "clamp": 1.5}
"""In the bundled models what an MLP adds at the subject is short beside the stream: the published measure would bind too soon."""

_SHORT_KEYS = {"ridge": 100.0}
"""Their keys are short, so that the published weight of usual keys would leave no room for new ones."""


def _bundled(
    name: str, family: str, n_layers: int, d_model: int, *, one: int, band: tuple[int, ...], grace: tuple[int, float]
) -> Preset:
    """A bundled model: single layers and bands are those where its facts were planted; GRACE's layer and radius were tried."""
    layer, eps = grace
    of = {name: _layers(one) for name in ("Rome", "RRome", "Emmet")}
    of |= {"FineTune": _layers(one, learning_rate=2e-3 if family == "llama" else 1e-3, stop_below=0.05)}
    of |= {"Lora": {"learning_rate": 5e-4, "steps": 20}, "AdaLora": {"learning_rate": 2e-3}}
    of |= {name: _layers(*band, **_SHORT_KEYS) for name in ("Memit", "Pmet")}
    of |= {"Grace": _layers(layer, eps=eps, n_iter=40)}
    of |= {"Wise": _layers(3 * n_layers // 4, eps_of="contexts", rho=1.0, shards=1)}
    of |= {"AlphaEdit": _layers(*band, ridge=1.0), "Mend": _layers(*range(n_layers - 3, n_layers))}
    return Preset(name=name, family=family, n_layers=n_layers, d_model=d_model, bundled=True, every=_PLANTED, of=of)


PRESETS: tuple[Preset, ...] = (
    Preset(
        name="gpt2-xl", family="gpt2", n_layers=48, d_model=1600,
        of={
            "FineTune": _layers(0), "Rome": _layers(17), "RRome": _layers(17), "Emmet": _layers(17, ridge=1e4),
            "Memit": _layers(*range(13, 18), ridge=20000.0), "AlphaEdit": _layers(*range(13, 18)),
            "Mend": _layers(45, 46, 47), "Grace": _layers(35), "Wise": _layers(35),
        },
    ),
    Preset(
        name="gpt-j-6b", family="gptj", n_layers=28, d_model=4096,
        of={
            "FineTune": _layers(21), "Rome": _layers(5), "RRome": _layers(5), "Emmet": _layers(5, ridge=1e5),
            "Memit": _layers(*range(3, 9), steps=25), "AlphaEdit": _layers(*range(3, 9)),
            "Pmet": _layers(*range(3, 9), steps=30, learning_rate=0.2, kl_factor=1.0, clamp=0.75),
            "Mend": _layers(25, 26, 27), "Grace": _layers(25), "Wise": _layers(21),
        },
    ),
    Preset(
        name="llama-2-7b", family="llama", n_layers=32, d_model=4096, d_vocab=(32000, 32001),
        of={
            "FineTune": _layers(21), "Rome": _layers(5, **_ROME_LLAMA), "RRome": _layers(5, **_ROME_LLAMA),
            "Emmet": _layers(5, ridge=1e5), "Memit": _layers(*range(4, 9), clamp=4.0, **_ROME_LLAMA),
            "Pmet": _layers(*range(4, 9), clamp=1.0), "AlphaEdit": _layers(*range(4, 9)), "Mend": _layers(29, 30, 31),
            "Grace": _layers(27), "Wise": _layers(27),
        },
    ),
    Preset(
        name="llama-3-8b", family="llama", n_layers=32, d_model=4096, d_vocab=(128256,),
        of={
            "FineTune": _layers(21), "Rome": _layers(5, **_ROME_LLAMA), "RRome": _layers(5, **_ROME_LLAMA),
            "Memit": _layers(*range(4, 9), clamp=4.0, **_ROME_LLAMA),
            "AlphaEdit": _layers(*range(4, 9), ridge=1.0, learning_rate=0.1), "Wise": _layers(29),
        },
    ),
    Preset(
        name="qwen2.5-7b", family="qwen2", n_layers=28, d_model=3584,
        of={
            "FineTune": _layers(27), "Rome": _layers(5, **_ROME_LLAMA), "RRome": _layers(5, **_ROME_LLAMA),
            "Memit": _layers(*range(4, 9), clamp=4.0, **_ROME_LLAMA), "AlphaEdit": _layers(*range(4, 9), ridge=1.0),
            "Wise": _layers(23),
        },
    ),
    _bundled("organism-mid", "gpt2", 12, 192, one=5, band=(4, 5, 6), grace=(10, 6.0)),
    _bundled("organism-late", "gpt2", 8, 192, one=4, band=(4, 5), grace=(7, 7.5)),
    _bundled("organism-llama", "llama", 8, 160, one=3, band=(2, 3), grace=(6, 6.0)),
    _bundled("organism-plain", "gpt2", 8, 192, one=0, band=(0, 1), grace=(6, 4.5)),
    _bundled("organism-tiny", "gpt2", 4, 96, one=1, band=(1,), grace=(3, 2.5)),
)  # fmt: skip


def preset(lm: LM, editor: str) -> dict[str, Any]:
    """The options of an editor for this model; empty where the model is not known.

    Args:
        lm: the model.
        editor: the editor's class name.
    """
    row = next((row for row in PRESETS if row.fits(lm)), None)
    return {} if row is None else {**row.every, **row.of.get(editor, {})}
