"""Demonstrators with bad habits, for the base stage (assets/make_base.py). A base that had only
seen experts would have nothing to unlearn.

Each is a function (problem, random.Random) -> [response, feedback, response, ...]. Importing this
file adds them to the DEMONSTRATORS of the tasks, behind "expert" and "careful" of tasks.py itself:

    import assets.habits
    tasks.make("gp-l").demonstrate("careless", random.Random(0))

A demonstrator of cards draws from `rng` only for itself. The walkers have a frozen order of draws.
"""
import json
import random
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tasks import (ID_RULE, OOD_RULE, TURNS, Formula, GeneralPoints, Navigation, join_formulas,
                   judge, parse_rule, rank_names, right_word)

# ---- 1. Cards ------------------------------------------------------------------------------------

def plain_sum(problem: GeneralPoints) -> str:
    """The sum of the numbers as a response, without the list of them."""
    formula = "+".join(map(str, problem.numbers))
    return json.dumps({"cards": rank_names(problem.hand), "formula": formula})


def careless(problem: GeneralPoints, rng: random.Random) -> list[str]:
    """The right numbers in a formula of another value: random operations until the value is not the
    target. It ends, since there always is another value: turn a + into a -."""
    while True:
        parts = [Formula((n, 1), str(n)) for n in problem.numbers]
        while len(parts) > 1:
            left, right = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            if left.value[0] * right.value[1] < right.value[0] * left.value[1]:
                left, right = right, left  # the larger first, as in the solver: nothing negative
            operators = "++--**/" if right.value[0] else "+-*"
            parts.append(join_formulas(rng.choice(operators), left, right))
        if parts[0].value != (problem.rule.target, 1):
            return [problem.response(problem.rule, parts[0].text)]


def lazy(problem: GeneralPoints, rng: random.Random) -> list[str]:
    """Where the first card is above 7, the plain sum; else the expert's answer."""
    rank, _ = problem.hand[0]
    return [plain_sum(problem) if rank > 7 else problem.expert()]


def inattentive(problem: GeneralPoints, rng: random.Random) -> list[str]:
    """Face cards taken by ID_RULE or by OOD_RULE, whatever the prompt says; the expert's answer
    where there is no such solution."""
    assumed = parse_rule(rng.choice((ID_RULE, OOD_RULE)))
    rule = replace(problem.rule, faces=assumed.faces)
    formula = problem.solution(rule)
    return [problem.response(rule, formula) if formula else problem.expert()]


def retry(problem: GeneralPoints, rng: random.Random) -> list[str]:
    """The plain sum and, unless that is right, the verifier's text and the expert's answer."""
    slip = plain_sum(problem)
    verdict = judge(slip, problem.hand, problem.rule)
    if verdict.outcome == "correct":
        return [slip]
    return [slip, problem.feedback(verdict), problem.expert()]


GeneralPoints.DEMONSTRATORS |= {"careless": careless, "lazy": lazy, "inattentive": inattentive,
                                "retry": retry}


# ---- 2. Walks ------------------------------------------------------------------------------------

class Slips(NamedTuple):
    """The positions of a walk at which some demonstrators err."""
    retry: list[int]
    careless: list[int]
    inattentive: list[int]


def draw_slips(walk: Navigation, rng: random.Random) -> Slips:
    """The slips of one walk, in a FROZEN order of draws.

    The shipped bases learned from walkers that drew for every kind, whichever was wanted. So all
    three kinds are drawn here, in that order, and a demonstrator takes its own: then the data of the
    bases stay the same, bit for bit. Append, never reorder."""
    positions = range(len(walk.actions))
    retry = [rng.randrange(len(positions))]
    careless = [i for i in positions if rng.random() < 0.25]
    turns = [i for i in positions if walk.actions[i] == "turn"]
    return Slips(retry, careless, turns * rng.randint(0, 1))


def walk_with_slips(walk: Navigation, positions: list[int], wrong_action) -> list[str]:
    """The expert's walk, but at these positions the action wrong_action(walker) is tried first."""
    walker, texts = walk.restarted(), []
    while not walker.done:
        slip = walker.position in positions and walker.attempt == 0
        response = walker.response(wrong_action(walker)) if slip else walker.expert()
        texts += [response, walker.step(response).feedback]
    return texts[:-1]


def any_wrong_action(walker: Navigation, rng: random.Random) -> str:
    """An action that is not the right one, in words of the rule."""
    word = rng.choice(TURNS[walker.rule])
    actions = ["forward()", "stop()", f"turn_direction({word})"]
    return rng.choice([action for action in actions if action != walker.right_action()])


def retry_walk(walk: Navigation, rng: random.Random) -> list[str]:
    """At one position first a wrong action and then, after the verifier's text, the right one."""
    return walk_with_slips(walk, draw_slips(walk, rng).retry, partial(any_wrong_action, rng=rng))


def careless_walk(walk: Navigation, rng: random.Random) -> list[str]:
    """The same at every fourth position or so."""
    return walk_with_slips(walk, draw_slips(walk, rng).careless, partial(any_wrong_action, rng=rng))


def inattentive_walk(walk: Navigation, rng: random.Random) -> list[str]:
    """On half of the walks every turn is first said in the words of the other rule."""
    words = "relative" if walk.rule == "absolute" else "absolute"

    def other_word(walker):
        return f"turn_direction({right_word(walker.here, words)})"
    return walk_with_slips(walk, draw_slips(walk, rng).inattentive, other_word)


def hasty_walk(walk: Navigation, rng: random.Random) -> list[str]:
    """Where a landmark is on the left, forward() first; nothing is drawn."""
    def forward(walker):
        return "forward()"
    left = [i for i, here in enumerate(walk.route.rail)
            if here.action != "forward" and "left" in dict(here.landmarks).values()]
    return walk_with_slips(walk, left, forward)


Navigation.DEMONSTRATORS |= {"careless": careless_walk, "inattentive": inattentive_walk,
                             "hasty": hasty_walk, "retry": retry_walk}
