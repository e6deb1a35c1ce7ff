"""Tests of walks in evaluate.py: scores per step, tables, story and report, on real routes walked by scripts. Seconds on a CPU."""
import copy
import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

import evaluate as E
import fake_runs
import tasks
from assets import report as page_of
from conftest import standing

MODEL = type("Model", (), {"config": SimpleNamespace(vision=SimpleNamespace(image_size=32)), "device": "cpu"})()  # can be weakly referenced, as a model
TOKENIZER = SimpleNamespace(short=True, stop_ids=(0,))
HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="x">\x1b[31m\u202e'


def expert(walk):
    return walk.expert()


def by_compass(walk):
    """Knows the trained rule only: all turns in its words."""
    memory = copy.copy(walk)
    memory.rule = tasks.parse_turns("absolute")
    return memory.expert()


def lost(walk):
    """Right at the first position, then hostile text."""
    return walk.expert() if walk.position == 0 else HOSTILE


def answered_by(walker):
    """A stand-in for rollout: `walker` answers; the verifier, the histories and the pictures are the real ones."""
    def walk(problem):
        episode = E.Episode(copy.copy(problem), ids=[0])
        walk, episode.pictures = episode.problem, [problem.image] if problem.look else []
        while not walk.done:
            episode.turns.append(turn(walk, walker(walk)))
            if walk.look and episode.turns[-1]["outcome"] == "right_action":
                episode.pictures.append(walk.image)
        return episode

    def turn(walk, response):
        position, step = walk.position, walk.step(response)
        return {"position": position, "response": response, "outcome": step.outcome, "reward": step.reward, "feedback": step.feedback,
                "read": step.read}

    def forced_walk(problem):
        stops = [standing(problem, i)[0] for i in range(len(problem.actions))]
        return E.Episode(copy.copy(problem), ids=[0], turns=[turn(stop, walker(stop)) for stop in stops])

    def rollout(model, tokenizer, problems, group, sampling, forced=False):
        return [[(forced_walk if forced else walk)(p)] for p in problems]
    return rollout


def evaluation(monkeypatch, walker, suite="virl-l", n=8, attempts=1):
    monkeypatch.setattr(E, "rollout", answered_by(walker))
    monkeypatch.setattr(tasks, "draw_grid", lambda name, style, place, heading, *_: Image.new("RGB", (64, 64), f"hsl({int(heading)},90%,50%)"))
    return E.evaluate(MODEL, TOKENIZER, E.EvalSettings(suite, n, attempts))


def put(directory, arm, step, result, **args):
    (directory / arm / "evals").mkdir(parents=True, exist_ok=True)
    (directory / arm / "args.json").write_text(json.dumps(args))
    (directory / arm / "evals" / f"{step:06d}.json").write_text(json.dumps(result | {"step": step, "flops": 1e9 * step}))


def study_of(directory, suite):
    with pytest.MonkeyPatch.context() as patch:
        ends = {walker: evaluation(patch, walker, suite) for walker in (lost, by_compass, expert)}
    put(directory, "base", 0, ends[lost], model="tiny")
    for arm, end in (("sft", by_compass), ("rl", expert)):
        put(directory, arm, 0, ends[lost])
        put(directory, arm, 10, ends[end], init_path="/elsewhere/warmup/step-000006")
    return directory


@pytest.fixture(scope="module", params=["virl-l", "virl-vl"])
def study_dir(tmp_path_factory, request):
    return study_of(tmp_path_factory.mktemp("study") / request.param, request.param)


# scores

def test_scores_of_scripted_walkers(monkeypatch):
    problems = [tasks.make("virl-l", "relative", split="test", index=i, style="short") for i in range(8)]
    rows = evaluation(monkeypatch, by_compass)["rows"]
    assert rows["id"]["greedy"]["steps_first"] == rows["fake"]["greedy"]["forced"] == [1] * 8
    rule = rows["rule"]["sampled"]
    assert rule["first"] == rule["steps_first"] == rule["failed_at"] == [0] * 8  # the first action of each route is a turn
    kinds = [p.actions for p in problems]
    assert rule["forced"] == [round(sum(kind != "turn" for kind in actions) / len(actions), 4) for actions in kinds]
    assert rule["forced_marks"].split() == ["".join(kind[0] if kind == "turn" else kind[0].upper() for kind in actions) for actions in kinds]
    assert rule["marks"] == " ".join("t" * 8) and rule["read"] == [1] * 8


def test_read_is_the_share_of_all_answers_and_attempts_count(monkeypatch):
    result = evaluation(monkeypatch, lost, attempts=2)
    score = result["rows"]["id"]["greedy"]
    length = len(tasks.make("virl-l", split="test", style="short").actions)
    assert score["read"][0] == round(1 / 3, 4) and score["failed_at"] == [1] * 8 and score["marks"].split()[0][0] == "T"
    assert score["steps"][0] == score["steps_first"][0] == round(1 / length, 4) and score["forced"][0] == round(1 / length, 4)
    second = lambda walk: walk.expert() if walk.attempt else "no"  # noqa: E731
    score = evaluation(monkeypatch, second, attempts=2)["rows"]["rule"]["greedy"]
    assert score["steps"] == score["episode"] == [1] * 8 and score["steps_first"] == score["first"] == score["failed_at"] == [0] * 8
    assert score["marks"] == score["forced_marks"] == score["marks"].lower()


def test_what_stays_in_the_log_and_the_samples(monkeypatch):
    result = evaluation(monkeypatch, lambda walk: lost(walk) if len(walk.actions) > 4 else walk.expert())
    logged = E.summary(result)
    assert logged["rule/sampled/forced"] < 1 and not [key for key in logged if "marks" in key or "failed_at" in key]
    for row in ("id", "rule"):
        first, second = sorted((s for s in result["samples"] if s["row"] == row), key=lambda s: s["turns"][-1]["outcome"] == "correct")
        assert first["turns"][-1]["outcome"] != "correct" and second["turns"][-1]["outcome"] == "correct" and "pictures" not in first
        assert first["map"] and len(first["map"]) < 8000
    assert len(evaluation(monkeypatch, expert)["samples"]) == 3  # ID and rule OOD arrived, the fake row failed
    assert len(json.dumps(result)) < 100_000


def test_views_over_the_limit_are_left_out():
    samples = [{"map": "m" * 10, "pictures": ["p" * 40] * 2}, {"map": "m" * 10, "pictures": ["p" * 99]}, {"pictures": ["p" * 10]}, {"picture": "p" * 999}]
    assert [sorted(s) for s in E.limit_pictures(samples, 120)] == [["map", "pictures"], ["map"], [], ["picture"]]


# files

@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("forced"), "'forced' is missing"), (lambda s: s["steps"].__setitem__(0, 1.5), "steps is not a list of 8 times 0 to 1"),
    (lambda s: s["steps_first"].pop(), "steps_first is not a list"), (lambda s: s.pop("marks"), "'marks' is missing"),
    (lambda s: s.update(marks="T"), "marks are not 8 words"), (lambda s: s.update(forced_marks="x " * 8), "marks are not 8 words"),
    (lambda s: s.update(marks=7), "no attribute"), (lambda s: s.update(marks="t " * 9), "marks are not"), (lambda s: s["failed_at"].__setitem__(0, 5), "failed_at is not as they say"),
    (lambda s: s.update(failed_at=None), "failed_at is not as they say")])
