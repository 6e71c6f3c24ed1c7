"""Distillation works on somebody else's LightningModule, which has never heard of a teacher."""

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from digits import Classifier, LateClassifier, digits, int4, trainer
from torch import nn
from torch.nn import functional as F

from qat.calibration import Rotation
from qat.callbacks import Distillation
from qat.callbacks.distillation import _known
from qat.fake_quantizer import Stage
from qat.insertion import set_stage
from qat.training import divergence, hidden_error

LOADERS = digits()


def distillation(weight: float = 1.0, **settings) -> Distillation:
    return Distillation(weight, submodule="network", **settings)


def fitted(*callbacks, module=None, **settings):
    module = Classifier() if module is None else module
    trainer(*callbacks, **settings).fit(module, LOADERS[0])
    return module


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, value), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, twin), name


class ByHand(Classifier):
    """What the callback does, written into the module."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight, self.taught = weight, [copy.deepcopy(self.network)]

    def training_step(self, batch, batch_idx):
        student = self(batch[0])
        with torch.no_grad():
            teacher = self.taught[0](batch[0])
        kl = divergence(student, teacher)
        if self.weight == 1:
            return kl
        return (1 - self.weight) * F.cross_entropy(student, batch[1]) + self.weight * kl


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_module_trains_as_if_the_loss_were_written_into_it(weight):
    assert_same_weights(fitted(distillation(weight), int4()), fitted(int4(), module=ByHand(weight)))


def test_a_module_that_builds_its_model_late_is_taught_by_it_all_the_same():
    late = fitted(distillation(), int4(), module=LateClassifier())
    assert_same_weights(late, fitted(distillation(), int4()))


def test_weight_zero_is_the_modules_own_training():
    callback = distillation(0.0)
    assert_same_weights(fitted(callback, int4()), fitted(int4()))
    assert callback.teacher is None


def test_the_teacher_is_the_float_model_and_stays_so():
    callback = distillation()
    fitted(callback, int4())
    assert_same_weights(callback.teacher, Classifier().network)
    assert not callback.teacher.training
    assert not any(p.requires_grad for p in callback.teacher.parameters())


def test_the_teacher_is_not_in_a_checkpoint(tmp_path):
    with_teacher, without = trainer(distillation(), int4()), trainer(int4())
    for name, run in (("with", with_teacher), ("without", without)):
        run.fit(Classifier(), LOADERS[0])
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    states = [torch.load(tmp_path / f"{name}.ckpt", weights_only=False) for name in ("with", "without")]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert (tmp_path / "with.ckpt").stat().st_size < 1.1 * (tmp_path / "without.ckpt").stat().st_size


def test_a_distilled_model_is_nearer_to_the_float_model_than_one_trained_on_labels():
    teacher, images = Classifier().network, LOADERS[1].dataset.tensors[0]
    distances = []
    for callbacks in ([distillation(), int4()], [int4()]):
        module = fitted(*callbacks, steps=40)
        set_stage(module, Stage.FROZEN)
        with torch.no_grad():
            distances.append(divergence(module(images), teacher(images)))
    assert distances[0] < 0.1 * distances[1]


def test_another_model_can_be_the_teacher():
    torch.manual_seed(1)
    larger = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()
    before = copy.deepcopy(larger)
    callback = distillation(teacher=larger, dtype="float64")
    fitted(callback, int4())
    assert callback.teacher is larger
    assert_same_weights(larger, before)


def test_a_step_that_returns_a_dict_keeps_its_other_entries():
    seen = []

    class Dict(Classifier):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "size": len(batch[0])}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(outputs)

    assert_same_weights(fitted(distillation(), int4(), module=Dict()), fitted(distillation(), int4()))
    assert seen[0]["size"] == 64


def test_the_module_is_itself_again_after_the_fit():
    module = fitted(distillation(), int4())
    assert not {"training_step", "configure_model"} & module.__dict__.keys()
    assert not module.network._forward_hooks


class Blocks(Classifier):
    """Its network is a chain of blocks and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = Chain()


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class BlocksByHand(Blocks):
    """What hidden=2 adds, written into the module."""

    def __init__(self):
        super().__init__()
        self.taught = [copy.deepcopy(self.network)]

    def training_step(self, batch, batch_idx):
        student, teacher, total = batch[0], batch[0], 0.0
        for ours, theirs in zip(self.network.blocks, self.taught[0].blocks, strict=True):
            student = ours(student)
            with torch.no_grad():
                teacher = theirs(teacher)
            total = total + hidden_error(student, teacher)
        with torch.no_grad():
            teacher = self.taught[0].head(teacher)
        return divergence(self.network.head(student), teacher) + 2 * (total / 2)


