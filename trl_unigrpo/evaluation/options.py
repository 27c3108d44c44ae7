"""Settings of an evaluation, which are also the options of `trl-unigrpo eval`: read without loading torch."""

from dataclasses import dataclass
from typing import Annotated

from typer import Option


@dataclass(frozen=True)
class ModelOptions:
    """The model to evaluate: arguments of [`load_model`], with those of [`BaseOptions`]."""

    source: Annotated[
        str | None, Option("--model", help="Folder or hub id: a model, a checkpoint, or adapters; or 'shapeworld'.")
    ] = None
    dtype: Annotated[str, Option(help="Of the weights: auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str | None, Option(help="Such as cuda:1 or cpu; by default a GPU if there is one.")] = None


@dataclass(frozen=True)
class BaseOptions:
    """A model below adapters, or in place of a whole one: arguments of [`load_model`]."""

    base: Annotated[str | None, Option(help="What adapters were trained on, if they don't say.")] = None
    thinker: Annotated[str | None, Option(help="Language model of a pipeline.")] = None
    painter: Annotated[str | None, Option(help="diffusers pipeline, instead of a model or below adapters.")] = None


@dataclass(frozen=True)
class BenchmarkOptions:
    """The prompts: those of a benchmark, or the user's own."""

    benchmark: Annotated[
        str | None, Option(help="geneval or shapeworld; with --data: dpg, tiif, wise, geneval2, gedit or imgedit.")
    ] = None
    data: Annotated[str | None, Option(help="The benchmark's file or folder.")] = None
    prompts: Annotated[str | None, Option(help="Own prompts instead: a csv, json, jsonl, parquet or txt file.")] = None
    num_prompts: Annotated[int | None, Option(min=1, help="Only so many prompts, spread over the tasks.")] = None

    @property
    def name(self) -> str:
        """The benchmark's name, "prompts" for the user's own; ValueError if there are both or none."""
        if (self.benchmark is None) == (self.prompts is None):
            raise ValueError("Pass either --benchmark or --prompts (or --compare A B, or --write-prompts FILE).")
        return self.benchmark or "prompts"


@dataclass(frozen=True)
class PaintingOptions:
    """Options for painting; None stands for the benchmark's own. Behind a renamed option is its former name."""

    samples: Annotated[int | None, Option(min=1, help="Images of each prompt; the benchmark's own.")] = None
    num_inference_steps: Annotated[
        int | None, Option(min=1, help="Denoising steps; 50, ShapeWorld's 10."), "--steps"
    ] = None
    image_size: Annotated[
        str | None, Option(help="Pixels of a side, or height and width as in 384x640; 1024, ShapeWorld's 48.")
    ] = None
    guidance_scale: Annotated[float, Option(help="Classifier-free guidance by the prompt; 1 is off.")] = 1.0
    image_guidance_scale: Annotated[float, Option(help="Guidance by the thinking; 1 is off.")] = 1.0
    guidance_interval: Annotated[
        tuple[float, float], Option(help="Times at which to guide, low and high; 1 is noise.")
    ] = (0.4, 1.0)
    guidance_renorm: Annotated[str, Option(help="global, channel or text_channel.")] = "global"
    guidance_renorm_min: Annotated[float, Option(help="Least factor of the renorm, 0 to 1.")] = 0.0
    timestep_shift: Annotated[float, Option(help="Shift of the schedule towards noise.")] = 3.0
    thinking: Annotated[bool, Option(help="Think before painting.")] = True
    greedy: Annotated[bool, Option("--greedy", help="The most probable thinking instead of a sampled one.")] = False
    temperature: Annotated[float, Option(help="Of sampled thinkings.")] = 1.0
    max_completion_length: Annotated[int | None, Option(min=1, help="Thinking tokens; 512.")] = None
    system_prompt: Annotated[str, Option(help="'auto' for the model's own.")] = "auto"
    batch_size: Annotated[int | None, Option(min=1, help="Images at once; 8, ShapeWorld's 210.")] = None
    seed: Annotated[int | None, Option(min=0, help="Of thinkings and noise; 0, ShapeWorld's 1234.")] = None


@dataclass(frozen=True)
class RoundsOptions:
    """Several rounds of each prompt, beside as many images painted alone."""

    rounds: Annotated[
        int | None, Option(min=2, help="Also look at each image and mend it, in so many rounds, and compare.")
    ] = None
    reflection_template: Annotated[
        str | None, Option(help="What is said to the model's own image; fields {prompt}, {round}, {or_stop}.")
    ] = None
    stop_text: Annotated[str, Option(help="The answer that keeps an image; '' for none.")] = "keep"
    max_reflection_length: Annotated[int, Option(min=1, help="Most tokens of a later round's text.")] = 256
    round_context: Annotated[str, Option(help="What a later round sees: markov, the last image, or full.")] = "markov"


@dataclass(frozen=True)
class Judging:
    """The judge, detector or rewards that score the images; without any of them, what fits the benchmark."""

    judge_model: Annotated[str | None, Option(help="Name of the judge at the endpoint.")] = None
    judge_base_url: Annotated[
        str | None, Option(help="OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY.")
    ] = None
    judge_mode: Annotated[str, Option(help="logprobs, or score for endpoints without log-probs.")] = "logprobs"
    judge_concurrency: Annotated[int, Option(min=1, help="Questions at a time.")] = 32
    judge_cache: Annotated[str | None, Option(help="sqlite file that keeps the judge's answers.")] = None
    local_judge: Annotated[str | None, Option(help="Folder or hub id of a judge in this process.")] = None
    rewards: Annotated[
        list[str] | None, Option(help="Reward functions as module:NAME, repeated; a judge is for those that ask one.")
    ] = None
    detector: Annotated[str | None, Option(help="GenEval's Mask2Former, if not the released one.")] = None
    clip: Annotated[str | None, Option(help="GenEval's CLIP, if not the released one.")] = None
    none: Annotated[bool, Option("--no-score", help="Only paint; a later run scores.")] = False
