"""Kill the demo with SIGKILL at random moments, start it again each time, and compare its tables with those of one that ran through.

    python tests/kill_demo.py --kills 5 FLOPS=3e11 N=100 EVALS=3

Words with = are settings of `make demo`. It takes about as long as three demos of that size.
"""

import argparse
import difflib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def demo(folder, settings, seconds=None):
    """Run `make demo`; killed, with everything that it started, after `seconds`. Returns its output, or None if killed."""
    with open(folder / "output", "w") as output:
        run = subprocess.Popen(["make", "-s", "demo", f"STUDY={folder / 'demo'}", *settings], cwd=ROOT, stdout=output,
                               stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if run.wait(seconds):
                sys.exit(f"the demo failed:\n{(folder / 'output').read_text()[-3000:]}")
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            return None
    return (folder / "output").read_text()


def tables(text):
    """The closing tables of a demo's output: not that of the base, which is only there when it was not evaluated before."""
    return [line for line in text[text.index("Greedy, first attempt"):].splitlines() if line.startswith("|")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="how often the demo is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("settings", nargs="*", help="settings of make demo, such as FLOPS=3e11")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        began = time.time()
        through, took = tables(demo(Path(a), args.settings)), time.time() - began
        moments = [rng.uniform(0.05, 0.4) * took for _ in range(args.kills)]
        for moment in moments:
            survived = demo(Path(b), args.settings, moment)
            last = (Path(b) / "output").read_text().splitlines()[-1:]
            print(f"{'killed' if survived is None else 'DONE'} after {moment:.0f} s, at: {last}", flush=True)
        again = tables(demo(Path(b), args.settings))
    print("\n".join(again if through == again else difflib.unified_diff(through, again, "ran through", "killed", lineterm="", n=0)))
    print(f"ran through in {took:.0f} s; killed {args.kills} times: the tables are {'the same' if through == again else 'NOT the same'}")
    return through == again and bool(again)


if __name__ == "__main__":
    sys.exit(not main())
