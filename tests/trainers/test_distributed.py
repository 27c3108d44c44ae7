"""Two processes make the update that one makes, by rewards or by examples."""

import faulthandler
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from PIL import Image

from tests.helpers.editing import edits, tiny_editor
from tests.helpers.resuming import distance, go_on, go_on_in_all_ways
from tests.helpers.rounds import STOP, FixedRounds, rounds_bagel, rounds_trainer
from tests.helpers.runs import DIVERGING, alarms_of, assert_same_update
from tests.helpers.sft import make_sft, many_rows
from tests.helpers.stories import TURNS, stories, story_trainer
from tests.helpers.tiny_unified import FixedTexts, build_trainer, moved, redness, tiny_bagel, weights
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.monitoring.alarm import read_alarms
from trl_unigrpo.reporting.run_files import read_run
from trl_unigrpo.rewards import thinking_reward
from trl_unigrpo.trainers.checkpoint import load_rollouts


@thinking_reward
def words(completions, **_):
    return [None if "tree" in completion else float(len(completion.split())) for completion in completions]


def equal_for_some(prompts, completions, images, **_):
    """One reward for all of a group, for two of the four prompts: in a generation one process may have these alone."""
    found = redness(prompts, completions, images)
    return [0.7 if "cat" in prompt else red for prompt, red in zip(prompts, found, strict=True)]


# The update is the gradient itself: Adam would blow the last digits of a tiny one up.
SETTINGS = {
    "trainer_class": FixedTexts,
    "optim": "sgd",
    "learning_rate": 0.5,
    "image_learning_rate": 0.5,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
}
CASES = {
    "full": {"gallery_steps": 50},
    "lora, checkpointing": {"lora": True, "gradient_checkpointing": True},
    "dead images": {"reward_funcs": equal_for_some, "train_dead_images": False},
}
MORE_CASES = {
    "full, checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "image": {"lora": True, "text_weight": 0.0},
    "text": {"flow_weight": 0.0},
    "process reward": {"reward_funcs": [redness, words], "process_reward_weight": 0.5},
    "windows per group": {"sde_window_scope": "group"},
    "images of thinkings": {"images_per_thinking": 2},
    "edits": {"edits": True, "beta": 0.1},
    "guidance, checkpointing": {"guidance_scale": 3.0, "gradient_checkpointing": True},
    # The second process keeps its images in the second round, all but one of the first's go on to the third.
    "rounds": {"rounds": True, "num_rounds": 3},
    "tree": {"rounds": True, "round_group": "tree", "round_context": "markov"},
    # The stories of the second process end with their first turn.
    "stories": {"stories": True, "round_group": "tree", "round_reward": "own", "gradient_accumulation_steps": 2},
    "averages": {"image_objective": "nft", "image_old_policy_decay": 0.5, "ema_decay": 0.5, "max_steps": 4},
    # Each process has half of the group.
    "diversity": {"diversity_weight": 1.0, "diversity_experts": "both", "num_generations": 8},
    "lines, no thinking": {"image_objective": "fpo", "thinking": False, "text_weight": 0.0},
}


class UnequalRounds(FixedRounds):
    """All of the second process keep their image in round 2, however the batch is spread: its half of the rows."""

    def _sampled_texts(self, trajectories):
        texts = super()._sampled_texts(trajectories)
        ends = [len(t.rounds) == 2 and t.row >= 4 for t in trajectories]
        return [STOP if end else text for end, text in zip(ends, texts, strict=True)]


def run(folder, case, per_device_train_batch_size):
    arguments = {**SETTINGS, **(CASES | MORE_CASES)[case]}
    lora, build, own = arguments.pop("lora", False), build_trainer, {"model": tiny_bagel()}
    if arguments.pop("rounds", False):
        build, own = rounds_trainer, {"model": rounds_bagel(), "trainer_class": UnequalRounds, "temperature": 1.0}
    if arguments.pop("edits", False):
        own = {"model": tiny_editor(), "train_dataset": edits()}
    if arguments.pop("stories", False):
        long, short = list(TURNS)[:2]
        build, own = story_trainer, {"train_dataset": stories({long: TURNS[long], short: TURNS[short]})}
        own |= {"trainer_class": FixedRounds, "temperature": 1.0}
    trainer = build(
        folder,
        per_device_train_batch_size=per_device_train_batch_size,
        peft_config=LoraConfig(r=2, init_lora_weights=False) if lora else None,
        **{**arguments, **own},
    )
    before = weights(trainer.model)
    trainer.train()
    return trainer, before, weights(trainer.model)


