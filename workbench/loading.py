"""Loads a model by bundled name, local folder or hub name, and says in one sentence why it cannot."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from workbench import zoo
from workbench.layouts import ModelError, layout_for
from workbench.models import LM

_log = getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}

_loading = threading.Lock()
"""While transformers loads a model it turns switches of the whole process, so that a second load beside it can miss weights."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files that hold a tokenizer. Without any, transformers makes an empty one."""


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    bos: bool | None = None,
) -> LM:
    """Loads a causal language model with its tokenizer.

    Args:
        name: a bundled model (`workbench.zoo.NAMES`), a folder written by `save_pretrained`, or a hub name.
        device: `auto` (cuda, then mps, then cpu), or a torch device.
        dtype: `float32` (the default: traces are exact), `float16`, `bfloat16`, `float64`, or `auto` for the checkpoint's own.
        device_map: handed to transformers, to spread a large model; replaces `device`.
        revision: branch, tag or commit on the hub.
        token: hub token for gated models.
        trust_remote_code: run model code that comes with the checkpoint. Off unless you say so.
        allow_pickle: accept `.bin` weights, which can run code when they are read. Off: safetensors only.
        bos: see `LM`.

    Raises:
        ModelError: unknown name, a folder without model, an unknown family, too little memory.
    """
    where = _locate(str(name))
    if dtype != "auto" and dtype not in _DTYPES:
        raise ModelError(f"Unknown dtype {dtype!r}. Use auto, {', '.join(_DTYPES)}.")
    place = _pick_device(device)
    hub: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(where, **hub)
    except Exception as error:  # a foreign file makes transformers raise anything
        raise ModelError(_why_not(str(name), where, error)) from error
    layout = layout_for(config)
    if Path(where).is_dir():
        _check_folder(Path(where), allow_pickle=allow_pickle)
    try:
        if device_map is None:
            _check_memory(config, str(name), place, dtype)
        tokenizer = AutoTokenizer.from_pretrained(where, **hub)
        with _loading, _no_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                dtype="auto" if dtype == "auto" else _DTYPES[dtype],
                device_map=device_map,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                **hub,
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_why_not(str(name), where, error)) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{str(name)!r} lacks {len(missing)} of the weights its config.json describes, e.g. {missing[0]!r}, "
            "which would be left random. Choose a complete checkpoint."
        )
    blocks = re.compile(rf"{re.escape(layout.blocks)}\.(\d+)\.")
    if beyond := sorted(name for name in info["unexpected_keys"] if blocks.match(name) and "bias" not in name):
        raise ModelError(
            f"{str(name)!r} has weights that its config.json does not describe, e.g. {beyond[0]!r}, so it would be cut short. "
            "Mend num_hidden_layers in its config.json, or choose another folder."
        )
    if device_map is None:
        torch.nn.Module.to(model, place)
    return LM(model, tokenizer, name=str(name), bos=bos)


def checkpoint_folder(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a checkpoint's files, whether or not a model could be made of them; from the hub, it is downloaded.

    Args:
        name: a bundled model, a folder, or a hub name.
        revision: branch, tag or commit on the hub.
        token: hub token for gated models.

    Raises:
        ModelError: there is no such folder, and the hub did not give it.
    """
    where = _locate(str(name))
    if Path(where).is_dir():
        return Path(where)
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            wanted = ["*.json", weights]
            folder = Path(snapshot_download(where, revision=revision, token=token, allow_patterns=wanted))
            if any(folder.glob(weights)):
                return folder
    except Exception as error:  # the hub raises anything
        raise ModelError(_why_not(str(name), where, error)) from error
    raise ModelError(f"{str(name)!r} holds no weights on the hub, expected *.safetensors. Name another checkpoint.")


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' bar over weights that are already here; the hub's own bars of a download stay."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _locate(name: str) -> str:
    """The folder of a bundled model, an existing folder, or the name for the hub."""
    if not name.strip():
        raise ModelError(
            f"The model's name is empty. Use a bundled one ({', '.join(zoo.NAMES)}), a folder or a hub name."
        )
    if name in zoo.NAMES:
        return str(zoo.folder(name))
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"{name!r} is a file, expected the folder that holds config.json and the weights.")
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"There is no folder {name!r}. Check the path, or use a bundled model ({', '.join(zoo.NAMES)})."
        )
    return name


def _check_folder(folder: Path, *, allow_pickle: bool) -> None:
    """Raises ModelError where a folder lacks a tokenizer, or weights that may be read, before anything is read."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(
            f"{str(folder)!r} holds no tokenizer, expected tokenizer.json beside config.json. Save it there too."
        )
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")):
        if allow_pickle:
            return
        raise ModelError(
            f"{str(folder)!r} holds its weights as pickle (.bin) only, which can run code when it is read. "
            "Convert it to safetensors, or allow pickle if you trust it."
        )
    raise ModelError(
        f"{str(folder)!r} holds no weights, expected *.safetensors beside config.json. Choose another folder."
    )


def _check_memory(config: Any, name: str, device: torch.device, dtype: str) -> None:
    """Raises ModelError where the weights will not fit, by the config alone, so before anything is downloaded or read."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=None if dtype == "auto" else _DTYPES[dtype])
    need = sum(parameter.numel() * parameter.element_size() for parameter in skeleton.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > free:
        raise ModelError(
            f"{name} needs {need / 2**30:.1f} GiB for its weights in {dtype}, and {free / 2**30:.1f} GiB are free on {device}. "
            "Use a smaller dtype (bfloat16), a device_map, or a smaller model."
        )


def _pick_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"Unknown device {device!r}. Use auto, cpu, cuda, cuda:1 or mps.") from error
    if place.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ModelError(f"The device {device!r} holds no numbers. Use auto, cpu, cuda or mps.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"The device {device!r} was asked for, but torch sees no GPU here. Use cpu or auto.")
    return place


def _why_not(name: str, where: str, error: Exception) -> str:
    """One sentence for what transformers says in many."""
    reason = re.sub(r"\x1b\[\d*m", "", " ".join(str(error).split())) or type(error).__name__
    reason = reason[:300].rstrip(" .") + "."
    if Path(where).is_dir():
        if not (Path(where) / "config.json").is_file():
            return (
                f"{name!r} holds no config.json, expected a folder written by save_pretrained. Choose another folder."
            )
        return f"{name!r} cannot be loaded: {reason} Its files are damaged or of another version; save or download them again."
    _log.info("The hub did not give %s: %s", name, reason)
    return (
        f"{name!r} is no bundled model ({', '.join(zoo.NAMES)}) and no folder, and the hub did not give it "
        f"({type(error).__name__}). "
        "Check the spelling, the network, and a token for a gated model."
    )
