"""Painting without a trainer."""

from trl_unigrpo.sampling import paint
from trl_unigrpo.trajectory import Round, Steps, Trajectory


def prompts_alone(prompts):
    """Trajectories of prompts without a thinking."""
    return [Trajectory(prompt, [], row, [Round()]) for row, prompt in enumerate(prompts)]


def painted_steps(model, trajectories, plan, generators) -> Steps:
    """The table of the steps that images were painted with."""
    for trajectory, image in zip(trajectories, paint(model, trajectories, plan, generators), strict=True):
        trajectory.rounds[-1].images.append(image)
    return Steps.of(trajectories)
