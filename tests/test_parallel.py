"""torchrun with several processes: the same losses and weights as one, and a run that goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate as E
import model as M
import train_sft as SFT
from conftest import load_tensors

CHILD = Path(__file__).with_name("torchrun_child.py")
COMMON = "--steps 2 --evals 0 --schedule constant --save-every 0 --lr 1e-3 --lr-warmup 0 --device cpu".split()
RL = "rl --estimator reinforce --problems 4 --group 3 --kl-coef 0.1 --epochs 2 --clip-eps 0.2 --lora-rank 2".split()


def torchrun(number, *argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number, "--", CHILD, *argv]  # else it would take --n for its own
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("argv", [["sft", "--batch", "6"], RL], ids=["sft", "rl"])
def test_two_processes_train_as_one_does(argv, tiny_run, tmp_path):
    """Two steps, then two more after --resume, which one and two processes each do."""
    runs = []
    for number in (1, 2):
        runs.append(run := tmp_path / str(number))
        said = torchrun(number, *argv, "--init", tiny_run, "--out", run, *COMMON)
        assert said.count("done: ") == 1 and said.count("\n       2 ") == 1  # one process writes
        said = torchrun(number, argv[0], "--resume", run, "--steps", "4")
        assert "continued at step 2" in said and said.count("done: ") == 1
    one, two = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs)
    assert [record["step"] for record in two] == [1, 2, 3, 4] and one[0].keys() == two[0].keys()
    for a, b in zip(one, two):
        for name in a.keys() - {"ratio_error", "entropy", "repeat"}:  # largest, ratios: means over the processes
            assert name == "step_time" or "seconds" in name or "speed" in name or a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
    one, two = (load_tensors(E.latest_checkpoint(run) / (M.ADAPTER if argv[0] == "rl" else M.WEIGHTS)) for run in runs)
    start = load_tensors(E.latest_checkpoint(tiny_run) / M.WEIGHTS)
    assert any(not torch.equal(t, start.get(name, torch.zeros(()))) for name, t in two.items())
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    assert {path.name for path in runs[0].iterdir()} == {path.name for path in runs[1].iterdir()}


def scores(result, mode):
    return {row: modes[mode] for row, modes in result["rows"].items()}


def test_processes_share_an_evaluation(tiny_run, tmp_path):
    """Five problems for two processes. Greedy answers, verdicts, samples for a report and distances are those of one process;
    sampled ones are drawn anew, and again the same by as many processes."""
    found = []
    for number, name in ((1, "one"), (2, "two"), (2, "again")):
        out, flags = tmp_path / name, "--suite gp-l --n 5 --attempts 2 --k 3 --device cpu --max-new-tokens 20".split()
        said = torchrun(number, "evaluate", tiny_run, "--out", out, *flags)
        assert said.count("5 test problems") == 1
        found.append(json.loads((out / "evals" / "000000.json").read_text()))
    one, two, again = found
    assert two.keys() == one.keys() and scores(one, "greedy") == scores(two, "greedy") and one["samples"] == two["samples"]
    assert scores(two, "sampled") == scores(again, "sampled") and two["pass_at_k"] == again["pass_at_k"]
    assert {row: {name: len(values) for name, values in each.items()} for row, each in scores(one, "sampled").items()} == {
        row: {name: len(values) for name, values in each.items()} for row, each in scores(two, "sampled").items()}
    assert two["truncated"] == pytest.approx(one["truncated"], abs=0.5) and one["classes"] == two["classes"]


def test_processes_share_the_evaluations_of_a_run(tiny_run, tmp_path):
    found, run = [], tmp_path / "run"
    flags = "--batch 4 --steps 1 --evals 2 --eval-n 3 --eval-moved --max-new-tokens 20 --lora-rank 2 --lr 1e-9 --device cpu".split()
    for number in (1, 2):
        said = torchrun(number, "sft", "--init", tiny_run, "--out", tmp_path / str(number), *flags)
        assert said.count("  eval at step") == 2
        found.append([json.loads((tmp_path / str(number) / "evals" / f"{step:06d}.json").read_text()) for step in (0, 1)])
    for one, two in zip(*found):
        assert scores(one, "greedy").keys() == scores(two, "greedy").keys() and scores(one, "greedy") == scores(two, "greedy")
        assert one["nats"]["teacher"]["id"] == pytest.approx(two["nats"]["teacher"]["id"], abs=1e-4)
        assert len(two["nats"]["moved"]["id"]) == 3


def test_processes_share_the_answers_that_are_kept(tmp_path):
    """Each plays its problems once, and the first one writes."""
    path = tmp_path / "own.jsonl"
    said = torchrun(2, "evaluate", "tiny", "--suite", "gp-vl", "--keep-correct", path, *"--n 5 --k 2 --device cpu --max-new-tokens 40".split())
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert said.count("right answers of 10 to 5 train problems") == 1 and f"{len(lines)} right answers" in said
    assert {(tmp_path / line["image"]).is_file() for line in lines} == {True} and lines == sorted(lines, key=lambda line: line["image"])


def test_one_process_measures_and_prints_a_distance(tiny_run):
    said = torchrun(2, "evaluate", tiny_run, *"--distance sorted --n 3 --device cpu".split())
    assert said.count("-log p of the answers of sorted") == said.count("| ID ") == 1


def test_a_share_that_does_not_come_out_even_is_a_sentence(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(SFT, "processes", lambda: (1, 2))
    with pytest.raises(ValueError, match="--batch must be a multiple of torchrun's 2 processes"):
        SFT.main(["--batch", "5", "--init", str(tiny_run), "--out", str(tmp_path / "run"), *COMMON])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suite, short, batch", [("gp-vl", False, 64), ("gp-vl-probes", False, 64), ("gp-vl", True, 256), ("gp-l", False, 256)])
def test_full_size_models_play_at_most_64_pictures_side_by_side(suite, short, batch, monkeypatch):
    """Whoever evaluates: the rule is not a trainer's."""
    tokenizer, model = SimpleNamespace(short=short), SimpleNamespace(device="cpu", config=SimpleNamespace(vision=SimpleNamespace(image_size=32)))
    seen = []
    monkeypatch.setattr(E, "rollout", lambda model, tokenizer, part, group, sampling, forced: seen.append((len(part), sampling.batch)) or [])
    E.play(model, tokenizer, [None] * 300, E.EvalSettings(suite, 300), "greedy")
    assert seen[0] == (batch, batch) and sum(n for n, _ in seen) == 300
