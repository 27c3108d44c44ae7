"""The objective of a training written out by hand: the paper's formulas, one trajectory at a time.

It knows nothing of the package's flow maths, packing or padding: float64, from the recorded rollout and the weights
before each step.
"""

import math

import torch

from tests.helpers.tiny_unified import IMAGE_SIZE, images_of, tiny_bagel
from trl_unigrpo.models.contract import ContextRow


NOISE, SHIFT, STEPS = 0.8, 3.0, 6
NUMBERS = 16  # in one image's latents
SYSTEM_TOKENS = 4  # of "think first" at the start of each context, with what opens and closes it


def step_scale(settings):
    """Mean width of the log-ratio over the windows of this run's steps, as a multiple of the paper's."""

    def width(count, size, kind, ratio_norm, noise=NOISE, high=5):
        u = [1 - k / count for k in range(count + 1)]
        nodes = [SHIFT * x / (1 + (SHIFT - 1) * x) for x in u]
        widths = []
        for start in range(high - size + 1):  # each is as likely
            for t, t_next in zip(nodes[start:][:size], nodes[start + 1 :][:size], strict=True):
                sigma2 = noise**2 * t / (1 - (nodes[1] if t == 1 else t))
                b, std = (1 + sigma2 * (1 - t) / (2 * t)) * (t - t_next), math.sqrt(sigma2 * (t - t_next))
                if kind == "cps":
                    std = t_next * math.sin(noise * math.pi / 2)
                    b = t * (1 - t_next) - (1 - t) * math.sqrt(t_next**2 - std**2)
                widths.append(b if ratio_norm else b / std)
        return sum(widths) / len(widths)

    normed = settings.get("ratio_norm", True)
    named = {"num_inference_steps": STEPS, "sde_window_size": 3, "sde_type": "sde"}
    steps, size, kind = (settings.get(name, default) for name, default in named.items())
    low_high = settings.get("sde_window_range", [0, 5])
    own = width(steps, size, kind, normed, settings.get("noise_level", NOISE), low_high[1])
    return own / width(25, 3, "sde", normed)


def text_log_probs(model, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    logits = model.language_model.lm_head(
        model.backbone(ids).last_hidden_state  # no padding, no flow
    ).double()[0]
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows[torch.arange(len(completion)), torch.tensor(completion)]


def velocities(model, image, settings):
    """(K, N, C) one forward per step, the context encoded on its own."""
    context_grad = settings.get("flow_context_grad") == "full"

    def after(ids):
        with torch.set_grad_enabled(context_grad and torch.is_grad_enabled()):
            context = model.encode_context([ContextRow(ids)])
        return torch.cat(
            [
                model.predict_velocity(context, x[None], t[None], (IMAGE_SIZE, IMAGE_SIZE))
                for x, t in zip(image.steps.x, image.steps.t, strict=True)
            ]
        ).double()

    velocity = after(image.context.ids)
    scale = settings.get("guidance_scale", 1.0)
    if scale > 1:
        without = after(image.context.ids[:SYSTEM_TOKENS])
        guided = without + scale * (velocity - without)
        length, new = (x.flatten(1).norm(dim=1)[:, None, None] for x in (velocity, guided))
        covered = (image.steps.t > 0.4)[:, None, None]
        velocity = torch.where(covered, guided * torch.clamp(length / (new + 1e-8), max=1), velocity)
    return velocity


def line_terms(image, v, v_old, v_ref, advantage, settings):
    """As `flow_terms`, of the objectives on lines; the lines' noise is the recorded, all else is computed anew."""
    kind, count = settings["image_objective"], len(v)
    points, clean = image.steps, image.latents.double()
    noise = points.target.double() + clean
    epsilon = {"fpo": 3e-5, "awm": 1e-4, "nft": 0.0}[kind] * math.sqrt(262144 / NUMBERS)
    losses, old_losses, nft = [], [], 0.0
    for k in range(count):
        t = points.t[k].double()
        torch.testing.assert_close(points.x[k].double(), (1 - t) * clean + t * noise[k], atol=1e-6, rtol=1e-6)
        losses.append(((v[k] - (noise[k] - clean)) ** 2).mean())
        old_losses.append(((v_old[k] - (noise[k] - clean)) ** 2).mean())
        share = 0.5 + advantage / 10
        x = points.x[k].double()
        for weight, towards in ((share, v[k]), (1 - share, 2 * v_old[k] - v[k])):  # beta = 1
            estimate = x - t * towards
            width = (estimate - clean).abs().mean().detach()
            nft = nft + 5 * weight * ((estimate - clean) ** 2).mean() / width
    regularizer = sum(((v[k] - v_ref[k]) ** 2).mean() for k in range(count))
    if kind == "nft":
        return -nft, regularizer

    def clipped(log_ratio):
        ratio = log_ratio.exp()
        return torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)

    gains = [old - new for old, new in zip(old_losses, losses, strict=True)]
    if settings.get("ratio_norm", True):  # which takes the left shift away
        gains = [gain + ((v[k] - v_old[k]) ** 2).mean() for k, gain in enumerate(gains)]
    if kind == "fpo":  # the mean over the lines is inside
        return count * clipped(sum(gains) / count), regularizer
    return sum(map(clipped, gains)), regularizer


