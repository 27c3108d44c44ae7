"""Training on one, two or three images a trajectory, in one round or two, with windows of unequal length; and its
objective, written out in float64 from the equations, one step of one image at a time.

The oracle knows nothing of tables, packing or guidance; of the package it calls a model's `encode_context` and
`predict_velocity` alone.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.oracle import step_scale
from tests.helpers.tiny_unified import FixedTexts, moved, tiny_bagel, weights
from trl_unigrpo.flow.states import rows_of
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.models.bagel.segments import ContextImage
from trl_unigrpo.trajectory import Round


GRID = (2, 2)
BY_ROUND = ("num_inference_steps", "noise_level", "sde_window_size", "sde_window_range")


class SeesItsImages(BagelForUnifiedGeneration):
    """A BAGEL that sees, behind all texts, the images of the round before."""

    def contexts(self, trajectories):
        rows = super().contexts(trajectories)
        for row, trajectory in zip(rows, trajectories, strict=True):
            seen = [self._seen(image) for part in trajectory.rounds[-2:-1] for image in part.images]
            places = torch.full((len(seen),), self.config.image_token_id)
            row.ids, row.images = torch.cat([row.ids, places]), [*row.images, *seen]
        return rows

    def _seen(self, image):
        """One object an image, so that contexts that hold it know that it is the same."""
        known = self.__dict__.setdefault("_known", {})
        return known.setdefault(image.seed, ContextImage(image.latents, GRID))


class SeesAndPaintsOneByOne(SeesItsImages):
    """The same, which does not pack."""

    packs_velocities = False


def seeing_bagel(kind=SeesItsImages):
    """The tiny BAGEL as one of these."""
    model = tiny_bagel()
    model.__class__ = kind
    return model


class ManyImages(FixedTexts):
    """
    Of each four trajectories, the first paints one image; the second a further one, in a round of its own that sees
    the first; the third two more, both in this round or, in the second group, each in a round of its own; the fourth
    two images behind one text, of which the first is not trained, and in the second group neither.
    """

    def _paint(self, trajectories):
        painted = super()._paint(trajectories)
        for trajectory in trajectories:
            if trajectory.row % 4 in (1, 2):
                trajectory.rounds.append(Round())
        super()._paint([t for t in trajectories if t.row % 4 in (1, 2, 3)])
        next(t for t in trajectories if t.row == 6).rounds.append(Round())
        super()._paint([t for t in trajectories if t.row % 4 == 2])
        for trajectory in trajectories:
            for number, image in enumerate(images(trajectory)):
                untrained = trajectory.row == 7 or (trajectory.row == 3 and number == 0)
                image.steps = rows_of(image.steps, slice(0 if untrained else 1 + (trajectory.row + number) % 3))
        return painted


def images(trajectory):
    """Of all rounds, in their order."""
    return [image for _, image in trajectory.painted()]


# The oracle


def velocities(model, image, context_grad):
    """A list of K, each (*latent), of the image's steps one by one; in float64 where the model is."""
    with torch.set_grad_enabled(context_grad and torch.is_grad_enabled()):
        context = model.encode_context([image.context])
    x, t = (z.to(next(model.parameters()).dtype) for z in (image.steps.x, image.steps.t))
    return [model.predict_velocity(context, x[k : k + 1], t[k : k + 1], image.size)[0].double() for k in range(len(t))]


def fixed_velocities(models, name, image):
    """Those of the old policy or of the reference, which no pass over a generation changes: computed once."""
    model = getattr(models, name)
    if (key := (id(model), id(image))) not in models.known:
        with torch.no_grad():
            models.known[key] = velocities(model, image, False)
    return models.known[key]


