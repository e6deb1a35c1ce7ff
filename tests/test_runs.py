"""A run is what it says it is: other settings, stops, two starts, closed outputs, collapse, and what strangers leave behind."""
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import evaluate as E
from assets import report, study as studies
import model as M
import tasks
import train_rl as RL
import start_twice
import train_sft as SFT
from test_training import lines

ROOT = Path(__file__).resolve().parents[1]
SHORT = "--steps 4 --batch 4 --evals 0 --device cpu".split()


def start(script, *argv, **more):
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **more)


# ---- other settings

@pytest.mark.parametrize("flags, words", [
    ("--steps 5", "--steps 4, not 5"), ("--lr 1e-3", "--lr 0.0003, not 0.001"), ("--seed 1", "--seed 0, not 1"),
    ("--eval-n 7", "--eval-n"), ("--attempts 2", "--attempts 1, not 2"), ("--flops 1e9", "--flops 0.0"), ("--evals 3", "--evals 0, not 3"),
    ("--eval-split test", "--eval-split val, not test"), ("--rule 7", "--rule 10, not 7"), ("--max-new-tokens 9", "--max-new-tokens 64, not 9"),
    ("--model x", "x is not a directory")])
def test_a_run_of_other_settings_is_never_shown_as_this_one(flags, words, sft_run, tmp_path, capsys):
    run = tmp_path / "run"
    SFT.main(["--init", str(sft_run), *SHORT, "--out", str(run), "--or-resume"])
    before = (run / "metrics.jsonl").read_bytes()
    argv = ["--init", str(sft_run), *SHORT, "--out", str(run), "--or-resume", *flags.split()]
    argv = argv[2:] if "--model" in flags else argv
    with pytest.raises(ValueError, match=words.replace(".", r"\.")) as error:
        SFT.main(argv)
    assert "\n" not in str(error.value) and (run / "metrics.jsonl").read_bytes() == before


def test_a_flag_that_is_left_out_differs_too(sft_run, tmp_path):
    argv = ["--init", str(sft_run), *SHORT, "--out", str(tmp_path / "run"), "--or-resume"]
    SFT.main([*argv, "--train", "decoder", "--eval-rows", "id", "--max-new-tokens", "9"])
    with pytest.raises(ValueError, match=r"--train \['decoder'\], not None; --max-new-tokens 9, not None; .*--eval-rows"):
        SFT.main(argv)
    for name in ("args.json", "start.json"):
        run = tmp_path / name
        shutil.copytree(tmp_path / "run", run)
        (run / name).write_text("[1]")
        with pytest.raises(ValueError, match=name):
            SFT.main([*argv[:-2], str(run), "--or-resume"])
        with pytest.raises(ValueError, match=name):
            SFT.main(["--resume", str(run)])


def test_the_same_flags_continue_what_was_stopped(sft_run, tmp_path, capsys):
    argv = ["--init", str(sft_run), *SHORT, "--out", str(tmp_path / "run"), "--or-resume"]
    from test_training import stop_after
    stop_after(SFT, 2, lambda: SFT.main(argv))
    assert "stopped at step 2" in capsys.readouterr().out
    SFT.main([*argv, "--threads", "1", "--save-every", "50"])
    said = capsys.readouterr().out
    assert "continued at step 2" in said and "done" in said and [r["step"] for r in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_an_evaluation_of_other_settings_is_refused_and_the_same_one_is_kept(sft_run, tmp_path, capsys):
    argv = [str(sft_run), "--n", "3", "--max-new-tokens", "3", "--out", str(tmp_path / "base"), "--or-resume"]
    E.main(argv)
    path = tmp_path / "base" / "evals" / "000000.json"
    before = path.stat().st_mtime_ns
    E.main(argv)
    assert "is there already" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="model .*, not tiny"):
        E.main(["tiny", *argv[1:]])
    for flags, words in (("--n 4", "n 3, not 4"), ("--split val", "split test, not val"), ("--attempts 2", "attempts 1, not 2"),
                         ("--suite gp-l-probes", "suite gp-l, not gp-l-probes"), ("--k 2", "k 0, not 2")):
        with pytest.raises(ValueError, match=words):
            E.main([*argv, *flags.split()])


