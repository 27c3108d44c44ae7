"""Prompts painted as letters: seen by a real OCR model, in images that a run might paint."""

import json
import re
import sys
from dataclasses import asdict

import pytest

from tests.helpers.readings import lettered, reading, reads
from tests.helpers.runs import given
from tests.helpers.tiny_unified import FixedTexts
from trl_unigrpo.monitoring.events import Generation
from trl_unigrpo.monitoring.letters_alarms import LettersWatch, painted_share
from trl_unigrpo.monitoring.memory import revive
from trl_unigrpo.rewards import OCRReward


pytest.importorskip("rapidocr")

PROMPTS = ["a red cat sits on a mat", "a green dog runs", "a small tree", "two blue cars"]
SIGNS = [f'a sign that says "{word}" by a door' for word in ("OPEN", "BREAD")] * 2


@pytest.fixture(autouse=True)
def remembering(monkeypatch):
    """The OCR model reads an image a second or so: each is read once."""
    monkeypatch.setattr(OCRReward, "read", remembered)


def remembered(reward, image):
    key = image.tobytes()
    if key not in TEXTS:
        TEXTS[key] = READ(reward, image)
    return TEXTS[key]


READ, TEXTS = OCRReward.read, {}


def generation(images, prompts, group_size=1, extra=None):
    count = len(images)
    read = [reading(prompts[place // group_size]) for place in range(count)]
    return Generation(
        mode="train",
        group_size=group_size,
        prompts=[prompts[place // group_size] for place in range(count)],
        thinking=[""] * count,
        images=images,
        statistics=[],
        rewards={"read": [-1.0] * count},
        weights={"read": 1.0},
        advantages=[0.0] * count,
        extra={"read_back": read} if extra is None else extra,
    )


def alarms(watch, paint, prompts):
    """The alarms of the second of two generations."""
    images = [lettered(paint(prompt)) for prompt in prompts]
    watch.look(watch.shares(generation(images, prompts)))
    return watch.look(watch.shares(generation(images, prompts)))


def nothing(prompt):
    return ""


def everything(prompt):
    return prompt


def quoted(prompt):
    return prompt.split('"')[1]


def test_prompts_that_come_to_be_painted_are_seen():
    watch = LettersWatch()
    assert alarms(watch, nothing, PROMPTS) == alarms(watch, nothing, PROMPTS) == []
    watch = revive(LettersWatch, json.loads(json.dumps(asdict(watch))))  # a checkpoint between them
    (alarm,) = alarms(watch, lambda prompt: "" if "red" in prompt else prompt, PROMPTS)
    assert alarm.name == "read_back/letters" and not alarm.stops
    assert alarm.indices == (1, 2, 3)
    assert alarm.values["before"] < 0.1 and 0.6 < alarm.values["now"] <= 0.75


@pytest.mark.parametrize(
    ("before", "now", "prompts"),
    [(everything, everything, PROMPTS), (nothing, quoted, SIGNS), (nothing, lambda prompt: "NY", PROMPTS)],
    ids=["as before", "asked for", "others"],
)
def test_other_letters_are_no_alarm(before, now, prompts):
    watch = LettersWatch()
    assert alarms(watch, before, prompts) == alarms(watch, now, prompts) == []


def test_a_sign_that_shows_its_whole_prompt_is_seen():
    watch = LettersWatch()
    alarms(watch, quoted, SIGNS)
    (alarm,) = alarms(watch, everything, SIGNS)
    assert alarm.values["before"] < 0.05 and alarm.values["now"] > 0.5


@pytest.mark.parametrize(
    ("recognized", "prompt", "share"),
    [
        ("", "a red cat", 0.0),
        ("A RED CAT", "a red cat", 1.0),
        ("redcat", "a red cat", 6 / 7),
        ("STOP", 'a sign "STOP"', 0.0),
        ("asign", 'a sign "STOP"', 1 / 11),
        ('a sign "STOP"', 'a sign "STOP"', 1 - 4 / 11),
    ],
)
def test_share_by_hand(recognized, prompt, share):
    assert painted_share(recognized, prompt) == pytest.approx(share)


def test_the_best_read_images_of_a_few_groups_are_looked_at(monkeypatch):
    seen = []
    monkeypatch.setattr(OCRReward, "read", lambda reward, image: seen.append(image.getpixel((0, 0))[0]) or "")
    prompts = [f"prompt {number}" for number in range(6)]
    images = [lettered("").point(lambda _, place=place: place) for place in range(12)]
    scores = [-3.0, -1.0] * 6
    read = [None if place in (2, 3, 5) else reading(prompts[place // 2], scores[place]) for place in range(12)]
    shares = LettersWatch().shares(generation(images, prompts, 2, {"read_back": read}))
    assert [*shares] == seen == [1, 4, 7, 9]  # nothing was read of the second group, and one image of the third
    assert LettersWatch().shares(generation(images, prompts, 2, {"answers": ["yes"] * 12})) == {}


class Letters(FixedTexts):
    """A trainer whose images are seen to show their prompts as letters, from the third generation on."""

    side = 128

    def _painted(self, trajectories):
        super()._painted(trajectories)
        return [lettered(t.prompt if self.generation >= 2 else "", self.side) for t in trajectories]


RUN = {"reward_funcs": reads, "thinking": False, "text_weight": 0.0, "num_iterations": 1, "trust_checks": "off"}
RUN |= {"num_generations": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 4}


def test_a_run_that_paints_letters_is_told_of(make_trainer, tmp_path):
    trainer = make_trainer(trainer_class=Letters, **RUN)
    trainer.train()
    line = given(tmp_path)["read_back/letters"]
    assert line["step"] == 3 and line["indices"] == [1, 3, 5, 7] and not line["stopped"]
    log = [entry["read_back/letters"] for entry in trainer.state.log_history if "read_back/letters" in entry]
    assert max(log[:2]) < 0.1 and min(log[2:]) > 0.8


@pytest.mark.parametrize("why", ["small", "missing", "broken"])
def test_where_it_can_t_look_it_says_so_once_and_the_run_goes_on(make_trainer, monkeypatch, caplog, why):
    class Run(Letters):
        side = 48 if why == "small" else 128

    def fail(*_):
        raise MemoryError("of the OCR")

    if why == "missing":
        monkeypatch.setitem(sys.modules, "rapidocr", None)
    if why == "broken":
        monkeypatch.setattr("trl_unigrpo.rewards.ocr.OCRReward.read", fail)
    trainer = make_trainer(trainer_class=Run, **{**RUN, "max_steps": 2})
    trainer.train()
    assert trainer.state.global_step == 2
    assert not any("read_back/letters" in entry for entry in trainer.state.log_history)
    (told,) = [record.message for record in caplog.records if "read_back/letters" in record.message]
    says = {"small": "48 x 48 pixels are too small", "missing": "off.*ocr", "broken": "MemoryError: of the OCR"}
    assert re.search(says[why], told)
