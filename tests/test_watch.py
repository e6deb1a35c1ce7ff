"""What is seen of a run while it goes on: the terminal's lines, metrics.csv, learning curves, the page that --watch writes."""
import csv
import json
import os
import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

import evaluate
import fake_runs
import tasks
import train_rl as RL
import train_sft as SFT
from assets import report as page_of

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


def test_the_table_goes_back_with_the_run(tmp_path):
    """Where the newest checkpoint is damaged, the lines behind the one before it are taken back, from the table too."""
    run = tmp_path / "run"
    SFT.main(f"--out {run} --steps 4 --evals 0 --save-every 2 {BATCH}".split())
    (run / "step-000004" / "state.pt").write_bytes(b"damaged")
    assert [line["step"] for line in table(run)] == list("1234")
    SFT.RunDirectory(run, True).resume_point()
    assert [line["step"] for line in table(run)] == ["1", "2"] and len(lines(run)) == 2


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


# learning curves

def training_run(path, steps=10, shift=0.0, **args):
    """A run directory with metrics of so many steps, without a model."""
    path.mkdir(parents=True)
    rl = path.name.startswith("rl")
    (path / "args.json").write_text(json.dumps({"task": "gp-l", "steps": 10, "flops": 0, "attempts": 1} | ({"group": 8} if rl else {}) | args))
    with open(path / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            more = {"reward": step / 2 + shift, "success": .5, "clip_fraction": 0.0} if rl else {}
            file.write(json.dumps({"step": step, "flops": 1e9 * step, "loss": 1 / step + shift, "grad_norm": 1.0, "learning_rate": 1e-4, "step_time": 2.0,
                                   "id/greedy/first": .5} | more) + "\n")
    return path


def test_curves_hold_every_metric_that_was_measured(tmp_path):
    for name in ("sft-s0", "sft-s1", "rl-s0"):
        training_run(tmp_path / name, shift=.1 * name.endswith("1"))
    drawn = page_of.learning_curves(page_of.load_runs(tmp_path))
    assert [name for name, _ in drawn] == ["loss", "loss", "reward", "success", "grad_norm", "learning_rate", "step_time"]   # SFT's loss is not RL's
    assert {meaning for name, meaning in drawn if name == "loss"} == {SFT.METRICS["loss"], RL.METRICS["loss"]}
    for (name, meaning), svg in drawn.items():
        root = ElementTree.fromstring(svg)
        texts = ["".join(each.itertext()) for each in root.iter("text")]
        assert {"step", name} <= set(texts) and texts[1:5] != [] and not re.search(r"\b(nan|inf)\b", svg)
        drawn_at = np.array(re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(path.get("d") for path in root.iter("path"))), float)
        assert drawn_at.min() >= 0 and drawn_at[:, 0].max() <= page_of.WIDTH and drawn_at[:, 1].max() <= page_of.HEIGHT
        ticks = [text for text in texts if re.fullmatch(r"\d+", text)]
        assert {"0", "10"} <= set(ticks)                             # the same x range in all panels
    told = [title.text for title in ElementTree.fromstring(drawn["reward", "mean return"]).iter("title")]
    assert "RL: step 4, reward 2" in told and len(told) == 11
    mean = [title.text for title in ElementTree.fromstring(drawn["loss", SFT.METRICS["loss"]]).iter("title")]
    assert "SFT: step 1, loss 1.05" in mean                           # of two seeds


def test_damaged_lines_are_skipped_and_old_names_read(tmp_path):
    run = training_run(tmp_path / "rl", steps=3)
    good = (run / "metrics.jsonl").read_text()
    bad = ['{"st', "[1]", "7", '{"step": "4"}', '{"step": 1e9}', '{"step": -1}', "[" * 9999, "\x00\xff", '{"loss": 3}', '{"step": true, "loss": 1}']
    values = ['"x"', "null", "[1]", "NaN", "Infinity", "1e999", "true", "1" + "0" * 400]
    text = "\n".join([*bad, good, *(f'{{"step": {4 + i}, "loss": {value}, "lr": 0.5, "seconds": 3.0}}' for i, value in enumerate(values))])
    (run / "metrics.jsonl").write_text(text)
    found, = page_of.load_runs(tmp_path)
    assert [record["step"] for record in found.records] == [*range(1, 4 + len(values))]
    assert found.points("loss")[:, 0].tolist() == [1, 2, 3] and found.points("learning_rate")[-1].tolist() == [11, .5]
    assert "nan" not in page_of.curves_html([found]) and found.points("step_time")[-1, 1] == 3


