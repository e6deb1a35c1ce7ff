"""The report of a study: its figures (SVG) and one HTML page that loads nothing. `evaluate.py --report STUDY` starts this.

    python -m assets.report runs/demo           # prints tables, writes report.html, curves.svg, path.svg
    python -m assets.report runs/demo --watch   # writes report.html again and again while runs go on

  1. A study, 2. runs in training (their metrics and progress), 3. tables of a task, 4. figures, 5. samples, 6. the page,
  7. watching, 8. command line
"""
import base64
import html
import json
import math
import re
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import chain, product
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tasks  # noqa: E402
import train_rl  # noqa: E402
import train_sft  # noqa: E402
from evaluate import (FIRST, MODES, NONE, ROWS, STAGES, Parser, Stage, Table, add_scores, any_eval, any_of, arms_of,  # noqa: E402
                      between, clean, differences, flags_of, interval, name_of, pair_table, read_checked, reported, row_title, rows_of,
                      run_main, score_name, score_table, score_tables, si, sign_of, stage_table, stages, table_text, task_class,
                      unfinished)
from model import read_json, write_atomically  # noqa: E402

# ---- 1. A study ----------------------------------------------------------------------------------


def _check(evaluation):
    """The evaluation in a file, if it has the shape that `evaluate` and the trainers give it."""
    counts = [evaluation[name] for name in ("step", "flops", "attempts")]
    if not (evaluation["classes"] and ROWS.keys() <= evaluation["rows"].keys()
            and all(0 <= count < math.inf for count in counts)):
        raise ValueError("it lacks problems or one of the rows id, rule and fake, or its step, "
                         "flops or attempts are not counts")
    # Samples are rendered here, so that one that cannot be shown is refused with its file's name.
    problem, samples = task_class(evaluation), evaluation["samples"]
    episodes = [(sample["row"], _episode(problem, sample)) for sample in samples]
    evaluation = add_scores(evaluation) | {"episodes": episodes}
    scores = evaluation["scores"]
    for row, mode in product(evaluation["rows"], MODES):
        found = {"all read": np.floor(scores[row, mode, "read"])}
        if problem.leads_on:
            found |= kinds_of_action(evaluation["rows"][row][mode], len(evaluation["classes"]))
        scores |= {(row, mode, part): values for part, values in found.items()}
    return evaluation


MARKS = {"t": "turn", "f": "forward", "s": "stop"}  # the letters of marks: kinds of right actions


def kinds_of_action(lists, n):
    """{"turn": share of right first answers where a turn is right, "turn count": how often it is,
    "turn, forced": ...}, each (n,), from the marks of n walks: a word a route, a letter a position
    reached, small where the first answer was wrong. ValueError for other marks."""
    walks = {"": lists["marks"].split(), ", forced": lists["forced_marks"].split()}
    alike = [forced.lower().startswith(own.lower()) for own, forced in zip(*walks.values())]
    failed = [wrong and wrong.start() for wrong in map(re.compile("[a-z]").search, walks[""])]
    if {*map(len, walks.values()), sum(alike)} != {n} or failed != lists["failed_at"]:
        raise ValueError(f"marks are not {n} words of the same routes, or failed_at is not as they "
                         "say")
    found = {}
    for (how, words), (mark, kind) in product(walks.items(), MARKS.items()):
        right, wrong = np.char.count(words, mark.upper()), np.char.count(words, mark)
        found[f"{kind}{how} count"] = count = right + wrong
        found[f"{kind}{how}"] = right / np.maximum(count, 1)
    return found


def evaluation_files(directory):
    """The evaluations of the runs in a directory, or of the run that it is, by run and step."""
    files = [*Path(directory).glob("evals/*.json"), *Path(directory).glob("*/evals/*.json")]
    return sorted(files, key=lambda file: (file.parent, len(file.name), file.name))


def arm_and_seed(name):
    """"sft-s2" -> ("sft", 2), "sft" -> ("sft", 0)."""
    arm, seed = re.fullmatch(r"(.+?)(?:-s(\d{1,9}))?", name, re.DOTALL).groups()
    return arm, int(seed or 0)


def load_study(directory):
    """A list of the studies in a directory, one for each set of problems, or that of a single run,
    from `RUN/evals/NNNNNN.json` and `RUN/args.json`.

    RUN is an arm's name with `-sN` for seed N, or without for seed 0. ValueError, one sentence,
    when there is nothing, or a file is malformed.
    """
    studies, files, said = {}, evaluation_files(directory), time.time()
    for i, file in enumerate(files):
        if time.time() - said > 5:
            said = time.time()
            print(f"  {i} of {len(files)} evaluations read", file=sys.stderr, flush=True)
        run = file.absolute().parent.parent
        arm, seed = arm_and_seed(run.name)
        args = read_checked(run / "args.json", flags_of) if (run / "args.json").exists() else {}
        start = Path(str(args.get("init_path") or f"unknown-s{seed}/start")).parts[-3:]
        evaluation = read_checked(file, _check) | {"args": args, "start": start}
        evaluation["self"] = *run.parts[-2:], f"step-{evaluation['step']:06d}"
        problems = map(evaluation.get, ("suite", "split", "rule", "visual", "classes"))
        study = studies.setdefault(json.dumps([*problems]), {})
        evals = study.setdefault(arm, {}).setdefault(seed, [])
        evals.append(evaluation)
        if evals[0]["self"][1] != run.name:
            raise ValueError(f"{run} is a second run of arm {arm} with seed {seed}: rename one of "
                             "the two.")
    if not studies:
        raise ValueError(f"There is no evaluation in {directory}: train an arm first, or name a "
                         "study directory.")
    # In tables and figures the stages come in the order of training, then other arms by name.
    return [{arm: study[arm] for arm in dict.fromkeys([*STAGES, *sorted(study)]) if arm in study}
            for study in studies.values()]


