"""Token batches for a tiny Llama, and how calibrations run them."""

import torch
from torch import nn

from qat.fake_quantizer import token_mask
from qat.insertion import insert
from qat.scheme import QuantScheme, QuantSpec, SchemeMap

G32 = QuantScheme(weight=QuantSpec(bits=4, granularity="group", group_size=32))


def inserted(model: nn.Module, scheme: QuantScheme = G32, **rules) -> nn.Module:
    """`model` with fake quantizers everywhere but in its output layer, if it has one."""
    head = {"*lm_head": None} if hasattr(model, "lm_head") else {}
    insert(model, SchemeMap(name="test", rules=rules or {**head, "*": scheme}))
    return model


def batches(junk: int = 0, real: tuple[int, ...] = (24, 17)) -> list[dict[str, torch.Tensor]]:
    """Two batches of four windows of 24 tokens, as many of them real as `real` says; `junk` pads them."""
    generator, found = torch.Generator().manual_seed(3), []
    for count in real:
        ids = torch.randint(1, 256, (4, 24), generator=generator)
        mask = (torch.arange(24) < count).expand(4, 24)
        found.append({"input_ids": torch.where(mask, ids, junk), "attention_mask": mask})
    return found


def runner(model: nn.Module, data=None):
    """Runs the batches through `model`."""

    @torch.no_grad()
    def run() -> None:
        for batch in batches() if data is None else data:
            with token_mask(batch["attention_mask"]):
                model(**batch, use_cache=False)

    return run


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Of the first batch, which has no padding."""
    return model(**batches()[0], use_cache=False).logits
