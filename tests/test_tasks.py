"""Tests of tasks.py: the solver against an independent brute force, the deals, the verifier against hostile answers, the command line."""
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, combinations_with_replacement, permutations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tasks  # noqa: E402
from tasks import ID_RULE, OOD_RULE, Rule, judge, make, parse_rule, solutions, solve, values  # noqa: E402

ALL_HANDS = [tuple((rank, "S") for rank in ranks) for ranks in combinations_with_replacement(range(1, 14), 4)]
K72A = ((13, "S"), (7, "H"), (2, "D"), (1, "C"))  # for prompts: 13 7 2 1 has no solution
K53A = ((13, "S"), (5, "H"), (3, "D"), (1, "C"))  # for answers
OOD = parse_rule(OOD_RULE)


def answer(formula, **fields):
    return json.dumps({"cards": ["K", "5", "3", "A"], "number": [13, 5, 3, 1], "formula": formula} | fields)


# ---- Solver ----------------------------------------------------------------------------------------------------------

def ops(x, y):
    return [x + y, x - y, x * y] + ([x / y] if y else [])


@lru_cache(maxsize=None)
def in_order(*numbers):
    """All values of the numbers in this order under every bracketing (negative partial results included): Fractions."""
    if len(numbers) == 1:
        return frozenset({Fraction(numbers[0])})
    return frozenset(value for cut in range(1, len(numbers)) for x in in_order(*numbers[:cut]) for y in in_order(*numbers[cut:])
                     for value in ops(x, y))


def top_operations(a, b, c, d):
    """The five bracketings of four numbers, by their last operation: ((ab)c)d and (a(bc))d, (ab)(cd), a((bc)d) and a(b(cd))."""
    yield in_order(a, b, c), in_order(d)
    yield in_order(a, b), in_order(c, d)
    yield in_order(a), in_order(b, c, d)


def brute_force_solvable(numbers, target):
    """All permutations, operators and bracketings. The last operation is turned round (x op y = target for y), to save time."""
    for order in set(permutations(numbers)):
        for lefts, rights in top_operations(*order):
            for x in lefts:
                wanted = [target - x, x - target] + ([target / x] if x else []) + [x / target]
                if any(y in rights for y in wanted[:-1]) or wanted[-1] in rights and wanted[-1]:
                    return True
    return False


@pytest.fixture(scope="module")
def brute():
    """Solvable or not by brute force, for all number multisets of both rules (those of J=Q=K=10 are among the 1,820 others)."""
    return {numbers: brute_force_solvable(numbers, Fraction(24)) for numbers in combinations_with_replacement(range(1, 14), 4)}


def test_solver_agrees_with_brute_force_on_all_hands_and_both_rules(brute):
    assert len(ALL_HANDS) == 1820
    for rule in map(parse_rule, (ID_RULE, OOD_RULE)):
        for hand in ALL_HANDS:
            numbers = values(hand, rule)
            assert (solve(numbers, 24) is not None) == brute[tuple(sorted(numbers))] == bool(solutions(numbers, 24)), numbers
    id_numbers = {tuple(sorted(values(hand, Rule()))) for hand in ALL_HANDS}
    assert (len(id_numbers), sum(brute[numbers] for numbers in id_numbers)) == (715, 566)


def test_every_solution_of_every_hand_is_judged_correct_and_is_in_the_notation():
    for hand in ALL_HANDS[::7]:
        for formula in solutions(values(hand, OOD), 24):
            assert judge(answer(formula), hand, OOD).outcome == "correct", formula
            assert re.fullmatch(r"[0-9+*/()-]+", formula) and not re.search(r"\(-|^-|\(\d+\)", formula), formula


