"""Who brought the job down."""

from __future__ import annotations

import pytest

from mlm_cli.launch.verdict import Exit, judge


def ended(*items: tuple[int, int, float] | tuple[int, int, float, bool]) -> list[Exit]:
    return [Exit(*item) for item in items]


@pytest.mark.parametrize(
    ("exits", "code", "culprit"),
    [
        (ended((0, 0, 1), (1, 0, 2)), 0, None),
        (ended((0, 3, 1), (1, 3, 1)), 3, 0),  # the same error on every rank
        (ended((0, 75, 1), (1, 75, 1.5)), 75, 0),
        (ended((0, 1, 1.1), (1, -9, 1)), 6, 1),  # killed; the other lost its connection
        (ended((0, 6, 1.0), (1, -9, 1.05)), 6, 1),  # noticed in the other order
        (ended((0, 3, 1), (1, -15, 4, True)), 3, 0),  # we ended the one that waited
        (ended((0, 1, 1.2), (1, 3, 1)), 3, 1),
        (ended((0, 3, 1), (1, -6, 1.2)), 3, 0),  # aborted when its neighbour left
        (ended((0, 3, 1.05), (1, -6, 1)), 3, 0),  # noticed in the other order
        (ended((0, 4, 3), (1, -9, 1)), 6, 1),  # killed first, and that is what the other could not read
        (ended((0, 75, 1), (1, 7, 2)), 75, 0),
        (ended((0, 1, 1), (1, 1, 1.2)), 1, 0),  # a bug of ours, told with its traceback
        (ended((0, -15, 4, True), (1, 17, 1)), 6, 1),
        (ended((0, 0, 1), (1, -11, 5)), 6, 1),
        (ended((0, -9, 1)), 6, 0),
    ],
)
def test_judge(exits: list[Exit], code: int, culprit: int | None) -> None:
    verdict = judge(exits)
    assert verdict.code == code
    assert (verdict.culprit.rank if verdict.culprit else None) == culprit


def test_cause_in_words() -> None:
    assert "SIGKILL" in Exit(1, -9, 0.0).cause
    assert "exit code 17" in Exit(1, 17, 0.0).cause
