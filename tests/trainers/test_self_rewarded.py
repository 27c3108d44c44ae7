"""A run whose reward is the model's own reading: by the weights that it started from, and never by the rule."""

import pytest
import torch
from peft import LoraConfig

from tests.helpers.examples import run_example
from tests.helpers.rounds import rounds_bagel
from tests.helpers.tiny_unified import moved, prompts_dataset, tiny_bagel, tiny_tokenizer
from trl_unigrpo.rewards import ReadBackReward
from trl_unigrpo.sampling.self_reader import SelfReader


class Kept(ReadBackReward):
    """Keeps what it scored."""

    def score(self, images, prompts, columns):
        scores = super().score(images, prompts, columns)
        self.seen = list(images), list(prompts), scores
        return scores


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2), LoraConfig(r=2, init_lora_weights=False)])
def test_scores_are_readings_of_the_weights_that_training_started_from(make_trainer, peft_config):
    reward, model = Kept(), rounds_bagel()
    # Without a regulariser nothing else asks for the start.
    settings = {"flow_regularizer": "none", "max_steps": 3}
    trainer = make_trainer(model=model, reward_funcs=reward, peft_config=peft_config, **settings)
    start = {name: weight.clone() for name, weight in trainer.unified.state_dict().items()}
    trainer.train()
    assert moved(start, trainer.unified.state_dict())
    images, prompts, scores = reward.seen
    trainer.unified.load_state_dict(start)
    with trainer.unified.reference() if peft_config == LoraConfig(r=2) else torch.no_grad():
        found = SelfReader(trainer.unified, tiny_tokenizer(), "policy").read(images, prompts)
    assert scores == pytest.approx([reading.score for reading in found], abs=1e-5)
    logged = [row for row in trainer.state.log_history if "rewards/Kept/mean" in row]
    assert all(row["rewards/Kept/mean"] < 0 and row["rewards/Kept/std"] > 0 for row in logged)


def test_policy_as_its_own_judge(make_trainer):
    reward = Kept(judge="policy")
    trainer = make_trainer(model=rounds_bagel(), reward_funcs=reward, num_iterations=1, max_steps=2)
    trainer.train()
    images, prompts, scores = reward.seen
    now = ReadBackReward(SelfReader(trainer.unified, tiny_tokenizer(), "policy"))(prompts, images=images)
    assert max(abs(a - b) for a, b in zip(scores, now, strict=True)) > 1e-6  # it has made a step since


def test_model_that_can_not_read_is_refused_when_the_trainer_is_made(make_trainer):
    with pytest.raises(ValueError, match="can't read images: it has no understanding tower"):
        make_trainer(model=tiny_bagel(), reward_funcs=ReadBackReward())


def test_the_example_needs_no_other_reward(tmp_path):
    rounds_bagel().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prompts_dataset().to_csv(tmp_path / "prompts.csv")
    small = {"image_size": 8, "num_inference_steps": 4, "num_generations": 4, "max_completion_length": 4}
    small |= {"max_steps": 1, "gallery_steps": 0, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    names = {
        '"ByteDance-Seed/BAGEL-7B-MoT"': repr(str(tmp_path / "model")),
        '"prompts.csv"': repr(str(tmp_path / "prompts.csv")),
        '"bagel-self-rewarded"': f"{str(tmp_path / 'out')!r}, **{small!r}",
    }
    log = run_example("self_rewarded_bagel.py", **names)["trainer"].state.log_history[0]
    assert log["rewards/ReadBackReward/mean"] == log["reward"] < 0
