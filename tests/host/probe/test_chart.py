"""The picture of a record: where its parts, its peak and the card's size are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pack.nodes.probe import chart
from pack.tests.probe.test_chart import BLANK, RECORDS

pytestmark = pytest.mark.usefixtures("host")


def drawn(record: Any) -> np.ndarray:
    from pack.nodes.host.probe.chart import draw

    picture = draw(record)
    assert picture.shape == (1, 420, 960, 3)
    return (picture[0] * 255).round().to(int).numpy()


def rows_of(picture: np.ndarray, colour: str, column: int) -> list[int]:
    """The rows in which a column of the picture has that colour, from the top."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return list(np.flatnonzero((picture[:, column] == wanted).all(-1)))


@pytest.mark.parametrize("name", ["rising", "flat", "one moment"])
def test_the_parts_lie_one_on_the_other_in_the_order_of_the_page(name):
    picture = drawn(RECORDS[name])
    parts = [rows_of(picture, chart.STACK[part], 700) for part in chart.STACK]
    seen = [rows for rows in parts if rows]
    assert len(seen) >= 2
    for lower, upper in itertools.pairwise(seen):
        assert max(upper) < min(lower)


def test_the_cards_size_is_a_line_only_where_it_does_not_press_the_picture_flat():
    alarm = chart.PALETTE["alarm"]
    assert rows_of(drawn(RECORDS["near the card's size"]), alarm, 300)
    assert not rows_of(drawn(RECORDS["rising"]), alarm, 300)


def test_nothing_measured_has_a_headline_and_no_plot():
    nothing = drawn(replace(BLANK, state="cached"))
    assert (nothing[10:28] != nothing[0, 0]).any()
    assert (nothing[60:] == nothing[0, 0]).all()
    assert (drawn(RECORDS["rising"])[60:] != nothing[0, 0]).any()
