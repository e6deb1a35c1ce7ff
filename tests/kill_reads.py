"""Kill an evaluation and a report with SIGKILL at random moments: what is written is whole or absent, and nothing else changes.

    python tests/kill_reads.py --kills 50
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import evaluate as E  # noqa: E402
import train_rl as RL  # noqa: E402
import train_sft as SFT  # noqa: E402
from assets import report  # noqa: E402


def child(study):
    """Evaluate the base and write the report in a forked process; returns its id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            E.main(["tiny", "--n", "6", "--max-new-tokens", "8", "--out", str(study / "base"), "--or-resume"])
            report.main([str(study)])
        except BaseException as error:
            print(f"failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def whole(study):
    """Whether every file that is there is whole."""
    for path in (study / "base").glob("evals/*.json"):
        json.loads(path.read_text())
    for name, end in (("report.html", "</html>"), ("curves.svg", "</svg>"), ("path.svg", "</svg>")):
        path = study / name
        assert not path.exists() or path.read_text().rstrip().endswith(end), path


def runs(study):
    """The hashes of all files of the arms."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for arm in ("sft", "rl") for path in (study / arm).rglob("*")
            if path.is_file()}


def main(argv=None):
    """Returns (kills, lost)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng, lost = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder)
        common = "--steps 1 --eval-n 6 --eval-split test --evals 2 --max-new-tokens 8 --device cpu"
        SFT.main(f"{common} --batch 4 --out {study / 'sft'}".split())
        RL.main(f"{common} --problems 2 --group 2 --out {study / 'rl'}".split())
        began, before = time.time(), runs(study)
        os.waitpid(child(study), 0)
        took = time.time() - began
        for _ in range(args.kills):
            if rng.random() < 0.5:
                shutil.rmtree(study / "base", ignore_errors=True)
            pid = child(study)
            time.sleep(rng.uniform(0, took))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            try:
                whole(study)
                lost += runs(study) != before
            except (AssertionError, ValueError) as error:
                print(f"not whole: {error}")
                lost += 1
        lost += os.waitpid(child(study), 0)[1] != 0
        whole(study)
    print(f"{args.kills} kills of an evaluation or a report: {lost} lost")
    return args.kills, lost


if __name__ == "__main__":
    sys.exit(main()[1] > 0)
