"""Compare the output files of two commits byte for byte, on this machine.

    python tests/golden/compare.py OLD_COMMIT               all cases: OLD_COMMIT against the working tree
    python tests/golden/compare.py OLD_COMMIT --only 'calibrated*'
    python tests/golden/compare.py --update-hashes          rewrite hashes.json from the working tree

Only the version and the fingerprint (a hash over it) are masked in files, and times and texts in reports. Exit code 0: all
files are equal; 1: a file differs or a case failed.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from learned_rounding.tests.golden.cases import CASES, OUTPUT, Case
from learned_rounding.tests.golden.driver import KILLED, LOG
from learned_rounding.tests.golden.outputs import file_differences, file_hashes
from learned_rounding.tests.golden.sources import write_sources

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
HASHES = FOLDER / "hashes.json"
BATCH = 20  # cases per process: importing torch takes as long as ten of them
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


@dataclass
class Outcome:
    """One case in one tree: exit codes that are not those expected, and the duration in seconds."""

    problem: str = ""
    seconds: float = 0.0


@dataclass
class Comparison:
    """One case in both trees."""

    case: Case
    old: Outcome
    new: Outcome
    differences: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """``equal``, or what is not."""
        if self.old.problem or self.new.problem:
            return "FAILED"
        return "DIFFERS" if self.differences else "equal"


def _is_commit(name: str) -> bool:
    command = ["git", "-C", str(ROOT), "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A temporary git worktree of ``commit``."""
    git = ["git", "-C", str(ROOT), "worktree"]
    tree = folder / "tree"
    subprocess.run([*git, "add", "--detach", "--quiet", str(tree), commit], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def run_cases(tree: Path, cases: Sequence[Case], work: Path, label: str) -> list[Outcome]:
    """Run cases with one tree, in one process. Outputs are in ``work/label/NAME``."""
    jobs, folders = [], [work / label / case.name for case in cases]
    for case, folder in zip(cases, folders, strict=True):
        folder.mkdir(parents=True)
        kills = [case.kill_after, 0] if case.kill_after else [0]
        jobs += [{"folder": str(folder), "argv": case.argv(tree), "kill_after": kill} for kill in kills]
    plan, results = (folders[0].with_suffix(suffix) for suffix in (".jobs", ".results"))
    plan.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, str(FOLDER / "driver.py"), str(tree), str(plan), str(results)]
    process = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=False, capture_output=True, text=True)
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    done = [json.loads(line) for line in lines]
    done += [{"code": f"none: {_last_line(process.stderr)}", "seconds": 0.0}] * (len(jobs) - len(done))
    outcomes = []
    for case, folder in zip(cases, folders, strict=True):
        steps = [done.pop(0) for _ in range(2 if case.kill_after else 1)]
        outcomes.append(Outcome(_problem(case, folder, steps), sum(step["seconds"] for step in steps)))
    return outcomes


def _problem(case: Case, folder: Path, steps: list[dict]) -> str:
    """Why a case did not run as it should; empty if it did."""
    log = folder / LOG
    if case.kill_after and steps[0]["code"] != KILLED:
        return f"the first run was to be killed and ended with exit code {steps[0]['code']}"
    if steps[-1]["code"] != 0:
        reason = _last_line(log.read_text(encoding="utf-8")) if log.exists() else ""
        return f"exit code {steps[-1]['code']}: {reason}"
    if case.kill_after and not json.loads((folder / "report.json").read_text(encoding="utf-8"))["taken_up"]:
        return "the second run resumed nothing"
    return ""


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def compare_case(old: Path, new: Path) -> list[str]:
    """Differences between all files of two folders, hidden ones included; logs are left out."""
    names = [{path.name for path in folder.iterdir() if path.name != LOG} for folder in (old, new)]
    found = [f"{name} is only in the {'old' if name in names[0] else 'new'} folder" for name in names[0] ^ names[1]]
    for name in sorted(names[0] & names[1]):
        found += file_differences(old / name, new / name)
    return found


