"""The report of a study: its figures (SVG) and one HTML page that loads nothing. `evaluate.py --report STUDY` starts this.

    python -m assets.report runs/demo      # prints tables, writes report.html, curves.svg, path.svg
"""
import base64
import html
import json
import math
import re
import sys
from functools import partial
from itertools import chain, product
from pathlib import Path
from string import Template

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tasks  # noqa: E402
from evaluate import (FIRST, MODES, NONE, ROWS, STAGES, Parser, Stage, Table, add_scores, any_eval, any_of, arms_of,  # noqa: E402
                      clean, differences, flags_of, interval, name_of, pair_table, read_checked, reported, row_title, rows_of,
                      run_main, score_name, score_table, score_tables, si, sign_of, stage_table, stages, table_text, task_class)
from model import write_atomically  # noqa: E402

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


def load_study(directory):
    """A list of the studies in a directory, one for each set of problems, or that of a single run,
    from `RUN/evals/NNNNNN.json` and `RUN/args.json`.

    RUN is an arm's name with `-sN` for seed N, or without for seed 0. ValueError, one sentence,
    when there is nothing, or a file is malformed.
    """
    studies = {}
    files = [*Path(directory).glob("evals/*.json"), *Path(directory).glob("*/evals/*.json")]
    for file in sorted(files, key=lambda file: (file.parent, len(file.name), file.name)):
        run = file.absolute().parent.parent
        arm, seed = re.fullmatch(r"(.+?)(?:-s(\d{1,9}))?", run.name, re.DOTALL).groups()
        seed = int(seed or 0)
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


# ---- 2. Tables of a task -------------------------------------------------------------------------


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


# ---- 3. Figures ----------------------------------------------------------------------------------
# A panel is 430 x 330 units, its plot between LEFT..RIGHT and TOP..BOTTOM; the right margin holds
# the names of the lines. Colours and style stand in assets/report.html.

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 330, 44, 352, 34, 278
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


def on_panel(points, top=1):
    """Points (..., 2) of the data, x of 0..top and y of 0..1, in the units of a panel."""
    return np.multiply(points, [(RIGHT - LEFT) / top, TOP - BOTTOM]) + [LEFT, BOTTOM]


def panel(title, x_name, ticks, lines, top=1):
    """A panel: its title, which names the y axis, grid, ticks [(x, label)] and name of the x axis.

    lines: [(name, css, points), ...], points (P, 2) or, with the edges of a band, (P, 4). A line
    with a name has it at its end, and a dot for each point."""
    svg = [f'<text x="44.0" y="18.0" class="head">{esc(title)}</text>'
           f'<text x="198.0" y="318.0" class="mid muted">{esc(x_name)}</text>']
    for x, label in ticks:
        at, _ = on_panel([x, 0], top)
        svg.append(f'<text x="{at:.1f}" y="296.0" class="mid muted">{esc(label)}</text>')
    for share, label in PERCENTS:
        left, right = on_panel([[0, share], [1, share]])
        svg += [_stroke([left, right], "grid"),
                f'<text x="38.0" y="{left[1] + 4:.1f}" class="end muted">{label}</text>']
    ends = []
    for name, css, points in lines:
        line = on_panel(points[:, :2], top)
        if points.shape[1] == 4:
            band = [*points[:, [0, 2]], *points[::-1, [0, 3]]]
            svg.append(_stroke(on_panel(band, top), f"band {css}"))
        svg.append(_stroke(line, f"line {css}"))
        if name:
            ends.append((line[-1], name, f"name {css}"))
            svg += [f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in line]
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
    """{arm: (name in a figure, colour)}: of "sft-lr3e-05" the rate, and the colour of SFT."""
    usual = {"sft": "c0", "rl": "c1"}
    return {arm: (name_of(arm).rpartition("-lr")[2][:9],
                  usual.get(arm.partition("-")[0], f"c{2 + i % 2}"))
            for i, arm in enumerate(arms_of(study))}