def trees(parts):
    """Independent enumeration: (value, normal form) of all formulas without negative partial results."""
    if len(parts) == 1:
        return {parts[0]}
    found = set()
    for i, j in combinations(range(len(parts)), 2):
        rest = [part for k, part in enumerate(parts) if k not in (i, j)]
        for (x, p), (y, q) in ((parts[i], parts[j]), (parts[j], parts[i])):
            made = [(x + y, flat("sum", p, q, 1)), (x * y, flat("product", p, q, 1))]
            made += [(x - y, flat("sum", p, q, -1))] if x >= y else []
            made += [(x / y, flat("product", p, q, -1))] if y else []
            for part in made:
                found |= trees(rest + [part])
    return found


def flat(kind, p, q, sign):
    left = p[1] if p[0] == kind else ((1, p),)
    right = q[1] if q[0] == kind else ((1, q),)
    return kind, tuple(sorted(left + tuple((s * sign, part) for s, part in right), key=repr))


def test_solutions_are_all_there_and_distinct():
    rng = random.Random(3)
    for hand in rng.sample(ALL_HANDS, 12):
        numbers = values(hand, OOD)
        expected = {form for value, form in trees([(Fraction(n), ("number", n)) for n in numbers]) if value == 24}
        assert len(solutions(numbers, 24)) == len(set(solutions(numbers, 24))) == len(expected), numbers


def test_notation_and_order_of_solutions():
    assert solutions((8, 3, 3, 8), 24) == ("8/(3-8/3)",)
    assert solutions([6, 1, 1, 3], 24) == solutions((1, 1, 3, 6), 24)
    found = solutions((2, 3, 4, 1), 24)
    assert found[:2] == ("4*3*2*1", "4*3*2/1") and set(found[2:]) == {"(3+2+1)*4", "(4+2)*(3+1)"}
    assert solutions((1, 1, 1, 1), 24) == () and solve((1, 1, 1, 1), 24) is None
    with pytest.raises(ValueError):
        solutions((1, 2, 3, 4, 5), 24)


def merged(numbers):
    """All values of the numbers, negative ones included, by subsets in Fractions."""
    table = {}
    for size in range(1, len(numbers) + 1):
        for subset in combinations(range(len(numbers)), size):
            found = {Fraction(numbers[subset[0]])} if size == 1 else set()
            for part in range(1, size):
                for left in combinations(subset, part):
                    right = tuple(i for i in subset if i not in left)
                    found |= {value for x in table[left] for y in table[right] for value in ops(x, y)}
            table[subset] = found
    return table[subset]


@pytest.mark.parametrize("numbers", [(3, 7), (2, 5, 11), (1, 5, 5, 5), (1, 1, 1, 3), (1, 1, 5, 5, 9)])
def test_solver_agrees_on_every_target(numbers):
    reached = merged(numbers)
    for target in range(1, 200):
        formula = solve(numbers, target)
        assert (formula is not None) == (target in reached), (numbers, target)
        if formula:
            value, used = tasks.read_formula(formula, target)
            assert value == (target, 1) and sorted(used) == sorted(numbers)


def test_zero_times_anything_is_found():
    assert solve((97, 2, 2, 89), 97) == solve((97, 89, 2, 2), 97) and solve((97, 2, 2, 89), 97) is not None
    assert solve((97, 89, 83, 2, 2), 97) is not None


def test_six_cards_are_solved_in_time():
    rng, seconds = random.Random(5), []
    for target in (24, 36, 997):
        for _ in range(5):
            numbers = values(rng.sample(tasks.DECK, 6), OOD)
            tasks._reachable.cache_clear()
            start = time.perf_counter()
            formula = solve(numbers, target)
            seconds.append(time.perf_counter() - start)
            if formula:
                value, used = tasks.read_formula(formula, target)
                assert value == (target, 1) and sorted(used) == sorted(numbers)
    assert solve((1,) * 6, 991) is None
    assert max(seconds) < 1


# ---- Rules -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, faces, target, cards", [
    ("10", (10, 10, 10), 24, 4), ("11,12,13", (11, 12, 13), 24, 4), ("7", (7, 7, 7), 24, 4),
    ("5/target=36", (5, 5, 5), 36, 4), ("11,12,13/cards=5/target=999", (11, 12, 13), 999, 5), ("99/target=1/cards=6", (99,) * 3, 1, 6)])
