"""The tasks: what is asked, what an expert answers, and how an answer is judged.

GeneralPoints in text, "gp-l": some playing cards are dealt, and a formula that uses each card once must equal a target. The
rule says what J, Q and K count as. Training sees one rule, the test asks for another, so memory and understanding part ways. In
pictures, "gp-vl": the cards have to be seen first, and the test changes their look too.

    problem = make("gp-l", rule="11,12,13", split="test", index=0, attempts=5)
    problem.prompt, problem.image           the first user turn; the picture, None in text
    problem.expert()                        a right response
    problem.step(response)                  Step(reward, done, feedback, outcome, read)

Contents
    1. Cards and rules       Rule, parse_rule, fill_rule (wildcards), values
    2. Exact arithmetic      rational numbers as integer pairs
    3. Formulas              one notation for all formulas that differ only in the order of their operands
    4. Solver                solve (3 to 6 cards), solutions (all of them, up to 4 cards)
    5. Splits and deals      problem_class, split_of, deal
    6. Reading an answer     read_answer (JSON and near-JSON), read_formula: nothing is ever executed
    7. The verifier          judge, REWARD, feedback_text, read_share (the cards that were recognized)
    8. Looks                 Look, parse_look, fill_look (wildcards), legible_from
    9. Pictures of cards     picture
    10. The problem          GeneralPoints, make, KINDS of demonstrators, SUITES
    11. Command line         python tasks.py --task gp-l

Protocol and rewards: Chu et al., "SFT Memorizes, RL Generalizes", arXiv 2501.17161. We differ where the released code is weak: exact
rationals, a split by class, one outcome per answer, exactly `attempts` answers, and feedback that is true.
"""
import argparse
import hashlib
import json
import random
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from itertools import combinations
from math import ceil, cos, gcd, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

# ---- 1. Cards and rules ----------------------------------------------------------------------------------------------

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
DECK = tuple((rank, suit) for suit in "SHDC" for rank in range(1, 14))  # a card is (rank 1..13, suit)
ID_RULE, OOD_RULE = "10", "11,12,13"


@dataclass(frozen=True)
class Rule:
    """What counts as right: `faces` are the values of J, Q and K (1..99), `target` 1..999 (0, written `*`: drawn from TARGETS with every
    hand), `cards` 3..6; and `courts`, at least how many face cards are dealt. ValueError otherwise."""
    faces: tuple[int, int, int] = (10, 10, 10)
    target: int = 24
    cards: int = 4
    courts: int = 0

    def __post_init__(self):
        if len(self.faces) != 3 or not all(1 <= face <= 99 for face in self.faces):
            raise ValueError(f"J, Q and K need one value or three, each from 1 to 99, not {self.faces}.")
        if not 0 <= self.target <= 999:
            raise ValueError(f"The target must lie from 1 to 999, not at {self.target}.")
        if not 3 <= self.cards <= 6:
            raise ValueError(f"A hand has 3 to 6 cards, not {self.cards}.")
        if not 0 <= self.courts <= self.cards:
            raise ValueError(f"A hand of {self.cards} cards cannot have {self.courts} face cards or more.")

    def __str__(self):
        faces = self.faces[:1] if len(set(self.faces)) == 1 else self.faces
        target = "" if self.target == 24 else f"/target={self.target or '*'}"
        cards = "" if self.cards == 4 else f"/cards={self.cards}"
        courts = f"/courts={self.courts}" if self.courts else ""
        return ",".join(map(str, faces)) + target + cards + courts


def parse_rule(text):
    """Read a Rule from "10" (J, Q and K alike) or "11,12,13", then "/target=36" or "/target=*", "/cards=5" and "/courts=2" in any order;
    str(rule) undoes it.

    A Rule passes through unchanged. Any other text raises a ValueError that says what is wrong."""
    if isinstance(text, Rule):
        return text
    faces, *options = text.split("/")
    found = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in ("target", "cards", "courts") or name in found:
            raise ValueError(f"{text[:60]!r} is not a rule: after the faces only /target=N, /cards=N and /courts=N may follow, each once.")
        found[name] = 0 if option == "target=*" else _small_int(value, text)
    face_values = tuple(_small_int(face, text) for face in faces.split(","))
    return Rule(face_values * 3 if len(face_values) == 1 else face_values, **found)


TARGETS = (10, 40)  # from which `target=*` is drawn, anew for every hand


def fill_rule(text, rng):
    """Rule text with the wildcards among its faces drawn: `*` from 1..13, `?` from 10..13."""
    faces, slash, rest = str(text).partition("/")
    lowest = {"*": 1, "?": 10}
    faces = (str(rng.randint(lowest[face], 13)) if face in lowest else face for face in faces.split(","))
    return ",".join(faces) + slash + rest


def _small_int(digits, text):
    if not re.fullmatch("[1-9][0-9]{0,2}", digits):
        raise ValueError(f"{text[:60]!r} is not a rule: write 10, or 11,12,13, or 10/target=36/cards=5.")
    return int(digits)


def values(hand, rule):
    """The numbers that a hand stands for: ace 1, number cards as printed, J, Q, K by the rule; in dealt order."""
    return tuple(rank if rank <= 10 else rule.faces[rank - 11] for rank, _ in hand)


def rank_names(hand):
    """The ranks of a hand as people write them, such as ["K", "7", "2", "A"]."""
    return [RANKS[rank - 1] for rank, _ in hand]


# ---- 2. Exact arithmetic ---------------------------------------------------------------------------------------------
# A value is a pair (numerator, denominator) in lowest terms, the denominator positive. Floats would refuse 8/(3-8/3) = 24;
# fractions.Fraction would do, but is several times slower, and every deal runs the solver.

class Illegal(ValueError):
    """The answer is no legal formula; the message says why, as the end of a sentence."""


def _ratio(top, bottom):
    shared = gcd(top, bottom) if bottom > 0 else -gcd(top, bottom)
    return top // shared, bottom // shared


def _apply(op, x, y):
    """x op y. Raises Illegal for a division by zero."""
    (a, b), (c, d) = x, y
    if op == "+":
        return _ratio(a * d + c * b, b * d)
    if op == "-":
        return _ratio(a * d - c * b, b * d)
    if op == "*":
        return _ratio(a * c, b * d)
    if c == 0:
        raise Illegal("it divides by zero")
    return _ratio(a * d, b * c)


def _show(value):
    return f"{value[0]}/{value[1]}" if value[1] > 1 else str(value[0])


# ---- 3. Formulas -----------------------------------------------------------------------------------------------------

class Formula(NamedTuple):
    """A formula in the one notation used here: sums and products are flat lists, so a-(b-c) and a+c-b are one formula.

    `ups` are added (multiplied), `downs` subtracted (divided by); each is sorted, larger values first. `kind` is "+" for a sum, "*"
    for a product, "" for a number. Two formulas are the same up to commutativity and associativity just when their texts are equal."""
    value: tuple
    text: str
    kind: str = ""
    ups: tuple = ()
    downs: tuple = ()


def _number(n):
    return Formula((n, 1), str(n))


def _join(op, left, right):
    """The Formula `left op right`, flattened, in order, with as few brackets as possible."""
    kind, inverse = ("+", "-") if op in "+-" else ("*", "/")
    ups, downs = (left.ups, left.downs) if left.kind == kind else ((left,), ())
    more, fewer = (right.ups, right.downs) if right.kind == kind else ((right,), ())
    if op == inverse:
        more, fewer = fewer, more
    ups, downs = sorted(ups + more, key=_order), sorted(downs + fewer, key=_order)
    text = kind.join(map(_bracketed, ups)) + "".join(inverse + _bracketed(part) for part in downs)
    return Formula(_apply(op, left.value, right.value), text, kind, tuple(ups), tuple(downs))


def _order(part):
    # What must be worked out comes first, so that a reader from left to right has its value when the rest is chosen; then the larger.
    return part.kind == "", -part.value[0] / part.value[1], part.text  # the float only sorts: equal values give equal floats