# ---- 2. Runs in training -------------------------------------------------------------------------

OLD_NAMES = {"lr": "learning_rate", "seconds": "step_time"}  # of metrics, in runs before they were renamed


class Training(NamedTuple):
    """A run as its args.json and metrics.jsonl tell of it."""
    path: Path
    args: dict
    records: list  # a dict for each step that can be read
    written: float  # when the last one was, in seconds since 1970

    @property
    def metrics(self):
        """{name: what it means}, of the script that trains."""
        return train_rl.METRICS if "group" in self.args else train_sft.METRICS

    def share(self):
        """0 at the start, 1 at the end."""
        last, args = self.records[-1] if self.records else {}, self.args
        done = [number(last.get(name, 0)) / number(args.get(limit) or math.nan)
                for name, limit in (("flops", "flops"), ("step", "steps"))]
        share, = [each for each in done if each >= 0][:1] or [0.0]
        return min(share, 1.0)

    def finished(self):
        """Whether the last step is written."""
        last = self.records[-1] if self.records else {}
        return bool(last) and not unfinished(self.args, {name: number(last.get(name, 0)) for name in ("step", "flops")})

    def seconds_left(self):
        """Of training, evaluations aside, at the pace so far; NaN where nothing is known yet."""
        spent = [number(record.get("step_time")) for record in self.records]
        share = self.share()
        return np.nansum(spent) * (1 - share) / share if share else math.nan

    def points(self, name):
        """(P, 2): step and value of a metric, where it was measured."""
        found = [(record["step"], number(record.get(name))) for record in self.records]
        return np.array([point for point in found if math.isfinite(point[1])]).reshape(-1, 2)


