"""A stand-in for vLLM, which needs a GPU: what TRL's integration asks of it, by a second model on the CPU.

It loads a language model from the folder that it is given, forgets its weights, and knows from then on only what it is
sent. From these it really samples: tokens and log-probs are right if the weights are.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trl.generation import vllm_generation

from trl_unigrpo.models.bagel import BagelConfig, BagelForUnifiedGeneration
from trl_unigrpo.trainers import vllm_thinking


VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Of the environment, which TRL sets for the engine."""


@dataclass
class SamplingParams:
    """Those of vLLM's that are used here; others are an error, as there."""

    n: int
    repetition_penalty: float
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    logprobs: int
    logit_bias: dict[int, float]
    stop_token_ids: list[int]


@dataclass
class Sampled:
    """A completion: its tokens, their log-probs as vLLM processes them, and those of the whole distribution."""

    token_ids: list[int]
    processed: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def logprobs(self) -> list[dict[int, Any]]:
        rows = zip(self.token_ids, self.processed, strict=True)
        return [{token: SimpleNamespace(rank=1, logprob=value)} for token, value in rows]


class Engine:
    """
    A language model that is sent its weights.

    Attributes:
        made: all engines, in their order.
        source: the folder that it was loaded from.
        arguments: all others that it was made with.
        syncs: of each time that weights were sent, names -> tensors, in their order.
        asked: prompts and parameters of each request.
        sampled: all completions, in their order.
    """

    made: ClassVar[list["Engine"]] = []

    def __init__(self, source: str, **arguments: Any):
        bagel = AutoConfig.from_pretrained(source).model_type == BagelConfig.model_type
        self.model = (BagelForUnifiedGeneration if bagel else AutoModelForCausalLM).from_pretrained(source).eval()
        for parameter in self.model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        self.source, self.arguments = str(source), arguments
        self.syncs: list[dict[str, torch.Tensor]] = [{}]
        self.asked: list[tuple[list[list[int]], SamplingParams]] = []
        self.sampled: list[Sampled] = []
        self.made.append(self)

    def load_weights(self, weights) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            assert weight.shape == own[name].shape and name not in self.syncs[-1]
            self.syncs[-1][name] = weight.clone()
            own[name].data.copy_(weight)

    def end_of_sync(self) -> None:
        self.syncs.append({})

    @torch.no_grad()
    def answers(self, prompts: list[list[int]], params: SamplingParams) -> list[list[Sampled]]:
        assert (params.repetition_penalty, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
        self.asked.append((prompts, params))
        answers = [[self._one(prompt, params) for _ in range(params.n)] for prompt in prompts]
        self.sampled += [one for some in answers for one in some]
        return answers

    def _one(self, prompt: list[int], params: SamplingParams) -> Sampled:
        done = Sampled([])
        while len(done.token_ids) < params.max_tokens and done.token_ids[-1:] not in [
            [i] for i in params.stop_token_ids
        ]:
            logits = self.model(torch.tensor([prompt + done.token_ids])).logits[0, -1].float()
            biased = logits.clone()
            biased[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()))
            processed, whole = ((x / params.temperature).log_softmax(-1) for x in (biased, logits))
            token = int(torch.multinomial(processed.exp(), 1))
            done.token_ids.append(token)
            done.processed.append(processed[token].item())
            done.whole.append(whole[token].item())
        return done


class LLM(Engine):
    """The engine in the trainer's own process, `vllm_mode="colocate"`."""

    def __init__(self, model: str, **arguments: Any):
        super().__init__(model, **arguments)
        runner = SimpleNamespace(model=self)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def generate(self, prompts, sampling_params, use_tqdm) -> list[Any]:
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        answers = self.answers(rows, sampling_params)
        return [SimpleNamespace(prompt_token_ids=row, outputs=some) for row, some in zip(rows, answers, strict=True)]

    def reset_prefix_cache(self) -> None:
        self.end_of_sync()


class Client(Engine):
    """The client of a server that was started with the model `served`, `vllm_mode="server"`."""

    served: ClassVar[str]

    def __init__(self, base_url: str, **arguments: Any):
        super().__init__(self.served, base_url=base_url, **arguments)

    def init_communicator(self, device) -> None:
        pass

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata, named_params) -> None:
        sent = list(named_params)  # as they are packed there: nothing may change before all are sent
        assert metadata == [(name, str(w.dtype).removeprefix("torch."), list(w.shape)) for name, w in sent]
        self.load_weights(sent)

    def reset_prefix_cache(self) -> None:
        self.end_of_sync()

    def generate(self, prompts, features, structured_outputs_regex, generation_kwargs, **params) -> dict[str, Any]:
        assert features is structured_outputs_regex is None
        rows = self.answers(prompts, SamplingParams(**{**params, **generation_kwargs}))
        flat = [one for some in rows for one in some]
        logprobs = [[[value] for value in one.processed] for one in flat]
        return {"prompt_ids": prompts, "completion_ids": [one.token_ids for one in flat], "logprobs": logprobs}


def install(patch: pytest.MonkeyPatch, served: str) -> list[Engine]:
    """Put the stand-in where TRL looks for vLLM; returns the engines that are made."""
    for name in VARIABLES:
        patch.setenv(name, "")  # to be put back
        patch.delenv(name)
    for module in (vllm_generation, vllm_thinking):
        patch.setattr(module, "is_vllm_available", lambda: True)
    for name, kind in {"LLM": LLM, "SamplingParams": SamplingParams, "VLLMClient": Client}.items():
        patch.setattr(vllm_generation, name, kind, raising=False)
    patch.setattr(Engine, "made", [])
    patch.setattr(Client, "served", str(served), raising=False)
    return Engine.made
