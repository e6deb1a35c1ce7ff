"""Synthetic studies, to look at the report without training: PYTHONPATH=. python tests/fake_runs.py DIR [seeds] [attempts] [kind]

kind: published (SFT's OOD rises, peaks, falls; RL's stays), tie (both arms end together), reverse, single (one evaluation),
pictures (published, in pictures: more rows at both ends, shares of cards read, a picture beside every sample),
grid (runs of both arms named by their rates; the highest SFT rate forgets the other rule). Those of single and tie have no nats.
"""
import json
import math
import sys
from itertools import product
from pathlib import Path

import numpy as np

import evaluate as report
from assets import report as page_of

SHAPES = {  # kind -> arm -> row -> success at progress t
    "published": {"sft": {"id": lambda t: .61 + .25 * (1 - np.exp(-4 * t)), "rule": lambda t: max(0, .17 + .5 * t - .95 * t ** .9), "fake": lambda t: .15 + .5 * t},
                  "rl": {"id": lambda t: .61 + .21 * (1 - np.exp(-3 * t)), "rule": lambda t: .17 + .07 * t, "fake": lambda t: .15 + .02 * t}},
    "tie": {arm: {"id": lambda t: .6 + .2 * t, "rule": lambda t: .2 + .02 * t, "fake": lambda t: .15} for arm in ("sft", "rl")},
    "reverse": {"sft": {"id": lambda t: .6 + .2 * t, "rule": lambda t: .2 + .3 * t, "fake": lambda t: .15},
                "rl": {"id": lambda t: .6 + .02 * t, "rule": lambda t: .2 - .15 * t, "fake": lambda t: .15}}}
SHAPES["single"] = SHAPES["pictures"] = SHAPES["grid"] = SHAPES["published"]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
NASTY = "cards <script>alert(1)</script> & \x1b[31m7 8 9 K\x00\u202e \"quoted\" 'single'\nnext line"


def evaluation(step, flops, rates, classes, ease, rng, attempts=1, pictures=False, whole=True):
    rows, rates = {}, dict(rates)
    if pictures and whole:
        rates |= {"red": rates["id"] * .8, "words": rates["id"] * .5, "text": min(1, rates["id"] + .1)}
    for row, rate in rates.items():
        rows[row] = {}
        for mode, drop in (("greedy", 0), ("sampled", .04)):
            # a hand is solved when its difficulty (the same for all runs) plus some luck is below the wanted quantile
            score = .6 * ease + .8 * rng.standard_normal(len(classes))
            first = score < np.quantile(score, np.clip(rate - drop, 0, 1)) if rate - drop > .003 else score < -99
            later = first | (rng.random(len(classes)) < .1) if attempts > 1 else first
            rows[row][mode] = {"first": first.astype(int).tolist(), "episode": later.astype(int).tolist(),
                               "read": np.where(rng.random(len(classes)) < (.9 if pictures else 1), 1, .75).tolist(),
                               "listed": (first | (rng.random(len(classes)) < .2)).astype(int).tolist()}
    samples = [{"row": row, "prompt": NASTY, "reward": -2.0 + 5 * (i == 1), "turns": [
        {"response": '{"cards": ["7", "8", "9", "K"], "number": [7, 8, 9, 13], "formula": "(7+8)*9-13=24"}', "outcome": "wrong_value", "reward": -1.0, "feedback": "122, not 24."},
        {"response": "<b>no idea</b>", "outcome": "illegal", "reward": -3.0, "feedback": None}][:min(attempts, 2)]} | ({"picture": PIXEL} if pictures else {})
        for row in rows if row != "fake" for i in range(3)]
    luck = np.random.default_rng(step)
    nats = {name: {row: (luck.gamma(9, size=len(classes)) * size).tolist() for row in ("id", "rule")}
            for name, size in (("teacher", 3.4), ("moved", step / 1e4))} if whole != "no nats" else {}
    return {"step": step, "flops": flops, "nats": nats, "seconds": step * .6, "suite": "gp-vl" if pictures else "gp-l", "split": "test", "n": len(classes),
            "attempts": attempts, "classes": classes, "rows": rows, "samples": samples}


