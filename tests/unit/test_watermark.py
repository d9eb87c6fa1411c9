from hypothesis import given
from hypothesis import strategies as st

from ehub.watermark import Watermark


@given(xmin=st.integers(3, 50), length=st.integers(0, 50), data=st.data(), xid=st.integers(1, 120))
def test_sees_what_postgres_says_is_visible(xmin, length, data, xid):
    xmax = xmin + length
    running = data.draw(st.frozensets(st.integers(xmin, xmax - 1))) if length else frozenset()
    text = f"{xmin}:{xmax}:{','.join(map(str, sorted(running)))}"
    watermark = Watermark.parse(text)
    assert str(watermark) == text
    assert watermark.sees(xid) == (xid < xmin or (xid < xmax and xid not in running))
