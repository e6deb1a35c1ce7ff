"""The table of a study with several sets of runs, `make study`.

    python -m assets.study runs/study         # a line for each set: a teacher and a base
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate import FIRST, NONE, Parser, Table, load_study, markdown, percent, run_main, stages  # noqa: E402


def nats(stage, kind, row):
    """The mean of a Stage's nats, such as -log p of the teacher's answers, as text."""
    values = [evaluation.get("nats", {}).get(kind, {}).get(row) for evaluation in stage.evals.values()]
    return f"{np.mean(values):.1f}" if values and None not in values else NONE


def line(directory):
    """The cells of a set: distance of the teacher, success of the stages, their difference, movement."""
    stage = stages(load_study(directory), FIRST)
    start, sft, rl = stage["start"], stage["sft end"], stage["rl end"]

    def success(of):
        return " / ".join(percent(of.interval(row, FIRST)).split()[0] for row in ("id", "rule", "fake"))
    return [directory.name, " / ".join(nats(start, "teacher", row) for row in ("id", "rule")), *map(success, (start, sft, rl)),
            percent(rl.interval("rule", FIRST, minus=sft), "+"), " / ".join(nats(of, "moved", "id") for of in (sft, rl)), str(len(sft.evals))]


def main(argv=None):
    """Print the table; returns it."""
    parser = Parser("Print the table of a study: a line for each of its sets.")
    parser.add_argument("study", help="the directory of make study")
    args = parser.parse_args(argv)
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
