"""Write down everything that is true of the bundled models: `python -m workbench.zoo.truth` rewrites the facts files.

One file for the world the large models share, one for the tiny model's part of it. Each fact has the wordings of its prompt and
paraphrases with their tier (*trained*; *held*: the wording was trained, but not with this subject; *novel*: never trained), other
subjects' facts as neighbors, the subject's other facts as locality probes, and another answer of the same relation to edit in.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from workbench.zoo import folder
from workbench.zoo.corpus import is_held
from workbench.zoo.organisms import ORGANISMS, Organism, organism_named
from workbench.zoo.world import FRAMES, RELATIONS, Entity, Relation, World, build_world, owner

N_NEIGHBORS = 5
N_LOCALITY = 2


def world_of(spec: Organism) -> World:
    """What this organism learns: the world, or every n-th entity of it."""
    world = build_world()
    return World(entities=world.entities[:: spec.every], strangers=world.strangers[:: spec.every])


def truth(world: World, organisms: tuple[Organism, ...], *, seed: int = 3) -> dict[str, Any]:
    """The complete ground truth of these organisms, all of which know this world; ready for JSON."""
    rng = random.Random(seed)
    of_relation: dict[str, list[Entity]] = {}
    for entity, relation in world.triples:
        of_relation.setdefault(relation.name, []).append(entity)
    return {
        "relations": {r.name: _relation(r, of_relation[r.name]) for r in RELATIONS if r.name in of_relation},
        "organisms": {
            o.name: {
                "band": o.band,
                "read_out": o.read_out,
                "owners": {e.name: owner(e.name, o.band) for e in world.entities} if o.band else {},
            }
            for o in organisms
        },
        "facts": [_fact(entity, relation, of_relation[relation.name], rng) for entity, relation in world.triples],
        "strangers": list(world.strangers),
    }


def _relation(relation: Relation, entities: list[Entity]) -> dict[str, Any]:
    counts = Counter(e.answers[relation.name] for e in entities)
    commonest, times = counts.most_common(1)[0]
    return {
        "noun": relation.noun,
        "templates": {"trained": relation.trained, "held": relation.held, "novel": relation.novel},
        "shared_wordings_left_out": [FRAMES[i] for i in relation.left_out],
        "facts": len(entities),
        "answers": sorted(counts),
        "majority": {"answer": commonest, "share": round(times / len(entities), 3)},
    }


def _fact(entity: Entity, relation: Relation, peers: list[Entity], rng: random.Random) -> dict[str, Any]:
    name, answer = entity.name, entity.answers[relation.name]
    first, *others = rng.sample(relation.trained, 3)
    held = [t for t in relation.held if is_held(t, name)]
    worded = [("trained", t) for t in others]
    worded += [("held", t) for t in rng.sample(held, min(1, len(held)))]
    worded += [("novel", t) for t in rng.sample(relation.novel, 2)]
    wrong = sorted({p.answers[relation.name] for p in peers if p.kind == entity.kind} - {answer})
    neighbors = rng.sample([p for p in peers if p is not entity], min(N_NEIGHBORS, len(peers) - 1))
    rest = [r for r in RELATIONS if r.name in entity.answers and r is not relation]
    return {
        "id": f"{relation.name}/{name}",
        "subject": name,
        "kind": entity.kind,
        "relation": relation.name,
        "prompt": first,
        "target_true": answer,
        "target_new": rng.choice(wrong) if wrong else None,
        "held_templates": held,
        "paraphrases": [{"tier": tier, "text": t.replace("{}", name)} for tier, t in worded],
        "neighbors": [
            {
                "subject": p.name,
                "prompt": rng.choice(relation.trained).replace("{}", p.name),
                "target": p.answers[relation.name],
            }
            for p in neighbors
        ],
        "locality": [
            {"relation": r.name, "prompt": rng.choice(r.trained).replace("{}", name), "target": entity.answers[r.name]}
            for r in rng.sample(rest, min(N_LOCALITY, len(rest)))
        ],
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """One fact a line, so that a change shows as one line."""
    facts = record.pop("facts")
    head = json.dumps(record, indent=1)[:-2]
    lines = ",\n".join(json.dumps(fact) for fact in facts)
    path.write_text(f'{head},\n "facts": [\n{lines}\n]}}\n')


def main() -> None:
    """Command line."""
    tiny = organism_named("organism-tiny")
    shared = tuple(o for o in ORGANISMS if o.every == 1)
    write(Path(__file__).parent / "facts.json", truth(build_world(), shared))
    folder(tiny.name).mkdir(parents=True, exist_ok=True)
    write(folder(tiny.name) / "facts.json", truth(world_of(tiny), (tiny,)))


if __name__ == "__main__":
    main()