def surrogate(log_ratio, advantage, epsilon):
    """-min(r A, clip(r) A)."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def of_round(settings, number):
    """The settings of a round: of those that are given as one a round, its own."""
    lists = {name: value for name, value in settings.items() if name in BY_ROUND and isinstance(value, list)}
    return {**settings, **{name: value[number] for name, value in lists.items()}}


def scale_of_size(image):
    """That of the constants, by the numbers of an image."""
    return math.sqrt(262144 / image.latents.numel())


def scale_of_steps(settings):
    """That of the constants: the mean over rounds whose steps differ."""
    return mean([step_scale(of_round(settings, number)) for number in range(2)])


def noisy_losses(image, v, old, advantage, number, settings):
    """Equation 5 of each step, with the log-ratio as the difference of two Gaussians' log-probs."""
    losses, steps, own = [], image.steps, of_round(settings, number)
    u, noise = 1 - 1 / own.get("num_inference_steps", 6), own.get("noise_level", 0.8)
    first = 3 * u / (1 + 2 * u)
    for k in range(len(v)):
        x, x_next, t, dt = (z[k].double() for z in (steps.x, steps.x_next, steps.t, steps.t_next - steps.t))
        sigma2 = noise**2 * t / (1 - (first if t == 1 else t))
        std = (sigma2 * -dt).sqrt()
        mu, mu_old = (x + (u + sigma2 / (2 * t) * (x + (1 - t) * u)) * dt for u in (v[k], old[k]))
        log_ratio = (((x_next - mu_old) ** 2).mean() - ((x_next - mu) ** 2).mean()) / (2 * std**2)
        normed = std * (log_ratio + ((mu - mu_old) ** 2).mean() / (2 * std**2))
        losses.append(surrogate(normed, advantage, 1e-6 * scale_of_size(image) * scale_of_steps(settings)))
    return losses


def line_losses(image, v, old, advantage, kind):
    """FPO's one loss of an image, or those of each of its lines (AWM, NFT)."""
    clean, targets = image.latents.double(), image.steps.target.double()
    if kind != "nft":
        epsilon = {"fpo": 3e-5, "awm": 1e-4}[kind] * scale_of_size(image)
        gains = [((old[k] - targets[k]) ** 2 - (v[k] - targets[k]) ** 2).mean() for k in range(len(v))]
        gains = [gain + ((v[k] - old[k]) ** 2).mean() for k, gain in enumerate(gains)]  # centred
        gains = [sum(gains) / len(gains)] if kind == "fpo" and gains else gains
        return [surrogate(gain, advantage, epsilon) for gain in gains]
    losses, share = [], 0.5 + advantage / 10
    for k in range(len(v)):
        x, t, loss = image.steps.x[k].double(), image.steps.t[k].double(), 0.0
        for weight, towards in ((share, v[k]), (1 - share, 2 * old[k] - v[k])):  # beta = 1
            error = x - t * towards - clean
            loss = loss + 5 * weight * (error**2).mean() / error.abs().mean().detach()
        losses.append(loss)
    return losses


def mean(values):
    """Of a list of scalars."""
    return sum(values) / len(values)


def flow_loss(models, batch, settings):
    """-(J_flow) + w L_MSE of one micro-batch: means over steps, images and trajectories, in this order."""
    rows, grad, kind = [], settings.get("flow_context_grad") == "full", settings.get("image_objective", "flow_grpo")
    weight = settings.get("flow_regularizer_weight", 1.5e-5)
    weight *= scale_of_steps(settings) if kind == "flow_grpo" else 1
    for row, trajectory in enumerate(batch["trajectories"]):
        of_images = []
        for number, image in trajectory.painted():
            if not len(image.steps):
                continue
            advantage = paid(batch, row, number)
            v = velocities(models.now, image, grad)
            old, reference = (fixed_velocities(models, name, image) for name in ("old", "reference"))
            if settings.get("flow_old_source") == "rollout":
                old = list(image.steps.velocity.double())
            if kind == "flow_grpo":
                losses = noisy_losses(image, v, old, advantage, number, settings)
            else:
                losses = line_losses(image, v, old, advantage, kind)
            distance = mean([((a - b) ** 2).mean() for a, b in zip(v, reference, strict=True)])
            of_images.append(mean(losses) + weight * scale_of_size(image) * distance)
        rows.append(mean(of_images) if of_images else torch.zeros((), dtype=torch.float64))
    return mean(rows)


