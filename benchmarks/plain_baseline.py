"""The loops that anybody would write first, with a trainer's model and settings: the baselines of bagel_step.py.

Batches of one, and for each stochastic step one forward of the policy and one of the reference. The first baseline
encodes an image's context again for each, which is verl-omni's structure; the second keeps it, which is UniRL's: that
of the rollout through the first pass, one a pass from then on, when the weights have changed, and one of the reference
for all. Their rollout is the same, that of BAGEL's own inferencer: it thinks with a cache and encodes each context
once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from phases import Phases

from trl_unigrpo import UniGRPOTrainer
from trl_unigrpo.estimate import Workload, floor_flops
from trl_unigrpo.estimate.flops import image_forward, logits_forward, text_forward
from trl_unigrpo.flow import clipped_surrogate, flow_timesteps, log_ratio, velocity_mse
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.flow.states import SDESteps, on_device, rows_of
from trl_unigrpo.sampling import decode, paint
from trl_unigrpo.seeding import TRAIN, row_generator
from trl_unigrpo.trainers.dry_run import FixedLengths
from trl_unigrpo.trainers.windows import draw_windows
from trl_unigrpo.trajectory import Image, Round, Trajectory


@dataclass
class PlainRow:
    """One trajectory of the plain rollout."""

    prompt: list[int]
    thinking: list[int]
    image: Image


def plain_rollout(trainer: UniGRPOTrainer, lengths: Sequence[int], phases: Phases) -> list[PlainRow]:
    """Think, denoise and decode one after the other: a trajectory for each of the lengths of a thinking."""
    args, base, device = trainer.args, trainer.unified, trainer.accelerator.device
    prompt = trainer.train_dataset[0]["prompt"]
    prompt_ids = trainer._tokenize_prompts([prompt])[0][0]
    ids = torch.tensor([prompt_ids], device=device)
    base.train()
    nodes = flow_timesteps(args.num_inference_steps, args.timestep_shift)
    rows = []
    for i, length in enumerate(lengths):
        with torch.no_grad(), trainer.accelerator.autocast():
            with phases("thinking"):
                sampled = base.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=trainer.generation_config,
                    logits_processor=[FixedLengths([length], ids.shape[1], trainer.processing_class.eos_token_id)],
                )
            thinking = sampled[0, ids.shape[1] :].tolist()
            windows = draw_windows(args, trainer.generation, 0, 1)
            plan = RolloutPlan(nodes, (args.image_size, args.image_size), windows)
            trajectory = Trajectory(prompt, prompt_ids, i, [Round(thinking)])
            with phases("denoising"):
                [image] = paint(base, [trajectory], plan, [row_generator(args.seed, TRAIN, 0, i)])
        with torch.no_grad(), phases("VAE decode"):
            decode(base, [image])
        rows.append(PlainRow(prompt_ids, thinking, image))
    return rows


class Contexts:
    """Encoded contexts of images, without gradient: kept under a key, or (`keeps=False`) encoded at every call."""

    def __init__(self, trainer: UniGRPOTrainer, keeps: bool):
        self.trainer, self.keeps = trainer, keeps
        self._kept: dict[Any, Any] = {}

    def of(self, model: Any, image: Image, key: Any) -> Any:
        if self.keeps and key in self._kept:
            return self._kept[key]
        with torch.no_grad(), self.trainer.accelerator.autocast():
            context = model.encode_context([image.context])
        if self.keeps:
            self._kept[key] = context
        return context

    def forget(self, which: str) -> None:
        self._kept = {key: context for key, context in self._kept.items() if key[0] != which}


def plain_passes(trainer: UniGRPOTrainer, rows: Sequence[PlainRow], phases: Phases, keeps_contexts: bool) -> None:
    """Make the passes over a plain rollout, an optimizer step each."""
    args, device = trainer.args, trainer.accelerator.device
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=args.adam_epsilon)
    optimizer.zero_grad()
    contexts = Contexts(trainer, keeps_contexts)
    if keeps_contexts:
        for i, row in enumerate(rows):  # in no phase: the rollout has computed them
            contexts.of(trainer.unified, row.image, ("policy", i))
    old: dict[tuple[int, int], torch.Tensor] = {}
    for _ in range(args.num_iterations):
        for i, row in enumerate(rows):
            advantage = torch.tensor(1.0 if i % 2 else -1.0, device=device)
            with phases("update"):
                plain_text_step(trainer, row, advantage)
            for k in range(len(row.image.steps)):
                plain_flow_step(trainer, contexts, row.image, (i, k), advantage, old.setdefault, phases)
        with phases("optimizer"):
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        contexts.forget("policy")


def plain_text_step(trainer: UniGRPOTrainer, row: PlainRow, advantage: torch.Tensor) -> None:
    """Compute log-probs of a thinking from whole logits, and their backward pass."""
    ids = torch.tensor([row.prompt + row.thinking], device=advantage.device)
    with trainer.accelerator.autocast():
        logits = trainer.unified(input_ids=ids, logits_to_keep=len(row.thinking) + 1).logits[:, :-1]
    text_loss(logits[0], ids[0, -len(row.thinking) :], advantage).backward()


def text_loss(logits: torch.Tensor, answers: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Compute the policy loss of tokens (T,) by logits (T, vocabulary), in the first pass."""
    log_probs = logits.float().log_softmax(-1).gather(-1, answers[:, None])
    return -advantage * (log_probs - log_probs.detach()).exp().mean()


