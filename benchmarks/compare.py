"""Two runs of the same cases: what changed, and what is only noise.

    drift    median over the peers of a case of new / old: how much faster or slower the machine itself is now
    change   our new / our old / drift

A change counts where it is beyond `bound` and beyond the spreads of both samples, and what the drift is unsure by.
"""

import contextlib
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

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
        pairs = [(old[case, peer["contender"]], peer) for peer in new_rows
                 if case_of(peer) == case and not peer.get("ours") and "median_us" in peer
                 and (case, peer["contender"]) in old]
        drifts = [now["median_us"] / then["median_us"] for then, now in pairs]
        drift = statistics.median(drifts) if drifts else 1.0
        scatter = max(drifts) / min(drifts) - 1 if drifts else 0.0  # peers that disagree tell less
        unsure = statistics.median(then["spread"] + now["spread"] for then, now in pairs) if pairs else 0.0
        found.append(Change(
            " ".join((*case[:3], *(f"{letter}={size}" for letter, size in case[3]), row["contender"])), case,
            before["median_us"], row["median_us"], drift, before["spread"] + row["spread"] + (scatter + unsure) / 2,
        ))
    if not found:
        raise ValueError("the two runs have no case of ours in common: measure the same ops, shapes and dtypes")
    return found


ROOT = Path(__file__).resolve().parent.parent
RUN = """
import fastlm.cli
fastlm.cli.main()
"""


def measure_revision(revision, arguments, *, cuda):
    """The results (head, roofs, rows) of `fastlm bench` with `arguments` at a commit, built in a folder that goes away.

    Raises ValueError where there is no such commit, or where it cannot be built or measured.
    """
    if _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").returncode:
        raise ValueError(
            f"--compare: {revision!r} is neither a results file nor a commit of the checkout {ROOT}; write a file with "
            "fastlm bench --out FILE"
        )
    from . import harness
    from .apart import PIN

    with tempfile.TemporaryDirectory() as folder, _worktree(revision, Path(folder) / "tree") as tree:
        package, out = Path(folder) / "package", Path(folder) / "rows.json"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package), str(tree)]
        _call(install if cuda else [*install, "-Ccmake.define.FASTLM_CUDA=OFF"], f"{revision} does not build")
        script = PIN.format(package=str(package)) + RUN
        _call([sys.executable, "-c", script, "bench", *arguments, "--out", str(out)], f"{revision} cannot be measured")
        return harness.read(out)


@contextlib.contextmanager
def _worktree(revision, path):
    if (done := _git("worktree", "add", "--detach", str(path), revision)).returncode:
        raise ValueError(f"--compare: git worktree add {revision}: {done.stderr.strip()}")
    try:
        yield path
    finally:
        _git("worktree", "remove", "--force", str(path))


def _git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def _call(command, told):
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise ValueError(f"--compare: {told}: {said[-1][:300]}")


def case_of(row):
    """What makes two rows comparable, hashable."""
    return row["op"], row["part"], row["dtype"], tuple(row["shape"].items()), row["cold"]
