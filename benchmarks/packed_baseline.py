"""The loops of a trainer that packs: all tokens in one sequence, experts chosen by index, copies under one dense mask.

This is the structure of R3 (sen-ye/R3, arXiv 2602.15772), said again on our own layers: thinkings are decoded together
and leave when they end, images are denoised together, and a trajectory's text and noisy copies are one sequence, once
for the reference and once for the policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from phases import Phases
from plain_baseline import PlainRow, flow_loss, text_loss
from torch import Tensor

from trl_unigrpo import UniGRPOTrainer
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.sampler import RolloutPlan, draw_noise, sample_latents
from trl_unigrpo.flow.states import on_device
from trl_unigrpo.models.bagel.attention import Context, attend
from trl_unigrpo.models.bagel.decoding import Room
from trl_unigrpo.models.bagel.layers import rotary_tables
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.sampling import decode
from trl_unigrpo.seeding import TRAIN, row_generator
from trl_unigrpo.trainers.windows import draw_windows
from trl_unigrpo.trajectory import Image, Round, Trajectory


EXPERTS = ("", "_moe_gen")


class LeavingRoom(Room):
    """A room whose tokens look at what is written, and whose rows leave when they have ended."""

    def __init__(self, states: Sequence[tuple[Tensor, Tensor]], length: int):
        super().__init__(states, length)
        self.seen = length

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        all_keys, all_values = super().update(keys, values, layer)
        return all_keys[:, :, : self.seen], all_values[:, :, : self.seen]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.seen

    def keep(self, rows: Tensor) -> None:
        """Keep some of the rows, (B,) True."""
        self.keys, self.values = ([x[rows] for x in kind] for kind in (self.keys, self.values))


@dataclass
class Sequences:
    """
    Tokens (S, H) of any number of rows, one after the other.

    Attributes:
        hidden: (S, H) embedded tokens.
        positions: (S,) rotary positions.
        of_expert: for the text and the image expert the places of their tokens.
    """

    hidden: Tensor
    positions: Tensor
    of_expert: tuple[Tensor, Tensor]


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer's queries (A, S, D), keys and values (V, S, D): outputs (A, S, D)."""


def run_layers(model: Any, tokens: Sequences, attention: Attend) -> Tensor:
    """Run the decoder, each token through its own expert: final hidden states (S, H)."""
    decoder, hidden = model.language_model.model, tokens.hidden
    tables = rotary_tables(tokens.positions[None], decoder.head_dim, decoder.theta, hidden.dtype)
    rotary = [tuple(table[:, :, places] for table in tables) for places in tokens.of_expert]
    experts = list(zip(EXPERTS, tokens.of_expert, rotary, strict=True))
    for number, layer in enumerate(decoder.layers):
        parts = [layer.before(hidden[places][None], own, suffix) for suffix, places, own in experts]
        q, k, v = (
            together([x[0].transpose(0, 1) for x in kind], tokens).transpose(0, 1) for kind in zip(*parts, strict=True)
        )
        heads = attention(number, q, k, v)
        after = [layer.after(hidden[places][None], heads[None, :, places], suffix)[0] for suffix, places, _ in experts]
        hidden = together(after, tokens)
    norms = (decoder.norm, decoder.norm_moe_gen)
    return together([norm(hidden[places]) for norm, places in zip(norms, tokens.of_expert, strict=True)], tokens)


def together(parts: Sequence[Tensor], tokens: Sequences) -> Tensor:
    """Put what the experts computed of their tokens back in the tokens' order."""
    whole = parts[0].new_zeros(len(tokens.hidden), *parts[0].shape[1:])
    for places, part in zip(tokens.of_expert, parts, strict=True):
        whole[places] = part
    return whole


def lay_out(model: Any, text: Tensor, states: Tensor, times: Tensor, positions: Tensor, size: Any) -> Sequences:
    """
    Put a text and then noisy images in one sequence, each between its markers.

    Args:
        text: (T,) ids.
        states: (K, N, C) latents.
        times, positions: (K,) of the images.
    """
    config, (images, tokens) = model.config, states.shape[:2]
    embed = model.get_input_embeddings()
    ends = embed(torch.tensor([config.vision_start_token_id, config.vision_end_token_id]))
    latents = model.vae2llm(states) + model.time_embedder(times)[:, None]
    latents = latents + model.latent_pos_embed(model.grid(size))
    copies = torch.cat([ends[0].expand(images, 1, -1), latents, ends[1].expand(images, 1, -1)], 1)
    places = torch.arange(len(text), len(text) + images * (tokens + 2)).view(images, -1)
    return Sequences(
        torch.cat([embed(text), copies.flatten(0, 1)]),
        torch.cat([torch.arange(len(text)), positions.repeat_interleave(tokens + 2)]),
        (torch.cat([torch.arange(len(text)), places[:, [0, -1]].flatten()]), places[:, 1:-1].flatten()),
    )


def velocities_of(model: Any, hidden: Tensor, tokens: Sequences, shape: torch.Size) -> Tensor:
    return model.llm2vae(hidden[tokens.of_expert[1]]).float().view(shape)


