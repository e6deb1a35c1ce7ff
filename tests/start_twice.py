"""Start a training run twice at the same moment, again and again: exactly one must win each time.

    python tests/start_twice.py --pairs 20

The winner's metrics must be those of one run; the loser ends with status 2 and one sentence.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--steps 4 --batch 4 --evals 0 --device cpu --threads 1".split()


def main(pairs, start="tiny"):
    """Returns the number of pairs in which exactly one start won."""
    right = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(pairs):
            out = Path(folder) / str(i)
            command = [sys.executable, ROOT / "train_sft.py", "--model", start, "--out", out, *FLAGS]
            both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
            said = [each.communicate()[1].splitlines() for each in both]
            codes = [each.returncode for each in both]
            steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            loser = said[codes.index(2)] if 2 in codes else []
            one = len(loser) == 1 and ("another process" in loser[0] or "there already" in loser[0])
            right += one and sorted(codes) == [0, 2] and steps == [1, 2, 3, 4]
    print(f"{pairs} double starts: {right} times exactly one won")
    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    count = parser.parse_args().pairs
    sys.exit(main(count) < count)