def _bracketed(part):
    return f"({part.text})" if part.kind == "+" else part.text  # only a product can have a sum as its part


def _difficulty(text):
    """Sort key: few brackets first, then few - and /, then the text itself, so that the order is the same everywhere."""
    return text.count("("), text.count("-") + text.count("/"), text


# ---- 4. Solver -------------------------------------------------------------------------------------------------------
# No partial result is ever negative: (7-13)*(2-6) is (13-7)*(6-2) with two signs flipped, and any formula of a positive value can be
# turned so. That halves the search, and keeps the unary minus and its look-alikes out of the experts' answers.

@lru_cache(maxsize=4096)
def _splits(numbers):
    """All ways to part a sorted tuple into two non-empty sorted tuples (few, many), each once."""
    found = {}
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in combinations(range(len(numbers)), size):
            few = tuple(numbers[i] for i in chosen)
            many = tuple(n for i, n in enumerate(numbers) if i not in chosen)
            if len(few) < len(many) or few <= many:
                found[few, many] = None
    return tuple(found)


@lru_cache(maxsize=600)  # four of six cards have about a thousand values: 600 entries stay below 100 MB
def _reachable(numbers):
    """Every value that a formula of exactly these numbers can have (a dict used as an ordered set)."""
    if len(numbers) == 1:
        return {(numbers[0], 1): None}
    found = {}
    for few, many in _splits(numbers):
        for a, b in _reachable(few):
            for c, d in _reachable(many):
                bottom, p, q = b * d, a * d, c * b
                found[_ratio(p + q, bottom)] = found[_ratio(abs(p - q), bottom)] = found[_ratio(a * c, bottom)] = None
                if c:
                    found[_ratio(p, q)] = None
                if a:
                    found[_ratio(q, p)] = None
    return found


def _partners(x, target):
    """All (op, y, y_first) for which x op y, or y op x when y_first, is the target.

    For x = target = 0 any y would do, and is left out: the same numbers give 0 with a single card, which is never 0, as x."""
    (a, b), (c, d) = x, target
    difference, bottom = c * b - a * d, b * d  # target - x
    found = [("-", _ratio(c * b + a * d, bottom), True)]
    if difference >= 0:
        found.append(("+", _ratio(difference, bottom), False))
    if difference <= 0:
        found.append(("-", _ratio(-difference, bottom), False))
    if a:
        found += [("*", _ratio(c * b, a * d), False), ("/", _ratio(c * a, bottom), True)]
    if a and c:
        found.append(("/", _ratio(a * d, b * c), False))
    return found


def _formulas(numbers, target, depth):
    """Yield the Formulas of exactly these numbers that equal the target; some come more than once.

    Meet in the middle: one side of the top operation is enumerated, the partner it needs is looked up. Values are listed for up to
    `depth` numbers (two fewer than the hand), since a list for the largest part would cost more than all other lists together."""
    if len(numbers) == 1:
        if target == (numbers[0], 1):
            yield _number(numbers[0])
        return
    for few, many in _splits(numbers):
        listed = _reachable(many) if len(many) <= depth else None
        for x in _reachable(few):
            for op, y, y_first in _partners(x, target):
                if listed is not None and y not in listed:
                    continue
                for right in _formulas(many, y, depth):
                    for left in _formulas(few, x, depth):
                        yield _join(op, right, left) if y_first else _join(op, left, right)


def solve(numbers, target):
    """One formula (text) of 3 to 6 positive numbers, each used once, that equals the target; None where there is none."""
    return _solve(tuple(sorted(numbers)), target)


@lru_cache(maxsize=1 << 16)
def _solve(numbers, target):
    formula = next(_formulas(numbers, (target, 1), len(numbers) - 2), None)
    return formula.text if formula else None


def solutions(numbers, target):
    """All distinct formulas (texts) of up to 4 positive numbers that equal the target, the simplest first.

    Distinct up to commutativity, associativity and flipped signs (no partial result is negative). ValueError for more numbers."""
    if len(numbers) > 4:
        raise ValueError(f"All solutions are listed for up to 4 numbers, not for {len(numbers)}: use solve.")
    return _solutions(tuple(sorted(numbers)), target)


@lru_cache(maxsize=1 << 13)
def _solutions(numbers, target):
    texts = {formula.text for formula in _formulas(numbers, (target, 1), len(numbers) - 2)}
    return tuple(sorted(texts, key=_difficulty))


# ---- 5. Splits and deals ---------------------------------------------------------------------------------------------
# A split by ranks would leak: K 7 2 A and Q 7 2 A are one problem under J=Q=K=10. So whole classes are held out, their hands from every
# stage and every rule, their numbers from all but "base", which stands in for pretraining (under J=3 it may show J-10-2-A as 3-10-2-A,
# the numbers of 3-K-2-A). A class is numbers and target: 1-2-7-10=24 may be held out and 1-2-7-10=25 trained. A face card and a solution
# under both rules is a lot to ask: of the classes of four cards that make 24, 57 are left for test, 15 for val.

SPLITS = ("base", "train", "val", "test")
TRIES = 10_000


def problem_class(numbers, target):
    """What a problem is whatever cards it came from: its numbers, sorted, those above 10 as 10, and its target: "1-2-7-10=24".

    By its ranks, where J, Q and K count as 10, a hand has one class under every rule; by its values under ID_RULE and OOD_RULE it has
    that class too, by those under another rule (J=3) it may have a second one, and `deal` looks at both (for "base" at the first)."""
    return "-".join(map(str, sorted(min(n, 10) for n in numbers))) + f"={target}"


@lru_cache(maxsize=1 << 16)
def split_of(cls):
    """The split a class belongs to: train (60 %), val (10 %) or test (30 %), by a hash that is the same on every machine."""
    percent = int.from_bytes(hashlib.sha256(f"gp/{cls}".encode()).digest()[:8], "big") % 100
    return "train" if percent < 60 else "val" if percent < 70 else "test"


def deal(rule, split, index, suits=4):
    """(hand, rule with its target): the first of the index's stream of hands, dealt without replacement, and of targets, where the
    rule leaves them open, that fits the split and the rule.

    "train": solvable under the rule; "base": the same for the stage before. "val" and "test": at least one face card, and solvable
    under the rule and under both ID_RULE and OOD_RULE faces (same target and card count), so these two rules are tested on the same
    hands and targets; for a third rule they may differ. No face value turns a hand of train into the numbers of a held-out class, or
    the reverse (J=3 would make J-7-2-A a 3-7-2-A); in "base" it may. No rank is dealt more than `suits` times: a picture in
    one colour has two suits. ValueError when TRIES deals bring none."""
    held_out = split in ("val", "test")
    faces = [rule.faces] + [parse_rule(text).faces for text in (ID_RULE, OOD_RULE) if held_out]
    rng = random.Random(f"gp/{split}/{index}")  # a text seed is hashed the same way everywhere
    for _ in range(TRIES):
        hand, dealt = tuple(rng.sample(DECK, rule.cards)), replace(rule, target=rule.target or rng.randint(*TARGETS))
        if split_of(problem_class([rank for rank, _ in hand], dealt.target)) != ("train" if split == "base" else split):
            continue
        if sum(rank > 10 for rank, _ in hand) < max(rule.courts, held_out):
            continue
        if max(Counter(rank for rank, _ in hand).values()) > suits:
            continue
        if split != "base" and (split_of(problem_class(values(hand, rule), dealt.target)) != "train") != held_out:
            continue
        if all(solve(values(hand, replace(rule, faces=each)), dealt.target) for each in faces):
            return hand, dealt
    raise ValueError(f"No solvable {split} hand in {TRIES} deals for rule {rule}: choose another target or number of cards.")


