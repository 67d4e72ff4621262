import pytest
import torch

from linnet.ops.documents import check_offsets, document_bounds


def test_bounds_are_start_and_stop_of_each_document():
    assert document_bounds(torch.tensor([0, 3, 3, 7]), 7) == [(0, 3), (3, 3), (3, 7)]
    assert document_bounds(torch.tensor([0]), 0) == []


@pytest.mark.parametrize("offsets", [[1, 7], [0, 6], [0, 8], [0, 5, 4, 7], [-1, 7]])
def test_wrong_offsets_are_refused(offsets):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        document_bounds(torch.tensor(offsets), 7)


@pytest.mark.parametrize(
    ("offsets", "batch_size"),
    [
        (torch.tensor(3), 1),
        (torch.tensor([], dtype=torch.int64), 1),
        (torch.tensor([True, False]), 1),
        (torch.tensor([0, 3], dtype=torch.int16), 1),
        (torch.tensor([0, 3]), 2),
    ],
    ids=["scalar", "empty", "bool", "int16", "batch_of_two"],
)
def test_wrong_kinds_of_offsets_are_refused(offsets, batch_size):
    with pytest.raises(ValueError, match="cu_seqlens"):
        check_offsets(offsets, batch_size)
