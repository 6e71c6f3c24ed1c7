"""The history that reports plot."""

from digits import Classifier, digits, trainer

from qat.callbacks.history import TrainHistory


def test_a_step_of_several_batches_has_one_row():
    history = TrainHistory()
    run = trainer(history, steps=4, accumulate_grad_batches=3, log_every_n_steps=2)
    run.fit(Classifier(), digits()[0])
    assert [row["step"] for row in history.rows] == [2, 4]