# ---- 6. Reading an answer --------------------------------------------------------------------------------------------
# Bound first, then read; the text is never executed or evaluated. One reader takes JSON and what a person would still call JSON: text
# or a ```json fence around the object, single quotes, bare words, a trailing comma. Numbers stay text, so 1e999, NaN or five thousand
# digits do no harm. Each token is matched once and they are counted (an answer to six cards needs 36), so the time is linear and short.

MAX_RESPONSE, MAX_TOKENS, MAX_FORMULA, MAX_NUMBERS, MAX_DIGITS, MAX_DEPTH = 4000, 100, 200, 16, 4, 16
JSON_TOKEN = re.compile(r"""\s*(?:(?P<double>"(?:[^"\\]|\\.)*")|(?P<single>'(?:[^'\\]|\\.)*')"""
                        r"""|(?P<mark>[{}\[\],:])|(?P<word>[^\s{}\[\],:"']+))""", re.DOTALL)
FORMULA_TOKEN = re.compile(r"[0-9]+|\S", re.ASCII)
SIGNS = str.maketrans("×÷−", "*/-")


def clean(text, limit=60):
    """Text of unknown origin made fit for a terminal or a sentence: printable characters only, at most `limit` of them."""
    return "".join(ch for ch in text[:limit] if ch.isprintable())


def _quoted(text):
    return f"'{clean(text)}'" if clean(text) else "an unprintable character"


def read_answer(text):
    """Read the one flat object in a response: a dict of str, tuple of str (a list), or None (a bare number or word).

    Raises Illegal for anything else: no object or two, nested ones, a key given twice, more than MAX_TOKENS tokens."""
    if len(text) > MAX_RESPONSE:
        raise Illegal(f"the response is longer than {MAX_RESPONSE} characters")
    start = text.find("{")
    if start < 0:
        raise Illegal("the response holds no JSON object")
    pairs, end = _items(_json_tokens(text, start + 1), "}", _pair)
    if "{" in text[end:]:
        raise Illegal("the response holds more than one JSON object")
    if len(dict(pairs)) < len(pairs):
        raise Illegal("a key stands twice in the JSON object")
    return dict(pairs)


def _json_tokens(text, position):
    """Yield (kind, text, end): kind is the mark itself for { } [ ] , : and otherwise "string" or "word"."""
    for _ in range(MAX_TOKENS):
        if not (match := JSON_TOKEN.match(text, position)):
            break
        position, kind, token = match.end(), match.lastgroup, match[match.lastgroup]
        if kind == "double":
            kind, token = "string", _unescaped(token)
        elif kind == "single":
            kind, token = "string", token[1:-1].replace("\\'", "'")
        yield token if kind == "mark" else kind, token, position
    raise Illegal(f"the JSON object is broken, does not end or has more than {MAX_TOKENS} parts")


def _unescaped(token):
    try:
        return json.loads(token, strict=False)  # one string, bounded: nothing but its escapes is read
    except ValueError:
        raise Illegal("a string in the JSON object has a wrong escape") from None


def _items(tokens, close, read):
    """The items of an object or a list up to its closing mark, each read by `read`, and where the mark ends."""
    items = []
    token = next(tokens)
    while token[0] != close:
        items.append(read(token, tokens))
        token = next(tokens)
        if token[0] == ",":
            token = next(tokens)
        elif token[0] != close:
            raise Illegal("the JSON object lacks a comma")
    return items, token[2]


def _pair(token, tokens):
    key = _scalar(token, tokens)
    if next(tokens)[0] != ":":
        raise Illegal("the JSON object lacks a colon")
    token = next(tokens)
    if token[0] == "[":
        return key, tuple(_items(tokens, "]", _scalar)[0])
    value = _scalar(token, tokens)
    return key, value if token[0] == "string" else None


def _scalar(token, tokens):
    if token[0] not in ("string", "word"):
        raise Illegal("the JSON object is nested or lacks a value")
    return token[1]


def read_formula(text, target):
    """Read a formula: returns its exact value (numerator, denominator) and the numbers it uses, in order.

    Whole numbers without leading zeros, + - * / (also × ÷ −), round brackets, spaces, and one optional `=target` at the end. Raises
    Illegal, also for a division by zero, a sign before a number, a missing operator, and whatever passes the bounds."""
    if len(text) > MAX_FORMULA:
        raise Illegal(f"the formula is longer than {MAX_FORMULA} characters")
    tokens = FORMULA_TOKEN.findall(text.translate(SIGNS))
    if tokens[-2:] == ["=", str(target)]:
        tokens = tokens[:-2]
    _check_tokens(tokens, target)
    stack = tokens[::-1]  # the next token is the last one
    value = _sum(stack)
    if stack:
        raise Illegal(f"{_quoted(stack[-1])} stands where an operator or the end should")
    return value, [int(token) for token in tokens if token.isdigit()]


def _check_tokens(tokens, target):
    depth = count = 0
    for token in tokens:
        if token[0] in "0123456789":
            count += 1
            if len(token) > MAX_DIGITS or token[0] == "0" and len(token) > 1:
                raise Illegal(f"{_quoted(token)} has a leading zero or more than {MAX_DIGITS} digits")
        elif token == "=":
            raise Illegal(f"'=' may stand only once, at the end, as '={target}'")
        elif token not in "+-*/()":
            raise Illegal(f"{_quoted(token)} is not allowed")
        depth += (token == "(") - (token == ")")
        if depth > MAX_DEPTH or count > MAX_NUMBERS:
            raise Illegal(f"it has more than {MAX_NUMBERS} numbers or brackets more than {MAX_DEPTH} deep")


def _sum(stack, operators="+-"):
    """A sum of products of atoms, worked out from left to right; with operators "*/" one product of atoms."""
    operand = _atom if operators == "*/" else lambda stack: _sum(stack, "*/")
    value = operand(stack)
    while stack and stack[-1] in operators:
        value = _apply(stack.pop(), value, operand(stack))
    return value


def _atom(stack):
    """A number, or a sum in brackets."""
    token = stack.pop() if stack else "the end"
    if token.isdigit():
        return int(token), 1
    if token != "(":
        raise Illegal(f"{_quoted(token)} stands where a number or '(' should")
    value = _sum(stack)
    if not stack or stack.pop() != ")":
        raise Illegal("a bracket is not closed")
    return value


# ---- 7. The verifier -------------------------------------------------------------------------------------------------

REWARD = {"correct": 5, "wrong_value": -1, "wrong_numbers": -2, "illegal": -3}
LAST_ATTEMPT = -1  # in addition, when the last attempt fails too
MISREAD = -1.5  # in addition, when the cards are in a picture and the answer's list of them is not right
AGAIN = "Please give another answer in the same JSON form."
STYLES = ("full", "short")  # prompts and feedback: for a large instruct model, or a handful of tokens for the tiny one


class Verdict(NamedTuple):
    """What the verifier found: `outcome` is a key of REWARD, `fact` says what is wrong (empty when nothing is), `cards` is what the
    response says the cards are (tuple of str, None when absent), `read` how much of that is right (see read_share). The outcome
    rests on the formula alone."""
    outcome: str
    fact: str = ""
    cards: tuple[str, ...] | None = None
    read: float = 0.0


class Step(NamedTuple):
    """What one answer brings: the reward, whether the episode is over, the verifier's text, the outcome, Verdict's `read`."""
    reward: float
    done: bool
    feedback: str
    outcome: str
    read: float = 0.0


def judge(response, hand, rule):
    """Judge a response (text of a model, of any content) to a hand under a rule; never raises for a str, takes under a millisecond.

    One outcome per answer, the first that holds: "illegal", "wrong_numbers" (one not on the cards, used too often, or missing),
    "wrong_value", "correct"."""
    cards, read = None, 0.0
    try:
        answer = read_answer(response)
        if isinstance(answer.get("cards"), tuple):
            cards, read = answer["cards"], read_share(answer["cards"], hand)
        if not isinstance(answer.get("formula"), str):
            raise Illegal("the JSON object has no key 'formula' with a string")
        value, used = read_formula(answer["formula"], rule.target)
    except Illegal as error:
        return Verdict("illegal", str(error), cards, read)
    if fact := _misused(used, values(hand, rule)):
        return Verdict("wrong_numbers", fact, cards, read)
    if value != (rule.target, 1):
        return Verdict("wrong_value", f"{_show(value)}, not {rule.target}", cards, read)
    return Verdict("correct", "", cards, read)