# ---- stops

LONG = "--batch 16 --evals 0 --steps 100000 --save-every 0 --device cpu --threads 1".split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_its_own_status(number, sft_run, tmp_path):
    run = start("train_sft.py", "--init", sft_run, "--out", tmp_path / "run", *LONG)
    while "step " not in run.stdout.readline():
        assert run.poll() is None
    run.send_signal(number)
    run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert E.latest_checkpoint(tmp_path / "run").name == f"step-{lines(tmp_path / 'run')[-1]['step']:06d}"


@pytest.mark.parametrize("sink", ["closed", "full"])
def test_a_reader_that_leaves_costs_nothing(sink, sft_run, tmp_path):
    """`| head -2`, and a standard output on a full disk: the run stops after a save, with a status that says so."""
    flags = ["--init", sft_run, "--out", tmp_path / "run", *LONG]
    if sink == "full":
        with open("/dev/full", "w") as full:
            run = subprocess.run([sys.executable, ROOT / "train_sft.py", *map(str, flags)], stdout=full, stderr=subprocess.PIPE, text=True,
                                 timeout=120)
    else:
        run = start("train_sft.py", *flags)
        for _ in range(3):
            run.stdout.readline()
        run.stdout.close()
        run.stderr.read()
        run.wait(60)
    assert run.returncode not in (0, 120)
    checkpoint, written = E.latest_checkpoint(tmp_path / "run"), lines(tmp_path / "run") if sink == "closed" else []
    assert (checkpoint / "state.pt").is_file() and (not written or int(checkpoint.name[5:]) == written[-1]["step"])


def test_of_two_starts_exactly_one_wins():
    assert start_twice.main(2) == 2


