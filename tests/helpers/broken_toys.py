"""The toy model of docs/models.md with one promise broken at a time."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from tests.helpers.models_page import toy_module
from trl_unigrpo.models.contract import UnifiedOutput


Toy, PackedToy = toy_module().ToyPainter, toy_module().PackedToyPainter


class BlindToPadding(Toy):
    def backbone(self, input_ids, attention_mask=None, use_cache=False):
        return super().backbone(input_ids)


class OtherHidden(Toy):
    def backbone(self, *args, **kwargs):
        return UnifiedOutput(1.5 * super().backbone(*args, **kwargs).last_hidden_state)


class OtherTokens(Toy):
    def generate(self, *args, **kwargs):
        out = super().generate(*args, **kwargs)
        out[:, -1] = (out[:, -1] + 1) % self.config.vocab_size
        return out


class Unseeded(Toy):
    calls = 0

    def generate(self, *args, **kwargs):
        Unseeded.calls += 1
        torch.manual_seed(Unseeded.calls)
        return super().generate(*args, **kwargs)


class NotItsTokenizer(Toy):
    def check_tokenizer(self, tokenizer):
        raise ValueError("This is not my tokenizer.")


class OpaqueContexts(Toy):
    def contexts(self, trajectories):
        return [object() for _ in trajectories]


class ClosesThinkings(Toy):
    def contexts(self, trajectories):
        found = super().contexts(trajectories)
        for trajectory in trajectories:
            trajectory.rounds[0].text_ids.append(1)
        return found


class ForgetsThinkings(Toy):
    def contexts(self, trajectories):
        return super().contexts([replace(trajectory, rounds=[]) for trajectory in trajectories])


class EmptyBranches(Toy):
    def branch_contexts(self, trajectories, branch):
        return self.contexts(trajectories)


class HalfVelocity(Toy):
    def predict_velocity(self, *args, **kwargs):
        return super().predict_velocity(*args, **kwargs).half()


class FlatVelocity(Toy):
    def predict_velocity(self, *args, **kwargs):
        return super().predict_velocity(*args, **kwargs).flatten(1)


class FollowsAutocast(Toy):
    def predict_velocity(self, *args, **kwargs):
        velocity = super().predict_velocity(*args, **kwargs)
        return velocity.bfloat16() if torch.is_autocast_enabled("cpu") else velocity


class Timeless(Toy):
    def predict_velocity(self, context, latents, timesteps, image_size):
        return super().predict_velocity(context, latents, 0 * timesteps, image_size)


class Stateless(Toy):
    def predict_velocity(self, context, latents, timesteps, image_size):
        return super().predict_velocity(context, 0 * latents, timesteps, image_size)


class WritesIntoContext(Toy):
    def predict_velocity(self, context, *args, **kwargs):
        velocity = super().predict_velocity(context, *args, **kwargs)
        context += 1
        return velocity


class MixesContexts(Toy):
    def encode_context(self, contexts):
        context = super().encode_context(contexts)
        return context.mean(0, keepdim=True).expand_as(context)


class OneTime(Toy):
    def predict_velocity(self, context, latents, timesteps, image_size):
        return super().predict_velocity(context, latents, timesteps[:1].expand_as(timesteps), image_size)


class LeavesStepsOut(Toy):
    def velocities(self, *args, **kwargs):
        return iter(list(super().velocities(*args, **kwargs))[:-1])


class MixesSteps(PackedToy):
    def predict_velocities(self, *args, **kwargs):
        return super().predict_velocities(*args, **kwargs).flip(0)


class TextSeesSteps(PackedToy):
    def packed_forward(self, *args, **kwargs):
        out = super().packed_forward(*args, **kwargs)
        return UnifiedOutput(out.last_hidden_state + out.velocity.mean(), out.velocity)


class OtherVelocitiesBesideText(PackedToy):
    def packed_forward(self, *args, **kwargs):
        out = super().packed_forward(*args, **kwargs)
        return UnifiedOutput(out.last_hidden_state, 2 * out.velocity)


class NoGradient(Toy):
    def predict_velocity(self, *args, **kwargs):
        return super().predict_velocity(*args, **kwargs).detach().requires_grad_()


class AlwaysContextGrad(Toy):
    @torch.enable_grad()
    def encode_context(self, contexts):
        return super().encode_context(contexts)


class PackedWithoutContextGrad(PackedToy):
    def predict_velocities(self, steps, context_grad=False):
        return super().predict_velocities(steps)


class AnySize(Toy):
    def latent_shape(self, image_size):
        return [image_size[0] * image_size[1], 3]


class RawPixels(Toy):
    def encode_images(self, pixels):
        return pixels


class MeanImage(Toy):
    def encode_images(self, pixels):
        return super().encode_images(pixels.mean(0, keepdim=True).expand_as(pixels))


class MirroredTensor(Toy):
    def decode_latents(self, latents, image_size, output_type="pil"):
        images = super().decode_latents(latents, image_size, output_type)
        return images.flip(-1) if output_type == "pt" else images


class WithoutPixelGradient(Toy):
    def decode_latents(self, latents, image_size, output_type="pil"):
        return super().decode_latents(latents.detach(), image_size, output_type)


class Restless(Toy):
    def predict_velocity(self, *args, **kwargs):
        velocity = super().predict_velocity(*args, **kwargs)
        return velocity + 0.1 * torch.randn_like(velocity)


class OwnNoise(Toy):
    def initial_latents(self, image_size, generators):
        return torch.ones(len(generators), *self.latent_shape(image_size))


class OtherInTraining(Toy):
    def velocities(self, *args, **kwargs):
        return ((index, 1.01 * velocity) for index, velocity in super().velocities(*args, **kwargs))


class OneGenerator(Toy):
    def initial_latents(self, image_size, generators):
        return torch.randn(len(generators), *self.latent_shape(image_size), generator=generators[0])


class AllText(Toy):
    def is_image_parameter(self, name):
        return False


class KnowsNoWrapper(Toy):
    def is_image_parameter(self, name):
        return name.startswith("painter.")


class AlwaysBothTargets(Toy):
    def default_lora_targets(self, experts="both"):
        return super().default_lora_targets("both")


class NoTargets(Toy):
    def default_lora_targets(self, experts="both"):
        return "nothing"


class AdaptersStayOn(Toy):
    def reference(self):
        return nullcontext(self)


class SavesSomethingElse(Toy):
    def save_pretrained(self, folder, **kwargs):
        state = {name: 2 * weight for name, weight in self.state_dict().items()}
        super().save_pretrained(folder, state_dict=state, **kwargs)


class ReadsBack(Toy):
    """Breaks none: a toy that reads the colour of an image, and starts with token 0."""

    def read_images(self, images):
        return [torch.tensor(image.resize((1, 1)).getpixel((0, 0))) / 255 for image in images]

    def read_back(self, images, texts):
        if not texts:
            return []
        ids = pad_sequence([torch.tensor([0, *text]) for text in texts], batch_first=True)
        hidden = self.backbone(ids, self.seen(ids, texts)).last_hidden_state
        log_probs = self.words(hidden * (1 + 5 * self.colours(images)[:, None, :1]))
        found = log_probs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        return [row[: len(text)] for row, text in zip(found, texts, strict=True)]

    def seen(self, ids, texts):
        lengths = torch.tensor([len(text) + 1 for text in texts])
        return (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    def words(self, hidden):
        return self.lm_head(hidden).log_softmax(-1)

    def colours(self, images):
        return torch.stack(list(images))


class BlindReader(ReadsBack):
    def colours(self, images):
        return torch.ones(len(images), 3)


class ReadsAllImages(ReadsBack):
    def colours(self, images):
        weights = torch.arange(1.0, len(images) + 1)[:, None]
        return (torch.stack(list(images)) * weights).mean(0).expand(len(images), 3)


class ReadsAhead(ReadsBack):
    def backbone(self, input_ids, attention_mask=None, use_cache=False):
        hidden = super().backbone(input_ids, attention_mask).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        own = hidden * mask[..., None]
        return UnifiedOutput(hidden + own.sum(1, keepdim=True) / mask.sum(1)[:, None, None])


class GivesLogits(ReadsBack):
    def words(self, hidden):
        return self.lm_head(hidden)


class GivesNothingForNothing(ReadsBack):
    def read_back(self, images, texts):
        return super().read_back(images, texts) or None


BROKEN = {
    "text_rows_do_not_see_padding": [BlindToPadding],
    "head_gives_the_logits": [OtherHidden],
    "generate_continues_the_prompt": [OtherTokens],
    "thinking_is_sampled_with_the_tokenizer": [Unseeded, NotItsTokenizer],
    "contexts_are_data": [OpaqueContexts, ClosesThinkings],
    "contexts_hold_prompt_and_thinking": [ForgetsThinkings],
    "branches_of_guidance_are_contexts": [EmptyBranches],
    "texts_are_read_back_from_their_images": [
        *(BlindReader, ReadsAllImages, ReadsAhead, GivesLogits, GivesNothingForNothing)
    ],
    "velocity_is_float32_of_the_latents_shape": [HalfVelocity, FlatVelocity],
    "velocity_is_float32_under_autocast": [FollowsAutocast],
    "velocity_sees_state_and_time": [Timeless, Stateless],
    "context_stays_as_it_is": [WritesIntoContext],
    "rows_do_not_see_one_another": [MixesContexts, OneTime],
    "velocities_are_those_of_each_step": [LeavesStepsOut, MixesSteps],
    "text_is_the_same_beside_steps": [TextSeesSteps, OtherVelocitiesBesideText],
    "context_grad_is_followed": [NoGradient, AlwaysContextGrad, PackedWithoutContextGrad],
    "latent_shape_is_checked": [AnySize],
    "images_are_encoded_to_latents": [RawPixels, MeanImage],
    "decoded_images_agree": [MirroredTensor, WithoutPixelGradient],
    "painting_repeats": [Restless],
    "training_sees_what_was_sampled": [OtherInTraining],
    "noise_comes_from_the_generators": [OneGenerator, OwnNoise],
    "weights_belong_to_an_expert": [AllText, KnowsNoWrapper],
    "adapters_go_to_their_expert": [AlwaysBothTargets, NoTargets],
    "reference_is_the_model_without_adapters": [AdaptersStayOn],
    "reference_is_the_start_that_was_kept": [AdaptersStayOn],
    "saved_model_loads": [SavesSomethingElse],
}
"""Check -> the models for which it must fail."""