WORDS = ("ACE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "TEN", "JACK", "QUEEN", "KING")
NAMES = {name: rank for names in (RANKS, WORDS, map(str, range(1, 14))) for rank, name in enumerate(names, 1)}


def read_share(named, hand):
    """The share of a hand that a list of card names (str) gets right, 0 to 1: the number of cards in both, divided by the length
    of the longer one. In any order and case; "K", "KING" and "13" are one rank, whatever it counts as."""
    right = Counter(NAMES.get(name.strip().upper()) for name in named) & Counter(rank for rank, _ in hand)
    return right.total() / max(len(hand), len(named))


def _misused(used, numbers):
    """What is wrong with the numbers used, empty if nothing: the one used most in excess, and only then a missing one."""
    wrong = [n for n in (*used, *numbers) if used.count(n) != numbers.count(n)]
    if not wrong:
        return ""
    n = max(wrong, key=lambda n: used.count(n) - numbers.count(n))
    times, allowed = used.count(n), numbers.count(n)
    if allowed == 0:
        return f"{n} is not on the cards"
    if times == 0:
        return f"{n} is missing"
    words = {1: "once", 2: "twice"}
    limit = f", not {words.get(allowed, f'{allowed} times')}" if allowed > 1 else ""
    return f"{n} is used {words.get(times, f'{times} times')}{limit}"


FEEDBACK = {
    "short": {"correct": "Correct.", "wrong_value": "{fact}.", "wrong_numbers": "{fact}.", "illegal": "Not a legal formula."},
    "full": {"correct": "Correct.",
             "wrong_value": "Your formula equals {fact}. " + AGAIN,
             "wrong_numbers": "Your formula must use the value of each card exactly once, but {fact}. " + AGAIN,
             "illegal": "Your answer is not legal: {fact}. " + AGAIN}}
MISREAD_TEXT = {"short": " Cards misread.", "full": " Your answer does not list the cards in the picture rightly."}


def feedback_text(verdict, style):
    """The verifier's words for the next turn, "full" or "short"; the response is echoed for 60 printable characters at most."""
    return FEEDBACK[style][verdict.outcome].format(fact=verdict.fact)


# ---- 8. Looks --------------------------------------------------------------------------------------------------------
# What a picture of the cards may look like, as data: one look is trained, the others are the test.

OPTIONS = {
    "suits": ("black", "red", "both", "text"),  # black: S and C only; red: H and D only; both: as dealt; text: no picture at all
    "layout": ("row", "grid", "scattered", "shuffled"),  # scattered: tilted, in a rough grid; shuffled: a grid not in dealt order
    "scheme": ("index", "numbers", "words", "pips"),  # how a rank is shown: K, 13, KING, or 13 suit signs
    "style": ("plain", "framed", "dark"),  # the card
    "glyphs": ("sans", "serif", "mono", "italic"),  # the typeface
    "table": ("green", "blue", "wood", "grey"),
    "light": tuple(range(40, 141)),  # brightness in percent
    "noise": tuple(range(41)),  # standard deviation in grey levels
    "tiles": (4, 1),  # how many of the model's tiles the picture takes
}


@dataclass(frozen=True)
class Look:
    """What the cards look like: a value of OPTIONS for each name. ValueError otherwise."""
    suits: str = "black"
    layout: str = "row"
    scheme: str = "index"
    style: str = "plain"
    glyphs: str = "sans"
    table: str = "green"
    light: int = 100
    noise: int = 0
    tiles: int = 4

    def __post_init__(self):
        for name, known in OPTIONS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"A look needs {name} {_any_of(name)}, not {clean(str(getattr(self, name)))!r}.")

    def __str__(self):
        options = ((each.name, getattr(self, each.name), each.default) for each in fields(self)[1:] if self.suits != "text")
        return self.suits + "".join(f"/{name}={value}" for name, value, default in options if value != default)


def _any_of(name):
    known = OPTIONS[name]
    return f"from {known[0]} to {known[-1]}" if len(known) > 4 else "one of " + ", ".join(map(str, known))


@lru_cache(maxsize=1 << 12)
def parse_look(text):
    """Read a Look from its suits, then options in any order, such as "red/layout=grid/light=60"; str(look) undoes it.

    A Look passes through unchanged; "text" ignores its options. Any other text raises a ValueError that says what is wrong."""
    if isinstance(text, Look):
        return text
    suits, *options = text.split("/")
    found = {"suits": suits}
    for option in options:
        name, _, value = option.partition("=")
        if name not in OPTIONS or name in found:
            raise ValueError(f"{clean(text)!r} is not a look: after the suits only {', '.join(list(OPTIONS)[1:])} may follow, "
                             "each once, as in black/layout=grid.")
        found[name] = int(value) if isinstance(OPTIONS[name][0], int) and re.fullmatch("0|[1-9][0-9]{0,2}", value) else value
    return Look(**found)


def fill_look(text, rng):
    """Look text with its wildcards drawn: `*` for the suits or an option's value from all but text, `a|b` from those named.

    All of a list are read, so that a wrong one raises its ValueError at once and not when it happens to be drawn."""
    parts = str(text).split("/")
    for i, part in enumerate(parts):
        name, equals, value = part.rpartition("=")
        choices = [each for each in OPTIONS.get(name or "suits", ()) if each != "text"] if value == "*" else value.split("|")
        if len(choices) > 1:
            filled = [f"{name}{equals}{each}" for each in choices]
            for each in filled if value != "*" else ():
                parse_look(f"black/{each}" if i else each)
            parts[i] = rng.choice(filled)
    return "/".join(parts)