def number(value):
    """A float; NaN for whatever is no number that can be drawn."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else math.nan


def read_records(path):
    """The steps in a metrics.jsonl: {name: value} each. Damaged and cut lines are left out."""
    records = []
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    for line in lines:
        if 0 < train_sft.step_of(line) < 1e15:
            records.append({OLD_NAMES.get(name, name): value for name, value in json.loads(line).items()})
    return records


def load_runs(directory):
    """The runs in a directory, or the run that it is, finished or not: a list of Training."""
    runs = []
    for file in sorted([*Path(directory).glob("args.json"), *Path(directory).glob("*/args.json")]):
        path = file.absolute().parent
        metrics = path / "metrics.jsonl"
        try:
            args = flags_of(read_json(file))
        except (ValueError, OSError, AttributeError):
            args = {}
        written = max(each.stat().st_mtime for each in (file, metrics) if each.exists())
        runs.append(Training(path, args, read_records(metrics), written))
    return runs


def clock(seconds):
    """"1:02:03"; a dash for what is not known."""
    if math.isnan(seconds):
        return NONE
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


# ---- 3. Tables of a task -------------------------------------------------------------------------


def look_tables(study, score):
    """Of problems in pictures: a line for each row that is answered, a column for each stage, and
    RL - SFT where both are averaged over the same problems."""
    stage, last, all_read = stages(study, score), any_eval(study), (score[0], "all read")
    read = task_class(last).SCORES["read"]
    lines = [(row_title(last, row), {"row": row}) for row in last["rows"] if row != "fake"]
    columns = [(each.label, {"stage": each}) for key, each in stage.items() if key != "sft best"]
    pair = {"stage": stage.get("rl end"), "minus": stage.get("sft end")}
    both = columns + [("RL - SFT", pair)] * all(pair.values())
    shown = [("success", both, score, None), (f"all {read}", both, all_read, None),
             (read, both, (score[0], "read"), None),
             (f"success where all {read}", columns, score, all_read)]
    return [score_table(f"row by row: {title} in %", lines, of, score=each, among=among)
            for title, of, each, among in shown]


def step_tables(study, score):
    """Of problems that lead on: what is right per step by stage, and where walks fail."""
    (mode, part), problem, tables = score, task_class(any_eval(study)), []
    for name in ("steps_first" if part == "first" else "steps", "forced", "read"):
        title = problem.SCORES[name]
        tables.append(stage_table(f"{title}, in %", study, (mode, name)))
        if name != "read":
            title = f"{title}: paired differences on the same {problem.WORDS.things}"
            tables.append(pair_table(title, study, (mode, name), ["rule"]))
    lines = [(f"{stage.label}: {ROWS[row]}", {"stage": stage, "row": row})
             for row in ("id", "rule")
             for key, stage in stages(study, score).items() if key != "sft best"]
    # Where the first wrong answer is: None is a walk without any.
    where, places = [], [*map(str, range(1, 7)), "later", "nowhere"]
    for name, line in lines:
        failed = ["nowhere" if at is None else places[min(at, 6)]
                  for evaluation in line["stage"].evals.values()
                  for at in evaluation["rows"][line["row"]][mode]["failed_at"]]
        where.append([name, *(f"{100 * failed.count(each) / len(failed):.1f}" for each in places)])
    kinds = [kind + how for how in ("", ", forced") for kind in MARKS.values()]
    columns = [(kind, {"score": (mode, kind), "among": (mode, f"{kind} count")}) for kind in kinds]
    return [*tables, Table("where walks fail first, by position, in %", ["", *places], where),
            score_table("right first answers by kind of action, in %", lines, columns)]


def all_tables(study, score, measures=None):
    """The tables of a score: success by stage and its paired differences; then those of its task:
    of walks, or of pictures (so many measures)."""
    *tables, _ = score_tables(study, score)  # but for that of all scores
    task = tasks.task_of(any_eval(study)["suite"])
    if task.problem.leads_on:
        return tables + step_tables(study, score)
    if listed := task.problem.SCORES.get("listed"):
        tables.append(stage_table(f"{listed}, in %", study, (score[0], "listed"), score))
    if task.pictures:
        title = f"success in words minus in pictures, the same {task.problem.WORDS.things}"
        lines = [(each.label, {"stage": each, "minus": each})
                 for each in stages(study, score).values()]
        tables.append(score_table(title, lines, [("points", {})], score=score, row="text",
                                  other_row="id"))
        tables += look_tables(study, score)[:measures]
    return tables


def all_text(study):
    """The tables that are printed, in markdown: of reading there are more in the page."""
    return table_text(study, partial(all_tables, measures=2))


# ---- 4. Figures ----------------------------------------------------------------------------------
# A panel is 430 x 330 units, its plot between LEFT..RIGHT and TOP..BOTTOM; the right margin holds
# the names of the lines. Colours and style stand in assets/report.html.

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 330, 62, 318, 34, 278
PERCENTS = [(share / 100, f"{share} %") for share in range(0, 101, 20)]


def curve(seeds, row, score):
    """(P, 4) FLOPs, mean, low, high along an arm, {seed: evaluations}, linear between evaluations.

    Seeds differ a little in FLOPs per step, so they are averaged at equal shares of their own
    FLOPs: their ends meet.
    """
    runs = [np.array([[each["flops"], *each["scores"][row, *score]] for each in evals]).T
            for evals in seeds.values()]  # (1 + n, evaluations)
    shares = runs[0][0] / (runs[0][0, -1] or 1)
    flops, *values = np.moveaxis([[np.interp(shares * run[0, -1], run[0], line) for line in run]
                                  for run in runs], 0, 1)  # (S, P) each
    rates = interval(np.transpose(values), any_of(seeds)[0]["classes"])  # of (P, S, n)
    return np.column_stack([flops.mean(0), *rates])


def _stroke(points, css):
    return f'<path class="{css}" d="M{"L".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


class Line(NamedTuple):
    """A line of a panel. points: (P, 2), or with the edges of a band (P, 4). A line with a name has
    it at its end, before its value, and a dot for each point that tells its values."""
    name: str
    css: str
    points: np.ndarray
    value: str = ""


class Axis(NamedTuple):
    """An axis of a panel: what it shows, its ends, its ticks [(value, label)], a value in words."""
    name: str
    low: float
    high: float
    ticks: list
    tell: object = "{:.3g}".format


PERCENT = partial(Axis, low=0, high=1, ticks=PERCENTS, tell=lambda share: f"{100 * share:.1f} %")


def axis(name, values, low=None, tell="{:.3g}".format):
    """The Axis that holds the values, with about five round ticks; from 0 where that is near."""
    low, high = min(values) if low is None else low, max(values)
    low = 0.0 if 0 < low < high / 2 else low
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(each for each in (1, 2, 2.5, 5, 10) if span / 4 <= each * step * 1.001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = [(i * step, f"{i * step:.9g}") for i in range(first, last + 1)]
    return Axis(name, first * step, last * step, ticks, tell)


def on_panel(points, across, up):
    """Points (..., 2) of the data, on two Axes, in the units of a panel."""
    shares = (np.asarray(points) - [across.low, up.low]) / [across.high - across.low, up.high - up.low]
    return shares * [RIGHT - LEFT, TOP - BOTTOM] + [LEFT, BOTTOM]


def panel(title, across, up, lines):
    """A panel: its title, the Axes across and up with their names and ticks, the Lines."""
    middle = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    svg = [f'<text x="{LEFT}" y="18.0" class="head">{esc(title)}</text>'
           f'<text x="{middle[0]}" y="318.0" class="mid muted">{esc(across.name)}</text>'
           f'<text transform="translate(14,{middle[1]}) rotate(-90)" class="mid muted">{esc(up.name)}</text>']
    for x, label in across.ticks:
        at, _ = on_panel([x, up.low], across, up)
        svg.append(f'<text x="{at:.1f}" y="296.0" class="mid muted">{esc(label)}</text>')
    for y, label in up.ticks:
        left, right = on_panel([[across.low, y], [across.high, y]], across, up)
        svg += [_stroke([left, right], "grid"),
                f'<text x="{LEFT - 6}" y="{left[1] + 4:.1f}" class="end muted">{esc(label)}</text>']
    ends = []
    for name, css, points, value in lines:
        line = on_panel(points[:, :2], across, up)
        if points.shape[1] == 4:
            band = [*points[:, [0, 2]], *points[::-1, [0, 3]]]
            svg.append(_stroke(on_panel(band, across, up), f"band {css}"))
        svg.append(_stroke(line, f"line {css}"))
        if name:
            ends.append((line[-1], f"{name} {value}".strip(), f"name {css}"))
            told = [esc(f"{name}: {across.name} {across.tell(x)}, {up.name} {up.tell(y)}") for x, y, *_ in points]
            svg += [f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{text}</title></circle>'
                    for (x, y), text in zip(line, told)]
    return "".join(svg + named(ends))


def named(ends):
    """Names beside the ends of lines, [(point, name, css)], moved where they would collide."""
    # From the lowest name up: each stands at least 16 units above the one before it, and leaves
    # room for those that come after it.
    svg, limit, room = [], BOTTOM, TOP + 16 * len(ends)
    for (x, y), name, css in sorted(ends, key=lambda end: -end[0][1]):
        room -= 16
        limit = min(max(y, room), limit)
        svg += [_stroke([(x, y), (x + 7, limit)], f"line thin {css}"),
                f'<text x="{x + 9:.1f}" y="{limit + 4:.1f}" class="{css}">{esc(name)}</text>']
        limit -= 16
    return svg


def line_styles(study):
    """{arm: (name in a figure, colour)}: of "sft-lr3e-05" the rate, of "rl-cold" what comes behind
    the method, and the colour of SFT or of RL."""
    usual = {"sft": "c0", "rl": "c1"}
    styles = {}
    for i, arm in enumerate(arms_of(study)):
        method, _, more = arm.partition("-")
        name = name_of(more if method in usual and more else arm)
        name = name.removeprefix("lr") if re.match(r"lr\d", name) else name.rpartition("-lr")[2]
        short = name if len(name) <= 10 else f"{name[:5]}\N{HORIZONTAL ELLIPSIS}{name[-4:]}"
        styles[arm] = short, usual.get(method, f"c{2 + i % 2}")
    return styles


def _curves_panel(study, row, score):
    """One panel: success in `row` along training FLOPs; with several seeds a thin line for each."""
    lines = []
    for arm, (name, css) in line_styles(study).items():
        points = curve(study[arm], row, score)
        lines.append(Line(name, css, points, f"{100 * points[-1, 1]:.0f}"))
        lines += [Line("", f"thin {css}", curve({seed: evals}, row, score)[:, :2])
                  for seed, evals in study[arm].items()]
    top = max((line.points[-1, 0] for line in lines if line.name), default=0) or 1
    if "base" in study:
        mean, *_ = stages(study, score)["base"].interval(row, score)
        points = np.array([[0, mean], [top, mean]])
        lines.insert(0, Line("base", "base muted", points, f"{100 * mean:.0f}"))
    ticks = [(0, "start"), (top / 2, si(top / 2)), (top, si(top))]
    across = Axis("training compute, counted from the start", 0, top, ticks, si)
    return panel(f"{row_title(any_eval(study), row)}: success", across, PERCENT("success"), lines)


def _svg(title, study, score, panels):
    """The panels side by side, with the numbers in words for who cannot see them."""
    told = [f"{name}: ID {on_id.split()[0]} %, rule OOD {on_rule.split()[0]} %"
            for name, on_id, on_rule, *_ in stage_table("", study, score).lines]
    shifted = "".join(f'<g transform="translate({i * WIDTH},0)">{panel}</g>'
                      for i, panel in enumerate(panels))
    width = WIDTH * len(panels)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" '
            f'viewBox="0 0 {width} {HEIGHT}" role="img"><title>{title}, {score_name(score)}</title>'
            f'<desc>{esc("; ".join(told))}</desc>{shifted}</svg>')


def svg_curves(study, score=FIRST, rows=("id", "rule")):
    """SVG, without its style: success along training FLOPs, a panel for each of `rows`; bands are
    95 % intervals."""
    return _svg("Success along training compute", study, score,
                [_curves_panel(study, row, score) for row in rows])


def svg_path(study, score=FIRST):
    """SVG, without its style: rule OOD against ID, each arm's evaluations as a path from the start
    to its name."""
    lines = []
    for arm, style in line_styles(study).items():
        path = np.stack([curve(study[arm], row, score)[:, 1] for row in ("id", "rule")], 1)
        lines.append(Line(*style, path))
    if lines:
        lines.append(Line("start", "start", path[:1]))
    return _svg("Rule OOD against ID along training", study, score,
                [panel("rule OOD against ID, success", PERCENT("ID"), PERCENT("rule OOD"), lines)])


# How training went: the metrics of each step.

FIRST_CURVES = ("loss", "reward", "success", "entropy", "kl", "grad_norm", "mean_length")  # the others are folded


def binned(points, count):
    """Points (P, 2), in at most `count` equal pieces of their x: the mean of each piece."""
    x = points[:, 0]
    places, member = np.unique(x, return_inverse=True)
    if len(places) > count:
        _, member = np.unique(((x - x.min()) / np.ptp(x) * (count - 1e-6)).astype(int), return_inverse=True)
    return np.stack([np.bincount(member, each) / np.bincount(member) for each in points.T], 1)


def learning_curves(runs):
    """{(metric, what it means): SVG}, the metrics of runs along their steps, a panel for each that
    was measured and is not 0 throughout: a thin line for each run, of at most 300 points, and the
    mean of an arm's runs in at most 30 pieces. The x axis is the same in all of them."""
    arms, drawn = {}, {}
    for run in runs:
        arms.setdefault(arm_and_seed(run.path.name)[0], []).append(run)
    arms = {arm: arms[arm] for arm in dict.fromkeys([*STAGES, *sorted(arms)]) if arm in arms}
    styles = line_styles(arms)
    shown = [run for arm in styles for run in arms[arm] if run.records]
    across = axis("step", [0, *(run.records[-1]["step"] for run in shown)], tell="{:.0f}".format)
    names = {name: 0 for run in shown for name in [*run.metrics, *chain(*run.records)]
             if name not in ("step", "flops") and "/" not in name}
    for name in sorted(names, key=lambda name: ([*FIRST_CURVES, name]).index(name)):
        for meaning in dict.fromkeys(run.metrics.get(name, "") for run in shown):
            lines = []
            for arm, style in styles.items():
                seeds = [points for run in arms[arm] if run.metrics.get(name, "") == meaning
                         if len(points := run.points(name))]
                if seeds:
                    lines += [Line("", f"thin {style[1]}", binned(points, 300)) for points in seeds]
                    lines.append(Line(style[0], f"{style[1]} quiet", binned(np.concatenate(seeds), 30)))
            values = np.concatenate([line.points[:, 1] for line in lines] or [[0]])
            if values.any():
                svg = panel("", across, axis(name, values), lines)
                drawn[name, meaning] = (f'<svg viewBox="0 24 {WIDTH} {HEIGHT - 24}" role="img"><title>{esc(name)} along '
                                        f'training</title>{svg}</svg>')
    return drawn


