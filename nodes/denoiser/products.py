"""What a product holds where weights are stored in fewer bits than rows have. Integers only."""

from __future__ import annotations

from ..prefer import Prefer
from .cuts import DenoiserPlan
from .sizes import TransformerSizes

# Columns of a product are a multiple of this: tiles of cuBLAS, and of the scales of blocks.
COLUMN_MULTIPLE = 256
# Bits of an activation; formulas count its elements.
ELEMENT_BITS = 16
# Elements of a weight that are copied at a time: for the fewest launches, about a quarter of the
# host's memory, and the least. With as many rows as there are columns a copy costs little time.
SPEED_COPY, BALANCE_COPY, LEAST_COPY = 2**26, 2**25, 2**23


def copy_elements(prefer: Prefer, limit: float) -> int:
    """How much of a weight is copied at a time; limit: of elements, 0 for as few as possible."""
    if limit == 0:
        return LEAST_COPY
    return SPEED_COPY if prefer == "speed" else BALANCE_COPY


def columns_at_a_time(features: int, elements: int) -> int:
    """Columns of a product whose part of the weight, [columns, features], has so many elements.

    elements: 0 for all columns.
    """
    if not elements:
        return 2**31
    return max(COLUMN_MULTIPLE, elements // features // COLUMN_MULTIPLE * COLUMN_MULTIPLE)


def product_elements(
    sizes: TransformerSizes,
    plan: DenoiserPlan,
    rows: int,
    features: int,
    columns: int,
    *,
    is_written: bool = True,
) -> int:
    """Elements that a product of rows [rows, features] holds beside those and its columns.

    Args:
        is_written: the columns are written into a tensor; otherwise they come in a new one.
    """
    held = 0
    if sizes.is_quantised:
        held = rows * features * sizes.row_bits // ELEMENT_BITS + rows * columns * is_written
    if sizes.is_copied:
        most = columns if sizes.is_whole else columns_at_a_time(features, plan.copy_elements)
        held = max(held, features * min(columns, most))
    return held