def test_long_runs_are_thinned():
    points = np.stack([np.arange(1, 100_001), np.arange(1, 100_001) % 7], 1).astype(float)
    thin = page_of.binned(points, 300)
    assert len(thin) == 300 and (np.diff(thin[:, 0]) > 0).all() and thin[:, 1] == pytest.approx(3, abs=.1)
    assert np.array_equal(page_of.binned(points[:200], 300), points[:200])
    both = page_of.binned(np.array([[1., 2.], [2., 4.], [1., 4.]]), 30)
    assert both.tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize("values", [[0, 1], [3, 3], [-2, 5e6], [1e-5, 3e-5], [.97, 1.0], [-1e-9, 0], [0, 0], [123456, 123457]])
def test_ticks_are_round_and_hold_the_values(values):
    axis = page_of.axis("y", values)
    at = [tick for tick, _ in axis.ticks]
    assert axis.low <= min(values) + 1e-12 and axis.high >= max(values) - 1e-9 and 2 <= len(at) <= 7
    assert at[0] == pytest.approx(axis.low) and at[-1] == pytest.approx(axis.high) and len({label for _, label in axis.ticks}) == len(at)


def test_points_of_figures_tell_their_values(tmp_path):
    study = fake_runs.load_study(fake_runs.make(tmp_path, n=40))
    end = 100 * study["rl"][0][-1]["scores"]["rule", "greedy", "first"].mean()
    told = [title.text for title in ElementTree.fromstring(page_of.svg_curves(study)).iter("{http://www.w3.org/2000/svg}title")]
    assert f"RL: training compute, counted from the start 3.08 TFLOP, success {end:.1f} %" in told
    told = [title.text for title in ElementTree.fromstring(page_of.svg_path(study)).iter("{http://www.w3.org/2000/svg}title")]
    assert any(re.fullmatch(rf"RL: ID [\d.]+ %, rule OOD {end:.1f} %", text) for text in told)


def test_names_of_arms_stay_apart():
    names = page_of.line_styles(dict.fromkeys(["sft", "rl", "rl-attempts-3", "rl-attempts-5", "rl-overfitted", "sft-both", "my-very-long-arm"]))
    assert [name for name, _ in names.values()] == ["SFT", "RL", "attempts-3", "attempts-5", "overfitted", "both", "my-ve\u2026-arm"]


# samples

def test_right_and_wrong_are_told_by_a_word_and_a_colour():
    right = page_of._turn(tasks.GeneralPoints, {"response": "a", "outcome": "correct", "reward": 5.0}, {})
    wrong = page_of._turn(tasks.GeneralPoints, {"response": "a", "outcome": ["correct"], "reward": 5.0}, {})
    assert "<b class=right>&#10003; right</b>" in right and "answer right" in right and "wrong" not in right
    assert "<b class=wrong>&#10007; wrong</b>" in wrong and "answer wrong" in wrong
    style = page_of.page_template()
    assert "b.right{color:var(--c2)}" in style and "b.wrong{color:var(--c0)}" in style


def test_the_answers_to_one_problem_stand_beside_each_other(tmp_path):
    fake_runs.make(tmp_path, n=40)
    for i, path in enumerate(sorted((tmp_path / "rl/evals").glob("*.json"))):
        evaluation = json.loads(path.read_text())
        evaluation["samples"] = [sample | {"prompt": f"problem {j}", "turns": [{"response": f"<answer {i}>", "outcome": "correct" if i > 5 else "wrong_value",
                                 "reward": 1.0}]} for j, sample in enumerate(evaluation["samples"])]
        path.write_text(json.dumps(evaluation))
    shown = page_of.changes(fake_runs.load_study(tmp_path), "rl")
    assert shown.count("<div class=steps>") == 4 and shown.count("<h4>step 0 <b class=wrong>") == 4 == shown.count("<h4>step 200 <b class=right>")
    first = shown.split("<div class=steps>")[1]
    assert re.findall(r"<h4>step (\d+) ", first) == ["0", "40", "100", "160", "200"] and first.count("&lt;answer") == 5 and "<answer" not in shown
    assert page_of.changes(fake_runs.load_study(tmp_path), "warmup") == ""            # one evaluation


