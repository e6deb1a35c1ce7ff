"""Demonstrators with bad habits, for the base stage (assets/make_base.py): a base that only ever saw experts has nothing to unlearn.

Each is a function (problem, random.Random) -> [response, feedback, response, ...]. Importing this file adds them to the tasks'
DEMONSTRATORS, behind "expert" and "careful", which tasks.py has itself:

    import assets.habits
    tasks.make("gp-l").demonstrate("careless", random.Random(0))

A demonstrator draws from `rng` what it needs itself and nothing else, so that adding or reordering them changes no data.
"""
import random
from dataclasses import replace

from tasks import ID_RULE, OOD_RULE, Formula, GeneralPoints, judge, join_formulas, parse_rule

# ---- 1. Cards ----------------------------------------------------------------------------------------


def careless(problem: GeneralPoints, rng: random.Random) -> list[str]:
    """The right numbers in a formula of another value: random operations until the value is not the target.

    It ends, since there always is another value: turn a + into a -."""
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
    """Where the first card is above 7, no list of numbers and just their sum; else the expert's answer."""
    rank, _ = problem.hand[0]
    return [problem.sum_response() if rank > 7 else problem.expert()]


def inattentive(problem: GeneralPoints, rng: random.Random) -> list[str]:
    """Face cards taken by ID_RULE or by OOD_RULE, whatever the prompt says; the expert's answer where that has no solution."""
    assumed = parse_rule(rng.choice((ID_RULE, OOD_RULE)))
    rule = replace(problem.rule, faces=assumed.faces)
    formula = problem.solution(rule)
    return [problem.response(rule, formula) if formula else problem.expert()]


def retry(problem: GeneralPoints, rng: random.Random) -> list[str]:
    """The plain sum and, unless that is right, the verifier's text and the expert's answer."""
    slip = problem.sum_response()
    verdict = judge(slip, problem.hand, problem.rule)
    return [slip] if verdict.outcome == "correct" else [slip, problem.feedback(verdict), problem.expert()]


GeneralPoints.DEMONSTRATORS |= {"careless": careless, "lazy": lazy, "inattentive": inattentive, "retry": retry}


# ---- 2. Walks ----------------------------------------------------------------------------------------
