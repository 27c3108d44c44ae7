"""The cost of seeing an image: of encoding it, and of the tower that reads it."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..image_sizes import Size
from ..models.bagel.autoencoder import build_vae
from ..models.bagel.configuration import BagelConfig
from ..models.bagel.processing import vit_rule
from ..models.bagel.vision import BagelPerceptron, BagelVisionTower


def look_flops(config: BagelConfig, image_size: Size, with_tower: bool) -> int:
    """Count the FLOPs of encoding one image, and of the tower that reads it, on tensors without data."""
    rule, vit, width = vit_rule(config), config.vit_config, config.llm_config.hidden_size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        build_vae(config.vae_config).encode(torch.empty(1, 3, *image_size))
        if with_tower and rule is not None:
            tower = BagelVisionTower(vit, config.vit_max_num_patch_per_side)
            connector = BagelPerceptron(vit.hidden_size, width, width, config.connector_act)
            connector(tower(torch.empty(3, *rule.size(*image_size))))
    return counter.get_total_flops()
