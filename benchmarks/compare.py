"""Two runs of the same cases: what changed, and what is only noise.

    drift    median over the peers of a case of new / old: how much faster or slower the machine itself is now
    change   our new / our old / drift

A change counts where it is beyond `bound` and beyond the spreads of both samples together.
"""

import statistics
from dataclasses import dataclass

BOUND = 0.10


@dataclass(frozen=True)
class Change:
    """One kernel of ours in both runs; `change` above 1 is slower."""

    name: str
    case: tuple
    old_us: float
    new_us: float
    drift: float
    noise: float

    @property
    def change(self):
        return self.new_us / self.old_us / self.drift

    def verdict(self, bound=BOUND):
        """ "slower", "faster" or "same"."""
        limit = 1 + max(bound, self.noise)
        return "slower" if self.change > limit else "faster" if self.change < 1 / limit else "same"


def changes(old_rows, new_rows):
    """A Change for every row of ours that both runs have; ValueError where they have none in common."""
    old = {(case_of(row), row["contender"]): row for row in old_rows if "median_us" in row}
    found = []
    for row in new_rows:
        case = case_of(row)
        if not row.get("ours") or "median_us" not in row or (case, row["contender"]) not in old:
            continue
        before = old[case, row["contender"]]
        drifts = [peer["median_us"] / old[case, peer["contender"]]["median_us"] for peer in new_rows
                  if case_of(peer) == case and not peer.get("ours") and "median_us" in peer
                  and (case, peer["contender"]) in old]
        drift = statistics.median(drifts) if drifts else 1.0
        scatter = max(drifts) / min(drifts) - 1 if drifts else 0.0  # peers that disagree tell less
        found.append(Change(
            " ".join((*case[:3], *(f"{letter}={size}" for letter, size in case[3]), row["contender"])), case,
            before["median_us"], row["median_us"], drift, before["spread"] + row["spread"] + scatter / 2,
        ))
    if not found:
        raise ValueError("the two runs have no case of ours in common: measure the same ops, shapes and dtypes")
    return found


def case_of(row):
    """What makes two rows comparable, hashable."""
    return row["op"], row["part"], row["dtype"], tuple(row["shape"].items()), row["cold"]
