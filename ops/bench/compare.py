"""Compares the speed of two commits: runs the loopback benches of both, interleaved, and prints medians and ratios.

    ops/bench/compare.py BASE HEAD [--bench hop] [--bench throughput] [--rounds 5] [--json]

Both commits are checked out into temporary git worktrees, which are removed at the end. Each round runs each bench once
in both worktrees, in alternating order, so that other load on the machine affects both equally. Each worktree runs its
own bench on its own code with this Python, so both must work with the packages that are installed here.

The last column is the median of the rounds' ratios, with the smallest and the largest. If that range contains 1, the
difference is noise. `compare.py HEAD HEAD` shows how much noise there is. No test runs this script.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from figures import machine, options

from cluster.cli.process_group import SignalExit

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ("hop", "throughput")
SHARED = ("figures", "loopback")
"""Files that benches use. If they differ between the commits, a figure may mean something else."""
NOT_FIGURES = frozenset({"rounds", "machine", "versions"})
RUN_S = 600
"""Time limit of one round of a bench, in seconds."""
LAST_LINES = 8


class Failure(Exception):
    """An error, as one sentence for the user."""


@dataclass(frozen=True)
class Tree:
    """A commit that is checked out."""

    name: str
    commit: str
    folder: Path

    def script(self, bench: str) -> Path:
        return self.folder / "ops" / "bench" / f"{bench}.py"

    def run(self, bench: str) -> dict[str, float]:
        """Run one round of a bench. Return its figures by name."""
        script = self.script(bench)
        once = ["--rounds", "1"] if '"--rounds"' in script.read_text(encoding="utf-8") else []
        try:
            done = subprocess.run(
                [sys.executable, str(script), "--json", *once],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"},
                capture_output=True,
                text=True,
                timeout=RUN_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"{bench} of {self.name} has not ended after {RUN_S} s") from None
        if not done.stdout.strip():
            lines = done.stderr.splitlines()[-LAST_LINES:]
            said = "\n  ".join((":", *lines)) if lines else " without a word"
            raise Failure(f"{bench} of {self.name} ended with {done.returncode}{said}")
        return figures(json.loads(done.stdout.strip().splitlines()[-1]))


def figures(printed: Mapping[str, object]) -> dict[str, float]:
    """Return every figure that a bench printed. Figures of a group are named ``group.name``."""
    found: dict[str, float] = {}
    for key, value in printed.items():
        if key in NOT_FIGURES:
            continue
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for name, number in inner:
            if isinstance(number, int | float) and not isinstance(number, bool):
                found[f"{key}.{name}" if name else key] = float(number)
    return found


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checked_out(side: str, written: str, folder: Path) -> Iterator[Tree]:
    """Check out a commit into a worktree while the context lasts."""
    try:
        commit = git("rev-parse", "--verify", "--quiet", f"{written}^{{commit}}")
    except Failure:
        raise Failure(f"{written} names no commit of this repository") from None
    target = folder / side
    git("worktree", "add", "--detach", "--force", str(target), commit)
    try:
        yield Tree(f"{side} ({written})", commit, target)
    finally:
        git("worktree", "remove", "--force", str(target))


def comparable(bench: str, trees: Sequence[Tree]) -> bool:
    """Return whether both commits have the bench. Print which one lacks it, and whether the two benches differ."""
    missing = [tree.name for tree in trees if not tree.script(bench).is_file()]
    if missing:
        tell(f"{bench}: there is no ops/bench/{bench}.py in {' nor in '.join(missing)}, so it is left out")
        return False
    texts = [[t.script(name).read_bytes() for name in (bench, *SHARED) if t.script(name).is_file()] for t in trees]
    if texts[0] != texts[1]:
        tell(f"{bench}: the bench itself differs between the two commits, so its figures may not mean the same")
    return True


def measure(bench: str, trees: Sequence[Tree], rounds: int) -> list[list[dict[str, float]]]:
    """Return for each tree the figures of each round. The trees go first alternately."""
    found: list[list[dict[str, float]]] = [[], []]
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            tell(f"{bench}: round {number + 1} of {rounds}, {trees[side].name} ...")
            found[side].append(trees[side].run(bench))
    return found


@dataclass(frozen=True)
class Comparison:
    """One figure of one bench: the medians of both, and each round's ratio of head to base (none if base is 0)."""

    name: str
    base: float
    head: float
    ratios: tuple[float, ...]

    def facts(self) -> dict[str, object]:
        ratio = {"ratio": round(median(self.ratios), 4)} if self.ratios else {}
        return {"base": self.base, "head": self.head, **ratio, "ratios": [round(r, 4) for r in self.ratios]}


def compared(base: Sequence[dict[str, float]], head: Sequence[dict[str, float]]) -> list[Comparison]:
    """Return a comparison for every figure that both have in every round."""
    names = [name for name in base[0] if all(name in one for one in (*base, *head))]
    return [
        Comparison(
            name,
            median(one[name] for one in base),
            median(one[name] for one in head),
            tuple(h[name] / b[name] for b, h in zip(base, head, strict=True) if b[name]),
        )
        for name in names
    ]


def print_comparisons(found: Mapping[str, list[Comparison]]) -> None:
    for bench, comparisons in found.items():
        print(f"{bench:32} {'base':>10} {'head':>10}   head/base")
        for c in comparisons:
            ratio = f"{median(c.ratios):.3f}  ({min(c.ratios):.3f} to {max(c.ratios):.3f})" if c.ratios else "-"
            print(f"  {c.name:30} {c.base:10.3f} {c.head:10.3f}   {ratio}")


def tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def compare(base: str, head: str, benches: Sequence[str], rounds: int, as_json: bool) -> None:
    with ExitStack() as stack:
        stack.enter_context(SignalExit(signal.SIGTERM, signal.SIGHUP))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="macpipe-compare-")))
        sides = (("base", base), ("head", head))
        trees = [stack.enter_context(checked_out(side, written, folder)) for side, written in sides]
        chosen = [bench for bench in benches if comparable(bench, trees)]
        if not chosen:
            raise Failure("nothing is left to compare")
        found = {bench: compared(*measure(bench, trees, rounds)) for bench in chosen}
    if as_json:
        facts = {bench: {c.name: c.facts() for c in comparisons} for bench, comparisons in found.items()}
        commits = {"base": trees[0].commit, "head": trees[1].commit, "rounds": rounds}
        print(json.dumps({**commits, "benches": facts, "machine": machine()}))
    else:
        print_comparisons(found)


def main() -> int:
    parser = options(str(__doc__))
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("base", metavar="BASE", help="a commit, as git writes them")
    parser.add_argument("head", metavar="HEAD", help="the commit to hold against it")
    parser.add_argument(
        "--bench", action="append", metavar="NAME", help=f"ops/bench/NAME.py; else {', '.join(BENCHES)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        compare(asked.base, asked.head, asked.bench or BENCHES, asked.rounds, asked.json)
    except Failure as failure:
        tell(f"compare: {failure}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
