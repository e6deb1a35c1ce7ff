"""How foreign a demonstrator's answers are to a model, under both rules, before any training. `evaluate.py` starts this.

    python evaluate.py tiny --distance sorted

-log p of its answers in nats, over an answer and over a token. An answer of many nats is one that the model would hardly write.
"""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate import (ROWS, Table, brackets, clean, join_processes, legible_rows, load, markdown, parse_args, processes,  # noqa: E402
                      run_main, suite_problems, t_interval, teacher_nats)

COLUMNS = ["", "nats a demonstration [95 % interval]", "nats a token", "tokens"]


def main(argv=None):
    """Print the table."""
    args = parse_args(argv)
    if not args.model:
        raise ValueError("--distance measures one model: name that, without --compare.")
    join_processes()
    if processes()[0]:  # under torchrun one measures and prints
        return
    model, tokenizer, settings = load(args.model, args)
    lines = []
    for row in legible_rows(model, replace(settings, rows=("id", "rule"))):
        nats, tokens = map(np.array, teacher_nats(model, tokenizer, settings, row))
        classes = [each.cls for each in suite_problems(model, tokenizer, settings, row)]
        lines.append([ROWS[row.name], brackets(t_interval(nats, classes)), f"{nats.sum() / tokens.sum():.4f}", f"{tokens.mean():.1f}"])
    print(f"{clean(args.model)}: -log p of the answers of {args.distance}, {args.n} {args.split} problems")
    print(markdown(Table("", COLUMNS, lines)))


if __name__ == "__main__":
    run_main(main)
