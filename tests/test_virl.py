"""Tests of V-IRL in tasks.py: cities and routes against their coordinates, rules, the verifier, demonstrators, scores."""
import json
import math
import pickle
import random
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tasks  # noqa: E402
from model import load_model  # noqa: E402
from conftest import standing  # noqa: E402
import assets.habits  # noqa: E402, F401
from assets import convert_routes, draw_emblems, panoramas  # noqa: E402
from tasks import COMPASS, Position, Route, city, parse_turns, routes, turn_word  # noqa: E402

RULES = ("absolute", "relative")
STYLES = ("full", "short")


def make(name, *args, data=None, **settings):
    """A problem; with `data` one of that folder's routes."""
    return panoramas.make(str(data), name, *args, **settings) if data else tasks.make(name, *args, **settings)


def walks(style, count=200, rule="absolute", split="train", **more):
    return [make("virl-l", rule, split=split, index=i, style=style, **more) for i in range(count)]


def by_hand(rule, attempts=1, judge=None, style="short"):
    """Facing south-east, right into the street to the west, one step, at the intersection to the south-east, and the pub there on the right."""
    rail = (Position((1, 2, 1), 135, (), False, "turn", 270, 0), Position((1, 2, 2), 270, (), False, "forward", None, 1),
            Position(2, 270, (), True, "turn", 139, 2), Position((2, 3, 1), 139, (("pub", "right"),), False, "stop", None, 3))
    return tasks.Navigation(Route("test-0", rail), parse_turns(rule), attempts, style, parse_turns(judge or rule))


def say(action, obs="none", style="short"):
    return json.dumps(dict(zip(tasks.WORDING[style]["keys"], (obs, "?")), action=action))


# ---- Cities and routes -----------------------------------------------------------------------------------------------

def test_wrapped_angles():
    assert [tasks.wrap(angle) for angle in (0, 180, -180, 190, -190, 359, 720, 540)] == [0, 180, 180, -170, 170, -1, 0, 180]
    assert [round(tasks.bearing((0, 0), point)) for point in ((0, 1), (1, 1), (1, 0), (0, -1), (-1, 0))] == [0, 45, 90, 180, 270]
    assert turn_word("relative", 350, 80) == "right" and turn_word("relative", 10, 330) == "slightly left"  # across north


@pytest.mark.parametrize("heading, towards, relative, absolute", [
    (0, 90, "right", "east"), (0, 270, "left", "west"), (0, 45, "slightly right", "northeast"), (300, 300 - 60, "slightly left", "southwest"),
    (300, 300 - 61, "left", "southwest"), (180, 337, "right", "north"), (180, 338, "right", "north"), (0, 337, "slightly left", "northwest")])
def test_words_of_turns(heading, towards, relative, absolute):
    assert turn_word("relative", heading, towards) == relative
    assert turn_word("absolute", heading, towards) == absolute or abs(towards - 337.5) < 1


def degrees(a, b):
    """Clockwise from north, by another way than tasks.bearing."""
    return (90 - math.degrees(math.atan2(b[1] - a[1], b[0] - a[0]))) % 360


@pytest.mark.parametrize("style", STYLES)
def test_words_and_sides_match_the_coordinates(style):
    """Every turn and landmark of 200 routes, worked out anew from points: the cross product says left or right."""
    seen = Counter()
    for walk in walks(style):
        town = city(walk.route.city, style)
        points = [town.points[here.place] for here in walk.route.rail]
        for here, point, after in zip(walk.route.rail, points, points[1:] + [None]):
            ahead = (math.sin(math.radians(here.heading)), math.cos(math.radians(here.heading)))
            if after is not None:
                step = (after[0] - point[0], after[1] - point[1])
                assert 9 < math.hypot(*step) < 21
                dot, cross = (ahead[0] * step[0] + ahead[1] * step[1]) / math.hypot(*step), ahead[0] * step[1] - ahead[1] * step[0]
                if here.action == "forward":
                    assert dot > 0.9999
                else:
                    angle = math.degrees(math.acos(dot))
                    assert angle < 53 or 67 < angle < 151
                    word = ("slightly " if angle < 60 else "") + ("left" if cross > 0 else "right")
                    assert turn_word("relative", here.heading, here.towards) == word
                    compass = COMPASS[min(range(8), key=lambda i: abs((degrees(point, after) - 45 * i + 180) % 360 - 180))]
                    assert turn_word("absolute", here.heading, here.towards) == compass
                    seen.update((word, compass))
            for name, side in here.landmarks:
                assert town.landmarks[here.place][0] == name
                angle = math.radians(town.landmarks[here.place][1])
                dot, cross = ahead[0] * math.sin(angle) + ahead[1] * math.cos(angle), ahead[0] * math.cos(angle) - ahead[1] * math.sin(angle)
                assert {"front": dot, "left": cross, "right": -cross}[side] > 0.85
            assert here.crossing == isinstance(here.place, int)
        assert [here.action for here in walk.route.rail][::len(points) - 1] == ["turn", "stop"]
        assert all(here.crossing == (here.action == "turn") for here in walk.route.rail[1:])
    assert min(seen[word] for word in COMPASS) > 20 and min(seen[word] for word in tasks.TURNS["relative"]) > 40


def test_the_word_fits_only_one_street_of_an_intersection():
    for walk in walks("full"):
        town = city(walk.route.city, "full")
        for here in walk.route.rail:
            arms = [street.heading for street in town.arms[here.place]] if here.crossing else []
            arms = [arm for arm in arms if abs(tasks.wrap(arm - here.heading - 180)) > 1e-6]
            for words in RULES if here.crossing else ():
                said = [turn_word(words, here.heading, arm) for arm in arms]
                assert said.count(turn_word(words, here.heading, here.towards)) == 1


def test_fronts_close_every_block():
    """Where two neighbouring streets' fronts end, they meet."""
    town, met = city("train-3", "full"), 0
    def end(street, side):
        along, across, angle = town.front(street, side)[0], tasks.CURB * side, math.radians(street.heading)
        x, y = town.nodes[street.a]
        return x + along * math.sin(angle) + across * math.cos(angle), y + along * math.cos(angle) - across * math.sin(angle)
    for arms in town.arms.values():
        for street, after in zip(arms, arms[1:] + arms[:1]):
            gap = (after.heading - street.heading) % 360
            if 40 < gap < 265:
                met += 1
                assert math.dist(end(street, 1), end(after, -1)) < 1e-6
    assert met > 60


@pytest.mark.parametrize("style", STYLES)
def test_routes_are_distinct_and_splits_share_none(style):
    keys = {}
    for split in ("train", "val", "test"):
        made = walks(style, 100 if split == "val" else 200, split=split)
        keys[split] = {walk.route.key() for walk in made}
        assert {walk.route.city.split("-")[0] for walk in made} == {split}
        by_city = Counter(walk.route.city for walk in made)
        assert set(by_city.values()) == {20}
        assert len(keys[split]) > len(made) * (0.99 if style == "full" else 0.9)
        assert all(len({route.key() for route in routes(name, style)}) == 20 for name in by_city)
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["val"] and not keys["val"] & keys["test"]
    lengths = Counter(len(walk.route.rail) for walk in made)
    legs = Counter(walk.actions.count("turn") for walk in made)
    assert (max(lengths) <= 6 and min(lengths) == 3 and set(legs) == {1, 2}) if style == "short" else (set(legs) == {2, 3, 4, 5, 6} and max(lengths) <= 40)


@pytest.mark.parametrize("style, counts", [("short", {"base": 1500, "train": 1500, "val": 500, "test": 1000}),
                                           ("full", {"base": 200, "train": 200, "val": 100, "test": 200})])
