"""A model is loaded from a folder, or a sentence says why not: nothing is run that came with it, nothing hostile is believed."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from tests.examples import EIFFEL, fresh_lm, tiny_lm
from workbench import zoo
from workbench.hooks import run
from workbench.layouts import ModelError
from workbench.loading import checkpoint_folder, load
from workbench.models import LM


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("saved") / "gpt2"
    lm = fresh_lm("gpt2")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _refused(name: str | Path, says: str, **settings: Any) -> None:
    """Loading raises one sentence or two, of moderate length."""
    with pytest.raises(ModelError, match=says) as caught:
        load(name, device="cpu", **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert message.rstrip()[-1] in ".!'\""


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_saved_folder_is_loaded_as_it_was(saved: Path) -> None:
    lm, original = load(saved, device="cpu"), tiny_lm("gpt2")
    assert lm.weight_hash == original.weight_hash
    assert lm.name == str(saved)
    assert run(lm, lm.encode([EIFFEL])).logits.equal(run(original, original.encode([EIFFEL])).logits)
    assert not lm.model.training


def test_several_models_are_loaded_at_once(saved: Path) -> None:
    """As tabs of the app do, each model in a thread of its own."""
    names = (str(saved), "organism-tiny", "organism-late")
    with ThreadPoolExecutor(len(names)) as pool:
        loaded = list(pool.map(load, names * 3))
    assert [lm.name for lm in loaded] == [*names * 3]
    assert len({lm.weight_hash for lm in loaded}) == len(names)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_the_dtype_is_the_one_asked_for(saved: Path, dtype: str) -> None:
    lm = load(saved, device="cpu", dtype=dtype)
    assert str(lm.dtype) == f"torch.{dtype}"
    assert lm.protocol["dtype"] == dtype


def test_auto_takes_the_checkpoints_own_dtype(tmp_path: Path) -> None:
    lm = fresh_lm("gpt2")
    lm.model.to(torch.bfloat16)  # type: ignore[arg-type]
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, device="cpu", dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path, device="cpu").dtype == torch.float32


def test_bos_is_handed_to_the_model(saved: Path) -> None:
    lm = load(saved, device="cpu", bos=True)
    assert lm.encode(["Paris"]).ids[0, 0] == lm.tokenizer.bos_token_id


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if (zoo.folder(name) / "model.safetensors").is_file()])
def test_a_bundled_model_is_loaded_by_its_name(name: str) -> None:
    lm = load(name, device="cpu")
    assert isinstance(lm, LM)
    assert lm.name == name


def test_every_family_is_saved_and_loaded_with_all_its_weights(family: str, tmp_path: Path) -> None:
    original = tiny_lm(family)
    original.model.save_pretrained(tmp_path)
    original.tokenizer.save_pretrained(tmp_path)
    lm = load(tmp_path, device="cpu")
    assert lm.weight_hash == original.weight_hash
    assert lm.encode([EIFFEL]).ids.equal(original.encode([EIFFEL]).ids)


# --- folders that hold no model ---


def test_a_name_that_is_nothing_is_refused(tmp_path: Path) -> None:
    _refused("", "name is empty")
    _refused("  ", "name is empty")
    _refused(tmp_path / "nowhere", "There is no folder")
    _refused("./nowhere", "There is no folder")
    _refused("a/b/c", "There is no folder")


def test_a_hub_name_without_a_network_is_refused_with_what_to_check() -> None:
    _refused("somebody/some-model", r"no bundled model .* and no folder.*Check the spelling, the network, and a token")
    _refused("not a name!", "no bundled model")


def test_a_file_is_refused(folder: Path) -> None:
    _refused(folder / "config.json", "is a file, expected the folder")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path, "holds no config.json")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    _refused(folder, r"holds no weights, expected \*\.safetensors")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    _refused(folder, "holds no tokenizer")


def test_pickled_weights_are_refused_unless_they_are_allowed(folder: Path) -> None:
    weights = tiny_lm("gpt2").model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    _refused(folder, r"as pickle \(\.bin\) only, which can run code")
    assert load(folder, device="cpu", allow_pickle=True).weight_hash == tiny_lm("gpt2").weight_hash


class _Bomb:
    """What a hostile pickle does when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_hostile_pickle_is_never_run(folder: Path, allow_pickle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": _Bomb()}, folder / "pytorch_model.bin")
    _refused(folder, "pickle" if not allow_pickle else "cannot be loaded", allow_pickle=allow_pickle)
    assert not (folder / "exploded").exists()


def test_pickled_weights_beside_safetensors_are_not_read(folder: Path) -> None:
    torch.save({"x": _Bomb()}, folder / "pytorch_model.bin")
    assert load(folder, device="cpu").weight_hash == tiny_lm("gpt2").weight_hash


# --- families ---


@pytest.mark.parametrize("family", ["mamba", "t5", "granite"])
def test_a_family_without_a_row_is_refused_before_its_weights_are_read(folder: Path, family: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    (folder / "model.safetensors").write_bytes(b"never read")
    _refused(folder, rf"family '{family}' is not known; known are .*gpt2")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"model_type": 3}', '{"model_type": "nobody-knows-it"}']
)
def test_a_damaged_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    _refused(folder, "cannot be loaded|is not known")


