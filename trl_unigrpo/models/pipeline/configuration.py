"""Configuration of a thinker and a painter."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig


PROMPT_WRITER_SYSTEM_PROMPT = (
    "You write prompts for an image generator. First think, between <think> and </think>, about what the picture "
    "should show: the objects, how many there are, their colours, where they stand, the style. Then write the prompt: "
    "one paragraph that describes the finished picture."
)
PAINTER_PROMPTS = ("answer", "prompt_and_answer", "completion")


class PipelineUnifiedConfig(PreTrainedConfig):
    """
    Configuration of [`PipelineForUnifiedGeneration`].

    Args:
        thinker_config (`dict` or `PreTrainedConfig`): of the language model.
        shared_encoder (`bool`): whether the thinker is the painter's own text encoder.
        painter_prompt (`str`):
            What the painter is told: the thinker's `"answer"`, which is what follows `</think>`, or all of its text
            if that marker is missing; the user's prompt and below it the answer (`"prompt_and_answer"`); or all of the
            thinker's text, its thoughts included (`"completion"`). Where that is empty it is the user's prompt.
        painter_arguments (`dict`): further arguments of the pipeline's call, such as `{"max_sequence_length": 512}`.
        system_prompt (`str` or `None`): what the thinker is told if the user brings no system prompt.
        sources (`dict`): where the `"thinker"` and the `"painter"` were loaded from.
    """

    model_type = "unified_pipeline"
    sub_configs: ClassVar = {"thinker_config": AutoConfig}

    def __init__(
        self,
        thinker_config: dict[str, Any] | PreTrainedConfig | None = None,
        shared_encoder: bool = False,
        painter_prompt: str = "answer",
        painter_arguments: dict[str, Any] | None = None,
        system_prompt: str | None = PROMPT_WRITER_SYSTEM_PROMPT,
        sources: dict[str, str] | None = None,
        **kwargs: Any,
    ):
        if painter_prompt not in PAINTER_PROMPTS:
            raise ValueError(
                f"painter_prompt={painter_prompt!r}: expected one of {', '.join(map(repr, PAINTER_PROMPTS))}."
            )
        self.thinker_config: Any = thinker_config
        if isinstance(thinker_config, dict):
            self.thinker_config = AutoConfig.for_model(**thinker_config)
        self.shared_encoder = shared_encoder
        self.painter_prompt = painter_prompt
        self.painter_arguments = dict(painter_arguments or {})
        self.system_prompt = system_prompt
        self.sources = dict(sources or {})
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the language model's configuration, which is what TRL asks about the text."""
        if self.thinker_config is None:
            return self
        return self.thinker_config.get_text_config(decoder=decoder, encoder=encoder)