def packed_trajectory(model: Any, text: Tensor, states: Tensor, times: Tensor, size: Any) -> tuple[Tensor, Tensor]:
    """
    Run a text and its image's noisy copies, which see the text and themselves, under one dense mask.

    Returns:
        hidden states (T, H) of the text, and velocities (K, N, C).
    """
    tokens = lay_out(model, text, states, times, torch.full((len(states),), len(text)), size)
    copy = torch.cat([torch.full((len(text),), -1), torch.arange(len(states)).repeat_interleave(states.shape[1] + 2)])
    place = torch.arange(len(copy))
    mask = (copy == -1) & ((place <= place[:, None]) | (copy[:, None] >= 0)) | (copy == copy[:, None]) & (copy >= 0)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q[None], k[None], v[None], mask[None, None])[0]

    hidden = run_layers(model, tokens, attention)
    return hidden[: len(text)], velocities_of(model, hidden, tokens, states.shape)


def denoise_together(model: Any, context: Context, size: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Give the velocity of images behind kept contexts: one sequence of all images, each with attention of its own."""
    nothing, positions = torch.empty(0, dtype=torch.long), torch.tensor(context.positions)

    def velocity(latents: Tensor, times: Tensor) -> Tensor:
        tokens, each = lay_out(model, nothing, latents, times, positions, size), latents.shape[1] + 2

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = []
            for row, own in enumerate(zip(*(x.split(each, 1) for x in (q, k, v)), strict=True)):
                before = (kind[layer][row, :, : context.lengths[row]] for kind in (context.keys, context.values))
                keys, values = (torch.cat(pair, 1) for pair in zip(before, own[1:], strict=True))
                heads.append(attend(own[0][None], keys[None], values[None])[0])
            return torch.cat(heads, 1)

        return velocities_of(model, run_layers(model, tokens, attention), tokens, latents.shape)

    return velocity


def think_together(model: Any, prompt: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Sample a thinking of each of the lengths behind one prompt; those that have ended leave the batch."""
    known = model.encode_context([ContextRow(torch.tensor(prompt[:-1]))])
    states = [
        tuple(x.expand(len(lengths), -1, -1, -1) for x in pair) for pair in zip(known.keys, known.values, strict=True)
    ]
    room, wanted = LeavingRoom(states, len(prompt) - 1), torch.tensor(lengths)
    rows, tokens = torch.arange(len(lengths)), torch.full((len(lengths),), prompt[-1])
    texts: list[list[int]] = [[] for _ in lengths]
    for step in range(max(lengths)):
        room.seen = len(prompt) + step
        positions = torch.full((len(rows), 1), room.seen - 1)
        logits = model.next_logits(tokens[:, None], positions, None, room)
        room.at += 1
        tokens = torch.multinomial(logits[:, -1].float().softmax(-1), 1)[:, 0]
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            texts[row].append(token)
        going = wanted[rows] > step + 1
        if not going.all():
            room.keep(going)
            rows, tokens = rows[going], tokens[going]
    end = model.config.im_end_token_id
    return [[*text[:-1], end] for text in texts]


def packed_rollout(trainer: UniGRPOTrainer, lengths: Sequence[int], phases: Phases) -> list[PlainRow]:
    """Think, denoise and decode all trajectories together."""
    args, model = trainer.args, trainer.unified
    prompt = trainer.train_dataset[0]["prompt"]
    prompt_ids = trainer._tokenize_prompts([prompt])[0][0]
    model.train()
    size = (args.image_size, args.image_size)
    nodes = flow_timesteps(args.num_inference_steps, args.timestep_shift)
    with torch.no_grad():
        with phases("thinking"):
            texts = think_together(model, prompt_ids, lengths)
        with phases("denoising"):
            contexts = model.contexts([Trajectory(prompt, prompt_ids, i, [Round(t)]) for i, t in enumerate(texts)])
            velocity = denoise_together(model, model.encode_context(contexts), size)
            generators = [row_generator(args.seed, TRAIN, 0, i) for i in range(len(texts))]
            start = draw_noise(model.latent_shape(size), generators, range(len(texts)), "cpu")
            plan = RolloutPlan(nodes, size, draw_windows(args, trainer.generation, 0, range(len(texts))))
            latents, steps = sample_latents(velocity, start, plan, generators)
        images = [Image(x, size, *row) for x, *row in zip(latents, contexts, steps, strict=True)]
        with phases("VAE decode"):
            decode(model, images)
    return [PlainRow(prompt_ids, text, image) for text, image in zip(texts, images, strict=True)]


def packed_passes(trainer: UniGRPOTrainer, rows: Sequence[PlainRow], phases: Phases) -> list[Tensor]:
    """Make one pass over a rollout and its optimizer step; returns the policy's velocities (K, N, C) of each row."""
    args, model = trainer.args, trainer.unified
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, eps=args.adam_epsilon)
    optimizer.zero_grad()
    found = []
    for i, row in enumerate(rows):
        advantage = torch.tensor(1.0 if i % 2 else -1.0)
        states = on_device(row.image.steps, advantage.device)
        inputs = row.image.context.ids, states.x, states.t, row.image.size
        with phases("reference pass"), model.reference() as reference, torch.no_grad():
            _, anchor = packed_trajectory(reference, *inputs)
        with phases("update"):
            hidden, velocity = packed_trajectory(model, *inputs)
            first = len(row.prompt) - 1
            logits = model.get_output_embeddings()(hidden[first : first + len(row.thinking)])
            loss = text_loss(logits, torch.tensor(row.thinking), advantage)
            (loss + flow_loss(trainer, states, velocity, velocity.detach(), anchor, advantage)).backward()
        found.append(velocity.detach())
    with phases("optimizer"):
        torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return found
