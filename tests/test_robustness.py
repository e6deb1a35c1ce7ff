"""Bad input, damaged files, full disks, kills, and training that goes wrong: one sentence, and nothing that was there is lost."""

import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate as E
import kill_saves
import model as M
import tasks
import train_rl as RL
import train_sft as SFT
from assets import make_base, memory, report, study as studies

ROOT = Path(__file__).resolve().parents[1]


def contents(folder):
    """{relative name: hash} of everything below a folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in sorted(folder.rglob("*"))}


def step_of(run):
    return E.latest_checkpoint(run).name


# ---- bad input

@pytest.fixture(scope="session")
def place(sft_run, tmp_path_factory):
    """A folder with a good run, and with copies of it that are broken, each in another way."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(sft_run, place / "run")
    (place / "empty").mkdir()
    (place / "file").write_text("not a directory")

    def copy(name):
        shutil.copytree(sft_run, place / name)
        return place / name, E.latest_checkpoint(place / name)

    def edit(path, change):
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
    run, step = copy("half")
    shutil.rmtree(step)
    (copy("pointer")[0] / "latest").write_text("../../etc")
    (copy("binary")[0] / "latest").write_bytes(b"\xff\x00\x1b[31m")
    run, step = copy("cut")
    (step / M.WEIGHTS).write_bytes((step / M.WEIGHTS).read_bytes()[:1000])
    run, step = copy("junk")
    (step / M.WEIGHTS).write_bytes(b"\xff" * 4096)
    run, step = copy("size")
    edit(step / "config.json", lambda c: c["text_config"].update(intermediate_size=96))
    run, step = copy("tokenless")
    (step / "tokenizer.json").unlink()
    run, step = copy("words")
    (step / "tokenizer.json").write_text("{}")
    run, step = copy("stateless")
    (step / "state.pt").unlink()
    edit(copy("typed")[0] / "args.json", lambda a: a.update(steps="many"))
    edit(copy("nan")[0] / "args.json", lambda a: a.update(lr=math.nan))
    edit(copy("flagless")[0] / "args.json", lambda a: a.pop("batch"))
    edit(copy("task")[0] / "args.json", lambda a: a.update(task="chess"))
    for name, change in (("vast", {"steps": 10**400}), ("words_for", {"max_new_tokens": "64"}), ("rules_of", {"rules": [1]}),
                         ("begun", {"init_path": 5}), ("sgd", {"optimizer": "sgd"}), ("other_state", {"optimizer": "adamw16"}),
                         ("linear", {"schedule": "linear"}), ("on_train", {"eval_split": "train"})):
        edit(copy(name)[0] / "args.json", lambda a: a.update(change))
    (copy("text")[0] / "args.json").write_text("{")
    (copy("list")[0] / "args.json").write_text("[]")
    (copy("empty_args")[0] / "args.json").write_text("")
    return place


