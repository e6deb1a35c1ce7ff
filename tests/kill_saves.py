"""Kill a training run with SIGKILL at random moments, most of them inside a save, and see whether anything is lost.

    python tests/kill_saves.py --kills 100

A run that saves after every step is started, killed, resumed, killed, ... After each kill its newest checkpoint must load
and lie at most one step behind the metrics; in the end the run must equal one that was never killed, bit for bit.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import evaluate as E  # noqa: E402
import model as M  # noqa: E402
import train_sft as SFT  # noqa: E402
from assets import make_base  # noqa: E402


def child(argv):
    """Train in a forked process (no second import of torch); returns its id."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            make_base.main(argv)
        except SystemExit as stopped:
            os._exit(stopped.code)
        except BaseException as error:
            print(f"the run itself failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def whole(run):
    """The step of the newest checkpoint, after loading every part of it. Raises ValueError when there is none."""
    place = E.latest_checkpoint(run)
    M.load_model(place)
    written = M.read_json(place / SFT.CHECKSUMS)
    if written != SFT.checksums(place, written):
        raise ValueError(f"{place} is not as it was written")
    return torch.load(place / "state.pt", weights_only=True)["step"]


def tensors(run):
    """Weights and optimizer moments of the newest checkpoint, by name."""
    place = E.latest_checkpoint(run)
    moments = torch.load(place / "state.pt", weights_only=True)["optimizer"]["state"]
    return load_file(place / M.WEIGHTS) | {f"{i}/{k}": v for i, s in moments.items() for k, v in s.items()}


def main(argv=None):
    """Returns (kills, kills inside a save, checkpoints lost, final step)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng, lost, inside = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        run, common = Path(folder) / "killed", "--batch 2 --evals 0 --schedule constant --lr-warmup 0 --save-every 1 --device cpu"
        begin = [*f"--fresh --rules 10 --steps 1000000 {common}".split(), "--out", str(run)]
        step = 0
        for kill in range(args.kills):
            pid = child(["--resume", str(run)] if (run / "args.json").exists() else begin)
            here = time.time()
            while time.time() - here < 60 and not list(run.glob(f"step-{step + 1:06d}")):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            inside += bool(list(run.glob(".*.tmp")))
            if not step and not (run / "latest").exists():  # on a slow machine: killed before it had saved anything
                continue
            metrics = run / "metrics.jsonl"
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            logged = len([line for line in lines if SFT.step_of(line) < 1e9])
            try:
                before, step = step, whole(run)
                lost += not before < step >= logged - 1
            except (ValueError, OSError) as error:
                print(f"kill {kill + 1}: {error}")
                lost += 1
            if (kill + 1) % 10 == 0:
                print(f"{kill + 1} kills, {inside} of them inside a save, {lost} checkpoints lost, now at step {step}", flush=True)
        pid = child(["--resume", str(run)])
        time.sleep(2)
        os.kill(pid, signal.SIGTERM)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM
        final, other = whole(run), Path(folder) / "unharmed"
        begin[begin.index("1000000")] = str(final)
        make_base.main([*begin[:-1], str(other)])
        a, b = tensors(run), tensors(other)
        same = ended and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        steps = [SFT.step_of(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lost += not same or steps != list(range(1, final + 1))
    print(f"{args.kills} kills, {inside} inside a save: {lost} lost; after {final} steps the run "
          f"{'equals' if same else 'DIFFERS FROM'} one that was never killed, bit for bit")
    return args.kills, inside, lost, final


if __name__ == "__main__":
    sys.exit(main()[2] > 0)