def test_rules_are_read_and_written(text, faces, target, cards):
    rule = parse_rule(text)
    assert rule == Rule(faces, target, cards) and parse_rule(str(rule)) == rule and parse_rule(rule) is rule
    assert values(((11, "S"), (12, "S"), (13, "S"), (1, "S"), (10, "S")), rule) == (*faces, 1, 10)


def test_short_form_of_rules():
    assert [str(parse_rule(text)) for text in ("10,10,10", "7/target=24", "5/cards=5/target=36")] == ["10", "7", "5/target=36/cards=5"]


@pytest.mark.parametrize("text", ["", "0", "100", "1,2", "1,2,3,4", "-5", "+5", "5.0", "ten", "١٠", "10/", "10/cards", "10/cards=2", "10/cards=7",
                                  "10/target=0", "10/target=1000", "10/suits=2", "10/target=36/target=36", "1_0", "10/cards=4/5", "9" * 5000])
def test_bad_rules_give_one_sentence(text):
    with pytest.raises(ValueError) as error:
        parse_rule(text)
    assert str(error.value).endswith(".") and len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [dict(name="gp-x"), dict(visual="red"), dict(split="exam"), dict(style="long"), dict(index=-1), dict(attempts=0),
                                 dict(judge="10/cards=5"), dict(rule="10/target=999/cards=3"), dict(seed=-1)])
def test_make_refuses_what_it_does_not_know(bad):
    with pytest.raises(ValueError):
        make(**{"name": "gp-l"} | bad)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(ValueError, match="gp-l"):
        make("chess")


# ---- Deals and splits ------------------------------------------------------------------------------------------------

def test_a_problem_is_a_function_of_its_five_names():
    first = [make("gp-l", OOD_RULE, None, "test", i, attempts=2).hand for i in range(20)]
    random.seed(0)
    again = [make("gp-l", OOD_RULE, None, "test", i, style="short", seed=7).hand for i in reversed(range(20))][::-1]
    assert first == again and len(set(first)) > 15
    code = "import tasks; print([tasks.make('gp-l', '11,12,13', None, 'test', i).hand for i in range(20)])"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PYTHONHASHSEED": "99"})
    assert other.stdout.strip() == str(first)


def test_the_stream_does_not_change():
    """Literal hands: results are compared across machines and versions, so a change here is a change of the test set."""
    assert [tasks.rank_names(make("gp-l", split="test", index=i).hand) for i in range(3)] == [
        ["4", "J", "7", "8"], ["5", "Q", "4", "J"], ["6", "8", "2", "K"]]


def test_seed_shifts_training_only():
    assert make("gp-l", seed=1, index=3).hand == make("gp-l", index=10**9 + 3).hand
    assert [make("gp-l", seed=1, index=i).hand for i in range(9)] != [make("gp-l", index=i).hand for i in range(9)]
    assert make("gp-l", split="val", seed=1, index=3).hand == make("gp-l", split="val", index=3).hand


@pytest.mark.parametrize("rule, count", [("10", 2000), ("11,12,13", 2000), ("11,12,13/cards=3/target=10", 150), ("11,12,13/cards=5", 300),
                                         ("10/cards=6", 60)])
def test_splits_share_no_class_and_hands_fit(rule, count):
    classes = {}
    for split in tasks.SPLITS:
        problems = [make("gp-l", rule, None, split, i) for i in range(count)]
        classes[split] = {problem.cls for problem in problems}
        for problem in problems:
            assert len(set(problem.hand)) == problem.rule.cards and set(problem.hand) <= set(tasks.DECK)
            faces = (parse_rule(ID_RULE).faces, OOD.faces) if split != "train" else (problem.rule.faces,)
            for face_values in faces:
                assert solve(values(problem.hand, Rule(face_values)), problem.rule.target)
            assert split == "train" or any(rank > 10 for rank, _ in problem.hand)
    assert not classes["train"] & classes["test"] and not classes["train"] & classes["val"] and not classes["val"] & classes["test"]