def paid(batch, row, number):
    """The advantage of a round."""
    several = "round_advantages" in batch
    return (batch["round_advantages"][row, number] if several else batch["advantages"][row]).double()


def texts_of(batch, row):
    """Of one trajectory's rounds: number, what stands before its text, the text, the images that are shown."""
    if "rounds" in batch:
        t = batch["rounds"][row]
        for number in range(len(t.rounds)):
            seen = replace(t, rounds=t.rounds[: number + 1]).now()
            yield number, seen.prompt_ids, t.rounds[number].text_ids, seen.images
    else:
        parts = ("prompt", "completion")
        yield (
            0,
            *(batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()].tolist() for part in parts),
            [],
        )


def text_loss(models, batch, trained=lambda number: True):
    """-(J_text) of one micro-batch: means over tokens of all rounds and trajectories."""

    def log_probs(model, prompt, completion, shown):
        images = {"images": [shown]} if shown else {}
        hidden = model.backbone(torch.tensor([[*prompt, *completion]]), **images).last_hidden_state[0]
        rows = model.get_output_embeddings()(hidden)[len(prompt) - 1 : -1].log_softmax(-1)
        return rows[torch.arange(len(completion)), torch.tensor(completion)]

    losses = []
    for row in range(len(batch["advantages"])):
        of_row = [torch.zeros(0)]
        for number, *text in texts_of(batch, row):
            if trained(number):
                with torch.no_grad():
                    old = log_probs(models.old, *text)
                of_row.append(surrogate(log_probs(models.now, *text) - old, paid(batch, row, number), 0.2))
        losses.append(torch.cat(of_row).mean())
    return mean(losses)


def policies(make_model, old):
    """The models of one generation in float64, the old policy with its weights, and what is known of their images."""
    now, reference = make_model().double(), make_model()
    first = not moved(old, weights(reference))  # where a training starts, both are one
    models = SimpleNamespace(now=now, reference=reference.double(), known={})
    models.old = models.reference if first else make_model().double()
    models.old.load_state_dict(old, strict=False)
    return models


def expected(models, batches, now, settings):
    """Gradients by parameter name of the objective over the micro-batches of one optimizer step, and its value."""
    models.now.load_state_dict(now, strict=False)
    models.now.zero_grad()
    flow = mean([flow_loss(models, batch, settings) for batch in batches])
    trained = settings.get("train_rounds")
    trains = (lambda number: True) if trained is None else lambda number: number + 1 in trained
    loss = flow + mean([text_loss(models, batch, trains) for batch in batches])
    loss.backward()
    return {name: p.grad for name, p in models.now.named_parameters()}, loss.item()


def assert_equations(make_model, trainer, seen, settings):
    """Hold the loss and the gradients of every update that a recorder has seen against the equations."""
    accumulated, logs = trainer.args.gradient_accumulation_steps, trainer.state.log_history
    updates = trainer.num_iterations * trainer.args.steps_per_generation // accumulated  # of one generation
    for step in range(len(seen.weights)):
        batches = seen.batches[step * accumulated : (step + 1) * accumulated]
        if step % updates == 0:
            models = policies(make_model, seen.weights[step])
        gradients, loss = expected(models, batches, seen.weights[step], settings)
        assert logs[step]["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
        for name, gradient in seen.gradients[step].items():
            wanted = gradients[name]
            if gradient is None or wanted is None:
                assert (gradient, wanted) == (None, None), name
                continue
            scale = wanted.abs().max().item()
            torch.testing.assert_close(gradient, wanted.float(), rtol=1e-3, atol=2e-5 * scale + 1e-10, msg=name)