@pytest.mark.parametrize("change", [{"n_embd": "many"}, {"n_layer": 5}, {"n_head": 5}, {"vocab_size": 7}])
def test_a_config_that_does_not_fit_its_weights_is_refused(folder: Path, change: dict[str, Any]) -> None:
    _config(folder, **change)
    _refused(folder, "cannot be loaded|which would be left random")


def test_code_that_comes_with_a_model_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "modeling_evil.py").write_text("from pathlib import Path\nPath('exploded').touch()\n")
    _config(folder, auto_map={"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"})
    assert load(folder, device="cpu").layout.family == "gpt2"
    _config(folder, model_type="evil")
    _refused(folder, "cannot be loaded|is not known")
    assert not (folder / "exploded").exists()


# --- damaged and hostile weights ---


def _header(folder: Path, header: bytes, *, length: int | None = None) -> None:
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"null", b"3", b'{"x": 1}', b'{"x": {}}', b'{"x": {"dtype": "F32", "data_offsets": [0]}}',
     b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}', b'{"x": {"dtype": [], "data_offsets": [0, 4]}}',
     b"[" * 200_000, b"\xff\xfe"],
    ids=lambda header: header[:40].decode(errors="replace"),
)  # fmt: skip
def test_a_damaged_header_is_refused(folder: Path, header: bytes) -> None:
    _header(folder, header)
    _refused(folder, "cannot be loaded")


def test_a_header_that_claims_to_be_huge_is_not_read(folder: Path) -> None:
    _header(folder, b"{}", length=2**63)
    _refused(folder, "header too large")


def test_a_cut_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        _refused(folder, "cannot be loaded")


def test_a_missing_shard_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(folder, "cannot be loaded")


# --- memory, dtype, device ---


def test_weights_that_do_not_fit_are_refused_before_they_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (saved / "model.safetensors").stat().st_size
    for available, dtype, fits in (
        (size // 2, "float32", False),
        (2 * size, "float32", True),
        (int(0.7 * size), "bfloat16", True),
    ):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr("workbench.loading.psutil.virtual_memory", lambda memory=memory: memory)
        if fits:
            assert load(saved, device="cpu", dtype=dtype).n_layers == 4
        else:
            _refused(saved, r"GiB for its weights in float32, and 0\.0 GiB are free on cpu\. Use a smaller dtype")


def test_an_unknown_dtype_is_refused(saved: Path) -> None:
    _refused(saved, r"Unknown dtype 'int3'\. Use auto, float32", dtype="int3")


def test_a_device_that_is_not_there_is_refused(saved: Path) -> None:
    with pytest.raises(ModelError, match=r"Unknown device 'toaster'\. Use auto"):
        load(saved, device="toaster")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:7"):
            with pytest.raises(ModelError, match="torch sees no GPU here"):
                load(saved, device=device)


def test_a_config_with_fewer_layers_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    lm = fresh_lm("llama")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(ModelError, match="cut short"):
        load(tmp_path)


def test_a_checkpoint_on_the_hub_is_a_folder_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of the hub's cache, laid out as the hub library lays it out; nothing is asked of the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "models--some--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    shutil.copytree(zoo.folder("organism-tiny"), kept / "snapshots" / ("0" * 40))
    assert checkpoint_folder("some/model") == kept / "snapshots" / ("0" * 40)
    assert checkpoint_folder("organism-tiny") == zoo.folder("organism-tiny")
    with pytest.raises(ModelError, match="hub did not give it"):
        checkpoint_folder("some/other")
    for file in (kept / "snapshots" / ("0" * 40)).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        checkpoint_folder("some/model")
