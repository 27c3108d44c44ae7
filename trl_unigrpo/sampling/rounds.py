"""A later round of a trajectory: it shows the model an image, asks about it, and has a text that may keep the image.

What training and inference have in common.
"""

from collections.abc import Collection, Sequence
from typing import Any

from PIL import Image as PILImage
from transformers import PreTrainedTokenizerBase

from ..images import has_failed
from ..models.contract import UnifiedModelMixin
from ..trajectory import Image, Round, Trajectory
from .reflection import stops


def check_sight(model: UnifiedModelMixin, num_rounds: int) -> None:
    """Raise ValueError for several rounds of a model that can't be shown an image."""
    if num_rounds == 1:
        return
    name, token, words = type(model).__name__, model.image_placeholder, model.get_input_embeddings()
    if token is None:
        raise ValueError(
            f"num_rounds={num_rounds}, but {name} paints from text only: it can't see the image that a later round is "
            "about. Set num_rounds=1, or take a model that reads images, such as BAGEL."
        )
    if token >= words.weight.shape[0]:
        raise ValueError(
            f"num_rounds={num_rounds}: the token that stands for an image, {token}, is beyond the vocabulary of "
            f"{name}, which has {words.weight.shape[0]}. Set `model.config.image_token_id` to one that no text has."
        )


def image_stream(trajectory: Trajectory, *key: int) -> tuple[int, ...]:
    """Give the key of the random stream that the next image is painted with: each has one of its own."""
    return (*key, trajectory.row, *range(1, 1 + len(list(trajectory.painted()))))


def show_images(
    model: UnifiedModelMixin, images: Sequence[Image], seen: Sequence[PILImage.Image], reencode: bool
) -> list[Any]:
    """
    Bring finished images into the form in which the model is shown them; failed ones are None.

    Args:
        images: as they were painted.
        seen: the same, decoded.
        reencode: see [`~trl_unigrpo.models.seeing.SeesImages.observe`].
    """
    shown: list[Any] = [None] * len(images)
    sound = [i for i, image in enumerate(seen) if not has_failed(image)]
    if sound:
        found = model.observe([images[i] for i in sound], [seen[i] for i in sound], reencode)
        for i, image in zip(sound, found, strict=True):
            shown[i] = image
    return shown


def begin_round(
    trajectory: Trajectory, placeholder: int, shown: Any, said: Sequence[int], ends: Sequence[int] = ()
) -> None:
    """
    Begin a round: the image, and what the user says to it.

    Args:
        placeholder: the token that stands for the image.
        shown: the image, in the model's own form.
        said: tokens of what the user says, and of what opens the answer.
        ends: tokens that end a text, where the round sees all that came before it: the first of them closes one that
            ran out of length. Empty where it stands behind the system message alone.
    """
    observation = [placeholder, *said]
    if ends and trajectory.rounds[-1].text_ids[-1] not in ends:
        observation.insert(0, ends[0])
    trajectory.rounds.append(Round(observation_ids=observation, shown=[shown], fresh=not ends))


def user_turn(tokenizer: PreTrainedTokenizerBase, text: str, **template: Any) -> list[int]:
    """Tokenize what the user says, and what opens the answer; `template` are arguments of `apply_chat_template`."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False, **template
    )


def take_texts(
    trajectories: Sequence[Trajectory],
    ids: Sequence[list[int]],
    texts: Sequence[str],
    stop_text: str | None,
    ends: Collection[int],
) -> None:
    """
    Put the texts of the rounds begun into them, and see which of them keep the image.

    Args:
        ids: their tokens.
        texts: the same, decoded.
        stop_text: the answer that keeps the image; None where none does.
        ends: tokens that end a text. One that ran out of length keeps nothing.
    """
    for trajectory, own, text in zip(trajectories, ids, texts, strict=True):
        part = trajectory.rounds[-1]
        part.text_ids = own
        part.stopped = stop_text is not None and own[-1] in ends and stops(text, stop_text)