NEW = ["--model", "tiny", "--out", "new"]
BAD = [  # script, flags, words of the sentence
    *[(script, ["--task", "poker", *NEW], "poker") for script in (SFT, RL)],
    *[(script, ["--rule", rule, *NEW], re.escape(words)) for script in (SFT, RL) for rule, words in (
        ("ten", "ten"), ("10/cards=9", "3 to 6"), ("0", "0"), ("11,12", "three"), ("1e9", "1e9"), ("10/target=0", "target"))],
    *[(SFT, [flag, value, *NEW], flag) for flag, value in (
        ("--steps", "0"), ("--steps", "-5"), ("--steps", "ten"), ("--steps", "99999999999999999999"), ("--batch", "0"),
        ("--batch", "1000000000000"), ("--lr", "nan"), ("--lr", "0"), ("--lr", "-1e-4"), ("--lr", "inf"), ("--flops", "-1"),
        ("--flops", "nan"), ("--flops", "inf"), ("--eval-n", "0"), ("--micro-batch", "0"), ("--lora-rank", "-1"), ("--rollout-batch", "0"),
        ("--lr-end", "2"), ("--lr-warmup", "-1"), ("--weight-decay", "nan"), ("--max-grad-norm", "0"), ("--max-new-tokens", "-3"),
        ("--attempts", "0"), ("--seed", "-1"), ("--evals", "-1"), ("--threads", "-1"), ("--schedule", "linear"),
        ("--optimizer", "sgd"), ("--optimizer", "muon"), ("--split", "test"), ("--device", "tpu"), ("--device", "cuda:77"), ("--eval-suite", "poker"),
        ("--demonstrators", "clever"), ("--rules", "10:0"), ("--rules", "10:x"), ("--learning-rate", "1"))],
    *[(RL, [flag, value, *NEW], flag) for flag, value in (
        ("--estimator", "ppo2"), ("--group", "1"), ("--group", "0"), ("--problems", "0"), ("--temperature", "0"),
        ("--temperature", "nan"), ("--discount", "1.5"), ("--clip-eps", "-1"), ("--kl-coef", "nan"), ("--kl-every", "-1"))],
    *[(script, ["--task", task, *flags, "--init", "run", "--out", "new"], words) for script in (SFT, RL) for task, flags, words in (
        ("gp-vl", ["--visual", "plaid"], "suits must be one of"), ("gp-vl", ["--visual", "red/glyphs=gothic"], "glyphs must be one of"),
        ("gp-vl", ["--visual", "red/light=500"], "light must be from 40 to 140"), ("gp-vl", ["--visual", "red/light=50/noise=40/scheme=pips"], "at least 4[08] pixels"),
        ("gp-vl", ["--rule", "10/cards=5"], "at least 40 pixels"), ("gp-vl", ["--train", "eyes"], "--train"),
        ("gp-l", ["--visual", "black"], "no visual"), ("gp-l", ["--train", "tower"], "only the decoder"))],
    (SFT, ["--task", "gp-vl", "--visuals", "black:2", "red:x", "--init", "run", "--out", "new"], "--visuals red:x"),
    (E, ["--compare", "run", "absent"], "absent is not a directory"),
    (E, ["run", "--compare", "run", "run"], "give one of"),
    (E, ["run", "--ask", "x", "--image", "file"], "cannot be read as a picture"),
    (make_base, ["--fresh", "--model", "11b", "--out", "new"], "--fresh"),
    (SFT, ["--model", "huge", "--out", "new"], "huge"),
    *[(script, ["--init", name, "--out", "new"], words) for script in (SFT, RL) for name, words in (
        ("absent", "absent is not a directory"), ("file", "file is not a directory"), ("empty", "empty holds neither"),
        ("half", "half/latest"), ("pointer", "pointer/latest"), ("binary", "binary/latest"), ("cut", "cut.*safetensors"),
        ("junk", "junk.*safetensors"), ("size", "size.*shape"), ("tokenless", "tokenizer.json"), ("words", "tokenizer.json"))],
    *[(SFT, ["--resume", name], words) for name, words in (
        ("absent", "absent holds no run"), ("file", "file holds no run"), ("empty", "empty holds no run"),
        ("typed", "typed/args.json.*--steps"), ("nan", "--lr"), ("flagless", "flagless/args.json was not written by.*differ in batch\\).*NEWER"), ("task", "chess"), ("text", "not JSON"),
        ("list", "args.json"), ("empty_args", "not JSON"), ("cut", "no checkpoint of cut"), ("stateless", "no checkpoint of stateless"))],
    *[(SFT, ["--resume", name], words) for name, words in (
        ("vast", "--steps"), ("words_for", "max_new_tokens cannot be"), ("rules_of", "rules cannot be"), ("begun", "init_path cannot be"),
        ("sgd", "sgd/args.json.*--optimizer"), ("other_state", "another optimizer"), ("linear", "linear/args.json.*--schedule"), ("on_train", "on_train/args.json.*--eval-split"))],
    (SFT, ["--resume", "run", "--lr", "3e-4"], "leave out --lr"),
    *[(SFT, argv, words) for argv, words in (
        (["--resume", ""], "--resume is empty"), (["--init", "", "--out", "new"], "--init is empty"), (["--model", "tiny", "--out", "o\udcff"], "--out"),
        (["--model", "tiny", "--out", "o\x1b[31m"], "--out"), (["--steps", "9" * 400, *NEW], "--steps"))],
    *[(make_base, argv, words) for argv, words in (
        (["--optimizer", "muon", "--lora-rank", "2", *NEW], "muon"), (["--split", "test", *NEW], "--split"),
        (["--fresh", "--lora-rank", "2", "--out", "new"], "--fresh"), (["--fresh", "--init", "run", "--out", "new"], "--fresh"))],
    (E, ["run", "--ask", "\udcff"], "--ask"),
    (E, ["run", "--ask", "x", "--image", ""], "--image"),
    (E, ["run", "--out", "run"], "holds a run"),
    (E, ["run", "--export", "half"], "--export half holds a run"),
    (E, ["."], "holds runs: give one of them"),
    (RL, ["--resume", "run"], "continue the run with the script that began it"),
    (SFT, ["--resume", "run", "--init", "run"], "only one"),
    (SFT, ["--resume", "run", "--lr", "1e-3"], "leave out --lr"),
    (SFT, ["--model", "tiny", "--out", "run"], "run is there already"),
    (SFT, ["--model", "tiny", "--out", "file"], "file is there already"),
    (SFT, ["--model", "tiny", "--out", "file/inside"], "file"),
    (E, ["absent"], "absent is not a directory"),
    (E, ["empty"], "empty holds neither"),
    (E, ["cut"], "safetensors"),
    (E, [], "give one of"),
    (E, ["run", "--suite", "poker"], "--suite"),
    *[(E, ["run", flag, value], flag) for flag, value in (("--n", "0"), ("--k", "-1"), ("--attempts", "0"), ("--max-new-tokens", "0"))],
    (report, ["empty"], "no evaluation in empty"),
    (report, ["absent"], "absent"),
    (studies, ["--choose", "empty"], "empty"), (studies, ["empty"], "empty"), (studies, [], "give one of"),
]


