"""What `make study` needs beside the runs: learning rates from a grid, and one table of several sets of runs.

    python -m assets.study --choose runs/study/own-grid     # ID scores on validation problems, and the rates to take
    python -m assets.study runs/study                       # a line for each set: a teacher and a base
"""
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate import (FIRST, NONE, Parser, Table, any_of, estimate, markdown, name_of, percent, run_main,  # noqa: E402
                      stages, unfinished)
from assets.report import load_study, write_text  # noqa: E402


def only_study(directory):
    """The only study in a directory. ValueError where its runs did not score the same problems."""
    study, *others = load_study(directory)
    if others:
        raise ValueError(f"The runs in {directory} scored other problems than each other: evaluate every run on the same suite, "
                         "split, rule and number of problems.")
    return study


# ---- 1. Learning rates ---------------------------------------------------------------------------

RATES = [float(f"{digit}e{power}") for power in range(-7, 0) for digit in (1, 3)][:-1]  # to 0.1


def choose_rates(directory):
    """{arm: (smallest, best)}, learning rates of a grid of runs `ARM-lrRATE`: the one with the best
    ID score (greedy, first attempt, last evaluation; OOD must not choose), and the smallest that is
    within one standard error of it, that of their paired difference.

    Prints tables; writes for make GRID/chosen, a line of all smallest and one of all best, and
    GRID/next: a line for each run, such as "sft 0.001", without which a choice lies at an edge."""
    grid, chosen, missing = {}, {}, []
    for name, seeds in only_study(directory).items():
        arm, found, rate = name.partition("-lr")
        if found and re.fullmatch(r"\d[\d.e+-]*", rate):
            last = any_of(seeds)[-1]
            if left := unfinished(last["args"], last):
                raise ValueError(f"{Path(directory) / name} is not finished: {left}; continue it "
                                 "before a rate is chosen.")
            grid.setdefault(arm, {})[float(rate)] = last["scores"]["id", *FIRST]
    for arm, scores in grid.items():
        rates = sorted(scores)
        best = max(rates, key=lambda rate: (scores[rate].mean(), -rate))
        below = {rate: estimate(scores[best] - scores[rate], last["classes"]) for rate in rates}
        smallest = min(rate for rate, (mean, error, *_) in below.items() if mean <= error + 1e-9)
        chosen[arm] = smallest, best
        lines = [[f"{rate:g}", f"{100 * scores[rate].mean():.1f}", f"{100 * mean:.1f}",
                  f"{100 * error:.1f}", "smallest " * (rate == smallest) + "best" * (rate == best)]
                 for rate, (mean, error, *_) in below.items()]
        print(markdown(Table("", [f"{name_of(arm)}, learning rate", "ID on validation, %",
                                  "below the best", "standard error", "choice"], lines)) + "\n")
        lower = [rate for rate in RATES if rate < rates[0] and rates[0] in chosen[arm]][-1:]
        upper = [rate for rate in RATES if rate > rates[-1] and rates[-1] in chosen[arm]][:1]
        missing += [f"{arm} {rate:g}\n" for rate in lower + upper]
    lines = [" ".join(f"{arm.upper()}_LR={rate:g}" for arm, rate in zip(chosen, choice)) + "\n"
             for choice in zip(*chosen.values())]
    write_text(Path(directory) / "chosen", "".join(lines))
    write_text(Path(directory) / "next", "".join(missing))
    return chosen


# ---- 2. The table --------------------------------------------------------------------------------


def nats(stage, kind, row):
    """The mean of a Stage's nats, such as -log p of the teacher's answers, as text."""
    values = [evaluation.get("nats", {}).get(kind, {}).get(row) for evaluation in stage.evals.values()]
    return f"{np.mean(values):.1f}" if values and None not in values else NONE


def line(directory):
    """The cells of a set: distance of the teacher, success of the stages, their difference, movement."""
    stage = stages(only_study(directory), FIRST)
    start, sft, rl = stage["start"], stage["sft end"], stage["rl end"]

    def success(of):
        return " / ".join(percent(of.interval(row, FIRST)).split()[0] for row in ("id", "rule", "fake"))
    label = directory.name + " (not finished)" * any("not finished" in of.label for of in (sft, rl))
    return [label, " / ".join(nats(start, "teacher", row) for row in ("id", "rule")), *map(success, (start, sft, rl)),
            percent(rl.interval("rule", FIRST, minus=sft), "+"), " / ".join(nats(of, "moved", "id") for of in (sft, rl)), str(len(sft.evals))]


def main(argv=None):
    """Print the table, or the rates; returns it, or them."""
    parser = Parser("Print the table of a study, a line for each of its sets; or choose the learning rates of a grid.")
    parser.add_argument("study", nargs="?", help="the directory of make study")
    parser.add_argument("--choose", metavar="GRID", help="print a grid's ID scores and the learning rates to take")
    args = parser.parse_args(argv)
    if bool(args.study) == bool(args.choose):
        raise ValueError("give one of: the directory of a study, --choose and a grid of runs.")
    if args.choose:
        return choose_rates(args.choose)
    sets = sorted(path for path in Path(args.study).glob("*") if any(path.glob("rl*/evals/*.json")) and not path.name.endswith("-grid"))
    if not sets:
        raise ValueError(f"{args.study} holds no set of runs: make one with `make study`.")
    head = ["set", "nats of the teacher's answer under the start: ID / rule OOD", "start: ID / rule OOD / fake rule", "SFT", "RL",
            "RL - SFT, rule OOD", "nats moved, ID: SFT / RL", "seeds"]
    table = Table("", head, [line(path) for path in sets])
    print(markdown(table))
    return table


if __name__ == "__main__":
    run_main(main)
