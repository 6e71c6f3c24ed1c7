"""Where the norms and linear layers of a Llama-like decoder are, for methods that move factors from one to the next.

x ── input_layernorm ──▶ q, k, v;  attention(q, k) mixes tokens of v ──▶ o ── + x
x ── post_attention_layernorm ──▶ gate, up;  act(gate) * up ──▶ down ── + x
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# transformers' model types with exactly this block: plain RMSNorm (weight * x / rms(x)), no norm after a sublayer.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Pair:
    """A place where a positive factor for each feature can be moved without changing the function.

    Attributes:
        name: of the producer.
        producer: a norm, or a linear layer whose output rows reach the consumers' inputs by products only.
        consumers: linear layers, by name, whose inputs the producer makes.
        repeats: consecutive heads of the consumers' input that share one head of the producer (grouped queries).
        head: features a head.
    """

    name: str
    producer: nn.Module
    consumers: dict[str, nn.Linear]
    repeats: int = 1
    head: int = 1

    def shared(self, statistic: Tensor) -> Tensor:
        """The largest of `statistic` (in,) over the heads that share a producer's feature: (producer's out,)."""
        return statistic.unflatten(0, (-1, self.repeats, self.head)).amax(1).flatten()

    def spread(self, factor: Tensor) -> Tensor:
        """A factor of each producer's feature, for each of the consumers' inputs: (in,)."""
        return factor.unflatten(0, (-1, 1, self.head)).expand(-1, self.repeats, -1).flatten()

    @torch.no_grad()
    def fold(self, factor: Tensor) -> None:
        """Divide what is produced by `factor` (producer's out,), positive; multiply the consumers' columns by it."""
        _scale(self.producer.weight, 1 / factor, rows=True)  # type: ignore[arg-type]
        if getattr(self.producer, "bias", None) is not None:
            _scale(self.producer.bias, 1 / factor, rows=True)  # type: ignore[arg-type]
        for consumer in self.consumers.values():
            _scale(consumer.weight, self.spread(factor), rows=False)


def _scale(parameter: Tensor, factor: Tensor, rows: bool) -> None:
    shaped = factor[:, None] if rows and parameter.dim() == 2 else factor
    parameter.copy_(parameter.float() * shaped.to(parameter.device))


def find_pairs(block: nn.Module, names: tuple[str, ...]) -> list[Pair]:
    """The pairs of a decoder block, of those called `names`: qkv, o, gate_up, down.

    Args:
        block: a decoder layer of a `LLAMA_LIKE` model.
    """
    attention: Any = block.self_attn
    mlp: Any = block.mlp
    heads = {"repeats": attention.o_proj.in_features // attention.v_proj.out_features, "head": attention.head_dim}
    before: Any = block.input_layernorm
    after: Any = block.post_attention_layernorm
    qkv = {f"self_attn.{n}_proj": getattr(attention, f"{n}_proj") for n in "qkv"}
    found = {
        "qkv": Pair("input_layernorm", before, qkv),
        "o": Pair("self_attn.v_proj", attention.v_proj, {"self_attn.o_proj": attention.o_proj}, **heads),
        "gate_up": Pair(
            "post_attention_layernorm", after, {"mlp.gate_proj": mlp.gate_proj, "mlp.up_proj": mlp.up_proj}
        ),
        "down": Pair("mlp.up_proj", mlp.up_proj, {"mlp.down_proj": mlp.down_proj}),
    }
    return [found[name] for name in names]


def check_llama_like(method: str, model: nn.Module) -> None:
    """Refuse a model whose blocks are not those of a Llama.

    Raises:
        ValueError: names the model's type, and what else there is.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    decoder = getattr(model, "model", None)
    if kind not in LLAMA_LIKE or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(
            f"calibration {method} changes the weights of Llama-like models ({', '.join(LLAMA_LIKE)}) where they "
            f"cancel out, and this is {kind}: use calibration=gptq or calibration=weighted_mse"
        )
    for index, block in enumerate(decoder.layers):  # type: ignore[union-attr]
        for pair in find_pairs(block, ("qkv", "o", "gate_up", "down")):
            for name, layer in pair.consumers.items():
                if not isinstance(layer, nn.Linear):
                    raise ValueError(
                        f"calibration {method}: model.layers.{index}.{name} is a {type(layer).__name__}, not a "
                        "linear layer: use calibration=gptq or calibration=weighted_mse"
                    )