def curves_html(runs):
    """The learning curves of runs; "" without any."""
    figures = {key: f"<figure><figcaption><b>{esc(key[0])}</b> {esc(key[1])}</figcaption>{svg}</figure>"
               for key, svg in learning_curves(runs).items()}
    first = "".join(figure for (name, _), figure in figures.items() if name in FIRST_CURVES)
    more = "".join(figure for (name, _), figure in figures.items() if name not in FIRST_CURVES)
    parts = [f"<div class=figures>{first}</div>"] if first else []
    if more:
        parts.append(f"<details><summary>More metrics of training</summary><div class=figures>{more}</div></details>")
    note = ("<p class=small>Of the training steps, not of held-out problems. Thin lines are runs, thick ones the mean of an arm's "
            "runs and of neighbouring steps. Points tell their values. The same numbers are in each run's metrics.csv.</p>")
    return "<h2>Learning curves</h2>" + note + "".join(parts) if parts else ""


def figure_style():
    """The part of the page's style that figures need."""
    return page_template().partition("<style>")[2].partition("/* page */")[0]


def svg_standalone(svg):
    """The same figure as a file for <img>: with its style and its own paper."""
    style = f"<style>{figure_style()}svg{{background:var(--paper)}}</style>"
    return svg.replace("<title>", f"{style}<title>", 1)


