"""The needs of a thinker and a painter, checked before anything is computed."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_thinker(thinker: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raise ValueError for a language model that can't think with this tokenizer.
    """
    name = type(thinker).__name__
    if not thinker.can_generate() or thinker.get_output_embeddings() is None:
        raise ValueError(
            f"{name} can't write text: it has no language head. Load it with AutoModelForCausalLM, or pass a causal "
            "language model as the thinker."
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of the thinker {name} has no chat template. Take an instruction-tuned model, or set "
            "tokenizer.chat_template to the format that the model was trained with."
        )
    vocabulary = thinker.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the thinker {name} knows {vocabulary}: it belongs to "
            "another model. Load both from one folder."
        )


def check_pipeline(pipeline: Any) -> None:
    """Raise ValueError for a pipeline whose loop can't be run from here."""
    name = type(pipeline).__name__
    if getattr(pipeline, "transformer", None) is None:
        found = "a `unet`, as older diffusion models have" if getattr(pipeline, "unet", None) is not None else "none"
        raise ValueError(
            f"{name} has no `transformer` ({found}). Take a flow-matching pipeline, such as Stable Diffusion 3.5, "
            "FLUX, Qwen-Image, Z-Image or Sana."
        )
    scheduler = pipeline.scheduler
    config = scheduler.config
    flows = any(kind.__name__.startswith("FlowMatch") for kind in type(scheduler).__mro__)
    flows = flows or config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas", False)
    if not flows:
        raise ValueError(
            f"{name} is not a flow-matching pipeline: its scheduler is a {type(scheduler).__name__} with "
            f"prediction_type={config.get('prediction_type')!r}. Take one with a FlowMatchEulerDiscreteScheduler."
        )
