"""The README: its links, its commands and its code are those of the repository."""

import importlib.util
import random
import re
import shlex
import tempfile
from pathlib import Path

import pytest
import torch

import tasks
import train_rl

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


def test_the_diff_fits():
    diff, = block("diff")
    source = (ROOT / "train_rl.py").read_text(encoding="utf-8")
    for line in diff.splitlines():
        assert line[0] == "+" or line[1:] in source
    added = "\n".join(line[1:] for line in diff.splitlines() if line.startswith("+    "))
    returns = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]])
    best = module_of(f"def best(centred, estimator):\n{added}").best
    assert best(returns - returns.mean(1, keepdim=True), "best").tolist() == [[0.5, 0, 0, 0.5], [0, 0, 0, 0]]


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


def test_what_is_to_be_changed_is_there():
    table = re.search(r"\| change \| where \| run \|\n(.*?)\n\n", README, re.DOTALL)[1]
    names = set(re.findall(r"`([A-Z_]+)`", table))
    source = "".join((ROOT / f"{name}.py").read_text(encoding="utf-8") for name in ("tasks", "model", "train_rl"))
    assert len(names) == 6 and all(re.search(rf"(?m)^\s*{name}\b", source) for name in names), names
