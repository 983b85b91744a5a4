"""TransformerLens on a private copy of a model, for what it alone has: the inputs of single heads, each by itself.

A `TransformerBridge` rewrites the Hugging Face object that it is given and cannot be undone, so it gets a deep copy; the model of
the `LM` keeps its names, `save_pretrained` and `deepcopy`. One copy is held at a time in the whole process, so the memory is that
of one more model at most; it goes when another one is asked for, when the model that it copies goes, or at `release()`. The
library takes seconds to import and is imported when the first copy is made.

Two habits of the library are kept out here: it would put a BOS token first, and it reads no mask unless it is given one.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.hooks import is_patched, run
from workbench.layouts import ModelError
from workbench.models import LM, Tokens

__all__ = ["Hook", "agree", "bridged", "logits", "release"]

Hook = tuple[str, Callable[[Tensor, Any], Tensor]]
"""The name of a TransformerLens hook point, and what is made of the tensor there."""

TOLERANCE = 1e-4
"""How far the copy's logits may be from the model's own, in parts of the largest; half precision gets 16 of its own steps."""

_PROMPT = "The Space Needle is in the city of"

_held: weakref.WeakKeyDictionary[nn.Module, tuple[str, Any]] = weakref.WeakKeyDictionary()
_using = threading.RLock()


@contextmanager
def bridged(lm: LM) -> Iterator[Any]:
    """A `TransformerBridge` to a copy of the model as it is now; changed weights get a new copy.

    Within, the thread has the copy for itself, since hooks are put on it and taken off; others wait.

    Raises:
        ModelError: TransformerLens does not know the family, its logits are others than the model's, or the model is patched.
    """
    with _using:
        if is_patched():
            raise ModelError("TransformerLens works on a copy, which patched() does not reach. Leave patched() first.")
        key = f"{lm.weight_hash} {lm.setup_hash} {lm.device}"
        made, bridge = _held.get(lm.model, ("", None))
        if made != key:
            _held.clear()  # the old copy goes before there is a new one
            bridge = _make(lm)
            _held[lm.model] = key, bridge
        yield bridge


def release() -> None:
    """Lets go of the copy that is held, if there is one."""
    with _using:
        _held.clear()


def logits(
    bridge: Any, tokens: Tokens, hooks: Sequence[Hook] = (), *, grad: bool = False
) -> Float[Tensor, "batch pos d_vocab"]:
    """One forward pass of the copy with hooks, which are taken off again; `grad` keeps the graph."""
    with torch.enable_grad() if grad else torch.no_grad(), bridge.hooks(fwd_hooks=list(hooks)):
        out: Tensor = bridge(tokens.ids, prepend_bos=False, attention_mask=tokens.mask.long())
    return out


def agree(here: Tensor, there: Tensor) -> bool:
    """Whether two tensors are the same but for rounding, see `TOLERANCE`."""
    step = torch.finfo(there.dtype).eps
    most = max(TOLERANCE, 16 * step if step > 1e-6 else 0.0)
    return _apart(here, there) <= most * max(1.0, float(there.abs().max()))


def _apart(here: Tensor, there: Tensor) -> float:
    return float((here.double() - there.double()).abs().max())


def _make(lm: LM) -> Any:
    """A new bridge, whose logits were compared with the model's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own imports
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        twin = copy.deepcopy(lm.model).requires_grad_(False)
        try:
            bridge = build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config)
        except Exception as error:  # the library has no class of error for this
            raise ModelError(
                f"TransformerLens makes no bridge to {lm.layout.family} ({type(error).__name__}: {error}). "
                "Use a method that needs none, e.g. AttributionPatching."
            ) from error
    tokens = lm.encode([_PROMPT])
    expected, given = run(lm, tokens).logits, logits(bridge, tokens)
    if not agree(given, expected):
        raise ModelError(
            f"TransformerLens' copy of {lm.name} ({lm.layout.family}) gives logits that are off by {_apart(given, expected):.2g}, "
            f"expected at most {TOLERANCE:g}, so it is another model. Use a method that needs none, e.g. AttributionPatching."
        )
    return bridge