def test_samples_of_training_have_a_viewer(tmp_path):
    run = training_run(tmp_path / "rl")
    (run / "samples").mkdir()
    for step in range(1, 10):
        sample = {"row": "train", "prompt": f"<p>{step}", "reward": 5.0, "turns": [{"response": "</pre><script>", "outcome": "correct", "reward": 5.0, "feedback": ""}]}
        (run / "samples" / f"{step:06d}.json").write_text(json.dumps([sample] * 4) if step < 9 else "[{")
    (run / "samples" / "x.json").write_text("[]")
    page = page_of.samples_html(page_of.load_runs(tmp_path))
    assert re.findall(r"<summary>step (\d+)</summary>", page) == ["1", "3", "5", "7"] and page.count("Training, return 5") + page.count("training, return 5") == 16
    assert "<script" not in page and "<p>1" not in page and "&lt;p&gt;1" in page


# watching

def age(directory, seconds):
    for path in directory.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_study_without_an_evaluation_has_curves_and_progress(tmp_path):
    training_run(tmp_path / "sft", steps=4)
    page = page_of.report_html(tmp_path, every=7)
    assert '<meta http-equiv="refresh" content="7">' in page and "sft: not evaluated yet" in page and "<b>loss</b>" in page
    assert "<progress value=0.400></progress> 40 %" in page and "0:00:12 to go" in page          # 6 steps of 2 s
    assert not re.search(r"<(script|link|iframe|object|form|base)\b|\b(href|action)=|@import|url\(", page) and "default-src 'none'" in page
    assert "http-equiv=\"refresh\"" not in page_of.report_html(tmp_path) and "<progress" not in page_of.report_html(tmp_path)
    page_of.main([str(tmp_path)])
    assert (tmp_path / "report.html").is_file()


def test_a_study_that_goes_on_has_both(tmp_path):
    fake_runs.make(tmp_path, n=40)
    training_run(tmp_path / "rl-more", steps=4)
    with open(tmp_path / "rl/metrics.jsonl", "w") as file:
        file.write('{"step": 1, "flops": 1e9, "loss": 3.5, "step_time": 1.0}\n')
    page = page_of.report_html(tmp_path, every=5)
    assert page.count("<h2>Learning curves") == 2 and "<h2>rl-more: not evaluated yet" in page and page.count("</html>") == 1 and "<h2>Progress at" in page
    (tmp_path / "rl/evals/000000.json").write_text("{")
    assert "rl/evals/000000.json cannot be used" in page_of.report_html(tmp_path, every=5)
    with pytest.raises(ValueError, match="cannot be used"):
        page_of.report_html(tmp_path)


def test_watching_ends_with_the_runs(tmp_path, capsys, monkeypatch):
    run, slept = training_run(tmp_path / "rl", steps=4), []

    def sleep(seconds):
        slept.append((tmp_path / "report.html").read_text())
        if len(slept) == 2:
            with open(run / "metrics.jsonl", "a") as file:
                file.write('{"step": 10, "flops": 1e10, "step_time": 2.0, "loss": 1}\n')
        if len(slept) == 3:
            age(tmp_path, 100)
        assert len(slept) < 5
    monkeypatch.setattr(page_of.time, "sleep", sleep)
    page_of.main([str(tmp_path), "--watch", "3"])
    said = capsys.readouterr().out.splitlines()
    assert said == [f"open {tmp_path / 'report.html'} in a browser; Ctrl-C ends this, not the runs", "rl 40 %, 0:00:12 to go", "rl finished",
                    f"report: {tmp_path / 'report.html'}"]
    assert len(slept) == 3 and all('content="3"' in page for page in slept) and "finished" in slept[2]
    assert "refresh" not in (tmp_path / "report.html").read_text().partition("<style>")[0]