@pytest.mark.parametrize("script, argv, words", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else getattr(x, "__name__", ""))
def test_bad_input_is_one_sentence_and_changes_nothing(script, argv, words, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    before = contents(place)
    with pytest.raises(SystemExit) as ended:
        E.run_main(lambda: script.main(argv))
    errors = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2 and errors[-1].startswith("error: ") and "Traceback" not in "".join(errors)
    assert len(errors) == 1 or all("is damaged" in line for line in errors[:-1])
    assert re.search(words, errors[-1]), errors[-1]
    assert not re.search(r"[\x00-\x1f\x7f]", errors[-1])
    assert contents(place) == before


def test_there_are_enough_of_them():
    assert len(BAD) > 90


def test_from_the_shell_it_is_exit_status_2_without_a_traceback(place):
    for script, argv in (("train_sft.py", "--lr nan"), ("train_rl.py", "--init empty"), ("evaluate.py", "absent"), ("tasks.py", "--rule x")):
        done = subprocess.run([sys.executable, ROOT / script, *argv.split()], cwd=place, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == "", (script, done.stderr)


# ---- checkpoints

def train(out, start, *flags):
    SFT.main(["--init", str(start), "--out", str(out), *"--batch 4 --evals 0 --steps 6 --save-every 2 --device cpu".split(), *flags])


@pytest.fixture(scope="session")
def whole_run(tiny_run, tmp_path_factory):
    """Six steps with a checkpoint after every second one."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, tiny_run)
    return out


def damage(kind, step):
    """Break one file of a checkpoint."""
    target = step / ("state.pt" if "state" in kind else M.WEIGHTS)
    data = bytearray(target.read_bytes())
    if "cut" in kind:
        data = data[: len(data) // 2]
    elif "empty" in kind:
        data = b""
    elif "flipped" in kind:
        data[len(data) // 2] ^= 1
    target.write_bytes(data) if "gone" not in kind else target.unlink()


@pytest.mark.parametrize("kind", ["weights cut", "weights empty", "weights flipped", "weights gone", "state cut", "state empty",
                                  "state flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(kind, whole_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    wanted = contents(run)
    damage(kind, run / "step-000006")
    SFT.main(["--resume", str(run)])
    said = capsys.readouterr()
    assert "step-000006 is damaged" in said.err and "continued at step 4" in said.out
    again = contents(run)
    assert all(again[name] == wanted[name] for name in wanted if name.startswith("step-") and name.endswith(("safetensors", "config.json")))
    assert [SFT.step_of(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_never_saved_starts_again(whole_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    for step in run.glob("step-*"):
        shutil.rmtree(step)
    (run / "latest").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    SFT.main(["--resume", str(run)])
    assert "continued at step 0" in capsys.readouterr().out
    assert (run / "step-000006" / M.WEIGHTS).read_bytes() == (whole_run / "step-000006" / M.WEIGHTS).read_bytes()
    assert [SFT.step_of(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_files_that_others_leave_do_no_harm(whole_run, tmp_path, capsys):
    """A file manager's note in a checkpoint, lines of any kind in the metrics, odd names among the evaluations."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    (run / "step-000006" / ".DS_Store").write_text("x")
    (run / "step-000006" / "evals").mkdir()
    (run / "evals" / "\u00b2000001.json").write_text("{}")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": "x"}\n{"step": null}\n' + b"[" * 100_000 + b"\n\xff\n7\n")
    SFT.main(["--resume", str(run)])
    assert "continued at step 6" in capsys.readouterr().out
    assert [SFT.step_of(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_are_sorted_as_numbers(whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    os.rename(run / "step-000004", run / "step-999999")
    os.rename(run / "step-000006", run / "step-1000000")
    args = SFT.parse_args(["--resume", str(run)])
    assert [path.parent.name for path in SFT.RunDirectory(args.out, True).states()] == ["step-999999", "step-1000000"]


def test_only_one_process_may_continue_a_run(tiny_run, tmp_path):
    flags = "--batch 8 --evals 0 --steps 100000 --save-every 0 --device cpu --threads 1".split()
    run = subprocess.Popen([sys.executable, ROOT / "train_sft.py", "--init", tiny_run, "--out", tmp_path / "run", *flags],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while "step" not in run.stdout.readline():
        assert run.poll() is None
    try:
        with pytest.raises(ValueError, match="another process"):
            SFT.main(["--resume", str(tmp_path / "run")])
    finally:
        run.kill()
        run.communicate()
    assert SFT.RunDirectory(str(tmp_path / "run"), True).resume_point() == (None, None)


def test_a_lora_run_wants_the_base_that_it_began_from(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "base")
    train(tmp_path / "run", tmp_path / "base", "--lora-rank", "2")
    weights = E.latest_checkpoint(tmp_path / "base") / M.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="other weights"):
        SFT.main(["--resume", str(tmp_path / "run")])


# ---- memory

SHORT = "--steps 4 --batch 4 --max-new-tokens 4 --eval-rows id --evals 2 --eval-n 2 --save-every 0 --device cpu --lr-warmup 0".split()
SHORT_RL = "--steps 4 --eval-rows id --problems 2 --group 2 --max-new-tokens 4 --evals 2 --eval-n 2 --save-every 0 --device cpu --lr-warmup 0".split()


@pytest.fixture(scope="session")
def short_runs(tiny_run, tmp_path_factory):
    """Runs of both trainers, four steps long, that nothing has stopped."""
    out = tmp_path_factory.mktemp("short")
    for script, flags in ((SFT, SHORT), (RL, [*SHORT_RL, "--estimator", "reinforce"])):
        script.main(["--init", str(tiny_run), "--out", str(out / script.__name__), *flags])
    return out


@pytest.mark.parametrize("phase, owner, function, at, step", [
    ("update", SFT, "sft_backward", 3, 2), ("update", RL, "rl_backward", 3, 2), ("rollout", RL, "rollout", 3, 2),
    ("evaluation", SFT, "evaluate", 2, 4), ("update", SFT, "sft_backward", 1, 0), ("update", SFT, "update", 3, 0)])
def test_out_of_memory_saves_first_and_goes_on_with_other_flags(phase, owner, function, at, step, short_runs, tiny_run, tmp_path, monkeypatch, capsys):
    """Torch's own numbers and the phase are in the sentence. What was whole is saved, so that a resume equals the run that had room."""
    script, real, calls = RL if owner is RL else SFT, getattr(owner, function), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1.25 GiB free.")
        return real(*args, **kwargs)
    monkeypatch.setattr(owner, function, full)
    flags = SHORT if script is SFT else [*SHORT_RL, "--estimator", "reinforce"]
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        E.run_main(lambda: script.main(["--init", str(tiny_run), "--out", str(run), *flags]))
    said = capsys.readouterr().err.strip()
    assert re.search(rf"error: out of memory in the {phase} after step {step if function != 'update' else 2} \(CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 "
                     rf"has 1.25 GiB free.\): go on at step {step} with --resume {run} and a", said), said
    assert ("--micro-tokens" in said) == (phase == "update") and (step_of(run) == f"step-{step:06d}" if step else not (run / "latest").exists())
    monkeypatch.undo()
    script.main(["--resume", str(run), "--micro-batch", "200", "--rollout-batch", "100"])
    whole = short_runs / script.__name__
    assert (run / "step-000004" / M.WEIGHTS).read_bytes() == (whole / "step-000004" / M.WEIGHTS).read_bytes()
    assert [SFT.step_of(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert json.loads((run / "args.json").read_text())["micro_batch"] == 200


def test_other_errors_of_torch_are_no_lack_of_memory(start, monkeypatch):
    def wrong(*args, **settings):
        raise RuntimeError("shapes differ")
    monkeypatch.setattr(SFT, "sft_backward", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        SFT.main([*start, "--batch", "2"])


def test_a_resumed_run_may_be_longer_and_use_memory_otherwise(short_runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(short_runs / "train_sft", run)
    before = contents(run)
    for flags, words in (("--steps 4", "--steps can only grow .* from 4"), ("--flops 1e9", "--flops can only grow"),
                         ("--lr 1", "leave out --lr. Only steps, flops, micro_tokens.* start a new run with --init"), ("--preset ours", "leave out --preset")):
        with pytest.raises(ValueError, match=words):
            SFT.main(["--resume", str(run), *flags.split()])
        assert contents(run) == before
    SFT.main(["--resume", str(run), *"--steps 5 --recompute --micro-tokens 50 --keep 1".split()])
    stored = json.loads((run / "args.json").read_text())
    assert (stored["steps"], stored["recompute"], stored["micro_tokens"], stored["keep"]) == (5, True, 50, 1)
    assert step_of(run) == "step-000005"
    stored.pop("micro_tokens"), stored.pop("keep"), stored.pop("preset"), stored.pop("dry_run")
    M.write_json(run / "args.json", stored)  # as an older version wrote it
    SFT.main(["--resume", str(run)])
    assert "continued at step 5" in capsys.readouterr().out


# ---- room on the disk

@pytest.mark.parametrize("flags, left, states", [
    ("--evals 4", ["step-000000", "step-000002", "step-000003", "step-000004", "step-000005", "step-000006"], 2),  # 0, 2, 4, 6 evaluated
    ("--evals 0 --keep 1", ["step-000006"], 1), ("--evals 0 --keep 3", ["step-000004", "step-000005", "step-000006"], 3)])
@pytest.mark.parametrize("small", [True, False])
def test_checkpoints_that_stay(flags, left, states, small, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(SFT, "SMALL", 2e9 if small else 1)
    SFT.main(["--init", str(tiny_run), "--out", str(tmp_path / "run"), *"--batch 2 --eval-n 2 --steps 6 --save-every 1 --device cpu".split(),
              *flags.split()])
    found = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    wanted = [name for name in left if name != "step-000000" and (name != "step-000003")]
    assert found == (wanted if small else wanted[-states:])
    assert len(list((tmp_path / "run").glob("step-*/state.pt"))) == states and not list((tmp_path / "run").glob(".*"))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**4))
    with pytest.raises(ValueError, match=r"checkpoints will take 0.\d+ GB and .*run has room for 0.00: make room, or lower --keep"):
        SFT.main([*start, "--batch", "2"])
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    SFT.main([*start, *"--batch 2 --steps 1".split()])
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "step-000001").iterdir())
    said = re.search(r"checkpoints up to (\d+\.\d+) of \d+ GB", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(3 * size / 1e9, abs=0.011)


# ---- presets, dry runs

@pytest.mark.parametrize("script", [SFT, RL])
def test_presets_are_flags_that_others_overrule(script):
    for name in script.PRESETS:
        args = script.parse_args(["--preset", name])
        plain = script.parse_args(script.PRESETS[name].split())
        assert vars(args) == vars(plain) | {"preset": name} and vars(args) != vars(script.parse_args([])) | {"preset": name}
    assert script.parse_args(["--lr", "0.5", "--preset", "ours"]).lr == 0.5


class Given:
    """Demonstrations of 250 tokens of prompt and 60 of answer."""
    def episode(self, tokenizer, index):
        return E.Episode(tasks.make("gp-l", index=index), [5 + index] * 310, [0] * 250 + [1] * 60, [0.0] * 310)


@pytest.fixture(scope="session")
def shape_of_11b(tmp_path_factory):
    """A directory with the 11B's config and a tokenizer, without weights."""
    place = tmp_path_factory.mktemp("11b")
    M.write_json(place / "config.json", M.config_to_json(M.SIZES["11b"]))
    words = (SFT.find_model("tiny", "gp-l") / "tokenizer.json").read_text("utf-8")
    words = words.replace("<|user|>", "<|start_header_id|>").replace("<|assistant|>", "<|end_header_id|>")
    (place / "tokenizer.json").write_text(words, "utf-8")
    return place


def test_dry_runs_meet_the_peaks_that_were_measured(shape_of_11b, monkeypatch):
    """Those of tests/results/11b-h200.md, within 10 %; a rollout, which took 32.9 GB there, keeps each prompt once by now."""
    monkeypatch.setattr(SFT, "demonstrations", lambda args, style: Given())
    for flags, peak in (("--micro-batch 16", 52.7), ("--micro-batch 8", 37.4), ("--micro-batch 8 --recompute", 24.7)):
        args = SFT.parse_args(["--model", str(shape_of_11b), *f"--lora-rank 8 --batch 16 --micro-tokens 5000 {flags}".split()])
        assert sum(memory.estimate_run(args)["training"].values()) / 1e9 == pytest.approx(peak, rel=0.1), flags
    monkeypatch.setattr(memory, "longest", lambda problem, tokenizer, new: Given().episode(tokenizer, 0))
    for flags, peak in (("--problems 16 --group 16", 24.4), ("--problems 8 --group 8 --rollout-batch 64", 22.4)):
        args = RL.parse_args(["--model", str(shape_of_11b), *f"--lora-rank 8 --evals 0 {flags}".split()])
        found = memory.estimate_run(args)
        without = sum(size for use, size in found["rollout"].items() if use not in ("adapters", "optimizer")) / 1e9
        assert without == pytest.approx(peak, rel=0.03)
        assert found["training"]["kept from the rollout"] > 0.1 * 1e9  # the graph of a step
        assert sum(found["training"].values()) < 80e9  # the defaults fit


def test_readmes_dry_run_needs_no_weights(shape_of_11b, tmp_path, capfd, monkeypatch):
    command, = re.findall(r"(?m)^python train_sft.py (.*--dry-run) +# .* by config.json and tokenizer.json alone$", (ROOT / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-11b").symlink_to(shape_of_11b)
    with pytest.raises(SystemExit) as ended:
        SFT.main(command.split())
    assert ended.value.code == 0 and re.search(r"peak +\d.* GB: fits in 80 GB", capfd.readouterr().out)


def test_a_dry_run_says_what_is_needed_and_writes_nothing(tiny_run, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, flags in ((SFT, "--batch 4"), (RL, "--problems 2 --group 2 --attempts 2")):
        with pytest.raises(SystemExit) as ended:
            script.main(["--init", str(tiny_run), *flags.split(), "--dry-run", "--out", "new"])
        said = capfd.readouterr().out
        assert ended.value.code == 0 and re.search(r"(?s)training +\d.*rollout +\d.*peak +\d.* GB: fits.*disk +\d", said), said
    assert not list(tmp_path.iterdir())
    args = SFT.parse_args(["--init", str(tiny_run), "--batch", "4"])
    found, (model, _) = memory.estimate_run(args), M.load_model(E.latest_checkpoint(tiny_run))
    assert found["training"]["weights"] == sum(p.nbytes for p in model.parameters())
    step = E.latest_checkpoint(tiny_run)
    files = sum(path.stat().st_size for path in step.iterdir()) - (step / "tokenizer.json").stat().st_size
    assert found["disk"]["checkpoints"] == pytest.approx(3 * files + 2 * (step / M.WEIGHTS).stat().st_size, rel=0.03)


def test_what_came_after_the_checkpoint_is_taken_back(whole_run, tmp_path):
    """Metrics that are torn, later or doubled, evaluations that are later, temporary files: gone after a resume."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "step-000006")
    (run / "latest").write_text("step-000004\n")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7}\n{"step": 7')
    (run / "evals" / "000005.json").write_text("{}")
    (run / ".step-000006.tmp").mkdir()
    (run / ".latest.tmp").write_text("step-0")
    SFT.main(["--resume", str(run)])
    assert [SFT.step_of(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert not list(run.glob(".*")) and not list((run / "evals").iterdir()) and step_of(run) == "step-000006"
    assert (run / "step-000006" / M.WEIGHTS).read_bytes() == (whole_run / "step-000006" / M.WEIGHTS).read_bytes()


def test_killed_at_random_moments_nothing_is_lost(capfd):
    kills, inside, lost, final = kill_saves.main(["--kills", "8"])
    assert (kills, lost) == (8, 0) and final >= 8


@pytest.mark.parametrize("at", ["weights", "state", "rename", "pointer"])
def test_a_full_disk_costs_only_the_checkpoint_being_written(at, whole_run, tmp_path, monkeypatch):
    """For the weights a real limit on the size of files; for the others the error that a full disk gives, half way."""
    run, full = tmp_path / "run", OSError(28, "No space left on device")
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "step-000006")
    (run / "latest").write_text("step-000004\n")
    before, limit = contents(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    replace = os.replace

    def half(state, path):
        Path(path).write_bytes(b"PK" * 1000)
        raise full

    def no_rename(a, b):
        if Path(b).name == ("step-000006" if at == "rename" else "latest"):
            raise full
        replace(a, b)
    if at == "weights":
        resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "step-000004" / M.WEIGHTS).stat().st_size - 1000, limit[1]))
    elif at == "state":
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, "replace", no_rename)
    try:
        with pytest.raises(ValueError, match="step 6 could not be written") as said:
            SFT.main(["--resume", str(run)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        monkeypatch.undo()
    assert "\n" not in str(said.value)
    after = {k: v for k, v in contents(run).items() if at != "pointer" or "step-000006" not in k}
    for written in (before, after):
        for name in ("metrics.jsonl", "metrics.csv"):  # the table goes back with the run, to step 4
            written.pop(name)
    assert {k: v for k, v in after.items() if k != ".latest.tmp"} == before
    SFT.main(["--resume", str(run)])
    assert (run / "step-000006" / M.WEIGHTS).read_bytes() == (whole_run / "step-000006" / M.WEIGHTS).read_bytes()
    assert step_of(run) == "step-000006" and not list(run.glob(".*"))


def test_a_directory_that_vanishes_is_a_sentence(whole_run, tmp_path, monkeypatch, capsys):
    run, real = tmp_path / "run", SFT.update
    shutil.copytree(whole_run, run)
    shutil.rmtree(run / "step-000006")
    def update(*args):
        shutil.rmtree(run, ignore_errors=True)
        return real(*args)
    monkeypatch.setattr(SFT, "update", update)
    with pytest.raises(SystemExit) as ended:
        E.run_main(lambda: SFT.main(["--resume", str(run)]))
    assert ended.value.code == 2 and not run.exists()
    assert re.fullmatch(r"error: .*run/metrics.jsonl could not be .*", capsys.readouterr().err.strip())


def test_signals(tiny_run, tmp_path):
    """SIGTERM finishes the step, saves, says where and exits 143; a second signal exits at once."""
    flags = "--batch 64 --evals 0 --steps 100000 --save-every 0 --device cpu --threads 1".split()
    for out, twice in ((tmp_path / "one", False), (tmp_path / "two", True)):
        run = subprocess.Popen([sys.executable, ROOT / "train_sft.py", "--init", tiny_run, "--out", out, *flags],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while "step" not in run.stdout.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGTERM)
        assert "stopping after this step" in run.stderr.readline()
        if twice:
            run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=60)
        if not twice:
            assert run.returncode == 143 and f"--resume {out}" in said.splitlines()[-1]
            assert SFT.step_of((out / "metrics.jsonl").read_text().splitlines()[-1]) == int(step_of(out)[5:]) > 0
        else:
            assert run.returncode in (143, 130)


# ---- training that goes wrong

@pytest.fixture
def start(tiny_run, tmp_path):
    return ["--init", str(tiny_run), "--out", str(tmp_path / "run"), *"--eval-n 2 --evals 0 --device cpu".split()]


RL_FLAGS = "--problems 2 --group 2 --max-new-tokens 4 --steps 200".split()


@pytest.mark.parametrize("script, flags", [(SFT, ["--batch", "4"]), (RL, [*RL_FLAGS, "--estimator", "reinforce"])])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_with_the_batch_saved(script, flags, what, start, tmp_path, monkeypatch):
    real = tasks.GeneralPoints.step
    monkeypatch.setattr(tasks.GeneralPoints, "step", lambda self, text: real(self, text)._replace(reward=float(len(text) % 5)))
    log_probs = M.LlamaVision.log_probs

    def broken(self, *args, **kwargs):
        values = log_probs(self, *args, **kwargs)
        if what == "loss":
            return values * math.nan
        if values.requires_grad:
            values.register_hook(lambda grad: grad * math.inf)
        return values
    monkeypatch.setattr(M.LlamaVision, "log_probs", broken)
    with pytest.raises(ValueError, match=f"step 1: the {what} is not finite.*not-finite-000001.json.*--lr"):
        script.main([*start, *flags])
    kept = json.loads((tmp_path / "run" / "not-finite-000001.json").read_text())
    assert kept and set(kept[0]) == {"prompt", "turns", "ids", "response_mask", "log_probs"} and sum(kept[0]["response_mask"])
    assert not list((tmp_path / "run").glob("step-*"))


def test_no_group_with_signal_ends_the_run_with_a_save(start, tmp_path):
    """An untrained model that never solves anything: after 50 such steps the run says which knobs there are."""
    with pytest.raises(ValueError, match="no group had unequal returns.*--group.*--temperature.*--init"):
        RL.main([*start, *RL_FLAGS, "--save-every", "30"])
    assert step_of(tmp_path / "run") == "step-000050"
    shutil.rmtree(tmp_path / "run" / "step-000050")
    with pytest.raises(ValueError, match="no group had unequal returns"):  # a resume does not begin to count again
        RL.main(["--resume", str(tmp_path / "run")])
    assert step_of(tmp_path / "run") == "step-000050"


def test_parameters_that_do_not_move_end_the_run(start, tmp_path, monkeypatch):
    log_probs = M.LlamaVision.log_probs
    monkeypatch.setattr(M.LlamaVision, "log_probs", lambda self, *a, **k: 0 * log_probs(self, *a, **k))
    with pytest.raises(ValueError, match="no trained parameter moved.*--lr"):
        SFT.main([*start, *"--batch 2".split()])
    assert step_of(tmp_path / "run") == "step-000010"


def test_answers_that_are_cut_off_are_warned_about_once(start, capsys):
    with pytest.raises(ValueError):
        RL.main([*start, *RL_FLAGS])
    assert capsys.readouterr().err.count("of the sampled answers were cut off at --max-new-tokens 4; raise it") == 1


# ---- reports and terminals

HOSTILE = '<script>alert(1)</script>"\'><img src=x onerror=alert(1)>&lt;\x1b[31mred\x07\u202e'


def test_a_hostile_evaluation_stays_text_in_the_report_and_on_the_terminal(tiny_run, tmp_path, capsys):
    study = tmp_path / "study"
    for arm in ("sft", "rl"):
        shutil.copytree(tiny_run, study / arm)
        for path in (study / arm / "evals").iterdir():
            data = json.loads(path.read_text())
            for sample in data["samples"]:
                sample["prompt"] = HOSTILE
                sample["turns"] = [{"response": HOSTILE, "outcome": HOSTILE, "reward": HOSTILE, "feedback": HOSTILE}]
            data["samples"] = data["samples"] or [{"row": "id", "prompt": HOSTILE, "turns": [{"response": HOSTILE}], "reward": 0}]
            path.write_text(json.dumps(data))
        args = json.loads((study / arm / "args.json").read_text()) | {"rule": HOSTILE, HOSTILE: arm}
        (study / arm / "args.json").write_text(json.dumps(args))
    report.main([str(study)])
    page, said = (study / "report.html").read_text(), capsys.readouterr().out
    assert "&lt;script&gt;alert(1)" in page and "Content-Security-Policy" in page
    assert not re.search(r"<script|<img|\x1b|\x07|\u202e", page) and not re.search(r"\x1b|\x07|\u202e", said)
