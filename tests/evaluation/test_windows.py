"""Windows score every token but the first of a document once, and see what they should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2rnn.evaluation.windows import packed, sliding, whole

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def seen_by(windows):
    """For each scored token, where its window starts; fails if a token is scored twice."""
    found = {}
    for start, first, stop in zip(windows.start, windows.first, windows.stop, strict=True):
        assert start < first < stop
        for token in range(first, stop):
            assert token not in found
            found[token] = int(start)
    return found


def tokens_after_the_first(ends):
    begins = [0, *ends[:-1]]
    return {token: begin for begin, end in zip(begins, ends, strict=True) for token in range(begin + 1, end)}


@given(lengths, st.integers(2, 20), st.integers(1, 20))
def test_a_sliding_window_is_the_first_one_that_reaches_a_token(lengths, context, stride):
    stride, ends = min(stride, context), np.cumsum(lengths)
    found = seen_by(sliding(ends, context, stride))
    begins = tokens_after_the_first(ends)
    assert found.keys() == begins.keys()
    for token, begin in begins.items():
        reaching = [s for s in range(begin, token, stride) if token - s <= context]
        assert found[token] == reaching[0]


@given(lengths, st.integers(2, 20))
def test_packed_windows_start_with_documents_and_cuts(lengths, context):
    ends = np.cumsum(lengths)
    found = seen_by(packed(ends, context))
    begins = tokens_after_the_first(ends)
    assert found.keys() == begins.keys()
    for token, begin in begins.items():
        assert found[token] == max(begin, (token - 1) // context * context)


@given(lengths, st.integers(1, 20))
def test_whole_windows_all_read_the_same_number_of_tokens(lengths, length):
    ends = np.cumsum(lengths)
    windows = whole(ends, length)
    assert seen_by(windows).keys() <= tokens_after_the_first(ends).keys()
    assert len(windows) == sum((n - 1) // length for n in lengths)
    assert (windows.stop - windows.start == length + 1).all()


def test_one_window_holds_a_document_if_the_context_does():
    windows = sliding(np.array([5, 6, 14]), 8, 8)
    assert windows.start.tolist() == [0, 6]
    assert windows.stop.tolist() == [5, 14]
    assert (windows.num_scored, windows.num_read) == (11, 11)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_beyond_the_context_is_an_error(stride):
    with pytest.raises(ValueError, match=f"stride {stride}: expected 1 to the context, which is 8"):
        sliding(np.array([5]), 8, stride)
