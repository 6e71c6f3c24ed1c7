"""Next-token prediction for any transformers causal language model.  Knows nothing of quantization."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qat.data.windows import IGNORE
from qat.evaluation.losses import Losses
from qat.tasks.adamw import AdamWTask


class CausalLM(AdamWTask):
    """A causal language model: called with `input_ids` and `attention_mask` (batch, tokens), it gives `logits`.

    Raises:
        ValueError: from `forward`: the batch holds no text.
    """

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (batch, tokens, vocab)."""
        if "input_ids" not in batch:
            raise ValueError("task=causal_lm needs text, and this data has none: data=python_stdlib, text or chat")
        mask = batch["attention_mask"]
        # An all-true mask costs attention its fast path, and says nothing.
        return self.model(
            input_ids=batch["input_ids"], attention_mask=None if bool(mask.all()) else mask, use_cache=False
        ).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self(batch)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORE)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        """Sums of one batch, a window each: what every figure of a run is computed from."""
        labels = batch["labels"]
        logits = self(batch).float()
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
        known = labels != IGNORE
        correct = (logits.argmax(-1) == labels) & known
        return Losses(nll.double().sum(1), correct.double().sum(1), known.sum(1), batch["document"])