def test_no_transcript_of_one_split_is_in_another(style, counts):
    """Prompt, expert's answers and verifier's words under every rule: what a held-out route reads like has not been trained."""
    for rule in RULES:
        read = {split: {(walk.prompt, *walk.demonstrate("expert", random)) for walk in walks(style, count, rule, split)}
                for split, count in counts.items()}
        assert all(len(read[split]) > 0.8 * count for split, count in counts.items())
        assert all(not read[a] & read[b] for a in read for b in read if a != b and {a, b} != {"base", "train"})


@pytest.mark.parametrize("style", STYLES)
def test_streams_are_pure(style):
    first = [walk.route for walk in walks(style, 30, "relative", "test")]
    random.seed(0)
    routes.cache_clear(), city.cache_clear()
    assert first == [make("virl-l", "absolute", None, "test", i, 7, style, "relative", seed=3).route for i in reversed(range(30))][::-1]
    code = f"import tasks; print(hash(0), [tasks.make('virl-l', None, None, 'test', i, style={style!r}).prompt for i in range(30)])"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PYTHONHASHSEED": "99"})
    assert other.stdout.strip() == f"0 {[walk.prompt for walk in walks(style, 30, split='test')]}"
    assert make("virl-l", seed=1, index=3).route.city == "train-50000000" and make("virl-l", split="test", seed=1).route.city == "test-0"


def test_the_stream_does_not_change():
    """Literal problems: results are compared across machines and versions."""
    assert [make("virl-l", rule, split="test", index=i, style="short").prompt for i, rule in enumerate(RULES)] == [
        "facing west, compass. 1 turn slightly left to southwest. 2 go to crossing, club front. 3 turn right to north. 4 go to end, lab left.\nnone",
        "facing east, sides. 1 turn slightly right to southeast. 2 go to end, cafe left.\nnone"]
    assert make("virl-l", split="test").texts[-2:] == [
        "Turn right to face southeast.", "Move forward until you reach the destination where Cedar Pizza is on your left."]


def test_cli_shows_a_walk_and_judges_an_action():
    def cli(*args):
        return subprocess.run([sys.executable, "tasks.py", "--task", "virl-l", *args], cwd=ROOT, capture_output=True, text=True, input="stop()\n")
    walk = make("virl-l", "relative", split="test", index=2)
    shown = cli("--rule", "relative", "--index", "2", "--n", "1", "--attempts", "3", "--ask").stdout
    assert walk.prompt in shown and "Verdict: wrong_action, reward -1. Wrong: this is not the destination." in shown
    assert all(text in shown for text in walk.demonstrate("expert", random))
    refused = cli("--rule", "10")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


# ---- Rules -----------------------------------------------------------------------------------------------------------

def test_rules_are_read_and_written():
    assert [parse_turns(text) for text in RULES] == [*RULES]
    for text in ("", "abs", "10", "Absolute", "absolute/", "relative/told=rule", "*", "\x1b[31m"):
        with pytest.raises(ValueError, match="no rule for turns.*\\.$") as caught:
            parse_turns(text)
        assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("bad", [dict(rule="10"), dict(visual="day"), dict(split="exam"), dict(style="long"), dict(index=-1), dict(attempts=0),
                                 dict(judged_by="11,12,13"), dict(seed=-1)])
def test_make_refuses_what_it_does_not_know(bad):
    with pytest.raises(ValueError, match="\\.$"):
        make(**{"name": "virl-l"} | bad)


@pytest.mark.parametrize("style", STYLES)
def test_prompts_state_their_rule_and_no_other(style):
    for index in range(50):
        absolute, relative = (make("virl-l", rule, index=index, style=style) for rule in RULES)
        turns = [[turn_word(words, here.heading, here.towards) for here in absolute.route.rail if here.action == "turn"] for words in RULES]
        means = [tasks.WORDING[style]["means"][words] for words in RULES]
        assert absolute.route == relative.route and absolute.texts == relative.texts and absolute.prompt != relative.prompt
        assert all(a in text and b in text for a, b, text in zip(*turns, absolute.texts[::2], strict=True))
        assert means[0] in absolute.prompt and means[1] in relative.prompt and absolute.prompt.split("\n")[-1] == relative.prompt.split("\n")[-1]
        assert means[1] not in absolute.prompt and means[0] not in relative.prompt


# ---- The verifier ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rule", RULES)
def test_the_expert_walks_every_route_to_its_end(rule, style):
    for walk in walks(style, rule=rule):
        steps = []
        while not walk.done:
            steps.append(walk.step(walk.expert()))
        assert [step.outcome for step in steps] == ["right_action"] * (len(walk.route.rail) - 1) + ["correct"]
        assert all(step.reward == 1 and step.done == (step is steps[-1]) for step in steps) and walk.verdict.observed
        with pytest.raises(RuntimeError):
            walk.step("{}")


def test_rewards_attempts_and_feedback():
    walk = by_hand("absolute", 2)
    assert [by_hand(rule).prompt for rule in RULES] == [
        f"facing southeast, {means}. 1 turn right to west. 2 go to crossing. 3 turn left to southeast. 4 go to end, pub right.\nnone"
        for means in ("compass", "sides")]
    assert (walk.cls, walk.actions) == ("test-0: right, left", ("turn", "forward", "turn", "stop"))
    assert walk.step(say("forward()")) == (-1, False, "no: turn here", "wrong_action", 1) and walk.position == 0
    assert walk.step(say("turn_direction(west)")) == (1, False, "none", "right_action", 1) and (walk.position, walk.attempt) == (1, 0)
    assert walk.step(say("turn_direction(west)")) == (-1, False, "no: no turn yet", "wrong_action", 1)
    assert walk.step(say("forward()")) == (1, False, "crossing", "right_action", 1)
    assert walk.step(say("turn_direction(left)")) == (-1, False, "no: other word", "wrong_action", 0)
    assert walk.step(say("stop()")) == (-2, True, "no: not the end", "wrong_action", 0) and walk.done
    slightly = by_hand("relative", 2)  # the right side, but not so far: "other way" would be untrue
    assert slightly.step(say("turn_direction(slightly right)")) == (-1, False, "no: wrong turn", "wrong_action", 1)
    _, texts = standing(walk, 3)
    last, _ = standing(walk, 3)
    assert texts[-1] == "pub right" and last.step("what?") == (-1, False, "not legal", "illegal", 0)
    assert last.step(say("stop()", "pub right")) == (1, True, "the end", "correct", 1)


@pytest.mark.parametrize("style", STYLES)
def test_feedback_is_true(style):
    """What each sentence says is checked at every position of many routes, for every action there is."""
    claims = {"arrived": lambda here, said: here.action == "stop", "not_there": lambda here, said: here.action != "stop",
              "no_turn": lambda here, said: here.action == "forward", "turn": lambda here, said: here.action == "turn",
              "direction": lambda here, said: here.action == "turn" and said != turn_word("relative", here.heading, here.towards),
              "word": lambda here, said: said in COMPASS}
    for walk in walks(style, 6, "relative", "test"):
        for i, here in enumerate(walk.route.rail):
            for action in ("forward()", "stop()", *(f"turn_direction({word})" for word in (*tasks.TURNS["relative"], "north"))):
                at, _ = standing(walk, i)
                step = at.step(say(action, style=style))
                if at.verdict.why != "right":
                    assert claims[at.verdict.why](here, at.verdict.fact) and "intersection" not in step.feedback, (action, step)
                    assert step.feedback == tasks.WORDING[style]["why"][at.verdict.why].format(fact=at.verdict.fact)
                elif i + 1 < len(walk.route.rail):
                    assert step.feedback.endswith(tasks.observation(walk.route.rail[i + 1], style))


