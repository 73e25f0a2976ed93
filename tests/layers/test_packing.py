import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2rnn.layers import GRU, M2RNN, RNN, Packing
from m2rnn.ops.scan import operator as scan
from m2rnn.ops.vector_scan import operator as rnn

masks = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4)
)


@given(masks)
def test_mask_packs_the_real_tokens_in_order_and_pads_them_back(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    packing = Packing.from_mask(2 * mask.long())  # any number but 0
    grid = torch.arange(1.0, mask.numel() + 1).view_as(mask)[..., None]
    packed = packing.pack(grid)
    assert packed.flatten().tolist() == grid[mask].flatten().tolist()
    assert torch.equal(packing.pad(packed, -1), torch.where(mask[..., None], grid, -1))
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.lengths.tolist() == mask.sum(1).tolist()
    assert packing.sequence_ids.tolist() == mask.nonzero()[:, 0].tolist()
    for same in (packing, packing.aligned):
        assert torch.equal(same.starts, packing.cu_seqlens[packing.sequence_ids])


@given(masks)
def test_aligned_grid_holds_each_sequence_from_column_zero(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    packing = Packing.from_mask(mask)
    packed = torch.arange(1.0, int(mask.sum()) + 1)[None]
    aligned = packing.aligned
    expected = torch.nn.utils.rnn.pad_sequence(packed[0].split(mask.sum(1).tolist()), batch_first=True)
    assert torch.equal(aligned.pad(packed), expected)
    assert torch.equal(aligned.pack(aligned.pad(packed)), packed)
    assert aligned.aligned is aligned


def test_sequences_of_equal_length_are_a_grid_already() -> None:
    packing = Packing.from_cu_seqlens(torch.tensor([0, 3, 6]), 6)
    packed = torch.randn(1, 6, 2)
    assert packing.full
    assert packing.pad(packed).data_ptr() == packed.data_ptr()
    assert torch.equal(packing.pad(packed), packed.view(2, 3, 2))
    assert torch.equal(packing.pack(packing.pad(packed)), packed)
    for bounds in ([0, 2, 6], [0, 3, 6, 6], [0, 0], [0]):
        assert not Packing.from_cu_seqlens(torch.tensor(bounds), bounds[-1]).full


@pytest.mark.parametrize("bounds", [[0, 3], [1, 5], [0, 4, 3, 5], [0, 6], []])
def test_boundaries_that_do_not_cover_the_row_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match=r"rise from 0 to the number of tokens \(5\)"):
        Packing.from_cu_seqlens(torch.tensor(bounds, dtype=torch.int64), 5)


def test_other_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="vector of int32 or int64"):
        Packing.from_cu_seqlens(torch.tensor([0.0, 5.0]), 5)
    with pytest.raises(ValueError, match="padding mask"):
        Packing.from_mask(torch.ones(2, 1, 3, 3))


@pytest.mark.parametrize("mixer", [M2RNN, GRU, RNN])
def test_boundaries_are_checked_once_and_not_in_every_layer(mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host waits for each check."""
    checked = []
    for module in (scan, rnn):
        monkeypatch.setattr(module, "validate_offsets", lambda offsets, steps: checked.append(steps))
    packing = Packing.from_cu_seqlens(torch.tensor([0, 4, 6]), 6)
    layer = mixer(8, 2, 4)
    layer(torch.randn(1, 6, 8), packing=packing)
    assert checked == []


def test_packing_keeps_its_own_boundaries() -> None:
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    packing = Packing.from_cu_seqlens(bounds, 6)
    bounds[1] = 1
    assert packing.cu_seqlens.tolist() == [0, 3, 6]
