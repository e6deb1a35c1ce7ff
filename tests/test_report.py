"""Intervals, studies, tables, figures and the report of evaluate.py, on synthetic studies: seconds on a CPU."""
import copy
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import fake_runs
import evaluate as report
import tasks
import test_walks
from assets import report as page_of
from assets import study as studies

ROOT = Path(__file__).resolve().parents[1]


def bernoulli(n, p, seed=0):
    return (np.random.default_rng(seed).random(n) < p).astype(float)


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory):
    return fake_runs.make(tmp_path_factory.mktemp("demo"), n=150)


@pytest.fixture
def small_dir(tmp_path):
    return fake_runs.make(tmp_path, n=60, kind="single")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# intervals

def test_the_interval_of_independent_hands_is_wilsons():
    values = bernoulli(800, .3)
    mean, low, high = report.interval(values, np.arange(800))
    p, z, n = values.mean(), 1.96, 800
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2) / (1 + z * z / n)
    assert (mean, low, high) == pytest.approx((p, middle - half, middle + half), abs=2e-4)


class Luck:
    """Simulated answers. A class has a success drawn from a beta distribution (icc: its variance over that of one answer); for
    each arm its logit moves by the arm's effect and, of two arms, by a normal draw (sd 0.4) of the class, and for each seed by a
    normal draw (sd: 0.3 is 7 points at a success of 50 %, 2 at 93 %) that all classes share. Half of the problems have the same
    luck under every arm and seed, the others have their own. The truth is the mean over all classes and, of several seeds, seeds."""

    def __init__(self, sizes, success, seeds, sd, effects=(0,), icc=.2, reps=1000):
        self.rng, self.member = np.random.default_rng(7), np.repeat(np.arange(len(sizes)), sizes)
        self.shape, self.sd, self.effects = (success * (1 / icc - 1), (1 - success) * (1 / icc - 1)), sd, effects
        self.truth = [each.mean() for each in self.chances(300_000, 1, 1)]
        alike, common = self.rng.random((2, reps, 1, len(self.member)))
        self.answers = [np.where(alike < .5, common, self.rng.random((reps, seeds, len(self.member)))) < chance[..., self.member]
                        for chance in self.chances(reps, seeds, len(sizes))]

    def chances(self, reps, seeds, classes):
        """The chance of success of each arm: (reps, seeds, classes)."""
        p = self.rng.beta(*self.shape, (reps, 1, classes)).clip(1e-12, 1 - 1e-12)
        for effect in self.effects:
            own = .4 * (len(self.effects) > 1) * self.rng.standard_normal(p.shape)
            seed = self.sd * self.rng.standard_normal((reps, seeds, 1))
            yield 1 / (1 + (1 / p - 1) * np.exp(-effect - own - seed))


def check_cover(truth, found, most=98):
    """The intervals of 1,000 studies, so 0.7 points is the standard error of what is counted. Of 3,000 each cell had 93 or more;
    a difference near 0 of two arms whose seeds vary has least, and most have those of which nearly all answers are alike."""
    _, low, high = found
    assert 92.5 <= 100 * np.mean((low <= truth) & (truth <= high)) <= most


@pytest.fixture(scope="module")
def class_sizes():
    """Of the 500 test problems of a task, as the studies have them."""
    found = {name: np.unique([tasks.make(name, split="test", index=i, style="short").cls for i in range(500)], return_counts=True)[1]
             for name in ("gp-l", "virl-l")}
    assert [*map(len, found.values())] == [54, 289]
    return found


@pytest.mark.parametrize("seeds, sd", [(1, 0), (3, 0), (3, .3)])
@pytest.mark.parametrize("task", ["gp-l", "virl-l"])
def test_the_interval_of_a_share_covers_the_truth(task, seeds, sd, class_sizes):
    for success, most in ((.5, 98), (.93, 98), (.98, 99.5)):
        luck = Luck(class_sizes[task], success, seeds, sd)
        check_cover(luck.truth[0], report.interval(luck.answers[0], luck.member), most)


@pytest.mark.parametrize("seeds, sd", [(1, 0), (3, 0), (3, .3)])
@pytest.mark.parametrize("task", ["gp-l", "virl-l"])
def test_the_interval_of_a_paired_difference_covers_the_truth(task, seeds, sd, class_sizes):
    for success, effects, most in ((.5, (0, 0), 98), (.93, (0, -4), 98), (.98, (0, 0), 100)):
        luck = Luck(class_sizes[task], success, seeds, sd, effects)
        check_cover(luck.truth[0] - luck.truth[1], report.paired(*luck.answers, luck.member), most)


def test_classes_that_agree_widen_the_interval():
    values, classes = np.repeat(bernoulli(100, .5), 8), np.repeat(np.arange(100), 8)
    wide, narrow = report.interval(values, classes), report.interval(values, np.arange(800))
    assert (wide[2] - wide[1]) / (narrow[2] - narrow[1]) == pytest.approx(math.sqrt(8), rel=.1)