def test_shares_of_the_splits():
    for cards, slack in ((3, 0.03), (4, 0.01), (5, 0.01), (6, 0.01)):
        keys = ["-".join(map(str, ranks)) for ranks in combinations_with_replacement(range(1, 11), cards)]
        counts = Counter(map(tasks.split_of, keys))
        for split, share in (("train", 0.60), ("val", 0.08), ("test", 0.32)):
            assert abs(counts[split] / len(keys) - share) < slack, (cards, counts)


def test_held_out_hands_are_the_same_under_both_rules():
    for split in ("val", "test"):
        for options in ("", "/cards=5", "/target=36"):
            pairs = [(make("gp-l", ID_RULE + options, None, split, i), make("gp-l", OOD_RULE + options, None, split, i)) for i in range(100)]
            assert all(a.hand == b.hand and a.numbers != b.numbers for a, b in pairs)


def test_suites_can_be_dealt_and_solved():
    for rows in tasks.SUITES.values():
        for _, rule, judged in rows:
            problem = make("gp-l", rule, None, "val", 1, judge=judged)
            assert problem.step(problem.expert()).outcome == ("correct" if judged is None else "wrong_numbers")


# ---- Prompts and experts ---------------------------------------------------------------------------------------------

def test_prompts():
    assert tasks.short_prompt(K72A, OOD) == "K 7 2 A, JQK=11,12,13, make 24"
    assert tasks.short_prompt(K72A, Rule(target=36)) == "K 7 2 A, JQK=10,10,10, make 36"
    full = tasks.full_prompt(K72A, parse_rule("11,12,13/target=36"))
    for part in ('["K", "7", "2", "A"]', "J counts as 11, Q counts as 12 and K counts as 13", "A counts as 1", "equals 36", '"formula"'):
        assert part in full
    assert "J, Q and K each count as 7" in tasks.full_prompt(K72A, parse_rule("7"))


def test_expert_is_right_and_varied():
    for rule in ("10", "11,12,13", "5/cards=3/target=12", "11,12,13/cards=5", "10/cards=6"):
        for i in range(10):
            problem = make("gp-l", rule, index=i)
            response = problem.expert(random.Random(i))
            fields = json.loads(response)
            assert response == json.dumps(fields) and list(fields) == ["cards", "number", "formula"]
            assert fields["cards"] == tasks.rank_names(problem.hand) and tuple(fields["number"]) == problem.numbers
            assert problem.step(response)[:2] == (5.0, True)
    problem = tasks.GeneralPoints(((2, "S"), (3, "S"), (4, "S"), (1, "S")), Rule(), 1, "full", Rule())
    seen = {json.loads(problem.expert(random.Random(i)))["formula"] for i in range(200)}
    assert seen == set(solutions((1, 2, 3, 4), 24)) and json.loads(problem.expert())["formula"] == "4*3*2*1"


def test_demonstrators_do_what_they_say():
    rng, habits = random.Random(0), Counter()
    for i in range(300):
        rule = ("11,12,13", "7", "11,12,13/cards=5")[i % 3]
        fresh = lambda: make("gp-l", rule, index=i, attempts=2, style="short")  # noqa: E731
        by_ten = Rule((10, 10, 10), 24, fresh().rule.cards)
        [careful], [careless], [habit] = (fresh().demonstrate(kind, rng) for kind in ("careful", "careless", "habit"))
        assert fresh().step(careful).outcome == "correct" and fresh().step(careless).outcome == "wrong_value"
        assert json.loads(habit)["number"] == list(values(fresh().hand, by_ten))
        outcome = judge(habit, fresh().hand, by_ten).outcome
        assert outcome == ("correct" if solve(values(fresh().hand, by_ten), 24) else "wrong_value")
        habits[outcome] += 1
        slip, feedback, right = fresh().demonstrate("retry", rng)
        problem = fresh()
        step = problem.step(slip)
        assert (step.outcome, step.feedback) == ("wrong_value", feedback) and problem.step(right).outcome == "correct"
    assert habits["correct"] > 100 and habits["wrong_value"] > 10
    with pytest.raises(ValueError, match="careful"):
        fresh().demonstrate("clever", rng)


