import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from qat.evaluation import Losses, evaluate
from qat.evaluation.losses import by_document, to_device


def part(nll, correct, tokens, document) -> Losses:
    return Losses(
        torch.tensor(nll, dtype=torch.float64),
        torch.tensor(correct, dtype=torch.float64),
        torch.tensor(tokens),
        torch.tensor(document),
    )


PARTS = [part([1.5, 2.0], [1, 0], [2, 1], [0, 2]), part([4.0, 0.5], [3, 1], [4, 1], [2, 1])]


class Module(nn.Module):
    """Answers with prepared losses, and remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.calls = []

    def losses(self, batch):
        self.calls.append((self.training, torch.is_grad_enabled(), batch))
        return PARTS[batch["index"]]


def loader():
    return [{"index": 0}, {"index": 1}]


def test_windows_are_summed_by_document():
    result = evaluate(Module(), loader())
    assert result.nll.tolist() == [1.5, 0.5, 6.0]
    assert result.correct.tolist() == [1, 1, 3]
    assert result.tokens.tolist() == [2, 1, 5]


def test_loss_perplexity_and_accuracy_are_per_token():
    result = evaluate(Module(), loader())
    assert result.loss == 1.0
    assert result.perplexity == math.e
    assert result.accuracy == 5 / 8


def test_the_order_of_batches_does_not_matter():
    a, b = by_document(PARTS), by_document(PARTS[::-1])
    assert a.nll.tolist() == b.nll.tolist()
    assert a.tokens.tolist() == b.tokens.tolist()


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_mode_without_gradients_and_back(training):
    module = Module().train(training)
    evaluate(module, loader())
    assert [call[:2] for call in module.calls] == [(False, False)] * 2
    assert module.training is training


def test_the_training_flag_comes_back_after_an_error():
    module = Module()
    with pytest.raises(IndexError):
        evaluate(module, [{"index": 7}])
    assert module.training


def test_the_context_is_entered_around_every_batch():
    events = []

    @contextmanager
    def context():
        events.append("in")
        yield
        events.append("out")

    evaluate(Module(), loader(), context=context)
    assert events == ["in", "out"] * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_with_how_many(bad):
    with pytest.raises(ValueError, match="the loss of 1 of 3 documents is NaN or infinite"):
        by_document([*PARTS, part([bad], [0], [1], [1])])


@pytest.mark.parametrize("parts", [[], [part([0.0], [0], [0], [0])]], ids=["no batch", "no label"])
def test_data_without_a_label_is_refused(parts):
    with pytest.raises(ValueError, match="no token of the evaluation data has a label"):
        by_document(parts)


def test_windows_that_span_documents_are_refused():
    with pytest.raises(ValueError, match="a window of the evaluation data spans documents"):
        by_document([part([1.0, 1.0], [0, 0], [1, 1], [0, -1])])


def test_an_unknown_accuracy_stays_unknown():
    result = by_document([part([1.0], [math.nan], [1], [0])])
    assert math.isnan(result.accuracy)
    assert result.loss == 1


def test_tensors_at_any_depth_move_and_the_rest_stays():
    module = nn.Linear(1, 1, device="meta")
    moved = to_device({"a": [torch.zeros(1), 3], "b": (torch.zeros(2), "x")}, module)
    assert moved["a"][0].device.type == moved["b"][0].device.type == "meta"
    assert (moved["a"][1], moved["b"][1]) == (3, "x")


def test_sums_are_kept_in_float64():
    many = [part([1.0], [0], [1], [0])] + [part([2.0**-30], [0], [1], [0]) for _ in range(4)]
    assert by_document(many).nll.dtype == np.float64
    assert by_document(many).nll[0] == 1 + 2.0**-28


def test_a_tokenizers_batch_moves_and_stays_one():
    module = nn.Linear(1, 1, device="meta")
    moved = to_device(BatchEncoding({"input_ids": torch.zeros(1, 2)}), module)
    assert type(moved) is BatchEncoding and moved.input_ids.device.type == "meta"


def test_a_module_without_a_parameter_has_its_batch_where_its_buffers_are():
    module = nn.Module()
    module.register_buffer("packed", torch.zeros(1, device="meta"))
    assert to_device({"a": torch.zeros(1)}, module)["a"].device.type == "meta"
