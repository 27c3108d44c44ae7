"""Trajectories of several rounds over the tiny BAGEL, with texts that are known beforehand."""

import numpy as np
import torch
from transformers import SiglipVisionConfig

from tests.helpers.tiny_unified import SPECIAL, WORDS, FixedTexts, build_trainer, tiny_bagel
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration


PLACEHOLDER = len(SPECIAL) + len(WORDS)  # a row of the vocabulary without a word
WORD = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
STOP = [WORD[word] for word in ("<think>", "cat", "</think>", "tree", "<|im_end|>")]  # of stop_text="tree"


def rounds_bagel(eyes: bool = True) -> BagelForUnifiedGeneration:
    """The tiny BAGEL, which is shown its own images: as latents, and through a tower if it has eyes."""
    blind = tiny_bagel()
    blind.config.image_token_id = PLACEHOLDER
    if not eyes:
        return blind
    blind.config.vit_config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    blind.config.vit_max_num_patch_per_side = 4
    model = BagelForUnifiedGeneration(blind.config, blind.codec)
    model.load_state_dict(blind.state_dict(), strict=False)
    return model


class FixedRounds(FixedTexts):
    """Texts that depend on place and round alone; of each four trajectories the last keeps its image in round 2."""

    def _sampled_texts(self, trajectories):
        texts = []
        for t in trajectories:
            number = len(t.rounds) - 1
            random = np.random.default_rng((self.generation, t.row, number))
            words = random.integers(len(SPECIAL), len(SPECIAL) + len(WORDS), random.integers(1, 5)).tolist()
            words = [WORD["cat"]] if words == [WORD["tree"]] else words  # the word alone would keep the image
            texts.append(STOP if number == 1 and t.row % 4 == 3 else [*words, 2] if len(words) < 4 else words)
        return texts


def rounds_trainer(output_dir, trainer_class=FixedRounds, model=None, **settings):
    """Two rounds of a trainer, of which the answer `tree` keeps the image."""
    plain = {"num_rounds": 2, "stop_text": "tree", "max_reflection_length": 4, "reflection_template": "the {prompt}"}
    model = rounds_bagel() if model is None else model
    return build_trainer(output_dir, model=model, trainer_class=trainer_class, **{**plain, **settings})


def in_order_of_rows(batches):
    """The trajectories of some micro-batches, by their places, with what belongs to each."""
    rows = {}
    for batch in batches:
        for i, t in enumerate(batch["rounds"]):
            columns = {
                name: x[i] for name, x in batch.items() if isinstance(x, torch.Tensor) and x.ndim and len(x) > i
            }
            rows[t.row] = (t, columns)
    return [rows[row] for row in sorted(rows)]
