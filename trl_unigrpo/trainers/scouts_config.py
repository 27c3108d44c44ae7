"""The options of scouts, and what is refused of them."""

from dataclasses import dataclass, field
from typing import Any

from ..flow.per_round import of_round


@dataclass
class ScoutsConfig:
    r"""
    Options of [`UniGRPOConfig`] for scouts: a pool of images of each prompt, painted in a few steps, of which the best
    and the worst are painted again, exactly, and trained on (Sol-RL, arXiv 2604.06916).

    Parameters:
        > Parameters that control scouts

        scout_generations (`int`, *optional*):
            Trajectories of the pool of each prompt, a multiple of `num_generations`, which is how many of them are
            trained on. Advantages and metrics are those of the pool. None: no scouts.
        scout_num_inference_steps (`int`, *optional*, defaults to `4`):
            Denoising steps of a scout, all of the ODE. As many as `num_inference_steps`, for an objective that samples
            by the ODE, too: the scouts are the images, and none is painted again.
        scout_reward (`str`, *optional*, defaults to `"repainted"`):
            What the chosen are paid for: their `"repainted"` images, which are rewarded too, or their `"scouts"`.
    """

    scout_generations: int | None = field(
        default=None, metadata={"help": "Trajectories of each prompt's pool of scouts. None: no scouts. Sol-RL: 96."}
    )
    scout_num_inference_steps: int = field(default=4, metadata={"help": "Denoising steps of a scout."})
    scout_reward: str = field(
        default="repainted", metadata={"help": "What the chosen are paid for: 'repainted' images or 'scouts'."}
    )

    @property
    def pool_size(self) -> int:
        """Trajectories of one prompt that are sampled and rewarded."""
        return self.scout_generations or self.num_generations  # type: ignore[attr-defined]


def check_scouts(config: Any, processes: int) -> None:
    """Raise ValueError for a pool that can't be chosen from, and scouts that save nothing."""
    if config.scout_reward not in ("repainted", "scouts"):
        raise ValueError(f"scout_reward={config.scout_reward!r}: expected 'repainted' or 'scouts'.")
    pool, group, steps = config.scout_generations, config.num_generations, config.scout_num_inference_steps
    if pool is None:
        return
    if pool <= group or pool % group:
        raise ValueError(
            f"scout_generations={pool} with num_generations={group}: expected a pool of {2 * group}, {3 * group}, ... "
            f"trajectories, of which {group} are trained on. Leave it out for no scouts."
        )
    if config.images_per_thinking > 1:
        raise ValueError(
            f"scout_generations={pool} with images_per_thinking={config.images_per_thinking}: the images of one "
            "thinking would not be chosen together, whose mean it is paid. Leave one of them out."
        )
    exact = of_round(config, "num_inference_steps", 0)
    if not 1 <= steps <= exact:
        raise ValueError(
            f"scout_num_inference_steps={steps} with num_inference_steps={exact}: expected 1 to {exact}, as scouts "
            "are the cheaper ones."
        )
    rows = config.per_device_train_batch_size * config.steps_per_generation
    if processes > 1 and rows % group:
        raise ValueError(
            f"scout_generations={pool} on {processes} processes: each chooses among its own groups, but "
            f"per_device_train_batch_size * steps_per_generation = {rows} rows are no whole groups of {group}. Make "
            "it a multiple."
        )
