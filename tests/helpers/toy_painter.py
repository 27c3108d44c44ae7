"""A third party's unified model, as small as one can be: it computes its velocities one by one, and its contexts are
its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trl_unigrpo.models.contract import UnifiedModelMixin, UnifiedOutput
from trl_unigrpo.trajectory import Trajectory


HIDDEN, TOKENS, NUMBERS = 16, 4, 4


@dataclass
class Shown:
    """A finished image, and the round that it was painted in."""

    latents: Tensor
    round: int


@dataclass
class ToyContext:
    """The text before an image, and the images of earlier rounds."""

    ids: Tensor
    shown: list[Shown]
    lengths: dict[str, int]


class ToyPainter(UnifiedModelMixin, LlamaForCausalLM):
    """A language model whose image expert paints from the mean of what it has read and of the images that it sees."""

    base_model_prefix = ""
    context_types = (ToyContext, Shown)

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.paint_in = nn.Linear(NUMBERS, HIDDEN)
        self.paint_seen = nn.Linear(NUMBERS, HIDDEN)
        self.paint_out = nn.Linear(HIDDEN, NUMBERS)

    def backbone(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return UnifiedOutput(hidden.last_hidden_state)

    def contexts(self, trajectories: Sequence[Trajectory]) -> list[ToyContext]:
        def context(t: Trajectory) -> ToyContext:
            seen = [Shown(image.latents, number) for number, image in t.painted() if number < len(t.rounds) - 1]
            lengths = {"prompt": len(t.prompt_ids), "text": len(t.text_ids)}
            return ToyContext(torch.tensor([*t.prompt_ids, *t.text_ids]), seen, lengths)

        return [context(trajectory) for trajectory in trajectories]

    def encode_context(self, contexts: Sequence[ToyContext]) -> Tensor:
        rows = []
        for context in contexts:
            hidden = self.model(input_ids=context.ids[None].to(self.device), use_cache=False).last_hidden_state
            row = hidden[0].mean(0)
            for shown in context.shown:
                row = row + self.paint_seen(shown.latents.to(row.dtype)).mean(0) / (1 + shown.round)
            rows.append(row)
        return torch.stack(rows)

    def predict_velocity(self, context, latents, timesteps, image_size):
        hidden = self.paint_in(latents) + context[:, None] + timesteps[:, None, None]
        return self.paint_out(torch.tanh(hidden)).float()

    def latent_shape(self, image_size):
        return TOKENS, NUMBERS

    def encode_images(self, pixels):
        return pixels.flatten(1)[:, : TOKENS * NUMBERS].unflatten(1, (TOKENS, NUMBERS))

    def decode_latents(self, latents, image_size, output_type="pil"):
        shades = (127 + 60 * latents[:, :, :3].mean(1)).clamp(0, 255).long().tolist()
        return [PILImage.new("RGB", image_size, tuple(shade)) for shade in shades]

    def is_image_parameter(self, name):
        return "paint_" in name

    def default_lora_targets(self, experts="both"):
        return r".*(q_proj|v_proj|paint_in|paint_out)"


def toy_painter(vocabulary: int, seed: int = 0) -> ToyPainter:
    """One with random weights, large enough for every output to depend on every input."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return ToyPainter(config)