def diverge(folder, per_device_train_batch_size):
    """A run that the tripwire stops."""
    trainer = build_trainer(folder, per_device_train_batch_size=per_device_train_batch_size, **DIVERGING)
    trainer.train()
    memory = alarms_of(trainer).state()["attributes"]["memory"]
    return {"step": trainer.state.global_step, "memory": memory, "log": trainer.state.log_history[0]}


SFT_CASES = {"full": {}, "lora, checkpointing": {"lora": True, "gradient_checkpointing": True}}


def fine_tune(folder, case, per_device_train_batch_size):
    """A supervised run over thinkings of all lengths, whose last step accumulates less than the others."""
    arguments = dict(SFT_CASES[case])
    model = tiny_bagel()
    if arguments.pop("lora", False):
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=model.default_lora_targets())
        model = get_peft_model(model, config)
    before = weights(model)
    trainer = make_sft(
        folder,
        model,
        rows=many_rows(12),
        per_device_train_batch_size=per_device_train_batch_size,
        gradient_accumulation_steps=2,
        max_steps=2,
        optim="sgd",
        learning_rate=0.5,
        context_dropout=0.3,
        **arguments,
    )
    trainer.train()
    return before, weights(trainer.model), trainer.state.log_history[0]


def worker(rank, port, folder, cases):
    import os

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(900, exit=True)  # processes that wait for each other would for ever
    results = {}
    for case in cases:
        trainer, _, after = run(f"{folder}/{case}", case, 2)
        windows = [
            image.steps.t
            for batch in trainer._buffered_inputs
            for trajectory in batch.get("trajectories", [])
            for _, image in trajectory.painted()
        ]
        prompts = [batch["prompt_ids"] for batch in trainer._buffered_inputs]
        results[case] = {"weights": after, "windows": windows, "prompts": prompts, "log": trainer.state.log_history}
    results["diverging"] = diverge(f"{folder}/diverging", 2)
    results["sft"] = {case: fine_tune(f"{folder}/sft", case, 2) for case in SFT_CASES}
    results["resumed"] = go_on_in_all_ways(Path(folder) / "resumed", Path(folder) / "alone")
    torch.save(results, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def in_two_processes(folder, cases):
    """Run cases in two processes: the folder that they wrote to, and what each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    go_on(folder / "alone", per_device_train_batch_size=4)
    mp.spawn(worker, args=(port, str(folder), list(cases)), nprocs=2)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    return folder, ranks


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("two"), CASES)


@pytest.fixture(scope="module")
def two_more_processes(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("more"), MORE_CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_same_update_as_one(two_processes, tmp_path, case):
    check_update(two_processes[1], tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES)
def test_two_processes_make_the_same_update_as_one_in_all_settings(two_more_processes, tmp_path, case):
    check_update(two_more_processes[1], tmp_path, case)


def check_update(ranks, tmp_path, case):
    trainer, before, after = run(tmp_path, case, 4)
    for rank in ranks:
        assert_same_update(before, after, rank[case]["weights"])
    one, two = trainer.state.log_history[1], ranks[0][case]["log"][1]
    names = ("reward", "flow/velocity_mse", "flow/ratio_mean", "images/pixel_std", "reward/frac_none", "loss")
    for name in (*names, "process/reward", "process/frac_none"):
        if name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_process_whose_images_are_all_dead_waits_for_none(two_processes):
    """It has one in each of its tables, which weighs nothing, and so calls what the others call."""
    folder, ranks = two_processes
    logs = ranks[0]["dead images"]["log"]
    assert [log["flow/frac_dead"] for log in logs if "flow/frac_dead" in log] == [0.5, 0.5]
    for rank in (0, 1):
        state = load_rollouts(folder / "dead images" / "checkpoint-3", rank, [ContextRow])
        images = [image for batch in state["buffer"] for t in batch["trajectories"] for _, image in t.painted()]
        assert len({image.dead for image in images}) == 1 and all(len(image.steps) for image in images)


@pytest.mark.parametrize("case", SFT_CASES)
def test_two_processes_fine_tune_as_one_does(two_processes, tmp_path, case):
    _, ranks = two_processes
    before, after, log = fine_tune(tmp_path, case, 4)
    for rank in ranks:
        _, found, its_log = rank["sft"][case]
        assert_same_update(before, after, found)
        for name in ("loss", "loss/text", "loss/flow"):
            assert its_log[name] == pytest.approx(log[name], rel=1e-3), name


def test_processes_share_the_window_but_not_the_work(two_processes):
    _, ranks = two_processes
    windows = [rank["full"]["windows"] for rank in ranks]
    assert all(torch.equal(window, windows[0][0]) for rank in windows for window in rank)
    assert len(windows[0]) == len(windows[1]) == 4


@pytest.mark.parametrize("way", ["inside a generation", "rollouts of one are lost"])
def test_processes_go_on_together(two_processes, way):
    """Where the rollouts of one are lost, all sample anew: one that went on would wait for the other for ever."""
    _, ranks = two_processes
    whole, resumed = ([rank["resumed"][name] for rank in ranks] for name in ("whole", way))
    lost = way != "inside a generation"
    assert [found["warned"] for found in resumed] == [int(lost)] * 2
    assert [found["step"] for found in resumed] == [4, 4]
    assert not moved(resumed[0]["weights"], resumed[1]["weights"])
    assert bool(moved(whole[0]["weights"], resumed[0]["weights"])) is lost


def test_run_of_two_processes_goes_on_in_one_and_back(two_processes, tmp_path):
    """Between two generations it is as if nothing had changed; inside of one, that is sampled anew."""
    folder, ranks = two_processes
    whole = folder / "resumed" / "whole"
    start, end = weights(tiny_bagel()), ranks[0]["resumed"]["whole"]["weights"]
    between, inside = (go_on(tmp_path / str(step), whole / f"checkpoint-{step}", 4) for step in (2, 3))
    for found in (between, *(rank["resumed"]["from one, between"] for rank in ranks)):
        assert found["warned"] == 0 and found["step"] == 4
        assert distance(start, end, found["weights"]) < 1e-5
    for found in (inside, *(rank["resumed"]["from one, inside"] for rank in ranks)):
        assert found["warned"] == 1 and found["step"] == 4
        assert distance(start, end, found["weights"]) > 1e-3


def test_the_gallery_shows_the_images_of_all_processes(two_processes, tmp_path):
    folder, _ = two_processes
    run(tmp_path, "full", 4)
    one, two = (read_run(place).shown[0].samples for place in (tmp_path, folder / "full"))
    assert len(one) == len(two) == 8
    for alone, together in zip(one, two, strict=True):
        assert (alone.prompt, alone.thinking) == (together.prompt, together.thinking)
        images = [
            np.asarray(Image.open(place / "gallery" / sample.image), dtype=float)
            for place, sample in ((tmp_path, alone), (folder / "full", together))
        ]
        assert np.abs(images[0] - images[1]).max() <= 2


def test_each_process_saves_its_own_rollouts(two_processes):
    folder, _ = two_processes
    for case in CASES:
        names = {file.name for file in (folder / case / "checkpoint-3").glob("rollouts_*")}
        assert names == {"rollouts_0.pt", "rollouts_1.pt"}


def test_processes_stop_together_and_know_the_same(two_processes, tmp_path):
    folder, (first, second) = two_processes
    one, two = diverge(tmp_path, 4), first["diverging"]
    assert two["step"] == second["diverging"]["step"] == one["step"] < 25
    assert two["memory"] == second["diverging"]["memory"]
    for name, shift in one["memory"]["images"]["shifts"].items():
        assert two["memory"]["images"]["shifts"][name]["first"] == pytest.approx(shift["first"], abs=1e-3), name
    assert second["diverging"]["log"]["images/noise"] == pytest.approx(one["log"]["images/noise"], rel=1e-3)
    assert (folder / "diverging" / f"checkpoint-{one['step']}" / "model.safetensors").is_file()
    assert len(read_alarms(folder / "diverging")) == len(read_alarms(tmp_path)) == 1  # not one of each process
