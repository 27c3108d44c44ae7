"""Run folders with planted effects. Their numbers are made up: they never leave a test's temporary folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from trl_unigrpo.experiments.paper.order import GROUP_SYSTEMS, WITHOUT_THINKING, full_grid
from trl_unigrpo.experiments.paper.systems import SYSTEMS
from trl_unigrpo.shapeworld.grammar import CATEGORIES


COLORS = {"base": (200, 0, 0), "unigrpo": (0, 0, 200), "long_velocity_mse": (0, 200, 0), "long_none": (90, 90, 0)}
DIRECT = 0.15
"""The base and the fine-tuned ones are planted to be so much lower without thinking."""
GREEDY = 0.03


def planted_means() -> dict[str, float]:
    """The rule of each system in its own mode, as if every claim of the paper held."""
    means = dict.fromkeys(GROUP_SYSTEMS["table1"], 0.6) | dict.fromkeys(GROUP_SYSTEMS["ablations"], 0.8)
    means |= dict.fromkeys(GROUP_SYSTEMS["extras"], 0.7) | dict.fromkeys(GROUP_SYSTEMS["figure5"], 0.75)
    means |= {"base": 0.45, "sft": 0.5, "unifpo": 0.44, "two_stage": 0.65, "unigrpo": 0.8}
    means |= dict.fromkeys(WITHOUT_THINKING, 0.5)
    means |= {"guidance_off": 0.7, "guidance_on": 0.65}
    means |= {"long_velocity_mse": 0.8, "long_none": 0.65, "long_latent_kl": 0.72}
    return means | dict.fromkeys(GROUP_SYSTEMS["hidden"], 0.5)


def planted_learned() -> dict[str, float]:
    """The learned reward of each system: it sees no difference between the long runs."""
    return {name: 0.1 + 0.8 * mean for name, mean in planted_means().items()} | dict.fromkeys(
        GROUP_SYSTEMS["figure5"], 0.7
    )


def planted_errors() -> dict[str, float]:
    """Image error of each system."""
    return dict.fromkeys(planted_means(), 0.003) | {"long_none": 0.09, "long_latent_kl": 0.02}


@dataclass
class World:
    """The planted numbers. Effects are normal; spreads are standard deviations, small enough to stay within [0, 1]."""

    means: dict[str, float] = field(default_factory=planted_means)
    errors: dict[str, float] = field(default_factory=planted_errors)
    learned: dict[str, float] = field(default_factory=planted_learned)
    categories: dict[str, float] = field(default_factory=dict)
    """Category -> what it adds to all systems."""
    seed_spread: float = 0.004
    prompt_spread: float = 0.03
    rest: float = 0.03
    num_prompts: int = 70
    generations: int = 20


def modes(system: str) -> dict[str, float]:
    """Mode -> what it adds to the system's planted mean."""
    if system in ("base", "sft", "sft_clean"):
        return {"sampled": 0.0, "greedy": GREEDY, "direct": -DIRECT}
    if system in WITHOUT_THINKING:
        return {"direct": 0.0}
    if system in GROUP_SYSTEMS["figure4"]:
        return {"guided": 0.0, "sampled": -0.05}
    if system in ("base_seeing", "rounds"):
        return {"sampled": 0.0, "rounds": 0.05}
    return {"sampled": 0.0, "greedy": GREEDY}


def group(system: str) -> str:
    """As the runs name it: a hidden system stands in the group of those that start from it."""
    if system in GROUP_SYSTEMS["hidden"]:
        return {"two_stage_refl": "table1", "guided_base": "figure4"}[system]
    return next(name for name, members in GROUP_SYSTEMS.items() if system in members)


def write_world(output: Path, world: World | None = None, systems=None, seeds=None, draw: int = 0) -> World:
    """Prompts and run folders; `systems` and `seeds` leave out the rest of the grid."""
    world = world or World()
    rng = np.random.default_rng(draw)
    prompts = [f"prompt {i}" for i in range(world.num_prompts)]
    categories = [CATEGORIES[i % len(CATEGORIES)] for i in range(world.num_prompts)]
    write(output / "prompts.json", {"prompts": prompts, "categories": categories})
    of_prompt = rng.normal(0, world.prompt_spread, world.num_prompts)
    of_prompt += [world.categories.get(category, 0.0) for category in categories]
    for system, all_seeds in full_grid().items():
        for seed in all_seeds:
            # Drawn even where it is not written, so that leaving a run out changes no other.
            of_seed = rng.normal(0, world.seed_spread) if trained(system) else 0.0
            rests = {mode: rng.normal(0, world.rest, world.num_prompts) for mode in modes(system)}
            log_error = rng.normal(0, 0.05) if trained(system) else 0.0
            if (systems is None or system in systems) and (seeds is None or seed in seeds):
                scores = {
                    mode: {
                        score: (means[system] + modes(system)[mode] + of_seed + of_prompt + rests[mode]).tolist()
                        for score, means in (("rule", world.means), ("learned", world.learned))
                    }
                    for mode in rests
                }
                write_run(output, world, system, seed, scores, log_error)
    return world