def test_a_start_that_fails_leaves_nothing_and_a_killed_one_can_begin_again(sft_run, tmp_path):
    with pytest.raises(ValueError, match="safetensors|no model|holds neither"):
        (tmp_path / "empty").mkdir()
        SFT.main(["--model", str(tmp_path / "empty"), *SHORT, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "source").mkdir(parents=True)  # killed before args.json was there
    (tmp_path / "run" / "lock").write_text("")
    SFT.main(["--init", str(sft_run), *SHORT, "--out", str(tmp_path / "run")])
    assert len(lines(tmp_path / "run")) == 4


# ---- a stopped run is no finished one

def test_who_reads_a_stopped_run_says_so(sft_run, tmp_path, capsys):
    from test_training import stop_after
    study = tmp_path / "study"
    flags = f"--init {sft_run} --batch 4 --eval-n 3 --eval-split test --device cpu --lr 1e-4"
    stop_after(SFT, 2, lambda: SFT.main(f"{flags} --steps 6 --evals 2 --out {study / 'sft'}".split()))
    SFT.main(f"{flags} --steps 2 --evals 2 --out {study / 'rl'}".split())
    capsys.readouterr()
    report.main([str(study)])
    said, page = capsys.readouterr().out, (study / "report.html").read_text()
    assert "SFT, step 0 of 6" in said and "RL, end" in said and "SFT, end" not in said
    assert "SFT, step 0 of 6" in page and "not finished" in page
    SFT.main(["--init", str(study / "sft"), *SHORT, "--out", str(tmp_path / "next")])
    assert "not finished: step 2 of 6" in capsys.readouterr().err
    os.rename(study / "sft", study / "sft-lr0.0001")
    with pytest.raises(ValueError, match="not finished"):
        studies.choose_rates(study)


# ---- moves

@pytest.mark.parametrize("lora", [0, 2])
def test_a_study_moves_with_its_start_and_the_working_directory_does_not_matter(lora, sft_run, tmp_path, monkeypatch):
    """A trap beside: runs/warm in the new working directory has other weights and is never taken."""
    from test_training import stop_after
    study, place = tmp_path / "study", tmp_path / "place"
    shutil.copytree(sft_run, study / "warm")
    monkeypatch.chdir(study)
    flags = f"--init warm --out rl --steps 4 --save-every 1 --problems 2 --group 2 --max-new-tokens 3 --evals 0 --lora-rank {lora} --kl-coef 0.1"
    stop_after(RL, 2, lambda: RL.main(flags.split()))
    place.mkdir()
    shutil.copytree(sft_run, place / "warm")
    weights = E.latest_checkpoint(place / "warm") / M.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    monkeypatch.chdir(place)
    os.rename(study, tmp_path / "moved")
    RL.main(["--resume", str(tmp_path / "moved" / "rl")])
    assert [r["step"] for r in lines(tmp_path / "moved" / "rl")] == [1, 2, 3, 4]
    M.load_model(E.latest_checkpoint(tmp_path / "moved" / "rl"))
    shutil.rmtree(tmp_path / "moved" / "warm")
    with pytest.raises(ValueError, match="began from other weights than .*moved/warm.* and .*study/warm"):
        RL.main(["--resume", str(tmp_path / "moved" / "rl")])


# ---- edited and forged files

def test_edited_arguments_and_forged_states_are_one_sentence(sft_run, tmp_path, capsys):
    study = tmp_path / "study"
    shutil.copytree(sft_run, study / "sft")
    for change in ({"lr": [1]}, {"flops": "many"}, {"steps": {}}, {"flops": "12"}):
        args = json.loads((sft_run / "args.json").read_text())
        (study / "sft" / "args.json").write_text(json.dumps(args | change))
        with pytest.raises(ValueError, match="sft/args.json cannot be used .*is no number"):
            report.load_study(study)
    for i, forged in enumerate(([1], {"step": "2"}, {}, {"step": 2}, {"step": 2, "optimizer": 7, "random": 0, "progress": {}},
                                {"step": 2, "optimizer": {"state": {}, "param_groups": []}, "random": {}, "progress": {"x": 1}})):
        run = tmp_path / str(i)
        shutil.copytree(sft_run, run)
        step = E.latest_checkpoint(run)
        torch.save(forged, step / "state.pt")
        M.write_json(step / SFT.CHECKSUMS, SFT.checksums(step, [p.name for p in step.iterdir() if p.name != SFT.CHECKSUMS]))
        with pytest.raises(ValueError) as error:
            SFT.main(["--resume", str(run)])
        assert "\n" not in str(error.value) and str(run) in str(error.value)


def test_ctrl_c_while_torch_is_loaded_leaves_no_traceback():
    for script in ("train_sft.py", "train_rl.py", "evaluate.py"):
        run = start(script, "--help")
        time.sleep(0.4)
        run.send_signal(signal.SIGINT)
        assert "Traceback" not in run.communicate()[1]


# ---- collapse

def test_a_collapse_is_named_with_its_rate(tmp_path, capsys):
    run = SFT.Run(RL.parse_args(["--lr", "1e-3"]), None, type("M", (), {"device": "cpu"}), None, None)
    for step in range(60):
        run.progress.step = step
        run.notice_collapse({"success": 0.4 if step < 25 else 0.1, "entropy": 0.3})
    said = capsys.readouterr().err
    assert said.count("--lr 0.001 is too high") == 1 and "below half of its best, 40 %" in said
    run = SFT.Run(RL.parse_args(["--lr", "1e-3"]), None, type("M", (), {"device": "cpu"}), None, None)
    run.notice_collapse({"success": 0.0, "entropy": 0.01})
    assert "hardly vary" in capsys.readouterr().err
    for step in range(100):
        run.progress.step = step
        run.notice_collapse({"success": 0.4 + step / 400, "entropy": 0.01})
    assert not capsys.readouterr().err


def test_a_warning_about_a_step_stands_below_its_line(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(SFT.Run, "say", lambda self, text, file=None: said.append(text))
    monkeypatch.setattr(SFT.Run, "notice_collapse", lambda self, metrics: self.say("warning"))
    SFT.main(f"--steps 1 --batch 2 --evals 0 --device cpu --out {tmp_path / 'run'}".split())
    assert "100%" in said[said.index("warning") - 1]


def test_one_lucky_group_does_not_hide_the_others():
    run = SFT.Run(RL.parse_args([]), None, type("M", (), {"device": "cpu"}), None, None)
    for step in range(90):
        lucky = step % 30 == 29
        run.notice_waste({"grad_norm": 1.0, "learning_rate": 1e-4} if lucky else {"success": 0.0}, True if lucky else None)
    assert "no group had unequal returns" in run.useless


# ---- strangers' files

def test_no_link_can_lie_in_wait(tmp_path):
    """Names that could be guessed beside the target are links to a file of the user: it stays, and so does what they point to."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".report.json.tmp", ".report.json.x.tmp"):
        (tmp_path / name).symlink_to(victim)
    (tmp_path / "report.json").symlink_to(victim)
    M.write_json(tmp_path / "report.json", {"a": 1})
    assert victim.read_text() == "mine" and not (tmp_path / "report.json").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".report.json.tmp", ".report.json.x.tmp", "report.json", "victim"]


def test_resume_deletes_in_no_linked_directory(sft_run, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(sft_run, run)
    os.rename(run / "evals", elsewhere)
    (elsewhere / "999999.json").write_text("{}")
    (run / "evals").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="evals is a link"):
        SFT.main(["--resume", str(run)])
    assert (elsewhere / "999999.json").exists()


def test_a_pipe_where_a_file_should_be_is_a_sentence_and_no_waiting(sft_run, tmp_path):
    def in_time(function, words):
        failed = []

        def call():
            try:
                function()
            except ValueError as error:
                failed.append(str(error))
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(20)
        assert failed and words in failed[0], failed
    os.mkfifo(tmp_path / "pipe")
    in_time(lambda: M.read_json(tmp_path / "pipe"), "no regular file")
    in_time(lambda: M.open_image(str(tmp_path / "pipe")), "cannot be read as a picture")
    study = tmp_path / "study"
    (study / "sft" / "evals").mkdir(parents=True)
    os.mkfifo(study / "sft" / "evals" / "000000.json")
    in_time(lambda: report.load_study(study), "000000.json")
    shutil.copytree(sft_run, tmp_path / "run")
    (tmp_path / "run" / "args.json").unlink()
    os.mkfifo(tmp_path / "run" / "args.json")
    in_time(lambda: SFT.main(["--resume", str(tmp_path / "run")]), "holds no run")


@pytest.mark.parametrize("name", ["step-000002.bak", "step-2", "step-abcdef", "step-"])
def test_copies_that_people_make_inside_a_run_are_left_alone(name, sft_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(sft_run, run)
    shutil.copytree(run / "step-000002", run / name)
    SFT.main(["--resume", str(run)])
    SFT.main(["--init", str(run), *SHORT, "--out", str(tmp_path / "next")])
    assert (run / name / "state.pt").exists()


def test_a_grid_beside_other_runs(tmp_path, sft_run):
    for name in ("rl-lrbest", "rl-lr1e-5"):
        RL.main(f"--init {sft_run} --out {tmp_path / name} --steps 1 --problems 1 --group 2 --max-new-tokens 2 --lr 1e-5 --eval-n 2 --evals 1".split())
    assert studies.choose_rates(tmp_path) == {"rl": (1e-5, 1e-5)}


def test_files_have_the_rights_that_umask_gives(sft_run, tmp_path):
    E.main([str(sft_run), "--export", str(tmp_path / "out")])
    for path in [*(tmp_path / "out").iterdir(), *(E.latest_checkpoint(sft_run)).iterdir(), sft_run / "latest"]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o666 == 0o666 & ~M.UMASK, path
    assert stat.S_IMODE(E.latest_checkpoint(sft_run).stat().st_mode) == 0o777 & ~M.UMASK


@pytest.mark.parametrize("text", ["\u061c", "\U000e0041", "\u202e", "\x1b[31m"])
def test_characters_that_hide_are_removed(text):
    assert E.clean(f"a{text}b") in ("ab", "a[31mb")


def test_killed_evaluations_and_reports_leave_whole_files():
    import kill_reads
    assert kill_reads.main(["--kills", "3"]) == (3, 0)


def test_a_model_is_loaded_without_torchs_compiler():
    """Which would take longer than all else that evaluate.py does before its first answer."""
    code = ("import sys, evaluate; evaluate.load_model(evaluate.find_model('tiny', 'gp-vl')); "
            "assert not {'torch._dynamo', 'sympy'} & {*sys.modules}")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