def test_hidden_states_join_the_loss_as_if_they_were_written_into_it():
    int4_but_head = int4(ignore=("*head",))
    ours = fitted(distillation(hidden=2.0), int4_but_head, module=Blocks())
    assert_same_weights(ours, fitted(int4(ignore=("*head",)), module=BlocksByHand()))
    plain = fitted(distillation(), int4(ignore=("*head",)), module=Blocks())
    assert not torch.equal(ours.network.head.weight, plain.network.head.weight)
    assert not any(m._forward_hooks for m in ours.modules())


def test_hidden_states_may_join_the_modules_own_loss():
    both = fitted(distillation(0.0, hidden=1.0), int4(ignore=("*head",)), module=Blocks())
    own = fitted(int4(ignore=("*head",)), module=Blocks())
    assert not torch.equal(both.network.blocks[0][0].weight, own.network.blocks[0][0].weight)
    assert not torch.equal(both.network.head.weight, Blocks().network.head.weight)  # which hidden states say nothing of


def test_rows_without_a_label_and_padding_do_not_count():
    logits, labels = torch.zeros(2, 3, 5), torch.tensor([[1, -100, 2], [-100, -100, 4]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert _known({"labels": labels}, {"attention_mask": mask}, logits, nn.Identity()).equal(labels != -100)
    assert _known({"tokens": labels}, {"attention_mask": mask}, logits, nn.Identity()).equal(mask.bool())
    assert _known([labels], {}, logits, nn.Identity()) is None


def test_labels_that_a_transformers_model_shifts_itself_count_for_the_logits_before_them(tiny_llama):
    model = tiny_llama()
    ids = torch.arange(10).reshape(2, 5)
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]]).bool(), -100)
    logits = model(input_ids=ids).logits.detach().requires_grad_()
    model.loss_function(logits, labels, vocab_size=256).backward()
    counted = logits.grad.abs().sum(-1) > 0  # by the model's own loss
    assert _known({"labels": labels}, {"labels": labels}, logits, model).equal(counted)
    assert _known({"labels": labels}, {}, logits, model).equal(labels != -100)  # shifted before


class Sees(Classifier):
    """Calls its network as often as it is told."""

    calls = 2

    def training_step(self, batch, batch_idx):
        return sum(self(batch[0]).square().mean() for _ in range(self.calls))


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Odd(nn.Module):
    def forward(self, x):
        return {"scores": x}


def refused(*callbacks, module=None):
    with pytest.raises(ValueError) as caught:
        fitted(*callbacks, module=module)
    return str(caught.value)


def test_what_cannot_be_distilled_is_refused_with_the_remedy():
    assert "put Distillation before QuantizationAwareTraining" in refused(int4(), distillation())
    assert "called network 2 times" in refused(distillation(), int4(), module=Sees())
    assert "optimizes manually" in refused(distillation(), int4(), module=Manual())
    assert "until step 3 the model is its own teacher" in refused(distillation(), int4(start_step=3))
    assert "an object with logits" in refused(distillation(teacher=nn.Sequential(nn.Linear(64, 10), Odd())), int4())
    assert "same vocabulary" in refused(distillation(teacher=nn.Linear(64, 9)), int4())
    assert "no chain of blocks" in refused(distillation(hidden=1.0), int4())
    other = distillation(hidden=1.0, teacher=nn.Linear(64, 10))
    assert "the teacher has no blocks.0" in refused(other, int4(ignore=("*head",)), module=Blocks())


@pytest.mark.parametrize(
    "settings",
    [{"weight": 1.5}, {"weight": -0.1}, {"temperature": 0.0}, {"temperature": float("inf")}, {"submodule": ""},
     {"dtype": "float31"}, {"hidden": -1.0}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"distillation|hidden states"):
        Distillation(**settings)


def sized(vocabulary: int) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(vocab_size=vocabulary)
    return model


def test_another_vocabulary_is_refused_before_anything_runs():
    module = L.LightningModule()
    module.model = sized(100)
    with pytest.raises(ValueError, match="100 tokens and the teacher 99"):
        Distillation(teacher=sized(99)).check(module, int4())
    with pytest.raises(ValueError, match="nothing is quantized"):
        Distillation().check(module, None, quantizes=False)
    Distillation(weight=0.0).check(module, None, quantizes=False)


def test_hidden_states_of_a_rotated_model_are_not_compared():
    rotated = int4()
    rotated.calibration = Rotation("rotation, gptq")
    distillation(hidden=0.0).check(Classifier(), rotated)
    with pytest.raises(ValueError, match=r"rotation, gptq rotates what the blocks hand on.*objective\.hidden=0"):
        distillation(hidden=0.1).check(Classifier(), rotated)


def test_a_mixture_may_start_in_float():
    module = fitted(distillation(0.5), int4(start_step=6))
    insert_free = fitted(int4(start_step=6))
    assert not torch.equal(module.network[0].weight, insert_free.network[0].weight)
