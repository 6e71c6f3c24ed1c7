"""A resumed fit sees the batches that the stopped one would have seen next."""

import lightning as L
import pytest
import torch

from qat.data.documents import python_stdlib
from qat.data.language import LanguageData
from qat.tasks.causal_lm import CausalLM
from qat.tasks.models import new_llama


class Seen(L.Callback):
    def __init__(self, stop=None, path=None):
        self.batches, self.stop, self.path = [], stop, path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch["input_ids"].clone())

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.fixture(scope="module")
def documents():
    return sorted(python_stdlib(), key=lambda d: len(d.text))[60:140]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_fit_goes_on_with_the_next_batch(documents, tmp_path, accumulate):
    def fit(seen, ckpt_path=None):
        model, tokenizer = new_llama(
            "tiny", documents, 300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )  # fmt: skip
        data = LanguageData(documents, "few", seq_len=32, batch_size=2)
        data.tokenizer = tokenizer
        trainer = L.Trainer(
            accelerator="cpu", max_steps=6, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[seen],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(CausalLM(model, lr=1e-3), data, ckpt_path=ckpt_path, weights_only=False)

    whole, first, second = Seen(), Seen(stop=4, path=tmp_path / "x.ckpt"), Seen()
    fit(whole)
    fit(first)
    fit(second, ckpt_path=tmp_path / "x.ckpt")
    assert len(first.batches) == 4 * accumulate
    together = first.batches + second.batches
    assert len(together) == len(whole.batches)
    assert all(torch.equal(a, b) for a, b in zip(together, whole.batches, strict=True))
    assert not torch.equal(whole.batches[0], whole.batches[4])
