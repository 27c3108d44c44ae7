"""Runs of models that FSDP2 spreads over processes, and the same of one process."""

import copy
import os
import warnings

import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups
from peft import LoraConfig
from safetensors.torch import load_file

from tests.helpers import pipeline_updates
from tests.helpers.tiny_unified import FixedTexts, build_trainer, prompts_dataset, tiny_bagel
from trl_unigrpo.models.sharding import whole
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""Variables that `accelerate launch` sets for a file of FSDP2."""

# torch can't resume plain SGD under FSDP2: it has no state.
SETTINGS = {
    "trainer_class": FixedTexts,
    "learning_rate": 1e-2,
    "image_learning_rate": 2e-2,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
}
LORA = {"lora": True, "gradient_checkpointing": True}
TRAVEL = {"gather_for_rollout": False, "image_batch_size": 2}
CASES = {
    "full": {"beta": 0.1},
    "lora": {**LORA, "beta": 0.1, "gallery_steps": 50},
    "averages": {"image_objective": "nft", "image_old_policy_decay": 0.5, "ema_decay": 0.5},
}
MORE_CASES = {
    "full, checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 4},
    "gradients stay": {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}}},
    "weights travel": {"reference_on_cpu": True, **TRAVEL},
    "image": {"lora": True, "text_weight": 0.0},
    "text": {"flow_weight": 0.0},
    "lines, no thinking": {"image_objective": "fpo", "thinking": False, "text_weight": 0.0},
    "guidance": {"guidance_scale": 3.0, "gradient_checkpointing": True},
    "images of thinkings": {"images_per_thinking": 2},
    "evaluation, best": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_reward",
    },
}


class OwnLengths(UniGRPOTrainer):
    """Each process samples thinkings of another length."""

    def _generate_single_turn(self, *args, **kwargs):
        length = 3 + 9 * self.accelerator.process_index
        self.generation_config.max_new_tokens = self.generation_config.min_new_tokens = length
        self.generation_config.eos_token_id = None
        return super()._generate_single_turn(*args, **kwargs)


def whole_weights(model):
    """The trained weights of a model, put together, without the names that a wrapper gives them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(p.detach()).clone() for name, p in trained.items()}


def update(folder, case, per_device_train_batch_size, **more):
    """Train, and go on from the checkpoint in the middle of the second generation."""
    settings = {**SETTINGS, **(CASES | MORE_CASES)[case], **more}
    lora = settings.pop("lora", False)

    def built(name):
        return build_trainer(
            folder / name,
            model=tiny_bagel(),
            peft_config=LoraConfig(r=2, init_lora_weights=False) if lora else None,
            per_device_train_batch_size=per_device_train_batch_size,
            eval_dataset=prompts_dataset(copies=1) if "eval_strategy" in settings else None,
            **copy.deepcopy(settings),  # transformers writes into accelerator_config
        )

    trainer = built("run")
    before = whole_weights(trainer.model)
    trainer.train()
    trainer.save_model(folder / "saved")
    found = {"before": before, "after": whole_weights(trainer.model), "log": trainer.state.log_history}
    again = built("again")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has no rollouts")
        again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
    return found | {"resumed": whole_weights(again.model)}


def updates(folder, rank, cases, environment=()):
    """Make the updates of some cases under FSDP2, in one of several processes."""
    os.environ.update({**ENVIRONMENT, **dict(environment)})
    return {case: update(folder / case, case, 4 // int(os.environ["WORLD_SIZE"])) for case in cases}


def go_on(folder, rank, checkpoint, environment):
    """Train from a checkpoint of another number of processes on, under FSDP2; returns the weights."""
    os.environ.update(environment)
    settings = {**SETTINGS, **CASES["full"], "per_device_train_batch_size": 4 // int(os.environ["WORLD_SIZE"])}
    trainer = build_trainer(folder, model=tiny_bagel(), **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return whole_weights(trainer.model)


def spread_pipelines(folder, rank, cases):
    """Make the updates of pipelines under FSDP2, in one of two processes."""
    os.environ.update(ENVIRONMENT)
    return {case: pipeline_updates.update(folder / case, case, 2, whole_weights)[1:] for case in cases}


def gathers(folder, rank):
    """Count gathers of weights in rollouts of unequal thinkings: held, or travelling; and the lengths."""
    os.environ.update(ENVIRONMENT)
    calls, original = [], groups.foreach_all_gather
    groups.foreach_all_gather = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    found = {}
    for name, settings in {"held": {}, "travelling": TRAVEL}.items():
        trainer = build_trainer(
            folder / name,
            trainer_class=OwnLengths,
            max_completion_length=12,
            per_device_train_batch_size=2,
            **settings,
        )
        rollout, counts = trainer._rollout, []

        def counted(prompts, rollout=rollout, counts=counts):
            before = len(calls)
            outputs = rollout(prompts)
            counts.append((len(calls) - before, [len(ids) for ids in outputs[1]]))
            return outputs

        trainer._rollout = counted
        trainer.train()
        found[name] = counts
    groups.foreach_all_gather = original
    return found


def precisions(folder, rank):
    """The precision of a rollout's weights and of what it keeps, where FSDP2 gathers in bf16; its gradients' norms."""
    os.environ.update(ENVIRONMENT)
    trainer = build_trainer(folder / "bf16", bf16=True, per_device_train_batch_size=2, trainer_class=FixedTexts)
    rollout, gathered = trainer._rollout, set()

    def watched(prompts):
        gathered.update(p.dtype for p in trainer.unified.language_model.model.layers.parameters())
        return rollout(prompts)

    score, rounded = trainer._get_per_token_logps_and_entropies, []

    def scored(*args, **kwargs):
        outputs = score(*args, **kwargs)
        rounded.append(torch.equal(outputs[0], outputs[0].bfloat16().float()))
        return outputs

    trainer._rollout, trainer._get_per_token_logps_and_entropies = watched, scored
    trainer.train()
    steps = [
        image.steps
        for batch in trainer._buffered_inputs
        for trajectory in batch["trajectories"]
        for _, image in trajectory.painted()
    ]
    tensors = [x for one in steps for x in vars(one).values() if isinstance(x, torch.Tensor)]
    kept = {x.dtype for x in tensors if x.is_floating_point()}
    found = {"gathered": gathered, "kept": kept, "rounded": rounded, "norms": norms_of(trainer)}
    return found | {"accumulation": trainer.accelerator.gradient_state.plugin_kwargs}


def norms_of(trainer):
    """The norms of the first update."""
    return {name: trainer.state.log_history[0][f"grad_norm/{name}"] for name in ("text", "image")}


def saved_weights(folder):
    """The weights in a folder that `save_model` wrote."""
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)
