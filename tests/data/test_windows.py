from itertools import islice

import pytest
import torch

from qat.data.windows import IGNORE, ResumableSampler, from_documents, from_pairs, from_stream


def test_labels_of_a_stream_are_the_next_tokens():
    cut = from_stream(torch.arange(11), 5)
    assert cut.input_ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert cut.labels.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert cut.attention_mask.all()
    assert cut.document.tolist() == [-1, -1]


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 0), (4, 0), (5, 0), (6, 1), (10, 1), (11, 2)])
def test_only_whole_windows_are_cut_and_each_label_exists(tokens, count):
    cut = from_stream(torch.arange(tokens), 5)
    assert len(cut) == count
    assert cut.input_ids.shape == cut.labels.shape == cut.attention_mask.shape == (count, 5)
    assert len(cut.document) == count


def test_windows_of_documents_never_cross_and_are_padded():
    documents = [[1, 2, 3, 4, 5, 6], [7, 8], [9], [], [10, 11, 12]]
    cut = from_documents(documents, 4, pad_id=99, most=None)
    # A document's last token is an input too: a real token, with nothing after it to predict.
    assert cut.input_ids.tolist() == [[1, 2, 3, 4], [5, 6, 99, 99], [7, 8, 99, 99], [10, 11, 12, 99]]
    assert cut.labels.tolist() == [
        [2, 3, 4, 5],
        [6, IGNORE, IGNORE, IGNORE],
        [8, IGNORE, IGNORE, IGNORE],
        [11, 12, IGNORE, IGNORE],
    ]
    assert torch.equal(cut.attention_mask, cut.input_ids != 99)
    assert cut.document.tolist() == [0, 0, 1, 4]


def test_every_token_but_the_first_of_a_document_is_predicted_once():
    documents = [list(range(100 * i, 100 * i + n)) for i, n in enumerate([1, 2, 7, 8, 9, 16, 17])]
    cut = from_documents(documents, 8, pad_id=0, most=None)
    predicted = cut.labels[cut.labels != IGNORE].tolist()
    assert predicted == [token for document in documents for token in document[1:]]


def test_at_most_so_many_windows_of_a_document():
    cut = from_documents([list(range(50)), [1, 2]], 4, pad_id=0, most=3)
    assert cut.document.tolist() == [0, 0, 0, 1]


def test_no_documents_are_no_windows():
    cut = from_documents([], 4, pad_id=0, most=None)
    assert len(cut) == 0
    assert cut.input_ids.shape == (0, 4)


def test_a_window_is_a_row_of_each_tensor():
    cut = from_pairs([([1, 2], [2, IGNORE])], [3], 3, pad_id=7)
    assert {k: v.tolist() for k, v in cut[0].items()} == {
        "input_ids": [1, 2, 7],
        "labels": [2, IGNORE, IGNORE],
        "attention_mask": [True, True, False],
        "document": 3,
    }


def batches(count, start=0, sizes=(10,), batch=4, seed=0, shares=None):
    return list(islice(ResumableSampler(list(sizes), batch, seed, shares, start), count))


@pytest.mark.parametrize("sizes", [(10,), (10, 7), (3, 100)], ids=str)
@pytest.mark.parametrize("start", [1, 5, 13])
def test_a_batch_is_the_same_wherever_a_run_starts(sizes, start):
    shares = None if len(sizes) == 1 else [0.3, 0.7]
    whole = batches(30, sizes=sizes, shares=shares)
    assert batches(30 - start, start, sizes=sizes, shares=shares) == whole[start:]


@pytest.mark.parametrize("size", [1, 4, 10, 13])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_every_window_appears_once_in_an_epoch(size, batch):
    flat = [i for b in batches(3 * size, sizes=(size,), batch=batch) for i in b]
    for epoch in range(3):
        assert sorted(flat[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    flat = [i for b in batches(10, sizes=(20,)) for i in b]
    assert flat[:20] != flat[20:40]
    assert batches(5, seed=1) != batches(5, seed=0)
    assert batches(5, seed=0) == batches(5, seed=0)


def test_each_source_has_its_share_and_its_own_epochs():
    flat = [i for b in batches(500, sizes=(10, 1000), batch=8, shares=[0.75, 0.25]) for i in b]
    first = [i for i in flat if i < 10]
    # Binomial, n = 4000: five standard deviations are 3.4 points.
    assert len(first) / len(flat) == pytest.approx(0.75, abs=0.035)
    for epoch in range(len(first) // 10):
        assert sorted(first[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    second = [i for i in flat if i >= 10]
    assert len(set(second[:1000])) == len(second[:1000])
    assert max(second) < 1010


def test_without_shares_sources_are_drawn_by_size():
    flat = [i for b in batches(500, sizes=(100, 300), batch=8) for i in b]
    assert sum(i < 100 for i in flat) / len(flat) == pytest.approx(0.25, abs=0.035)


def test_the_sampler_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    batches(3)
    assert torch.equal(torch.rand(1), expected)
