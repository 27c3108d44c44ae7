"""BAGEL's decoder: two streams of tokens through one stack of layers.

Shapes: B rows, H hidden size.
"""

from functools import partial

from torch import Tensor, nn
from transformers import Cache

from .attention import Layout, attend_streams
from .configuration import BagelConfig
from .layers import BagelLayer, BagelRMSNorm, head_size, rotary_tables


class BagelDecoder(nn.Module):
    def __init__(self, config: BagelConfig):
        super().__init__()
        llm = config.llm_config
        self.embed_tokens = nn.Embedding(llm.vocab_size, llm.hidden_size)
        self.layers = nn.ModuleList(BagelLayer(llm, i) for i in range(llm.num_hidden_layers))
        self.norm = BagelRMSNorm(llm.hidden_size, llm.rms_norm_eps)
        self.norm_moe_gen = BagelRMSNorm(llm.hidden_size, llm.rms_norm_eps)
        self.theta = llm.rope_parameters["rope_theta"]
        self.head_dim = head_size(llm)

    def forward(
        self,
        und: Tensor,
        gen: Tensor | None,
        positions_und: Tensor,
        positions_gen: Tensor | None,
        layout: Layout,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
        """
        Run both streams, (B, ., H) at rotary positions (B, .).

        Returns the normalised streams and every layer's keys and values of the contexts.
        """
        rotary_und = rotary_tables(positions_und, self.head_dim, self.theta, und.dtype)
        rotary_gen = None
        if gen is not None and positions_gen is not None:
            rotary_gen = rotary_tables(positions_gen, self.head_dim, self.theta, gen.dtype)
        keys, values = [], []
        attend = partial(attend_streams, layout=layout)  # FSDP would look for tensors in the table, at every layer
        for layer in self.layers:
            und, gen, k, v = layer(und, gen, rotary_und, rotary_gen, attend, past_key_values)
            keys.append(k)
            values.append(v)
        return self.norm(und), None if gen is None else self.norm_moe_gen(gen), keys, values

    def compile_layers(self, backend: str) -> None:
        for layer in self.layers:
            assert isinstance(layer, BagelLayer)
            layer.compiled = backend


class BagelLanguageModel(nn.Module):
    def __init__(self, config: BagelConfig):
        super().__init__()
        self.model = BagelDecoder(config)
        self.lm_head = nn.Linear(config.llm_config.hidden_size, config.llm_config.vocab_size, bias=False)
