"""EasyEdit's files of hyperparameters: what they say, and what is written, read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.examples import tiny_lm
from workbench.easyedit import FORMATS, read_hparams, write_hparams
from workbench.editors import Editor, editor_named
from workbench.editors.ada_lora import AdaLora
from workbench.editors.alpha_edit import AlphaEdit
from workbench.editors.fine_tune import FineTune
from workbench.editors.grace import Grace
from workbench.editors.ike import Ike
from workbench.editors.rome import Rome
from workbench.editors.wise import Wise
from workbench.edits import EditError
from workbench.facts import FactError
from workbench.loading import load

ROME = """
alg_name: "ROME"
model_name: "./hugging_cache/gpt2-xl"
device: 0
layers: [17]
fact_token: "subject_last"
v_num_grad_steps: 20
v_lr: 5e-1
v_loss_layer: 47
v_weight_decay: 0.5
clamp_norm_factor: 4
kl_factor: 0.0625
mom2_adjustment: false
context_template_length_params: [[5, 10], [10, 10]]
rewrite_module_tmp: "transformer.h.{}.mlp.c_proj"
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "hparams.yaml"
    path.write_text(text)
    return path


def test_a_file_of_rome_is_read_and_what_has_no_counterpart_is_told(tmp_path: Path) -> None:
    found = read_hparams(file(tmp_path, ROME))
    assert found.editor == Rome(layers=(17,), covariance=False)
    assert set(found.ignored) == {"model_name", "device", "fact_token", "v_loss_layer", "rewrite_module_tmp"}


@pytest.mark.parametrize(
    ("text", "editor"),
    [
        ("{alg_name: AlphaEdit, layers: [4, 5], nullspace_threshold: 2e-2, L2: 10, v_lr: 1e-1}",
         AlphaEdit(layers=(4, 5), learning_rate=0.1)),
        ("{alg_name: FT, layers: [21], num_steps: 25, lr: 5e-4, objective_optimization: prompt_last, norm_constraint: false}",
         FineTune(layers=(21,), objective="prompt_last")),
        ("{alg_name: FT, layers: [0], norm_constraint: 5e-4}", FineTune(layers=(0,), norm_constraint=5e-4)),
        ("{alg_name: LoRA, lora_type: adalora, rank: 4, lora_alpha: 16, lr: 5e-3, num_steps: 70}",
         AdaLora(r=4, alpha=16, steps=70)),
        ("{alg_name: GRACE, inner_params: ['model.layers[27].mlp.down_proj.weight'], n_iter: 50, eps: 1.0, val_init: warm}",
         Grace(layers=(27,), n_iter=50, init="warm")),
        ("{alg_name: WISE, inner_params: ['model.layers[29].mlp.down_proj.weight'], act_margin: [5.0, 20.0, 9], mask_ratio: 0.2}",
         Wise(layers=(29,), gamma=9.0)),
    ],
)  # fmt: skip
def test_files_of_other_methods(tmp_path: Path, text: str, editor: Editor) -> None:
    assert read_hparams(file(tmp_path, text)).editor == editor


@pytest.mark.parametrize("name", [ours for ours, _ in FORMATS.values()])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str, family: str) -> None:
    lm, editor = tiny_lm(family), editor_named(name)(layers=(2,))  # type: ignore[call-arg]
    path = write_hparams(editor, lm, tmp_path / "new" / "file.yaml")
    assert read_hparams(path).editor == editor
    written = yaml.safe_load(path.read_text())
    modules = dict(lm.model.named_modules())
    for entry, template in written.items():
        if entry.endswith(("_module_tmp", "_module")):
            assert template.format(2) in modules
    if "lm_head_module" in written:
        assert modules[written["lm_head_module"]] is lm.unembed


def test_layers_that_are_not_named_are_those_of_the_preset(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    with pytest.raises(EditError, match="No layers are known"):
        write_hparams(Rome(), lm, tmp_path / "x.yaml")
    assert read_hparams(write_hparams(AdaLora(), lm, tmp_path / "all.yaml")).editor == AdaLora()
    known = load("organism-tiny")
    assert read_hparams(write_hparams(Rome(), known, tmp_path / "known.yaml")).editor == Rome(layers=(1,))


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("{alg_name: SERAC}", EditError, "of alg_name 'SERAC'"),
        ("[1, 2]", EditError, "of alg_name None"),
        ("{alg_name: [", EditError, "cannot be read as YAML"),
        ("{alg_name: ROME, layers: x}", EditError, "layers is 'x'"),
        (
            "{alg_name: ROME, context_template_length_params: [[5, 1e12]]}",
            EditError,
            "context_template_length_params is",
        ),
        (
            "{alg_name: ROME, context_template_length_params: [[5, 1000000000000]]}",
            EditError,
            "context_template_length",
        ),
        ("{alg_name: ROME, v_lr: fast}", EditError, "v_lr is 'fast'"),
        ("{alg_name: GRACE, inner_params: [mlp]}", EditError, "inner_params is"),
        ("{alg_name: WISE, act_margin: [1, 2]}", EditError, "act_margin is"),
        ("{alg_name: FT, objective_optimization: other}", FactError, "objective is 'other'"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read_hparams(file(tmp_path, text))


def test_a_method_that_easyedit_has_not_is_told(tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no file for Ike"):
        write_hparams(Ike(), tiny_lm("llama"), tmp_path / "x.yaml")
    with pytest.raises(EditError, match="cannot be read"):
        read_hparams(tmp_path / "nowhere.yaml")