def plain_flow_step(
    trainer: UniGRPOTrainer,
    contexts: Contexts,
    image: Image,
    place: tuple[int, int],
    advantage: torch.Tensor,
    keep: Callable[[tuple[int, int], torch.Tensor], torch.Tensor],
    phases: Phases,
) -> None:
    """One stochastic step: a forward of the reference, one of the policy, its backward pass."""
    base, (i, k) = trainer.unified, place
    states = on_device(rows_of(image.steps, slice(k, k + 1)), advantage.device)

    def velocity(model: Any, which: str) -> torch.Tensor:
        context = contexts.of(model, image, (which, i))
        with trainer.accelerator.autocast():
            return model.predict_velocity(context, states.x, states.t.to(states.x.device), image.size)

    with phases("reference pass"), base.reference() as reference, torch.no_grad():
        anchor = velocity(reference, "reference")
    with phases("update"):
        predicted = velocity(base, "policy")
        old = keep(place, predicted.detach())
        flow_loss(trainer, states, predicted, old, anchor, advantage).backward()


def flow_loss(
    trainer: UniGRPOTrainer,
    states: SDESteps,
    predicted: torch.Tensor,
    old: torch.Tensor,
    anchor: torch.Tensor,
    advantage: torch.Tensor,
) -> torch.Tensor:
    """Compute the flow objective and its regulariser of velocities (S, N, C) at some states."""
    objective = trainer._setup.objective
    ratio = log_ratio(states.x, states.x_next, predicted, old, objective.transition(states), trainer.args.ratio_norm)
    loss = clipped_surrogate(ratio, advantage, objective.clip_range(predicted)).mean()
    return loss + trainer._setup.weight_of(predicted) * velocity_mse(predicted, anchor, num_batch_dims=1).mean()


def plain_flops(load: Workload, keeps_contexts: bool = False) -> dict[str, int]:
    """Count a plain baseline's FLOPs by phase in closed form, without adapters."""
    parts, text = floor_flops(load), replace(load, num_prompts=load.trajectories, num_generations=1)
    words = load.completion_length * logits_forward(load)
    again = int(load.gradient_checkpointing)
    image, context = image_forward(load), text_forward(load, load.context)
    backward = image.linear * (2 + again) + image.attention * 7 // 2 + image.attention * again
    backward += image.entry + 2 * image.exit
    text_update = context.linear * (2 + again) + context.attention * 7 // 2 + context.attention * again + 2 * words
    passes = load.num_iterations * load.trajectories
    steps = passes * load.sde_window_size
    encoded = {"reference pass": steps, "update": steps}
    if keeps_contexts:
        encoded = {"reference pass": load.trajectories, "update": passes - load.trajectories}
    return {
        "thinking": floor_flops(text)["prefill"] + parts["decode"],
        "denoising": parts["contexts"] + parts["denoising"],
        "VAE decode": parts["VAE decode"],
        "reference pass": encoded["reference pass"] * context.total + steps * image.total,
        "update": passes * text_update + encoded["update"] * context.total + steps * backward,
    }