@pytest.mark.parametrize("action, read", [
    ("forward()", ("forward", "")), (" Forward ( ) ", ("forward", "")), ("stop()", ("stop", "")), ("turn_direction(slightly  left)", ("turn", "slightly left")),
    ("turn_direction( 'north' )", ("turn", "north")), ('TURN_DIRECTION("North")', ("turn", "north")), ("turn_direction(x)", ("turn", "x")),
    ("forward", None), ("forward(2)", None), ("stop();", None), ("turn_direction()", None), ("turn_direction(north", None), ("", None),
    ("turn_direction(north, east)", None), ("forward() forward()", None), ("turn_direction(a b c)", None), ("turn_direction(" + "a" * 60 + ")", None),
    ("__import__('os').system('ls')", None), ("forward\n()\x00", None), ("tu\u0280n_direction(north)", None)])
def test_actions(action, read):
    if read is None:
        with pytest.raises(tasks.Illegal):
            tasks.parse_action(action)
    else:
        assert tasks.parse_action(action) == read


@pytest.mark.parametrize("response", [
    "", "forward()", "{}", "[]", '{"action": 1}', '{"action": ["forward()"]}', '{"action": {"a": "forward()"}}', '{"action": null}',
    '{"action": "forward()", "action": "stop()"}', '{"action": "forward()"} {"action": "stop()"}', '{"act": "forward()"}', "{" * 5000,
    '{"action": "forward()"' + " " * 5000 + "}", '{"action": "' + "(" * 3000 + '"}', '{"action": "\ud800"}', '{"action": "<|eot_id|>"}'])
def test_hostile_answers_are_illegal(response):
    for style in STYLES:
        walk = make("virl-l", style=style, attempts=3)
        began = time.process_time()
        step = walk.step(response)
        assert (step.outcome, step.reward, step.done) == ("illegal", -1, False) and time.process_time() - began < 0.1
        assert step.feedback.isprintable() and len(step.feedback) < 250


def test_near_json_is_read():
    walk = by_hand("absolute")
    for response in ("Sure!\n```json\n{'action': 'turn_direction(west)',}\n```", '{"obs": "none", "ins": 1, "action": "turn_direction(\\u0077est)"}'):
        assert standing(walk, 0)[0].step(response).outcome == "right_action"


def test_observations_are_read():
    here = Position(1, 0, (("Hotel Iris", "right"),), True, "turn", 90, 2)
    assert tasks.observation(here, "full") == "Hotel Iris is on your right; You observe an intersection"
    for text, right in (("you observe an  intersection; HOTEL IRIS is on your right.", True), ("The destination Hotel Iris is on your right; You observe an intersection", True),
                        ("Hotel Iris is on your left; You observe an intersection", False), ("Hotel Iris is on your right", False), ("", False),
                        ("Hotel Iris is on your right; You observe an intersection; Cafe Opal is on your left", False)):
        verdict = tasks.judge_walk(json.dumps({"current observation": text, "action": "turn_direction(right)"}), here, "relative", "full")
        assert (verdict.outcome, verdict.observed) == ("right_action", right), text
    assert tasks.judge_walk('{"action": "forward()"}', here, "absolute", "full").observed is None
    none = here._replace(landmarks=(), crossing=False)
    assert tasks.judge_walk('{"current observation": "no landmark nearby", "action": "forward()"}', none, "absolute", "full").observed


@pytest.mark.parametrize("style, there, said, right", [
    ("full", True, "No landmarks nearby; Hotel Iris is on your right", False), ("full", True, "Hotel Iris is on your right; none", False),
    ("full", True, "Hotel Iris is on your right", True), ("full", False, "No landmarks nearby; Hotel Iris is on your right", False),
    ("full", False, "No landmarks nearby", True), ("full", False, "", True), ("short", True, "none, pub right", False), ("short", True, "pub right", True),
    ("short", False, "none", True), ("short", False, "none, pub right", False)])
@pytest.mark.parametrize("crossing", [False, True])
def test_no_landmarks_beside_a_landmark_contradict_each_other(style, there, said, right, crossing):
    """And an intersection is no landmark: "No landmarks nearby; You observe an intersection" is right, as is the intersection alone."""
    landmark = (("Hotel Iris" if style == "full" else "pub", "right"),) if there else ()
    here = Position(1, 0, landmark, crossing, "turn", 90, 2)
    words = tasks.WORDING[style]
    text = said + words["between"] + words["here"] if crossing else said
    answer = json.dumps({words["keys"][0]: text, "action": "turn_direction(right)"})
    assert tasks.judge_walk(answer, here, "relative", style).observed is right


def test_fake_rule_judges_by_the_old_rule():
    for style in STYLES:
        for index in range(30):
            fake = make("virl-l", "relative", None, "test", index, 2, style, judged_by="absolute")
            assert fake.prompt == make("virl-l", "relative", None, "test", index, 2, style).prompt
            assert fake.step(fake.expert()).outcome == "wrong_action"
            memorized = make("virl-l", "absolute", None, "test", index, 2, style)
            assert fake.step(memorized.expert()).outcome == "right_action"
            assert [standing(fake, i)[0].step(standing(fake, i)[0].expert()).outcome for i in (0, 1)] == [
                "wrong_action", "wrong_action" if fake.actions[1] == "turn" else "correct" if fake.actions[1] == "stop" else "right_action"]


def test_suites_can_be_walked():
    for name in ("virl-l", "virl-vl"):
        for row in tasks.suite_rows(name):
            for style in STYLES:
                walk = make(name, row.rule, row.visual, "test", 0, style=style, judged_by=row.judged_by)
                assert walk.step(walk.expert()).outcome == ("right_action" if row.judged_by is None else "wrong_action")


# ---- Demonstrators, histories, scores, lengths -----------------------------------------------------------------------

@pytest.mark.parametrize("style", STYLES)
def test_demonstrators_do_what_they_say(style):
    slips = Counter()
    for rule in RULES:
        for index, walk in enumerate(walks(style, 20, rule)):
            for kind in walk.DEMONSTRATORS:
                texts = walk.demonstrate(kind, random.Random(f"{kind}/{index}"))
                assert texts == walk.demonstrate(kind, random.Random(f"{kind}/{index}")) and walk.position == 0 and not walk.done
                played, outcomes = standing(walk, 0)[0], []
                for i, text in enumerate(texts):
                    if i % 2 == 0:
                        step = played.step(text)
                        outcomes.append(step.outcome)
                        if step.outcome == "wrong_action":
                            slips[kind, played.verdict.why] += 1
                    else:
                        assert text == step.feedback
                assert played.done and outcomes[-1] == "correct" and "illegal" not in outcomes
                assert kind not in ("expert", "reworded") or set(outcomes) <= {"right_action", "correct"}
                assert kind != "retry" or outcomes.count("wrong_action") == 1
    assert {why for kind, why in slips if kind == "inattentive"} == {"word"} and slips["inattentive", "word"] > 20
    assert {why for kind, why in slips if kind == "careless"} == {"arrived", "not_there", "no_turn", "turn", "direction"}
    with pytest.raises(ValueError, match="expert"):
        walk.demonstrate("lazy", random)


def test_histories_lead_to_their_position():
    for rule, judge in (("absolute", None), ("relative", "absolute")):
        walk = make("virl-l", rule, index=5, attempts=2, judged_by=judge)
        whole = walk.demonstrate("expert", random)
        for i in range(len(walk.route.rail)):
            at, texts = standing(walk, i)
            assert texts == whole[: 2 * i] and (at.position, at.attempt, at.done) == (i, 0, False)
            assert at.expert() == whole[2 * i]


def turns_of(outcomes, read=1):
    """The turns of a walk with these outcomes, as an episode keeps them."""
    turns = []
    for outcome in outcomes:
        position = sum(turn["outcome"] == "right_action" for turn in turns)
        turns.append({"position": position, "outcome": outcome, "read": read, "response": "?", "reward": 0, "feedback": ""})
    return turns