def test_ctrl_c_ends_watching_quietly(tmp_path, capsys, monkeypatch):
    training_run(tmp_path / "rl", steps=4)
    monkeypatch.setattr(page_of.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    page_of.main([str(tmp_path), "--watch"])
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text() and "Traceback" not in capsys.readouterr().err


def test_ctrl_c_lets_a_started_script_end_in_its_own_way(tmp_path, monkeypatch):
    """A terminal sends it to both processes, and the last page of a study takes longer than the quarter of a second that subprocess.call gives."""
    script = tmp_path / "assets" / "slow.py"
    script.parent.mkdir()
    script.write_text("import os, signal, sys, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(1.5)\n"
                      "open(sys.argv[1], 'w').write('written')\nsys.exit(3)\n")
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # as run_main does
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
            evaluate.run_script("slow.py", str(tmp_path / "page"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.type is SystemExit and ended.value.code == 3 and (tmp_path / "page").read_text() == "written"


def test_an_evaluation_that_a_resumed_run_takes_back_does_not_end_watching(tmp_path):
    run = training_run(tmp_path / "rl", steps=10)
    (run / "evals").mkdir()
    (run / "evals" / "000004.json").symlink_to("gone")              # seen by glob, and then it is not there
    assert not page_of.over(tmp_path, page_of.load_runs(tmp_path))
    for name in ("args.json", "metrics.jsonl"):
        os.utime(run / name, (1, 1))
    assert page_of.over(tmp_path, page_of.load_runs(tmp_path))


@pytest.mark.parametrize("flops", ['"x"', "null", "[1]", "NaN"])
def test_a_run_whose_compute_is_no_number_is_not_finished(flops, tmp_path):
    run = training_run(tmp_path / "rl", steps=1, flops=1e9)
    (run / "metrics.jsonl").write_text(f'{{"step": 1, "flops": {flops}, "loss": 1.0}}\n')
    assert "to go" in page_of.report_html(tmp_path, every=5)


def test_a_prompt_that_is_no_text_is_shown_as_it_is(tmp_path):
    fake_runs.make(tmp_path, n=40)
    for path in (tmp_path / "rl/evals").glob("*.json"):
        evaluation = json.loads(path.read_text())
        path.write_text(json.dumps(evaluation | {"samples": [sample | {"prompt": ["<a>"]} for sample in evaluation["samples"]]}))
    assert "[&#x27;&lt;a&gt;&#x27;]" in page_of.changes(fake_runs.load_study(tmp_path), "rl")


def test_watching_waits_for_the_first_run(tmp_path, capsys, monkeypatch):
    def sleep(seconds):
        if (tmp_path / "later/report.html").exists():
            raise KeyboardInterrupt
        (tmp_path / "later").mkdir(exist_ok=True)
    monkeypatch.setattr(page_of.time, "sleep", sleep)
    page_of.main([str(tmp_path / "later"), "--watch"])
    assert "waiting" in capsys.readouterr().out and "No run has begun yet" in (tmp_path / "later/report.html").read_text()


def test_hostile_runs_are_escaped_and_watched(tmp_path):
    run = training_run(tmp_path / "<u>rl", steps=4)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "<script>x\x1b": 1.0}) + "\n")
    (training_run(tmp_path / "bad") / "args.json").write_text("[1]")
    page = page_of.report_html(tmp_path, every=5)
    assert "<script" not in page and "<u>" not in page and "\x1b" not in page and "&lt;script&gt;" in page


def test_evaluate_starts_it(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(evaluate, "run_script", lambda *argv: started.append(argv) or sys.exit(0))
    for argv in (["--watch", "runs/x"], ["--report", "runs/x"]):
        with pytest.raises(SystemExit):
            evaluate.main(argv)
    assert started == [("report.py", "runs/x", "--watch"), ("report.py", "runs/x")]
    with pytest.raises(ValueError, match="--report or --watch"):
        evaluate.main(["--watch", "x", "--report", "x"])


def test_evaluate_takes_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate.torch, "set_num_threads", asked.append)
    evaluate.load("tiny", evaluate.parse_args(["tiny", "--threads", "3", "--device", "cpu"]))
    evaluate.load("tiny", evaluate.parse_args(["tiny", "--device", "cpu"]))
    assert asked == [3]


def test_a_report_that_takes_long_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    fake_runs.make(tmp_path, n=30)
    page_of.load_study(tmp_path)
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 9999, 3))
    monkeypatch.setattr(page_of.time, "time", lambda: next(clock))
    page_of.load_study(tmp_path)
    assert capsys.readouterr().err.splitlines()[0] == "  1 of 24 evaluations read"
