"""Folders of runs with made-up numbers, written as a training writes them; they stay in tests' temporary folders."""

import numpy as np
from PIL import Image

from trl_unigrpo.monitoring.events import Generation
from trl_unigrpo.reporting.gallery import choose
from trl_unigrpo.reporting.run_files import Records


HOSTILE = [
    "<script>document.title = 'stolen'</script><img src=x onerror=\"document.title='stolen'\">",
    "null \x00, escape \x1b[31m, half \ud83d, turned \u202e gnp.exe",
    "long: " + "wordswithoutanyspace" * 500,
    "قطة حمراء على سجادة 红猫 🐈‍⬛ लाल बिल्ली",
    "</style></td></table><h1>outside</h1> {{ 7 * 7 }} {% raw %}",
    "a" * 10_000,
]


def some_image(side=64, seed=0):
    """Smooth random colours: what JPEG makes of it is about as large as a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (side // 4 or 1, side // 4 or 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def generation(prompts, group_size=4, mode="train", seed=0, side=64, rewards=None, extra=None):
    """A generation batch in which sample i of a group has the reward `rewards[i]`."""
    number = len(prompts) * group_size
    values = list(np.random.default_rng(seed).random(number)) if rewards is None else list(rewards)
    return Generation(
        mode=mode,
        group_size=group_size,
        prompts=[prompt for prompt in prompts for _ in range(group_size)],
        thinking=[f"<think>{prompts[i // group_size]} {i}</think>" for i in range(number)],
        images=[some_image(side, seed * 1000 + i) for i in range(number)],
        statistics=[],
        rewards={"judge": values, "words": [value * 0 + 1 for value in values]},
        advantages=[value - 0.5 for value in values],
        extra=extra or {},
        weights={"judge": 1.0, "words": 0.0},
    )


def write_run(folder, steps=(0, 50, 100), prompts=HOSTILE, side=64, group_size=4, gain=0.1, evaluated=True, **names):
    """A finished run: logs, a generation at each of `steps`, and evaluations whose reward grows by `gain` each."""
    records = Records(folder, "first")
    info = {"method": "UniGRPO", "model": "org/<b>model</b>", "max_steps": steps[-1], "alarms": "stop"}
    records.info({**info, "settings": {"a": 1}, **names})
    records.add("start", 0)
    for number, step in enumerate(steps):
        answers = {"judge answers": [f"yes 0.93 {prompts[0]}"] * (2 * group_size)}
        records.show(*choose(generation(prompts[:2], group_size, seed=number, side=side, extra=answers), step))
        if evaluated:
            scores = [0.2 + gain * number + 0.01 * i for i in range(len(prompts))]
            records.show(*choose(generation(prompts, 1, "eval", number, side, scores), step))
    for step in range(1, steps[-1] + 1):
        values = {
            "reward": 0.3 + 0.004 * step,
            "flow/velocity_mse": 1e-4 * step,
            "flow/clip_frac": 0.1,
            "entropy": 1.0,
        }
        records.add("metrics", step, values=values)
    records.add("end", steps[-1])
    records.close()
    return folder