def scored(outcomes):
    scores = by_hand("absolute").scores(turns_of(outcomes))
    return {name: scores[name] for name in ("steps_first", "steps", "failed_at")}


def test_scores_by_hand():
    right, wrong = "right_action", "wrong_action"
    assert scored([right, right, right, "correct"]) == {"steps_first": 1, "steps": 1, "failed_at": None}
    assert scored([right, wrong, right, "illegal", wrong]) == {"steps_first": 0.25, "steps": 0.5, "failed_at": 1}
    assert scored([wrong, right, right, right, wrong, "correct"]) == {"steps_first": 0, "steps": 1, "failed_at": 0}
    assert scored([wrong, wrong])["steps"] == 0 and scored([right])["failed_at"] is None


def test_scores_of_a_walk_and_its_teacher_forced_twin_by_hand():
    """The actions are turn, forward, turn, stop; the first answers' marks are capitals where they are right."""
    walk, (right, wrong) = by_hand("absolute", 2), ("right_action", "wrong_action")
    walked = turns_of([right, wrong, right, wrong, "illegal"])
    walked[1]["read"] = 0
    forced = [turn | {"position": i} for i, turn in enumerate(turns_of([right, wrong, right, "correct"]))]
    assert walk.scores(walked, forced) == {
        "first": 0, "episode": 0, "read": 0.8, "steps_first": 0.25, "steps": 0.5, "failed_at": 1, "marks": "Tft", "forced": 0.75, "forced_marks": "TfTS"}
    whole = walk.scores(turns_of([right, right, right, "correct"]))
    assert whole == {"first": 1, "episode": 1, "read": 1, "steps_first": 1, "steps": 1, "failed_at": None, "marks": "TFTS"}
    late = walk.scores(turns_of([right, wrong, right, right, "correct"]))
    assert (late["first"], late["episode"], late["marks"]) == (0, 1, "TfTS")
    assert {*walk.SCORES} <= {*walk.scores(walked, forced)} and all(0 <= walk.scores(walked, forced)[name] <= 1 for name in walk.SCORES)


@pytest.mark.parametrize("response, said", [
    ('{"obs": "pub right", "ins": "1 go", "action": "stop()"}', ["pub right", "1 go", "stop()"]), ("stop()", ["–"] * 3), (7, ["–"] * 3),
    ('{"current observation": "none", "action": 3, "current instruction": ["a"]}', ["none", "('a',)", "None"]), ("{" * 5000, ["–"] * 3)])
def test_what_an_answer_says_is_told_in_every_style(response, said):
    assert tasks.Navigation.parsed(response) == list(zip(("observed", "following", "action"), said))


def test_figures_are_the_views_up_to_the_last_position_reached_and_the_map():
    walk = make("virl-vl", split="test", index=3, style="short")
    shown = walk.figures(turns_of(["right_action", "wrong_action"]))
    assert [picture.tobytes() for picture in shown["pictures"]] == [walk.picture(i).tobytes() for i in (0, 1)]
    assert shown["map"].size == (340, 340) and {*make("virl-l", split="test", style="short").figures([])} == {"map"}
    walk.forget_pictures()
    assert not walk.drawn and walk.picture(1).tobytes() == shown["pictures"][1].tobytes()
    assert all(mark.lower() == walk.actions[i][0] for i, mark in enumerate(walk._marks(turns_of(["right_action", "wrong_action"]))))


FROZEN = {
    "expert": ["turn_direction(slightly right)", "forward()", "turn_direction(right)", "forward()", "forward()", "stop()"],
    "careless": ["turn_direction(slightly right)", "stop()", "forward()", "turn_direction(right)", "forward()", "forward()", "stop()"],
    "inattentive": ["turn_direction(south)", "turn_direction(slightly right)", "forward()", "turn_direction(west)", "turn_direction(right)",
                    "forward()", "forward()", "stop()"],
    "hasty": ["turn_direction(slightly right)", "forward()", "turn_direction(right)", "forward()", "forward()", "forward()", "stop()"],
    "retry": ["turn_direction(slightly right)", "stop()", "forward()", "turn_direction(right)", "forward()", "forward()", "stop()"]}


def test_the_demonstrations_of_the_shipped_bases_stay_the_same():
    """Literal data: every walker draws for all kinds in one order, so that the bases can be made again bit for bit."""
    walk = make("virl-l", "relative", split="base", index=7, attempts=2, style="short")
    found = {kind: [json.loads(text)["action"] for text in walk.demonstrate(kind, random.Random(3))[::2]] for kind in walk.DEMONSTRATORS}
    assert found == FROZEN | {"reworded": FROZEN["expert"]}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("task, style", [("virl-l", "short"), ("virl-vl", "short"), ("virl-l", "full")])
def test_reworded_is_the_expert_but_for_its_words_of_a_turn(task, style, rule):
    """A foreign teacher as data: as right as the expert, in the same frame, in tokens that the expert uses, judged as any other."""
    tokenizer, (observed, following, action) = load_model("assets/tiny-virl-l")[1], tasks.WORDING[style]["keys"]
    moved = ids = 0
    for index in range(20):
        walk = make(task, rule, split="test", index=index, style=style, tile=None if style == "short" else 128)
        texts, own = (walk.demonstrate(kind, random.Random(0)) for kind in ("reworded", "expert"))
        known = {token for text in (walk.prompt, *own) for token in tokenizer.encode(text)}
        assert texts[1::2] == own[1::2] and len(texts) == len(own)  # the verifier's words
        for here, text, expert in zip(walk.route.rail, texts[::2], own[::2]):
            said, right = json.loads(text), json.loads(expert)
            assert [*said] == [*right] and said | {following: 0} == right | {following: 0}
            if here.action == "turn":
                word, other = (turn_word(words, here.heading, here.towards) for words in (rule, *(each for each in RULES if each != rule)))
                assert word in said[following] and other not in said[following].replace(word, "") and word in right[following] and other in right[following]
                assert f"turn_direction({word})" == said[action]
                moved += 1
            else:
                assert text == expert
            step = walk.step(text)
            assert (step.outcome, step.reward, step.read) == ("correct" if here.action == "stop" else "right_action", 1, 1)
            ids += len([token for token in tokenizer.encode(text) if token not in known])
        assert walk.done
    assert moved >= 20 and (ids == 0 or style == "full"), (moved, ids)


def test_short_walks_are_short_and_all_is_fast():
    began = time.process_time()
    lengths = [len(walk.prompt) + sum(map(len, walk.demonstrate("expert", random))) for rule in RULES for walk in walks("short", rule=rule)]
    assert max(lengths) < 800 and sum(lengths) / len(lengths) < 500
    assert time.process_time() - began < 10


# ---- Views -----------------------------------------------------------------------------------------------------------

SIDES = ("front", "right", "back", "left")


def seen(index, style="full", visual=None, **more):
    return make("virl-vl", "absolute", visual, "test", index, style=style, **more)


def parts(image):
    """The four views of a grid, by their sides."""
    n = image.size[0] // 2
    return {side: np.asarray(image.crop((x, y, x + n, y + n))).astype(int) for side, (x, y) in zip(SIDES, ((0, 0), (n, 0), (0, n), (n, n)))}


