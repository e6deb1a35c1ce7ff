"""What is seen of a run while it goes on: the terminal's lines, metrics.csv, learning curves, the page that --watch writes."""
import csv
import json
import re

import pytest

import train_rl as RL
import train_sft as SFT

BATCH = "--batch 2 --eval-n 2 --device cpu --threads 1"


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# the terminal

def test_steps_are_aligned_below_a_header_that_comes_again(tmp_path, capsys):
    SFT.main(f"--out {tmp_path / 'run'} --steps 22 --evals 0 {BATCH}".split())
    said = capsys.readouterr().out.splitlines()
    at = [i for i, line in enumerate(said) if line.split()[:1] == ["step"]]
    heads = [said[i] for i in at]
    assert heads[0].split() == ["step", "done", "left", "loss", "grad_norm", "learning_rate", "tokens", "update_speed", "step_time"]
    assert at == [1, 22] and heads[0] == heads[1]
    ends = [[m.end() for m in re.finditer(r"\S+", line)] for line in said[1:-1]]
    assert all(each == ends[0] for each in ends) and all(len(line) <= 100 for line in said[1:-1])
    assert all(re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", line.split()[2]) for line in said[2:-1] if line not in heads)


@pytest.mark.parametrize("seconds, says", [(0, "0:00:00"), (59.6, "0:01:00"), (3599.7, "1:00:00"), (108000, "30:00:00"), (59.4, "0:00:59")])
def test_time_to_go_has_no_60_seconds(seconds, says):
    run = object.__new__(SFT.Run)
    run.args, run.progress = SFT.parse_args(["--steps", "2", "--evals", "0"]), SFT.Progress(step=1, seconds=seconds)
    assert run.line({"loss": 1.0}).splitlines()[1].split()[:3] == ["1", "50%", says]


def test_what_is_not_measured_in_every_step_keeps_its_column():
    run = object.__new__(SFT.Run)
    run.args, run.progress, run.shown = SFT.parse_args(["--steps", "99", "--evals", "0"]), SFT.Progress(step=2), RL.SHOWN
    first, second = run.line({"reward": -0.12345, "kl": 1e-5, "step_time": 1.0}), run.line({"reward": 1234.5, "step_time": 1.0, "clip_fraction": 0.0})
    assert first.splitlines()[0].split() == ["step", "done", "left", "reward", "kl", "step_time"]
    assert "\n" not in second and second.split()[3:] == ["1234", "-", "1"]
    full = run.line(dict.fromkeys(RL.SHOWN, -0.12345)).splitlines()
    assert max(map(len, full)) <= 100 and full[0].split()[3:] == RL.SHOWN


def test_evaluations_are_told_in_100_columns(tmp_path, capsys):
    SFT.main(f"--out {tmp_path / 'run'} --steps 1 --evals 1 {BATCH}".split())
    said = capsys.readouterr().out.splitlines()
    at, = [i for i, line in enumerate(said) if line.startswith("  eval at step 1, 2 held-out")]
    assert all(len(line) <= 100 for line in said[at:-1]) and "rule/greedy/first" in " ".join(said[at:])


# metrics.csv

def test_the_table_of_metrics_is_that_of_the_lines_and_follows_a_resume(tmp_path):
    run = tmp_path / "run"
    SFT.main(f"--out {run} --steps 4 --evals 2 --save-every 2 {BATCH}".split())
    records, found = lines(run), table(run)
    assert [*found[0]] == [*dict.fromkeys(name for record in records for name in record)] and "id/greedy/first" in found[0]
    for record, line in zip(records, found, strict=True):
        assert {name: float(value) for name, value in line.items() if value} == pytest.approx(record)
    assert found[0]["id/greedy/first"] == "" and float(found[3]["id/greedy/first"]) >= 0
    with open(run / "metrics.jsonl", "a") as file:               # later lines of a killed process, and a damaged one
        file.write('{"step": 5, "loss": 7}\n{"st')
    SFT.main(["--resume", str(run), "--steps", "6", "--threads", "1"])
    assert [line["step"] for line in table(run)] == list("123456") and table(run)[4]["loss"] != "7"
    assert [record["step"] for record in lines(run)] == [1, 2, 3, 4, 5, 6]


def test_the_table_holds_nothing_later_than_the_checkpoint(tmp_path):
    run = tmp_path / "run"
    SFT.main(f"--out {run} --steps 2 --evals 0 {BATCH}".split())
    directory = SFT.RunDirectory(run, True)
    directory.log({"step": 3, "loss": 1.0, "kl": 2.0})
    directory.write_table(2)
    assert [line["step"] for line in table(run)] == ["1", "2"] and "kl" not in table(run)[0]
    directory.write_table(3)
    assert table(run)[2]["kl"] == "2.0" and table(run)[0]["kl"] == ""


def test_every_metric_of_a_step_is_explained(tmp_path, capsys):
    SFT.main(f"--out {tmp_path / 'warm'} --steps 1 --evals 0 {BATCH}".split())
    RL.main(f"--init {tmp_path / 'warm'} --out {tmp_path / 'rl'} --steps 1 --problems 2 --group 2 --kl-every 1 --max-new-tokens 4 --evals 0 "
            "--device cpu --threads 1 --estimator reinforce".split())
    assert lines(tmp_path / "rl")[0].keys() - {"step", "flops"} <= RL.METRICS.keys()
    assert lines(tmp_path / "warm")[0].keys() - {"step", "flops"} <= SFT.METRICS.keys()
    record = lines(tmp_path / "rl")[0]
    assert record["mean_length"] == record["tokens"] / 4
    with pytest.raises(SystemExit):
        RL.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: " in said for name in RL.METRICS) and "metrics.csv" in said