def test_careless_formulas_are_in_the_notation_of_the_solver():
    rng = random.Random(1)
    for i in range(200):
        formula = json.loads(make("gp-l", OOD_RULE, index=i).demonstrate("careless", rng)[0])["formula"]
        value, used = tasks.read_formula(formula, 24)
        top, bottom = value
        if bottom == 1 and 0 < top < 1000:
            assert formula in solutions(used, top)


# ---- The verifier ----------------------------------------------------------------------------------------------------

def problem_k53a(attempts=1, style="full", rule=OOD):
    return tasks.GeneralPoints(K53A, rule, attempts, style, rule)


CORRECT, VALUE, NUMBERS, ILLEGAL = "correct", "wrong_value", "wrong_numbers", "illegal"
RIGHT = solve((13, 5, 3, 1), 24)


@pytest.mark.parametrize("formula, outcome", [
    (RIGHT, CORRECT), (RIGHT + "=24", CORRECT), (f" {RIGHT} = 24 ", CORRECT), (f"(({RIGHT}))", CORRECT), (RIGHT.replace("*", "×"), CORRECT),
    ("13+5+3*1", VALUE), ("(13+5)*3/1=24", VALUE), ("13-5*3*1", VALUE), ("13/5+3-1", VALUE), ("13−5+3÷1", VALUE),
    ("24", NUMBERS), ("13+5+3+2", NUMBERS), ("13+5+3", NUMBERS), ("10+5*3*1", NUMBERS), ("12+12", NUMBERS), ("0*7+24", NUMBERS),
    ("13+5+3*1*1", NUMBERS), ("13+5+3+1+1", NUMBERS), ("135+31", NUMBERS), ("3*8", NUMBERS),
    ("13/(5*3-15)", ILLEGAL), ("13+5+3*1=25", ILLEGAL), ("24=" + RIGHT, ILLEGAL), (RIGHT + "=24=24", ILLEGAL), ("=24", ILLEGAL), ("", ILLEGAL),
    ("2**3", ILLEGAL), ("13**7-2-1", ILLEGAL), ("7//2", ILLEGAL), ("13//7*2*1", ILLEGAL), ("1.5*4", ILLEGAL), ("-13+5+3+1", ILLEGAL),
    ("13+-7", ILLEGAL), ("2(13-1)", ILLEGAL), ("(13)(7)", ILLEGAL), ("13 7", ILLEGAL), ("1 3+7", ILLEGAL), ("013+5+3+1", ILLEGAL),
    ("13+5+3+", ILLEGAL), ("(13+7", ILLEGAL), ("13+7)", ILLEGAL), ("()", ILLEGAL), ("13x7", ILLEGAL), ("13^7", ILLEGAL), ("13%7", ILLEGAL),
    ("１３+5+3+1", ILLEGAL), ("²+7", ILLEGAL), ("1_3+7", ILLEGAL), ("1e1+7", ILLEGAL), ("0x18", ILLEGAL), ("13\u00a0+7", ILLEGAL),
    ("13+7#", ILLEGAL), ("12345+1", ILLEGAL), ("44**19**35", ILLEGAL), ("__import__('os').system('true')", ILLEGAL),
    ("(" * 17 + "13" + ")" * 17, ILLEGAL), ("+".join("1" * 17), ILLEGAL), ("1+" * 200 + "1", ILLEGAL), ("13\x00+7", ILLEGAL)])
