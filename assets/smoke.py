"""For those who have weights: a question about a picture, then a step of SFT and one of RL, on cards in text and in pictures, each
with a real update of LoRA, its checkpoint and a resume. Says what it checked; exit status 1 when something was not as it should be.

    python -m assets.smoke DIRECTORY [--image PICTURE --ask QUESTION]
"""
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate  # noqa: E402
import train_rl  # noqa: E402
import train_sft  # noqa: E402
from model import ADAPTER  # noqa: E402

FLAGS = "--lora-rank 16 --recompute --lr-warmup 0 --steps 1 --evals 0 --max-new-tokens 64 --attempts 2"
CHANCE = random.Random(0)


def drawn_reward(episode, discount=1.0):
    """In place of the verifier's reward, which can be the same for all answers of a model that is new to the task: a random number, so
    that every group has a signal and all answers, right or wrong, alike or not, are learned from."""
    return CHANCE.random()


def check(script, task, model, out, flags):
    """Train one step and one more after a resume; returns a line that says what was seen. AssertionError."""
    run = out / f"{script.__name__}-{task}"
    script.main(["--task", task, "--model", model, "--out", str(run), *FLAGS.split(), *flags.split()])
    script.main(["--resume", str(run), "--steps", "2"])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    up = [t for name, t in load_file(evaluate.latest_checkpoint(run) / ADAPTER).items() if "lora_B" in name]
    moved = sum(bool(t.any()) for t in up)  # B is zero until it is updated
    assert [step["step"] for step in steps] == [1, 2], "the resumed run did not go on"
    assert all(step.get("grad_norm", 0) > 0 for step in steps), "a step had no gradient"
    assert moved > len(up) / 4, f"only {moved} of {len(up)} adapters moved"
    last = steps[-1]
    seen = ", ".join(f"{name} {last[name]:.4g}" for name in ("loss", "grad_norm", "ratio_error", "step_time", "peak_gb") if name in last)
    if "ratio_error" in last:
        assert last["ratio_error"] < 0.5, "rollout and training disagree about the log-probs"
    return f"ok: {script.__name__} {task}: 2 updates, the second after --resume; {moved} of {len(up)} adapters moved; {seen}"


def main(argv=None):
    """Returns the lines that say what was checked."""
    parser = evaluate.Parser("Ask, train and resume with the weights of a directory.")
    parser.add_argument("model", help="model directory")
    parser.add_argument("--image", help="a picture (default: a disc of light)")
    parser.add_argument("--ask", default="What does the picture show?", help="a question about it")
    parser.add_argument("--tasks", nargs="+", default=["gp-l", "gp-vl"], help="tasks that are trained")
    args = parser.parse_args(argv)
    place = evaluate.find_model(args.model, args.tasks[0])
    total, evaluate.Episode.total = evaluate.Episode.total, drawn_reward
    out = Path(tempfile.mkdtemp(prefix="smoke-"))
    try:
        Image.radial_gradient("L").save(out / "picture.png")
        evaluate.main([str(place), "--image", args.image or str(out / "picture.png"), "--ask", args.ask])
        found = ["ok: an answer to a question about a picture (read it above; a small model's is nonsense)"]
        for task in args.tasks:
            found.append(check(train_sft, task, str(place), out, "--batch 8"))
            found.append(check(train_rl, task, str(place), out, "--problems 2 --group 4"))
    finally:
        evaluate.Episode.total = total
        shutil.rmtree(out, ignore_errors=True)
    print("\nThe rewards of these steps of RL were random numbers, so that all answers are learned from.", *found, sep="\n")
    return found


def as_script():
    try:
        main()
    except AssertionError as error:
        sys.exit(f"failed: {error}")


if __name__ == "__main__":
    evaluate.run_main(as_script)