# ---- 5. Samples ----------------------------------------------------------------------------------


def esc(text) -> str:
    """`clean`, then escaped for HTML and XML, attributes included."""
    return html.escape(clean(text), quote=True)


def mark(right):
    """Right or wrong, told by a sign, a word and a colour."""
    return f"<b class={'right' if right else 'wrong'}>{'&#10003; right' if right else '&#10007; wrong'}</b>"


def _right(turn):
    return turn.get("outcome") in tasks.RIGHT


def _solved(sample):
    return tasks.solved([turn.get("outcome") for turn in sample["turns"]])


def _picture(png, css, alt):
    base64.b64decode(png, validate=True)  # ValueError
    return f'<img class={css} alt="{alt}" src="data:image/png;base64,{png}">'


def _turn(problem, turn, views):
    """An answer and its verdict; where problems lead on also its position, what the answer says
    and, once, the view there, from `views`."""
    css = "right" if _right(turn) else "wrong"
    said = (f"<pre class='answer {css}'>{esc(turn['response'])}</pre><p class=small>{mark(_right(turn))} verifier: "
            f"{esc(turn.get('outcome', ''))}, reward {esc(turn.get('reward', ''))}. "
            f"{esc(turn.get('feedback') or '')}</p>")
    if not problem.leads_on:
        return said
    place = f"<b>position {turn['position'] + 1}</b>: " + " / ".join(
        f"{esc(label)} <b>{esc(text)}</b>" for label, text in problem.parsed(turn["response"]))
    view = views.pop(turn["position"], "")
    shown = _picture(view, "cards", "the view from there") if view else ""
    return f"<div class=step>{shown}<div>{place}{said}</div></div>"


def _episode(problem, sample):
    """A sample episode: its figures, the prompt and every turn."""
    views = dict(enumerate(sample.get("pictures", ())))
    turns = "".join(_turn(problem, turn, views) for turn in sample["turns"])
    asked = f"<pre>{esc(sample['prompt'])}</pre>"
    if "picture" in sample:
        asked = _picture(sample["picture"], "cards", "what the model saw") + asked
    if "map" in sample:
        asked = f"<div>{_picture(sample['map'], 'map', 'the route on its map')}{asked}</div>"
        asked, turns = f"<div class=walk>{asked}", f"<div>{turns}</div></div>"
    title = esc(f"{ROWS.get(sample['row'], sample['row'])}, return {sample['reward']:.4g}")
    return f"<h3>{title} {mark(_solved(sample))}</h3>{asked}{turns}"


