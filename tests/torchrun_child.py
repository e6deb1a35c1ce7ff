"""A trainer whose rollouts do not depend on chance, started by torchrun in test_parallel.py: one or several processes then play the same."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

import evaluate as E  # noqa: E402
import tasks  # noqa: E402
import train_rl  # noqa: E402
import train_sft  # noqa: E402


def played_by_index(model, tokenizer, problems, group, sampling):
    """Answers of random tokens that depend on the problem alone, with the policy's own log-probs."""
    groups = []
    for problem in problems:
        episodes = [E.Episode.start(problem, tokenizer) for _ in range(group)]
        for number, episode in enumerate(episodes):
            rng = random.Random(f"{problem.prompt}/{number}")
            ids = [rng.randrange(300) for _ in range(rng.randint(2, 7))]
            episode.append_response(ids)
            ids, chosen, _ = E.to_batch([episode], tokenizer.pad, model.device)
            with torch.no_grad():
                values = model.log_probs(ids, chosen, sampling.temperature).tolist()
            episode.log_probs[-len(values):] = values
            episode.problem.done = True
            episode.record(episode.problem, tokenizer.decode(episode.ids))
        groups.append(episodes)
    return groups


if __name__ == "__main__":
    torch.set_num_threads(1)
    script, *argv = sys.argv[1:]
    if script == "evaluate":  # as it is
        E.run_main(lambda: E.main(argv))
        sys.exit()
    train_rl.rollout = played_by_index
    tasks.GeneralPoints.step = lambda self, text: tasks.Step(float(len(text) % 5), True, "", "illegal")
    E.run_main(lambda: (train_rl if script == "rl" else train_sft).main(argv))
