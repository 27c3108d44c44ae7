"""Several rounds at inference: the images of the trainer's evaluation, and who picks the best of them."""

from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image as PILImage

from tests.helpers.examples import run_example
from tests.helpers.judge_server import ChatServer, images_of, yes
from tests.helpers.rounds import rounds_bagel
from tests.helpers.tiny_unified import tiny_bagel, tiny_config, tiny_tokenizer
from trl_unigrpo.evaluation import Look, generate, refine
from trl_unigrpo.sampling import Thinking
from trl_unigrpo.shapeworld import REFLECTION_TEMPLATE, load_base, shapeworld_dataset, shapeworld_reward
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


PROMPTS = list(shapeworld_dataset("test", 8, seed=8)["prompt"])  # some of these images are kept at the second look
PAINTING = {"num_inference_steps": 10, "image_size": 48, "system_prompt": ""}
GREEDY = Thinking(do_sample=False, max_completion_length=30)
STOP = "keep"  # what the model says about some of its images
LOOK = Look(REFLECTION_TEMPLATE, STOP, max_reflection_length=30)


@pytest.fixture(scope="module")
def base():
    return load_base(seeing=True)


@pytest.fixture(scope="module")
def found(base):
    """Three rounds, judged by the world's rule."""
    settings = {"look": LOOK, "thinking": GREEDY, **PAINTING}
    return refine(base[0], PROMPTS, base[1], rounds=3, judge=shapeworld_reward, seed=3, **settings)


def same(one, other):
    return np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("context", ["markov", "full"])
def test_rounds_are_those_of_the_trainer_s_evaluation(base, tmp_path, context):
    seen = []

    def reward(prompts, completions, images, **columns):
        seen.append((prompts, completions, images))
        return [0.0] * len(images)

    rounds = {"num_rounds": 2, "eval_num_rounds": 3, "round_context": context, "max_reflection_length": 30}
    rounds |= {"reflection_template": REFLECTION_TEMPLATE, "stop_text": STOP}
    sampled = {"temperature": 1e-4, "max_completion_length": 30, "eval_num_inference_steps": 10, "image_size": 48}
    evaluated = {"num_generations_eval": 1, "per_device_eval_batch_size": 8, "system_prompt": "", "seed": 3}
    trainer = UniGRPOTrainer(
        model=base[0],
        reward_funcs=reward,
        args=tiny_config(tmp_path, **rounds, **sampled, **evaluated),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=base[1],
    )
    trainer.evaluate()
    look = replace(LOOK, round_context=context)
    prompts = seen[0][0]  # in TRL's order
    found = refine(base[0], prompts, base[1], rounds=3, look=look, thinking=GREEDY, seed=3, **PAINTING)
    assert any(one.stopped for one in found)
    assert len(seen) == max(len(one.texts) - one.stopped for one in found) > 1
    for number, (_, texts, images) in enumerate(seen):
        painted = [one for one in found if len(one.texts) - one.stopped > number]
        assert texts == [one.texts[number] for one in painted]
        for image, one in zip(images, painted, strict=True):
            assert same(image, one.images[number])


def test_first_images_are_those_of_generate_and_later_texts_those_about_them(base, found):
    first = generate(base[0], PROMPTS, base[1], do_sample=False, max_completion_length=30, seed=3, **PAINTING)
    assert all(same(sample.image, one.images[0]) for sample, one in zip(first, found, strict=True))
    assert [sample.thinking for sample in first] == [one.texts[0] for one in found]
    asked = [REFLECTION_TEMPLATE.format(prompt=prompt) for prompt in PROMPTS]
    settings = {"do_sample": False, "max_completion_length": 30, "source_images": [one.images[0] for one in found]}
    second = generate(base[0], asked, base[1], **settings, **PAINTING)
    assert [sample.thinking for sample in second] == [one.texts[1] for one in found]


def test_kept_images_stay_and_end_it(found):
    stopped = [one for one in found if one.stopped]
    assert stopped and len(stopped) < len(found)
    for one in stopped:
        assert one.texts[-1].endswith(STOP)
        assert one.images[-1] is one.images[-2]
        assert one.scores[-1] == one.scores[-2]
    for one in found:
        assert len(one.texts) == len(one.images) == len(one.scores)
        assert len(one.images) == 3 or one.stopped
        assert all(
            not same(a, b) for a, b in zip(one.images, one.images[1 : -1 if one.stopped else None], strict=False)
        )


