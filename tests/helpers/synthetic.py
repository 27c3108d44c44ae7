"""Run folders with planted effects. Their numbers are made up: they never leave a test's temporary folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from trl_unigrpo.experiments.paper.order import GROUP_SYSTEMS, WITHOUT_THINKING, full_grid
from trl_unigrpo.shapeworld.grammar import CATEGORIES


COLORS = {"base": (200, 0, 0), "sft": (0, 200, 0), "unigrpo": (0, 0, 200)}
DIRECT = 0.15
"""How much lower the base and the fine-tuned ones are planted to be without thinking."""
GREEDY = 0.03


def planted_means() -> dict[str, float]:
    """Reward of each system in its own mode, as if every claim of the paper held."""
    means = dict.fromkeys(GROUP_SYSTEMS["table1"], 0.6) | dict.fromkeys(GROUP_SYSTEMS["ablations"], 0.8)
    means |= {"base": 0.45, "sft": 0.5, "unifpo": 0.44, "two_stage": 0.65, "unigrpo": 0.8}
    means |= dict.fromkeys(WITHOUT_THINKING, 0.5)
    means |= {"guidance_off": 0.7, "guidance_on": 0.65}
    return means | dict.fromkeys(GROUP_SYSTEMS["figure5"], 0.8) | dict.fromkeys(GROUP_SYSTEMS["hidden"], 0.5)


def planted_errors() -> dict[str, float]:
    """Picture error of each system."""
    return dict.fromkeys(planted_means(), 0.003) | {
        "no_regularizer": 0.09,
        "latent_kl": 0.02,
        "latent_kl_matched": 0.01,
    }


@dataclass
class World:
    """What is planted. Effects are normal; spreads are standard deviations, small enough to stay within [0, 1]."""

    means: dict[str, float] = field(default_factory=planted_means)
    errors: dict[str, float] = field(default_factory=planted_errors)
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
        return {"sampled": -0.05, "guided": 0.0}
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
            of_seed = rng.normal(0, world.seed_spread) if system != "base" else 0.0
            rests = {mode: rng.normal(0, world.rest, world.num_prompts) for mode in modes(system)}
            log_error = rng.normal(0, 0.05) if system != "base" else 0.0
            if (systems is None or system in systems) and (seeds is None or seed in seeds):
                rewards = {
                    mode: (world.means[system] + modes(system)[mode] + of_seed + of_prompt + rests[mode]).tolist()
                    for mode in rests
                }
                write_run(output, world, system, seed, rewards, log_error)
    return world


def write_run(output: Path, world: World, system: str, seed: int, rewards: dict[str, list[float]], log_error=0.0):
    folder = output / system / f"seed-{seed}"
    error = world.errors[system] * float(np.exp(log_error))
    trained = system != "base"
    generations = world.generations // 2 if system.startswith("two_stage") else world.generations
    sampled = next(iter(rewards.values()))
    starts = {"two_stage": "two_stage_refl", **dict.fromkeys(GROUP_SYSTEMS["figure4"], "guided_base")}
    write(folder / "run.json", {
        "system": system,
        "title": system.replace("_thinking", ", thinking").replace("_", " "),
        "group": group(system),
        "seed": seed,
        "split": "test",
        "settings": {"learning_rate": 3e-4, "guidance_scale": 2.0 if system == "guidance_on" else 1.0, "seed": seed},
        "start": starts.get(system),
        "rollouts": 192 * generations * trained,
        "train_cpu_seconds": 100.0 + seed if trained else 0.0,
        "cpu_seconds": 120.0 + seed,
        "threads": 1,
        "machine": "a machine",
        "date": f"2026-01-0{1 + seed}",
        "versions": {"torch": "2.0"},
        "evaluations": {
            mode: {
                "reward": [round(value, 4) for value in values],
                "strict": 0.5,
                "plan": 0.6,
                "picture_error": error,
                "picture_error_interval": [error * 0.9, error * 1.1],
                "latent_distance": 10 * error,
                "categories": {},
            }
            for mode, values in rewards.items()
        },
        "diversity": {"position_entropy": 2.0, "color_entropy": 1.5, "distinct_pictures": 0.9},
        "traces": [
            {"prompt": f"prompt {i}", "category": CATEGORIES[i], "thinking": f"{system} thinks {i}", "reward": 0.5,
             "picture_error": 0.003}
            for i in range(len(CATEGORIES))
        ],
    })  # fmt: skip
    pixels = np.zeros((48, 48 * len(CATEGORIES), 3), dtype=np.uint8)
    for i in range(len(CATEGORIES)):  # the column says which trace it is
        pixels[:, 48 * i : 48 * (i + 1)] = np.array(COLORS.get(system, (9, 9, 9))) + i
    Image.fromarray(pixels).save(folder / "strip.png")
    if trained:
        goal = float(np.mean(sampled))
        with (folder / "history.jsonl").open("w", encoding="utf-8") as out:
            for i in range(1, generations + 1):
                reward = world.means["base"] + (goal - world.means["base"]) * i / generations
                row = {"rollouts": 192 * i, "reward": round(reward, 5), "picture_error": error, "cpu_seconds": 5.0 * i}
                row["clip_frac"] = 0.1 + 0.02 * seed + 0.1 * (2 * i > generations)
                out.write(json.dumps(row) + "\n")


def write(file: Path, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def edit(file: Path, change) -> None:
    """Read JSON, let `change` alter it, write it back."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    write(file, content)