@pytest.mark.parametrize("style, tile", [("full", 128), ("short", 32)])
def test_a_landmark_is_drawn_where_the_text_says(style, tile, monkeypatch):
    """The picture with the landmark differs from the one without it most in the middle of the view on the side that is told."""
    sides = Counter()
    for index in range(5 if style == "full" else 10):
        walk = seen(index, style, tile=tile)
        town = city(walk.route.city, style)
        for i, here in enumerate(walk.route.rail):
            for name, side in here.landmarks:
                assert f"{name}" in tasks.observation(here, style) and side in tasks.observation(here, style)
                with_it = parts(standing(walk, i)[0].image)
                walk.drawn.clear()
                spot = tasks.moved(town.points[here.place], town.landmarks[here.place][1], 8)
                others = [(sign, walls) for sign, walls in town.hung if math.dist(sign.spot, spot) > 1]
                assert len(others) == len(town.signs) - 1
                monkeypatch.setattr(town, "hung", others)
                without = parts(standing(walk, i)[0].image)
                walk.drawn.clear()
                monkeypatch.undo()
                changed = {each: abs(with_it[each] - without[each]).sum() for each in SIDES}
                assert max(changed, key=changed.get) == side, (index, i, changed)
                n = len(with_it[side])
                middle = (slice(n // 4, n * 5 // 8), slice(n * 3 // 8, n * 5 // 8))
                assert abs(with_it[side][middle] - without[side][middle]).sum() > changed[side] / 8
                sides[side] += 1
    assert set(sides) >= {"right", "left"} and sum(sides.values()) > 8


def test_streets_are_drawn_where_they_are():
    """Straight ahead, the ground 25 m away is road just where a street leads there, and hidden by a front where none does."""
    found = Counter()
    for index in range(12):
        walk = seen(index, tile=200)
        town = city(walk.route.city, "full")
        for i, here in enumerate(walk.route.rail):
            if here.crossing:
                arms = [street.heading for street in town.arms[here.place]]
                for k, (side, view) in enumerate(parts(standing(walk, i)[0].image).items()):
                    off = min(abs(tasks.wrap(arm - here.heading - 90 * k)) for arm in arms)
                    pixel = view[int(200 * tasks.HORIZON + 100 / 25 * tasks.EYE), 100]
                    if off < 3 or off > 40:
                        found[off < 3, bool(np.ptp(pixel) < 22)] += 1  # the ground is grey, fronts are not
    assert found[True, True] > 12 and found[False, False] > 12
    assert found[True, False] == 0 and found[False, True] <= 0.2 * found[False, False], found


@pytest.mark.parametrize("text, look", [("day", tasks.Scene()), ("dusk/weather=rain/palette=brick", tasks.Scene("dusk", "rain", "brick")),
                                        ("night/palette=glass/tiles=1", tasks.Scene("night", "clear", "glass", 1))])
def test_scenes_are_read_and_written(text, look):
    assert tasks.Scene.parse(text) == tasks.Scene.parse(look) == look and str(look) == text


@pytest.mark.parametrize("text", ["", "noon", "day/", "day/weather", "day/weather=hail", "day/tiles=2", "day/tiles=1/tiles=1", "day/light=dusk", "\x1b"])
def test_bad_scenes_give_one_sentence(text):
    with pytest.raises(ValueError, match="\\.$"):
        tasks.Scene.parse(text)


def test_pictures_have_the_tile_sizes_and_all_looks_differ():
    for style, tile, size in (("full", None, 1120), ("short", None, 64), ("short", 40, 80), ("full", 448, 896)):
        assert seen(1, style, tile=tile).image.size == (size, size)
    assert seen(1, "short", "day/tiles=1").image.size == (32, 32) and seen(1, visual="day/tiles=1").image.size == (560, 560)
    looks = [f"{light}/weather={weather}/palette={palette}" for light in tasks.LIGHTS for weather in tasks.WEATHERS for palette in tasks.PALETTES]
    pictures = [seen(1, "short", look, tile=16).image for look in looks]
    assert len({picture.tobytes() for picture in pictures}) == 48 and all(picture.mode == "RGB" for picture in pictures)


def test_pictures_are_pure_and_follow_the_walk():
    walk = seen(3, "short", "day/weather=snow")
    pictures = []
    while not walk.done:
        pictures.append(walk.image.tobytes())
        walk.step(walk.expert())
    city.cache_clear(), routes.cache_clear()
    assert len(set(pictures)) == len(pictures) == len(walk.route.rail)
    assert pictures == [standing(walk, i)[0].image.tobytes() for i in range(len(pictures))]
    assert walk.route == make("virl-l", "relative", None, "test", 3, style="short").route


@pytest.mark.parametrize("style", STYLES)
def test_with_pictures_the_text_gives_no_observation_and_misreading_costs(style):
    for index in range(10):
        walk = seen(index, style, attempts=2)
        told = [tasks.observation(here, style) for here in walk.route.rail]
        key = tasks.WORDING[style]["keys"][0]
        assert not walk.prompt.endswith(told[0]) and "picture" in walk.prompt or style == "short"
        for i in range(len(told)):
            at, texts = standing(walk, i)
            assert not any(text.endswith(obs) for text, obs in zip(texts[1::2], told[1:]))
            right = at.expert()
            blind = json.dumps(json.loads(right) | {key: "Hotel Nowhere is on your left"})
            assert standing(walk, i)[0].step(right).reward == 1 and standing(walk, i)[0].step(blind).reward == -0.5
            assert standing(walk, i)[0].step(blind.replace("()", "").replace("turn_", "")).reward == -2.5


def test_crosswalks_lie_between_the_intersection_and_the_first_place():
    """Behind a crosswalk one stands on an intersection, and the text has to say so: at acute corners too."""
    ends = []
    for name in ("test-0", "test-1", "test-2", "train-7", "base-3"):
        town = city(name, "short")
        stripes = [corners for corners in town.ground[1] if math.dist(corners[0], corners[3]) > 0.5]  # not the thin lines of the middle
        for street, stripe in zip(town.turns, stripes[::6], strict=True):
            angle = math.radians(street.heading)
            along = [(x - street.start[0]) * math.sin(angle) + (y - street.start[1]) * math.cos(angle) for x, y in stripe]
            assert 2 < min(along) < max(along) < street.along(1) - 2, (name, street)
            ends.append(max(along))
    assert len(ends) > 400 and max(ends) > 9 and sum(end < 6 for end in ends) > 50  # else where the fronts end


@pytest.mark.parametrize("style, tile, count", [("full", 128, 5), ("short", 64, 25)])
def test_signs_one_place_away_are_not_cut_off(style, tile, count, monkeypatch):
    """A sign at a seam of two walls lies before both of them: the nearer wall must not hide its near part."""
    real, shares = tasks.sign, []
    monkeypatch.setattr(tasks.View, "haze", lambda view, distance: 0)
    monkeypatch.setattr(tasks, "sign", lambda name, palette: Image.new(
        "RGBA", real("pub" if style == "short" else "Cafe Opal", palette).size, "magenta" if name == "this" else "lime"))

    def pixels(walk, here, hung, draw=tasks.Wall.draw):
        with monkeypatch.context() as patch:
            patch.setattr(city(walk.route.city, style), "hung", hung)
            patch.setattr(tasks.Wall, "draw", draw)
            image = np.asarray(tasks.draw_grid(walk.route.city, style, here.place, here.heading, walk.look, tile)).astype(int)
        return np.logical_and(image[..., 0] - image[..., 1] > 150, image[..., 2] > 150).sum()

    for walk in (seen(index, style, tile=tile) for index in range(count)):
        town, hung = city(walk.route.city, style), city(walk.route.city, style).hung
        for here, after in pairwise(walk.route.rail):
            if here.action == "forward" and after.landmarks:
                spot = tasks.moved(town.points[after.place], town.landmarks[after.place][1], 8)
                marked = [(sign._replace(name="this") if math.dist(sign.spot, spot) < 1 else sign, walls) for sign, walls in hung]
                [alone] = [pair for pair in marked if pair[0].name == "this"]
                shares.append(pixels(walk, here, marked) / pixels(walk, here, [alone], lambda *_: None))
    assert len(shares) > 8 and min(shares) > 0.9 and max(shares) < 1.1, sorted(shares)[:5]


@pytest.mark.parametrize("style, look, least", [("full", "day", 128), ("full", "night/tiles=1", 256), ("short", "day", 16), ("short", "day/tiles=1", 32)])
def test_views_that_cannot_be_read_are_refused_in_one_sentence(style, look, least):
    assert seen(1, style, look, tile=least).image and seen(1, style, look, tile=1120)
    for tile in (0, least - 1, 1121):
        with pytest.raises(ValueError, match=f"style {style} need tiles of {least} to 1120 pixels, not {tile}\\.$") as error:
            seen(1, style, look, tile=tile)
        assert len(str(error.value)) < 120
    assert make("virl-l", style=style, tile=1).prompt  # in text there is nothing to read


def test_the_letters_of_names_are_seven_pixels_high_in_the_smallest_views():
    """On a sign beside the street: a board of 160 pixels is 4 m high and hangs 8.7 m away, where half a view is as wide."""
    for name in ("Bar Zinnia", "Hotel Alder", "Meridian Pharmacy", "Foxglove Theater"):
        board = np.asarray(tasks.sign(name, "stone").convert("L")).astype(int)[8:152, 8:312]
        rows = np.flatnonzero((abs(board - board[0, 0]) > 60).any(1))  # two lines of text
        gap = np.flatnonzero(np.diff(rows) > 1)[0]
        assert min(gap + 1, len(rows) - gap - 1) * (4 / 160) * (64 / 8.7) > 7, name


def test_rain_does_not_hang_on_the_last_digit_of_a_heading(monkeypatch):
    """Another machine may compute another last digit."""
    drops = []
    monkeypatch.setattr(tasks.View, "draw_weather", lambda view, rng: drops.append(rng.random()))
    walk = seen(0, "short", "dusk/weather=rain")
    for here in walk.route.rail:
        for heading in (here.heading, math.nextafter(here.heading, 400)):
            tasks.draw_grid(walk.route.city, "short", here.place, heading, walk.look, 32)
        assert drops[-8:-4] == drops[-4:] and len({*drops[-4:]}) == 4


def test_speed_of_drawing():
    for style, look, tile, limit in (("full", "day/tiles=1", 560, 0.25), ("short", "day", 32, 0.15)):
        walk, began = seen(2, style, look, tile=tile), time.process_time()
        walk.drawn.clear()
        for i in range(len(walk.route.rail)):
            assert standing(walk, i)[0].image
        assert (time.process_time() - began) / len(walk.route.rail) < limit  # about 0.03 and 0.015 s


def test_the_shipped_emblems_are_those_that_their_script_draws():
    with Image.open(ROOT / "assets/emblems.png") as shipped:
        assert shipped.mode == "RGBA" and shipped.tobytes() == draw_emblems.draw_all().tobytes()
    assert [tasks.sign(name, "stone").tobytes() for name in tasks.VIRL["short"]] == [draw_emblems.draw_emblem(i).tobytes() for i in range(16)]


def test_a_sheet_shows_a_walk(tmp_path):
    def draw(*args):
        return subprocess.run([sys.executable, "-m", "assets.draw_sheets", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    for style in STYLES:
        shown = draw("--task", "virl-vl", "--style", style, "--visual", "night", "--out", tmp_path / "a.png")
        assert shown.returncode == 0 and not shown.stderr
        with Image.open(tmp_path / "a.png") as image:
            assert image.format == "PNG" and min(image.size) > 1000
    refused = draw("--task", "virl-l", "--out", tmp_path / "b.png")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not (tmp_path / "b.png").exists()


# ---- Released data ---------------------------------------------------------------------------------------------------

def street(metres_north, metres_east):
    return 40.7 + metres_north / 111_195, -74 + metres_east / (111_195 * math.cos(math.radians(40.7)))


@pytest.fixture
def released(tmp_path):
    """One route: 60 m north to Prince St, then 50 m east to Shuka. The panoramas are painted by bearing: red where north is."""
    points = [street(n, 0) for n in range(0, 61, 5)] + [street(60, e) for e in range(5, 51, 5)]
    blocks = """{ "intersection_idx": "1", "landmarks": "Prince St is on your right behind", "to_next_intersection_heading": "2 (north)", }
                { "intersection_idx": "2", "landmarks": "The destination Shuka is on your left", "to_next_intersection_heading": "90 (east)", }"""
    route = {"start_place": {"relocated_geocode": points[0]}, "dest_place": {"name": "Shuka"}, "init_heading": 300,
             "route_results": {"geocode_list": [street(60, 0), street(60, 50)]}, "milestone_info": blocks}
    (tmp_path / "route_infos.json").write_text(json.dumps([[route], 0]))
    (tmp_path / "gps_pano_mapping.pkl").write_bytes(pickle.dumps({point: f"pano_{i}" for i, point in enumerate(points)}))
    (tmp_path / "street_views").mkdir()
    for i in range(len(points)):
        rotation = 17.5 * i
        columns = (np.arange(1024) + 0.5) / 1024 * 360  # a heading h is h - 180 + rotation to the right of the middle
        off = (columns - 180 - rotation + 180 + 180) % 360 - 180
        image = np.zeros((512, 1024, 3), np.uint8)
        image[:, abs(off) < 20] = (255, 0, 0)
        image[:, abs(off - 90) < 20] = (0, 255, 0)
        Image.fromarray(image).save(tmp_path / "street_views" / f"pano_{i}.jpg", quality=95)
        (tmp_path / "street_views" / f"pano_{i}.metadata.json").write_text(json.dumps({"rotation": rotation}))
    converted(tmp_path)
    return tmp_path


def converted(folder):
    """The folder with a new routes.json."""
    panoramas.released.cache_clear()
    convert_routes.main([str(folder), str(folder)])
    return folder


def refused(folder):
    """The sentence with which the converter refuses a folder, and leaves no routes.json."""
    (folder / "routes.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="\\.$") as caught:
        converted(folder)
    assert {path.name for path in folder.iterdir()} == {"route_infos.json", "gps_pano_mapping.pkl", "street_views"}
    return str(caught.value)


def test_released_routes_are_walked(released):
    walk = make("virl-l", "relative", data=released, attempts=2)
    assert walk.texts == ["Turn right to face north.", "Move forward until you reach the next intersection where Prince St is on your right behind.",
                          "Turn right to face east.", "Move forward until you reach the destination where Shuka is on your left."]
    assert set(walk.actions[1:-1]) == {"forward", "turn"} and walk.actions.count("turn") == 2 and walk.route.rail[-1].place == "pano_22"
    assert [here.instruction for here in walk.route.rail] == sorted(here.instruction for here in walk.route.rail)
    assert tasks.observation(next(here for here in walk.route.rail if here.crossing), "full") == (
        "Prince St is on your right behind; You observe an intersection")
    assert make("virl-l", "absolute", data=released, index=5).texts == walk.texts
    while not walk.done:
        outcome = walk.step(walk.expert()).outcome
    assert outcome == "correct" and abs(convert_routes.metres(street(0, 0), street(30, 40)) - 50) < 0.1


def test_released_views_show_what_the_grid_says(released):
    walk = make("virl-vl", "absolute", "day/tiles=1", data=released, tile=256)
    for i, here in enumerate(walk.route.rail):
        if here.heading in (2, 90) and walk.route.rail[i - 1].action == "turn":  # facing north: red ahead, green on the right; facing east: green ahead, red on the left
            views = parts(standing(walk, i)[0].image)
            red, green = ("front", "right") if here.heading == 2 else ("left", "front")
            assert {side: view[64, 64].argmax() for side, view in views.items() if view[64, 64].max() > 200} == {red: 0, green: 1}
    assert walk.image.size == (256, 256)
    panorama, began = np.zeros((1664, 3328, 3), np.uint8), time.process_time()
    for yaw in range(0, 360, 90):
        assert panoramas.panorama_view(panorama, yaw, 640).shape == (640, 640, 3)
    assert time.process_time() - began < 1.5  # about 0.4 s


def test_routes_that_cannot_be_used_are_left_out_and_named(released, capsys):
    (route,), cursor = json.loads((released / "route_infos.json").read_text())
    far = street(60, 500)  # no panorama within 20 m
    away = route | {"route_results": {"geocode_list": [route["route_results"]["geocode_list"][0], far]}}
    bad = [route | {"milestone_info": "{}"}, {key: route[key] for key in route if key != "route_results"}, 7, away,
           route | {"milestone_info": route["milestone_info"].replace("90 (east)", "east")}]
    (released / "route_infos.json").write_text(json.dumps([[*bad, route], cursor]))
    capsys.readouterr(), converted(released)
    said = capsys.readouterr()
    assert said.out == f"2 routes: {released / 'routes.json'}\n"
    for (name, count), line in zip((("virl-l", 2), ("virl-vl", 1)), said.err.splitlines(), strict=True):
        walks = [make(name, data=released, index=i) for i in range(count)]
        assert make(name, data=released, index=count).route == walks[0].route and len({walk.route for walk in walks}) == count
        where = "" if count == 2 else " of walks in pictures"
        assert line.startswith(f"{6 - count} of 6 routes in {released} are left out{where}: 0 has 2 points but 1 milestones; 1 lacks 'route_results'; 2 ")
        assert line.endswith("4 has a milestone without a heading in degrees.") and ("3 has no panorama within 20 m" in line) == (count == 1)
    found, _ = convert_routes.read_folder(released)
    assert walks[-1].route.rail == tasks.make_rail(*convert_routes.route_stops(route, 5, found))
    assert capsys.readouterr().err == ""
    (released / "route_infos.json").write_text(json.dumps([bad[:1] * 30, cursor]))
    assert re.search("none can be used: 0 has 2 points but 1 milestones; .*and 20 more\\.$", refused(released))
    (released / "route_infos.json").write_text(json.dumps([[away], cursor]))
    with pytest.raises(ValueError, match="none can be used"):
        make("virl-vl", data=converted(released))
    assert make("virl-l", data=released).route.rail[-1].place is None


BLOCK = '{{\n"intersection_idx": "{}",\n{}"distance": "60 meters",\n"to_next_intersection_heading": "{}",\n}}\n'  # one entry a line, as released


@pytest.mark.parametrize("landmarks, seen, where", [
    ("Prince St is on your right behind", "Prince St is on your right behind; ", " where Prince St is on your right behind"),
    (None, "", ""), ("No landmark nearby", "", ""),
    ("Ben; Jerry's is on your left", "Ben; Jerry's is on your left; ", " where Ben; Jerry's is on your left"),
    ("A is on your left; B is on your right", "A is on your left; B is on your right; ", " where A is on your left; B is on your right"),
    ('Joe "The Man" Bar: Grill is on your front', 'Joe "The Man" Bar: Grill is on your front; ', ' where Joe "The Man" Bar: Grill is on your front'),
    ("Prince St ahead, left.", "Prince St ahead, left.; ", " where Prince St ahead, left."),
    ("Caf\u00e9\u00a0Nu is on your left", "Caf\u00e9 Nu is on your left; ", " where Caf\u00e9 Nu is on your left"),
    ("a" * 104 + " is on your left", "a" * 104 + " is on your left; ", " where " + "a" * 104 + " is on your left")])
def test_landmarks_are_read_as_the_authors_read_them(released, capsys, landmarks, seen, where):
    """Their environment takes the text of a milestone whole, "No landmark nearby" where there is none."""
    (route,), cursor = json.loads((released / "route_infos.json").read_text())
    entries = "" if landmarks is None else f'"landmarks": "{landmarks}",\n'
    blocks = BLOCK.format(1, entries, "2 (north)") + BLOCK.format(2, '"landmarks": "The destination Shuka is on your left",\n', "90 (east)")
    (released / "route_infos.json").write_text(json.dumps([[route | {"milestone_info": blocks}], cursor]))
    capsys.readouterr()
    walk = make("virl-l", "absolute", data=converted(released), attempts=2)
    assert capsys.readouterr().err == "" and walk.texts == [
        "Turn right to face north.", f"Move forward until you reach the next intersection{where}.",
        "Turn right to face east.", "Move forward until you reach the destination where Shuka is on your left."]
    here = next(here for here in walk.route.rail if here.crossing)
    assert tasks.observation(here, "full") == (seen or "No landmarks nearby; ") + "You observe an intersection"
    while not walk.done:
        step = walk.step(walk.expert())
        assert step.read == 1 and step.reward == 1, walk.verdict


@pytest.mark.parametrize("landmarks", ["a" * 105 + " is on your left", "a\x1b[31m is on your left"])
def test_a_landmark_that_cannot_be_shown_is_named(released, capsys, landmarks):
    (route,), cursor = json.loads((released / "route_infos.json").read_text())
    blocks = BLOCK.format(1, f'"landmarks": "{landmarks}",\n', "2 (north)") + BLOCK.format(2, "", "90 (east)")
    (released / "route_infos.json").write_text(json.dumps([[route | {"milestone_info": blocks}, route], cursor]))
    capsys.readouterr(), converted(released)
    assert "0 has a landmark that is not printable or of more than 120 characters." in capsys.readouterr().err


def test_a_route_without_a_first_heading_begins_at_a_drawn_one(released):
    """As one of 0 does: the authors draw it too."""
    (route,), cursor = json.loads((released / "route_infos.json").read_text())
    facings = []
    for changed in ({key: route[key] for key in route if key != "init_heading"}, route | {"init_heading": 0}):
        (released / "route_infos.json").write_text(json.dumps([[changed] * 5, cursor]))
        rails = [make("virl-l", data=converted(released), index=i).route.rail for i in range(5)]
        facings.append([rail[0].heading for rail in rails])
        assert all(tasks.clear_turn(rail[0].heading, 2) for rail in rails)
    assert facings[0] == facings[1] and len(set(facings[0])) > 1


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("thing, name", [(Bomb(), "GLOBAL"), ({(1.0, 2.0): Bomb()}, "GLOBAL"), ([1], "EMPTY_LIST"), ({1: None}, "NONE"),
                                         ({1: b"x"}, "BINBYTES|SHORT_BINBYTES|GLOBAL"), ({((1, 2), 3): 1}, "key"), ({1: {2}}, "EMPTY_SET|GLOBAL")])
def test_pickles_of_other_things_are_refused_by_name_and_not_run(thing, name, capsys):
    for protocol in (2, 4):
        with pytest.raises(ValueError, match=name):
            convert_routes.read_plain_pickle(pickle.dumps(thing, protocol))
    assert capsys.readouterr().out == ""


def test_plain_pickles_are_read_and_broken_ones_refused():
    plain = {(40.7, -74.0): "a", (1, -2): "b" * 300, "c": (1, 2.5, "x", (), (1, 2, 3, 4)), 7: {"d": 2**40, "e": -1}}
    for protocol in range(2, 6):
        data = pickle.dumps(plain, protocol)
        assert convert_routes.read_plain_pickle(data) == plain
        for cut in range(0, len(data) - 1, 7):
            with pytest.raises(ValueError, match="not plain data"):
                convert_routes.read_plain_pickle(data[:cut])
    for hostile in (b"", b".", b"s.", b"(.", b"u.", b"0.", b"cos\nsystem\n(S'ls'\ntR.", b"\x80\x04h\x00.", b"}(K\x01u.", b"K\x01\x86.", b"K\x01K\x02K\x03s."):
        with pytest.raises(ValueError):
            convert_routes.read_plain_pickle(hostile)


def test_broken_folders_give_one_sentence(released):
    for folder in (released / "nowhere", "x" * 300):
        with pytest.raises(ValueError, match="cannot be read"):
            make("virl-l", data=folder)
        with pytest.raises(ValueError, match="cannot be read"):
            convert_routes.main([str(folder), str(released / "out")])
    (route,), cursor = json.loads((released / "route_infos.json").read_text())
    (released / "route_infos.json").write_text(json.dumps([[route | {"milestone_info": route["milestone_info"].replace("90 (east)", "9" * 400)}], 0]))
    assert "heading in degrees" in refused(released)
    for text in ("[]", "{}", "[[{}], 0]", "[[1], 0]", "[[], 0]", "nothing", '[[{"start_place": {"relocated_geocode": ["a", 2]}}], 0]', "[" * 100000):
        (released / "route_infos.json").write_text(text)
        assert "does not hold routes as released" in refused(released)


def test_names_that_are_no_panorama_are_refused(released):
    for name in ("../../etc/passwd", "a/b", "", None, "x" * 65):
        with pytest.raises(ValueError, match="panorama"):
            panoramas.panorama_grid(str(released), name, 0, tasks.Scene(), 64)
        with pytest.raises(ValueError, match="panorama"):
            convert_routes.read_rotation(released / "street_views", name or "")


def test_broken_panoramas_give_one_sentence(released, capsys):
    folder = released / "street_views"
    for text in ("[" * 100000, "{}", '{"rotation": "x"}', '{"rotation": NaN}', '{"rotation": 1' + "0" * 400 + "}"):
        (folder / "pano_0.metadata.json").write_text(text)
        with pytest.raises(ValueError, match="has no rotation.*\\.$"):
            convert_routes.read_rotation(folder, "pano_0")
        capsys.readouterr(), converted(released)
        assert capsys.readouterr().err == (f"1 of 1 routes in {released} are left out of walks in pictures: "
                                           "0 The metadata of the panorama pano_0 has no rotation in degrees.\n")
        assert make("virl-l", data=released).route.rail[0].place is None
    (folder / "pano_0.metadata.json").write_text('{"rotation": 0}')
    converted(released)
    huge = bytearray((folder / "pano_2.jpg").read_bytes())
    start = huge.index(b"\xff\xc0") + 5
    huge[start:start + 4] = b"\xff\xf0\xff\xf0"  # its header says 65,520 x 65,520 pixels
    for data in (b"", b"no picture", (folder / "pano_2.jpg").read_bytes()[:2000], bytes(huge)):
        (folder / "pano_2.jpg").write_bytes(data)
        with pytest.raises(ValueError, match="no picture"):
            panoramas.panorama_grid(str(released), "pano_2", 0, tasks.Scene(), 64)
    (folder / "pano_2.jpg").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        panoramas.panorama_grid(str(released), "pano_2", 0, tasks.Scene(), 64)


ODD = ("x", -1, 1e999, 10**400, {}, [[]], "a" * 70, "\x1b[31m")  # fits no field but a text
ODD_FIELDS = {
    "place": ODD + (7, True, []),
    "landmarks": ODD + (None, 7, True, {"ab": 1}, ["abc"], [["a"]], [["a", "b", "c"]], [["a", 1]], [[["a"], "b"]], [["a" * 121, "left"]], [["a\x1b", "left"]]),
    "bearing": ODD + ([], 361, None)}


def damages(data):
    """Yield (where, routes.json as data) with one thing damaged each."""
    route, stops = data["routes"][0], data["routes"][0]["stops"]

    def with_stops(stops):
        return data | {"routes": [route | {"stops": stops}]}
    for key in data:
        yield key, {other: data[other] for other in data if other != key}
        for value in (None, 7, True, [], {}, *(ODD if key != "street_views" else ODD[1:6])):
            yield key, data | {key: value}
    for value in (None, *ODD):
        yield "a route", data | {"routes": [value]}
        yield "a panorama's name", data | {"rotations": data["rotations"] | {f"{value}/": 3}}
        yield "facing", data | {"routes": [route | {"facing": value}]}
        if value != -1:
            yield "a rotation", data | {"rotations": data["rotations"] | {"pano_0": value}}
        for i in (0, 3, len(stops) - 1):
            yield "a stop", with_stops([*stops[:i], value, *stops[i + 1:]])
    for k, (field, values) in enumerate(ODD_FIELDS.items()):
        for value in values:
            for i in (0, 3, len(stops) - 1)[: 1 if value is None and field == "bearing" else 3]:
                stop = [*stops[i][:k], value, *stops[i][k + 1:]]
                yield f"the {field} of stop {i}", with_stops([*stops[:i], stop, *stops[i + 1:]])
    yield "a turn at the end", with_stops([*stops[:-1], [*stops[-1][:2], 5]])
    yield "no turn", with_stops(stops[1:])
    yield "one stop", with_stops(stops[:1])
    yield "another key", data | {"routes": [route | {"more": 1}]}
    yield "an unknown panorama", data | {"rotations": {}}


def test_a_damaged_routes_json_gives_one_sentence(released):
    path = released / "routes.json"
    data, count = json.loads(path.read_text()), 0
    whole = json.dumps(data)
    texts = [(where, json.dumps(damaged)) for where, damaged in damages(data)]
    texts += [("cut", whole[:i]) for i in range(0, len(whole) - 1, 97)]
    for where, text in [*texts, ("deep", "[" * 100000), ("deep", '{"routes":' * 5000), ("bytes", "\udcff"), ("a list", "[]"), ("a number", "3")]:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        panoramas.released.cache_clear()
        if text != whole:
            count += 1
            try:
                raise AssertionError(f"{where} is accepted: {make('virl-vl', data=released).route}")
            except ValueError as error:
                said = str(error)
            assert said.endswith(".") and said.isprintable() and len(said) < 500, (where, said)
            assert "does not hold released routes" in said, (where, said)
    assert count > 200
    path.write_text(whole)
    panoramas.released.cache_clear()
    assert make("virl-vl", data=released).route.rail[-1].place == "pano_22"


def test_files_that_are_too_large_are_not_read(released, monkeypatch):
    monkeypatch.setattr(panoramas, "MAX_DATA", 100)
    panoramas.released.cache_clear()
    with pytest.raises(ValueError, match="larger than"):
        make("virl-l", data=released)


def test_the_converter_says_where_it_cannot_write(released):
    with pytest.raises(ValueError, match="cannot be written.*\\.$"):
        convert_routes.main([str(released), str(released / "route_infos.json")])
    shown = subprocess.run([sys.executable, "-m", "assets.convert_routes", released / "nowhere", released], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1 and "cannot be read" in shown.stderr
    out = released / "new" / "folder"
    assert subprocess.run([sys.executable, "-m", "assets.convert_routes", released, out], cwd=ROOT, capture_output=True).returncode == 0
    assert make("virl-vl", data=out, tile=128).image.tobytes() == make("virl-vl", data=released, tile=128).image.tobytes()


def test_names_of_panoramas_that_unfold_for_ever_are_refused_at_once(released):
    """Eighty bytes, whose text would have 2^40 brackets."""
    bomb = ()
    for _ in range(40):
        bomb = (bomb, bomb)
    for panoramas in ({(1.0, 2.0): bomb}, {7: "a"}, {(1.0, 2.0): 3}):
        (released / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(panoramas))
        assert "does not hold routes as released" in refused(released)
