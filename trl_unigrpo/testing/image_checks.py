"""Check a model's velocities, and its way from images to latents and back.

A check gets a [`Case`] with a model of its own, and raises [`ContractError`] where the promise in its docstring is
broken.
"""

import numpy as np
import torch
from torch import Tensor

from ..trajectory import Steps, in_order
from .case import Case, expect


# Velocities


@torch.no_grad()
def velocity_is_float32_of_the_latents_shape(case: Case) -> None:
    """`predict_velocity` gives float32 of the shape of the latents."""
    _expect_velocity(case, "")


@torch.no_grad()
def velocity_is_float32_under_autocast(case: Case) -> None:
    """`predict_velocity` gives float32 where autocast computes in bfloat16, as trainers do with `bf16=True`."""
    with torch.autocast(case.model.device.type, torch.bfloat16):
        _expect_velocity(case, " under autocast")


def _expect_velocity(case: Case, where: str) -> None:
    latents = case.latents()
    found = case.velocity(case.contexts(), latents, case.times(0.9, 0.9))
    kind = f"gives {found.dtype} {tuple(found.shape)}{where}, expected torch.float32 {tuple(latents.shape)}."
    right = found.dtype == torch.float32 and found.shape == latents.shape
    expect(right, "predict_velocity", kind)


@torch.no_grad()
def velocity_sees_state_and_time(case: Case) -> None:
    """`predict_velocity` depends on the state and on the time."""
    contexts, latents, times = case.contexts(), case.latents(), case.times(0.5, 0.5)
    known = case.velocity(contexts, latents, times)
    found = {"state": (case.latents(seed=1), times), "time": (latents, case.times(0.25, 0.25))}
    for name, (at, when) in found.items():
        changed = not torch.equal(case.velocity(contexts, at, when), known)
        expect(changed, "predict_velocity", f"does not depend on the {name}. (Is the last layer zero, as some start?)")


@torch.no_grad()
def context_stays_as_it_is(case: Case) -> None:
    """`encode_context` is called once for any number of velocities: `predict_velocity` leaves the context as it is."""
    context, latents, times = case.model.encode_context(case.contexts()), case.latents(), case.times(0.9, 0.9)
    first = case.model.predict_velocity(context, latents, times, case.image_size)
    case.model.predict_velocity(context, case.latents(seed=1), case.times(0.4, 0.4), case.image_size)
    again = case.model.predict_velocity(context, latents, times, case.image_size)
    expect(case.same(again, first), "predict_velocity", "gives another velocity when it is asked again.")


@torch.no_grad()
def rows_do_not_see_one_another(case: Case) -> None:
    """`encode_context` and `predict_velocity` give each row, at a time of its own, what it has alone."""
    contexts, latents, times = case.contexts(), case.latents(), case.times(0.9, 0.3)
    together = case.velocity(contexts, latents, times)
    for row in range(len(contexts)):
        alone = case.velocity(contexts[row : row + 1], latents[row : row + 1], times[row : row + 1])
        same = case.same(together[row : row + 1], alone)
        expect(same, "predict_velocity", f"gives row {row} another velocity beside others.")


def _one_by_one(case: Case, steps: Steps, number: int) -> Tensor:
    at = slice(number, number + 1)
    return case.velocity(steps.contexts[at], steps.x[at], steps.t[at].to(steps.x.device))


@torch.no_grad()
def velocities_are_those_of_each_step(case: Case) -> None:
    """`velocities` yields every step once, with the velocity that `predict_velocity` gives there."""
    steps = case.steps()
    parts = list(case.model.velocities(steps))
    seen = sorted(number for index, _ in parts for number in index.tolist())
    expect(seen == list(range(len(steps))), "velocities", f"yields the steps {seen} of a table of {len(steps)}.")
    known = torch.cat([_one_by_one(case, steps, number) for number in range(len(steps))])
    found = in_order(parts)
    packed = "predict_velocities" if case.model.packs_velocities else "velocities"
    expect(found.dtype == torch.float32, packed, f"gives {found.dtype}, expected torch.float32.")
    expect(case.same(found, known), packed, "gives other velocities than `predict_velocity`.")


@torch.no_grad()
def text_is_the_same_beside_steps(case: Case) -> None:
    """`call_backbone` gives text the hidden states that it has without steps, and the steps their velocities."""
    steps, (ids, mask), real = case.steps(), case.text(), case.text()[1].bool()
    found = case.model.call_backbone(ids, mask, steps=steps)
    known = case.model.call_backbone(ids, mask).last_hidden_state
    name = "packed_forward" if case.model.packs_velocities else "call_backbone"
    expect(case.same(found.last_hidden_state[real], known[real]), name, "gives text other hidden states beside steps.")
    velocity = in_order(case.model.velocities(steps))
    expect(case.same(found.velocity, velocity), name, "gives other velocities than `velocities`.")


def context_grad_is_followed(case: Case) -> None:
    """`velocities` reaches the image expert's weights; those behind the context with `context_grad` alone."""
    steps, model = case.steps(), case.model
    factors = torch.randn(steps.x.shape, generator=torch.Generator().manual_seed(7)).to(steps.x.device)
    text = {}
    for context_grad in (False, True):

        def found(on: bool = context_grad) -> None:
            for index, velocity in model.velocities(steps, on):
                (velocity * factors[index]).sum().backward()

        def known(on: bool = context_grad) -> None:
            for number in range(len(steps)):
                with torch.set_grad_enabled(on):
                    context = model.encode_context([steps.contexts[number]])
                at = slice(number, number + 1)
                velocity = model.predict_velocity(context, steps.x[at], steps.t[at].to(factors), case.image_size)
                (velocity * factors[at]).sum().backward()

        own, expected = case.gradients(found), case.gradients(known)
        reached = any(gradient.any() for name, gradient in own.items() if model.is_image_parameter(name))
        expect(reached, "velocities", "has no gradient for the image expert's weights.")
        same = case.same(_flat(own), _flat(expected))
        expect(same, "velocities", f"with context_grad={context_grad} has another gradient than `predict_velocity`.")
        text[context_grad] = _flat({name: g for name, g in own.items() if not model.is_image_parameter(name)})
    stopped = not text[True].any() or not case.same(text[False], text[True])
    expect(
        stopped or not case.separates_context,
        "encode_context",
        "lets the gradient through to the text's weights without `context_grad`. (For a model whose velocities "
        "compute the context again, pass separates_context=False.)",
    )


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in tensors.values()])


