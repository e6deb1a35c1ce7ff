"""The README: its links, its commands and its code are those of the repository."""

import dataclasses
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import evaluate
import model as models
import tasks
import train_rl
import train_sft
from assets import make_base

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "tests/results").glob("*.md"))]
FENCED = re.findall(r"(?m)^(python [^#\n]*[^#\s])", README)
COMMANDS = sorted({*FENCED, *re.findall(r"`(python -?[^`]+)`", README)})


def block(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def module_of(text):
    """A text as a module, imported from a file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "from_readme.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("from_readme", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def with_sums():
    """The table of tasks after the README's example."""
    code, = (text for text in block("python") if "class Sums" in text)
    head = "import random\nimport tasks\nfrom tasks import Problem, Row, Step, Task, split_of\nTASKS = dict(tasks.TASKS)\n"
    return module_of(head + code).TASKS


def test_length():
    assert README.count("\n") <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_tables_say_commit_and_date(page):
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\b[0-9a-f]{7}\b", text) and re.search(r"\b20\d\d-\d\d-\d\d\b", text) and "`python " in text or "`make " in text


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_those_of_the_script(command, monkeypatch):
    """The parser takes the command, with the README's own task and estimator in place. Only the run or the model directory
    of another command may be missing."""
    monkeypatch.setattr(tasks, "TASKS", with_sums())
    monkeypatch.setattr(train_rl, "ESTIMATORS", (*train_rl.ESTIMATORS, "best"))
    script, *flags = [word for word in shlex.split(command)[1:] if word != "-m"]
    module = importlib.import_module({"tasks.py": "assets.game"}.get(script, script.removesuffix(".py")))
    try:
        getattr(module, "parse_args", module.main)(flags)
    except ValueError as error:
        paths = [flag for flag in flags if flag.startswith(("runs/", "llama-11b", "FOLDER"))]
        assert any(path in str(error) for path in paths), str(error)


def test_the_step_is_the_one_of_main():
    shown, = (text for text in block("python") if "run.goes_on()" in text)
    source = [line.strip() for line in (ROOT / "train_rl.py").read_text(encoding="utf-8").splitlines()]
    found = [source.index(line.strip()) for line in shown.splitlines()]
    assert found == sorted(found)
    left_out = [line for line in source[found[0]:found[-1]] if line not in shown]
    assert [re.match(r"[\w. ]+", line)[0].strip() for line in left_out] == [
        "run.played", "if args.mask_truncated", "advantage", "measured", "metrics", "flops"]  # measures, and one flag


# ---- "Change it": every row of the table has its effect

def patched(text, diff):
    """A file's text after a diff without line numbers: its lines are met in their order."""
    lines, done = text.splitlines(), []
    for line in diff.splitlines():
        if line[0] != "+":
            place = lines.index(line[1:])
            done, lines = done + lines[:place], lines[place + 1:]
        done += [line[1:]] if line[0] != "-" else []
    return "\n".join(done + lines) + "\n"


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the repository with README's changes to files: an estimator, a reward, a row in each suite of cards."""
    folder = tmp_path_factory.mktemp("changed")
    for name in ("tasks", "model", "evaluate", "train_sft", "train_rl"):
        shutil.copy(ROOT / f"{name}.py", folder)
    (folder / "assets").symlink_to(ROOT / "assets")
    path = folder / "train_rl.py"
    path.write_text(patched(path.read_text(), *block("diff")))
    row, = re.findall(r"`(Row\(.*?\))` in `CARDS_SUITE`", README)
    penalty, = re.findall(r'`REWARD` .*`("illegal": -\d)`', README)
    path = folder / "tasks.py"
    text = path.read_text()
    for old, new in (('"illegal": -3', penalty), ('"illegal": -1', penalty), ('    Row("rule", OOD_RULE),', f'    {row},\n    Row("rule", OOD_RULE),'),
                     ('    Row("red", ID_RULE', '    Row("own", ID_RULE, visual="red/style=dark"),\n    Row("red", ID_RULE')):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return folder


def test_an_estimator_a_reward_and_a_row_are_changed_and_trained(changed, tmp_path):
    """In a process of its own, two steps; then the same with the files as they are: the first rollout is the same one."""
    flags = "--init tiny --steps 2 --problems 4 --group 8 --temperature 1.6 --eval-n 4 --device cpu --evals"
    command, = (command for command in COMMANDS if "--estimator best" in command)
    _, script, *given = shlex.split(command)
    done = subprocess.run([sys.executable, script, *given, *flags.split(), "1", "--out", tmp_path / "best"], cwd=changed, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    train_rl.main([*flags.split(), "0", "--out", str(tmp_path / "plain")])
    best, plain = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("best", "plain"))
    assert [step["step"] for step in best] == [1, 2] and all(step["signal"] > 0 and step["grad_norm"] > 0 for step in best)
    assert all(step["loss"] < 0 for step in best) and best[0]["loss"] < plain[0]["loss"]  # no negative advantage is left
    assert best[0]["tokens"] == plain[0]["tokens"] and best[0]["success"] == plain[0]["success"]
    lost = (plain[0]["reward"] - best[0]["reward"]) * 32  # of the 32 episodes the illegal ones lost 2 more
    assert lost > 0 and lost % 2 == pytest.approx(0, abs=1e-4)
    result = json.loads((tmp_path / "best/evals/000002.json").read_text())
    assert [*result["rows"]] == ["id", "mine", "rule", "fake"]
    mine = [each["prompt"] for each in result["samples"] if each["row"] == "mine"]
    assert mine and all("JQK=7,8,9, make 36" in prompt for prompt in mine)
    assert '"best"' in (tmp_path / "best/source/train_rl.py").read_text()


def test_the_diff_adds_an_estimator(changed):
    module = module_of((changed / "train_rl.py").read_text(encoding="utf-8"))
    returns = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]])
    assert module.ESTIMATORS == (*train_rl.ESTIMATORS, "best")
    assert module.advantages(returns, "best").tolist() == [[0.5, 0, 0, 0.5], [0, 0, 0, 0]]
    for estimator in train_rl.ESTIMATORS:
        assert torch.equal(module.advantages(returns, estimator), train_rl.advantages(returns, estimator))


