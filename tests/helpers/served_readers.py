"""A reward that reads, for a server of its own."""

from tests.helpers.tiny_llava import tiny_llava
from trl_unigrpo.rewards import LocalReader, ReadBackReward


reward = ReadBackReward(LocalReader(*tiny_llava(), device="cpu"), name="reading")
