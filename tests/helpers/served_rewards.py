"""Rewards that the tests serve, also from another process."""

import asyncio
import time

import numpy as np


def redness(prompts, completions, images, **columns):
    return [float(np.asarray(image.convert("RGB"), dtype=np.float64)[..., 0].mean() / 255) for image in images]


async def calm(prompts, images, **columns):
    await asyncio.sleep(0.01)
    return redness(prompts, None, images)


def patchy(prompts, images, **columns):
    return [None, float("nan"), float("inf"), 0.5, np.float32(0.1)][: len(images)]


def slow(prompts, images, **columns):
    print("scoring", flush=True)
    time.sleep(1.0)
    return [1.0] * len(images)


def short(images, **columns):
    return [1.0] * (len(images) - 1)


def alone(images, **columns):
    return 0.5


class ByClass:
    def __call__(self, images, **columns):
        return [2.0] * len(images)


class NeedsArguments:
    def __init__(self, size):
        self.size = size

    def __call__(self, images, **columns):
        return [self.size] * len(images)


class AsyncObject:
    __name__ = "named"

    async def __call__(self, images, **columns):
        return [3.0] * len(images)


by_instance, awaited = NeedsArguments(4.0), AsyncObject()
number = 7


def text_only(completions):
    return [0.0] * len(completions)