def test_formulas(formula, outcome):
    assert judge(answer(formula), K53A, OOD).outcome == outcome


PLAIN = '"cards": ["K", "5", "3", "A"], "number": [13, 5, 3, 1], "formula": "%s"' % RIGHT


@pytest.mark.parametrize("response", [
    "{%s}" % PLAIN, "```json\n{%s}\n```" % PLAIN, "Sure, here's it: {%s}. It's 24!" % PLAIN, "{%s,}" % PLAIN, "{%s}" % PLAIN.replace('"', "'"),
    "{cards: [K, 5, 3, A], formula: '%s'}" % RIGHT, '{"formula": "%s", "cards": ["K",5,3,"A",]}' % RIGHT, '{"formula":"%s"}' % RIGHT,
    '{"formula": "\\u0020%s"}' % RIGHT, '{"note": "it\'s fine", "formula": "%s", "ok": true}' % RIGHT, '{"formula": "%s", "x": NaN}' % RIGHT,
    '{"formula": "%s", "x": 1e999, "y": %s}' % (RIGHT, "9" * 3000)])
def test_json_as_a_person_reads_it(response):
    verdict = judge(response, K53A, OOD)
    assert verdict.outcome == CORRECT
    assert verdict.cards == (("K", "5", "3", "A") if "cards" in response else None)


HOSTILE = [
    "", "{", "}", "{}", "[]", "null", RIGHT, '"formula": "%s"' % RIGHT, "{%s" % PLAIN, "{%s}{%s}" % (PLAIN, PLAIN), "{{%s}}" % PLAIN,
    '{"a": {%s}}' % PLAIN, "[{%s}, {}]" % PLAIN, '{"formula": "1", "formula": "%s"}' % RIGHT, '{"formula": "1", \'formula\': "%s"}' % RIGHT,
    '{"formula": 24}', '{"formula": null}', '{"formula": ["%s"]}' % RIGHT, '{"formula": %s}' % RIGHT, '{"Formula": "%s"}' % RIGHT,
    '{"formula" "%s"}' % RIGHT, '{"formula": "%s" "x": 1}' % RIGHT, '{"formula":: "%s"}' % RIGHT, '{,"formula": "%s"}' % RIGHT,
    '{"formula": "%s", "x": [[1]]}' % RIGHT, '{"formula": "%s", "x": [1' % RIGHT, '{"formula": "%s", "x": "\\q"}' % RIGHT,
    '{"formula": "%s", "x": [%s]}' % (RIGHT, "1," * 17), "{" + ",".join(f'"k{i}":1' for i in range(17)) + ',"formula":"%s"}' % RIGHT,
    '{"formula": "%s\\n#"}' % RIGHT, '{"formula": "%s"}%s' % (RIGHT, " " * 4000), "{%s}" % PLAIN + '{"formula": 1}', "\ud800{",
    "[" * 4000, "{" * 4000, '{"a":' * 600, '"' * 4000, "{" + '"\\' * 1999, "{" + "\\" * 3999, "{'" + "\\'" * 1990, '{"formula": "' + "(" * 3000 + '"}',
    "{" + " " * 3999, "{" + "," * 3999, "{" + "a" * 3999, "{" + "a:" * 1999, '{"formula": [' + "1," * 1990, '{"x": ' + "9" * 3900 + "}", "A" * 10**6,
    '{"formula": "' + "1+" * 1900 + '1"}', '{"formula": "<|eot_id|>"}', '{"formula": "__import__(\'os\').system(\'id\')"}',
    '{"formula": "' + "9" * 190 + '"}', '{"formula": "\u202e42"}', '{"formula": "\\u0000"}', '{"formula": "{fact}"}']


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_get_the_lowest_reward_quickly(response):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        verdict = judge(response, K53A, OOD)
        seconds.append(time.perf_counter() - start)
    assert verdict.outcome == ILLEGAL and min(seconds) < 0.002
    step = problem_k53a(attempts=2).step(response)
    assert step.reward == -3 == min(tasks.REWARD.values())
    assert len(step.feedback) < 220 and step.feedback.isprintable()


