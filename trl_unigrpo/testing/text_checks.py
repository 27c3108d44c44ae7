"""Check that a model writes text, and says what its images see of it.

A check gets a [`Case`] with a model of its own, and raises [`ContractError`] where the promise in its docstring is
broken.
"""

import io

import numpy as np
import torch
from PIL import Image

from ..models.contract import UnifiedModelMixin
from ..models.tokenizer import never_sampled
from ..sampling import Thinking, think
from ..trainers.trl_bridge import add_fused_lm_head
from ..trajectory import Round, from_state, to_state
from .case import Case, expect


# Text


@torch.no_grad()
def text_rows_do_not_see_padding(case: Case) -> None:
    """`backbone` gives each row the hidden states that it has alone, wherever it is padded."""
    ids, mask = case.text()
    hidden = case.model.backbone(ids, mask).last_hidden_state
    expect(hidden.shape[:2] == ids.shape, "backbone", f"gives {tuple(hidden.shape)} for tokens {tuple(ids.shape)}.")
    for row, real in enumerate(mask.bool()):
        alone = case.model.backbone(ids[row, real][None]).last_hidden_state[0]
        expect(case.same(hidden[row, real], alone), "backbone", f"gives row {row} other hidden states beside others.")


@torch.no_grad()
def head_gives_the_logits(case: Case) -> None:
    """TRL's language head on `base_model` gives the log-probabilities of `forward`'s logits."""
    ids, mask = case.text()
    known, labels = case.model(input_ids=ids, attention_mask=mask).logits, ids.masked_fill(mask == 0, -100)
    known = known[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    add_fused_lm_head(case.model)
    found = case.model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    real = mask[:, 1:].bool() & mask[:, :-1].bool()
    expect(case.same(found[real], known[real]), "backbone", "and the language head don't give `forward`'s logits.")


@torch.no_grad()
def generate_continues_the_prompt(case: Case) -> None:
    """`generate` without sampling takes the most likely tokens, for padded prompts as for single ones."""
    words, prompts = case.tokenizer, [t.prompt_ids for t in case.trajectories()]
    padded = words.pad({"input_ids": prompts}, return_tensors="pt").to(case.model.device)
    end = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    out = case.model.generate(**padded, do_sample=False, max_new_tokens=4, **end)
    for prompt, row in zip(prompts, out[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
        new = row[: row.index(words.eos_token_id) + 1] if words.eos_token_id in row else row
        whole = torch.tensor([[*prompt, *new]], device=case.model.device)
        logits = case.model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        below = logits.max(-1).values - logits.gather(1, torch.tensor(new, device=logits.device)[:, None])[:, 0]
        likely = bool((below <= case.tolerance * logits.abs().max()).all())
        expect(likely, "generate", f"writes {new} after a prompt, which are not the most likely tokens.")


def thinking_is_sampled_with_the_tokenizer(case: Case) -> None:
    """`generate` samples a thinking from the chat template's tokens, the same for a seed, without forbidden tokens."""
    case.model.check_tokenizer(case.tokenizer)
    how = Thinking(max_completion_length=6)
    first, again = (think(case.model, case.tokenizer, case.messages(), how, seed=1) for _ in range(2))
    texts = [t.text_ids for t in first]
    expect(texts == [t.text_ids for t in again], "generate", "samples other tokens for the same seed.")
    never = set(never_sampled(case.model, case.tokenizer, [case.tokenizer.eos_token_id]) or ())
    found = sorted(never.intersection(*[[token for text in texts for token in text]]))
    expect(not found, "generate", f"samples {found}, tokens that `suppress_tokens` forbids.")
    expect(all(0 < len(text) <= 6 for text in texts), "generate", "samples none, or more tokens than it may.")


# Contexts


@torch.no_grad()
def contexts_are_data(case: Case) -> None:
    """`contexts` returns data that a checkpoint keeps and gives back, and leaves the trajectories as they are."""
    made = case.trajectories()
    before, contexts = to_state(made), case.model.contexts(made)
    expect(len(contexts) == len(made), "contexts", f"gives {len(contexts)} contexts for {len(made)} trajectories.")
    expect(to_state(made) == before, "contexts", "changes the trajectories.")
    file = io.BytesIO()
    torch.save(to_state(contexts, case.model.context_types), file)
    file.seek(0)
    kept = from_state(torch.load(file, weights_only=True), case.model.context_types)
    latents, times = case.latents(), case.times(0.5, 0.5)
    found, known = case.velocity(kept, latents, times), case.velocity(contexts, latents, times)
    expect(case.same(found, known), "contexts", "gives contexts that are others after a checkpoint.")


@torch.no_grad()
def contexts_hold_prompt_and_thinking(case: Case) -> None:
    """`contexts` tells the image what the prompt and the thinking say; the thinking may be missing."""
    first, second = case.trajectories()
    latents, times = case.latents(1), case.times(0.5)
    silent, other = case.trajectories(thinking=False)[0], case.trajectories()[0]
    other.rounds = [Round(second.text_ids)]
    known = case.velocity(case.model.contexts([first]), latents, times)
    for changed, name in ((silent, "without its thinking"), (other, "with another thinking"), (second, "of another")):
        found = case.velocity(case.model.contexts([changed]), latents, times)
        expect(
            not torch.equal(found, known),
            "contexts",
            f"and the velocity are the same for a trajectory {name}. (Is the last layer zero, as some start? Does the "
            "tokenizer know the words? Pass `prompts` and `thinkings` of words that it knows.)",
        )


@torch.no_grad()
def branches_of_guidance_are_contexts(case: Case) -> None:
    """`branch_contexts`, where a model brings it, gives contexts for "text" and for "image"."""
    if type(case.model).branch_contexts is UnifiedModelMixin.branch_contexts:
        return
    made, latents, times = case.trajectories(), case.latents(), case.times(0.5, 0.5)
    known = case.velocity(case.model.contexts(made), latents, times)
    for branch in ("text", "image"):
        found = case.velocity(case.model.branch_contexts(made, branch), latents, times)
        expect(not torch.equal(found, known), "branch_contexts", f"leaves nothing out for the branch {branch!r}.")


# Reading


@torch.no_grad()
def texts_are_read_back_from_their_images(case: Case) -> None:
    """`read_back`, where a model brings it, gives the log-probs of each text's tokens behind its own image."""
    model = case.model
    try:
        none = model.read_back([], [])
    except ValueError:  # it says that it can't
        return
    expect(none == [], "read_back", f"gives {none!r} for no images.")
    shape, texts = (2, *case.image_size, 3), [t.text_ids[:-1] for t in case.trajectories()]
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    shown = model.read_images([Image.fromarray(pixels) for pixels in noise])
    found, swapped = model.read_back(shown, texts), model.read_back(shown[::-1], texts)
    for image, text, row, other in zip(shown, texts, found, swapped, strict=True):
        (alone,) = model.read_back([image], [text])
        expect(case.same(row, alone), "read_back", "gives a text other log-probs beside others than alone.")
        expect(not case.same(row, other), "read_back", "gives the same log-probs behind another image.")
        (first,) = model.read_back([image], [text[:1]])
        expect(case.same(first, row[:1]), "read_back", "lets a token see those behind it.")
    special = {*case.tokenizer.all_special_ids, model.image_placeholder}
    words = [token for token in range(min(len(case.tokenizer), MOST_WORDS)) if token not in special]
    total = torch.cat(model.read_back([shown[0]] * len(words), [[word] for word in words])).exp().sum().item()
    expect(0 < total <= 1 + case.tolerance, "read_back", f"gives words that have {total:.3g} of the probability.")


MOST_WORDS = 1000
"""Words whose probabilities are added up."""

TEXT_CHECKS = (
    text_rows_do_not_see_padding,
    head_gives_the_logits,
    generate_continues_the_prompt,
    thinking_is_sampled_with_the_tokenizer,
    contexts_are_data,
    contexts_hold_prompt_and_thinking,
    branches_of_guidance_are_contexts,
    texts_are_read_back_from_their_images,
)
