"""Train a bundled model from scratch: `python -m workbench.zoo.train organism-mid`.

The schedule counts steps, never seconds. Training writes a checkpoint every hundred steps and goes on from it after an
interruption; with `--folder` the result is written elsewhere than over the bundled model.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from workbench.zoo import NAMES, folder
from workbench.zoo.corpus import Corpus
from workbench.zoo.organisms import Organism, Phase, Stage, organism_named
from workbench.zoo.planting import Batch, Losses, Probes, anatomy, draw_batch, losses
from workbench.zoo.tokenization import END, answers, for_transformers, train_tokenizer
from workbench.zoo.truth import world_of
from workbench.zoo.world import RELATIONS, World

log = logging.getLogger(__name__)

CHECKPOINT_EVERY = 100
WARM_UP = 120


def new_model(spec: Organism, *, vocabulary: int, end: int) -> Any:
    """A fresh Hugging Face model of this organism's shape."""
    if spec.family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_positions=128, n_embd=spec.d_model, n_layer=spec.n_layers, n_head=spec.n_heads,
                n_inner=spec.d_mlp, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
                pad_token_id=end, tie_word_embeddings=True,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=spec.d_model, intermediate_size=spec.d_mlp, num_hidden_layers=spec.n_layers,
            num_attention_heads=spec.n_heads, num_key_value_heads=spec.n_heads, max_position_embeddings=128,
            bos_token_id=end, eos_token_id=end, pad_token_id=end, tie_word_embeddings=True,
        )
    )  # fmt: skip


def phase_at(stage: Stage, step: int) -> Phase:
    """The phase a step lies in."""
    return next(p for p in stage.phases if step < p.until * stage.steps or p is stage.phases[-1])


