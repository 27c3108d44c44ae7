"""Bytes that reach each device of several in one generation with its updates, in closed form.

An all-gather and a reduce-scatter bring each of N devices (N - 1) / N of what is gathered or reduced; an all-reduce is
one of each. FSDP2 gathers all weights once for a rollout, or for each of its forwards. Else it gathers, for each
forward and each backward, every layer (both experts) and the table of embeddings, and what is in no layer once a
phase, or a micro-batch of the update: in the precision of products. Gradients travel in float32. Scores, statistics
and thumbnails also travel: kilobytes an image, left out here.
"""

from typing import NamedTuple

from .memory import end_parameters, layer_parameters, trained_parameter_counts
from .workload import Workload


NVLINK = 450.0
"""GB/s in one direction of an H100, by its data sheet. A port of 400 Gb/s between machines has 50."""


class Traffic(NamedTuple):
    """
    What a phase brings to each device.

    Attributes:
        times: how often weights are gathered, or gradients reduced.
        bytes: that each device receives, all times together.
    """

    times: int
    bytes: int


def traffic(load: Workload) -> dict[str, Traffic]:
    """Count what each phase of a generation brings to each device; nothing on one device."""
    if load.processes == 1:
        return {}
    gradients = 4 * sum(trained_parameter_counts(load))
    if not load.fsdp:
        return {"gradients, all-reduce": _received(load, load.num_iterations, 2 * gradients)}
    micro_batches = -(-load.trajectories // load.scored_at_once)
    passes = load.num_iterations * micro_batches
    reduced = passes if load.sync_each_batch else load.num_iterations
    found = {name: _gathered(load, times, 1) for name, times in _forwards(load, micro_batches).items() if times}
    found["update, all-gather"] = _gathered(load, 2 * passes, passes)
    found["gradients, reduce-scatter"] = _received(load, reduced, gradients)
    return found


def _forwards(load: Workload, micro_batches: int) -> dict[str, int]:
    """Count the forwards of each phase before the update."""
    batches = -(-load.trajectories // load.denoised_at_once)
    painted, contexts = batches * load.num_inference_steps * load.num_rounds, batches * load.num_rounds
    if load.scout_generations is not None:
        scouts = -(-load.pool // load.denoised_at_once)
        painted = scouts * load.scout_num_inference_steps + load.repaints * painted
        contexts = scouts + load.repaints * contexts
    sampled = {"thinking": load.texts, "contexts": contexts, "denoising": painted}
    return {
        **({"rollout": 1} if load.gather_for_rollout else sampled),
        "reference pass": micro_batches * load.reference,
        "old policy's pass": micro_batches * load.image_old_policy,
        "old log-probs of the text": micro_batches * (load.num_iterations > 1),
    }


def _gathered(load: Workload, times: int, kept: int) -> Traffic:
    """Count what is gathered so many times, and what is then kept as often."""
    llm = load.config.llm_config
    table = llm.hidden_size * llm.vocab_size
    each = llm.num_hidden_layers * layer_parameters(load) + table
    behind = end_parameters(load) - table
    weights = load.activation_bytes * (times * each + kept * behind)
    return Traffic(times, weights * (load.processes - 1) // load.processes)


def _received(load: Workload, times: int, size: int) -> Traffic:
    return Traffic(times, times * size * (load.processes - 1) // load.processes)