def test_verifier_agrees_with_fractions_on_random_formulas():
    rng = random.Random(2)
    for _ in range(2000):
        text, value = random_formula(rng, 4)
        if value is None:
            with pytest.raises(tasks.Illegal):
                tasks.read_formula(text, 24)
        else:
            assert tasks.read_formula(text, 24)[0] == (value.numerator, value.denominator), text


def random_formula(rng, size):
    """A fully bracketed random formula and its value (None when it divides by zero)."""
    if size == 1:
        n = rng.randrange(0, 14)
        return str(n), Fraction(n)
    cut, op = rng.randrange(1, size), rng.choice("+-*/")
    (left, x), (right, y) = random_formula(rng, cut), random_formula(rng, size - cut)
    text = f"({left}{op}{right})"
    if x is None or y is None or op == "/" and y == 0:
        return text, None
    return text, {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else None}[op]


def test_precedence_and_association():
    for text, value in (("13-7-2-1", 3), ("13-7*2+1", 0), ("8/4/2", 1), ("8/4*2", 4), ("2+3*4-1", 13), ("20-(3-(2-1))", 18)):
        assert tasks.read_formula(text, 24)[0] == (value, 1)


# ---- Steps, rewards, feedback ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("formula, reward", [(RIGHT, 5), ("13+5+3*1", -1), ("10+5*3*1", -2), ("13**7", -3)])
def test_rewards_with_and_without_the_last_attempt(formula, reward):
    first = problem_k53a(attempts=2).step(answer(formula))
    assert (first.reward, first.done) == (reward, reward == 5)
    only = problem_k53a(attempts=1).step(answer(formula))
    assert (only.reward, only.done) == (5 if reward == 5 else reward - 1, True)


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_exactly_so_many_answers_are_judged(attempts):
    problem = problem_k53a(attempts)
    steps = [problem.step(answer("13+5+3*1")) for _ in range(attempts)]
    assert [step.reward for step in steps] == [-1.0] * (attempts - 1) + [-2.0]
    assert [step.done for step in steps] == [False] * (attempts - 1) + [True] and problem.attempt == attempts
    with pytest.raises(RuntimeError):
        problem.step(answer(RIGHT))
    late = problem_k53a(attempts)
    for _ in range(attempts - 1):
        late.step("?")
    assert late.step(answer(RIGHT)).reward == 5 and late.done


@pytest.mark.parametrize("formula, feedback", [
    (RIGHT, "Correct."), ("13+5+3*1", "21, not 24."), ("13/3+5*1", "28/3, not 24."), ("5-13+3*1", "-5, not 24."), ("10+5*3*1", "10 is not on the cards."),
    ("13+3+1", "5 is missing."), ("13+5+3+1+5", "5 is used twice."), ("13+5+3+1+5+5", "5 is used 3 times."), ("13*", "Not a legal formula.")])
def test_short_feedback(formula, feedback):
    assert problem_k53a(style="short").step(answer(formula)).feedback == feedback


def test_feedback_on_pairs_of_cards():
    hand = ((7, "S"), (7, "H"), (2, "D"), (1, "C"))
    facts = [judge(answer(formula), hand, OOD).fact for formula in ("7+2+1", "7+7+7+2+1", "2+1")]
    assert facts == ["7 is used once, not twice", "7 is used 3 times, not twice", "7 is missing"]


def test_full_feedback_says_what_was_wrong():
    said = [problem_k53a().step(answer(formula)).feedback for formula in ("13+5+3*1", "10+5*3*1", "13/(7-7)", "13**7", "7" * 300)]
    for text, part in zip(said, ("equals 21, not 24", "10 is not on the cards", "divides by zero", "'*' stands where", "longer than 200")):
        assert part in text and text.endswith("same JSON form.")


