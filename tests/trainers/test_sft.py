"""Supervised fine-tuning: the loss by hand, who sees what, and that it learns."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from datasets import List as ListFeature
from transformers import TrainerCallback

from tests.helpers.runs import assert_same_update
from tests.helpers.sft import FEATURES, ROWS, make_sft, many_rows, some_image
from tests.helpers.tiny_unified import IMAGE_SIZE, bagel_with_tower, broken, moved, tiny_bagel, tiny_tokenizer, weights
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration, BagelProcessor
from trl_unigrpo.models.contract import ContextRow, UnifiedModelMixin
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
from trl_unigrpo.trajectory import Round, Trajectory


SIZE = (IMAGE_SIZE, IMAGE_SIZE)


# The update is the gradient itself: Adam would blow the last digits of a tiny one up.
PLAIN = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 2, "context_dropout": 0.3}


class Gradients(TrainerCallback):
    def __init__(self, into):
        self.into = into

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.into.update({n: p.grad.clone() for n, p in model.named_parameters()})


def captured(trainer):
    """Keep what the model is given during training."""
    flows, make = [], trainer._noisy_copies

    def kept(base, inputs):
        flows.append((make(base, inputs), inputs))
        return flows[-1][0]

    trainer._noisy_copies = kept
    return flows


def of_images(column):
    """A column of the table of steps, image by image."""
    return column.unflatten(0, (4, -1))


def by_hand(model, row, x, t, target, ids=None):
    """Cross-entropies of the thinking and its end, and squared errors of the velocities, of one row on its own."""
    tokenizer = tiny_tokenizer()
    system = "<|im_start|>think first<|im_end|>" if row["completion"] else ""
    prompt = tokenizer(f"{system}<|im_start|>{row['prompt']}<|im_end|>".replace("<|", " <|").replace("|>", "|> "))[
        "input_ids"
    ]
    thinking = tokenizer(f"{row['completion']} <|im_end|>")["input_ids"] if row["completion"] else []
    context = [*prompt, *([1, *thinking] if thinking else [])]
    losses = torch.zeros(0)
    if thinking:
        logits = model.language_model.lm_head(model.backbone(torch.tensor([context])).last_hidden_state)[0]
        predicted = logits[-len(thinking) - 1 : -1].log_softmax(-1)
        losses = -predicted[torch.arange(len(thinking)), torch.tensor(thinking)]
    context = context if ids is None else ids
    encoded = model.encode_context([ContextRow(torch.tensor(context, dtype=torch.long))])
    errors = torch.cat(
        [model.predict_velocity(encoded, x[k][None], t[k][None], SIZE) - target[k] for k in range(len(x))]
    ).square()
    return losses, errors


@pytest.mark.parametrize("weights_of", [(1.0, 1.0), (0.5, 3.0)])
def test_loss_is_the_hand_computed_one(tmp_path, weights_of):
    text, flow = weights_of
    trainer = make_sft(tmp_path, noise_draws=2, text_weight=text, flow_weight=flow, max_grad_norm=0.0)
    flows = captured(trainer)
    gradients = {}
    trainer.add_callback(Gradients(gradients))
    trainer.train()
    ((steps, inputs),) = flows
    x, t, target = (of_images(column) for column in (steps.x, steps.t, steps.states.target))
    model = tiny_bagel()
    losses, errors = [], []
    for i, prompt_ids in enumerate(inputs["prompt_ids"]):
        prompt = trainer.processing_class.decode(prompt_ids)
        row = next(row for row in ROWS if f" {row['prompt']} " in prompt)
        cross_entropy, error = by_hand(model, row, x[i], t[i], target[i])
        losses.append(cross_entropy)
        errors.append(error)
        # The states lie on the straight line from the image to the noise, and the target points along it.
        pixels = torch.from_numpy(np.asarray(row["image"], dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        clean = model.encode_images(pixels)
        torch.testing.assert_close(x[i], clean + t[i][:, None, None] * target[i], rtol=1e-4, atol=1e-5)
    cross_entropy, error = torch.cat(losses).mean(), torch.stack(errors).mean()
    loss = text * cross_entropy + flow * error
    log = trainer.state.log_history[0]
    assert log["loss/text"] == pytest.approx(cross_entropy.item(), rel=1e-4)
    assert log["loss/flow"] == pytest.approx(error.item(), rel=1e-4)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=2e-3, atol=1e-5, msg=name)


def test_labels_are_the_thinking_and_its_end_alone(tmp_path):
    trainer = make_sft(tmp_path)
    batch = trainer.data_collator(ROWS)
    decode = trainer.processing_class.decode
    for row, labels, mask, ids in zip(ROWS, batch["labels"], batch["attention_mask"], batch["input_ids"], strict=True):
        scored = labels[labels != -100].tolist()
        if row["completion"]:
            assert decode(scored) == f"{row['completion']} <|im_end|>"
            assert decode(ids[mask.bool()]).startswith("<|im_start|> think first <|im_end|>")
        else:
            assert scored == []
            assert decode(ids[mask.bool()]) == f"<|im_start|> {row['prompt']} <|im_end|> <|im_start|>"


def test_context_dropout_leaves_what_guidance_leaves(tmp_path):
    trainer = make_sft(tmp_path, context_dropout=1.0)
    flows = captured(trainer)
    trainer.train()
    ((steps, inputs),) = flows
    system = [1, *tiny_tokenizer().encode("think first"), 2]
    left = [system if thinking else [] for thinking in inputs["completion_ids"]]
    assert [image.context.ids.tolist() for image in steps.images] == left
    assert sorted(map(len, left)) == [0, 0, 4, 4]
    model = tiny_bagel()
    x, t, target = (of_images(column) for column in (steps.x, steps.t, steps.states.target))
    errors = [by_hand(model, ROWS[0], x[i], t[i], target[i], ids=left[i])[1] for i in range(4)]
    assert trainer.state.log_history[0]["loss/flow"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)
    # The text's own loss still sees its prompt.
    plain = make_sft(tmp_path)
    plain.train()
    assert trainer.state.log_history[0]["loss/text"] == pytest.approx(
        plain.state.log_history[0]["loss/text"], rel=1e-5
    )

    some = make_sft(tmp_path, context_dropout=0.5, max_steps=30)
    flows = captured(some)
    some.train()
    hidden = torch.tensor([len(image.context) <= 4 for steps, _ in flows for image in steps.images]).float().mean()
    assert 0.3 < hidden < 0.7


def test_context_dropout_of_a_model_that_can_not_be_guided(tmp_path):
    class Unguided(BagelForUnifiedGeneration):
        branch_contexts = UnifiedModelMixin.branch_contexts

    with pytest.raises(NotImplementedError, match=r"Unguided does not say .*context_dropout=0"):
        make_sft(tmp_path, broken(Unguided), context_dropout=0.1)


@pytest.mark.parametrize(("sampling", "shift"), [("logit_normal", 1.0), ("uniform", 1.0), ("uniform", 3.0)])
def test_times_are_drawn_from_their_distribution(tmp_path, sampling, shift):
    trainer = make_sft(tmp_path, timestep_sampling=sampling, timestep_shift=shift, noise_draws=1000)
    batch = trainer.data_collator(ROWS[:1])
    t = trainer._noisy_copies(trainer.model, batch).t
    u = t / (shift - (shift - 1) * t)
    quartiles = torch.quantile(u, torch.tensor([0.25, 0.5, 0.75]))
    normal = torch.tensor([-0.6745, 0.0, 0.6745]).sigmoid()
    expected = torch.tensor([0.25, 0.5, 0.75]) if sampling == "uniform" else normal
    torch.testing.assert_close(quartiles, expected, atol=0.05, rtol=0)


def test_detached_context_keeps_the_image_loss_off_the_text(tmp_path):
    sizes = {}
    for grad in ("detach", "full"):
        gradients = {}
        trainer = make_sft(tmp_path, flow_context_grad=grad, text_weight=0.0, max_grad_norm=0.0)
        trainer.add_callback(Gradients(gradients))
        trainer.train()
        sizes[grad] = gradients["language_model.model.layers.0.self_attn.v_proj.weight"].norm().item()
    assert sizes["full"] > 2 * sizes["detach"]


def test_a_few_steps_learn_a_batch(tmp_path):
    rows = Dataset.from_list(ROWS, features=FEATURES)
    trainer = make_sft(tmp_path, eval_dataset=rows, max_steps=60, noise_draws=8, learning_rate=6e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss/text"] < 0.3 * before["eval_loss/text"]
    assert after["eval_loss/flow"] < 0.9 * before["eval_loss/flow"]


def test_evaluation_logs_both_losses_and_leaves_the_weights(tmp_path):
    trainer = make_sft(tmp_path, eval_dataset=Dataset.from_list(ROWS, features=FEATURES))
    before = weights(trainer.model)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == trainer.evaluate()["eval_loss"] > 0
    log = trainer.state.log_history[-1]
    assert log["eval_loss/text"] + log["eval_loss/flow"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert not moved(before, weights(trainer.model))


def test_model_by_folder_is_trained_in_float32(tmp_path):
    tiny_bagel().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    args = UnifiedSFTConfig(str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True)
    dataset = Dataset.from_list(ROWS, features=FEATURES)
    trainer = UnifiedSFTTrainer(str(tmp_path / "model"), args, train_dataset=dataset)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.train()


def test_resume_is_exact(tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = make_sft(tmp_path / "whole", **arguments)
    whole.train()
    resumed = make_sft(tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert not moved(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": ["a"], "image": [some_image(0)]},
            r"train_dataset has no column 'completion' \(it has \['prompt', 'image'\]\). Add it, or rename",
        ),
        ({"prompt": ["a"], "completion": ["b"]}, "has no column 'image'"),
        ({"prompt": [], "completion": [], "image": []}, "train_dataset is empty"),
    ],
)
def test_wrong_dataset(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        make_sft(tmp_path, rows=Dataset.from_dict(columns))


def test_images_of_other_sizes_in_a_batch_are_refused(tmp_path):
    rows = [*ROWS[:1], {**ROWS[1], "image": some_image(1).resize((16, 16))}]
    with pytest.raises(ValueError, match=r"images of one batch have the sizes .*Resize them to one size"):
        make_sft(tmp_path, rows=rows).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep_sampling": "normal"}, "timestep_sampling='normal': expected one of"),
        ({"flow_context_grad": "yes"}, "flow_context_grad='yes': expected one of"),
        ({"noise_draws": 0}, "noise_draws=0: expected at least 1"),
        ({"context_dropout": 1.5}, "context_dropout=1.5: expected a share"),
        ({"timestep_shift": 0.0}, "timestep_shift=0.0: expected a positive number"),
        ({"text_weight": -1.0}, "text_weight=-1.0: expected 0 or more"),
        ({"text_weight": 0.0, "flow_weight": 0.0}, "both 0: nothing would be trained"),
    ],
)
def test_wrong_option(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_sft(tmp_path, **changes)


def test_model_without_the_contract(tmp_path):
    with pytest.raises(TypeError, match="Linear is not a unified model"):
        make_sft(tmp_path, model=torch.nn.Linear(1, 1))


CUTS = [(8, 1), (4, 2), (1, 8)]


def test_update_does_not_depend_on_how_its_rows_are_cut(tmp_path):
    # Twelve rows of all lengths: an optimizer step of eight, and a last one of four.
    updates = []
    for batch, accumulation in CUTS:
        model = tiny_bagel()
        before = weights(model)
        trainer = make_sft(
            tmp_path,
            model,
            rows=many_rows(12),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **PLAIN,
        )
        trainer.train()
        updates.append(weights(model))
        assert trainer.state.epoch == 1
    for other in updates[1:]:
        assert_same_update(before, updates[0], other)


def test_evaluation_does_not_depend_on_how_its_rows_are_cut(tmp_path):
    # One row, eight times: what differs is its noise.
    rows = Dataset.from_list(ROWS[:1] * 8, features=FEATURES)
    found = []
    for size in (8, 4, 1):
        trainer = make_sft(tmp_path, eval_dataset=rows, per_device_eval_batch_size=size)
        flows = captured(trainer)
        loss = trainer.evaluate()["eval_loss/flow"]
        found.append((loss, torch.cat([steps.x for steps, _ in flows])))
    for loss, states in found:
        assert loss == pytest.approx(found[0][0], rel=1e-4)
        torch.testing.assert_close(states, found[0][1], rtol=1e-4, atol=1e-5)
        assert len(states.unique(dim=0)) == 8


def test_steps_draw_times_and_noise_of_their_own(tmp_path):
    trainer = make_sft(tmp_path, rows=ROWS[:1], per_device_train_batch_size=1, max_steps=3)
    flows = captured(trainer)
    trainer.train()
    assert len(torch.cat([steps.t for steps, _ in flows]).unique()) == 3


SEEN = [
    {**ROWS[0], "source_image": some_image(4)},
    {**ROWS[1], "source_image": None},
    {**ROWS[2], "source_image": some_image(5)},
    {**ROWS[3], "source_image": None},
]


def test_a_source_image_is_shown_before_the_prompt(tmp_path):
    """Loss of rows with and without one, each against a forward of its own."""
    model = bagel_with_tower()
    model.freeze_understanding(False)
    rows = Dataset.from_list(SEEN, features=Features({**FEATURES, "source_image": ImageFeature()}))
    trainer = make_sft(tmp_path, model=model, rows=rows, learning_rate=0.0)
    gradients = {}
    trainer.add_callback(Gradients(gradients))
    flows = captured(trainer)
    trainer.train()
    [(steps, inputs)] = flows
    processor = BagelProcessor(tiny_tokenizer(), model.config)
    tokens, texts, squares = 0, [], []
    for i, prompt in enumerate(inputs["prompts"]):
        row = next(row for row in SEEN if row["prompt"] == prompt[-1]["content"])
        ids, shown = inputs["prompt_ids"][i], []
        if row["source_image"] is not None:
            head = 0 if not row["completion"] else ids.index(2) + 1  # behind the end of the system message
            assert ids[head] == model.config.image_token_id
            shown = model.read_images([row["source_image"]])
            source = row["source_image"]
            own = model.context_image(processor.vae_pixels(source), processor.vit_pixels(source))
            torch.testing.assert_close((shown[0].latents, shown[0].features), (own.latents, own.features))
            assert shown[0].grid == own.grid
        assert ids.count(model.config.image_token_id) == len(shown)
        for used, read in zip(steps.images[i].context.images, shown, strict=True):
            torch.testing.assert_close((used.latents, used.features), (read.latents, read.features))
        trajectory = Trajectory("", ids, rounds=[Round(inputs["completion_ids"][i])], images=shown)
        [context] = model.contexts([trajectory])
        encoded = model.encode_context([context])
        velocity = model.predict_velocity(encoded, steps.states.x[i : i + 1], steps.t[i : i + 1], SIZE)
        squares.append((velocity - steps.states.target[i]).square().mean())
        if row["completion"]:
            ids = torch.tensor([[*ids, *inputs["completion_ids"][i]]])
            logits = model.language_model.lm_head(model.backbone(ids, images=[shown]).last_hidden_state)[0]
            count = len(inputs["completion_ids"][i])
            texts.append(F.cross_entropy(logits[-count - 1 : -1], ids[0, -count:], reduction="sum"))
            tokens += count
    log = next(log for log in trainer.state.log_history if "loss/text" in log)
    assert log["loss/text"] == pytest.approx((sum(texts) / tokens).item(), rel=1e-4)
    assert log["loss/flow"] == pytest.approx(torch.stack(squares).mean().item(), rel=1e-4)
    for name in ("connector.fc2.weight", "vit_model.vision_model.embeddings.patch_embedding.weight"):
        assert gradients[name].abs().sum() > 0


def wordless(*rows):
    """Rows whose prompts are conversations, [] where there are no words."""
    message = {"role": Value("string"), "content": Value("string")}
    features = {**FEATURES, "prompt": ListFeature(message), "source_image": ImageFeature()}
    return Dataset.from_list(list(rows), features=Features(features))


def test_a_caption_is_learnt_as_it_is_read_back(tmp_path):
    """The loss of a completion behind an image without words is that of reading it back, and of the end marker."""
    model, words = bagel_with_tower(), tiny_tokenizer()
    caption = {"prompt": [], "completion": "the cat sits", "image": some_image(0), "source_image": some_image(4)}
    trainer = make_sft(tmp_path, model=model, rows=wordless(*[caption] * 4), learning_rate=0.0, system_prompt="")
    trainer.train()
    ids = [*words("the cat sits")["input_ids"], words.eos_token_id]
    [expected] = model.read_back(model.read_images([caption["source_image"]]), [ids])
    log = next(log for log in trainer.state.log_history if "loss/text" in log)
    assert log["loss/text"] == pytest.approx(-expected.mean().item(), rel=1e-4)


def test_a_row_without_words_needs_an_image(tmp_path):
    rows = [{"prompt": [], "completion": "a cat", "image": some_image(0), "source_image": None}]
    trainer = make_sft(tmp_path, model=bagel_with_tower(), rows=wordless(*rows * 4), system_prompt="")
    with pytest.raises(ValueError, match=r"the prompt is \[\], expected a text"):
        trainer.train()


class PaintsFromTextAlone(BagelForUnifiedGeneration):
    image_placeholder = None


def test_a_source_image_needs_a_model_that_sees(tmp_path):
    model = tiny_bagel()
    model.__class__ = PaintsFromTextAlone
    rows = Dataset.from_list(SEEN, features=Features({**FEATURES, "source_image": ImageFeature()}))
    with pytest.raises(ValueError, match="column source_image, but PaintsFromTextAlone paints from text alone"):
        make_sft(tmp_path, model=model, rows=rows)