def trained(system: str) -> bool:
    return SYSTEMS[system].method != "none"


def write_run(output: Path, world: World, system: str, seed: int, scores, log_error=0.0):
    folder = output / system / f"seed-{seed}"
    error = world.errors[system] * float(np.exp(log_error))
    generations = SYSTEMS[system].length * world.generations // (2 if system.startswith("two_stage") else 1)
    rollouts = 192 * generations * trained(system)
    sampled = next(iter(scores.values()))["learned"]
    starts = {"two_stage": "two_stage_refl", **dict.fromkeys(GROUP_SYSTEMS["figure4"], "guided_base")}
    write(folder / "run.json", {
        "system": system,
        "title": system.replace("_thinking", ", thinking").replace("_", " "),
        "group": group(system),
        "seed": seed,
        "split": "test",
        "settings": {"learning_rate": 3e-4, "guidance_scale": 2.0 if system == "guidance_on" else 1.0, "seed": seed},
        "start": starts.get(system),
        "rollouts": rollouts,
        "chosen_point": {"rollouts": rollouts // 2, "learned": 0.6} if trained(system) else None,
        "train_cpu_seconds": 100.0 + seed if trained(system) else 0.0,
        "cpu_seconds": 120.0 + seed,
        "threads": 1,
        "machine": "a machine",
        "date": f"2026-01-0{1 + seed}",
        "versions": {"torch": "2.0"},
        "evaluations": {
            mode: {
                **{score: [round(value, 4) for value in found] for score, found in values.items()},
                "questions": 0.7,
                "strict": 0.5,
                "plan": 0.6,
                "image_error": error,
                "image_error_interval": [error * 0.9, error * 1.1],
                "latent_distance": 10 * error,
            }
            for mode, values in scores.items()
        },
        "diversity": {"position_entropy": 2.0, "color_entropy": 1.5, "distinct_images": 0.9},
        "traces": [
            {"prompt": f"prompt {i}", "category": CATEGORIES[i], "thinking": f"{system} thinks {i}", "rule": 0.5,
             "learned": 0.4, "image_error": 0.003}
            for i in range(len(CATEGORIES))
        ],
    })  # fmt: skip
    pixels = np.zeros((48, 48 * len(CATEGORIES), 3), dtype=np.uint8)
    for i in range(len(CATEGORIES)):  # the column says which trace it is
        pixels[:, 48 * i : 48 * (i + 1)] = np.array(COLORS.get(system, (9, 9, 9))) + i
    Image.fromarray(pixels).save(folder / "strip.png")
    if trained(system):
        goal = float(np.mean(sampled))
        write_validation(folder / "validation.jsonl", world, system, rollouts)
        with (folder / "history.jsonl").open("w", encoding="utf-8") as out:
            for i in range(1, generations + 1):
                reward = world.learned["base"] + (goal - world.learned["base"]) * i / generations
                row = {"rollouts": 192 * i, "reward": round(reward, 5), "image_error": error, "cpu_seconds": 5.0 * i}
                row["clip_frac"] = 0.1 + 0.02 * seed + 0.1 * (2 * i > generations)
                out.write(json.dumps(row) + "\n")


def write_validation(file: Path, world: World, system: str, rollouts: int) -> None:
    """From the base's scores in even steps to the system's own."""
    with file.open("w", encoding="utf-8") as out:
        for i in range(8):
            row = {"rollouts": rollouts * i // 7}
            for name, planted in (("learned", world.learned), ("rule", world.means), ("image_error", world.errors)):
                row[name] = planted["base"] + (planted[system] - planted["base"]) * i / 7
            out.write(json.dumps(row) + "\n")


def write(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def edit(file: Path, change) -> None:
    """Read JSON, let `change` alter it, write it back."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    write(file, content)