def test_rewards_and_rows_are_changed_for_cards_and_walks(changed, monkeypatch):
    spec = importlib.util.spec_from_file_location("changed_tasks", changed / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed_tasks", module)
    spec.loader.exec_module(module)
    for name, before in (("gp-l", -3), ("gp-vl", -3), ("virl-l", -1), ("virl-vl", -1)):
        new, old = (place.make(name).step("nonsense").reward for place in (module, tasks))
        assert new - old == -5 - before
    assert [row.name for row in module.suite_rows("gp-vl")][:4] == ["id", "mine", "rule", "fake"]
    own, = (row for row in module.suite_rows("gp-vl") if row.name == "own")
    picture = module.make("gp-vl", own.rule, own.visual, "test", 0).image.tobytes()
    assert picture == tasks.make("gp-vl", "10", "red/style=dark", "test", 0).image.tobytes()
    assert picture != tasks.make("gp-vl", "10", "black", "test", 0).image.tobytes()


@pytest.mark.parametrize("flag", ["--rule", "--visual"])
def test_a_rule_and_a_look_take_no_code(flag, tmp_path):
    """The problems that are trained and those of the row "id" have this rule or this look."""
    command, = (command for command in COMMANDS if re.match(rf"python train_rl.py (--task gp-vl )?{flag} ", command))
    train_rl.main([*shlex.split(command)[2:], *"--steps 1 --problems 2 --group 2 --eval-n 2 --evals 1 --eval-rows id --device cpu "
                   f"--max-new-tokens 4 --out {tmp_path / 'run'}".split()])
    trained = json.loads((tmp_path / "run/samples/000001.json").read_text())
    evaluated = json.loads((tmp_path / "run/evals/000001.json").read_text())["samples"]
    assert len(trained) == 2 and evaluated and all(each["row"] == "id" for each in evaluated)
    if flag == "--rule":
        assert all("JQK=7,8,9, make 36" in each["prompt"] for each in trained + evaluated)
    for split, each in (("train", trained[0]), ("val", evaluated[0])) if flag == "--visual" else ():
        wanted, usual = (evaluate._png(tasks.make("gp-vl", "10", look, split, 0, style="short").image, False)
                         for look in (command.split()[-1], "black"))
        assert each["picture"] == wanted != usual


def test_a_mixture_and_an_own_demonstrator_are_what_sft_learns(tmp_path, monkeypatch):
    learned, asked, backward, demonstrate = [], [], train_sft.sft_backward, tasks.Problem.demonstrate

    def noted(model, episodes, *more, **kind):
        learned.append(episodes)
        return backward(model, episodes[:4], *more, **kind)
    monkeypatch.setattr(train_sft, "sft_backward", noted)
    monkeypatch.setattr(tasks.Problem, "demonstrate", lambda self, kind, rng: asked.append(kind) or demonstrate(self, kind, rng))
    monkeypatch.setitem(tasks.GeneralPoints.DEMONSTRATORS, "own", lambda problem, rng: ["own words"])
    command, = (command for command in COMMANDS if "--demonstrators careful:2" in command)
    for name, flags in (("mixed", shlex.split(command)[2:]), ("own", ["--demonstrators", "own"])):
        train_sft.main([*flags, *f"--init tiny --steps 1 --batch 300 --evals 0 --device cpu --out {tmp_path / name}".split()])
    mixed, own = learned
    rules = ["JQK=10," in e.problem.prompt for e in mixed]
    assert 170 < sum(rules) < 230 and all("JQK=11,12,13," in e.problem.prompt for e, ten in zip(mixed, rules) if not ten)
    assert 170 < asked[:300].count("careful") < 230 and {*asked[:300]} == {"careful", "expert"} and {*asked[300:]} == {"own"}
    said = {tuple(token for token, mask in zip(e.ids, e.response_mask) if mask) for e in own}
    assert len(own) == 300 and len(said) == 1


def test_a_model_size_is_the_entry_of_the_table(tmp_path, monkeypatch):
    tiny = models.SIZES["tiny"]
    text = dataclasses.replace(tiny.text, num_hidden_layers=4, hidden_size=64, vocab_size=400)
    monkeypatch.setitem(models.SIZES, "small", dataclasses.replace(tiny, text=text))
    command, = (command for command in COMMANDS if "--model small" in command)
    make_base.main([*shlex.split(command)[3:], *f"--steps 1 --batch 4 --evals 0 --device cpu --out {tmp_path / 'base'}".split()])
    trained, tokenizer = models.load_model(evaluate.find_model(str(tmp_path / "base"), "gp-l"))
    assert trained.config.text == text and len(trained.language_model.model.layers) == 4 and tokenizer.bpe.get_vocab_size() == 401


def test_the_task_works(monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", with_sums())
    seen = {}
    for split in ("train", "test"):
        for index in range(200):
            for rule in ("add", "multiply"):
                problem = tasks.make("sums", rule, split=split, index=index)
                assert problem.demonstrate("expert", random.Random(0)) == [problem.expert()]
                assert problem.step(problem.expert()) == tasks.Step(1, True, "right", "correct") and problem.done
                seen.setdefault(split, set()).add(problem.cls)
    assert not seen["train"] & seen["test"]
    told = tasks.make("sums", "multiply", split="test", judged_by="add", index=1)
    assert told.step(told.expert()) == tasks.Step(0, True, "wrong", "wrong_value")
    assert [row.name for row in tasks.suite_rows("sums")] == ["id", "rule", "fake"]


def test_the_walk_is_the_one_in_the_picture():
    from assets import draw_sheets
    command, = (line for line in draw_sheets.__doc__.splitlines() if "assets/walk.png" in line)
    args = draw_sheets.parse_args(command.split()[3:])
    problem = tasks.make("virl-l", "relative", split=args.split, index=args.index, style=args.style)
    prompt, observation = problem.prompt.split("\n")
    assert f"\n{prompt}\n" in README and observation == "none"
    _, step = problem.advance()
    assert f"\n{step.feedback}  ->  {problem.expert()}\n" in README


def test_looks_are_counted():
    from assets import draw_sheets
    for tile, text in ((560, "fourteen looks"), (32, "thirteen of them")):
        looks = draw_sheets.legible_looks(draw_sheets.parse_args(["--out", "x.png", "--tile", str(tile)]))
        assert text in README and len(looks) == {"fourteen looks": 14, "thirteen of them": 13}[text]
    prompt = tasks.make("gp-l", "11,12,13", split="test", index=0, style="short").prompt
    assert f"`{prompt}`" in README


def test_a_loss_of_ones_own_is_written_where_the_table_says(changed, tmp_path):
    """A bonus for the entropy of the sampled tokens, with its flag: answers become less certain. A run from before the flag is
    not continued, and the sentence names the flag."""
    where, = re.findall(r"your own: (.*?) \|", README)
    assert re.findall(r"`(\w+)`", where) == ["rl_backward", "with_signal", "parse_args", "LossSettings"]
    folder, flags = shutil.copytree(changed, tmp_path / "forked", symlinks=True), "--problems 4 --steps 6 --evals 0 --lr 1e-3 --temperature 1.6 --device cpu"
    text = (folder / "train_rl.py").read_text()
    for old, new in (("        if part_loss.requires_grad:", "        part_loss = part_loss + loss.entropy_coef * (weight[chosen] * log_probs.detach() * log_probs).sum()\n"),
                     ("    ratio_cap: float = 0.0", "    entropy_coef: float = 0.0\n"),
                     ('    g.add_argument("--ratio"', '    number(g, "--entropy-coef", 0.0, 0, 100, "weight of the entropy")\n')):
        assert text.count(old) == 1, old
        text = text.replace(old, new + old)
    (folder / "train_rl.py").write_text(text)

    def run(flags):
        return subprocess.run([sys.executable, "train_rl.py", *flags.split()], cwd=folder, text=True, capture_output=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
    train_rl.main(f"{flags} --out {tmp_path / 'plain'}".split())
    done = run(f"{flags} --out {tmp_path / 'bonus'} --entropy-coef 30")
    assert done.returncode == 0, done.stderr
    plain, bonus = ([json.loads(line)["entropy"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("plain", "bonus"))
    assert bonus[0] == plain[0] and bonus[-1] > 1.5 * plain[-1], (plain, bonus)
    again = run(f"--resume {tmp_path / 'bonus'}")
    assert again.returncode == 0 and "source/" not in again.stdout
    with (folder / "tasks.py").open("a") as file:
        file.write("# changed\n")
    assert "begun with the code in its source/: a new --out" in run(f"--resume {tmp_path / 'bonus'}").stdout
    assert "they differ in entropy_coef); continue the run with the script that began it" in run(f"--resume {tmp_path / 'plain'}").stderr


def test_what_is_to_be_changed_is_there():
    table = re.search(r"\| change \| where \| run \|\n(.*?)\n\n", README, re.DOTALL)[1]
    names = set(re.findall(r"`([A-Z_]+)`", table))
    source = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("tasks", "model", "train_rl"))
    assert len(names) == 6 and all(re.search(rf"(?m)^\s*{name}\b", source) for name in names), names