def flow_terms(image, v, v_old, v_ref, advantage, settings):
    """Sums over the K steps of the surrogate and of the regulariser."""
    if "image_objective" in settings:
        return line_terms(image, v, v_old, v_ref, advantage, settings)
    first = SHIFT * (1 - 1 / STEPS) / (1 + (SHIFT - 1) * (1 - 1 / STEPS))
    surrogate, regularizer = 0.0, 0.0
    epsilon = 1e-6 * math.sqrt(262144 / NUMBERS) * step_scale(settings)
    for k in range(len(v)):
        x, x_next = image.steps.x[k].double(), image.steps.x_next[k].double()
        t, t_next = image.steps.t[k].double(), image.steps.t_next[k].double()
        dt = t_next - t

        def mean(velocity, x=x, t=t, t_next=t_next, dt=dt):
            if settings.get("sde_type") == "cps":
                kept = t_next * math.cos(NOISE * math.pi / 2)
                return (1 - t_next) * (x - t * velocity) + kept * (x + (1 - t) * velocity)
            sigma2 = NOISE**2 * t / (1 - (first if t == 1 else t))
            return x + (velocity + sigma2 / (2 * t) * (x + (1 - t) * velocity)) * dt

        sigma2 = NOISE**2 * t / (1 - (first if t == 1 else t))
        std = t_next * math.sin(NOISE * math.pi / 2) if settings.get("sde_type") == "cps" else (-sigma2 * dt).sqrt()

        def log_prob(mu, x_next=x_next, std=std):
            return -((x_next - mu) ** 2).mean() / (2 * std**2)

        mu, mu_old = mean(v[k]), mean(v_old[k])
        log_ratio = log_prob(mu) - log_prob(mu_old)
        if settings.get("ratio_norm", True):
            log_ratio = std * (log_ratio + ((mu - mu_old) ** 2).mean() / (2 * std**2))
        ratio = log_ratio.exp()
        surrogate = surrogate + torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
        kind = settings.get("flow_regularizer", "velocity_mse")
        if kind == "velocity_mse":
            regularizer = regularizer + ((v[k] - v_ref[k]) ** 2).mean()
        else:
            kl = ((mu - mean(v_ref[k])) ** 2).mean() / (2 * std**2)
            regularizer = regularizer + (kl if kind == "latent_kl" else kl * dt.abs())
    return surrogate, regularizer


def oracle(batches, now, old, settings, fixed=None):
    """
    Gradients by parameter name of the objective over one generation batch, and its value.

    `fixed` keeps the velocities of the old policy and the reference from one pass over a generation for the next.
    """
    fixed = {} if fixed is None else fixed
    models = {}
    for name, state in (("now", now), ("old", old), ("reference", None)):
        models[name] = tiny_bagel()
        if state is not None:
            models[name].load_state_dict(state, strict=False)
    text, surrogate, regularizer, samples = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for name in ("old", "reference"):
            for image in images_of(batches):
                if (name, id(image)) not in fixed:
                    fixed[name, id(image)] = velocities(models[name], image, settings)
    for batch in batches:
        for row, image in enumerate(images_of([batch])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            advantage = batch["advantages"][row].double()
            lp = text_log_probs(models["now"], prompt, completion)
            with torch.no_grad():
                lp_old = text_log_probs(models["old"], prompt, completion)
            ratio = (lp - lp_old).exp()
            text = text + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            v = velocities(models["now"], image, settings)
            s, r = flow_terms(image, v, fixed["old", id(image)], fixed["reference", id(image)], advantage, settings)
            surrogate, regularizer = surrogate + s / len(v), regularizer + r / len(v)
            samples += 1
    weight = 1.5e-5 * math.sqrt(262144 / NUMBERS)
    weight *= step_scale(settings) if "image_objective" not in settings else 1
    text_weight, flow_weight = settings.get("text_weight", 1.0), settings.get("flow_weight", 1.0)
    loss = (-text_weight * text - flow_weight * surrogate + weight * regularizer) / samples
    loss.backward()
    return {name: p.grad for name, p in models["now"].named_parameters()}, loss.item()