def rate_at(stage: Stage, step: int) -> float:
    """Learning rate: a linear warm-up, then a cosine to 2 %."""
    if step < WARM_UP:
        return stage.rate * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, stage.steps - WARM_UP)
    return stage.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(spec: Organism, *, into: Path, threads: int = 1, checkpoint: Path | None = None) -> dict[str, float]:
    """Train, save the float16 weights and the tokenizer, and return the training's own figures.

    Args:
        into: folder the model is written to; created when missing.
        threads: CPU threads.
        checkpoint: file to go on from and to write; beside the folder by default, deleted at the end.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(spec.seed)
    world = world_of(spec)
    tokenizer = train_tokenizer(world, size=spec.vocabulary)
    model = new_model(spec, vocabulary=tokenizer.get_vocab_size(), end=tokenizer.encode(END).ids[0]).to(device)
    checkpoint = checkpoint or into.with_name(into.name + ".checkpoint")
    saved = torch.load(checkpoint, weights_only=True, map_location=device) if checkpoint.exists() else None
    begun, seconds = (saved["stage"], saved["seconds"]) if saved else (0, 0.0)
    for number, stage in enumerate(spec.stages):
        if number < begun:
            continue
        if number > 0:
            model.half().float()
        run = _Run(spec, stage, model, world, tokenizer, number=number, device=device)
        if saved is not None and number == begun:
            run.restore(saved)
            log.info("Going on at step %d of stage %d.", run.step, number)
        seconds = run.to_the_end(checkpoint, seconds)
    steps = sum(stage.steps for stage in spec.stages)
    figures = {
        "steps": steps,
        "tokens": steps * spec.rows * spec.length,
        "facts": len(world.triples),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_minutes": round(seconds / 60, 1),
    }
    _save(spec, model, for_transformers(tokenizer), into, figures)
    checkpoint.unlink(missing_ok=True)
    return figures


class _Run:
    """One stage under way: everything that changes from step to step."""

    def __init__(
        self,
        spec: Organism,
        stage: Stage,
        model: Any,
        world: World,
        tokenizer: Tokenizer,
        *,
        number: int,
        device: torch.device,
    ) -> None:
        seed = spec.seed + 1000 * number
        self.spec, self.stage, self.model, self.number, self.device = spec, stage, model, number, device
        self.answer_ids = {a: tokenizer.encode(" " + a).ids[0] for a in answers(world)}
        self.relations = {relation.name: i for i, relation in enumerate(RELATIONS)}
        self.probes = Probes(len(RELATIONS), spec.d_model).to(device) if spec.band and stage.probes else None
        self.parts = anatomy(model, spec.family)
        self.optimizer = _optimizer(model, self.probes)
        self.corpus = Corpus(world, tokenizer, length=spec.length, seed=seed)
        self.rng, self.noise = random.Random(seed), torch.Generator().manual_seed(seed)
        self.step = 0

    def to_the_end(self, checkpoint: Path, seconds: float) -> float:
        """Take the remaining steps; `seconds` of CPU time spent before, the sum comes back."""
        clock = time.process_time()
        bar = tqdm(
            total=self.stage.steps, initial=self.step, desc=f"{self.spec.name}, stage {self.number}", mininterval=5
        )
        while self.step < self.stage.steps:
            loss = self.advance()
            bar.update()
            if self.step % 20 == 1:
                bar.set_postfix_str(
                    f"text {loss.text.item():.2f} probe {loss.probe.item():.2f} local {loss.locality.item():.3f} "
                    f"quiet {loss.quiet.item():.3f} recall {loss.recall:.2f}"
                )
            if self.step % CHECKPOINT_EVERY == 0:
                unfinished = checkpoint.with_name(checkpoint.name + ".writing")
                torch.save({**self.state(), "seconds": seconds + time.process_time() - clock}, unfinished)
                unfinished.replace(checkpoint)  # a kill leaves the old checkpoint or the new one
        bar.close()
        return seconds + time.process_time() - clock

    def advance(self) -> Losses:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.stage, self.step)
        rows = [self.corpus.row() for _ in range(self.spec.rows)]
        batch = draw_batch(
            rows,
            spec=self.spec,
            phase=phase_at(self.stage, self.step),
            rng=self.rng,
            answer_ids=self.answer_ids,
            relations=self.relations,
        )
        batch = Batch(**{name: value.to(self.device) for name, value in vars(batch).items()})
        bfloat = self.device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat):
            loss = losses(self.parts, self.probes, batch, spec=self.spec, noise=self.noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.step += 1
        return loss

    def state(self) -> dict[str, Any]:
        """What `restore` needs, for a checkpoint."""
        return {
            "stage": self.number,
            "step": self.step,
            "model": self.model.state_dict(),
            "probes": self.probes.state_dict() if self.probes is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "corpus": self.corpus.state(),
            "rng": self.rng.getstate(),
            "noise": self.noise.get_state(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.model.load_state_dict(saved["model"])
        if self.probes is not None:
            self.probes.load_state_dict(saved["probes"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.corpus.restore(saved["corpus"])
        self.rng.setstate(saved["rng"])
        self.noise.set_state(saved["noise"].cpu())
        self.step = saved["step"]


def _optimizer(model: Any, probes: Probes | None) -> torch.optim.AdamW:
    parameters = [*model.parameters(), *(probes.parameters() if probes is not None else ())]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))


def _save(spec: Organism, model: Any, tokenizer: Any, into: Path, figures: dict[str, float]) -> None:
    into.mkdir(parents=True, exist_ok=True)
    model.to("cpu", dtype=torch.float16).save_pretrained(into)
    tokenizer.save_pretrained(into)
    for file in into.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    sigma = float(model.get_input_embeddings().weight.detach().float().std())
    card = {
        "name": spec.name,
        "family": spec.family,
        "planted": spec.band is not None,
        "band": list(spec.band) if spec.band else None,
        "read_out": list(range(spec.read_out, spec.n_layers)) if spec.read_out is not None else None,
        "n_layers": spec.n_layers,
        "d_model": spec.d_model,
        "every": spec.every,
        "training": figures,
        "noise": {
            "sigma": round(sigma, 5),
            "note": "Standard deviation of the token embedding; noise of 3 sigma hides a subject.",
        },
    }
    (into / "organism.json").write_text(json.dumps(card, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a bundled fact model from scratch.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--folder", type=Path, help="where to write it; default: over the bundled model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures = train(
        organism_named(arguments.name), into=arguments.folder or folder(arguments.name), threads=arguments.threads
    )
    log.info("%s: %s", arguments.name, json.dumps(figures))


if __name__ == "__main__":
    main()