# Images


@torch.no_grad()
def latent_shape_is_checked(case: Case) -> None:
    """`latent_shape` gives whole numbers, and raises ValueError for a size that the model can't paint."""
    shape = case.model.latent_shape(case.image_size)
    expect(isinstance(shape, tuple) and all(type(n) is int for n in shape), "latent_shape", f"gives {shape!r}.")
    if case.impossible_size is None:
        return
    try:
        shape = case.model.latent_shape(case.impossible_size)
    except ValueError:
        return
    expect(False, "latent_shape", f"gives {shape!r} for {case.impossible_size}, which can't be painted.")


@torch.no_grad()
def images_are_encoded_to_latents(case: Case) -> None:
    """`encode_images` gives latents of `latent_shape`, each image's its own."""
    (height, width), generator = case.image_size, torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, height, width, generator=generator).to(case.model.device) * 2 - 1
    shape = (2, *case.model.latent_shape(case.image_size))
    found = case.model.encode_images(pixels)
    expect(found.shape == shape, "encode_images", f"gives {tuple(found.shape)}, expected {shape}.")
    alone = torch.cat([case.model.encode_images(image[None]) for image in pixels])
    expect(case.same(found, alone), "encode_images", "gives images other latents beside one another.")
    expect(not torch.equal(found[0], found[1]), "encode_images", "gives two images the same latents.")


def decoded_images_agree(case: Case) -> None:
    """`decode_latents` gives the same images as "pil" and as "pt", of the size asked for; "pt" with gradient."""
    latents, (height, width) = case.latents().requires_grad_(), case.image_size
    shown_images = case.model.decode_latents(latents.detach(), case.image_size)
    sizes = [image.size for image in shown_images]
    expect(sizes == [(width, height)] * 2, "decode_latents", f"gives images of {sizes}, expected {(width, height)}.")
    pixels = case.model.decode_latents(latents, case.image_size, "pt")
    shape = (2, 3, height, width)
    expect(pixels.shape == shape, "decode_latents", f'("pt") gives {tuple(pixels.shape)}, expected {shape}.')
    levels = (pixels.detach().float().clamp(-1, 1) + 1).movedim(1, 3).cpu().numpy() * 127.5
    shown = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in shown_images])
    agree = bool(np.abs(shown - levels).max() <= 2)
    expect(agree, "decode_latents", '("pt"), taken from [-1, 1], is another image than "pil".')
    expect(pixels.requires_grad, "decode_latents", '("pt") has no gradient.')
    (gradient,) = torch.autograd.grad(pixels.square().sum(), latents)
    expect(bool(gradient.any()), "decode_latents", '("pt") has a gradient of 0.')


def painting_repeats(case: Case) -> None:
    """Images depend on their own context and generator alone: the same ones are painted again, however batched."""
    first, again, single = (
        torch.stack([image.latents for image in case.painted(batch_size)]) for batch_size in (None, None, 1)
    )
    expect(case.same(again, first), "predict_velocity", "paints other images from the same noise.")
    expect(case.same(single, first), "predict_velocity", "paints other images one at a time.")


@torch.no_grad()
def training_sees_what_was_sampled(case: Case) -> None:
    """`velocities` computes at the sampler's steps the velocities that the sampler went on with."""
    made = case.trajectories()
    for trajectory, image in zip(made, case.painted(), strict=True):
        trajectory.rounds[0].images.append(image)
    steps = Steps.of(made).to(case.model.device)
    found = in_order(case.model.velocities(steps))
    expect(case.same(found, steps.states.velocity), "velocities", "are not those that the images were painted with.")


@torch.no_grad()
def noise_comes_from_the_generators(case: Case) -> None:
    """`initial_latents`, where a model brings it, draws float32 noise of each image by its own generator."""

    def drawn(*seeds: int) -> Tensor | None:
        return case.model.initial_latents(case.image_size, [torch.Generator().manual_seed(seed) for seed in seeds])

    both, shape = drawn(0, 1), (2, *case.model.latent_shape(case.image_size))
    if both is None:
        return
    kind = f"gives {both.dtype} {tuple(both.shape)}, expected torch.float32 {shape}."
    expect(both.shape == shape and both.dtype == torch.float32, "initial_latents", kind)
    alone = drawn(1)
    expect(alone is not None and torch.equal(both[1:], alone), "initial_latents", "mixes the images' generators.")
    expect(not torch.equal(both[0], both[1]), "initial_latents", "gives two generators the same noise.")


IMAGE_CHECKS = (
    velocity_is_float32_of_the_latents_shape,
    velocity_is_float32_under_autocast,
    velocity_sees_state_and_time,
    context_stays_as_it_is,
    rows_do_not_see_one_another,
    velocities_are_those_of_each_step,
    text_is_the_same_beside_steps,
    context_grad_is_followed,
    latent_shape_is_checked,
    images_are_encoded_to_latents,
    decoded_images_agree,
    painting_repeats,
    training_sees_what_was_sampled,
    noise_comes_from_the_generators,
)