def test_it_ends_where_all_images_are_kept(base):
    prompts = list(shapeworld_dataset("test", 8)["prompt"])
    found = refine(base[0], prompts, base[1], rounds=3, seed=3, look=LOOK, thinking=GREEDY, **PAINTING)
    assert [(one.stopped, len(one.images), len(one.texts)) for one in found] == [(True, 2, 2)] * 8


def test_the_judge_picks_the_first_of_the_best_and_without_one_it_is_the_last(base, found):
    for one, prompt in zip(found, PROMPTS, strict=True):
        assert one.scores == shapeworld_reward([prompt] * len(one.images), one.texts, one.images)
        assert one.best == one.scores.index(max(one.scores))
        assert one.image is one.images[one.best]
    assert any(one.best < len(one.images) - 1 - one.stopped for one in found)
    settings = {"look": LOOK, "thinking": GREEDY, **PAINTING}
    for one, judged in zip(refine(base[0], PROMPTS, base[1], rounds=3, seed=3, **settings), found, strict=True):
        assert one.scores == [None] * len(one.images)
        assert one.image is one.images[-1]
        assert same(one.images[-1], judged.images[-1])


def test_a_judge_sees_what_a_reward_function_of_rounds_sees_and_may_have_no_score(base):
    calls = []

    async def judge(prompts, completions, images, previous_images, round_index, weight):
        calls.append((prompts, completions, round_index, [len(before) for before in previous_images], weight))
        return [None if index else 0.5 for index in round_index]

    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    settings = {"look": replace(LOOK, stop_text=None), "thinking": GREEDY, "batch_size": 5, **PAINTING}
    found = refine(base[0], prompts, base[1], judge=judge, columns={"weight": range(8)}, **settings)
    assert [one.best for one in found] == [0] * 8
    assert not any(one.stopped for one in found)  # no word does
    assert [call[2] for call in calls] == [[0] * 5, [1] * 5, [0] * 3, [1] * 3]
    assert [call[3] for call in calls] == [[0] * 5, [1] * 5, [0] * 3, [1] * 3]
    assert [call[4] for call in calls] == [[*range(5)]] * 2 + [[5, 6, 7]] * 2
    assert calls[3][0] == prompts[5:]
    assert calls[3][1] == [[{"role": "assistant", "content": one.texts[1]}] for one in found[5:]]


def test_sampled_texts_depend_on_the_seed_alone(base):
    settings = {"look": LOOK, "thinking": Thinking(max_completion_length=30), **PAINTING}
    one, again, other = (refine(base[0], PROMPTS, base[1], seed=seed, **settings) for seed in (0, 0, 1))
    assert [a.texts for a in one] == [a.texts for a in again] != [a.texts for a in other]
    assert all(same(a.images[-1], b.images[-1]) for a, b in zip(one, again, strict=True))


def test_the_example_saves_what_the_judge_likes_best(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    rounds_bagel().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    look = "look=Look(stop_text=None, max_reflection_length=4), thinking=Thinking(max_completion_length=4)"
    names = {
        '"ByteDance-Seed/BAGEL-7B-MoT"': repr(str(tmp_path / "model")),
        "image_size=512": f"image_size=8, num_inference_steps=2, {look}",
        "import load_model, refine": "import Look, load_model, refine\nfrom trl_unigrpo.sampling import Thinking",
    }
    with ChatServer(lambda body, attempt: yes(np.asarray(images_of(body)[0]).mean() / 255)) as server:
        names['"http://localhost:8000/v1"'] = repr(server.url)
        refined = run_example("refine_at_inference.py", **names)["refined"]
    assert len({score for one in refined for score in one.scores}) == 6
    for number, one in enumerate(refined):
        assert one.best == one.scores.index(max(one.scores))
        with PILImage.open(tmp_path / f"refined_{number}.png") as saved:
            assert same(saved, one.images[one.best])


def test_what_can_not_be_refined_is_refused(base):
    for arguments, message in (
        ({"rounds": 0}, "rounds=0"),
        ({"thinking": Thinking(thinking=False)}, "thinking=False"),
        ({"look": Look("{image}")}, "reflection_template"),
        ({"source_images": ["none.png"]}, "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            refine(base[0], PROMPTS[:1], base[1], **{**PAINTING, **arguments})
    with pytest.raises(ValueError, match="image_token_id"):
        refine(tiny_bagel(), PROMPTS[:1], tiny_tokenizer(), **PAINTING)
