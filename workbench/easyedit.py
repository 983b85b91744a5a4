"""Hyperparameter files of EasyEdit (hparams/*/*.yaml): read into editors, and written from them.

Its files name modules, which follow from the model here; what has no counterpart is told, not guessed. Numbers such as `5e-4` are
texts in YAML 1.1; they are read as numbers, where EasyEdit's own reading can leave a bound unused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from workbench.editors import Editor, editor_named
from workbench.edits import EditError
from workbench.models import LM


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a file says."""

    editor: Editor
    """The editor with the file's hyperparameters; what the file leaves out has our defaults."""

    ignored: Mapping[str, Any]
    """Entries that have no counterpart, e.g. names of modules and devices."""


_VALUES = {
    "layers": "layers", "v_num_grad_steps": "steps", "v_lr": "learning_rate", "v_weight_decay": "weight_decay",
    "clamp_norm_factor": "clamp", "kl_factor": "kl_factor", "context_template_length_params": "prefix_lengths",
}  # fmt: skip

_TRAINED = {"lr": "learning_rate", "num_steps": "steps"}

_ADAPTER = {**_TRAINED, "layers": "layers", "rank": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}

FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    "ROME": ("Rome", {**_VALUES, "mom2_adjustment": "covariance"}),
    "R-ROME": ("RRome", {**_VALUES, "mom2_adjustment": "covariance"}),
    "MEMIT": ("Memit", {**_VALUES, "mom2_update_weight": "ridge"}),
    "PMET": ("Pmet", {**_VALUES, "mom2_update_weight": "ridge"}),
    "EMMET": ("Emmet", {**_VALUES, "mom2_update_weight": "ridge", "emmet_lambda": "slack"}),
    "AlphaEdit": ("AlphaEdit", {**_VALUES, "nullspace_threshold": "threshold", "L2": "ridge"}),
    "FT": ("FineTune", {
        **_TRAINED, "layers": "layers", "objective_optimization": "objective", "norm_constraint": "norm_constraint",
    }),
    "LORA": ("Lora", _ADAPTER),
    "ADALORA": ("AdaLora", _ADAPTER),
    "GRACE": ("Grace", {
        "inner_params": "layers", "edit_lr": "learning_rate", "n_iter": "n_iter", "eps": "eps", "eps_expand": "expand",
        "replacement": "replacement", "val_init": "init",
    }),
    "WISE": ("Wise", {
        "inner_params": "layers", "edit_lr": "learning_rate", "n_iter": "n_iter", "mask_ratio": "rho",
        "act_ratio": "act_ratio", "norm_constraint": "norm_constraint", "densities": "density", "retrieve": "retrieve",
        "merge_alg": "merge",
    }),
}  # fmt: skip
"""By EasyEdit's `alg_name`: our editor, and our name of each entry. For LoRA, `lora_type` stands in its place."""

MOST_PREFIXES = 1000
"""Texts before a prompt that a file may ask for."""

MARGINS = ("alpha", "beta", "gamma")
"""WISE's margins, which its file has in one entry, `act_margin`."""


