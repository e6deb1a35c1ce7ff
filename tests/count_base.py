"""How much of the test has the base seen? Counts, for the README, the demonstrations whose numbers and target are a test problem's.

    make base                                                  # or the args.json of its two runs
    python tests/count_base.py runs/base/learn runs/base/habits
"""

import json
import random
import statistics
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tasks  # noqa: E402
import train_sft as SFT  # noqa: E402


def numbers(problem):
    """What a problem is, whatever cards it came from."""
    return tuple(sorted(problem.numbers)), problem.rule.target


def main(runs, n=500):
    """Print one line for all demonstrations and one for each rule of the test."""
    seen = Counter()
    for run in runs:
        args = Namespace(**json.loads((Path(run) / "args.json").read_text()))
        for index in range(args.steps * args.batch):  # as Demonstrations.episode of train_sft.py draws them
            rule = SFT.read_mixture("rules", args.rules).draw(random.Random(f"demonstrator/{args.seed}/{index}"))
            seen[numbers(tasks.make(args.task, rule, split=args.split, index=index, style="short", seed=args.seed))] += 1
    print(f"{seen.total():,} demonstrations")
    for rule in (tasks.ID_RULE, tasks.OOD_RULE):
        asked = [numbers(tasks.make("gp-l", rule, split="test", index=i)) for i in range(n)]
        times = [seen[key] for key in asked]
        print(f"rule {rule}: {len(set(asked))} different problems among {n} hands, {100 * sum(map(bool, times)) / n:.0f} % of them seen, "
              f"{statistics.median(times):.0f} times (median)")


if __name__ == "__main__":
    main(sys.argv[1:])
