"""Convolutions: batch norms folded, channels quantized, trained, exported and loaded again."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification

from qat.calibration import CALIBRATIONS
from qat.callbacks import Export, QuantizationAwareTraining
from qat.estimators import LSQ
from qat.export import export, record
from qat.fake_quantizer import Stage
from qat.inference import load_packed
from qat.insertion import insert, layers, prepare, set_stage
from qat.nn import FakeQuantConv2d
from qat.scheme import QuantScheme, QuantSpec, uniform
from qat.structure import fold_batch_norms

IMAGES = torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)
STATIC = QuantSpec(bits=8, granularity="tensor")
PER_IMAGE = QuantSpec(bits=8, granularity="token", dynamic=True)


def resnet() -> nn.Module:
    """transformers' own, tiny, with batch statistics that are no longer 0 and 1."""
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=10
    )
    model = ResNetForImageClassification(config)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.momentum = 0.5
    with torch.no_grad():
        for _ in range(3):
            model.train()(IMAGES)
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_folding_batch_norms_keeps_the_function_to_rounding():
    model = resnet()
    with torch.no_grad():
        before = model(IMAGES).logits
        fold_batch_norms(model)
        assert norms(model) == 0
        after = model(IMAGES).logits
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())


def test_only_norms_behind_quantized_convolutions_are_folded():
    model = resnet()
    prepare(model, uniform(QuantSpec(bits=8, granularity="channel")))
    assert norms(model) == norms(resnet()) > 5
    prepare(model, uniform(QuantSpec(bits=8, granularity="channel"), ignore=["*embedder*"], kinds=["conv"]))
    assert norms(model) == 1


@pytest.mark.parametrize("calibration", ["absmax", "weighted_mse", "gptq"])
@pytest.mark.parametrize("inputs", [None, STATIC, PER_IMAGE], ids=["float", "static", "per-image"])
def test_a_convolutional_network_goes_the_whole_way(inputs, calibration, tmp_path):
    model, schemes = resnet(), uniform(QuantSpec(bits=8, granularity="channel"), inputs, kinds=("linear", "conv"))
    prepare(model, schemes)
    insert(model, schemes)
    CALIBRATIONS[calibration](model, torch.no_grad()(lambda: model(IMAGES)))
    set_stage(model, Stage.TRAIN)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.01)
    for _ in range(2):  # after GPTQ the weights are on the grid, and scales have no gradient
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES).logits, LABELS).backward()
        optimizer.step()
    for name, layer in layers(model).items():
        for scale in [q.scale for q in layer.quantizers if q.scale is not None]:
            assert layer.weight.grad.abs().sum() > 0 and scale.grad.abs().sum() > 0, name
    with torch.no_grad(), record(model) as recorded:
        logits = model(IMAGES).logits
    assert len(export(model, recorded, tmp_path / "m").layers) == len(layers(model)) > 8
    packed, _ = load_packed(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(packed(IMAGES).logits, logits)


def test_a_packed_network_without_a_parameter_runs_on_every_backend(tmp_path, monkeypatch):
    monkeypatch.setattr("qat.inference.load.use_cpu_kernels", lambda model, dtype: None)  # compiling takes too long
    model, schemes = resnet(), uniform(QuantSpec(bits=8, granularity="channel"), kinds=("linear", "conv"))
    prepare(model, schemes)
    insert(model, schemes)
    CALIBRATIONS["absmax"](model, lambda: None)
    set_stage(model, Stage.FROZEN)
    with torch.no_grad(), record(model) as recorded:
        logits = model(IMAGES).logits
    export(model, recorded, tmp_path / "m")
    for backend in ("cpu", "auto", "torch"):
        packed, _ = load_packed(tmp_path / "m", backend=backend)
        assert not list(packed.parameters())
        with torch.no_grad():
            torch.testing.assert_close(packed(IMAGES).logits, logits)


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_convolution_is_its_matrix_times_its_rows(padding, mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=padding, padding_mode=mode, dilation=2).double()
    images = torch.randn(2, 3, 9, 8).double()
    before = conv(images)
    layer = FakeQuantConv2d.adopt(conv, QuantScheme.parse("w8a16-channel"), LSQ())
    product = layer.rows(images) @ layer.matrix.T + layer.bias
    torch.testing.assert_close(product.transpose(1, 2).reshape(before.shape), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer(images), before)


def test_a_grouped_convolution_takes_ranges_and_refuses_what_needs_one_matrix():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), torch.randn(2, 4, 6, 6)
    insert(model, uniform(QuantSpec(bits=8, granularity="channel"), kinds=("conv",)))
    CALIBRATIONS["mse"](model, lambda: None)
    with pytest.raises(ValueError, match=r"grouped convolution; calibrate by ranges .*calibration=mse"):
        CALIBRATIONS["gptq"](model, torch.no_grad()(lambda: model(images)))


def test_a_channels_last_convolution_is_written_through_its_matrix():
    layer = nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    insert(model, uniform(QuantSpec(bits=8, granularity="channel"), kinds=("conv",)))
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.matrix.zero_()
    assert not layer.weight.any()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_export_leaves_the_statistics_of_float_batch_norms_as_they_were_measured(precision, tmp_path):
    class Images(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = resnet()

        def forward(self, images):
            return self.model(images).logits

        def training_step(self, images, batch_idx):
            return F.cross_entropy(self(images), LABELS)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

        def on_train_end(self):  # after all callbacks'
            self.after = {name: b.clone() for name, b in self.model.named_buffers() if "running" in name}

    class Before(L.Callback):
        def on_train_end(self, trainer, pl_module):
            self.seen = {name: b.clone() for name, b in pl_module.model.named_buffers() if "running" in name}

    schemes = uniform(QuantSpec(bits=8, granularity="channel"), ignore=["*embedder*"], kinds=["conv"])
    before, module = Before(), Images()
    callbacks = [QuantizationAwareTraining(schemes, submodule="model"), before, Export(tmp_path / "export")]
    L.Trainer(
        max_steps=2, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, precision=precision,
    ).fit(module, DataLoader(IMAGES, batch_size=6))  # fmt: skip
    assert before.seen and all(torch.equal(before.seen[name], module.after[name]) for name in before.seen)


def test_a_norm_is_folded_by_where_it_is_called_and_not_by_where_it_is_written(caplog):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
            self.bn1, self.bn2, self.twice = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = self.conv2(x)
            return self.bn2(x) + self.twice(F.relu(x))

    class Opaque(Block):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    for kind, left in ((Block, 2), (Opaque, 3)):
        torch.manual_seed(0)
        model = kind()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean)
        with torch.no_grad():
            before = model.eval()(IMAGES)
            fold_batch_norms(model)
            torch.testing.assert_close(model(IMAGES), before, rtol=1e-5, atol=1e-5)
        assert norms(model) == left  # what conv2 gives has another reader
    assert "batch norms stay, where their inputs come from cannot be traced" in caplog.text
