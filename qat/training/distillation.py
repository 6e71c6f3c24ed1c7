"""Distillation: a quantized model learns the float model's whole distribution, not one sampled token of it.

The gradient of the next-token loss carries the noise of the tokens that happened to be written, which moves weights
that rounding had placed well; the divergence from the float model is 0 where quantization changed nothing.
"""

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Logits of which float32 copies exist at one time: a vocabulary of 128k never meets all tokens at once."""


def divergence(student: Tensor, teacher: Tensor, known: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)), nats, mean over rows (arXiv 1503.02531, section 2).

    Computed in float32 a few rows at a time; what backward keeps is one tensor of the student's size and dtype.

    Args:
        student: (..., classes), floating logits; gradients flow into them.
        teacher: the same shape, any floating dtype.
        known: (...), bool; rows that count.  All by default.
        temperature: T; larger values weigh unlikely classes more.  T² keeps the gradient's size.

    Returns:
        A scalar, float32; 0 where no row counts.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student has logits {tuple(student.shape)} and the teacher {tuple(teacher.shape)}: distillation needs "
            "a teacher with the same classes (the same vocabulary, and padding of it)"
        )
    classes = student.shape[-1]
    rows = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if known is None else known
    return _Divergence.apply(student.reshape(-1, classes), teacher.reshape(-1, classes), rows.reshape(-1), temperature)


def hidden_error(student: Tensor, teacher: Tensor, known: Tensor | None = None) -> Tensor:
    """||student - teacher||² / ||teacher||² of each row, mean over rows: how far hidden states are from a teacher's.

    Hidden states are compared as in TinyBERT (arXiv 1909.10351, eq. 8; both have one width, so no W_h is learned), but
    relative to each row's own size: the few tokens that attention parks on have states hundreds of times larger than
    all others, and would be all that a plain mean sees.

    Args:
        student: (..., features), floating; gradients flow into it.
        teacher: the same shape, any floating dtype.
        known: (...), bool; rows that count.  All by default.

    Returns:
        A scalar, float32; 0 where no row counts.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student has hidden states {tuple(student.shape)} and the teacher {tuple(teacher.shape)}: comparing "
            "them needs a teacher of the same width (objective.hidden=0 compares logits alone)"
        )
    target = teacher.float()
    error = (student.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=1e-12)
    return error.mean() if known is None else (error * known).sum() / known.sum().clamp(min=1)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, known: Tensor, temperature: float) -> Tensor:
        weight = known.float() / known.sum().clamp(min=1)
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(student) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        at_once = max(CHUNK // student.shape[-1], 1)
        for start in range(0, len(student), at_once):
            part = slice(start, start + at_once)
            log_q = (student[part].float() / temperature).log_softmax(-1)
            log_p = (teacher[part].float() / temperature).log_softmax(-1)
            p = log_p.exp()
            total += torch.dot(weight[part], log_p.sub_(log_q).mul_(p).sum(-1))
            if grad is not None:  # d/dz T² KL = T (q - p)
                grad[part] = log_q.exp_().sub_(p).mul_(temperature * weight[part, None])
        ctx.save_for_backward(*([grad] if wanted else []))
        return total * temperature**2

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None, None