def _curves_panel(study, row, score):
    """One panel: success in `row` along training FLOPs; with several seeds a thin line for each."""
    lines = []
    for arm, (name, css) in line_styles(study).items():
        points = curve(study[arm], row, score)
        lines.append((f"{name} {100 * points[-1, 1]:.0f}", css, points))
        lines += [("", f"thin {css}", curve({seed: evals}, row, score)[:, :2])
                  for seed, evals in study[arm].items()]
    top = max((points[-1, 0] for name, _, points in lines if name), default=0) or 1
    if "base" in study:
        mean, *_ = stages(study, score)["base"].interval(row, score)
        line = np.array([[0, mean], [top, mean]])
        lines.insert(0, (f"base {100 * mean:.0f}", "base muted", line))
    ticks = [(0, "start"), (top / 2, si(top / 2)), (top, si(top))]
    return panel(f"{row_title(any_eval(study), row)}: success",
                 "training compute, counted from the start", ticks, lines, top)


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
        lines.append((*style, path))
    if lines:
        lines.append(("start", "start", path[:1]))
    return _svg("Rule OOD against ID along training", study, score,
                [panel("rule OOD against ID, success", "ID success", PERCENTS, lines)])


def figure_style():
    """The part of the page's style that figures need."""
    return page_template().partition("<style>")[2].partition("/* page */")[0]


def svg_standalone(svg):
    """The same figure as a file for <img>: with its style and its own paper."""
    style = f"<style>{figure_style()}svg{{background:var(--paper)}}</style>"
    return svg.replace("<title>", f"{style}<title>", 1)


# ---- 4. The page ---------------------------------------------------------------------------------


def esc(text) -> str:
    """`clean`, then escaped for HTML and XML, attributes included."""
    return html.escape(clean(text), quote=True)


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


def _picture(png, css, alt):
    base64.b64decode(png, validate=True)  # ValueError
    return f'<img class={css} alt="{alt}" src="data:image/png;base64,{png}">'


def _turn(problem, turn, views):
    """An answer and its verdict; where problems lead on also its position, what the answer says
    and, once, the view there, from `views`."""
    said = (f"<pre class=answer>{esc(turn['response'])}</pre><p class=small>verifier: "
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
    title = esc(f"{ROWS.get(sample['row'], sample['row'])}, return {sample['reward']}")
    return f"<h3>{title}</h3>{asked}{turns}"


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


def report_html(study_dir):
    """The report of a directory: one HTML page that loads nothing and runs nothing, with a part for
    each study. Errors as in `load_study`. Everything that a model or a file wrote is escaped."""
    head, part, foot = page_template().split("<!-- study -->")
    parts = [Template(part).substitute(page_part(study)) for study in load_study(study_dir)]
    title = esc(f"Report: {Path(study_dir).resolve().name}")
    return Template(head).substitute(title=title) + "".join(parts) + foot


def page_part(study):
    """The $names of a study's part of the page."""
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
    return {"name": esc(name), "verdict": esc(verdict), "story": esc(" ".join(told)),
            "results": results.replace("<details>", "<details open>", 1),
            "alike": task_class(last).WORDS.alike, "classes": len(set(last["classes"])),
            "arms": _table(arm_table(study)),
            "episodes": "".join(_episodes(study, arm) for arm in study)}


def write_text(path, text):
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_report(study_dir):
    """Write `report.html` into the study directory, whole or not at all. Returns its path."""
    path = Path(study_dir) / "report.html"
    write_text(path, report_html(study_dir))
    return path


# ---- 5. Command line -----------------------------------------------------------------------------


def write_study(directory):
    """Write the report of a directory, and the figures of its first study as files for a README.
    Only then print its tables: whoever reads them may leave early. Returns its studies."""
    path, studies = write_report(directory), load_study(directory)
    for name, draw in (("curves", svg_curves), ("path", svg_path)):
        write_text(Path(directory) / f"{name}.svg", svg_standalone(draw(studies[0])))
    for study in studies:
        print(f"{clean(' '.join(story(study)[:2]))}\n\n{all_text(study)}")
    print(f"report: {path}")
    return studies


def main(argv=None):
    """Write the report of a directory and print its tables; returns its studies."""
    parser = Parser("Print a study's tables and write its report.html.")
    parser.add_argument("study", help="a directory of runs, or a run")
    return write_study(parser.parse_args(argv).study)


if __name__ == "__main__":
    run_main(main)