def test_feedback_is_true_on_random_wrong_answers():
    rng = random.Random(4)
    for i in range(500):
        problem = make("gp-l", OOD_RULE, index=i, style="short")
        pool = [*problem.numbers, rng.randrange(1, 14)]
        used = rng.sample(pool, rng.randrange(2, 6))
        step = problem.step(answer("+".join(map(str, used))))
        have, put = Counter(problem.numbers), Counter(used)
        n = int(re.match(r"\d+", step.feedback)[0]) if step.feedback[0].isdigit() else None
        truth = {"not 24": sum(used) == n != 24 and have == put, "on the cards": n not in have and n in put,
                 "missing": n in have and n not in put, "is used": have[n] != put[n] > 0 and have[n] > 0, "Correct": sum(used) == 24 and have == put}
        assert truth[next(key for key in truth if key in step.feedback)], (problem.numbers, used, step)


def test_fake_rule_judges_by_the_old_rule():
    for i in range(30):
        fake = make("gp-l", OOD_RULE, None, "test", i, judge=ID_RULE, attempts=2)
        plain = make("gp-l", OOD_RULE, None, "test", i)
        assert fake.hand == plain.hand and fake.prompt == plain.prompt and fake.numbers == plain.numbers
        assert fake.step(fake.expert()).outcome == "wrong_numbers"
        assert fake.step(fake.demonstrate("habit", random.Random(i))[0]).outcome == "correct"


def test_speed_of_making_and_judging():
    for cache in (tasks._solve, tasks._solutions, tasks._reachable, tasks._splits):
        cache.cache_clear()
    start = time.perf_counter()
    for i in range(1000):
        for rule in (ID_RULE, OOD_RULE):
            problem = make("gp-l", rule, None, "test" if i % 2 else "train", i)
            assert problem.step(problem.expert()).reward == 5
    assert time.perf_counter() - start < 6  # about 0.7 s; the bound only catches a solver gone slow


# ---- Command line ----------------------------------------------------------------------------------------------------

def cli(*args, stdin=""):
    return subprocess.run([sys.executable, "tasks.py", *args], cwd=ROOT, capture_output=True, text=True, input=stdin, timeout=30)


def test_cli_shows_problems():
    shown = cli("--task", "gp-l", "--rule", OOD_RULE, "--n", "2", "--style", "short", "--index", "4")
    problem = make("gp-l", OOD_RULE, None, "test", 4, style="short")
    assert shown.returncode == 0 and not shown.stderr and shown.stdout.count("---") == 2
    for part in (problem.prompt, problem.expert(), problem.cls, f"Distinct solutions: {len(solutions(problem.numbers, 24))}"):
        assert part in shown.stdout
    assert "Distinct" not in cli("--rule", "10/cards=5", "--n", "1").stdout


def test_cli_judges_an_answer():
    right = make("gp-l", split="test").expert()
    assert "Verdict: correct, reward +5." in cli("--n", "2", "--answer", right).stdout
    hostile = cli("--n", "1", "--answer", '{"formula": "\x1b[31m\x07"}')
    assert "Verdict: illegal, reward -4." in hostile.stdout and "\x1b" not in hostile.stdout and "\x07" not in hostile.stdout


def test_cli_asks():
    right = json.loads(make("gp-l", split="test").expert())["formula"]
    asked = cli("--ask", "--n", "1", "--attempts", "2", "--style", "short", stdin=f"1+1\n{right}\n")
    assert "wrong_numbers, reward -2" in asked.stdout and "correct, reward +5" in asked.stdout
    assert cli("--ask", "--n", "2").returncode == 0  # no answer comes


@pytest.mark.parametrize("args", [("--task", "chess"), ("--rule", "abc"), ("--split", "exam"), ("--index", "-1"), ("--n", "0"), ("--style", "x"),
                                  ("--rule", "10/target=999")])
def test_cli_refuses_with_one_sentence(args):
    refused = cli(*args)
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1 and refused.stderr.endswith(".\n")