def load_study(directory):
    """The only study in a directory."""
    study, = page_of.load_study(directory)
    return study


def make(directory, seeds=1, attempts=1, kind="published", n=500, base=True):
    """Write a study directory in the trainers' format."""
    directory, rng = Path(directory), np.random.default_rng(1)
    names = ["-".join(map(str, sorted(rng.integers(1, 11, 4)))) for _ in range(max(n // 3, 1))]
    classes = [names[i] for i in rng.integers(0, len(names), n)]
    own, pictures = {c: rng.standard_normal() for c in names}, kind == "pictures"
    ease = np.array([own[c] for c in classes])

    def put(name, evals, **args):
        (directory / name / "evals").mkdir(parents=True, exist_ok=True)
        (directory / name / "args.json").write_text(json.dumps(args))
        for e in evals:
            (directory / name / "evals" / f"{e['step']:06d}.json").write_text(json.dumps(e))

    if base:
        put("base", [evaluation(0, 0, {"id": .4, "rule": .14, "fake": .1}, classes, ease, rng, attempts, pictures, "no nats")], model="tiny", lr=1e-3)
    if kind == "grid":
        for (arm, shapes), rate in product(SHAPES[kind].items(), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)):
            pace = math.log10(rate / 1e-6) / 3
            put(f"{arm}-lr{rate:g}", [evaluation(t, t * 1e10, {row: np.clip(f(t / 100 * pace), 0, 1) for row, f in shapes.items()}, classes, ease, rng)
                                      for t in (0, 25, 50, 75, 100)], lr=rate, steps=100, init_path="/elsewhere/warmup/step-000006")
        return directory
    for seed in range(seeds):
        end = f"-s{seed}" if seeds > 1 else ""
        shapes, wobble = SHAPES[kind], rng.normal(0, .03, 3) if seeds > 1 else np.zeros(3)
        warm = evaluation(200, 1e12, {r: f(0) for r, f in shapes["sft"].items()}, classes, ease, rng, attempts, pictures,
                          "no nats" if kind in ("single", "tie") else True)
        put("warmup" + end, [warm], model="tiny", lr=3e-4, steps=200, seed=seed)
        for k, (arm, per_step, steps) in enumerate((("sft", 3.1e9, 1000), ("rl", 15.4e9 + 1e8 * seed, 200))):
            marks = [0] if kind == "single" else np.linspace(0, steps, 11).astype(int).tolist()
            evals = [evaluation(s, s * per_step, {r: np.clip(f(s / steps) + (s > 0) * (wobble[k] + rng.normal(0, .008)), 0, 1)
                                                  for r, f in shapes[arm].items()}, classes, ease, rng, attempts, pictures,
                                 "no nats" if kind in ("single", "tie") else s == steps) for s in marks]
            evals[0]["rows"] = {row: warm["rows"][row] for row in evals[0]["rows"]}
            put(arm + end, evals, model="tiny", lr=(1e-4, 5e-5)[k], steps=steps, seed=seed, **({"group": 8} if arm == "rl" else {}),
                init_path=str(directory.absolute() / f"warmup{end}" / "step-000200"))
    return directory


if __name__ == "__main__":
    directory, seeds, attempts, kind = (sys.argv[1:] + ["1", "1", "published"][len(sys.argv) - 2:])[:4]
    study = make(directory, int(seeds), int(attempts), kind)
    print(page_of.all_text(load_study(study)))
    (study / "curves.svg").write_text(page_of.svg_standalone(page_of.svg_curves(load_study(study))))
    (study / "path.svg").write_text(page_of.svg_standalone(page_of.svg_path(load_study(study))))
    print(page_of.write_report(study))