def test_a_malformed_score_is_named(tmp_path, monkeypatch, change, says):
    result = evaluation(monkeypatch, by_compass)
    change(result["rows"]["rule"]["greedy"])
    put(tmp_path, "rl", 0, result)
    with pytest.raises(ValueError, match=r"rl/evals/000000\.json cannot be used \(.*" + says):
        fake_runs.load_study(tmp_path)


@pytest.mark.parametrize("change", [{"map": '"><script>'}, {"pictures": [3]}, {"pictures": "x"}, {"turns": [{"response": "", "position": []}]},
                                    {"turns": [{"response": ""}]}])
def test_a_malformed_sample_is_named(tmp_path, monkeypatch, change):
    result = evaluation(monkeypatch, expert)
    result["samples"][0] |= change
    put(tmp_path, "rl", 0, result)
    with pytest.raises(ValueError, match="cannot be used"):
        fake_runs.load_study(tmp_path)


# tables and words

def test_tables_of_a_study(study_dir):
    study, suite = fake_runs.load_study(study_dir), study_dir.name
    tables = page_of.step_tables(study, E.FIRST)
    alone, alone_pairs, forced, forced_pairs, read, where, kinds = (table[1:] for table in tables)
    assert alone[0] == forced[0] == ["", "ID", "rule OOD", "fake rule"] + ["visual"] * (suite == "virl-vl")
    cell = {line[0]: line[2] for line in alone[1]}, {line[0]: line[2] for line in forced[1]}
    assert cell[0]["SFT, end"].startswith("0.0 [0.0, ") and float(cell[1]["SFT, end"].split()[0]) > 30 and cell[1]["RL, end"].endswith(", 100.0]")
    assert {line[0] for line in forced_pairs[1]} >= {f"{a}, rule OOD" for a in ("RL - SFT", "RL - start", "SFT - start")}
    assert not [line for line in alone_pairs[1] if line[0].endswith("ID")]
    where, kinds = ({line[0]: line[1:] for line in lines} for _, lines in (where, kinds))
    assert where["SFT, end: rule OOD"] == ["100.0"] + ["0.0"] * 7 and where["RL, end: ID"] == ["0.0"] * 7 + ["100.0"]
    assert where["base: ID"][1] == "100.0"
    assert [c.split()[0] for c in kinds["SFT, end: rule OOD"]] == ["0.0", E.NONE, E.NONE, "0.0", "100.0", "100.0"]
    text = page_of.all_text(study)
    assert "\nPer step, teacher-forced, in %" in text and "\nWhere walks fail first" in text
    for other in ("hand", "cards", "same numbers"):
        assert other not in text + page_of.report_html(study_dir).split("<style>")[0] + " ".join(page_of.story(study)), other