def compare_commits(commit: str, cases: Sequence[Case], work: Path) -> list[Comparison]:
    """Run all cases at ``commit`` and in the working tree, and compare their files."""
    write_sources(work / "sources", set().union(*(case.sources for case in cases)))
    workers = max(os.cpu_count() or 1, 1)
    count = max(min(-(-len(cases) // BATCH), len(cases)), 1)
    batches = [cases[start::count] for start in range(count)]
    with (
        tempfile.TemporaryDirectory() as folder,
        checked_out(commit, Path(folder)) as tree,
        ThreadPoolExecutor(workers) as pool,
    ):
        both = [
            (
                batch,
                *(pool.submit(run_cases, path, batch, work, label) for path, label in ((tree, "old"), (ROOT, "new"))),
            )
            for batch in batches
        ]
        found = {
            case.name: Comparison(case, before, after)
            for batch, old, new in both
            for case, before, after in zip(batch, old.result(), new.result(), strict=True)
        }
    for name, comparison in found.items():
        if comparison.result == "equal":
            comparison.differences = compare_case(work / "old" / name, work / "new" / name)
    return [found[case.name] for case in cases]


def print_table(comparisons: Sequence[Comparison]) -> None:
    """One line per case, and one per difference."""
    width = max(len(comparison.case.name) for comparison in comparisons)
    print(f"{'case':<{width}}  {'old s':>6}  {'new s':>6}  result")
    for each in comparisons:
        print(f"{each.case.name:<{width}}  {each.old.seconds:6.2f}  {each.new.seconds:6.2f}  {each.result}")
        problems = [f"{label}: {run.problem}" for label, run in (("old", each.old), ("new", each.new)) if run.problem]
        for line in problems or each.differences:
            print(f"{'':<{width}}  {line}")


def update_hashes(work: Path) -> int:
    """Rewrite ``hashes.json`` from the working tree; returns the exit code."""
    cases = [case for case in CASES if case.exact and not case.missing_package]
    write_sources(work / "sources", set().union(*(case.sources for case in cases)))
    outcomes = run_cases(ROOT, cases, work, "new")
    failed = [f"{case.name}: {run.problem}" for case, run in zip(cases, outcomes, strict=True) if run.problem]
    if failed:
        print(*failed, sep="\n", file=sys.stderr)
        return 1
    before = json.loads(HASHES.read_text(encoding="utf-8")) if HASHES.exists() else {}
    kept = {case.name: before[case.name] for case in CASES if case.exact and case.name in before}
    made = {case.name: file_hashes(work / "new" / case.name / OUTPUT) for case in cases}
    HASHES.write_text(json.dumps(kept | made, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    changed = [name for name in made if before.get(name) != made[name]]
    print(f"{HASHES.name}: {len(made)} cases, {len(changed)} changed: {', '.join(changed) or 'none'}")
    return 0


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", metavar="OLD_COMMIT", help="commit that the working tree is compared with")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of the cases to run, as a shell pattern")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep sources and outputs in this new folder")
    parser.add_argument("--update-hashes", action="store_true", help=f"rewrite {HASHES.name} and stop")
    args = parser.parse_args()
    cases = [case for case in CASES if fnmatch.fnmatch(case.name, args.only)]
    if args.list:
        for case in cases:
            print(f"{case.name}{'  (hashed)' if case.exact else ''}\n    lrq {' '.join(case.argv(ROOT))}")
        return 0
    if not args.update_hashes and (args.commit is None or not cases):
        parser.error("OLD_COMMIT is missing" if args.commit is None else f"no case is named {args.only}")
    if args.commit and not _is_commit(args.commit):
        parser.error(f"{args.commit} is not a commit of this repository")
    with contextlib.ExitStack() as stack:
        if args.keep:
            args.keep.mkdir(parents=True)
        work = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.update_hashes:
            return update_hashes(work.resolve())
        began = time.perf_counter()
        runnable = [case for case in cases if not case.missing_package]
        comparisons = compare_commits(args.commit, runnable, work.resolve())
    print_table(comparisons)
    for case in cases:
        if case.missing_package:
            print(f"skipped: {case.name}, package {case.missing_package} is not installed")
    unequal = sum(comparison.result != "equal" for comparison in comparisons)
    print(f"{len(comparisons)} cases, {unequal} not equal, {time.perf_counter() - began:.0f} s")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
