import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ehub.binary import COPY_HEADER, COPY_TRAILER, decode_rows, decode_vector, encode_rows

KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(st.data())
def test_rows_are_encoded_as_the_format_says(data):
    keys = data.draw(st.lists(KEYS, min_size=1, max_size=5))
    dims = data.draw(st.integers(1, 4))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    vectors = data.draw(hnp.arrays(np.float32, (len(keys), dims), elements=finite))
    metadata = data.draw(
        st.lists(st.none() | st.just('{"é": 1}'), min_size=len(keys), max_size=len(keys))
    )
    block = encode_rows(keys, vectors, metadata)
    for key, vector, note in zip(keys, vectors, metadata, strict=True):
        fields = []
        (count,) = struct.unpack_from(">h", block)
        block = block[2:]
        for _ in range(count):
            (size,) = struct.unpack_from(">i", block)
            block = block[4:]
            fields.append(None if size < 0 else block[:size])
            block = block[max(size, 0) :]
        assert fields[0] == key.encode()
        assert decode_vector(fields[1]).tobytes() == vector.tobytes()
        assert fields[2] == (None if note is None else b"\x01" + note.encode())
    assert block == b""


def test_rows_are_decoded_in_batches_without_header_and_trailer():
    vectors = np.arange(10_000, dtype=np.float32).reshape(5000, 2)
    messages = [
        struct.pack(">hiHH2fi", 2, 12, 2, 0, *vector, len(name)) + name
        for name, vector in ((f"ключ {i}".encode(), v) for i, v in enumerate(vectors))
    ]
    messages[0] = COPY_HEADER + messages[0]
    batches = list(decode_rows([*messages, COPY_TRAILER], 2))
    assert len(batches) == 2
    assert [key for keys, _ in batches for key in keys] == [f"ключ {i}" for i in range(5000)]
    assert np.array_equal(np.vstack([part for _, part in batches]), vectors)


def test_an_empty_table_has_no_rows():
    assert list(decode_rows([COPY_HEADER + COPY_TRAILER], 3)) == []
    assert list(decode_rows([COPY_HEADER, COPY_TRAILER], 3)) == []