def _episodes(study, arm):
    """Sample episodes of the arm's latest evaluation that has any: three of ID and of rule OOD and
    one of each other row; all where problems lead on."""
    seed = min(study[arm])
    found = [evaluation for evaluation in study[arm][seed] if evaluation["episodes"]]
    if not found:
        return ""
    last, shown = found[-1], []
    for row in last["rows"]:
        pages = [page for name, page in last["episodes"] if name == row]
        shown += pages if task_class(last).leads_on else pages[: 3 if row in ROWS else 1]
    title = esc(f"Sample episodes: {name_of(arm)}, seed {seed}, step {last['step']}")
    return f"<details><summary>{title}</summary>{''.join(shown)}</details>"


MOST = 5  # steps beside each other, and steps of training


def spread(items, most=MOST):
    """At most so many of the items, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[i] for i in places]


def _short_turn(problem, turn):
    """An answer in a narrow column: its verdict and text; where problems lead on its action."""
    if problem.leads_on:
        *_, (_, action) = problem.parsed(turn["response"])
        sign = "&#10003;" if _right(turn) else "&#10007;"
        return (f"<div><b class={'right' if _right(turn) else 'wrong'}>{sign} {turn['position'] + 1}</b> {esc(action)}</div>")
    css = "right" if _right(turn) else "wrong"
    return f"<pre class='answer {css}'>{esc(turn['response'])}</pre><p class=small>{esc(turn.get('outcome', ''))}</p>"


def changes(study, arm, most=2):
    """How the answers to the same problems changed along training: the sample problems of ID and of
    rule OOD that most evaluations of the arm's first seed show, their steps beside each other."""
    seed = min(study[arm])
    found = {}  # (row, prompt, picture, how many there are alike) -> {step: sample}
    for evaluation in study[arm][seed]:
        alike = {}
        for sample in evaluation["samples"]:
            key = sample["row"], str(sample["prompt"]), sample.get("picture")
            alike[key] = alike.get(key, 0) + 1
            found.setdefault((*key, alike[key]), {})[evaluation["step"]] = sample
    parts, problem = [], task_class(study[arm][seed][-1])
    for row in ("id", "rule"):
        several = [(key, steps) for key, steps in found.items() if key[0] == row and len(steps) > 1]
        for (_, prompt, picture, _), steps in sorted(several, key=lambda each: -len(each[1]))[:most]:
            columns = []
            for step in spread(sorted(steps)):
                turns = "".join(_short_turn(problem, turn) for turn in steps[step]["turns"])
                columns.append(f"<div><h4>step {step} {mark(_solved(steps[step]))}</h4>{turns}</div>")
            asked = (_picture(picture, "cards", "what the model saw") if picture else "") + f"<pre>{esc(prompt)}</pre>"
            parts.append(f"<h3>{ROWS[row]}</h3>{asked}<div class=steps>{''.join(columns)}</div>")
    title = esc(f"How answers changed: {name_of(arm)}, seed {seed}")
    return f"<details><summary>{title}</summary>{''.join(parts)}</details>" if parts else ""


def training_samples(run, most=MOST, each=4):
    """{step: HTML} of the episodes in RUN/samples that RL kept, of some steps. Files that cannot be
    shown are left out."""
    shown = {}
    files = [file for file in run.path.glob("samples/*.json") if file.stem.isdecimal()]
    for file in spread(sorted(files, key=lambda file: int(file.stem)), most):
        try:
            problem = tasks.TASKS[run.args["task"]].problem
            samples = read_checked(file, list)[: 1 if problem.leads_on else each]
            shown[int(file.stem)] = "".join(_episode(problem, sample | {"row": "training"}) for sample in samples)
        except Exception:  # damaged, or of another version
            continue
    return shown


def samples_html(runs):
    """The samples of training of each arm's first run that has any."""
    parts, seen = [], set()
    for run in runs:
        arm, seed = arm_and_seed(run.path.name)
        if arm not in seen and (shown := training_samples(run)):
            seen.add(arm)
            steps = "".join(f"<details><summary>step {step}</summary>{html_}</details>" for step, html_ in shown.items())
            title = esc(f"Samples of training: {name_of(arm)}, seed {seed}")
            parts.append(f"<details><summary>{title}</summary>{steps}</details>")
    return "".join(parts)


# ---- 6. The page ---------------------------------------------------------------------------------


def page_template():
    """The report's page: its layout and style, with $names for the rest."""
    return (Path(__file__).parent / "report.html").read_text("utf-8")


def verdict(sft, rl, gap, rl_id):
    """What happened under the other rule, from the signs of these differences there: SFT - start,
    RL - start, RL - SFT; and of RL - start under the trained rule."""
    if gap <= 0:
        return ("Under the other rule SFT ends above RL: the opposite of the published result."
                if gap else "Under the other rule the two arms end without a clear difference.")
    if sft >= 0 or rl < 0:
        return ("RL ends above SFT under the other rule, but " +
                ("both lost part of it." if sft < 0 else "SFT did not clearly lose it."))
    gain = "raised its score there" if rl else "shows no clear loss"
    told = (f"SFT lost the other rule and RL {gain}: the published picture, SFT memorizes and RL "
            "generalizes.")
    return told if rl_id > 0 else (f"{told} But RL did not clearly improve under the trained rule "
                                   "either, so it may just have changed little.")


