"""Two checkpoints compared piece by piece, against the same in memory; what kind of change it is; other tools' folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import workbench.checkpoint_diff as module
from tests.examples import tiny_lm
from tests.test_edits import edit_of, matrices
from tests.tiny_models import tiny_lm_parts
from workbench.charts import CellPlot
from workbench.checkpoint_diff import DiffError, diff_checkpoints
from workbench.edits import LowRank
from workbench.models import LM


def saved(lm: LM, folder: Path) -> Path:
    lm.model.save_pretrained(folder)
    return folder


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj.weight"


def test_equal_checkpoints_have_not_changed(tmp_path: Path, family: str) -> None:
    folder = saved(tiny_lm(family), tmp_path / "base")
    found = diff_checkpoints(folder, folder)
    assert not found.table["changed"].any()
    assert found.run["verdict"].startswith("Nothing changed")


def test_numbers_are_those_of_the_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 500)  # many pieces a tensor
    lm = tiny_lm("llama")
    edit = edit_of(lm, down(1), "model.layers.2.self_attn.q_proj.weight")
    base, edited = saved(lm, tmp_path / "base"), edit.merge(lm, tmp_path / "edited")
    table = diff_checkpoints(base, edited).table.set_index("tensor")
    assert set(table.index[table["changed"]]) == set(edit.changes)
    for name in edit.changes:
        weight, row = lm.model.get_parameter(name).detach().double(), table.loc[name]
        with edit.on(lm):
            delta = lm.model.get_parameter(name).detach().double() - weight
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert row["relative"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
        assert row["largest"] == pytest.approx(float(delta.abs().max()), rel=1e-5)
        expected = torch.cosine_similarity(weight.flatten(), (weight + delta).flatten(), dim=0)
        assert row["cosine"] == pytest.approx(float(expected), abs=1e-6)
        columns = (delta**2).sum(0)
        assert row["top_columns"] == pytest.approx(float(columns.topk(5).values.sum() / columns.sum()), rel=1e-4)
        values = torch.linalg.svdvals(delta)
        best = float((values[:32] ** 2).sum() / (values**2).sum())
        assert best * 0.8 < row["sketch"] <= best + 1e-6
        assert row["stable_rank"] == pytest.approx(float((values**2).sum() / values[0] ** 2), rel=0.1)


@pytest.mark.parametrize(
    ("names", "rank", "words"),
    [
        ([down(1)], 1, "A single matrix changed by a rank-one edit: model.layers.1.mlp.down_proj.weight."),
        ([down(1)], 3, "A single matrix changed by a low-rank change (at most 3)"),
        ([down(1), down(2)], 2, "A low-rank change (at most 2) of 2 of"),
        ([down(3)], None, "A dense change of one layer: 1 of"),
        ([down(0), down(1), down(3)], None, "A dense change, as fine-tuning leaves: 3 of"),
    ],
)
def test_the_kind_of_change_is_told(tmp_path: Path, names: list[str], rank: int | None, words: str) -> None:
    lm = tiny_lm("llama")
    base, edited = saved(lm, tmp_path / "base"), edit_of(lm, *names, rank=rank).merge(lm, tmp_path / "edited")
    found = diff_checkpoints(base, edited)
    assert found.run["verdict"].startswith(words)
    changed = found.table[found.table["changed"]]
    assert sorted(changed["layer"]) == sorted(int(name.split(".")[2]) for name in names)
    assert set(changed["module"]) == {"mlp.down_proj"}
    if rank is not None:
        assert (changed["rank"] == rank).all()


def test_a_tensor_that_is_not_finite_is_named_and_the_rest_compared(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    base, edited = saved(lm, tmp_path / "base"), edit_of(lm, down(1), rank=1).merge(lm, tmp_path / "edited")
    weights = load_file(edited / "model.safetensors")
    weights[down(2)][0, 0] = float("nan")
    save_file(weights, edited / "model.safetensors", {"format": "pt"})
    found = diff_checkpoints(base, edited)
    assert found.run["verdict"].startswith(f"A single matrix changed by a rank-one edit: {down(1)}.")
    assert f"NaN or infinity: in 1 of {len(found.table)} tensors, e.g. {down(2)}." in found.run["verdict"]
    assert found.table.set_index("tensor").loc[down(2), "changed"]
    module.chart(found)


def test_sharded_and_other_files_read_the_same(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    edit = edit_of(lm, matrices(lm)[4], rank=1)
    base = saved(lm, tmp_path / "base")
    edited = edit.merge(lm, tmp_path / "edited")
    expected = diff_checkpoints(base, edited).table
    tensors = load_file(edited / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, shards / "model-00001-of-00002.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensors[name] for name in names[9:]},
        shards / "model-00002-of-00002.safetensors",
    )
    old = tmp_path / "old"
    old.mkdir()
    torch.save(tensors, old / "pytorch_model.bin")
    for folder in (shards, old):
        table = diff_checkpoints(base, folder).table
        assert table["norm"].tolist() == expected["norm"].tolist()


def test_rounding_to_another_dtype_is_no_change(tmp_path: Path) -> None:
    model, tokenizer = tiny_lm_parts("llama", 0)
    base = saved(LM(model, tokenizer), tmp_path / "base")
    model.bfloat16()
    half = saved(LM(model, tokenizer), tmp_path / "half")
    assert not diff_checkpoints(base, half).table["changed"].any()
    assert not diff_checkpoints(half, base).table["changed"].any()


def with_adapter(base: Path, folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Saves PEFT's adapter with random B on a saved model; the parameters before, and as PEFT loads and merges them."""
    model, again = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapted = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(folder), save_embedding_layers="lm_head" in options["target_modules"])
    merged = PeftModel.from_pretrained(again, str(folder)).merge_and_unload()
    return before, {name: parameter.detach() for name, parameter in merged.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own use of transformers
@pytest.mark.parametrize(
    ("family", "options", "ranks"),
    [
        ("llama", {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}, {2}),
        ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True}, {4}),
        (
            "llama",
            {
                "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
                "alpha_pattern": {"layers.1.*v_proj": 5, "v_proj": 16, r"^model\.layers\.2.*": 3},
            },
            {2},
        ),
        (
            "llama",
            {
                "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
                "rank_pattern": {"v_proj": 5, "0.self_attn.q_proj": 1}, "alpha_pattern": {"3.self_attn.v_proj": 1},
            },
            {1, 2, 5},
        ),
        ("gpt2", {"r": 2, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True}, {2}),
        ("gpt2", {"r": 2, "lora_alpha": 8, "target_modules": ["c_proj"], "fan_in_fan_out": True, "bias": "all"}, {2}),
        ("llama", {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {2}),
        ("llama", {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}, {2}),
    ],
    ids=["plain", "rslora", "alpha_pattern", "rank_pattern", "turned", "square and turned", "modules_to_save", "whole base layer"],
)  # fmt: skip
def test_an_adapter_of_peft_is_what_peft_merges(
    tmp_path: Path, family: str, options: dict[str, Any], ranks: set[int]
) -> None:
    base = saved(tiny_lm(family), tmp_path / "base")
    before, merged = with_adapter(base, tmp_path / "adapter", **options)
    found = diff_checkpoints(base, tmp_path / "adapter")
    table = found.table.set_index("tensor")
    assert set(table.index) <= set(merged)
    for name, row in table.iterrows():
        delta = (merged[str(name)] - before[str(name)]).double()
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-4, abs=1e-6)
        assert row["largest"] == pytest.approx(float(delta.abs().max()), rel=1e-4, abs=1e-6)
    wholes = tuple(options.get("modules_to_save", []))
    changed = table[table["changed"]]
    asked = (*options["target_modules"], *wholes)
    assert all(any(one in str(name) for one in asked) for name in changed.index)
    assert all(any(one in str(name) for name in changed.index) for one in asked)
    assert {row["rank"] for name, row in changed.iterrows() if not str(name).startswith(wholes)} == ranks


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_shapes_tell_how_a_matrix_is_turned_where_the_setting_does_not(tmp_path: Path) -> None:
    base, folder = saved(tiny_lm("gpt2"), tmp_path / "base"), tmp_path / "adapter"
    before, merged = with_adapter(base, folder, r=2, target_modules=["c_proj"], fan_in_fan_out=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": False}))
    table = diff_checkpoints(base, folder).table.set_index("tensor")
    for name in table.index[table["changed"]]:
        delta = (merged[name] - before[name]) ** 2
        share = float(delta.sum(0).topk(5).values.sum() / delta.sum())
        assert table.loc[name, "top_columns"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_beside_a_model_in_half_precision_is_not_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((64, 48), (4, 48), (64, 4)))
    a *= 1e-5  # entries of the change are far below the spacing of the weights
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    save_file({name: weight.to(dtype) for name in names}, base / "model.safetensors")
    place = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file({place.format("A"): a, place.format("B"): b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    found = diff_checkpoints(base, folder)
    row = found.table.iloc[0]
    assert row["norm"] == pytest.approx(float((2 * b @ a).norm()), rel=1e-5)
    assert row["rank"] == 4
    assert found.run["verdict"] == f"A single matrix changed by a low-rank change (at most 4): {names[0]}."


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "use_dora = True, expected plain LoRA. Merge it"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', expected plain LoRA. Merge it"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embedding.*Merge it"),
        ({"trainable_token_indices": [1, 2]}, "trainable_tokens.*Merge it"),
    ],
)
def test_an_adapter_that_does_more_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    base, folder = saved(tiny_lm("llama"), tmp_path / "base"), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    with pytest.raises(DiffError, match=says):
        diff_checkpoints(base, folder)


def test_a_merged_matrix_is_not_changed_once_more(tmp_path: Path) -> None:
    base, folder = saved(tiny_lm("llama"), tmp_path / "base"), tmp_path / "adapter"
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    place = down(1).removesuffix("weight") + "lora_{}.weight"
    save_file(
        {down(1): tensors[down(1)], place.format("A"): torch.ones(2, 80), place.format("B"): torch.ones(48, 2)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    with pytest.raises(DiffError, match=r"holds model.layers.1.mlp.down_proj.weight, expected pairs"):
        diff_checkpoints(base, folder)


A, B, C = (f"model.layers.{layer}.x.weight" for layer in range(3))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({A: noise(8, 64)}, "A dense change of one layer: 1 of 1 tensors, in layer 0."),
        ({A: noise(64, 8)}, "A dense change of one layer: 1 of 1 tensors, in layer 0."),
        ({A: noise(1, 64)}, "A dense change of one layer: 1 of 1 tensors, in layer 0."),
        ({A: noise(8, 64), B: torch.ones(64, 64)}, "A dense change, as fine-tuning leaves: 2 of 2"),
        (
            {A: noise(8, 2) @ noise(2, 64)},
            f"A single matrix changed by a low-rank change (at most 2): {A}.",
        ),
        ({A: torch.ones(2, 64)}, f"A single matrix changed by a rank-one edit: {A}."),
        (
            {A: torch.ones(64, 64), B: noise(4, 8, 8)},
            f"A single matrix changed by a rank-one edit: {A}. Changed beside it, and no matrix: 1 of 2 tensors, in layer 1",
        ),
        (
            {A: torch.ones(64, 64), B: noise(64), C: torch.ones(64, 64)},
            "A rank-one edit of 2 of 3 tensors, in layers 0, 2. Changed beside it, and no matrix: 1 of 3 tensors, in layer 1",
        ),
        ({A: noise(4, 8, 8)}, "A dense change of one layer: 1 of 1 tensors, in layer 0."),
    ],
)
def test_only_matrices_are_called_low_rank_and_only_clearly(
    tmp_path: Path, changes: dict[str, Tensor], words: str
) -> None:
    folders = tmp_path / "base", tmp_path / "edited"
    for folder, factor in zip(folders, (0, 1), strict=True):
        folder.mkdir()
        save_file({name: factor * change for name, change in changes.items()}, folder / "model.safetensors")
    assert diff_checkpoints(*folders).run["verdict"].startswith(words)


def test_what_has_no_counterpart_is_told(tmp_path: Path) -> None:
    base = saved(tiny_lm("llama"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    gone, other = sorted(tensors)[0], tmp_path / "other"
    other.mkdir()
    save_file(
        {**{name: x for name, x in tensors.items() if name != gone}, "extra": torch.ones(2)}, other / "m.safetensors"
    )
    run = diff_checkpoints(base, other).run
    assert (run["only_base"], run["only_edited"]) == ([gone], ["extra"])


def test_what_cannot_be_compared_is_told_in_a_sentence(tmp_path: Path) -> None:
    base = saved(tiny_lm("llama"), tmp_path / "base")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DiffError, match="holds no weights"):
        diff_checkpoints(base, empty)
    with pytest.raises(DiffError, match="holds no weights"):
        diff_checkpoints(base, tmp_path / "nowhere")
    (empty / "model.safetensors").write_bytes(b"no")
    with pytest.raises(DiffError, match="cannot be read"):
        diff_checkpoints(base, empty)
    save_file({"x": torch.ones(2)}, empty / "model.safetensors")
    with pytest.raises(DiffError, match="has a counterpart"):
        diff_checkpoints(base, empty)
    name = next(iter(load_file(base / "model.safetensors")))
    save_file({name: torch.ones(2)}, empty / "model.safetensors")
    with pytest.raises(DiffError, match="has shape"):
        diff_checkpoints(base, empty)
    (empty / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(DiffError, match="of kind IA3"):
        diff_checkpoints(base, empty)


def test_files_of_strangers_run_nothing_and_get_a_sentence(tmp_path: Path) -> None:
    base, other = saved(tiny_lm("llama"), tmp_path / "base"), tmp_path / "other"
    other.mkdir()
    for content in ({"x": Path("hostile")}, {"x": "text"}, [1, 2]):
        torch.save(content, other / "pytorch_model.bin")
        with pytest.raises(DiffError, match="cannot be read"):
            diff_checkpoints(base, other)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    for config, a, b, says in (
        (good, (0, 80), (48, 0), "no rank and scale"),
        ({"peft_type": "LORA"}, (2, 80), (48, 2), "no rank and scale"),
        ({**good, "lora_alpha": "much"}, (2, 80), (48, 2), "no rank and scale"),
        ({**good, "alpha_pattern": {"(": 3}}, (2, 80), (48, 2), "no rank and scale"),
        ({**good, "alpha_pattern": [3]}, (2, 80), (48, 2), "no rank and scale"),
        ({**good, "r": 3}, (2, 80), (48, 2), "tells rank 3 of model.layers.1.mlp.down_proj, whose matrices have 2"),
        (good, (2, 5), (48, 2), r"has shape \(48, 5\), expected \(48, 80\)"),
        (good, (2, 80), None, "expected"),
        ([good], (2, 80), (48, 2), "holds a list, expected settings"),
    ):
        tensors = {name.format("A"): torch.ones(a)} | ({name.format("B"): torch.ones(b)} if b else {})
        save_file(tensors, other / "adapter_model.safetensors")
        (other / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(DiffError, match=says):
            diff_checkpoints(base, other)


def test_the_result_can_be_kept(tmp_path: Path) -> None:
    base = saved(tiny_lm("llama"), tmp_path / "base")
    found = diff_checkpoints(base, base)
    again = type(found).load(found.save(tmp_path / "result"))
    assert again.table["tensor"].tolist() == found.table["tensor"].tolist()
    assert np.isfinite(found.table["norm"]).all()


def test_the_chart_has_every_module_by_layer(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    name = next(name for name in matrices(lm) if ".2.mlp.c_proj" in name)
    edit = edit_of(lm, name, rank=1)
    base, edited = saved(lm, tmp_path / "base"), edit.merge(lm, tmp_path / "edited")
    found = diff_checkpoints(base, edited)
    drawn = module.chart(found).plots[0]
    assert isinstance(drawn, CellPlot)
    assert [int(layer) for layer in drawn.values.columns] == list(range(lm.n_layers))
    assert (drawn.values.drop(index="mlp.c_proj") == 0).all(axis=None)
    weight, bias = (lm.model.get_parameter(name.replace("weight", what)).detach() for what in ("weight", "bias"))
    delta = edit.changes[name]
    assert isinstance(delta, LowRank)
    expected = delta.dense().norm() / (weight.norm() ** 2 + bias.norm() ** 2).sqrt()
    assert drawn.values.loc["mlp.c_proj", 2] == pytest.approx(float(expected), rel=1e-4)