def read_hparams(path: Path | str) -> Settings:
    """An editor as a file of EasyEdit sets it.

    Raises:
        EditError: the file is no such file, of a method that is not here, or with a value that cannot be used.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EditError(
            f"{str(path)!r} cannot be read as YAML: {str(error).splitlines()[0]}. Name a file of hparams."
        ) from error
    name = given.get("alg_name") if isinstance(given, dict) else None
    if name == "LoRA":
        name = str(given.get("lora_type", "adalora")).upper()
    if name not in FORMATS:
        raise EditError(f"{str(path)!r} is of alg_name {name!r}, expected one of LoRA, {', '.join(FORMATS)}.")
    ours, names = FORMATS[name]
    cls = editor_named(ours)
    types = {field.name: str(field.type) for field in fields(cls)}
    options = {}
    for entry, field in names.items():
        if entry in given and field in types:
            options[field] = _read(entry, given[entry], types[field], path)
    used = {entry for entry, field in names.items() if field in types} | {"alg_name", "lora_type"}
    if name == "WISE" and "act_margin" in given:
        options |= dict(zip(MARGINS, _read("act_margin", given["act_margin"], "numbers", path), strict=True))
        used.add("act_margin")
    ignored = {entry: value for entry, value in given.items() if entry not in used}
    return Settings(editor=cls(**options), ignored=ignored)


def write_hparams(editor: Editor, lm: LM, path: Path | str) -> Path:
    """Writes an editor as a file of EasyEdit for this model; layers that are None are those of the preset.

    Raises:
        EditError: EasyEdit has no such method, or no layers are known.
    """
    found = {ours: (name, names) for name, (ours, names) in FORMATS.items()}.get(type(editor).__name__)
    if found is None:
        raise EditError(
            f"EasyEdit has no file for {type(editor).__name__}. Use {', '.join(o for o, _ in FORMATS.values())}."
        )
    name, names = found
    layout = lm.layout
    values = {field.name: getattr(editor, field.name) for field in fields(editor)}
    adapter = name in ("LORA", "ADALORA")
    if values["layers"] is None:
        values["layers"] = vars(type(editor).fitted(lm))["layers"]
    if values["layers"] is None and adapter:
        del values["layers"]  # all of them
    elif values["layers"] is None:
        raise EditError(f"No layers are known for {lm.name}. Name them, e.g. those of recommend_layers(lm, facts).")
    written: dict[str, Any] = {"alg_name": "LoRA" if adapter else name, "model_name": lm.name, "device": 0}
    written |= {"lora_type": name.lower()} if adapter else {}
    for entry, field in names.items():
        if field in values:
            written[entry] = _written(lm, entry, values[field])
    if name == "WISE":
        written["act_margin"] = [values[margin] for margin in MARGINS]
    if name not in ("GRACE", "WISE", "LORA", "ADALORA"):
        head = next(path for path, module in lm.model.named_modules() if module is lm.unembed)
        written |= {
            "rewrite_module_tmp": f"{layout.blocks}.{{}}.{layout.down_proj}",
            "layer_module_tmp": f"{layout.blocks}.{{}}",
            "mlp_module_tmp": f"{layout.blocks}.{{}}.{layout.down_proj.rpartition('.')[0] or layout.down_proj}",
            "attn_module_tmp": f"{layout.blocks}.{{}}.{layout.attn}",
            "ln_f_module": layout.final_norm,
            "lm_head_module": head,
        }
    if "v_lr" in written:
        written |= {
            "fact_token": "subject_last", "v_loss_layer": lm.n_layers - 1, "mom2_dataset": "wikipedia",
            "mom2_n_samples": 100_000, "mom2_dtype": "float32",
        }  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(written, sort_keys=False, default_flow_style=None), encoding="utf-8")
    return path


def _read(entry: str, value: Any, kind: str, path: Path | str) -> Any:
    """A value of a file as our field takes it."""
    try:
        if entry == "context_template_length_params":
            if sum(int(n) for _, n in value) > MOST_PREFIXES:
                raise ValueError
            return tuple(int(length) for length, n in value for _ in range(int(n)))
        if entry == "inner_params":
            return tuple(int(re.findall(r"\[(\d+)\]", text)[0]) for text in value)
        if kind == "numbers":
            first, second, third = (float(one) for one in value)
            return first, second, third
        if kind.startswith("tuple"):
            return tuple(int(one) for one in value)
        if kind == "bool":
            return bool(value)
        if value is False or value is None:
            return None
        if kind in ("float", "float | None"):
            return float(value)
        return int(value) if kind == "int" else value
    except (TypeError, ValueError, IndexError) as error:
        raise EditError(f"{entry} is {value!r} in {str(path)!r}, expected {kind}.") from error


def _written(lm: LM, entry: str, value: Any) -> Any:
    """One of our values as EasyEdit spells it."""
    if entry == "context_template_length_params":
        return [[length, value.count(length)] for length in dict.fromkeys(value)]
    if entry == "inner_params":
        return [f"{lm.layout.blocks}[{layer}].{lm.layout.down_proj}.weight" for layer in value]
    if value is None:
        return False
    return list(value) if isinstance(value, tuple) else value