PUBLISHED = [("sft end", "start", "rule"), ("rl end", "start", "rule"),  # stage, other stage, row
             ("rl end", "sft end", "rule"), ("rl end", "start", "id")]


def story(study, score=FIRST):
    """What happened, in sentences made from the numbers; the first is the verdict."""
    last, stage, words = any_eval(study), stages(study, score), task_class(any_eval(study)).WORDS
    signs = {key: sign_of(differ) for key, differ in differences(study, score).items()}
    lines = pair_table("", study, score, ["id", "rule"]).lines[:6]
    told = ["; ".join(f"{name}: {points} points, {said}" for name, points, said in lines) + "."
            if lines else "There is no second arm and no start to compare with yet."]
    if signs.keys() >= {*PUBLISHED}:
        told = [verdict(*(signs[key] for key in PUBLISHED))]
    rule = last.get("rule")
    _, other, *_ = rows_of(last["suite"], rule, None)
    told.append(f"Scores are the share of {len(last['classes'])} held-out {words.things} that are "
                f"solved ({score_name(score)}) under the rule of training (ID: "
                f"{rule or words.trained}) and under one that only the prompt states (rule OOD: "
                f"{other.rule if rule else words.other}).")
    if notes := [each.label for each in stage.values() if each.label.endswith(")")]:
        told[0] = ("This is no result yet, as runs are not finished or had unequal compute: "
                   f"{', '.join(notes)}. So far: {told[0]}")
    if len({str(any_of(study[arm])[-1]["args"].get("lr")) for arm in arms_of(study)}) > 1:
        told[0] += " The arms' learning rates differ: see below."
    start = stage.get("start", Stage("", {}))
    nats = [start.interval(row, ("nats", "teacher"))[0] for row in ("id", "rule")]
    if not math.isnan(sum(nats)):
        told.insert(1, "An answer of the teacher has {:.1f} nats under the start (ID), {:.1f} "
                    "under the other rule: so foreign is it to the model.".format(*nats))
    if signs.get(("sft end", "start", "rule"), 0) < 0:
        told.append("Judged by the old rule, SFT's answers to prompts that state the other one "
                    "score higher than at the start: it goes on using the rule it was trained on."
                    if signs["sft end", "start", "fake"] > 0 else
                    "Judged by the old rule, SFT's answers do not score higher than at the start: "
                    "what it lost is not simply replaced by the old rule.")
    return told


def arm_table(study):
    """What each arm was given: seeds, compute, and the flags of its first seed."""
    arms = []
    for seeds in study.values():
        ends = [evals[-1] for evals in seeds.values()]
        paper = np.mean([end.get("flops_paper", 0) for end in ends])
        arms.append({"seeds": len(ends), "compute": si(np.mean([end["flops"] for end in ends])),
                     "compute by the paper's formula": si(paper)} | ends[0]["args"])
    lines = [[key, *(str(arm.get(key, NONE)) for arm in arms)]
             for key in dict.fromkeys(chain(*arms))]
    return Table("", ["flag", *map(name_of, study)], lines)


def _table(table):
    """A Table in HTML; what stands in brackets is small."""
    head = "".join(f"<th scope=col>{esc(name)}</th>" for name in table.head)
    lines = [f"<tr><th scope=row>{esc(name)}</th>" + "".join(f"<td>{esc(cell)}" for cell in cells)
             for name, *cells in table.lines]
    title = f"<h3>{esc(table.title)}</h3>" if table.title else ""
    body = re.sub(r"\[.*?\]", r"<i>\g<0></i>", "".join(lines))
    return f"{title}<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def report_html(study_dir, every=0):
    """The report of a directory: one HTML page that loads nothing and runs nothing, with a part for
    each study. Errors as in `load_study`. Everything that a model or a file wrote is escaped.
    every: seconds after which a browser reads the page again; then it also tells the progress."""
    head, part, foot = page_template().split("<!-- study -->")
    runs, parts = load_runs(study_dir), []
    training = [run for run in runs if run.records]
    names = {run.path.name for run in training}
    try:
        if not training and not every or any(evaluation_files(study_dir)):
            for study in load_study(study_dir):
                evaluated = {evals[-1]["self"][1] for seeds in study.values() for evals in seeds.values()}
                own = [run for run in training if run.path.name in evaluated]
                names -= evaluated
                parts.append(Template(part).substitute(page_part(study, own)))
    except ValueError as error:
        if not every:
            raise
        parts = [f"<p><b class=wrong>{esc(error)}</b></p>"]  # it is perhaps being replaced
    if others := [run for run in training if run.path.name in names]:
        parts.append(f"<section><h2>{esc(', '.join(run.path.name for run in others))}: not evaluated yet</h2>"
                     f"{curves_html(others)}{samples_html(others)}</section>")
    title = esc(f"Report: {Path(study_dir).resolve().name}")
    reload, progress = "", ""
    if every:
        reload = f'<meta http-equiv="refresh" content="{every}">'
        progress = progress_html(runs)
    return Template(head).substitute(title=title, reload=reload, progress=progress) + "".join(parts) + foot


