"""Whether the processes of a job came to one exchange with values that fit together, and the error that says who came with what."""

from __future__ import annotations

from collections.abc import Sequence

from polyaccel.errors import CollectiveError


def require_equal(problem: str, rows: Sequence[str], hint: str) -> None:
    """Raises CollectiveError, the same on every process, where the rows that the processes gave (in their order) differ."""
    if len(set(rows)) > 1:
        seen = "; ".join(f"process {index}: {row}" for index, row in enumerate(rows))
        raise CollectiveError(f"{problem} ({seen})", hint)
