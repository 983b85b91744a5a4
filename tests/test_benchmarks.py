"""The benchmark compares equal things: all ways give the same scores, and work is counted as it is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.benchmarks import locators, profile, shortcuts, sweep, value_search
from tests.benchmarks.floor import Sizes, floor_work, rome_work
from tests.benchmarks.meters import costs, costs_apart, flops
from tests.benchmarks.shapes import SHAPES, Setup, build, pose
from tests.benchmarks.ways import WAYS
from tests.examples import fresh_lm
from workbench.models import LM
from workbench.sites import default_window

T, N = 10, 10
TINY = Setup(shape="tiny", tokens=6, subject=(1, 2), samples=3)


def _sizes(n_layers: int, d_model: int, d_vocab: int, *, d_kv: int = 0, mlp: int = 0) -> Sizes:
    return Sizes(
        n_layers=n_layers,
        q=d_model**2,
        kv=2 * d_model * (d_kv or d_model),
        o=d_model**2,
        mlp=mlp or 8 * d_model**2,
        key=2 * d_model,
        unembed=d_model * d_vocab,
    )


SMALL, MEDIUM, XL = _sizes(12, 768, 50257), _sizes(24, 1024, 50257), _sizes(48, 1600, 50257)
LLAMA = _sizes(32, 4096, 128_256, d_kv=1024, mlp=3 * 4096 * 14336)


def _savings(sizes: Sizes, *, first: int = 1) -> tuple[float, float, float, float]:
    """How many times the floor is below ROME's work: by map, each with a third of the shared runs; and of the three together."""
    rome = rome_work(sizes, tokens=T, samples=N)
    floor = floor_work(sizes, tokens=T, first=first, samples=N, width=10)
    state, mlp, attn = (rome / (floor["runs"] / 3 + floor[kind]) for kind in ("resid_post", "mlp_out", "attn_out"))
    return state, mlp, attn, 3 * rome / sum(floor.values())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (SMALL, (7.69, 7.05, 6.53, 7.06)),
        (MEDIUM, (6.16, 5.09, 4.82, 5.30)),
        (XL, (5.48, 4.75, 4.59, 4.91)),
        (LLAMA, (5.69, 4.84, 4.56, 4.98)),
    ],
)
def test_the_floor_is_as_far_below_rome_as_another_count_says(sizes: Sizes, expected: tuple[float, ...]) -> None:
    assert _savings(sizes) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [(SMALL, (5.9, 7.1, 8.6, 10.9, 14.0, 18.9, 27.0)), (XL, (4.0, 4.9, 6.1, 7.9, 10.5, 14.8, 22.2))],
)
def test_the_later_the_subject_the_lower_the_floor(sizes: Sizes, expected: tuple[float, ...]) -> None:
    assert [_savings(sizes, first=first)[3] for first in range(7)] == pytest.approx(expected, abs=0.07)


def test_a_floor_counted_by_hand() -> None:
    """Two layers, three tokens, the second corrupted; q, kv, o, MLP, key and unembedding cost 1, 10, 100, 1e3, 1e5 and 1e7."""
    sizes = Sizes(n_layers=2, q=1, kv=10, o=100, mlp=1000, key=10**5, unembed=10**7)
    clean = 3 * 1111 + 6 * 10**5 + (3 * 10 + 1101 + 3 * 10**5) + 10**7
    corrupted = 2 * 1111 + 5 * 10**5 + (2 * 10 + 1101 + 3 * 10**5) + 10**7
    # after the first layer: lanes of token 1, of which only token 2 is carried, and of token 2; queries, keys and values are known
    states = 2 * (1100 + 3 * 10**5 + 10**7)
    # windows {0} and {1}: above layer 0 the restored token's keys and values are new, and for token 2 its query too
    mlps = (10 + 1100 + 3 * 10**5 + 10**7) + (11 + 1100 + 3 * 10**5 + 10**7) + 10**7
    attentions = mlps + 3 * 1000  # its MLP reads what is restored; window {1} matters to the last token only
    found = floor_work(sizes, tokens=3, first=1, samples=1, width=1)
    assert found == {"runs": clean + corrupted, "resid_post": states, "mlp_out": mlps, "attn_out": attentions}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def tiny(request: pytest.FixtureRequest) -> LM:
    """A model that nobody else uses."""
    return fresh_lm(request.param)


def test_all_ways_give_the_same_scores(tiny: LM) -> None:
    before = tiny.weight_hash
    problem, cells = pose(tiny, TINY)
    found = {name: make(tiny, problem)(cells) for name, make in WAYS.items()}
    for name, scores in found.items():
        assert scores.shape == (3 * TINY.tokens * tiny.n_layers, TINY.samples)
        torch.testing.assert_close(scores, found["rome"], rtol=0, atol=1e-5, msg=f"{name} differs")
    for kind in ("resid_post", "mlp_out", "attn_out"):
        mine = found["rome"][[i for i, cell in enumerate(cells) if cell.kind == kind]]
        assert float(mine.max() - mine.min()) > 1e-3
    assert tiny.weight_hash == before


