"""A model's own right answers as data: with `train_sft.py --data`, SFT on policy (rejection sampling). `evaluate.py` starts this.

    python evaluate.py runs/warmup --n 2000 --k 4 --keep-correct own.jsonl
    python train_sft.py --init runs/warmup --data own.jsonl --out runs/own

A line is {"prompt", "response"}; of episodes with several questions {"messages": [{"role", "content"}, ...]}; of problems in
pictures also {"image"}, a PNG beside the file. Every right answer is kept, also those that are alike: so the lines follow the
model's own distribution, given that the answer is right. Right is what the verifier says of first answers, never of a second try.
"""
import json
import os
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tasks  # noqa: E402
from evaluate import clean, join_processes, legible_rows, load, parse_args, play, processes, run_main, suite_problems  # noqa: E402
from model import write_atomically  # noqa: E402


def line_of(episode):
    """A right episode as a line of data, without its picture."""
    prompt, turns = episode.problem.prompt, episode.turns
    if len(turns) == 1:
        return {"prompt": prompt, "response": turns[0]["response"]}
    asked = [prompt, *(turn["feedback"] for turn in turns)]
    return {"messages": [*chain(*(({"role": "user", "content": question}, {"role": "assistant", "content": turn["response"]})
                                  for question, turn in zip(asked, turns)))]}


def right_lines(args):
    """The lines of all right first answers, and how many answers there were."""
    model, tokenizer, settings = load(args.model, args)
    row, = (row for row in legible_rows(model, settings) if row.name == "id")
    problems, count = suite_problems(model, tokenizer, settings, row), max(1, args.k)
    pictures = problems[0].image is not None
    if pictures and problems[0].leads_on:
        raise ValueError(f"--keep-correct writes one picture a line, and {args.suite} shows several: take walks in words.")
    episodes, lines = play(model, tokenizer, problems, settings, "sampled", count), []
    folder = Path(f"{args.keep_correct}.images")
    for i, episode in enumerate(episodes):
        if episode.solved(1):
            line = line_of(episode)
            if pictures:
                name = folder / f"{i // count:06d}.png"
                if not processes()[0] and not name.exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    problems[i // count].image.save(name)
                line["image"] = str(name.relative_to(folder.parent))
            lines.append(line)
    return lines, len(episodes)


def main(argv=None):
    """Write the file; returns its lines."""
    args = parse_args(argv)
    if not args.model:
        raise ValueError("--keep-correct keeps the answers of one model: name that, without --compare.")
    path = Path(args.keep_correct)
    if path.exists() or Path(f"{path}.images").exists():
        raise ValueError(f"{clean(path)} or its folder of pictures is there already: choose another --keep-correct.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):  # before the work
        raise ValueError(f"{clean(path.parent)} cannot be written to: choose another --keep-correct.")
    join_processes()
    lines, count = right_lines(args)
    if not lines:
        raise ValueError(f"none of {count} answers is right, so there is nothing to keep: give a model that solves some.")
    if processes()[0]:  # the first one writes
        return lines
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
    rule = args.rule or tasks.task_of(args.suite).rule
    print(f"{clean(path)}: {len(lines):,} right answers of {count:,} to {args.n:,} {args.split} problems, rule {rule}")
    return lines


if __name__ == "__main__":
    run_main(main)
