"""Defaults, presets, round trips, and every option that is refused."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from transformers import TrainingArguments
from trl import GRPOConfig, TrlParser

from tests.helpers.paths import ROOT
from tests.helpers.tiny_unified import tiny_config
from trl_unigrpo.cli.train import TrainParser
from trl_unigrpo.sampling.reflection import TEMPLATE
from trl_unigrpo.trainers import config_checks, unigrpo_config
from trl_unigrpo.trainers.averages_config import AveragesConfig
from trl_unigrpo.trainers.evaluation_checks import whole_groups
from trl_unigrpo.trainers.refl_trainer import ReFLConfig
from trl_unigrpo.trainers.rounds_config import RoundsConfig
from trl_unigrpo.trainers.scouts_config import ScoutsConfig
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig
from trl_unigrpo.trainers.sharding_config import ShardingConfig
from trl_unigrpo.trainers.sizes_config import SizesConfig
from trl_unigrpo.trainers.thinkings_config import ThinkingsConfig
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig


# The paper's Table 3, and the project's own.
DEFAULTS = {
    "num_inference_steps": 25,
    "eval_num_inference_steps": 50,
    "eval_guidance_scale": 1.0,
    "compile_layers": False,
    "timestep_shift": 3.0,
    "image_size": 1024,
    "eval_image_size": None,
    "sde_type": "sde",
    "noise_level": 0.8,
    "sde_window_range": [0, 5],
    "sde_window_size": 3,
    "sde_window_mode": "contiguous",
    "sde_window_scope": "generation",
    "text_weight": 1.0,
    "flow_weight": 1.0,
    "flow_epsilon": 1e-6,
    "ratio_norm": True,
    "scale_with_latents": True,
    "flow_regularizer": "velocity_mse",
    "flow_regularizer_weight": 1.5e-5,
    "flow_old_source": "recompute",
    "flow_context_grad": "detach",
    "learning_rate": 1e-6,
    "image_learning_rate": 3e-5,
    "num_generations": 24,
    "num_iterations": 2,
    "loss_type": "grpo",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "epsilon": 0.2,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "disable_dropout": True,
    "max_grad_norm": 1.0,
    "adam_epsilon": 1e-15,
    "trust_checks": "raise",
    "ddp_find_unused_parameters": False,
    # Of this project: the paper says nothing of them, or has another setting only.
    "max_completion_length": 512,
    "per_device_train_batch_size": 4,
    "log_multimodal": True,
    "log_completions_images": True,
    "gallery_steps": 50,
    "alarms": "stop",
    "guidance_scale": 1.0,
    "image_batch_size": None,
    "thinking": True,
    "system_prompt": "auto",
    "process_reward_weight": 0.0,
    "image_objective": "flow_grpo",
    "matching_samples": 8,
    "nft_beta": 1.0,
    "num_rounds": 1,
    "eval_num_rounds": None,
    "round_context": "markov",
    "context_latents": "reencode",
    "reflection_template": TEMPLATE,
    "max_reflection_length": 256,
    "allow_stop": True,
    "stop_text": "keep",
    "stop_warmup_steps": 0,
    "stop_bonus": 0.0,
    "train_rounds": None,
    "round_group": "independent",
    "round_select": "worst",
    "keep_perfect": 0.15,
    "round_reward": "final",
    "round_baseline": None,
    "round_cost": 0.0,
    "no_improve": "none",
    "image_old_policy_decay": None,
    "image_old_policy_warmup_steps": 0,
    "ema_decay": None,
    "scout_generations": None,
    "scout_num_inference_steps": 4,
    "scout_reward": "repainted",
    "images_per_thinking": 1,
    "train_dead_images": True,
    "diversity_weight": 0.0,
    "diversity_experts": "text",
    "gather_for_rollout": True,
    "reference_on_cpu": False,
}


def test_every_field_of_this_project_has_its_default_here():
    of_the_machine, below = (
        {"bf16", "dataloader_pin_memory"},
        {"gradient_accumulation_steps", "per_device_eval_batch_size"},
    )
    configs = UniGRPOConfig, RoundsConfig, AveragesConfig, SizesConfig, ScoutsConfig, ThinkingsConfig
    configs += (ShardingConfig,)
    own = {name for config in configs for name in config.__annotations__}
    assert own - of_the_machine - below <= set(DEFAULTS)


def test_defaults(tmp_path):
    config = UniGRPOConfig(str(tmp_path), use_cpu=True)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.generation_batch_size == 24  # one prompt
    assert config.steps_per_generation == config.gradient_accumulation_steps == 6
    assert config.bf16 is (torch.cuda.is_available() and torch.cuda.is_bf16_supported())


def test_paper(tmp_path):
    config = UniGRPOConfig.paper(str(tmp_path), use_cpu=True)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.generation_batch_size == 32 * 24
    assert config.steps_per_generation == config.gradient_accumulation_steps  # two updates per generation
    assert (
        UniGRPOConfig.paper(str(tmp_path), use_cpu=True, per_device_train_batch_size=32).generation_batch_size == 768
    )


def test_paper_on_many_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(unigrpo_config, "_world_size", lambda: 32)
    config = UniGRPOConfig.paper(str(tmp_path), use_cpu=True)
    assert config.gradient_accumulation_steps == 6


def test_single_gpu(tmp_path):
    config = UniGRPOConfig.single_gpu(str(tmp_path), use_cpu=True, num_generations=8)
    assert config.image_size == 512
    assert config.generation_batch_size == 8
    assert config.image_learning_rate > config.learning_rate > DEFAULTS["learning_rate"]


def test_editing(tmp_path):
    config = UniGRPOConfig.editing(str(tmp_path), use_cpu=True)
    assert config.image_size == 512
    assert config.num_generations % config.per_device_train_batch_size == 0
    assert UniGRPOConfig.editing(str(tmp_path), use_cpu=True, num_generations=8).num_generations == 8


def test_self_rewarded(tmp_path):
    config = UniGRPOConfig.self_rewarded(str(tmp_path), use_cpu=True)
    assert (config.image_size, config.image_objective, config.matching_samples) == (512, "nft", 3)
    assert UniGRPOConfig.self_rewarded(str(tmp_path), use_cpu=True, image_objective="awm").image_objective == "awm"


def test_fast(tmp_path):
    config = UniGRPOConfig.fast(str(tmp_path), use_cpu=True)
    chosen = {"image_size": 512, "image_objective": "nft", "matching_samples": 3, "flow_regularizer": "none"}
    chosen |= {"num_generations": 8, "scout_generations": 16}
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert config.scout_num_inference_steps == config.num_inference_steps == 10  # nothing is painted twice
    assert UniGRPOConfig.fast(str(tmp_path), use_cpu=True, scout_generations=None).pool_size == 8


@pytest.mark.parametrize("recipe", ["self_refinement", "reflect_until_good"])
def test_recipes_of_two_rounds(tmp_path, recipe):
    make = getattr(UniGRPOConfig, recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # clamp with stop would warn
        config = make(str(tmp_path), use_cpu=True)
    assert (config.num_rounds, config.round_group, config.round_select) == (2, "tree", "worst")
    assert config.image_size == 512
    assert config.generation_batch_size == config.num_generations
    told = (config.no_improve, config.allow_stop, config.round_cost, config.keep_perfect, config.eval_num_rounds)
    refines = recipe == "self_refinement"
    assert told == (("clamp", False, 0.0, 0.0, None) if refines else ("none", True, 0.01, 0.15, 4))
    assert make(str(tmp_path), use_cpu=True, num_rounds=3, round_cost=0.5).num_rounds == 3
    assert make(str(tmp_path), use_cpu=True, round_cost=0.5).round_cost == 0.5


@pytest.mark.parametrize(
    ("group", "batch", "accumulation"), [(24, 4, 6), (24, 24, 1), (6, 4, 3), (4, 8, 1), (5, 2, 5)]
)
def test_accumulation_is_chosen_for_whole_groups(tmp_path, group, batch, accumulation):
    config = UniGRPOConfig(str(tmp_path), use_cpu=True, num_generations=group, per_device_train_batch_size=batch)
    assert config.gradient_accumulation_steps == accumulation
    assert config.generation_batch_size % group == 0


@pytest.mark.parametrize(
    ("group", "processes", "chosen"), [(24, 1, 24), (1, 1, 8), (4, 1, 8), (6, 1, 6), (24, 8, 6), (3, 2, 6), (5, 2, 5)]
)
def test_evaluation_batches_are_chosen_for_whole_groups(tmp_path, group, processes, chosen):
    assert whole_groups(None, group, processes) == chosen
    assert chosen * processes % group == 0
    if processes == 1:
        config = UniGRPOConfig(str(tmp_path), use_cpu=True, num_generations_eval=group)
        assert config.per_device_eval_batch_size == chosen


def test_evaluation_batch_without_whole_groups(tmp_path):
    message = r"per_device_eval_batch_size=8 on 1 process holds no whole groups of 24.*Leave it unset, or set num_gen"
    with pytest.raises(ValueError, match=message):
        UniGRPOConfig(str(tmp_path), use_cpu=True, per_device_eval_batch_size=8)
    UniGRPOConfig(str(tmp_path), use_cpu=True, per_device_eval_batch_size=8, num_generations_eval=4)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (UniGRPOConfig, "{image_learning_rate: 1e-4, learning_rate: 1e-7, image_size: '512', reward_weights: [1e-1]}"),
        (UniGRPOConfig, "{reward_weights: 1e-1}"),
        (UniGRPOConfig, "{sde_window_range: ['1', 4.0], num_generations: 8.0, max_steps: 1e2}"),
        (ReFLConfig, "{learning_rate: 1e-4, refl_scale: 1e-2, image_size: 256.0}"),
        (UnifiedSFTConfig, "{learning_rate: 1e-4, flow_weight: 1e-1, noise_draws: '2'}"),
    ],
)
def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path, cls, options):
    read = yaml.safe_load(options)
    config = cls(str(tmp_path), use_cpu=True, **read)
    for name, value in read.items():
        values = value if isinstance(value, list) else [value]
        found = getattr(config, name)
        assert (found if isinstance(found, list) else [found]) == [float(item) for item in values]


@pytest.mark.parametrize(
    ("cls", "option", "message"),
    [
        (UniGRPOConfig, {"image_learning_rate": "fast"}, "image_learning_rate='fast': expected a number"),
        (UniGRPOConfig, {"learning_rate": "1e-4x"}, "learning_rate='1e-4x': expected a number"),
        (UniGRPOConfig, {"num_generations": 4.5}, "num_generations=4.5: expected an integer"),
        (UniGRPOConfig, {"reward_weights": ["one"]}, "reward_weights='one': expected a number"),
        (ReFLConfig, {"late_steps": "a quarter"}, "late_steps='a quarter': expected a number"),
        (UnifiedSFTConfig, {"noise_draws": "1.5"}, "noise_draws='1.5': expected an integer"),
    ],
)
def test_option_that_is_no_number_is_named(tmp_path, cls, option, message):
    with pytest.raises(ValueError, match=message):
        cls(str(tmp_path), use_cpu=True, **option)


def test_every_field_has_a_help_text_and_a_line_in_the_docstring():
    own = set(UniGRPOConfig.__annotations__) - set(GRPOConfig.__dataclass_fields__)
    assert len(own) >= 20
    for name in own:
        assert UniGRPOConfig.__dataclass_fields__[name].metadata["help"]
        assert f"        {name} (`" in UniGRPOConfig.__doc__ or f"{name}`" in UniGRPOConfig.__doc__, name


def test_round_trip_through_the_command_line_and_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: out\nuse_cpu: true\nimage_size: 64\nsde_window_range: [1, 4]\nsde_window_size: 2\n"
        "flow_epsilon: 2.0e-6\nnum_generations: 8\nratio_norm: false\n"
    )
    arguments = ["--config", str(file), "--noise_level", "0.5", "--sde_window_scope", "group", "--flow_weight", "2"]
    (config,) = TrlParser((UniGRPOConfig,)).parse_args_and_config(arguments)
    assert (config.image_size, config.sde_window_range, config.sde_window_size) == (64, [1, 4], 2)
    assert (config.flow_epsilon, config.noise_level, config.ratio_norm) == (2e-6, 0.5, False)
    assert (config.sde_window_scope, config.flow_weight) == ("group", 2.0)
    assert config.gradient_accumulation_steps == 2

    (again,) = TrlParser((UniGRPOConfig,)).parse_dict(
        {name: value for name, value in config.to_dict().items() if name in UniGRPOConfig.__dataclass_fields__}
        | {"generation_batch_size": None}
    )
    assert {n: getattr(again, n) for n in DEFAULTS} == {n: getattr(config, n) for n in DEFAULTS}
    assert "sde_window_range" in config.to_json_string()


@pytest.mark.parametrize(
    ("yaml", "arguments", "found"),
    [
        ("image_size: 512", [], (512, None)),
        ("image_size: 384x640", [], ([384, 640], None)),
        ("image_size: [384, 640]\neval_image_size: 1024", [], ([384, 640], 1024)),
        ("image_size: [[512, 512], [384, 640]]", [], ([[512, 512], [384, 640]], None)),
        ("image_size: [512x512, 384x640]", ["--eval_image_size", "1024"], ([[512, 512], [384, 640]], 1024)),
        ("image_size: 512", ["--image_size", "512x512", "384x640"], ([[512, 512], [384, 640]], None)),
        ("image_size: 512", ["--image_size", "384", "640"], ([384, 640], None)),
        ("image_size: 512", ["--image_size", "256", "--eval_image_size", "512x512"], (256, 512)),
    ],
)
def test_sizes_in_yaml_and_on_the_command_line(tmp_path, yaml, arguments, found):
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: out\nuse_cpu: true\n{yaml}\n")
    for cls, parser in ((UniGRPOConfig, TrlParser), (UniGRPOConfig, TrainParser), (ReFLConfig, TrlParser)):
        if cls is ReFLConfig and isinstance(found[0], list) and isinstance(found[0][0], list):
            continue
        (config,) = parser((cls,)).parse_args_and_config(["--config", str(file), *arguments])
        assert (config.image_size, config.eval_image_size) == found
        again = cls("out", use_cpu=True, image_size=config.image_size, eval_image_size=config.eval_image_size)
        assert [again.sizes(training) for training in (True, False)] == [config.sizes(t) for t in (True, False)]


def test_command_line_window(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train", "--output_dir", str(tmp_path), "--use_cpu", "--sde_window_range", "1", "5"]
    )
    (config,) = TrlParser((UniGRPOConfig,)).parse_args_into_dataclasses()
    assert config.sde_window_range == [1, 5]


def test_settings_of_each_round_on_the_command_line_and_in_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("num_rounds: 2\nsde_window_range: [[0, 5], [0, 3]]\nnoise_level: [8e-1, '0.5']\n")
    arguments = ["--config", str(file), "--output_dir", str(tmp_path), "--use_cpu"]
    (config,) = TrlParser((UniGRPOConfig,)).parse_args_and_config([*arguments, "--num_inference_steps", "25", "40"])
    assert (config.num_inference_steps, config.sde_window_size) == ([25, 40], 3)
    assert (config.sde_window_range, config.noise_level) == ([[0, 5], [0, 3]], [0.8, 0.5])
    flat = ["--sde_window_range", "0", "5", "1", "4", "--num_inference_steps", "30", "--noise_level", "0.7"]
    (config,) = TrlParser((UniGRPOConfig,)).parse_args_and_config([*arguments, *flat])
    assert (config.sde_window_range, config.num_inference_steps, config.noise_level) == ([[0, 5], [1, 4]], 30, 0.7)


REFUSED = [
    ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching.*bfloat16"),
    ({"use_liger_kernel": True}, "use_liger_kernel=True does not work"),
    ({"sync_ref_model": True}, "sync_ref_model=True does not work"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5 does not work"),
    ({"torch_compile": True}, "torch_compile=True does not work"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 does not work"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does not work"),
    ({"torch_compile_backend": "inductor"}, "torch_compile_backend='inductor' does not work"),
    ({"torch_compile_mode": "default"}, "torch_compile_mode='default' does not work"),
    ({"use_transformers_paged": True}, "use_transformers_paged=True does not work"),
    ({"bf16_full_eval": True}, "bf16_full_eval=True does not work.*rounds the trained weights"),
    ({"fp16_full_eval": True}, "fp16_full_eval=True does not work.*rounds the trained weights"),
    ({"trust_remote_code": True}, "trust_remote_code=True does not work.*code of a repository is never run"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' does not work"),
    ({"data_seed": 7}, "data_seed=7 does not work.*by seed"),
    ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen='all' does not work"),
    ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen=True does not work"),
    ({"parallelism_config": ParallelismConfig()}, r"(?s)^parallelism_config=.*does not work"),
    ({"top_p": 0.9}, "^top_p=0.9 does not work.*would not be what is trained. Set it to 1.0"),
    ({"top_k": 50}, "^top_k=50 does not work.*Set it to 0"),
    ({"min_p": 0.1}, "^min_p=0.1 does not work"),
    ({"repetition_penalty": 1.1}, "^repetition_penalty=1.1 does not work"),
    ({"generation_kwargs": {"top_k": 5}}, "^generation_kwargs: top_k=5 does not work"),
    ({"generation_kwargs": {"typical_p": 0.9}}, "^generation_kwargs: typical_p=0.9 does not work"),
    ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "^generation_kwargs: no_repeat_ngram_size=3 does not work"),
    ({"generation_kwargs": {"sequence_bias": [[[6], 2.0]]}}, "^generation_kwargs: sequence_bias=.*Set it to None"),
    ({"generation_kwargs": {"do_sample": False}}, "^generation_kwargs: do_sample=False does not work"),
    ({"generation_kwargs": {"num_beams": 2}}, "^generation_kwargs: num_beams=2 does not work"),
    ({"generation_kwargs": {"temperature": 0.5}}, "^generation_kwargs: temperature=0.5.*It is set by `temperature`"),
    ({"generation_kwargs": {"eos_token_id": 7}}, "^generation_kwargs: eos_token_id=7.*generation_config.eos_token_id"),
    ({"generation_kwargs": {"num_return_sequences": 2}}, "num_return_sequences=2.*It is set by `num_generations`"),
    ({"cache_implementation": "paged"}, "cache_implementation='paged' does not work.*continuous batching"),
    ({"include_for_metrics": ["inputs"]}, "include_for_metrics.*does not work"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ({"optim": "galore_adamw"}, "optim='galore_adamw' brings its own parameter groups"),
    ({"optim": "lomo"}, "optim='lomo' brings"),
    ({"num_generations": 1, "per_device_train_batch_size": 1}, "at least 2 generations"),
    ({"gradient_accumulation_steps": 1, "per_device_train_batch_size": 6}, "no whole groups of num_generations=4"),
    ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "num_iterations=2 does nothing here.*Leave"),
    ({"gradient_accumulation_steps": 8, "steps_per_generation": 2}, "num_iterations=2 does nothing here"),
    ({"sde_window_size": 4, "sde_window_range": [0, 3]}, "sde_window_size=4 does not fit.*expected 1 to 3"),
    ({"sde_window_size": 0}, "sde_window_size=0 does not fit"),
    ({"sde_window_range": [2, 6]}, "with num_inference_steps=6.*last step can't be noisy"),
    ({"sde_window_range": [-1, 4]}, "expected 0 <= low < high"),
    ({"sde_window_range": [3]}, "expected two step indices"),
    ({"sde_type": "ode"}, "sde_type='ode': expected one of 'sde', 'cps'"),
    ({"sde_window_mode": "random"}, "sde_window_mode='random': expected one of"),
    ({"sde_window_scope": "global"}, "sde_window_scope='global': expected one of"),
    ({"flow_regularizer": "kl"}, "flow_regularizer='kl': expected one of"),
    ({"flow_old_source": "replay"}, "flow_old_source='replay': expected one of"),
    ({"flow_context_grad": True}, "flow_context_grad=True: expected one of"),
    ({"trust_checks": "on"}, "trust_checks='on': expected one of"),
    ({"noise_level": 0.0}, "noise_level=0 leaves no stochastic step"),
    ({"noise_level": -0.5}, "noise_level=-0.5: expected 0 or more"),
    ({"noise_level": 1.5, "sde_type": "cps"}, "noise_level=1.5.*at most 1"),
    ({"timestep_shift": 0.0}, "timestep_shift=0.0: expected a positive number"),
    ({"flow_epsilon": 0.0}, "flow_epsilon=0.0: expected a positive number"),
    ({"flow_regularizer_weight": -1.0}, "flow_regularizer_weight=-1.0: expected 0 or more"),
    ({"image_size": 0}, "image_size=0: expected the side of a square such as 512, height and width such as"),
    (
        {"image_size": [512, 768, 1024]},
        r"image_size=\[512, 768, 1024\]: expected the side.*or a list of sizes such as",
    ),
    ({"eval_image_size": "big"}, "eval_image_size='big': expected the side of a square"),
    (
        {"image_size": ["512x512", "384x640"], "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
        "per_device_train_batch_size=3 does not divide num_generations=4: with several sizes.*such as 2",
    ),
    ({"image_batch_size": 0}, "image_batch_size=0: expected a positive number"),
    ({"max_completion_length": 0}, "max_completion_length=0: expected a positive number"),
    ({"num_inference_steps": 0}, "num_inference_steps=0: expected a positive number"),
    ({"image_objective": "ppo"}, "image_objective='ppo': expected one of 'flow_grpo', 'fpo', 'awm', 'nft'"),
    ({"matching_samples": 0}, "matching_samples=0: expected a positive number"),
    ({"nft_beta": 0.0}, "nft_beta=0.0: expected a positive number"),
    ({"thinking": False}, "thinking=False with text_weight=1.0: there is no thinking to train"),
    ({"image_objective": "fpo", "flow_regularizer": "latent_kl"}, "no noisy steps that could have a KL"),
    ({"image_objective": "awm", "flow_old_source": "rollout"}, "predicts no velocities on the lines. Use 'recompute'"),
    ({"guidance_scale": 0.5}, r"guidance_scale=0.5: expected 1 \(off\) or more"),
    ({"eval_guidance_scale": 0.0}, r"eval_guidance_scale=0.0: expected 1 \(off\) or more"),
    ({"text_weight": 0.0, "flow_weight": 0.0}, "both 0: nothing would be trained"),
    ({"flow_weight": -1.0}, "flow_weight=-1.0: expected 0 or more"),
]


@pytest.mark.parametrize(
    ("changes", "message"), REFUSED, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_option_that_cannot_work_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **changes)


def test_each_refused_option_of_trl_is_tried_here():
    tried = {name for changes, _ in REFUSED for name in (*changes, *changes.get("generation_kwargs", ()))}
    own = {"top_p", "top_k", "min_p", "repetition_penalty"}
    assert set(config_checks._REFUSED) | own <= tried


# What becomes of each option of TRL's GRPOConfig that is not refused. A new one has to be tried, and be named here.
OF_THE_TEXT = """
    beta epsilon epsilon_high delta loss_type importance_sampling_level use_bias_correction_kl top_entropy_quantile
    entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
    sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
    router_aux_loss_coef cast_lm_head_to_fp32 temperature
