"""Which rank brought a job down, and the exit code of the whole."""

from __future__ import annotations

import signal
from dataclasses import dataclass

# Codes that a rank chooses with a message (mlm_cli/errors.py); 6 is missing because a rank that reports a lost
# neighbour is a victim, not the cause.
EXPLAINED = frozenset({2, 3, 4, 5, 7})
DELIBERATE = EXPLAINED | {75, 130}
RANK_LOST = 6


@dataclass(frozen=True)
class Exit:
    """How one rank ended.

    Attributes:
        rank: its number.
        code: exit code; negative: killed by that signal.
        time: seconds since the start of the job when it was noticed.
        ours: True when the supervisor had already told it to end.
    """

    rank: int
    code: int
    time: float
    ours: bool = False

    @property
    def cause(self) -> str:
        if self.code < 0:
            return f"killed by {signal_name(-self.code)}"
        return f"ended with exit code {self.code}"


@dataclass(frozen=True)
class Verdict:
    """Exit code of the job, and the rank that caused it (None when all is well)."""

    code: int
    culprit: Exit | None = None


def judge(exits: list[Exit]) -> Verdict:
    """The verdict over all ranks.

    The cause is the first rank to end with a code it chose or by a signal nobody here sent; what the others said
    afterwards, such as a closed connection, follows. A rank that aborted (SIGABRT) may have done so because a neighbour
    left, and may be noticed before it: one that explained its error goes first. A rank lost without a word makes it 6.
    """
    failed = sorted(
        (item for item in exits if item.code != 0), key=lambda item: (item.time, item.code not in DELIBERATE)
    )
    if not failed:
        return Verdict(0)
    own = [item for item in failed if not item.ours] or failed
    chosen = [item for item in own if item.code in DELIBERATE or item.code < 0]
    explained = []
    if chosen and chosen[0].code == -signal.SIGABRT:
        explained = [item for item in chosen if item.code in EXPLAINED]
    unexplained = [item for item in own if item.code not in (1, RANK_LOST)]
    culprit = (explained or chosen or unexplained or [item for item in own if item.code == 1] or own)[0]
    if culprit.code in DELIBERATE or culprit.code == 1:
        return Verdict(culprit.code, culprit)
    return Verdict(RANK_LOST, culprit)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; a likely reason is added where there is one."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    reasons = {
        "SIGKILL": " (out of memory, or by hand)",
        "SIGSEGV": " (invalid memory access)",
        "SIGBUS": " (memory or disk gone)",
    }
    return name + reasons.get(name, "")
