"""Training of ShapeWorld's autoencoder from nothing.

python -m trl_unigrpo.experiments.base.train_autoencoder OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ...models.patch_autoencoder import PatchAutoencoderKL
from ...shapeworld.render import render_tensor
from ...shapeworld.verifier import read_cells
from ...shapeworld.world import (
    EMPTY,
    NUM_CELLS,
    NUM_CODES,
    IntArray,
)


LATENT_CHANNELS = 8


def random_cells(rng: np.random.Generator, batch_size: int) -> IntArray:
    """Draw cells (B, 9) with 0 to 9 random objects in random places."""
    number = rng.integers(0, NUM_CELLS + 1, (batch_size, 1))
    filled = rng.random((batch_size, NUM_CELLS)).argsort(1) < number
    return np.where(filled, rng.integers(1, NUM_CODES, (batch_size, NUM_CELLS)), EMPTY)


def train_autoencoder(
    steps: int = 2400,
    batch_size: int = 48,
    learning_rate: float = 3e-3,
    kl_weight: float = 1e-3,
    latent_channels: int = LATENT_CHANNELS,
    seed: int = 0,
) -> PatchAutoencoderKL:
    """
    Train on random scenes: mean squared error of the pixels plus `kl_weight` times the mean KL divergence from the
    unit Gaussian per latent number. Then set `scaling_factor` and `shift_factor` so that the latents of random scenes
    have mean 0 and standard deviation 1. The same seed gives the same weights on the same machine; the global random
    state of torch is left as it was.

    Args:
        steps: optimizer steps; the learning rate rises over 50 and then falls linearly to a twentieth.
        batch_size: images per step.
        learning_rate: of AdamW.
        kl_weight: 1e-3 keeps eight numbers per cell smooth enough for a small flow model to learn.
        latent_channels: numbers per cell.
        seed: of weights, scenes and posterior noise.

    Returns:
        The trained autoencoder in evaluation mode.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = PatchAutoencoderKL(latent_channels=latent_channels)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, weight_decay=0.0)
    vae.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * (1 - 0.95 * step / steps)
        images = render_tensor(random_cells(rng, batch_size))
        posterior = vae.encode(images, return_dict=False)[0]
        decoded = vae.decode(posterior.sample(generator), return_dict=False)[0]
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = (decoded - images).square().mean() + kl_weight * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(render_tensor(random_cells(rng, 512)), return_dict=False)[0].sample(generator)
    vae.register_to_config(scaling_factor=1.0 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


@dataclass(frozen=True)
class AutoencoderReport:
    """The errors of a trained autoencoder on random scenes, and on its own scaled latents with noise added.

    Args:
        pixel_error: mean squared error of decoded images, pixels in [-1, 1].
        image_error: mean squared distance of decoded cells to the nearest clean cell.
        cell_accuracy: share of cells read back as drawn.
        noisy_cell_accuracy: standard deviation of the noise -> that share.
        channel_std: smallest and largest standard deviation of one channel of the scaled latents.
    """

    pixel_error: float
    image_error: float
    cell_accuracy: float
    noisy_cell_accuracy: dict[float, float]
    channel_std: tuple[float, float]


@torch.no_grad()
def evaluate_autoencoder(
    vae: PatchAutoencoderKL, num_images: int = 512, noise: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5), seed: int = 1
) -> AutoencoderReport:
    """Encode (posterior mean) and decode random scenes that training has not seen."""
    generator = torch.Generator().manual_seed(seed)
    cells = random_cells(np.random.default_rng(seed), num_images)
    images = render_tensor(cells)
    scale, shift = vae.config["scaling_factor"], vae.config["shift_factor"]
    scaled = scale * (vae.encode(images, return_dict=False)[0].mode() - shift)

    def accuracy(std: float) -> float:
        noisy = scaled + std * torch.randn(scaled.shape, generator=generator)
        decoded = vae.decode(noisy / scale + shift, return_dict=False)[0]
        return float((read_cells(decoded.numpy())[0] == cells).mean())

    decoded = vae.decode(scaled / scale + shift, return_dict=False)[0]
    read, error = read_cells(decoded.numpy())
    channel_std = scaled.transpose(0, 1).flatten(1).std(1)
    return AutoencoderReport(
        pixel_error=(decoded - images).square().mean().item(),
        image_error=float(error.mean()),
        cell_accuracy=float((read == cells).mean()),
        noisy_cell_accuracy={std: accuracy(std) for std in noise},
        channel_std=(channel_std.min().item(), channel_std.max().item()),
    )


def train_from_arguments() -> None:
    """Train, print the report, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir")
    parser.add_argument("--max-steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.process_time()
    vae = train_autoencoder(steps=args.max_steps, seed=args.seed)
    seconds = time.process_time() - start
    print(f"trained {vae.num_parameters():,} parameters in {seconds:.0f} CPU seconds")
    for name, value in asdict(evaluate_autoencoder(vae)).items():
        print(f"{name}: {value}")
    vae.save_pretrained(args.output_dir)


if __name__ == "__main__":
    train_from_arguments()
