"""Image classification: losses of images, and the embedded model."""

import pytest
import torch
from torch.nn import functional as F

from qat.data.digits import Digits
from qat.evaluation import evaluate
from qat.tasks.causal_lm import CausalLM
from qat.tasks.classification import ImageClassification
from qat.tasks.image_models import load, new_resnet


def test_an_image_is_one_label_of_one_document():
    task = ImageClassification(load("digits_cnn")[0], lr=0.0).eval()
    batch = next(iter(Digits().test_dataloader()))
    sums, logits = task.losses(batch), task(batch)
    assert float(sums.nll.mean()) == pytest.approx(float(F.cross_entropy(logits, batch["labels"])), rel=1e-6)
    assert torch.equal(sums.correct.bool(), logits.argmax(-1) == batch["labels"])
    assert sums.tokens.tolist() == [1] * 64 and sums.document.tolist() == list(range(64))


def test_the_embedded_classifier_knows_the_digits():
    data, task = Digits(), ImageClassification(load("digits_cnn")[0], lr=0.0)
    found = evaluate(task, data.test_dataloader(), losses=lambda module, batch: module.losses(batch))
    assert found.accuracy > 0.99 and len(found.nll) == len(data.split("test"))


def test_a_new_network_is_the_same_for_the_same_seed():
    sizes = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    one, other = (new_resnet("x", seed=1, **sizes)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "task,batch,message",
    [
        (ImageClassification, {"input_ids": torch.zeros(1, 2)}, "task=classification needs images.*data=digits"),
        (CausalLM, {"pixel_values": torch.zeros(1, 1, 8, 8)}, "task=causal_lm needs text.*data=python_stdlib"),
    ],
)
def test_data_of_another_task_is_refused(task, batch, message):
    with pytest.raises(ValueError, match=message):
        task(load("digits_cnn")[0], lr=0.0)(batch)


def test_a_model_that_reads_no_images_is_refused(tiny_llama):
    task = ImageClassification(tiny_llama(), lr=0.0)
    with pytest.raises(ValueError, match="an image classifier, and LlamaForCausalLM reads input_ids: model=digits_cnn"):
        task({"pixel_values": torch.zeros(1, 1, 8, 8)})


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"image model \./nowhere cannot be loaded"):
        load("./nowhere")