def page_part(study, runs):
    """The $names of a study's part of the page; runs: its Trainings."""
    verdict, *told = story(study)
    results = ""
    for score in reported(study):
        figures = svg_curves(study, score, ["id"]), svg_curves(study, score, ["rule"])
        tables = "".join(_table(table) for table in all_tables(study, score) if table.lines)
        results += (f"<details><summary>{score_name(score)}</summary><div class=figures>"
                    f"{''.join(figures)}{svg_path(study, score)}</div>{tables}</details>")
    last = any_eval(study)
    arms = ", ".join(map(name_of, arms_of(study) or study))
    name = f"{arms}: {last['suite']}, {len(last['classes'])} {last['split']} problems"
    episodes = "".join(_episodes(study, arm) + changes(study, arm) for arm in study)
    return {"name": esc(name), "verdict": esc(verdict), "story": esc(" ".join(told)),
            "results": results.replace("<details>", "<details open>", 1),
            "alike": task_class(last).WORDS.alike, "classes": len(set(last["classes"])),
            "curves": curves_html(runs), "arms": _table(arm_table(study)),
            "episodes": episodes + samples_html(runs)}


def progress_html(runs):
    """How far the runs are, and the newest sample of training of each that is not finished."""
    lines, samples = [], ""
    for run in runs:
        name, share = esc(run.path.name), run.share()
        step = run.records[-1]["step"] if run.records else 0
        state = "finished" if run.finished() else f"{clock(run.seconds_left())} to go"
        ago = clock(max(0, time.time() - run.written))
        lines.append(f"<tr><th scope=row>{name}</th><td><progress value={share:.3f}></progress> {100 * share:.0f} %"
                     f"<td>step {step}<td>{state}<td>{ago} ago")
        if not run.finished() and (shown := training_samples(run, most=1, each=1)):
            (step, newest), = shown.items()
            samples += f"<h3>A sample of training: {name}, step {step}</h3>{newest}"
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", "done", "", "training", "last change"))
    told = (f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>" if lines else
            "<p>No run has begun yet.</p>")
    return (f"<section><h2>Progress at {time.strftime('%H:%M:%S')}</h2><p class=small>This page is read again by itself while runs "
            f"go on. Time to go: of training, evaluations aside.</p>{told}{samples}</section>")


def write_text(path, text):
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_report(study_dir, every=0):
    """Write `report.html` into the study directory, whole or not at all. Returns its path."""
    path = Path(study_dir) / "report.html"
    write_text(path, report_html(study_dir, every))
    return path


def write_study(directory):
    """Write the report of a directory, and the figures of its first study as files for a README.
    Only then print its tables: whoever reads them may leave early. Returns its studies."""
    path = write_report(directory)
    studies = load_study(directory) if evaluation_files(directory) else []
    for name, draw in (("curves", svg_curves), ("path", svg_path)):
        if studies:
            write_text(Path(directory) / f"{name}.svg", svg_standalone(draw(studies[0])))
    for study in studies:
        print(f"{clean(' '.join(story(study)[:2]))}\n\n{all_text(study)}")
    print(f"report: {path}")
    return studies


# ---- 7. Watching ---------------------------------------------------------------------------------

QUIET = 60  # seconds without a change, after which finished runs are all that there will be


def over(directory, runs):
    """Whether all runs are finished and no other has begun for a while."""
    times = [run.written for run in runs]
    for file in evaluation_files(directory):
        with suppress(FileNotFoundError):  # a resumed run takes back what is later than its checkpoint
            times.append(file.stat().st_mtime)
    return bool(runs) and all(run.finished() for run in runs) and time.time() - max(times) > QUIET


def watch(directory, seconds=10):
    """Write the report of a directory again and again while its runs go on, at most a tenth of the
    time. Ends when all runs are finished, or at Ctrl-C; then the page is one that stays."""
    path, said, going = Path(directory) / "report.html", None, True
    print(f"open {clean(path.absolute())} in a browser; Ctrl-C ends this, not the runs", flush=True)
    try:
        while going:
            began, runs = time.time(), load_runs(directory)
            going = not over(directory, runs)
            if going and Path(directory).is_dir():
                write_report(directory, every=seconds)
            now = ", ".join(f"{run.path.name} " + ("finished" if run.finished() else
                            f"{100 * run.share():.0f} %, {clock(run.seconds_left())} to go") for run in runs)
            if now != said:
                print(clean(now) or f"no run in {clean(directory)} yet: waiting", flush=True)
            said = now
            if going:
                time.sleep(max(seconds, 10 * (time.time() - began)))
    except KeyboardInterrupt:
        print()
    if load_runs(directory):
        write_report(directory)
        print(f"report: {clean(path)}")


# ---- 8. Command line -----------------------------------------------------------------------------


def main(argv=None):
    """Write the report of a directory and print its tables; returns its studies."""
    parser = Parser("Print a study's tables and write its report.html.")
    parser.add_argument("study", help="a directory of runs, or a run")
    parser.add_argument("--watch", nargs="?", type=between(int, 1, 3600), const=10, metavar="SECONDS",
                        help="write the page every so many seconds (10) until all runs are finished")
    args = parser.parse_args(argv)
    return watch(args.study, args.watch) if args.watch else write_study(args.study)


if __name__ == "__main__":
    run_main(main)
