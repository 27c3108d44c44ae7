"""The reward behind a server: by another model, and not by one that paints, which no server has."""

import asyncio

import pytest

from tests.helpers.served_readers import reward
from tests.helpers.serving import serving_process, some_images
from trl_unigrpo.rewards import RemoteReward
from trl_unigrpo.rewards.remote.server import load_rewards


def test_served_scores_are_those_of_the_reader_here():
    """In a process of its own, several requests at once: each image with its prompt, in their order."""
    prompts = ["a red cat", "the blue dog is there", "", "dog", "a picture", "the cat", "a dog"]
    images = some_images(7, 32)
    with serving_process("tests.helpers.served_readers:reward") as (_, address):
        remote = RemoteReward(address, batch_size=2, concurrency=4)
        assert remote.__name__ == "reading"
        scores = asyncio.run(remote(prompts=prompts, images=images))
    expected = reward(prompts, images=images)
    assert scores == [None if score is None else pytest.approx(score, abs=1e-9) for score in expected]
    assert len(set(expected)) == 7 and expected[2] is None


def test_a_server_has_no_model_that_paints():
    with pytest.raises(ValueError, match=r"which only a trainer and `trl-unigrpo eval` know\. Elsewhere name"):
        load_rewards(["trl_unigrpo.rewards:ReadBackReward"])