def test_work_is_counted_as_it_is_done(tiny: LM) -> None:
    problem, cells = pose(tiny, TINY)
    sizes, counts = Sizes.of(tiny), {"tokens": TINY.tokens, "samples": TINY.samples}
    made = WAYS["rome"](tiny, problem)
    _, one = flops(lambda: made(cells[:1]))
    assert one == 2 * rome_work(sizes, **counts) / (TINY.tokens * tiny.n_layers + 2)
    made = WAYS["sweep"](tiny, problem)
    _, whole = flops(lambda: made(cells))
    least = 2 * sum(floor_work(sizes, first=1, width=default_window(tiny.n_layers), **counts).values())
    assert least < whole < 2 * least


def test_the_shapes_are_those_they_are_named_after() -> None:
    assert Sizes.of(build(Setup(shape="tiny"))) == _sizes(4, 48, 400)
    config = SHAPES["gpt2-xl"]
    assert (config["n_layer"], config["n_embd"], config["n_embd"] // config["n_head"]) == (48, 1600, 64)


def test_the_command_prints_and_saves_a_table(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    saved = [word for name in ("a.md", "a.json") for word in ("--save", str(tmp_path / name))]
    few = [
        "--shapes",
        "tiny",
        "--peers",
        "rome,loop",
        "--tokens",
        "5",
        "--samples",
        "2",
        "--rounds",
        "2",
        "--no-memory",
    ]
    result = CliRunner().invoke(sweep.app, [*few, *saved], catch_exceptions=False)
    assert result.exit_code == 0
    text = (tmp_path / "a.md").read_text()
    assert text in result.output
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| tiny")] == [
        "rome",
        "loop",
        "sweep",
    ]
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["timed"], row["cells"]) for row in rows] == [(9, 60), (9, 60), (60, 60)]
    assert all(row["difference"] < 1e-5 and len(row["rounds"]) == 2 for row in rows)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "wrong", [["--shapes", "gpt5"], ["--peers", "magic"], ["--subject", "3-10"], ["--subject", "2-1"]]
)
def test_wrong_options_are_refused_with_a_sentence(wrong: list[str]) -> None:
    result = CliRunner().invoke(sweep.app, wrong)
    assert result.exit_code == 2
    assert wrong[1] in result.output


@pytest.mark.parametrize("wrong", [["--methods", "LogitLens,Guess"], ["--models", "gpt5"]])
def test_a_method_or_model_that_there_is_not_is_refused_before_anything_is_timed(wrong: list[str]) -> None:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(locators.app, [*wrong, "--threads", str(threads + 1)])
    assert result.exit_code == 2
    assert wrong[1].split(",")[-1] in result.output
    assert torch.get_num_threads() == threads


def test_every_method_of_a_model_is_a_line_of_the_table() -> None:
    threads = torch.get_num_threads()
    options = ["--models", "organism-tiny", "--methods", "LogitLens", "--facts", "1", "--threads", str(threads)]
    result = CliRunner().invoke(locators.app, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.splitlines()[-1].startswith("| organism-tiny | LogitLens | ")


def test_a_step_from_the_edited_block_on_has_the_whole_models_gradient() -> None:
    threads = str(torch.get_num_threads())
    options = ["--shapes", "tiny", "--rounds", "1", "--threads", threads]
    result = CliRunner().invoke(value_search.app, options, catch_exceptions=False)
    lines = [line for line in result.output.splitlines() if line.startswith("| tiny | ")]
    assert [line.split("|")[2].strip() for line in lines] == ["1 of 4", "2 of 4", "3 of 4"]
    assert all(float(line.split("|")[-2]) < 1e-4 for line in lines)
    refused = CliRunner().invoke(value_search.app, ["--shapes", "gpt5"])
    assert refused.exit_code == 2
    assert "gpt5 is no shape" in refused.output


def test_work_and_memory_are_measured_in_a_process_of_its_own() -> None:
    lm = build(TINY)
    problem, cells = pose(lm, TINY)
    made = WAYS["sweep"](lm, problem)
    found = costs_apart(TINY, "sweep")
    assert found["flops"] == flops(lambda: made(cells))[1]
    assert 50 < found["before_mb"] <= found["peak_mb"] < 5000


def test_the_work_of_a_whole_loop_is_that_of_its_cells_times_their_number() -> None:
    some, whole = costs(TINY, "rome"), costs(TINY, "rome", whole=True)
    assert whole["flops"] == some["flops"]
    assert whole["peak_mb"] >= whole["before_mb"] > 0


def test_screens_are_timed_against_romes_loop() -> None:
    lines = shortcuts.measure_shape("tiny", rounds=1)
    assert [line.split("|")[2].strip() for line in lines[1:]] == [
        "exact",
        "screen=0.1",
        "screen=0.1, screen_more=False",
    ]
    assert lines[1].endswith("| 100% |")
    assert 10 < int(lines[-1].split("|")[-2].strip(" %")) < 30  # the tokens before the subject are known
    refused = CliRunner().invoke(shortcuts.app, ["--shape", "gpt5"])
    assert refused.exit_code == 2
    assert "gpt5" in refused.output


def test_the_profile_names_every_part() -> None:
    lm = build(TINY)
    problem, cells = pose(lm, TINY)
    made = WAYS["sweep"](lm, problem)
    found, whole, ops = profile.shares(lm, lambda: made(cells), runs=1)
    assert set(found) == set(profile.GROUPS)
    assert whole > 0
    assert all(value > 0 for group, value in found.items() if group != "overhead")
    assert set(ops["MLP"]) <= {"addmm", "mm", "linear", "_linear_pointwise"}
    assert "| attention |" in profile.report(found, whole, ops)
