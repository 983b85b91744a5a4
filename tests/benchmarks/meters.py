"""What is measured of a computation: seconds, floating-point operations, memory; and what the machine can do."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tests.benchmarks.shapes import Setup, build, pose
from tests.benchmarks.ways import SWEEPS, WAYS, passes
from workbench.products import fast_products, onednn, onednn_is_faster

ROOT = Path(__file__).resolve().parents[2]


def timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a call returns, and its wall-clock seconds."""
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    return result, time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and the floating-point operations of its matrix products and attention."""
    onednn_is_faster()  # is measured once, and is no part of the work
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        result = call()
    return result, counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(x) * weight[0])


_UNCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}
"""Kernels that torch's counter does not know. Attention is, like the others, counted without its causal mask."""
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _UNCOUNTED[torch.ops.mkldnn._linear_pointwise] = _linear_flops


def product_rates(d_model: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a plain (1024 x d) @ (d x 4d): the median of five, by each library that the sweep may take."""
    x = torch.randn(1024, d_model, device=device, dtype=dtype)
    weight = torch.randn(4 * d_model, d_model, device=device, dtype=dtype)
    ways: dict[str, Callable[[Tensor, Tensor, None], Tensor]] = {"torch's default": functional.linear}
    if isinstance(fast_products(device, dtype), TorchFunctionMode):
        ways["oneDNN"] = onednn
    rates = {}
    with torch.inference_mode():
        for name, product in ways.items():
            product(x, weight, None)
            taken = statistics.median(timed(partial(product, x, weight, None), device)[1] for _ in range(5))
            rates[name] = 2 * 1024 * d_model * 4 * d_model / taken
    return rates


def machine(device: str) -> str:
    """Processor, number of threads, versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = found[0] if found else name
    if device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


# --- work and memory of one way ---


def costs(setup: Setup, way: str, *, whole: bool = False) -> dict[str, float]:
    """FLOPs of the three maps; MB at most in use by this process while they are computed, and MB before that.

    The sweep runs whole; the others, which keep nothing from one cell to the next, on a cell of each map, unless `whole`: a
    process still grows in the course of a map, by the holes that allocating leaves.
    """
    lm = build(setup)
    problem, cells = pose(lm, setup)
    made = WAYS[way](lm, problem)
    some = cells if whole or way in SWEEPS else cells[len(cells) // 6 :: len(cells) // 3]
    on_gpu = lm.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    _, counted = flops(lambda: made(some))
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak()
    share = passes(way, len(some), setup.samples) / passes(way, len(cells), setup.samples)
    return {"flops": counted / share, "peak_mb": peak / 1e6, "before_mb": before / 1e6}


def costs_apart(setup: Setup, way: str, *, whole: bool = False) -> dict[str, float]:
    """The same in a fresh process, so that its memory is that of this way alone."""
    question = json.dumps({"way": way, "whole": whole, "threads": torch.get_num_threads(), "setup": asdict(setup)})
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.meters", question]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The process that measures what {way} costs failed: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _forget_peak() -> None:
    """Where the system allows it, what building the model took at most is no part of the peak."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes of memory at most held by this process. Not by `getrusage`: there a process inherits its parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _answer(question: Mapping[str, Any]) -> dict[str, float]:
    torch.set_num_threads(question["threads"])
    given = question["setup"]
    return costs(Setup(**{**given, "subject": tuple(given["subject"])}), question["way"], whole=question["whole"])


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.argv[1]))))
