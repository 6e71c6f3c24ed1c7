"""The divergence is the paper's, with the gradient that autograd finds, in pieces that fit."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qat.training import distillation, divergence, hidden_error


def logits(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def by_hand(student, teacher, known, temperature):
    """In float64, by torch's own kl_div."""
    q, p = ((x.double() / temperature).log_softmax(-1) for x in (student, teacher))
    rows = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return temperature**2 * rows[known].mean()


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22], ids=lambda n: f"chunk{n}")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_are_those_of_the_formula(temperature, chunk, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", chunk)
    teacher = logits(2, 7, 11, seed=1)
    known = torch.rand(2, 7, generator=torch.Generator().manual_seed(2)) > 0.3
    student, exact = (logits(2, 7, 11).requires_grad_() for _ in range(2))
    loss, expected = divergence(student, teacher, known, temperature), by_hand(exact, teacher, known, temperature)
    (3 * loss).backward()
    (3 * expected).backward()
    # float32 softmaxes of 11 classes: a few units in the last place of numbers around 1
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, exact.grad, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_count_have_no_gradient():
    student = logits(6, 11).requires_grad_()
    known = torch.tensor([True, False, True, True, False, True])
    divergence(student, logits(6, 11, seed=1), known).backward()
    assert (student.grad[~known] == 0).all()
    assert (student.grad[known].abs().sum(-1) > 0).all()


def test_a_model_that_equals_its_teacher_has_nothing_to_learn():
    student = logits(6, 11).requires_grad_()
    loss = divergence(student, logits(6, 11))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_no_row_that_counts_is_no_loss():
    student = logits(6, 11).requires_grad_()
    loss = divergence(student, logits(6, 11, seed=1), torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_the_gradient_has_the_dtype_of_the_logits():
    student = logits(6, 11, dtype=torch.bfloat16).requires_grad_()
    teacher = logits(6, 11, seed=1)
    loss = divergence(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    exact = student.detach().double().requires_grad_()
    by_hand(exact, teacher, slice(None), 1.0).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)  # bfloat16's rounding


class LargestFloat(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.largest = max(self.largest, result.numel())
        return result


def test_a_large_vocabulary_never_exists_in_float32_as_a_whole(monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK", 2000)
    student = logits(64, 500, dtype=torch.bfloat16).requires_grad_()
    teacher = logits(64, 500, seed=1, dtype=torch.bfloat16)
    with LargestFloat() as watch:
        divergence(student, teacher).backward()
    assert 0 < watch.largest <= 2000


def test_a_teacher_with_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"student has logits \(6, 11\) and the teacher \(6, 12\).*same vocabulary"):
        divergence(logits(6, 11), logits(6, 12))


def test_hidden_states_are_compared_row_by_row_whatever_their_size():
    """A row a thousand times larger counts like any other, and unknown rows not at all."""
    teacher = torch.tensor([[3.0, 4.0], [3000.0, 4000.0], [1.0, 0.0]])
    student = (teacher + torch.tensor([[0.0, 5.0], [0.0, 2500.0], [9.0, 9.0]])).requires_grad_()
    error = hidden_error(student, teacher, torch.tensor([True, True, False]))
    error.backward()
    assert error == (1.0 + 0.25) / 2
    # d/ds of ||s - t||^2 / ||t||^2, halved by the mean over two rows
    torch.testing.assert_close(student.grad, torch.tensor([[0.0, 0.2], [0.0, 1e-4], [0.0, 0.0]]))
    assert hidden_error(teacher, teacher) == 0
    with pytest.raises(ValueError, match="same width"):
        hidden_error(teacher, teacher[:, :1])
