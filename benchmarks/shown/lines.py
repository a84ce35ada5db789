"""Tables with a line per case and a column per way, and what their cells say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ..card.tables import NOT_MEASURED, grid
from ..rows import Row


def picture(row: Row) -> str:
    """Its sides, and its batch where that is more than one."""
    batch = f", batch {row['batch']}" if row["batch"] > 1 else ""
    return f"{row['width_px']}x{row['height_px']}{batch}"


def by_way(
    head: Iterable[str],
    columns: Mapping[str, str],
    rows: Iterable[Row],
    *,
    line: Callable[[Row], tuple[str, ...]],
    way: Callable[[Row], str],
    cell: Callable[[Row], str],
) -> str:
    """Markdown: a line per case, in the order of the rows, and a column per way.

    Args:
        head: of the first cells.
        columns: head of each column by its way; rows of other ways are left out.
        line: the first cells of a row.
        cell: what a row says in its column.
    """
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if way(row) in columns:
            cells.setdefault(line(row), {})[way(row)] = cell(row)
    body = [
        [*first, *(found.get(name, NOT_MEASURED) for name in columns)]
        for first, found in cells.items()
    ]
    return grid([*head, *columns.values()], body)
