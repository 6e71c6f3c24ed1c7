"""Callbacks on language modules that are somebody else's: their batches, and how these run."""

import copy
from types import SimpleNamespace

import lightning as L
import torch
from digits import trainer
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from qat.callbacks import Distillation, QuantizationAwareTraining
from qat.callbacks.export import Export
from qat.insertion import layers, prepare
from qat.scheme import QuantSpec, uniform

W8A8 = uniform(QuantSpec(bits=8, granularity="channel"), QuantSpec(bits=8, granularity="tensor"), ignore=["*lm_head"])


class Language(L.LightningModule):
    """Is called with token ids, so `forward` of whole batches is its user's to say."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def run(module, batch):
    return module(batch["input_ids"], batch["attention_mask"])


def fit(tiny_llama, kind, *more):
    """A module after one step, calibrated on a batch of `kind` with padding, whose embedding is enormous."""
    model = tiny_llama()
    model.model.embed_tokens.weight.data[0] = 100.0
    ids = torch.randint(1, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    batch = kind({"input_ids": ids, "attention_mask": mask})
    loader = DataLoader([batch], batch_size=None)
    quantization = QuantizationAwareTraining(W8A8, submodule="model", calibration_loader=loader, forward=run)
    module = Language(model)
    trainer(quantization, *more, steps=1).fit(module, loader)
    return module


def test_padding_of_a_tokenizers_batch_never_moves_a_range(tiny_llama):
    scales = [
        {name: layer.input_quantizer.scale.detach() for name, layer in layers(fit(tiny_llama, kind)).items()}
        for kind in (dict, BatchEncoding)
    ]
    assert all(torch.equal(scales[0][name], scales[1][name]) for name in scales[0])


def test_an_export_runs_the_last_batch_as_its_user_said(tiny_llama, tmp_path):
    export = Export(tmp_path / "export")
    fit(tiny_llama, dict, export)
    assert export.exported is not None and (tmp_path / "export" / "model.safetensors").is_file()


def test_rotary_frequencies_keep_their_dtype_in_a_model_that_changes_it(tiny_llama):
    model = tiny_llama()
    exact = model.model.rotary_emb.inv_freq.clone()
    prepare(model, W8A8)
    twin = copy.deepcopy(model)
    model.to(torch.bfloat16)
    assert twin.lm_head.weight.dtype == torch.float32
    assert torch.equal(twin.to(torch.float16).model.rotary_emb.inv_freq, exact)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert model.to("meta").model.rotary_emb.inv_freq.device.type == "meta"


def test_a_teacher_in_bfloat16_keeps_its_rotary_frequencies(tiny_llama):
    teacher = tiny_llama()
    exact = teacher.model.rotary_emb.inv_freq.clone()
    distillation = Distillation(teacher=teacher, dtype="bfloat16")
    plugin = SimpleNamespace(convert_module=lambda module: module)
    distillation.on_fit_start(SimpleNamespace(precision_plugin=plugin), SimpleNamespace(device="cpu"))
    assert teacher.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(teacher.model.rotary_emb.inv_freq, exact)