def test_the_story_of_walks(study_dir):
    study = fake_runs.load_study(study_dir)
    told = " ".join(page_of.story(study))
    assert "8 held-out routes" in told and "ID: absolute turns" in told and "rule OOD: relative turns" in told
    assert "routes with the same turns in one city" in page_of.report_html(study_dir)


def test_one_evaluation_and_two_compared(monkeypatch):
    one, two = evaluation(monkeypatch, by_compass), evaluation(monkeypatch, expert)
    text = E.table_text(E.study_of([one], ["one"]))
    table = re.search(r"\nGreedy: every row, in %\n\n(.*?)\n\n", text, re.DOTALL)[1]
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert [cell.strip() for cell in head] == ["", *tasks.Navigation.SCORES.values()][1:] and "per step, teacher-forced" in table
    cells = {name.strip(): [float(cell.split()[0]) for cell in line] for name, *line in lines}
    assert list(cells) == ["ID: model one, end", "rule OOD: model one, end", "fake rule: model one, end"]
    for row, name in (("id", "ID"), ("rule", "rule OOD")):
        scores = one["rows"][row]["greedy"]
        assert cells[f"{name}: model one, end"] == pytest.approx([100 * sum(scores[each]) / 8 for each in tasks.Navigation.SCORES], abs=.051)
    assert cells["rule OOD: model one, end"][4] > 30 and "cards" not in text
    table = E.table_text(E.study_of([one, two], ["one", "two"]))
    assert "\nPaired differences on the same problems\n\n|" in table
    assert re.search(r"\| model two - model one, rule OOD +\| \+100.0 \[", table)
    assert table.index("| ID: model one, end ") < table.index("| ID: model two, end ") < table.index("| rule OOD: model one, end ")


# the report

def test_a_route_can_be_followed_on_its_map(study_dir):
    page, study = page_of.report_html(study_dir), fake_runs.load_study(study_dir)
    samples = [s for arm in ("base", "sft", "rl") for s in study[arm][0][-1]["samples"]]
    assert page.count("<img class=map ") == len(samples) and "<b>position 3</b>: observed <b>" in page
    assert page.count("<img class=cards ") == sum(len(s.get("pictures", ())) for s in samples)
    assert (page.count("<img class=cards ") > 20) == (study_dir.name == "virl-vl")
    assert "following <b>1 turn" in page and "action <b>turn_direction(" in page and "verifier: right_action, reward 1.0" in page
    assert len(page) < 2e6 and "default-src 'none'" in page


def test_hostile_text_in_walks_is_escaped(study_dir):
    page = page_of.report_html(study_dir)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for bad in ("<script", "onerror=\"", "\x1b", "\u202e", "</pre><s"):
        assert bad not in page, bad
    said = page_of._turn(tasks.Navigation, {"position": 0, "response": json.dumps({"obs": HOSTILE, "ins": "<b>", "action": "<i>"})}, {})
    assert "<script" not in said and "<i>" not in said and "&lt;i&gt;" in said and not re.search(r"<[a-z][^>]*\son\w+=", said)
    assert "observed <b>\u2013</b>" in page_of._turn(tasks.Navigation, {"position": 0, "response": 7}, {})