"""
OF_BOTH = """
    model_init_kwargs disable_dropout num_generations num_generations_eval max_completion_length shuffle_dataset
    pad_to_multiple_of generation_batch_size steps_per_generation num_iterations reward_weights scale_rewards
    multi_objective_aggregation mask_truncated_completions chat_template_kwargs generation_kwargs cache_implementation
    log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    use_vllm
"""
LEFT_ALONE = "top_p top_k min_p repetition_penalty"  # at the values that change nothing
# Of DeepSpeed, continuous batching, tools, and a reference that is synced, all of which are refused.
WITHOUT_EFFECT = """
    ds3_gather_for_generation max_tool_calling_iterations ref_model_mixup_alpha ref_model_sync_steps
    transformers_continuous_batching_config
"""


def test_every_option_of_trl_works_or_is_refused_or_has_no_effect():
    of_trl = set(GRPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    known = " ".join([OF_THE_TEXT, OF_BOTH, LEFT_ALONE, WITHOUT_EFFECT]).split()
    known += [name for name in of_trl if name.startswith("vllm_") or name in config_checks._REFUSED]
    assert sorted(known) == sorted(of_trl)


@pytest.mark.parametrize(
    "extra",
    [
        {"suppress_tokens": [7]},
        {"min_new_tokens": 2},
        {"temperature": 1.0, "top_k": 0, "do_sample": True, "num_beams": 1},
        {"guidance_scale": None},
    ],
)
def test_generation_that_is_trained_as_it_is_sampled_is_allowed(tmp_path, extra):
    assert tiny_config(tmp_path, generation_kwargs=extra, guidance_scale=2.0).generation_kwargs == extra


@pytest.mark.parametrize(
    ("config", "field", "name"),
    [(config, "deepspeed", "DeepSpeed") for config in (UniGRPOConfig, ReFLConfig, UnifiedSFTConfig)]
    + [(config, "fsdp", "FSDP") for config in (ReFLConfig, UnifiedSFTConfig)],
)
def test_engines_that_spread_the_model_are_refused_whoever_asks_for_them(tmp_path, monkeypatch, config, field, name):
    with pytest.raises(ValueError, match=rf"{field}='zero.json' is not supported.*`accelerate launch --multi_gpu`"):
        config(str(tmp_path), **{field: "zero.json"})
    monkeypatch.setenv(f"ACCELERATE_USE_{field.upper()}", "true")
    with pytest.raises(ValueError, match=f"{name}, which `accelerate launch` was told to use, is not supported"):
        config(str(tmp_path))


def test_deepspeed_s_refusal_names_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"clipped expert by expert.* Use FSDP2 \(examples/accelerate/fsdp2.yaml\)"):
        UniGRPOConfig(str(tmp_path), deepspeed="zero.json")


@pytest.mark.slow  # two processes that import everything, to see that the launcher sets the variable of the test above
def test_an_engine_of_the_launcher_is_refused(tmp_path):
    """A yaml switches it on, and leaves the arguments as they are."""
    script, yaml = tmp_path / "script.py", tmp_path / "fsdp.yaml"
    script.write_text("from trl_unigrpo import UnifiedSFTConfig\nUnifiedSFTConfig('out')\n")
    yaml.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n"
        "num_processes: 1\nnum_machines: 1\nmachine_rank: 0\nuse_cpu: false\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(yaml), str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode != 0
    assert "FSDP, which `accelerate launch` was told to use, is not supported" in done.stderr


@pytest.mark.parametrize(("objective", "epsilon"), [("flow_grpo", 1e-6), ("fpo", 3e-5), ("awm", 1e-4)])
def test_clip_range_is_the_objective_s_own_unless_given(tmp_path, objective, epsilon):
    assert tiny_config(tmp_path, image_objective=objective).flow_epsilon == epsilon
    assert tiny_config(tmp_path, image_objective=objective, flow_epsilon=1e-5).flow_epsilon == 1e-5


def test_lines_need_no_window(tmp_path):
    config = tiny_config(tmp_path, image_objective="awm", num_inference_steps=2, noise_level=0.0)
    assert config.num_inference_steps == 2


def test_text_alone_needs_no_window(tmp_path):
    config = tiny_config(tmp_path, flow_weight=0.0, num_inference_steps=2, noise_level=0.0)
    assert config.num_inference_steps == 2


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_other_optimizers_are_allowed(tmp_path, optim):
    assert tiny_config(tmp_path, optim=optim).optim == optim


@pytest.mark.parametrize(
    ("processes", "settings", "message"),
    [
        (3, {"gradient_accumulation_steps": 3, "num_generations": 8}, r"_steps=3 .* makes 36 .* a multiple of 2\b"),
        (
            5,
            {"steps_per_generation": 1, "per_device_train_batch_size": 2},
            r"_generation=1 .* 5 proc.* multiple of 2",
        ),
        (3, {"generation_batch_size": 32}, r"generation_batch_size=32 .*_size=4 on 3 processes .* multiple of 12\b"),
        (
            1,
            {"per_device_train_batch_size": 3},
            r"size=3 on 1 process makes 6 .*gradient_.*_steps to a multiple of 4",
        ),
    ],
)
def test_worlds_that_cut_no_whole_groups(tmp_path, monkeypatch, processes, settings, message):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **settings)