def _canvas(look, cards, tile):
    """The (width, height) in pixels of a picture, and of the place of each of so many cards in it."""
    columns, rows = (cards, 1) if look.layout == "row" else ((cards + 1) // 2, 2)
    across, down = (1, 1) if look.tiles == 1 else (4, 1) if look.layout == "row" else (2, 2)
    return (across * tile, down * tile), (across * tile / columns, down * tile / rows)


def legible_from(look, cards):
    """The smallest tile, in pixels, at which so many cards of a look can be read."""
    noise = 100 * look.noise / look.light
    need = 32 + 8 * (noise > 80) + 8 * (noise > 40 and look.scheme in ("words", "pips"))
    return ceil(need / min(_canvas(look, cards, 1)[1]))


# ---- 9. Pictures of cards --------------------------------------------------------------------------------------------
# Drawn two or four times too large and reduced, which smooths all edges. A card whose place is below LARGE pixels is another
# drawing: its rank fills it. A picture is a pure function of the problem: noise, places and angles come from its own stream.

LARGE = 100
FONTS = Path(__file__).parent / "assets" / "fonts"
# pyftsubset DejaVuSerif-Bold.ttf --text=ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 --layout-features= --no-hinting --name-IDs=0,1,2,13
TYPEFACES = {"serif": "DejaVuSerif-Bold.ttf", "mono": "DejaVuSansMono-Bold.ttf", "italic": "DejaVuSerifCondensed-BoldItalic.ttf"}
STYLE_COLOURS = {  # paper, edge, black ink, red ink
    "plain": ((255, 255, 255), (150, 150, 150), (20, 20, 26), (205, 18, 34)),
    "framed": ((250, 242, 222), (120, 96, 60), (22, 34, 84), (176, 26, 40)),
    "dark": ((40, 42, 52), (14, 14, 18), (236, 238, 244), (255, 112, 104))}
TABLE_COLOURS = {"green": (32, 104, 66), "blue": (36, 72, 128), "wood": (140, 92, 52), "grey": (128, 130, 134)}
PIPS = {  # heights of the signs in the two outer columns, and in the middle one
    1: ((), (1 / 2,)), 2: ((), (0, 1)), 3: ((), (0, 1 / 2, 1)), 4: ((0, 1), ()), 5: ((0, 1), (1 / 2,)), 6: ((0, 1 / 2, 1), ()),
    7: ((0, 1 / 2, 1), (1 / 4,)), 8: ((0, 1 / 2, 1), (1 / 4, 3 / 4)), 9: ((0, 1 / 3, 2 / 3, 1), (1 / 2,)),
    10: ((0, 1 / 3, 2 / 3, 1), (1 / 6, 5 / 6)), 11: ((0, 1 / 3, 2 / 3, 1), (1 / 6, 1 / 2, 5 / 6)),
    12: ((0, 1 / 3, 2 / 3, 1), (0, 1 / 3, 2 / 3, 1)), 13: ((0, 1 / 4, 1 / 2, 3 / 4, 1), (0, 1 / 2, 1))}


def _arc(x, y, r):
    return [(x + r * cos(k * pi / 24), y + r * sin(k * pi / 24)) for k in range(48)]


def _heart():
    turns = [k * pi / 32 for k in range(64)]
    return [(.5 + .48 * sin(t) ** 3, .42 - (13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 32) for t in turns]


STEM = [(.5, .5), (.56, .8), (.72, .97), (.28, .97), (.44, .8)]
SUIT_SHAPES = {  # polygons in a square of side 1
    "H": [_heart()], "S": [[(x, .84 - .86 * (y - .04)) for x, y in _heart()], STEM],
    "D": [[(.5, .01), (.68, .27), (.89, .5), (.68, .73), (.5, .99), (.32, .73), (.11, .5), (.32, .27)]],
    "C": [_arc(.5, .25, .225), _arc(.25, .59, .225), _arc(.75, .59, .225), _arc(.5, .5, .12), STEM]}

GOLD, SKIN, HAIR, DARK = (228, 176, 60), (248, 218, 188), (126, 78, 44), (30, 24, 24)
FACE = [(SKIN, _arc(.5, .47, .145)), (DARK, _arc(.44, .46, .018)), (DARK, _arc(.56, .46, .018)),
        ((170, 60, 60), [(.46, .545), (.54, .545), (.5, .565)])]
ROBE = [(None, [(0, 1), (0, .88), (.28, .68), (.72, .68), (1, .88), (1, 1)]),
        (GOLD, [(.28, .68), (.4, .64), (.5, .84), (.6, .64), (.72, .68), (.5, 1)])]
FIGURES = {  # the upper half of J, Q and K: polygons in a square of side 1, in a colour or (None) in the card's ink
    11: [(HAIR, [(.31, .36), (.69, .36), (.71, .62), (.62, .66), (.38, .66), (.29, .62)]), *ROBE, *FACE,
         (None, [(.29, .37), (.25, .22), (.5, .13), (.76, .2), (.71, .37)]),
         (GOLD, [(.66, .3), (.8, .06), (.93, .05), (.9, .17), (.72, .33)])],
    12: [(HAIR, _arc(.5, .46, .22)), (HAIR, [(.28, .46), (.72, .46), (.78, .74), (.22, .74)]), *ROBE, *FACE,
         (GOLD, [(.33, .35), (.28, .17), (.4, .24), (.5, .1), (.6, .24), (.72, .17), (.67, .35)]),
         *((None, _arc(x, y, .035)) for x, y in ((.28, .15), (.5, .08), (.72, .15)))],
    13: [(HAIR, _arc(.5, .47, .19)), *ROBE, *FACE,
         (HAIR, [(.35, .5), (.44, .56), (.5, .54), (.56, .56), (.65, .5), (.6, .7), (.5, .78), (.4, .7)]),
         (GOLD, [(.32, .36), (.28, .12), (.4, .22), (.44, .08), (.56, .08), (.6, .22), (.72, .12), (.68, .36)]),
         (None, [(.32, .36), (.31, .3), (.69, .3), (.68, .36)]), (None, [(.48, .08), (.48, 0), (.52, 0), (.52, .08)])]}


def picture(hand, look, tile, stream):
    """A hand as an RGB image of a Look, its sides multiples of `tile` pixels; what is random comes from `stream`, a text."""
    rng = random.Random(stream)
    noise_seed, (size, place) = rng.getrandbits(64), _canvas(look, len(hand), tile)
    dealt, columns = _shown(hand, look.suits), round(size[0] / place[0])
    cards = list(dealt)
    while look.layout == "shuffled" and cards == dealt:
        rng.shuffle(cards)
    image = _table(look.table, *size).copy()
    for k, card in enumerate(cards):
        _lay(image, card, look, place, (k % columns, k // columns), rng)
    if look.light != 100:
        image = image.point([min(255, round(level * look.light / 100)) for level in range(256)] * 3)
    return _noisy(image, look.noise, noise_seed) if look.noise else image


def _lay(image, card, look, place, at, rng):
    """Put a card in the middle of its place, or anywhere in it if scattered: the place `at` (column, row), of `place` pixels."""
    scattered = look.layout == "scattered"
    draw, share = _small_card if min(place) < LARGE else _large_card, .84 if scattered else 1
    width = share * min(.84 * place[0], place[1] if draw is _small_card else .63 * place[1])
    height = min(1.4 * width, .94 * share * place[1])
    angle = rng.choice(ANGLES) if scattered else 0
    sprite = draw(*card, round(width), round(height), look.scheme, look.style, look.glyphs, angle)
    shares = [rng.random() if scattered else .5 for _ in range(2)]
    corner = (round(n * room + (room - side) * share) for n, room, side, share in zip(at, place, sprite.size, shares))
    image.paste(sprite, tuple(corner), sprite)


ANGLES = (-10, -4, 4, 10)  # degrees: few, so that most cards have been drawn before


def _noisy(image, deviation, seed):
    start, count = seed % GRAIN, image.width * image.height
    grain = Image.frombytes("L", image.size, _grain(count)[start:start + count])
    grain = grain.point([max(0, min(255, round(128 + (level - 128) / 30 * deviation))) for level in range(256)])
    return ImageChops.add(image, Image.merge("RGB", [grain] * 3), offset=-128)


GRAIN = 1 << 20


@lru_cache(maxsize=4)
def _grain(count):
    """Normal noise as bytes, mean 128, deviation 30. Any `count` in a row serve a picture, as new ones would take long."""
    noise = np.random.default_rng(0).standard_normal(count + GRAIN, np.float32)
    return (noise * 30 + 128.5).clip(0, 255).astype(np.uint8).tobytes()


def _shown(hand, suits):
    """The cards of a picture. In one colour S and H are its one suit, C and D the other, but no card is shown twice."""
    if suits == "both":
        return list(hand)
    pair, shown = {"black": "SC", "red": "HD"}[suits], []
    for rank, suit in hand:
        first = pair[suit in "CD"]
        shown.append((rank, first if (rank, first) not in shown else pair[suit not in "CD"]))
    return shown


@lru_cache(maxsize=8)
def _table(name, width, height):
    """The background as an RGB image: one colour, and for wood some boards with a grain."""
    if name != "wood":
        return Image.new("RGB", (width, height), TABLE_COLOURS[name])
    x, y = np.meshgrid(np.linspace(0, 2, width), np.linspace(0, 6, height))
    board = np.floor(y)
    shade = 1 + .05 * np.sin(13 * y + 3 * np.sin(2 * x + board)) + .05 * np.sin(7 * board) - .2 * (y - board < 9 / height)
    return Image.fromarray((shade[..., None] * TABLE_COLOURS[name]).astype(np.uint8))


def _card(paint, scale, rank, suit, width, height, scheme, style, glyphs, angle):
    """One card with its shadow as an RGBA image, `width` x `height` pixels before it is turned by an angle in degrees."""
    paper, edge, *inks = STYLE_COLOURS[style]
    face = Image.new("RGB", (width * scale, height * scale), paper)
    paint(face, rank, suit, inks[suit in "HD"], scheme, glyphs)
    outline, shape = Image.new("L", face.size), dict(xy=(0, 0, face.width - 1, face.height - 1), radius=.09 * face.width)
    ImageDraw.Draw(outline).rounded_rectangle(**shape, fill=255)
    line = max(scale, round(.025 * face.width)) if style == "framed" else scale
    ImageDraw.Draw(face).rounded_rectangle(**shape, outline=edge, width=line)
    margin = max(2, round(.03 * height)) * scale
    card = Image.new("RGBA", (face.width + 2 * margin, face.height + 2 * margin), (0, 0, 0, 0))
    card.putalpha(_shadow(outline, margin).resize(card.size))
    card.paste(face, (margin, margin), outline)
    return (card.rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else card).reduce(scale)


def _shadow(outline, margin):
    """The shadow of a card and its margin as a mask, at a quarter of their size, where it is blurred sooner."""
    shadow = Image.new("L", ((outline.width + 2 * margin) // 4, (outline.height + 2 * margin) // 4))
    shadow.paste(130, (margin // 4, margin // 3), outline.reduce(4))
    return shadow.filter(ImageFilter.GaussianBlur(margin / 16))


def _stamp(face, mask, ink, x, y, turned=False):
    """Paint a mask in ink with its centre at (x, y), in shares of the card; turned: upside down."""
    mask = mask.transpose(Image.Transpose.ROTATE_180) if turned else mask
    face.paste(ink, (round(x * face.width - mask.width / 2), round(y * face.height - mask.height / 2)), mask)


def _twice(face, mask, ink, x, y):
    _stamp(face, mask, ink, x, y)
    _stamp(face, mask, ink, 1 - x, 1 - y, turned=True)


def _sign(suit, size):
    """A suit sign as a mask of size x size pixels."""
    mask = Image.new("L", (round(size), round(size)))
    for shape in SUIT_SHAPES[suit]:
        ImageDraw.Draw(mask).polygon([(x * size, y * size) for x, y in shape], 255)
    return mask


def _label(text, glyphs, width, height):
    """Capitals and digits as a mask, all `height` pixels tall, narrowed to `width` where they are wider."""
    font, stroke = _font(glyphs, round(height * 1.37)), height / 18 if glyphs == "sans" else 0  # pillow's own typeface is thin
    left, top, right, bottom = font.getbbox(text, anchor="ls", stroke_width=stroke)
    mask = Image.new("L", (ceil(right - left), ceil(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, "ls", stroke_width=stroke)
    return mask.resize((min(round(width), mask.width), round(height)))


@lru_cache(maxsize=64)
def _font(glyphs, size):
    return ImageFont.truetype(FONTS / TYPEFACES[glyphs], size) if glyphs in TYPEFACES else ImageFont.load_default(size)


def _name(rank, scheme):
    return WORDS[rank - 1] if scheme == "words" else str(rank) if scheme == "numbers" and rank > 10 else RANKS[rank - 1]


def _small_face(face, rank, suit, ink, scheme, glyphs):
    """A card for a place of 32 pixels: the rank as large as it can be, the suit below it; or signs only."""
    width, height = face.size
    if scheme == "pips":
        return _pips(face, rank, suit, ink, .19 * height, .21, .14)
    tall = .34 if scheme == "words" else .5
    _stamp(face, _label(_name(rank, scheme), glyphs, .88 * width, tall * height), ink, .5, .34)
    _stamp(face, _sign(suit, .3 * height), ink, .5, .8)


def _pips(face, rank, suit, ink, size, left, top):
    """As many suit signs as the rank, the outer ones at `left` and `top` in shares of the card, the lower ones upside down."""
    sides, middle = PIPS[rank]
    for x, heights in ((left, sides), (1 - left, sides), (.5, middle)):
        for y in heights:
            _stamp(face, _sign(suit, size), ink, x, top + (1 - 2 * top) * y, turned=y > .5)


def _large_face(face, rank, suit, ink, scheme, glyphs):
    """A card as from a real pack: indices in two corners, signs in the classic places, a framed figure for J, Q and K."""
    width, height = face.size
    if scheme == "pips":
        return _pips(face, rank, suit, ink, .18 * width, .22, .13)
    if scheme == "words":
        _stamp(face, _label(_name(rank, scheme), glyphs, .84 * width, .13 * height), ink, .5, .5)
        return _twice(face, _sign(suit, .26 * width), ink, .5, .2)
    _twice(face, _label(_name(rank, scheme), glyphs, .15 * width, .105 * height), ink, .11, .095)
    _twice(face, _sign(suit, .125 * width), ink, .11, .205)
    if rank <= 10:
        return _pips(face, rank, suit, ink, .185 * width * (1 + (rank == 1)), .32, .16)
    if scheme == "numbers":
        return _framed(face, (), _label(str(rank), glyphs, .4 * width, .2 * height), (.5, .5), ink)
    _framed(face, FIGURES[rank], _sign(suit, .12 * width), (.14, .14), ink)


def _framed(face, figure, mask, at, ink):
    """A frame with a figure and a mask at (x, y) of its upper half, and the same upside down in the lower one."""
    width, height = round(.58 * face.width), round(.37 * face.height)
    half = Image.new("RGB", (width, height), face.getpixel((face.width // 2, face.height // 2)))
    for colour, points in figure:
        ImageDraw.Draw(half).polygon([(x * width, y * height) for x, y in points], colour or ink)
    _stamp(half, mask, ink, *at)
    left, top = (face.width - width) // 2, face.height // 2 - height
    face.paste(half, (left, top))
    face.paste(half.transpose(Image.Transpose.ROTATE_180), (left, top + height))
    ImageDraw.Draw(face).rectangle((left, top, left + width, top + 2 * height), None, ink, max(1, face.width // 120))


_small_card = lru_cache(maxsize=4096)(partial(_card, _small_face, 4))  # at most 30 KB each
_large_card = lru_cache(maxsize=256)(partial(_card, _large_face, 2))  # at most a MB each in a picture of 1,120 x 1,120 pixels


# ---- 10. The problem -------------------------------------------------------------------------------------------------

KINDS = ("expert", "careful", "careless", "lazy", "inattentive", "retry")  # demonstrators of the base stage, see GeneralPoints.demonstrate

class Row(NamedTuple):
    """One test of a suite: its name, the rule of the prompt, the rule of the judge where it is another, the look of the cards."""
    name: str
    rule: str
    judge: str | None = None
    visual: str | None = None

    def legible(self, tile):
        """Whether its pictures, if it has any, can be read at tiles of so many pixels."""
        look = self.visual and parse_look(fill_look(self.visual, random.Random(0)))
        return look in (None, Look("text")) or legible_from(look, parse_rule(self.rule).cards) <= tile


# The gap between the rows is the study's result.
PROBES = [                                    # further away, one change from the trained rule each
    Row("faces-5", "5"),                      # faces as numbers that other cards have too
    Row("faces-7", "7"),
    Row("faces-12", "12"),                    # faces as one number that no card of the trained rule has
    Row("five-cards", "10/cards=5"),
    Row("target-36", "10/target=36"),
]
SUITES = {
    "gp-l": [
        Row("id", ID_RULE),                   # the rule that was trained
        Row("rule", OOD_RULE),                # the same hands under the rule that was not
        Row("fake", OOD_RULE, ID_RULE),       # told the new rule, judged by the old: high where the old rule was memorized,
    ],                                        # low where arithmetic was lost
    "gp-l-probes": PROBES,
    "gp-vl": [
        Row("id", ID_RULE, visual="black"),   # the rule and the look that were trained
        Row("rule", OOD_RULE, visual="black"),
        Row("fake", OOD_RULE, ID_RULE, "black"),
        Row("red", ID_RULE, visual="red"),    # the paper's change of look: only ink and suits
        *(Row(name, ID_RULE, visual="black/" + look) for name, look in (
            ("grid", "layout=grid"), ("scattered", "layout=scattered"), ("serif", "glyphs=serif"), ("dark", "style=dark"),
            ("dim", "light=50/noise=15"), ("numbers", "scheme=numbers"), ("words", "scheme=words"), ("pips", "scheme=pips"))),
        Row("shuffled", ID_RULE, visual="black"),  # the control: every hand beside the picture of another one
        Row("text", ID_RULE, visual="text"),  # the same hands in words: the difference to "id" is the cost of seeing
    ],
    "gp-vl-probes": [
        *(row._replace(visual="black") for row in PROBES),
        Row("mixed", ID_RULE, visual="*/layout=*/scheme=*/style=*/glyphs=*/table=*/light=50|75|100|125/noise=0|8|15"),
        Row("rule-red", OOD_RULE, visual="red"),
    ],
}


class GeneralPoints:
    """One problem, for one episode. Attributes: hand, rule, numbers (values under the rule), cls (the class, which groups hands for
    intervals), look (a Look; None in text), image, prompt, attempts, attempt (answers judged so far), verdict (the latest), done.

    A picture is `tile` pixels a tile; what is random about it comes from `stream`, a text."""

    def __init__(self, hand, rule, attempts, style, judged_by, look=None, tile=32, stream=""):
        self.hand, self.rule, self.attempts, self.style, self.judged_by = hand, rule, attempts, style, judged_by
        self.look, self.tile, self.stream, self._image = look, tile, stream, None
        self.numbers, self.cls = values(hand, rule), problem_class([rank for rank, _ in hand], rule.target)
        self.prompt = short_prompt(hand, rule, look) if style == "short" else full_prompt(hand, rule, look)
        self.attempt, self.verdict, self.done = 0, None, False

    @property
    def image(self):
        """The hand as an RGB picture, None in text. Drawn when first asked for, then kept, in copies of the problem too."""
        if self.look and self._image is None:
            self._image = picture(self.hand, self.look, self.tile, self.stream)
        return self._image

    @image.setter
    def image(self, picture):  # for controls: the picture of another hand
        self._image = picture

    def step(self, response):
        """Judge the next answer. Done when it is right or `attempts` are used up; a RuntimeError after that."""
        if self.done:
            raise RuntimeError("This episode is over: make the problem anew.")
        self.verdict = judge(response, self.hand, self.judged_by)
        self.attempt += 1
        right, last = self.verdict.outcome == "correct", self.attempt == self.attempts
        self.done = right or last
        reward = REWARD[self.verdict.outcome] + (LAST_ATTEMPT if last and not right else 0)
        feedback = feedback_text(self.verdict, self.style)
        if self.look and self.verdict.read < 1:
            reward, feedback = reward + MISREAD, feedback + MISREAD_TEXT[self.style]
        return Step(float(reward), self.done, feedback, self.verdict.outcome, self.verdict.read)

    def expert(self, rng=None):
        """A right response by the rule of the prompt: the simplest solution, or with rng (random.Random) a random one of them.

        For five and six cards it is always the one that the solver finds first."""
        return self._response(self.rule, self._solution(self.rule, rng))

    def demonstrate(self, kind, rng):
        """What a demonstrator of the base stage writes: response, feedback, response, ... (list of str).

        "expert": the simplest right answer, always the same. "careful": any right answer. "careless": the right numbers in a formula of
        another value. "lazy": where the first card is above 7, no list of numbers and just their sum; else the expert.
        "inattentive": face cards taken by ID_RULE or by OOD_RULE, whatever the prompt says (the expert where that has no solution).
        "retry": the sum and, unless that is right, the verifier's text and the expert. ValueError for other kinds."""
        if kind in ("expert", "careful"):
            return [self.expert(rng if kind == "careful" else None)]
        if kind == "careless":
            return [self._careless(self.rule, rng)]
        if kind == "lazy":
            return [self._sum() if self.hand[0][0] > 7 else self.expert()]
        if kind == "inattentive":
            taken = replace(self.rule, faces=parse_rule(rng.choice((ID_RULE, OOD_RULE))).faces)
            formula = self._solution(taken, None)
            return [self._response(taken, formula) if formula else self.expert()]
        if kind == "retry":
            slip = self._sum()
            feedback = feedback_text(judge(slip, self.hand, self.rule), self.style)
            return [slip] if sum(self.numbers) == self.rule.target else [slip, feedback, self.expert()]
        raise ValueError(f"Unknown demonstrator {kind!r}: choose one of {', '.join(KINDS)}.")

    def _sum(self):
        return json.dumps({"cards": rank_names(self.hand), "formula": "+".join(map(str, self.numbers))})

    def _solution(self, rule, rng):
        numbers = values(self.hand, rule)
        if rule.cards > 4:
            return solve(numbers, rule.target)
        found = solutions(numbers, rule.target)
        return (rng.choice(found) if rng else found[0]) if found else None

    def _careless(self, rule, rng):
        """Random operations until the value is not the target (there is always another: turn a + into a -)."""
        while True:
            parts = [_number(n) for n in values(self.hand, rule)]
            while len(parts) > 1:
                left, right = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
                if left.value[0] * right.value[1] < right.value[0] * left.value[1]:
                    left, right = right, left  # the larger first, as in the solver: nothing negative
                parts.append(_join(rng.choice("++--**/" if right.value[0] else "+-*"), left, right))
            if parts[0].value != (rule.target, 1):
                return self._response(rule, parts[0].text)

    def _response(self, rule, formula):
        return json.dumps({"cards": rank_names(self.hand), "number": values(self.hand, rule), "formula": formula})


def short_prompt(hand, rule, look=None):
    """Few tokens, for the tiny model: `K 7 2 A, JQK=11,12,13, make 24`; with a Look, the cards are in a picture instead."""
    cards = "" if look else " ".join(rank_names(hand)) + ", "
    return f"{cards}JQK={','.join(map(str, rule.faces))}, make {rule.target}"


def full_prompt(hand, rule, look=None):
    """Plain words, for an instruct model; with a Look, the cards are in a picture instead."""
    jack, queen, king = rule.faces
    alike = jack == queen == king
    faces = f"J, Q and K each count as {jack}" if alike else f"J counts as {jack}, Q counts as {queen} and K counts as {king}"
    count, names, order = f"{len(hand)} playing cards", json.dumps(rank_names(hand)), "in the picture" if look else "as dealt"
    dealt = f"The picture shows {count}. {SHOWN[look.scheme]}" if look else f"You are dealt {count}: {names}. "
    return (f"{dealt}{faces}. A counts as 1, and every other card "
            f"counts as the number on it.\nFind a formula that equals {rule.target}. It must use the value of each card exactly once "
            "and no other number. You may use +, -, *, / and round brackets.\nReply with one JSON object and nothing else, with these "
            f'keys: "cards", the list of the cards {order}; "number", the list of their values in the same order; "formula", '
            "your formula as a string.")


SHOWN = {"index": "", "numbers": "The numbers 11, 12 and 13 stand for J, Q and K. ",
         "words": "Their names are written as words: ACE is A, JACK is J, QUEEN is Q and KING is K. ",
         "pips": "Each shows as many signs as its number: one is A, and 11, 12 and 13 are J, Q and K. "}
TASKS = ("gp-l", "gp-vl")


def pictures(name):
    """Whether a task or suite shows pictures."""
    return name.removesuffix("-probes").endswith("-vl")


def make(name, rule=ID_RULE, visual=None, split="train", index=0, attempts=1, style="full", judge=None, seed=0, tile=32):
    """Make the problem (name, rule, visual, split, index): these five give the same problem on every machine.

    rule: a text for fill_rule and parse_rule; wildcards are drawn anew for every index. visual: for "gp-vl", a text for fill_look
    and parse_look (None: "black"), drawn likewise. judge: the face values that answers are judged by where they are not the
    prompt's (the "fake rule" control); target and cards are always the prompt's, and the expert follows the prompt. index counts
    from 0; the run's `seed` shifts it for "base" and "train" only. attempts: answers per episode. tile: the size of the model's
    image tiles in pixels, for pictures. ValueError, in one sentence, for anything unknown or out of range."""
    if name not in TASKS:
        raise ValueError(f"Unknown task {name!r}: choose one of {', '.join(TASKS)}.")
    for value, known in ((split, SPLITS), (style, STYLES)):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}.")
    if index < 0 or seed < 0 or attempts < 1:
        raise ValueError("The index and the seed must be 0 or more, the attempts 1 or more.")
    index += seed * 10**9 if split in ("base", "train") else 0
    return _general_points(name, rule, visual, split, index, attempts, style, judge, tile)


def _general_points(name, rule, visual, split, index, attempts, style, judge, tile):
    if name == "gp-l" and visual is not None:
        raise ValueError(f"{name} is a task in text and has no visual {visual!r}.")
    rule = parse_rule(fill_rule(rule, random.Random(f"gp/{split}/{index}/rule")))
    look = None if name == "gp-l" else parse_look(fill_look(visual or "black", random.Random(f"gp/{split}/{index}/look")))
    if look and look.suits != "text" and tile < (smallest := legible_from(look, rule.cards)):
        raise ValueError(f"{rule.cards} cards of the look {str(look)!r} need tiles of at least {smallest} pixels, not {tile}.")
    hand, rule = deal(rule, split, index, 2 if look else 4)
    judged_by = replace(rule, faces=parse_rule(judge or rule).faces)
    look = None if look and look.suits == "text" else look
    return GeneralPoints(hand, rule, attempts, style, judged_by, look, tile, f"gp/{split}/{index}/picture")


# ---- 11. Command line ------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Command line that shows problems."""
    parser = argparse.ArgumentParser(description="Show problems as a model sees them, and judge answers.")
    which = parser.add_argument_group("which problems")
    which.add_argument("--task", default="gp-l", help=f"one of: {', '.join(TASKS)} (default %(default)s)")
    which.add_argument("--rule", default=ID_RULE, help="what J, Q, K count as: 10 or 11,12,13, * or ? for any of 1..13 or "
                       f"10..13; then /target=N or * (any of {TARGETS[0]}..{TARGETS[1]}) /cards=N /courts=N (at least N face cards). Not "
                       "named: 24 and 4 cards (default 10)")
    which.add_argument("--split", default="test", help=f"{', '.join(SPLITS[:-1])} or test (default test)")
    which.add_argument("--index", type=int, default=0, help="the first problem's index (default 0)")
    which.add_argument("--n", type=int, default=3, help="number of problems (default 3)")
    which.add_argument("--seed", type=int, default=0, help="shifts the training problems (default 0)")
    which.add_argument("--style", default="full", help="full or short prompts and feedback (default full)")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--visual", metavar="LOOK", help="what the cards look like, such as red/layout=grid/light=60, * for "
                          "any value, a|b for one of some (default black): "
                          + "; ".join(f"{name} {_any_of(name)}" for name in OPTIONS))
    pictures.add_argument("--tile", type=int, default=560, help="size of the model's image tiles in pixels (default 560)")
    pictures.add_argument("--show", metavar="FILE", help="draw the problems on one sheet, without --visual in many looks")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--answer", metavar="TEXT", help="judge this response (JSON) to the first problem")
    answers.add_argument("--ask", action="store_true", help="ask for answers, as is done at a terminal anyway")
    answers.add_argument("--attempts", type=int, default=1, help="answers per problem (default 1)")
    return parser.parse_args(argv)


def main(args):
    """Print the problems, ask for answers where asked to, and return the list of Steps that were judged."""
    if args.n < 1:
        raise ValueError("The number of problems must be 1 or more.")
    if args.show:
        try:
            contact_sheet(args).save(args.show)
        except OSError as error:
            raise ValueError(f"--show {clean(args.show)} could not be written ({error.strerror}): name a PNG file in a directory "
                             "that is there.") from None
        return []
    steps = []
    for index in range(args.index, args.index + args.n):
        problem = _problem(args, index, args.visual)
        look = f" | look {problem.look}" if problem.look else ""
        _say(f"--- {args.task} | rule {problem.rule} | {args.split} {index} | class {problem.cls}{look}\n{problem.prompt}\n")
        if args.answer is not None:
            steps += [_judged(problem, args.answer)] if index == args.index else []
        elif args.ask or sys.stdin.isatty():
            steps += _asked(problem)
        _say(f"Expert: {problem.expert()}")
        if len(problem.hand) <= 4:
            _say(f"Distinct solutions: {len(solutions(problem.numbers, problem.rule.target))}")
        _say("")
    return steps


def _problem(args, index, visual):
    return make(args.task, args.rule, visual, args.split, index, args.attempts, args.style, seed=args.seed, tile=args.tile)


MIXED = ("both/layout=shuffled/scheme=numbers/style=framed/table=wood", "both/layout=scattered/style=dark/glyphs=mono/table=grey",
         "both/layout=scattered/glyphs=italic/table=blue/light=130/noise=25", "both/tiles=1/layout=grid/style=framed")


def contact_sheet(args):
    """Problems in --visual, or in each look of the suite and of MIXED: a row for each, twice as long for square pictures."""
    if args.task != "gp-vl" or args.visual == "text":
        raise ValueError("--show draws pictures: choose --task gp-vl, and a look that is not text.")
    cards = parse_rule(fill_rule(args.rule, random.Random(0))).cards
    known = dict.fromkeys([*(row.visual for row in SUITES["gp-vl"] if row.visual != "text"), *MIXED])
    legible = [look for look in known if legible_from(parse_look(look), cards) <= args.tile]
    looks = [args.visual] if args.visual else legible or ["black"]  # where none is, make says how large a tile must be
    rows = []
    for look in looks:
        wide = parse_look(fill_look(look, random.Random(0))).layout == "row"
        rows.append(_sheet_row(look, [_problem(args, args.index + i, look) for i in range(args.n * (1 if wide else 2))]))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:i])))
    return sheet.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def _sheet_row(look, problems):
    """A row of a sheet: the look's text, and pictures with their hands in words below, enlarged by a whole factor or reduced."""
    font, zoom = ImageFont.load_default(15), min(400 / problems[0].image.width, 192 / problems[0].image.height)
    width, height = (round(side * (int(zoom) if zoom > 1 else zoom)) for side in problems[0].image.size)
    step, method = max(width, 192) + 12, Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.LANCZOS
    row = Image.new("RGB", (step * len(problems) + 12, height + 60), "white")
    draw = ImageDraw.Draw(row)
    draw.text((12, 10), look, "black", font)
    for i, problem in enumerate(problems):
        row.paste(problem.image.resize((width, height), method), (12 + i * step, 32))
        draw.text((12 + i * step, height + 36), " ".join(WORDS[rank - 1].lower() for rank, _ in problem.hand), (90, 90, 90), font)
    return row


def _asked(problem):
    steps = []
    while not problem.done:
        try:
            line = input("Your formula, or a whole response: ")
        except EOFError:
            break
        steps.append(_judged(problem, line if "{" in line else json.dumps({"formula": line})))
    return steps


def _judged(problem, response):
    step = problem.step(response)
    _say(f"Verdict: {step.outcome}, reward {step.reward:+g}. {step.feedback}\n")
    return step


def _say(text):
    """Print line by line without control characters, and without an error where the terminal cannot show a character."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in text.split("\n"):
        print(clean(line, len(line)).encode(encoding, "replace").decode(encoding))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends this as any other tool, without a traceback
    try:
        main(parse_args())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