def test_classes_of_unequal_size_are_weighted_by_their_hands():
    mean, low, high = report.interval([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert mean == .75 and 0 < low < .05 and .95 < high < 1    # two classes say next to nothing


def test_the_error_of_equal_classes_is_that_of_their_means():
    means = np.random.default_rng(3).random(40)
    mean, error, _, count = report.estimate(np.repeat(means, 3), np.repeat(np.arange(40), 3))
    assert (mean, error, count) == (pytest.approx(means.mean()), pytest.approx(means.std(ddof=1) / math.sqrt(39)), 40)


def test_intervals_ignore_the_order_of_hands():
    values, classes = bernoulli(50, .5), np.arange(50) // 2
    turn = np.random.default_rng(1).permutation(50)
    assert report.interval(values, classes) == pytest.approx(report.interval(values[turn], classes[turn]))


def test_paired_is_narrower_than_unpaired():
    a = bernoulli(400, .5)
    b = np.where(bernoulli(400, .1, 1) == 1, 1 - a, a)
    mean, low, high = report.paired(a, b, np.arange(400))
    alone = [report.interval(x, np.arange(400)) for x in (a, b)]
    assert mean == pytest.approx(a.mean() - b.mean())
    assert high - low < .6 * math.hypot(*(h - l for _, l, h in alone))


def test_seeds_that_differ_widen_the_interval():
    seeds = np.stack([bernoulli(300, p, i) for i, p in enumerate((.2, .5, .8))])
    same = np.stack([bernoulli(300, .5, i) for i in range(3)])
    wide, narrow = (report.interval(x, np.arange(300)) for x in (seeds, same))
    assert wide[0] == pytest.approx(seeds.mean()) and wide[2] - wide[1] > 3 * (narrow[2] - narrow[1])


def test_three_seeds_have_students_t_of_two_degrees_of_freedom():
    seeds = np.repeat([[.49], [.5], [.51]], 1000, 1)            # classes agree, so all that varies are the seeds
    mean, low, high = report.paired(seeds, np.zeros_like(seeds), np.arange(1000))
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.303 * .01 / math.sqrt(3), rel=.01)


@pytest.mark.parametrize("freedom, quantile", [(1, 12.706), (2, 4.303), (4, 2.776), (7, 2.365), (20, 2.086), (53, 2.006), (1e9, 1.96)])
def test_quantiles_of_students_t(freedom, quantile):
    assert report.t_quantile(freedom) == pytest.approx(quantile, rel=.0015)


def test_intervals_never_collapse():
    for values in (np.zeros(54), np.zeros((3, 54))):
        mean, low, high = report.interval(values, np.arange(54))
        assert mean == 0 and low == pytest.approx(0, abs=1e-9) and 3 / 54 < high < 4.2 / 54      # about the rule of three, two-sided
        assert report.interval(1 - values, np.arange(54)) == pytest.approx((1, 1 - high, 1))
        assert report.paired(values, values, np.arange(54)) == pytest.approx((0, -high, high))
    for values in ([1, 0, 1, 1], [1, 1, 1, 1], [.3, .3, .3, .3]):                                # one class says nothing
        mean, low, high = report.interval(values, ["a"] * 4)
        assert mean == pytest.approx(np.mean(values)) and high - low > .9


def test_wrong_shapes_are_refused():
    for call in (lambda: report.interval([], []), lambda: report.interval([1, 0], ["a"]), lambda: report.paired([1], [1, 0], "ab"),
                 lambda: report.paired(np.ones((2, 3)), np.ones((3, 3)), "abc")):
        with pytest.raises(ValueError, match=r"needs .*\.$"):
            call()


@pytest.mark.parametrize("n, c, k", [(5, 2, 1), (5, 2, 3), (6, 0, 4), (6, 6, 2), (4, 3, 2), (7, 1, 7)])
def test_pass_at_k_by_enumeration(n, c, k):
    draws = list(combinations([1] * c + [0] * (n - c), k))
    assert report.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("n, c, k", [(5, 6, 1), (5, 2, 0), (5, 2, 6), (5, -1, 1)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        report.pass_at_k(n, c, k)


# a study

def test_load_study_sorts_arms_seeds_and_steps(tmp_path):
    study = fake_runs.load_study(fake_runs.make(tmp_path, seeds=2, n=30))
    assert list(study) == ["base", "warmup", "sft", "rl"] and list(study["rl"]) == [0, 1]
    steps = [e["step"] for e in study["sft"][1]]
    assert steps == sorted(steps) and len(steps) == 11 and study["sft"][1][0]["args"]["lr"] == 1e-4


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="There is no evaluation in"):
            fake_runs.load_study(path)


@pytest.mark.parametrize("change", [
    lambda e: e.pop("rows"), lambda e: e.pop("step"), lambda e: e["rows"].pop("fake"), lambda e: e.update(samples=3),
    lambda e: e.update(classes=[]), lambda e: e.update(flops=float("nan")), lambda e: e.update(flops=-1), lambda e: e.update(flops="x"),
    lambda e: e["rows"]["id"]["greedy"]["first"].pop(), lambda e: e["rows"]["id"]["greedy"]["first"].__setitem__(0, 2),
    lambda e: e["rows"]["rule"]["sampled"].update(episode=[[0]]), lambda e: e["samples"][0].pop("prompt"),
    lambda e: e["samples"][0].update(turns=[1]), lambda e: e.update(rows=[]), lambda e: e["rows"]["id"].update(greedy=None)])
def test_a_malformed_file_is_named(small_dir, change):
    edit(small_dir / "rl/evals/000000.json", change)
    with pytest.raises(ValueError, match=r"rl/evals/000000\.json cannot be used \(.+\): write it again"):
        fake_runs.load_study(small_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", "[" * 100000, "\x1b[31m", '{"step": 1e999}'])
def test_text_that_is_no_evaluation_is_named(small_dir, text):
    (small_dir / "rl/evals/000000.json").write_text(text)
    with pytest.raises(ValueError, match=r"000000\.json cannot be used"):
        fake_runs.load_study(small_dir)


def test_other_hands_twice_the_same_run_and_bad_args_are_refused(small_dir):
    edit(small_dir / "rl/evals/000000.json", lambda e: e["classes"].reverse())
    assert [*map(list, page_of.load_study(small_dir))] == [["base", "warmup", "sft"], ["rl"]]    # grouped
    with pytest.raises(ValueError, match="scored other problems"):
        studies.only_study(small_dir)
    edit(small_dir / "rl/evals/000000.json", lambda e: e["classes"].reverse())
    (small_dir / "rl").rename(small_dir / "sft-s0")
    with pytest.raises(ValueError, match="a second run of arm sft with seed 0"):
        fake_runs.load_study(small_dir)
    (small_dir / "base/args.json").write_text("[1]")
    with pytest.raises(ValueError, match="base/args.json cannot be used"):
        fake_runs.load_study(small_dir)


def evaluation(step, score, n=10):
    solved = np.arange(n) < score * n
    return {"step": step, "scores": {(row, mode, part): solved.astype(float) for row in report.ROWS for mode in report.MODES for part in tasks.GeneralPoints.SCORES}}


def test_best_checkpoint_is_the_earliest_of_the_highest():
    evals = [evaluation(0, .2), evaluation(10, .5), evaluation(20, .5), evaluation(30, .1)]
    assert report.best_checkpoint(evals, ("greedy", "first"))["step"] == 10


def test_best_checkpoint_is_chosen_in_the_view_of_its_table(study_dir):
    study = fake_runs.load_study(study_dir)
    study["sft"][0][4]["scores"]["rule", "sampled", "first"][:] = 1
    assert "(step 400)" in report.stages(study, ("sampled", "first"))["sft best"][0]
    assert "(step 400)" not in report.stages(study, ("greedy", "first"))["sft best"][0]


# the table

def test_table_holds_every_stage_and_difference(study_dir):
    study = fake_runs.load_study(study_dir)
    text = page_of.all_text(study)
    assert text.count("success in %") == 2 and "Temperature 1, first attempt" in text
    for word in ("| base ", "| start ", "| SFT, end ", "| SFT at its best OOD (step ", "| RL, end ", "| RL - best SFT checkpoint, rule OOD "):
        assert text.count(word) == (2 if " - " in word else 5)        # two scores; with what is listed and two of nats
    mean = report.interval(study["rl"][0][-1]["scores"]["rule", "greedy", "first"], study["rl"][0][-1]["classes"])
    assert "%.1f [%.1f, %.1f]" % tuple(100 * x for x in mean) in text
    assert len({len(line) for line in text.split("\n\n")[1].splitlines()}) == 1                  # aligned


def test_the_episode_has_a_table_when_there_are_attempts(tmp_path):
    study = fake_runs.load_study(fake_runs.make(tmp_path, n=40, attempts=5))
    assert page_of.all_text(study).count("whole episode: success") == 2
    assert page_of.all_text(study).count("success in %") == 4


def test_what_was_listed_has_a_table(study_dir):
    study = fake_runs.load_study(study_dir)
    title, head, lines = page_of.all_tables(study, report.FIRST)[4]
    assert title == "numbers listed rightly, in %" and head == ["", "ID", "rule OOD", "fake rule"]
    cells = {name: [cell.split()[0] for cell in line] for name, *line in lines}
    end = study["sft"][0][-1]["scores"]
    assert cells["SFT, end"] == [f"{100 * end[row, 'greedy', 'listed'].mean():.1f}" for row in report.ROWS]
    assert "Numbers listed rightly, in %" in page_of.all_text(study) and page_of.report_html(study_dir).count("numbers listed rightly") == 2


def test_nats_have_tables_and_a_sentence(study_dir):
    study = fake_runs.load_study(study_dir)
    teacher, moved = page_of.all_tables(study, report.FIRST)[2:4]
    for table, kind in ((teacher, "teacher"), (moved, "moved")):
        assert table.head == ["", "ID", "rule OOD"]
        cells = {name: line for name, *line in table.lines}
        assert cells["base"] == [report.NONE] * 2
        values = study["rl"][0][-1]["scores"]["rule", "nats", kind]
        mean, low, high = map(float, re.findall(r"[\d.]+", cells["RL, end"][1]))
        assert mean == pytest.approx(values.mean(), abs=.006) and low < mean < high < mean + 4 * values.std() / math.sqrt(len(values))
    start = [study["warmup"][0][-1]["scores"][row, "nats", "teacher"].mean() for row in ("id", "rule")]
    assert f"has {start[0]:.1f} nats under the start (ID), {start[1]:.1f} under the other rule" in page_of.story(study)[1]
    assert "foreign" in page_of.all_text(study) and page_of.report_html(study_dir).count("how foreign") == 2


def test_studies_without_distances_say_nothing_of_them(small_dir):
    for path in small_dir.glob("*/evals/*.json"):                   # of earlier versions, and of runs without a teacher
        edit(path, lambda e: e.pop("nats") and None)
    for _ in range(2):
        study = fake_runs.load_study(small_dir)
        assert "nats" not in page_of.all_text(study) + page_of.report_html(small_dir) + " ".join(page_of.story(study))
        for path in small_dir.glob("*/evals/*.json"):
            edit(path, lambda e: e.update(nats={}))
    edit(small_dir / "sft/evals/000000.json", lambda e: e.update(nats={"teacher": {"id": [1.5] * 60}}))   # one arm, one row
    text = page_of.all_text(fake_runs.load_study(small_dir))
    assert "1.50 [1.50, 1.50]" in text and "how foreign" in text and "has moved" not in text


@pytest.mark.parametrize("nats", [{"teacher": {"id": [1.0] * 59}}, {"teacher": {"id": [math.nan] * 60}}, {"moved": {"rule": [math.inf] * 60}},
                                  {"moved": {"rule": ["x"] * 60}}, {"moved": {"rule": [None] * 60}}, {"moved": 7}, {"moved": {"id": 7}}, 7, [1]])
def test_damaged_nats_are_refused_in_a_sentence(small_dir, nats):
    edit(small_dir / "rl/evals/000000.json", lambda e: e.update(nats=nats))
    with pytest.raises(ValueError, match=r"rl/evals/000000.json cannot be used \(.*\): write it again with this version\.$"):
        fake_runs.load_study(small_dir)


def test_differences_are_paired_with_each_seeds_own_start(tmp_path):
    study = fake_runs.load_study(fake_runs.make(tmp_path, seeds=3, n=80))
    view = ("greedy", "first")
    mean, low, high = report.differences(study, view)["rl end", "start", "id"]
    own = [study["rl"][s][-1]["scores"][("id", *view)].mean() - study["sft"][s][0]["scores"][("id", *view)].mean() for s in range(3)]
    assert mean == pytest.approx(np.mean(own)) and low <= mean <= high


@pytest.mark.parametrize("gone", [["rl"], ["sft"], ["base", "warmup"], ["sft", "rl"], ["base", "sft", "rl"]])
def test_an_unfinished_study_has_a_report(tmp_path, gone):
    fake_runs.make(tmp_path, n=40)
    for arm in gone:
        (tmp_path / arm).rename(tmp_path / f"_{arm}")
        (tmp_path / f"_{arm}" / "evals").rename(tmp_path / f"_{arm}" / "gone")
    study = fake_runs.load_study(tmp_path)
    assert page_of.all_text(study) and "nan" not in page_of.report_html(tmp_path)
    for svg in (page_of.svg_curves(study), page_of.svg_path(study)):
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_start_serves_several_seeds(tmp_path, seeds):
    fake_runs.make(tmp_path, seeds=3, n=40)
    for arm in ("sft", "rl"):
        for s in range(3):
            (tmp_path / f"{arm}-s{s}/evals/000000.json").unlink()
            if seeds == 1:
                edit(tmp_path / f"{arm}-s{s}/args.json", lambda a: a.update(init_path=str(tmp_path / "warmup-s0/step-000200")))
    for s in range(seeds, 3):                                   # one start for three seeds, or two with a start of their own
        (tmp_path / f"warmup-s{s}/evals").rename(tmp_path / f"warmup-s{s}/gone")
    study, view = fake_runs.load_study(tmp_path), ("greedy", "first")
    d = report.differences(study, view)
    assert len(d) == 4 * 3                                     # SFT and RL minus the start, RL minus SFT and its best, in three rows
    serve = {s: study["warmup"][s if seeds > 1 else 0][-1]["scores"][("id", *view)].mean() for s in range(3 if seeds == 1 else 2)}
    own = [study["rl"][s][-1]["scores"][("id", *view)].mean() - start for s, start in serve.items()]
    assert d["rl end", "start", "id"][0] == pytest.approx(np.mean(own))


def test_sign_and_numbers():
    assert [report.sign_of(d) for d in ((.2, .1, .3), (-.2, -.3, -.1), (0, 0, 0), (.1, -.1, .2))] == [1, -1, 0, 0]
    assert report.percent((.632, .589, .674)) == "63.2 [58.9, 67.4]"
    assert report.percent((-.0001, -.01, .02), "+") == "+0.0 [-1.0, +2.0]"
    assert report.percent((math.nan,) * 3) == "\u2013"


# pictures

def test_mean_over_some_of_the_hands():
    values, among = bernoulli(60, .5), bernoulli(60, .6, 1)
    classes = np.arange(60)
    mean, low, high = report.interval(values, classes, among)
    assert mean == pytest.approx(values[among == 1].mean()) and low < mean < high
    assert report.interval(values, classes, among=np.ones(60)) == report.interval(values, classes)
    assert all(math.isnan(x) for x in report.interval(values, classes, among=np.zeros(60)))


def test_every_row_in_pictures_has_success_recognition_and_the_difference(tmp_path):
    study, view = fake_runs.load_study(fake_runs.make(tmp_path, kind="pictures", n=90)), ("greedy", "first")
    cost, *tables = page_of.all_tables(study, view)[5:]
    assert tables == page_of.look_tables(study, view)
    tables = {table.title.removeprefix("row by row: ").removesuffix(" in %"): table[1:] for table in tables}
    assert list(tables) == ["success", "all cards read", "cards read", "success where all cards read"]
    head, lines = tables["success"]
    assert head[1:] == ["base", "start", "SFT, end", "RL, end", "RL - SFT"]
    assert [line[0] for line in lines] == ["ID", "rule OOD", "red", "words", "text"]
    end = study["rl"][0][-1]
    red, read = end["scores"][("red", *view)], end["scores"]["red", "greedy", "read"]
    assert lines[2][4].split()[0] == f"{100 * red.mean():.1f}"
    assert tables["all cards read"][1][2][4].split()[0] == f"{100 * (read == 1).mean():.1f}"
    assert tables["cards read"][1][2][4].split()[0] == f"{100 * read.mean():.1f}"
    among = tables["success where all cards read"]
    assert among[1][2][4].split()[0] == f"{100 * red[read == 1].mean():.1f}" and "RL - SFT" not in among[0]
    cost = dict((label, cell.split()[0]) for label, cell in cost.lines)
    assert cost["RL, end"] == f"{100 * (end['scores'][('text', *view)] - end['scores'][('id', *view)]).mean():+.1f}"
    assert page_of.all_text(study).count("Row by row: ") == 2 and page_of.report_html(tmp_path).count("row by row: ") == 8


def test_the_report_shows_the_pictures(tmp_path):
    page = page_of.report_html(fake_runs.make(tmp_path, kind="pictures", n=40))
    assert page.count(f'src="data:image/png;base64,{fake_runs.PIXEL}"') == 4 * 9 + 2 * 4  # 4 arms, 3 of ID and rule OOD, 1 of the others; two problems of each along SFT and RL
    edit(tmp_path / "rl/evals/000000.json", lambda e: e["samples"][0].update(picture='"><script>'))
    with pytest.raises(ValueError, match="cannot be used"):
        fake_runs.load_study(tmp_path)


def test_two_models_compared():
    rows = [{"id": {mode: dict.fromkeys(tasks.GeneralPoints.SCORES, [0, 1, 1, right]) for mode in report.MODES}} for right in (0, 1)]
    results = [{"suite": "gp-l", "rows": r, "classes": list("abcd"), "attempts": 2} for r in rows]
    table = report.table_text(report.study_of(results, ["one", "two"]))
    assert table.count("| model one, end ") == 4 and table.count("| ID: model two, end ") == 1 and "numbers listed rightly" in table and "\nGreedy, whole episode: paired" not in table and "| model two - model one, ID | +25.0 [-66.9, +100.0] |" in table
    assert table.count("50.0 ") == 8 and table.count("75.0 ") == 8 and table.count("+25.0 [-66.9, +100.0]") == 4


# figures

@pytest.mark.parametrize("kind, seeds", [("published", 1), ("published", 3), ("tie", 1), ("single", 1), ("single", 2)])
def test_figures_are_xml_of_finite_numbers_inside_the_panel(tmp_path, kind, seeds):
    study = fake_runs.load_study(fake_runs.make(tmp_path, seeds=seeds, kind=kind, n=50))
    for svg in (page_of.svg_curves(study), page_of.svg_path(study), page_of.svg_standalone(page_of.svg_curves(study))):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and not re.search(r"\b(nan|inf)\b", svg, re.I)
        assert [child.tag.rpartition("}")[2] for child in root if "style" not in child.tag][:2] == ["title", "desc"]
        for group in root.iter("{http://www.w3.org/2000/svg}g"):
            drawn = " ".join(p.get("d") for p in group.iter("{http://www.w3.org/2000/svg}path"))
            numbers = np.array(re.findall(r"(-?[\d.]+),(-?[\d.]+)", drawn), float)
            assert numbers.min() >= 0 and numbers[:, 0].max() <= page_of.WIDTH and numbers[:, 1].max() <= page_of.HEIGHT


def test_ends_of_the_mean_curve_are_the_ends_of_the_table(tmp_path):
    study = fake_runs.load_study(fake_runs.make(tmp_path, seeds=3, n=60))
    for row in ("id", "rule"):
        c, view = page_of.curve(study["rl"], row, ("greedy", "first")), ("greedy", "first")
        ends = [np.mean([e[i]["scores"][(row, *view)].mean() for e in study["rl"].values()]) for i in (0, -1)]
        assert c[[0, -1], 1] == pytest.approx(ends)
        assert (c[:, 2] <= c[:, 1]).all() and (c[:, 1] <= c[:, 3]).all() and c[0, 0] == 0


def test_seeds_with_other_numbers_of_evaluations_meet(tmp_path):
    fake_runs.make(tmp_path, seeds=2, n=60)
    for step in (20, 60, 100):
        (tmp_path / f"rl-s1/evals/{step:06d}.json").unlink()
    assert np.isfinite(page_of.curve(fake_runs.load_study(tmp_path)["rl"], "id", ("greedy", "first"))).all()


def test_names_at_line_ends_do_not_collide():
    for heights in ([100, 100, 100], [270, 275, 278], [50, 60, 200], [278], [], [36] * 15, [60, 40, 36, 278]):
        ends = [(np.array([300.0, h]), "SFT 80", "c0") for h in heights]
        at = sorted(float(re.search(r' y="([\d.]+)"', t)[1]) - 4 for t in page_of.named(ends) if t.startswith("<text"))
        assert len(at) == len(heights) and (np.diff(at) > 15.5).all() and max(at, default=0) <= page_of.BOTTOM + .1
        assert min(at, default=page_of.TOP) >= page_of.TOP - .1


def test_a_grid_is_a_readable_figure(tmp_path):
    study = fake_runs.load_study(fake_runs.make(tmp_path, kind="grid", base=False))
    for svg in (page_of.svg_path(study), page_of.svg_curves(study)):
        names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="name (c[01])">(\d\S+?)( \d+)?</text>', svg)
        for panel in [names] if len(names) == 10 else [names[:10], names[10:]]:
            assert len(panel) == 10 and {(css, rate) for _, _, css, rate, _ in panel} == {
                (css, rate) for css in ("c0", "c1") for rate in ("1e-05", "3e-05", "0.0001", "0.0003", "0.001")}
            heights = sorted(float(y) for _, y, *_ in panel)
            assert (np.diff(heights) > 15.5).all() and page_of.TOP < heights[0] and heights[-1] < page_of.BOTTOM + 5
    assert "sft-lr0.001" in page_of.all_text(study) and "sft-lr0.001" in page_of.report_html(tmp_path)


def test_flops_and_ticks(study_dir):
    assert [report.si(x) for x in (0, 999, 2e12, 1.5e15, 3.14159e9)] == ["0 FLOP", "999 FLOP", "2 TFLOP", "1.5 PFLOP", "3.14 GFLOP"]
    assert report.si(1e30) == "1e+09 ZFLOP" and page_of.si(0.5) == "0.5 FLOP"
    study = fake_runs.load_study(study_dir)
    top = page_of.curve(study["sft"], "id", report.FIRST)[-1, 0]
    assert top == study["sft"][0][-1]["flops"] == 3.1e12
    for label in ("start", "1.55 TFLOP", "3.1 TFLOP"):
        assert page_of.svg_curves(study).count(f">{label}</text>") == 2


def test_standalone_brings_its_style(study_dir):
    svg = page_of.svg_standalone(page_of.svg_curves(fake_runs.load_study(study_dir)))
    assert "prefers-color-scheme:dark" in svg and 'width="860"' in svg and "max-width:100%" in svg
    assert not re.search(r"(href|url\(|<script|@import)", svg)


# the report

def test_everything_from_files_is_escaped(tmp_path):
    fake_runs.make(tmp_path / "<b>&", n=40)
    edit(tmp_path / "<b>&/rl/args.json", lambda a: a.update({"model": "<script>x</script>", "<i>&\x07": '"'}))
    edit(tmp_path / "<b>&/rl/evals/000200.json", lambda e: e["samples"][0]["turns"][0].update(feedback="</pre><script>", outcome="\ud800\x00&", reward="<u>"))
    fake_runs.make(tmp_path / "more", n=40)
    (tmp_path / "more/sft").rename(tmp_path / "<b>&/<u>arm|")
    page = page_of.report_html(tmp_path / "<b>&")
    for bad in ("<script", "<b>", "<i>&", "<u>", "\x1b", "\x00", "\x07", "\u202e", "\ud800", "</pre><s"):
        assert bad not in page, bad
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; [31m7" in page and "&lt;u&gt;arm" in page
    assert not re.search(r"<[a-z][^>]*\son\w+=", page) and page.count("<meta http-equiv") == 1
    page.encode("utf-8")


def test_report_loads_and_runs_nothing(study_dir):
    page = page_of.report_html(study_dir)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert not re.search(r"<(script|link|iframe|img|object|form|base)\b|\b(src|href|action)=|@import|url\(", page)
    assert page.count("<svg ") == 6 and "<th scope=row>seeds</th><td>1<td>1<td>1<td>1" in page and "Sample episodes: RL, seed 0, step 200" in page


def test_write_report_is_whole_or_nothing(small_dir):
    path = page_of.write_report(small_dir)
    before = path.read_text()
    assert path.name == "report.html" and before.endswith("</html>\n")
    (small_dir / "rl/evals/000000.json").write_text("{")
    with pytest.raises(ValueError):
        page_of.write_report(small_dir)
    assert path.read_text() == before and not list(small_dir.glob(".report*"))


@pytest.mark.parametrize("kind, says", [("published", "the published picture"), ("reverse", "the opposite of the published"), ("tie", "without a clear difference")])
def test_the_story_follows_the_numbers(tmp_path, kind, says):
    told = page_of.story(fake_runs.load_study(fake_runs.make(tmp_path, kind=kind, n=400)))
    assert says in told[0] and ("goes on using the rule" in " ".join(told)) == (kind == "published")


def test_every_verdict_is_a_sentence():
    signs = (-1, 0, 1)
    told = {(s, r, g, i): page_of.verdict(s, r, g, i) for s in signs for r in signs for g in signs for i in signs}
    assert all(t.endswith(".") for t in told.values())
    assert all(("generalizes" in t) == (g > 0 and s < 0 and r >= 0) for (s, r, g, i), t in told.items())
    assert "changed little" in told[-1, 0, 1, 0] and "changed little" not in told[-1, 0, 1, 1] and "both lost" in told[-1, -1, 1, 1]


def test_seeds_and_unequal_compute_are_said(tmp_path):
    study = fake_runs.load_study(fake_runs.make(tmp_path, seeds=3, n=40))
    arms = {name: cells for name, *cells in page_of.arm_table(study).lines}
    assert arms["seeds"] == ["1", "3", "3", "3"] and arms["compute"][2:] == ["3.1 TFLOP", "3.1 TFLOP"]
    study["rl"][0][-1]["flops"] *= 2
    assert page_of.arm_table(study).lines[1][3:] == ["3.1 TFLOP", "4.13 TFLOP"]
    page = page_of.report_html(tmp_path)
    assert "Where compute differs" in page and "compare the curves, not the ends" in page
    for arm, lr, paper in (("sft", 3e-4, 1e12), ("rl", 3e-5, 4e12)):
        for evals in study[arm].values():
            evals[-1] |= {"args": {"lr": lr}, "flops_paper": paper}
    arms = {name: cells for name, *cells in page_of.arm_table(study).lines}
    assert arms["lr"][2:] == ["0.0003", "3e-05"] and arms["compute by the paper's formula"][2:] == ["1 TFLOP", "4 TFLOP"]
    assert "learning rates differ" in page_of.story(study)[0]


@pytest.mark.parametrize("text, says", [("11", "--lr 11 must lie from 1e-12 to 10;"), ("nan", "--lr nan must lie"), ("0", "must lie"),
                                        ("x", "invalid float value: 'x'")])
def test_a_number_outside_its_range_is_refused_beside_its_flag(text, says):
    parser = report.Parser("A parser.")
    parser.add_argument("--lr", type=report.between(float, 1e-12, 10))
    assert parser.parse_args(["--lr", "0.5"]).lr == 0.5
    with pytest.raises(ValueError, match=re.escape(says)):
        parser.parse_args(["--lr", text])


def test_help_shows_every_default_once_and_none_that_says_nothing(capsys):
    parser = report.Parser("A parser.")
    for name, more in {"n": {"default": 500}, "k": {"default": 0}, "out": {}, "on": {"action": "store_true"}, "new": {"default": 3}}.items():
        parser.add_argument(f"--{name}", help="many (default: 3)" if name == "new" else "some", **more)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "some (default: 500)" in said and "some (default: 0)" in said and said.count("default") == 3 and "None" not in said


def test_clean_keeps_text_and_drops_control():
    assert report.clean("a\x1b[2J\u202eb\r\n\tc\x85\ufffe é 中") == "a[2Jb\n\tc é 中"
    assert page_of.esc("<'\">&") == "&lt;&#x27;&quot;&gt;&amp;"


def test_colours_have_contrast():
    def light(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return np.dot([.2126, .7152, .0722], [c / 12.92 if c <= .04045 else ((c + .055) / 1.055) ** 2.4 for c in parts])
    for scheme in page_of.figure_style().replace("#fff;", "#ffffff;").partition("/* Figures")[0].split("@media"):
        colour = {name: light(value) for name, value in re.findall(r"--(\w+):(#\w{6})", scheme)}
        for name in ("ink", "muted", "c0", "c1", "c2", "c3"):
            low, high = sorted((colour["paper"], colour[name]))
            assert (high + .05) / (low + .05) >= 4.5, name


# suites follow the run

@pytest.mark.parametrize("suite, rule, visual, rows", [
    ("gp-l", None, None, {"id": ("10", None, None), "rule": ("11,12,13", None, None), "fake": ("11,12,13", "10", None)}),
    ("gp-l", "7,8,9/target=36", None, {"id": ("7,8,9/target=36", None, None), "rule": ("11,12,13/target=36", None, None),
                                       "fake": ("11,12,13/target=36", "7,8,9/target=36", None)}),
    ("gp-l", "11,12,13", None, {"id": ("11,12,13", None, None), "rule": ("10", None, None), "fake": ("10", "11,12,13", None)}),
    ("gp-l-probes", "7/target=36", None, {"faces-5": ("5/target=36", None, None), "faces-7": ("10/target=36", None, None),
                                          "faces-12": ("12/target=36", None, None), "five-cards": ("7/target=36/cards=5", None, None)}),
    ("gp-vl", None, "red/style=dark", {
        "id": ("10", None, "red/style=dark"), "rule": ("11,12,13", None, "red/style=dark"), "red": ("10", None, "black/style=dark"),
        "grid": ("10", None, "red/style=dark/layout=grid"), "dark": None, "text": ("10", None, "text/style=dark"),
        "shuffled": ("10", None, "red/style=dark")}),
    ("virl-l", "relative", None, {"id": ("relative", None, None), "rule": ("absolute", None, None), "fake": ("absolute", "relative", None)})])
def test_rows_are_changes_of_the_trained_rule_and_look(suite, rule, visual, rows):
    found = {row.name: row[1:] for row in report.rows_of(suite, rule, visual)}
    assert {name: found.get(name) for name in rows} == rows
    assert visual or found.keys() == rows.keys()
    for asked, judged_by, look in found.values():
        tasks.make(suite.removesuffix("-probes"), asked, look, "test", 0, judged_by=judged_by, tile=560)


def test_the_rows_of_the_table_are_those_of_a_run_with_the_tasks_own_rule():
    for suite in tasks.suite_names():
        task = tasks.task_of(suite)
        for trained in ((None, None), (task.rule, task.visual)):
            assert report.rows_of(suite, *trained) == [row._replace(visual=row.visual or task.visual) for row in tasks.suite_rows(suite)]


def test_what_was_trained_is_what_id_asks(monkeypatch):
    asked = {}

    def rollout(model, tokenizer, problems, group, sampling, forced=False):
        asked.setdefault(str(problems[0].rule), []).append(problems[0].prompt)
        episodes = [report.Episode(copy.copy(problem), ids=[0]) for problem in problems]
        for episode in episodes:
            episode.record(episode.problem, episode.problem.expert())
        return [[episode] for episode in episodes]
    monkeypatch.setattr(report, "rollout", rollout)
    result = report.evaluate(test_walks.MODEL, test_walks.TOKENIZER, report.EvalSettings("gp-l", 4, rule="7,8,9/target=36"))
    assert list(asked) == ["7,8,9/target=36", "11,12,13/target=36"] and all("36" in prompt for prompt in asked["7,8,9/target=36"])
    assert (result["rule"], result["visual"]) == ("7,8,9/target=36", None)
    assert result["rows"]["id"]["greedy"]["first"] == result["rows"]["rule"]["greedy"]["first"] == [1] * 4
    own = report.evaluate(test_walks.MODEL, test_walks.TOKENIZER, report.EvalSettings("gp-l", 4, rule="10"))
    assert own["rule"] is None


def test_tables_figures_and_sentences_name_the_trained_rule(tmp_path):
    fake_runs.make(tmp_path, n=40)
    for path in tmp_path.glob("*/evals/*.json"):
        edit(path, lambda e: e.update(rule="7/target=36"))
    study, page = fake_runs.load_study(tmp_path), page_of.report_html(tmp_path)
    assert page_of.all_tables(study, report.FIRST)[0].head == ["", "ID (7/target=36)", "rule OOD", "fake rule"]
    assert "RL - SFT, ID (7/target=36) " in page_of.all_text(study) and "ID (7/target=36): success" in page_of.svg_curves(study)
    told = " ".join(page_of.story(study))
    assert "(ID: 7/target=36)" in told and "(rule OOD: 11,12,13/target=36)" in told and "J = Q = K" not in told + page
    edit(tmp_path / "rl/evals/000200.json", lambda e: e.pop("rule"))
    assert len(page_of.load_study(tmp_path)) == 2                # asked by the task's own rule: not the same problems


def run_of(path, **flags):
    path.mkdir(parents=True)
    (path / "args.json").write_text(json.dumps({"task": "gp-l", "rule": "10", "visual": None, "attempts": 1, "eval_suite": None} | flags))
    (path / "step-000003").mkdir()
    return str(path)


def test_a_run_says_what_it_is_evaluated_on(tmp_path):
    walk = run_of(tmp_path / "walk", task="virl-l", rule="relative", attempts=2)
    red = run_of(tmp_path / "red", task="gp-vl", rule="7/target=36", visual="red/style=dark")
    asked = {name: report.parse_args(argv.split()) for name, argv in {
        "walk": walk, "checkpoint": f"{walk}/step-000003", "given": f"{walk} --attempts 1 --rule absolute", "red": red, "probes": f"{red} --suite gp-vl-probes",
        "other": f"{red} --suite gp-l", "tiny": "tiny", "compared": f"--compare {walk} tiny", "report": "--report x"}.items()}
    assert {name: (a.suite, a.rule, a.visual, a.attempts) for name, a in asked.items()} == {
        "walk": ("virl-l", "relative", None, 2), "checkpoint": ("virl-l", "relative", None, 2), "given": ("virl-l", "absolute", None, 1),
        "red": ("gp-vl", "7/target=36", "red/style=dark", 1), "probes": ("gp-vl-probes", "7/target=36", "red/style=dark", 1),
        "other": ("gp-l", None, None, 1), "tiny": ("gp-l", None, None, 1), "compared": ("virl-l", "relative", None, 2), "report": ("gp-l", None, None, 1)}
    with pytest.raises(ValueError, match="absolute or relative|relative"):
        report.parse_args([walk, "--rule", "10"])
    (tmp_path / "walk/args.json").write_text("[1]")
    with pytest.raises(ValueError, match="walk/args.json cannot be used"):
        report.parse_args([walk])


# any arms

def rename(directory, **names):
    for old, new in names.items():
        (directory / old).rename(directory / new)
    return directory


def test_a_run_that_is_not_finished_and_unequal_compute_are_said_in_row_and_first_sentence(tmp_path):
    fake_runs.make(tmp_path, n=60)
    assert "no result yet" not in page_of.story(fake_runs.load_study(tmp_path))[0]
    edit(tmp_path / "sft/args.json", lambda a: a.update(steps=60000))
    study = fake_runs.load_study(tmp_path)
    assert report.stages(study, report.FIRST)["sft end"].label == "SFT, step 1000 of 60000 (not finished)"
    assert re.match("This is no result yet, .*SFT, step 1000 of 60000", page_of.story(study)[0]) and "| SFT, step 1000 of 60000 (not finished) " in page_of.all_text(study)
    edit(tmp_path / "sft/args.json", lambda a: a.update(steps=1000))
    edit(tmp_path / "rl/evals/000200.json", lambda e: e.update(flops=e["flops"] / 2))
    study = fake_runs.load_study(tmp_path)
    assert [report.stages(study, report.FIRST)[arm].label for arm in ("sft end", "rl end")] == ["SFT, end (3.1 TFLOP)", "RL, end (1.54 TFLOP)"]
    assert re.match(r"This is no result yet, .*unequal compute: SFT, end \(3.1 TFLOP\), RL, end \(1.54 TFLOP\)\. So far: ", page_of.story(study)[0])
    assert "<strong>This is no result yet, " in page_of.report_html(tmp_path)


def test_the_page_says_what_the_study_at_chosen_rates_found(study_dir):
    found = re.search(r"</strong>[^<]*</p>\n<p class=found>(.*?)</p>", page_of.report_html(study_dir), re.DOTALL)[1]
    table = re.search(r"\| SFT's teacher .*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    pairs = [(line[3].split(" / ")[1], line[4].split(" / ")[1]) for line in lines[:4]]
    told = re.findall(r"\d+\.\d", found)
    assert [*zip(told[::2], told[1::2])] == [pairs[0], pairs[3]] and "`expert`, the base's own" in table and "not the loss" in found


def test_arms_of_any_name_have_a_start_differences_and_colours(tmp_path):
    study = fake_runs.load_study(rename(fake_runs.make(tmp_path, n=80), sft="rloo", rl="grpo"))
    stages, differ = report.stages(study, report.FIRST), report.differences(study, report.FIRST)
    assert list(stages) == ["base", "start", "grpo end", "rloo end"] and stages["start"].evals[0]["step"] == 200  # the warm-up's end
    means = {key: stages[key].interval("rule", report.FIRST)[0] for key in stages}
    for a, b in (("grpo end", "start"), ("rloo end", "start"), ("rloo end", "grpo end")):
        assert differ[a, b, "rule"][0] == pytest.approx(means[a] - means[b])
    text = page_of.all_text(study)
    for word in ("| start ", "| grpo, end ", "| grpo - start, ID ", "| rloo - start, fake rule ", "| rloo - grpo, rule OOD "):
        assert text.count(word) in (2, 5)
    assert re.match(r"grpo - start, ID: \+\S+ \[.*\] points, clearly higher; ", page_of.story(study)[0]) and "published" not in page_of.report_html(tmp_path)
    assert len({css for _, css in page_of.line_styles(study).values()}) == 2
    assert page_of.line_styles({"sft-lr1e-05": 0, "rl-lr1e-05": 0, "rloo": 0}) == {"sft-lr1e-05": ("1e-05", "c0"), "rl-lr1e-05": ("1e-05", "c1"), "rloo": ("rloo", "c2")}


def test_starts_are_the_checkpoints_that_the_runs_began_from(tmp_path):
    fake_runs.make(tmp_path, seeds=2, n=60)
    fake_runs.make(tmp_path / "more", n=60)
    (tmp_path / "more/rl").rename(tmp_path / "rl-late")
    edit(tmp_path / "rl-late/args.json", lambda a: a.update(init_path=str(tmp_path / "sft-s0/step-001000")))
    (tmp_path / "more/sft").rename(tmp_path / "rl-cold")
    edit(tmp_path / "rl-cold/args.json", lambda a: a.update(init_path="/far/away/model"))
    stages = report.stages(fake_runs.load_study(tmp_path), report.FIRST)
    assert [*stages] == ["base", "start", "start of rl-cold", "start of rl-late", "sft end", "sft best", "rl end", "rl-cold end", "rl-late end"]
    assert sorted(stages["start"].evals) == [0, 1] and stages["rl-late end"].minus[0] == "start of rl-late"
    assert stages["start of rl-late"].evals[0]["self"] == (tmp_path.name, "sft-s0", "step-001000")
    assert stages["start of rl-cold"].evals[0]["step"] == 0 and stages["sft end"].minus == ["start"]
    assert "start of rl-late - " not in page_of.all_text(fake_runs.load_study(tmp_path))


def test_one_run_alone_has_its_own_report(tmp_path, capsys):
    run = fake_runs.make(tmp_path, n=60) / "rl"
    page_of.main([str(run)])
    text, page = capsys.readouterr().out, (run / "report.html").read_text()
    assert "| RL - start, rule OOD " in text and "| start " in text and "SFT" not in text and (run / "curves.svg").is_file()
    assert text.startswith("RL - start, ID: +") and "<h2>RL: gp-l, 60 test problems</h2>" in page


def test_runs_on_other_problems_are_grouped(tmp_path, capsys):
    fake_runs.make(tmp_path, n=40)
    other = fake_runs.make(tmp_path / "other", n=30, kind="pictures")
    for arm in ("sft", "rl"):
        (other / arm).rename(tmp_path / f"{arm}-vl")
    page_of.main([str(tmp_path)])
    text, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert text.count("Greedy, first attempt: success in %") == 2 and "40 problems" in text and "30 problems" in text
    assert "<h2>SFT, RL: gp-l, 40 test problems</h2>" in page and "<h2>rl-vl, sft-vl: gp-vl, 30 test problems</h2>" in page
    assert page.count("<svg ") == 12 and page.count("</html>") == page.count("<!doctype") == 1
    assert "vl - SFT" not in text and "| sft-vl - rl-vl, ID " in text


def test_who_stops_reading_the_tables_still_has_the_report(tmp_path):
    fake_runs.make(tmp_path, n=40)
    command = [sys.executable, "-c", f"import evaluate\nevaluate.run_main(lambda: evaluate.main(['--report', {str(tmp_path)!r}]))"]
    reader, writer = os.pipe()
    os.close(reader)                                            # as `| head -0` leaves it
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert (tmp_path / "report.html").read_text().endswith("</html>\n") and (tmp_path / "path.svg").is_file() and not done.stderr


def test_runs_that_do_not_say_where_they_began_start_at_their_own_step_0(tmp_path):
    fake_runs.make(tmp_path, seeds=2, n=60)
    for path in tmp_path.glob("*/args.json"):
        edit(path, lambda a: a.pop("init_path", None))
    stages = report.stages(fake_runs.load_study(tmp_path), report.FIRST)
    assert [*stages] == ["base", "start", "sft end", "sft best", "rl end"]
    assert {seed: e["self"] for seed, e in stages["start"].evals.items()} == {s: (tmp_path.name, f"sft-s{s}", "step-000000") for s in (0, 1)}
