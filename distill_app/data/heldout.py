"""The texts of a held-out split as they are compared, many at a time."""

from typing import TYPE_CHECKING

import numpy as np

from distill_app.core.texts import FOLDS, normalise

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN, HELDOUT = 1, 2  # the sides
_ASCII_FOLDS = np.array(
    [0, *(ord(FOLDS[code]) for code in map(ord, map(str.lower, map(chr, range(1, 128)))))]
)
_ASCII_FOLDS = _ASCII_FOLDS.astype(np.uint8)
BLANK = ord(" ")


def normalise_all(texts: "pa.Array") -> "pa.Array":
    """Return each text as `normalise` does, hundreds of times as fast where all are ASCII without NUL.

    Args:
        texts: an Arrow array of texts, none of them null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    end, nothing = (pa.scalar(mark, pa.large_string()) for mark in ("\0", ""))
    ended = pc.binary_join_element_wise(texts.cast(pa.large_string()), end, nothing)
    starts = np.frombuffer(ended.buffers()[1], np.int64)[ended.offset :]
    letters = np.frombuffer(ended.buffers()[2], np.uint8)[starts[0] : starts[len(ended)]]
    if len(letters) == 0 or letters.max() > 127 or np.count_nonzero(letters == 0) > len(texts):
        return pa.array([normalise(text) for text in texts.to_pylist()], pa.large_string())
    letters = _ASCII_FOLDS[letters]
    gap = letters <= BLANK  # a blank, or a text's end
    letters = letters[~(gap & (letters == BLANK) & np.concatenate([[True], gap[:-1]]))]
    letters = letters[~((letters == BLANK) & np.append(letters[1:] == 0, False))]
    ends = np.flatnonzero(letters == 0)
    kept = letters[letters != 0]
    offsets = np.concatenate([[0], ends - np.arange(len(ends))])
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(kept))
