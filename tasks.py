"""The tasks: what is asked, what an expert answers, and how an answer is judged.

GeneralPoints in text, "gp-l": some playing cards are dealt, and a formula that uses each card once must equal a target. The
rule says what J, Q and K count as. V-IRL in text, "virl-l": a walk through a city by instructions, one action at a time. The rule
says how a turn is called. Training sees one rule, the test asks for another, so memory and understanding part ways. In pictures,
"gp-vl" and "virl-vl": the cards, or the streets, have to be seen first, and the test changes their look too.

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
    6. Reading an answer     parse_answer (JSON and near-JSON), parse_formula: nothing is ever executed
    7. The verifier          judge, REWARD, FEEDBACK, read_share (the cards that were recognized)
    8. Looks                 Options (as text, with wildcards), Look, parse_look, fill_look, legible_from
    9. Pictures of cards     picture
    10. GeneralPoints        GeneralPoints
    11. V-IRL: a city        City: streets, fronts and landmarks; words for bearings and turns
    12. V-IRL: routes        Position, Route, routes
    13. V-IRL: words         TurnRule, WORDING, parse_action, judge_walk
    14. V-IRL: a walk        Navigation
    16. V-IRL: views         Scene, parse_scene, draw_grid (what the model sees), draw_map (a route for people)
    17. V-IRL: released data read_plain_pickle, released_routes, panorama_view
    18. Problems and suites  make, Row, SUITES
    19. Command line         python tasks.py --task gp-l

Protocol and rewards: Chu et al., "SFT Memorizes, RL Generalizes", arXiv 2501.17161. We differ where the released code is weak:
exact rationals, a split by class, one outcome per answer, exactly `attempts` answers, and feedback that is true.
"""
import argparse
import copy
import hashlib
import io
import json
import math
import pickletools
import random
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import combinations, pairwise, product
from math import ceil, cos, gcd, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

ASSETS = Path(__file__).parent / "assets"


def _tuples(data):
    """What a JSON file holds, with tuples for its lists."""
    if isinstance(data, dict):
        return {key: _tuples(value) for key, value in data.items()}
    return tuple(map(_tuples, data)) if isinstance(data, list) else data


CARDS, VIRL = (_tuples(json.loads((ASSETS / name).read_text(encoding="utf-8"))) for name in ("cards.json", "virl.json"))


# ---- 0. What a task is -----------------------------------------------------------------------------------------------

class Step(NamedTuple):
    """What one answer brings: the reward, whether the episode is over, the verifier's text, and the outcome. "correct" solves the
    problem, "right_action" is right and leads on to the next question, every other outcome is wrong. `read` is the share (0 to 1)
    of what there is to see that the answer names rightly."""
    reward: float
    done: bool
    feedback: str
    outcome: str
    read: float = 0.0


def solved(outcomes: list[str], attempts: int | None = None) -> bool:
    """Whether one of the first `attempts` answers (None: any) of an episode was right. Right actions on the way to the last
    question are no attempts."""
    return "correct" in [outcome for outcome in outcomes if outcome != "right_action"][:attempts]


class Row(NamedTuple):
    """One test of a suite: its name, the rule of the prompt, the rule of the verifier where that is another one ("fake rule"),
    the visual of the pictures (None: the trained one)."""
    name: str
    rule: str
    judged_by: str | None = None
    visual: str | None = None


class Words(NamedTuple):
    """What tables and reports call a task's problems, its trained rule, its other rule and a class of problems; and the sentence
    about reading, with {} for a share."""
    things: str = "problems"
    trained: str = "the trained one"
    other: str = "another"
    alike: str = "problems of the same kind"
    read: str = "All is read in {} of the problems"


class Problem:
    """The protocol: what the class of a task has to have. One instance is one problem for one episode.

    A class of its own has to define `make`, `expert`, `step` and, on its instances, `prompt` (str, the first user turn) and `cls`
    (str: problems of one class are drawn together for an interval). It may define everything else below. `step` sets `done`.
    A *turn* is a dict of a judged answer: response, outcome, reward, feedback, read, and position where `leads_on`."""
    image = None        # the picture beside the prompt or the latest feedback (PIL), None in text
    rule = None         # the prompt's rule
    attempts = 1        # answers per question
    done = False        # whether the episode is over
    position = 0        # which question is open
    leads_on = False    # whether a right answer leads to another question; then there is `advance`
    DEMONSTRATORS = {"expert": lambda problem, rng: [problem.expert()]}  # name: function -> [response, feedback, response, ...]
    SCORES = {"first": "first attempt", "episode": "whole episode", "read": "read rightly"}  # name: title in tables
    WORDS = Words()

    @classmethod
    def make(cls, *, rule, visual, split, index, attempts, style, judged_by, tile, data) -> "Problem":
        """The problem of these names (see the function `make`); visual is None in text, judged_by where it is the rule."""
        raise NotImplementedError

    @classmethod
    def legible(cls, row: Row, tile: int) -> bool:
        """Whether a row's pictures, if it has any, can be read at tiles of so many pixels."""
        return True

    def expert(self) -> str:
        """A right response to the open question, by the rule of the prompt."""
        raise NotImplementedError

    def step(self, response: str) -> Step:
        """Judge the next answer to the open question. RuntimeError where the episode is over."""
        raise NotImplementedError

    def advance(self) -> tuple[str, Step]:
        """Move on by the expert's response, whatever rule answers are judged by: (response, its Step)."""
        raise NotImplementedError

    def demonstrate(self, kind: str, rng: random.Random) -> list[str]:
        """What the demonstrator `kind` writes: [response, feedback, response, ...]. ValueError for an unknown one."""
        if kind not in self.DEMONSTRATORS:
            raise ValueError(f"Unknown demonstrator {kind!r}: choose one of {', '.join(self.DEMONSTRATORS)}.")
        return self.DEMONSTRATORS[kind](self, rng)

    def scores(self, turns: list[dict], forced: list[dict] | None = None) -> dict:
        """The SCORES of an episode, each from 0 to 1; `forced` are the turns of its teacher-forced twin, where `leads_on`."""
        outcomes = [turn["outcome"] for turn in turns]
        read = round(turns[0]["read"], 4)
        return {"first": int(solved(outcomes, 1)), "episode": int(solved(outcomes)), "read": read}

    def figures(self, turns: list[dict]) -> dict:
        """What a report shows of an episode: {"picture": image} or {"pictures": [image, ...], "map": image}, or part of it."""
        return {} if self.image is None else {"picture": self.image}

    @classmethod
    def parsed(cls, response: str) -> list[tuple[str, str]]:
        """What a report says of a response, as (label, text)."""
        return []


# ---- 1. Cards and rules ----------------------------------------------------------------------------------------------

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
DECK = tuple((rank, suit) for suit in "SHDC" for rank in range(1, 14))  # a card is (rank 1..13, suit)
ID_RULE, OOD_RULE = "10", "11,12,13"


@dataclass(frozen=True)
class Rule:
    """What counts as right: `faces` are the values of J, Q and K (1..99), `target` 1..999 (0, written `*`: drawn from TARGETS
    with every hand), `cards` 3..6; and `courts`, at least how many face cards are dealt. ValueError otherwise."""
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
    """Read a Rule from "10" (J, Q and K alike) or "11,12,13", then "/target=36" or "/target=*", "/cards=5" and "/courts=2" in
    any order; str() undoes it, a Rule passes through. Any other text is a ValueError that says what is wrong."""
    if isinstance(text, Rule):
        return text
    faces, *options = text.split("/")
    found = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in ("target", "cards", "courts") or name in found:
            raise ValueError(f"{text[:60]!r} is not a rule: after the faces only /target=N, /cards=N and /courts=N may follow, "
                             "each once.")
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


# ---- 3. Formulas -----------------------------------------------------------------------------------------------------

class Formula(NamedTuple):
    """A formula in the one notation used here: sums and products are flat lists, so a-(b-c) and a+c-b are one formula.

    `ups` are added (multiplied), `downs` subtracted (divided by); each is sorted, larger values first. `kind` is "+" for a sum,
    "*" for a product, "" for a number. Texts are equal just where formulas are, up to commutativity and associativity."""
    value: tuple
    text: str
    kind: str = ""
    ups: tuple = ()
    downs: tuple = ()


def join_formulas(op, left, right):
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
    # What must be worked out comes first, so that its value is there when the rest is chosen; then the larger.
    return part.kind == "", -part.value[0] / part.value[1], part.text  # the float only sorts: equal values give equal floats


def _bracketed(part):
    return f"({part.text})" if part.kind == "+" else part.text  # only a product can have a sum as its part


# ---- 4. Solver -------------------------------------------------------------------------------------------------------
# No partial result is ever negative: (7-13)*(2-6) is (13-7)*(6-2) with two signs flipped, and any formula of a positive value
# can be turned so. That halves the search, and keeps the unary minus and its look-alikes out of the experts' answers.

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

    Meet in the middle: one side of the top operation is enumerated, the partner it needs is looked up. Values are listed for up
    to `depth` numbers (two fewer than the hand): a list for the largest part would cost more than all the others."""
    if len(numbers) == 1:
        if target == (numbers[0], 1):
            yield Formula(target, str(numbers[0]))
        return
    for few, many in _splits(numbers):
        listed = _reachable(many) if len(many) <= depth else None
        for x in _reachable(few):
            for op, y, y_first in _partners(x, target):
                if listed is not None and y not in listed:
                    continue
                for right in _formulas(many, y, depth):
                    for left in _formulas(few, x, depth):
                        yield join_formulas(op, right, left) if y_first else join_formulas(op, left, right)


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
    # few brackets first, then few - and /, then by the text itself, so that the order is the same everywhere
    return tuple(sorted(texts, key=lambda text: (text.count("("), text.count("-") + text.count("/"), text)))


# ---- 5. Splits and deals ---------------------------------------------------------------------------------------------
# A split by ranks would leak: K 7 2 A and Q 7 2 A are one problem under J=Q=K=10. So whole classes are held out, their hands
# from every stage and every rule, their numbers from all but "base", which stands in for pretraining (under J=3 it may show
# J-10-2-A as 3-10-2-A, the numbers of 3-K-2-A). A class is numbers and target: 1-2-7-10=24 may be held out and 1-2-7-10=25
# trained. A face card and a solution under both rules is a lot to ask: of the classes of four cards that make 24, 57 are left
# for test, 15 for val.

SPLITS = ("base", "train", "val", "test")
TRIES = 10_000


def problem_class(numbers, target):
    """What a problem is whatever cards it came from: its numbers, sorted, those above 10 as 10, and its target: "1-2-7-10=24".

    By its ranks a hand has one class under every rule; by its values under ID_RULE and OOD_RULE it has that class too, by those
    under another rule (J=3) it may have a second one, and `deal` looks at both (for "base" at the first)."""
    return "-".join(map(str, sorted(min(n, 10) for n in numbers))) + f"={target}"


@lru_cache(maxsize=1 << 16)
def split_of(cls):
    """The split a class belongs to: train (60 %), val (10 %) or test (30 %), by a hash that is the same on every machine."""
    percent = int.from_bytes(hashlib.sha256(f"gp/{cls}".encode()).digest()[:8], "big") % 100
    return "train" if percent < 60 else "val" if percent < 70 else "test"


def deal(rule, split, index, suits=4):
    """(hand, rule with its target): the first of the index's stream of hands, dealt without replacement, and of targets, where
    the rule leaves them open, that fits the split and the rule. ValueError when TRIES deals bring none.

    "train" and "base": solvable under the rule. "val" and "test": at least one face card, and solvable under the rule and under
    ID_RULE and OOD_RULE faces, so these two rules are tested on the same hands; for a third rule they may differ. Except in
    "base", no face value turns a hand of train into the numbers of a held-out class, or the reverse (J=3 would make J-7-2-A a
    3-7-2-A). No rank is dealt more than `suits` times: a picture in one colour has two suits."""
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
# Bound first, then read; the text is never executed or evaluated. One reader takes JSON and what a person would still call
# JSON: text or a ```json fence around the object, single quotes, bare words, a trailing comma. Numbers stay text, so 1e999, NaN
# or five thousand digits do no harm. Tokens are matched once and counted (six cards need 36), so the time is short.

MAX_RESPONSE, MAX_TOKENS, MAX_FORMULA, MAX_NUMBERS, MAX_DIGITS, MAX_DEPTH = 4000, 100, 200, 16, 4, 16
JSON_TOKEN = re.compile(r"""\s*(?:(?P<double>"(?:[^"\\]|\\.)*")|(?P<single>'(?:[^'\\]|\\.)*')"""
                        r"""|(?P<mark>[{}\[\],:])|(?P<word>[^\s{}\[\],:"']+))""", re.DOTALL)
FORMULA_TOKEN = re.compile(r"[0-9]+|\S", re.ASCII)
SIGNS = str.maketrans("×÷−", "*/-")


def printable(text, limit=60):
    """Text of unknown origin made fit for a terminal or a sentence: printable characters only, at most `limit` of them."""
    return "".join(ch for ch in text[:limit] if ch.isprintable())


def _quoted(text):
    return f"'{printable(text)}'" if printable(text) else "an unprintable character"


def parse_answer(text):
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
            try:
                kind, token = "string", json.loads(token, strict=False)  # one string, bounded: nothing but its escapes is read
            except ValueError:
                raise Illegal("a string in the JSON object has a wrong escape") from None
        elif kind == "single":
            kind, token = "string", token[1:-1].replace("\\'", "'")
        yield token if kind == "mark" else kind, token, position
    raise Illegal(f"the JSON object is broken, does not end or has more than {MAX_TOKENS} parts")


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


def parse_formula(text, target):
    """Read a formula: returns its exact value (numerator, denominator) and the numbers it uses, in order.

    Whole numbers without leading zeros, + - * / (also × ÷ −), round brackets, spaces, and one optional `=target` at the end.
    Raises Illegal, also for a division by zero, a sign before a number, a missing operator, and whatever passes the bounds."""
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
STYLES = ("full", "short")  # prompts and feedback: for a large instruct model, or a handful of tokens for the tiny one


class Verdict(NamedTuple):
    """What the verifier found: a key of REWARD, what is wrong (empty when nothing is), the cards that the response lists (None
    where it does not), and how much of that is right (see read_share). The outcome rests on the formula alone."""
    outcome: str
    fact: str = ""
    cards: tuple[str, ...] | None = None
    read: float = 0.0


def judge(response, hand, rule):
    """Judge a response (text of a model, of any content) to a hand under a rule, in under a millisecond; never raises for a str.
    One outcome per answer, the first that holds: "illegal", "wrong_numbers" (not on the cards, used too often, or missing),
    "wrong_value", "correct"."""
    cards, read = None, 0.0
    try:
        answer = parse_answer(response)
        if isinstance(answer.get("cards"), tuple):
            cards, read = answer["cards"], read_share(answer["cards"], hand)
        if not isinstance(answer.get("formula"), str):
            raise Illegal("the JSON object has no key 'formula' with a string")
        value, used = parse_formula(answer["formula"], rule.target)
    except Illegal as error:
        return Verdict("illegal", str(error), cards, read)
    if fact := _misused(used, values(hand, rule)):
        return Verdict("wrong_numbers", fact, cards, read)
    if value != (rule.target, 1):
        shown = "/".join(map(str, value)).removesuffix("/1")
        return Verdict("wrong_value", f"{shown}, not {rule.target}", cards, read)
    return Verdict("correct", "", cards, read)


RANK_WORDS = ("ACE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "TEN", "JACK", "QUEEN", "KING")
NAMES = {name: rank for names in (RANKS, RANK_WORDS, map(str, range(1, 14))) for rank, name in enumerate(names, 1)}


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


FEEDBACK, MISREAD_TEXT = CARDS["wording"]["feedback"], CARDS["wording"]["misread"]  # the verifier's words for the next turn


# ---- 8. Looks --------------------------------------------------------------------------------------------------------
# What a picture of the cards may look like, as data: one look is trained, the others are the test.

def _one_of(*known, default=None):
    """A field of Options: one of these values; the first is the default."""
    return field(default=known[0] if default is None else default, metadata={"known": known})


class Options:
    """What can be chosen, as data: each field is _one_of some values. Its text is the first value, then the others that are not
    the default, as in "red/layout=grid". ValueError for other values."""

    def __post_init__(self):
        for name, known in self.options().items():
            if getattr(self, name) not in known:
                kind, value = type(self).__name__.lower(), printable(str(getattr(self, name)))
                raise ValueError(f"A {kind} needs {name} {_any_of(known)}, not {value!r}.")

    def __str__(self):
        first, *others = ((each.name, getattr(self, each.name), each.default) for each in fields(self))
        given = [f"/{name}={value}" for name, value, default in others if value != default and first[1] != "text"]
        return first[1] + "".join(given)

    @classmethod
    def options(cls):
        """The known values of every field: {name: tuple}."""
        return {each.name: each.metadata["known"] for each in fields(cls)}

    @classmethod
    def parse(cls, text):
        """Read a text, its options in any order; str() undoes it, what is read already passes through, "text" ignores its
        options. Any other text is a ValueError that says what is wrong."""
        if isinstance(text, cls):
            return text
        options, (first, *given) = cls.options(), text.split("/")
        head, second, *more = options
        found = {head: first}
        for option in given:
            name, _, value = option.partition("=")
            if name not in options or name in found:
                raise ValueError(f"{printable(text)!r} is not a {cls.__name__.lower()}: after the {head} only "
                                 f"{', '.join([second, *more])} may "
                                 f" follow, each once, as in {options[head][0]}/{second}={options[second][1]}.")
            found[name] = int(value) if isinstance(options[name][0], int) and re.fullmatch("0|[1-9][0-9]{0,2}", value) else value
        return cls(**found)

    @classmethod
    def fill(cls, text, rng):
        """The text with its wildcards drawn: `*` for any value but text, `a|b` for one of those named.

        All of a list are read, so that a wrong one raises its ValueError at once and not when it happens to be drawn."""
        parts, options = str(text).split("/"), cls.options()
        head, *_ = options
        for i, part in enumerate(parts):
            name, equals, value = part.rpartition("=")
            known = options.get(name or head, ())
            choices = [each for each in known if each != "text"] if value == "*" else value.split("|")
            if len(choices) > 1:
                filled = [f"{name}{equals}{each}" for each in choices]
                for each in filled if value != "*" else ():
                    cls.parse(f"{options[head][0]}/{each}" if i else each)
                parts[i] = rng.choice(filled)
        return "/".join(parts)


def _any_of(known):
    return f"from {known[0]} to {known[-1]}" if len(known) > 4 else "one of " + ", ".join(map(str, known))


@dataclass(frozen=True)
class Look(Options):
    """What the cards look like, as in "red/layout=grid/light=60"."""
    suits: str = _one_of("black", "red", "both", "text")  # black: S and C only; red: H and D only; both: as dealt
    layout: str = _one_of("row", "grid", "scattered", "shuffled")  # scattered: a tilted grid; shuffled: not in dealt order
    scheme: str = _one_of("index", "numbers", "words", "pips")  # how a rank is shown: K, 13, KING, or 13 suit signs
    style: str = _one_of("plain", "framed", "dark")  # the card
    glyphs: str = _one_of("sans", "serif", "mono", "italic")  # the typeface
    table: str = _one_of("green", "blue", "wood", "grey")
    light: int = _one_of(*range(40, 141), default=100)  # brightness in percent
    noise: int = _one_of(*range(41))  # standard deviation in grey levels
    tiles: int = _one_of(4, 1)  # how many of the model's tiles the picture takes


parse_look, fill_look = lru_cache(maxsize=1 << 12)(Look.parse), Look.fill


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

LARGE, GRAIN, ANGLES = 100, 1 << 20, (-10, -4, 4, 10)  # few angles (degrees), so that most cards have been drawn before
# pyftsubset DejaVuSerif-Bold.ttf --text=ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 --layout-features= --no-hinting --name-IDs=0,1,2,13
TYPEFACES = {"serif": "DejaVuSerif-Bold.ttf", "mono": "DejaVuSansMono-Bold.ttf", "italic": "DejaVuSerifCondensed-BoldItalic.ttf"}
STYLE_COLOURS = {  # paper, edge, black ink, red ink
    "plain": ((255, 255, 255), (150, 150, 150), (20, 20, 26), (205, 18, 34)),
    "framed": ((250, 242, 222), (120, 96, 60), (22, 34, 84), (176, 26, 40)),
    "dark": ((40, 42, 52), (14, 14, 18), (236, 238, 244), (255, 112, 104))}
TABLE_COLOURS = {"green": (32, 104, 66), "blue": (36, 72, 128), "wood": (140, 92, 52), "grey": (128, 130, 134)}


def _circle(x, y, r):
    return [(x + r * cos(k * pi / 24), y + r * sin(k * pi / 24)) for k in range(48)]


HEART = [(.5 + .48 * sin(t) ** 3, .42 - (13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 32)
         for t in (k * pi / 32 for k in range(64))]
STEM = [(.5, .5), (.56, .8), (.72, .97), (.28, .97), (.44, .8)]
SUIT_SHAPES = {  # polygons in a square of side 1
    "H": [HEART], "S": [[(x, .84 - .86 * (y - .04)) for x, y in HEART], STEM],
    "D": [[(.5, .01), (.68, .27), (.89, .5), (.68, .73), (.5, .99), (.32, .73), (.11, .5), (.32, .27)]],
    "C": [_circle(.5, .25, .225), _circle(.25, .59, .225), _circle(.75, .59, .225), _circle(.5, .5, .12), STEM]}


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


def _noisy(image, deviation, seed):
    start, count = seed % GRAIN, image.width * image.height
    grain = Image.frombytes("L", image.size, _grain(count)[start:start + count])
    grain = grain.point([max(0, min(255, round(128 + (level - 128) / 30 * deviation))) for level in range(256)])
    return ImageChops.add(image, Image.merge("RGB", [grain] * 3), offset=-128)


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
    shadow = Image.new("L", (card.width // 4, card.height // 4))  # at a quarter of the size it is blurred sooner
    shadow.paste(130, (margin // 4, margin // 3), outline.reduce(4))
    card.putalpha(shadow.filter(ImageFilter.GaussianBlur(margin / 16)).resize(card.size))
    card.paste(face, (margin, margin), outline)
    return (card.rotate(angle, Image.Resampling.BICUBIC, expand=True) if angle else card).reduce(scale)


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


def _label(rank, scheme, glyphs, width, height):
    """A rank's name as a mask, all of it `height` pixels tall, narrowed to `width` where it is wider."""
    text = RANK_WORDS[rank - 1] if scheme == "words" else str(rank) if scheme == "numbers" and rank > 10 else RANKS[rank - 1]
    size, stroke = round(height * 1.37), height / 18 if glyphs == "sans" else 0  # pillow's own typeface is thin
    font = ImageFont.truetype(ASSETS / "fonts" / TYPEFACES[glyphs], size) if glyphs in TYPEFACES else ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text, anchor="ls", stroke_width=stroke)
    mask = Image.new("L", (ceil(right - left), ceil(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, "ls", stroke_width=stroke)
    return mask.resize((min(round(width), mask.width), round(height)))


def _small_face(face, rank, suit, ink, scheme, glyphs):
    """A card for a place of 32 pixels: the rank as large as it can be, the suit below it; or signs only."""
    width, height = face.size
    if scheme == "pips":
        return _pips(face, rank, suit, ink, .19 * height, .21, .14)
    tall = .34 if scheme == "words" else .5
    _stamp(face, _label(rank, scheme, glyphs, .88 * width, tall * height), ink, .5, .34)
    _stamp(face, _sign(suit, .3 * height), ink, .5, .8)


def _pips(face, rank, suit, ink, size, left, top):
    """As many suit signs as the rank, the outer ones at `left` and `top` in shares of the card, the lower ones upside down."""
    sides, middle = CARDS["pips"][str(rank)]
    for x, heights in ((left, sides), (1 - left, sides), (.5, middle)):
        for twelfths in heights:
            _stamp(face, _sign(suit, size), ink, x, top + (1 - 2 * top) * (twelfths / 12), turned=twelfths > 6)


def _large_face(face, rank, suit, ink, scheme, glyphs):
    """A card as from a real pack: indices in two corners, signs in the classic places, a framed figure for J, Q and K."""
    width, height = face.size
    if scheme == "pips":
        return _pips(face, rank, suit, ink, .18 * width, .22, .13)
    if scheme == "words":
        _stamp(face, _label(rank, scheme, glyphs, .84 * width, .13 * height), ink, .5, .5)
        return _twice(face, _sign(suit, .26 * width), ink, .5, .2)
    _twice(face, _label(rank, scheme, glyphs, .15 * width, .105 * height), ink, .11, .095)
    _twice(face, _sign(suit, .125 * width), ink, .11, .205)
    if rank <= 10:
        return _pips(face, rank, suit, ink, .185 * width * (1 + (rank == 1)), .32, .16)
    if scheme == "numbers":
        return _framed(face, (), _label(rank, scheme, glyphs, .4 * width, .2 * height), (.5, .5), ink)
    figure = CARDS["behind"][str(rank)] + CARDS["body"] + CARDS["before"][str(rank)]
    _framed(face, figure, _sign(suit, .12 * width), (.14, .14), ink)


def _framed(face, figure, mask, at, ink):
    """A frame with a figure and a mask at (x, y) of its upper half, and the same upside down in the lower one."""
    width, height = round(.58 * face.width), round(.37 * face.height)
    half = Image.new("RGB", (width, height), face.getpixel((face.width // 2, face.height // 2)))
    for colour, shape in figure:  # corners, or a circle's x, y and radius
        points = shape if isinstance(shape[0], tuple) else _circle(*shape)
        ImageDraw.Draw(half).polygon([(x * width, y * height) for x, y in points], CARDS["colours"].get(colour, ink))
    _stamp(half, mask, ink, *at)
    left, top = (face.width - width) // 2, face.height // 2 - height
    face.paste(half, (left, top))
    face.paste(half.transpose(Image.Transpose.ROTATE_180), (left, top + height))
    ImageDraw.Draw(face).rectangle((left, top, left + width, top + 2 * height), None, ink, max(1, face.width // 120))


_small_card = lru_cache(maxsize=4096)(partial(_card, _small_face, 4))  # at most 30 KB each
_large_card = lru_cache(maxsize=256)(partial(_card, _large_face, 2))  # at most a MB each in a picture of 1,120 x 1,120 pixels


# ---- 10. GeneralPoints -----------------------------------------------------------------------------------------------

class GeneralPoints(Problem):
    """One problem, for one episode. Attributes: hand, rule, numbers (values under the rule), cls (the class, which groups hands
    for intervals), look (a Look; None in text), image, prompt, attempts, attempt (answers judged so far), verdict (the latest),
    done. A picture is `tile` pixels a tile; what is random about it comes from `stream`, a text."""
    asks = "formula"
    SCORES = Problem.SCORES | {"read": "cards read"}
    WORDS = Words("hands", "J = Q = K = 10", "J, Q, K = 11, 12, 13", "problems with the same numbers",
                  "All cards are read in {} of the hands")

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
        feedback = self.feedback(self.verdict)
        if self.look and self.verdict.read < 1:
            reward, feedback = reward + MISREAD, feedback + MISREAD_TEXT[self.style]
        return Step(float(reward), self.done, feedback, self.verdict.outcome, self.verdict.read)

    def feedback(self, verdict: Verdict) -> str:
        """The verifier's text for the next turn."""
        return FEEDBACK[self.style][verdict.outcome].format(fact=verdict.fact)

    def expert(self, rng=None):
        """A right response by the rule of the prompt: the simplest solution, or with rng (random.Random) a random one of them;
        for five and six cards the one that the solver finds first."""
        return self.response(self.rule, self.solution(self.rule, rng))

    def careful(self, rng):
        """The demonstrator that writes any right answer."""
        return [self.expert(rng)]

    DEMONSTRATORS = Problem.DEMONSTRATORS | {"careful": careful}  # assets/habits.py adds some with bad habits

    def sum_response(self) -> str:
        """The plain sum of the numbers, without a list of them."""
        return json.dumps({"cards": rank_names(self.hand), "formula": "+".join(map(str, self.numbers))})

    def solution(self, rule: Rule, rng: random.Random | None = None) -> str | None:
        """The simplest formula of the hand under a rule, or with rng a random one; None where there is none."""
        numbers = values(self.hand, rule)
        if rule.cards > 4:
            return solve(numbers, rule.target)
        found = solutions(numbers, rule.target)
        return (rng.choice(found) if rng else found[0]) if found else None

    def response(self, rule: Rule, formula: str) -> str:
        """A response with a formula, and the values that the cards have under a rule."""
        return json.dumps({"cards": rank_names(self.hand), "number": values(self.hand, rule), "formula": formula})

    @classmethod
    def make(cls, *, rule, visual, split, index, attempts, style, judged_by, tile, data):
        if data:
            raise ValueError("There is no released data for GeneralPoints: its hands are dealt. Only V-IRL takes a folder of routes.")
        tile = 32 if tile is None else tile
        rule = parse_rule(fill_rule(rule, random.Random(f"gp/{split}/{index}/rule")))
        look = parse_look(fill_look(visual, random.Random(f"gp/{split}/{index}/look"))) if visual else None
        if look and look.suits != "text" and tile < (smallest := legible_from(look, rule.cards)):
            raise ValueError(f"{rule.cards} cards of the look {str(look)!r} need tiles of at least {smallest} pixels, not {tile}.")
        hand, rule = deal(rule, split, index, 2 if look else 4)
        judged_by = replace(rule, faces=parse_rule(judged_by or rule).faces)
        look = None if look and look.suits == "text" else look
        return cls(hand, rule, attempts, style, judged_by, look, tile, f"gp/{split}/{index}/picture")

    @classmethod
    def legible(cls, row, tile):
        if not row.visual:
            return True
        look = parse_look(fill_look(row.visual, random.Random(0)))
        return look == Look("text") or legible_from(look, parse_rule(row.rule).cards) <= tile


def short_prompt(hand, rule, look=None):
    """Few tokens, for the tiny model: `K 7 2 A, JQK=11,12,13, make 24`; with a Look, the cards are in a picture instead."""
    cards = "" if look else " ".join(rank_names(hand)) + ", "
    return f"{cards}JQK={','.join(map(str, rule.faces))}, make {rule.target}"


def full_prompt(hand, rule, look=None):
    """Plain words, for an instruct model; with a Look, the cards are in a picture instead."""
    words = CARDS["wording"]
    names, shown = json.dumps(rank_names(hand)), look and SHOWN[look.scheme]
    cards = words["seen" if look else "dealt"].format(count=len(hand), names=names, shown=shown)
    faces = words["alike" if len(set(rule.faces)) == 1 else "unlike"].format(*rule.faces)
    return words["prompt"].format(cards=cards, faces=faces, target=rule.target, order="in the picture" if look else "as dealt")


SHOWN = CARDS["wording"]["shown"]  # how to read the ranks in a picture


# ---- 11. V-IRL: a city -----------------------------------------------------------------------------------------------
# A walk through streets by instructions. Points are (x, y) in metres, x to the east and y to the north; bearings are degrees
# clockwise from north. A *place* is where one can stand: an intersection (a node's number), or (a, b, k), the k-th point of the
# street from node a to node b > a. Each place has at most one landmark, and the bearing at which its front is seen from there.

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SIDES = ("front", "right", "back", "left")  # of what is seen, and the order of the four views
SLIGHT = 60  # a turn by up to so many degrees is a slight one
SLIGHT_TURNS, PLAIN_TURNS = (20, 52), (68, 150)  # what routes have: clear of straight on, of SLIGHT and of turning round
OFF_COMPASS = 17.5  # and how far a street may lie off its compass word, whose share ends at 22.5
GRID = 6  # nodes a side
SPACING, CURB = 15, 9  # metres between places (10 to 20 come of it), and from the middle of a street to its fronts


def wrap(angle):
    """An angle in degrees brought into (-180, 180]; unwrapped, left and right would change places near north."""
    return 180 - (180 - angle) % 360


def bearing(start, end):
    """Degrees clockwise from north, in [0, 360)."""
    return math.degrees(math.atan2(end[0] - start[0], end[1] - start[1])) % 360


def compass_word(angle):
    """The nearest of the eight words of COMPASS."""
    return COMPASS[round(angle / 45) % 8]


def turn_word(words, heading, towards):
    """What a turn from one bearing to another is called: the compass word of the new one ("absolute"), or "left", "right" and, up
    to SLIGHT degrees, "slightly left" and "slightly right" ("relative")."""
    angle = wrap(towards - heading)
    side = ("slightly " if abs(angle) <= SLIGHT else "") + ("right" if angle > 0 else "left")
    return compass_word(towards) if words == "absolute" else side


def clear_turn(heading, towards):
    """Whether the turn has one obvious word under both rules, by the margins above."""
    angle = abs(wrap(towards - heading))
    return any(low <= angle <= high for low, high in (SLIGHT_TURNS, PLAIN_TURNS)) and clear_bearing(towards) \
        and compass_word(heading) != compass_word(towards)


def clear_bearing(angle):
    """Whether a bearing has one obvious compass word."""
    return abs(wrap(angle - 45 * round(angle / 45))) <= OFF_COMPASS


class City:
    """The city of a name such as "test-3", the same on every machine: a grid of streets, turned, bent, broken, and crossed by
    diagonals, so that all eight compass words occur. In style "short" its landmarks have the short names of the tiny model.

    Attributes: nodes {number: point}, arms {node: neighbours clockwise from north}, turns {(a, b): nodes that routes turn to from
    the street a-b}, landmarks {place: (name, bearing)}."""

    def __init__(self, name, style):
        self.nodes = self._grid(random.Random(f"virl/{name}/grid"))
        self._join_nodes(random.Random(f"virl/{name}/streets"))
        self.turns = {(a, b): self._clear_arms(a, b) for a in self.arms for b in self.arms[a]}
        self._place_landmarks(random.Random(f"virl/{name}/landmarks"), style)

    def _grid(self, rng):
        """Points of a grid of uneven blocks. Beyond a line each way the cross streets bend, one way hardly and the other by about
        45 degrees, and the whole is turned: all so that most streets stay close to a compass word."""
        xs, ys = ([sum(steps[:i]) for i in range(GRID)] for steps in ([rng.randint(42, 72) for _ in range(GRID)] for _ in "xy"))
        angles = rng.sample([rng.uniform(-6, 6), rng.choice((1, -1)) * rng.uniform(37, 43)], 2)
        slope_x, slope_y = (math.tan(math.radians(angle)) for angle in angles)
        bend_x, bend_y = (line[rng.randint(1, GRID - 2)] for line in (xs, ys))
        turned = math.radians(rng.choice((0, 45)) + rng.uniform(-8, 8))
        sin, cos = math.sin(turned), math.cos(turned)
        nodes = {}
        for i, j in product(range(GRID), repeat=2):
            x = xs[i] + slope_y * max(ys[j] - bend_y, 0) + rng.uniform(-2, 2)
            y = ys[j] + slope_x * max(xs[i] - bend_x, 0) + rng.uniform(-2, 2)
            nodes[i * GRID + j] = (round(x * cos + y * sin, 1), round(y * cos - x * sin, 1))
        return nodes

    def _join_nodes(self, rng):
        """Streets along the grid, a few missing, then diagonals; none at less than 40 degrees to another, no dead ends."""
        along = [(n, m) for n in self.nodes for m in (n + 1, n + GRID) if m in self.nodes and (m == n + GRID or m % GRID)]
        cells = [n for n in self.nodes if n + GRID in self.nodes and (n + 1) % GRID]
        diagonals = [rng.choice([(n, n + GRID + 1), (n + 1, n + GRID)]) for n in cells]
        streets = [street for street in along if rng.random() > 0.2] + [street for street in diagonals if rng.random() < 0.3]
        arms = {node: [] for node in self.nodes}
        for a, b in streets:
            if all(abs(wrap(self.heading(n, m) - self.heading(n, k))) >= 40 for n, m in ((a, b), (b, a)) for k in arms[n]):
                arms[a].append(b)
                arms[b].append(a)
        while dead := [node for node in arms if len(arms[node]) < 2]:
            for other in arms.pop(dead[0]):
                arms[other].remove(dead[0])
        self.arms = {node: sorted(arms[node], key=lambda other: self.heading(node, other)) for node in arms}

    def _clear_arms(self, a, b):
        """The nodes to which it takes a clear turn from the street a-b, one whose words fit no other street from b."""
        heading, others = self.heading(a, b), {c: self.heading(b, c) for c in self.arms[b] if c != a}
        said = Counter(turn_word(words, heading, towards) for words in TURN_WORDS for towards in others.values())
        return [c for c, towards in others.items() if clear_turn(heading, towards)
                and all(said[turn_word(words, heading, towards)] == 1 for words in TURN_WORDS)]

    def heading(self, a, b):
        """The bearing from node a to its neighbour b."""
        return bearing(self.nodes[a], self.nodes[b])

    def long(self, a, b):
        """The length of the street between two nodes, in metres."""
        return math.dist(self.nodes[a], self.nodes[b])

    def count(self, a, b):
        """Into how many steps it is divided."""
        return max(round(self.long(a, b) / SPACING), 1)

    def place(self, a, b, k):
        """The place k steps along the street from a towards b: a node at its ends."""
        count = self.count(a, b)
        return a if k == 0 else b if k == count else (a, b, k) if a < b else (b, a, count - k)

    def point(self, place):
        """Where a place is."""
        if isinstance(place, int):
            return self.nodes[place]
        a, b, k = place
        return self.beside(a, b, k * self.long(a, b) / self.count(a, b), 0)

    def beside(self, a, b, along, across):
        """The point so far along the street from node a towards b, and so far to the right of its middle."""
        (x, y), heading = self.nodes[a], math.radians(self.heading(a, b))
        sin, cos = math.sin(heading), math.cos(heading)
        return x + along * sin + across * cos, y + along * cos - across * sin

    def front(self, a, b, side):
        """(start, end): between which distances from node a the street to b has fronts on its right (side 1) or left (-1).

        Around a node the lines of two neighbouring streets' fronts end where they meet, so that fronts close every block."""
        def setback(a, b, side):
            other = self.arms[a][(self.arms[a].index(b) + side) % len(self.arms[a])]
            between = side * (self.heading(a, other) - self.heading(a, b)) % 360
            return min(max(CURB / math.tan(math.radians(between / 2)), -CURB), 3 * CURB)
        return setback(a, b, side), self.long(a, b) - setback(b, a, -side)

    def _place_landmarks(self, rng, style):
        """At a third of the places along streets, and at most intersections that have a long front on one side."""
        spots = [(place, angle) for place, angle in self._spots(rng) if rng.random() < (0.8 if isinstance(place, int) else 0.35)]
        if style == "short":
            names = [rng.choice(VIRL["short"]) for _ in spots]
        else:
            names = rng.sample([pattern.format(name) for pattern in VIRL["patterns"] for name in VIRL["names"]], len(spots))
        self.landmarks = {place: (name, angle) for (place, angle), name in zip(spots, names)}

    def _spots(self, rng):
        """Yield (place, bearing of a front) for every place that could have a landmark."""
        for a, arms in self.arms.items():
            for b, after in zip(arms, arms[1:] + arms[:1]):
                gap = (self.heading(a, after) - self.heading(a, b)) % 360
                if 150 <= gap <= 210:
                    yield a, (self.heading(a, b) + gap / 2) % 360
                    break
            for b in (b for b in arms if a < b):
                for k in range(1, self.count(a, b)):
                    side, along = rng.choice((1, -1)), k * self.long(a, b) / self.count(a, b)
                    start, end = self.front(a, b, side)
                    if start + 4 <= along <= end - 4:
                        yield (a, b, k), (self.heading(a, b) + 90 * side) % 360

    def seen(self, place, heading):
        """((landmark, side),) at a place for someone who faces `heading`, the side empty where not clear; () without one."""
        if place not in self.landmarks:
            return ()
        name, angle = self.landmarks[place]
        quarter = wrap(angle - heading) / 90
        return ((name, SIDES[round(quarter) % 4] if abs(quarter - round(quarter)) < 0.3 else ""),)

    def sign_point(self, place):
        """Where a landmark's sign stands: close to the front; a little further off at an intersection, where fronts may bend."""
        (x, y), angle = self.point(place), math.radians(self.landmarks[place][1])
        off = CURB - (1.2 if isinstance(place, int) else 0.3)
        return x + off * math.sin(angle), y + off * math.cos(angle)


city = lru_cache(maxsize=64)(City)


# ---- 12. V-IRL: routes -----------------------------------------------------------------------------------------------
# A route is its rail: one Position after another, each with one right action. A turn also takes the first step into the new
# street, as in the released data. Every leg leads to the next intersection, where the turn's word fits no other street.

ROUTES = 20  # of a city
LEGS = {"full": (2, 6), "short": (1, 2)}
LENGTHS = {"full": (4, 40), "short": (3, 6)}  # in positions


class Position(NamedTuple):
    """Where an answer is due: the place, the heading in degrees, ((landmark, side), ...) seen there, whether it is an
    intersection, the right action ("turn", "forward" or "stop"), the bearing to turn to or None, the instruction from 0."""
    place: object
    heading: float
    landmarks: tuple
    crossing: bool
    action: str
    towards: float | None
    instruction: int


class Route(NamedTuple):
    """A city's name and a tuple of Positions, the last one the destination's; the folder that a released one is from."""
    city: str
    rail: tuple
    folder: str = ""

    def key(self):
        """What makes it another problem than other routes, whatever the city is called."""
        acts = ((here.action, here.landmarks, right_word(here, TurnRule())) for here in self.rail)
        return compass_word(self.rail[0].heading), *acts


@lru_cache(maxsize=256)
def routes(name, style):
    """The ROUTES distinct Routes of the city "SPLIT-N". Their keys belong to the split too, by a hash, so that no problem of one
    split occurs in another, whatever the cities are called ("base" shares with "train"). ValueError when too few are found."""
    town, rng, found = city(name, style), random.Random(f"virl/{name}/{style}/routes"), {}
    wanted = name.split("-")[0].replace("base", "train")
    for _ in range(TRIES):
        route = Route(name, _walk(town, rng, style))
        if route.rail and split_of(f"virl/{route.key()}") == wanted:
            found.setdefault(route.key(), route)
        if len(found) == ROUTES:
            return tuple(found.values())
    raise ValueError(f"The city {name} has no {ROUTES} routes in {TRIES} walks: choose another index.")


def _walk(town, rng, style):
    """The rail of a random walk; empty where it is too long or short, cannot be told clearly, or has no landmark to end at."""
    nodes = _turning_points(town, rng, rng.randint(*LEGS[style]))
    if not nodes:
        return ()
    (a, b), (c, d) = nodes[:2], nodes[-2:]
    start, facing = rng.randint(1, town.count(a, b) - 1), _facing(rng, town.heading(a, b))
    ends = [k for k in range(start + 1 if len(nodes) == 2 else 1, town.count(c, d)) if town.place(c, d, k) in town.landmarks]
    clear = clear_bearing(facing) and clear_turn(facing, town.heading(a, b)) and town.place(a, b, start) not in town.landmarks
    if not ends or not clear:
        return ()
    rail = _rail(town, nodes, start, rng.choice(ends), facing)
    seen = [landmark for here in rail for landmark in here.landmarks]
    told = all(side for _, side in seen) and len({name for name, _ in seen}) == len(seen)
    return rail if told and LENGTHS[style][0] <= len(rail) <= LENGTHS[style][1] else ()


def _turning_points(town, rng, legs):
    """The nodes of a random walk of so many streets, with a clear turn at every node between; None where it gets stuck."""
    first = rng.choice(tuple(town.arms))
    nodes = [first, rng.choice(town.arms[first])]
    while len(nodes) <= legs:
        following = [node for node in town.turns[nodes[-2], nodes[-1]] if node not in nodes]
        if not following:
            return None
        nodes.append(rng.choice(following))
    return nodes


def _facing(rng, heading):
    """A bearing from which it takes a turn to face `heading`; each relative word is as likely as the others."""
    return round(heading + rng.choice((1, -1)) * rng.uniform(*rng.choice((SLIGHT_TURNS, PLAIN_TURNS)))) % 360


def _rail(town, nodes, start, end, facing):
    """All Positions from the start-th place of the first street to the end-th of the last."""
    heading = town.heading(*nodes[:2])
    rail = [Position(town.place(*nodes[:2], start), facing, (), False, "turn", heading, 0)]
    for leg, (a, b) in enumerate(zip(nodes, nodes[1:])):
        heading, last = town.heading(a, b), leg == len(nodes) - 2
        for k in range(start + 1 if leg == 0 else 1, (end if last else town.count(a, b)) + 1):
            place = town.place(a, b, k)
            here = Position(place, heading, town.seen(place, heading), place == b, "forward", None, 2 * leg + 1)
            if place == b:
                here = here._replace(action="turn", towards=town.heading(b, nodes[leg + 2]), instruction=2 * leg + 2)
            rail.append(here)
    return (*rail[:-1], rail[-1]._replace(action="stop"))


# ---- 13. V-IRL: words ------------------------------------------------------------------------------------------------

TURN_WORDS = ("absolute", "relative")  # the rule trained in the paper, and the one that is not
TURNS = {"absolute": COMPASS, "relative": ("left", "right", "slightly left", "slightly right")}


class TurnRule(NamedTuple):
    """What the x of turn_direction(x) means, a name in TURN_WORDS, and the words that the instructions use for turns: those of both
    rules, so that only the stated actions tell which to take, or, told="rule", those of the rule alone."""
    words: str = "absolute"
    told: str = "both"

    def __str__(self):
        return self.words + ("/told=rule" if self.told == "rule" else "")


def parse_turns(text):
    """Read a TurnRule from "absolute" or "relative", then perhaps "/told=rule"; str() undoes it. ValueError for other texts."""
    if isinstance(text, TurnRule):
        return text
    words, slash, told = text.partition("/")
    if words not in TURN_WORDS or slash + told not in ("", "/told=rule"):
        raise ValueError(f"{printable(text)!r} is no rule for turns: write absolute, relative, or one of them with /told=rule.")
    return TurnRule(words, "rule" if slash else "both")


# What the agent reads and writes. "full": plain words for an instruct model; "short": few tokens for the tiny one.
WORDING = VIRL["wording"]


def observation(here, style):
    """What is seen at a Position, in words: "Hotel Iris is on your right; You observe an intersection"."""
    words = WORDING[style]
    parts = [words["seen"].format(name=name, side=side) for name, side in here.landmarks] or [words["none"]]
    if here.crossing:  # the short style does without "none" there
        parts = [part for part in parts if style == "full" or part != words["none"]] + [words["here"]]
    return words["between"].join(parts)


def instructions(route, rule, style):
    """The route's instructions as a list of texts: a turn, a move to the next turn or the destination, a turn, ..."""
    words, texts = WORDING[style], []
    for here in route.rail:
        where = "".join(words["where"].format(name=name, side=side) for name, side in here.landmarks)
        if here.crossing and here.action == "turn" or here.action == "stop":
            texts.append(words["goal" if here.action == "stop" else "crossing"].format(where=where))
        if here.action == "turn":
            known = {name: turn_word(name, here.heading, here.towards) for name in TURN_WORDS}
            texts.append(words["both" if rule.told == "both" else rule.words].format(**known))
    return texts


MAX_ACTION = 60
ACTION = re.compile(r"(forward|stop) ?\( ?\)|turn_direction ?\( ?['\"]?([a-z]+(?: [a-z]+)?)['\"]? ?\)")


def parse_action(text):
    """Read "forward()", "stop()" or "turn_direction(x)": ("forward", ""), ("stop", "") or ("turn", x), x any one or two words.

    Case, quotes round x and more or fewer spaces do not matter. Raises Illegal for anything else."""
    match = ACTION.fullmatch(" ".join(text[: MAX_ACTION + 1].lower().split())) if len(text) <= MAX_ACTION else None
    if not match:
        raise Illegal(f"{_quoted(text)} is not forward(), stop() or turn_direction(x)")
    return match[1] or "turn", match[2] or ""


def right_word(here, rule):
    """The x of a Position's turn under a TurnRule, "" where the right action is no turn."""
    return turn_word(rule.words, here.heading, here.towards) if here.action == "turn" else ""


class Walked(NamedTuple):
    """What the verifier found: a key of WALK_REWARD, why, as a key of WORDING's "why", the fact for its sentence, and whether
    the observation named the landmarks and intersection that are there and no other (None where there is none to read)."""
    outcome: str
    why: str
    fact: str = ""
    observed: bool | None = None


def judge_walk(response, here, rule, style):
    """Judge a response (text of a model, of any content) at a Position under a TurnRule; never raises for a str."""
    observed = None
    try:
        answer, key = parse_answer(response), WORDING[style]["keys"][0]
        if isinstance(answer.get(key), str):
            observed = _parts(answer[key]) == _parts(observation(here, style))
        if not isinstance(answer.get("action"), str):
            raise Illegal("the JSON object has no key 'action' with a string")
        kind, word = parse_action(answer["action"])
    except Illegal as error:
        return Walked("illegal", "illegal", str(error), observed)
    right = (kind, word) == (here.action, right_word(here, rule))
    outcome = "wrong_action" if not right else "correct" if kind == "stop" else "right_action"
    why, fact = ("right", "") if right else (_why(kind, word, here, rule), printable(word))
    return Walked(outcome, why, fact, observed)


def _parts(text):
    """The set of things that an observation names, without case, "no landmarks" and the like."""
    parts = {" ".join(part.lower().removeprefix("the destination ").split()) for part in re.split("[;,.]", text)}
    return parts - {"", "none", "no landmarks nearby", "no landmark nearby"}


def _why(kind, word, here, rule):
    """The key of WORDING's "why" of what is wrong with an action; each of its sentences is true wherever this gives it."""
    if here.action == "stop":
        return "arrived"
    if kind == "stop":
        return "not_there"
    if here.action == "forward":
        return "no_turn"
    return "turn" if kind == "forward" else "direction" if word in TURNS[rule.words] else "word"


# ---- 14. V-IRL: a walk -----------------------------------------------------------------------------------------------

# One outcome per answer: "correct" is the right stop() at the destination, "right_action" every right action before it. In
# addition LAST_ATTEMPT where the attempts at a position are used up, and, with pictures only, MISREAD for a wrong observation.
WALK_REWARD = {"correct": 1, "right_action": 1, "wrong_action": -1, "illegal": -1}


KINDS_OF_ACTION = ("turn", "forward", "stop")


class Navigation(Problem):
    """One walk along a route, for one episode. Attributes: route, rule, position (index into route.rail), cls (city and turns:
    groups routes for intervals), prompt, attempts (answers per position), attempt (answers judged at this position), verdict (the
    latest Walked), done; look (a Scene) and tile of the pictures, and image, the four views of the current position, all None in
    text. After a right action image is another picture, which the next turn shows."""
    asks = "action"
    leads_on = True
    SCORES = {"first": "first attempt", "episode": "whole episode", "steps_first": "per step, until the first failure",
              "steps": "per step, until the attempts ran out", "forced": "per step, teacher-forced", "read": "observations right"}
    WORDS = Words("routes", "absolute turns", "relative turns", "routes with the same turns in one city",
                  "What is seen is named rightly in {} of the answers")

    @classmethod
    def make(cls, *, rule, visual, split, index, attempts, style, judged_by, tile, data):
        return _navigation(rule, visual, split, index, attempts, style, judged_by, tile, data)

    def __init__(self, route, rule, attempts, style, judged_by, look=None, tile=None):
        self.route, self.rule, self.attempts, self.style, self.judged_by = route, rule, attempts, style, judged_by
        turns = [turn_word("relative", here.heading, here.towards) for here in route.rail if here.action == "turn"]
        self.cls = f"{route.city}: {', '.join(turns)}"
        self.texts = instructions(route, rule, style)
        self.position, self.attempt, self.verdict, self.done, self.look, self.tile = 0, 0, None, False, look, tile
        self.drawn = {}  # {position: picture}, common to all copies: each is drawn once and is one object for a whole group

    @property
    def image(self):
        return self.picture(self.position)

    def picture(self, position):
        """The picture of a position of the route, None in text."""
        if self.look and position not in self.drawn:
            here, folder = self.route.rail[position], self.route.folder
            draw = partial(released_grid, folder) if folder else partial(draw_grid, self.route.city, self.style)
            self.drawn[position] = draw(here.place, here.heading, self.look, self.tile)
        return self.drawn.get(position)

    @property
    def prompt(self):
        """The first user turn: the rule, the instructions and, in text, the first observation."""
        words, rule, here = WORDING[self.style], self.rule.words, self.route.rail[0]
        told = words["listed"].join(words["item"].format(number=i, text=text) for i, text in enumerate(self.texts, 1))
        seen = words["picture"] if self.look else words["text"].format(seen=observation(here, self.style))
        return words["prompt"].format(told=told, means=words["means"][rule], choices=", ".join(TURNS[rule]),
                                      facing=compass_word(here.heading), seen=seen)

    @property
    def actions(self):
        """The kind of right action at each position, "turn", "forward" or "stop"."""
        return tuple(here.action for here in self.route.rail)

    def step(self, response):
        """Judge the next answer. A right action moves on, and the feedback has the next observation; a wrong one is not executed.
        Done when stop() is right or the attempts at this position are used up; a RuntimeError after that."""
        if self.done:
            raise RuntimeError("This episode is over: make the problem anew.")
        here = self.route.rail[self.position]
        self.verdict = judge_walk(response, here, self.judged_by, self.style)
        outcome, right = self.verdict.outcome, self.verdict.why == "right"
        self.attempt += 1
        failed = not right and self.attempt == self.attempts
        self.done = failed or outcome == "correct"
        if outcome == "right_action":
            self.position, self.attempt = self.position + 1, 0
        misread = self.look is not None and not self.verdict.observed
        reward = WALK_REWARD[outcome] + (MISREAD if misread else 0) + (LAST_ATTEMPT if failed else 0)
        return Step(float(reward), self.done, self._feedback(), outcome, float(bool(self.verdict.observed)))

    def _feedback(self):
        """The verifier's text and, where the walk moves on, what is seen there; with pictures a pointer to the next one."""
        words = WORDING[self.style]
        seen = words["next"] if self.look else observation(self.route.rail[self.position], self.style)
        said = words["end"] if self.verdict.outcome == "correct" else words["why"][self.verdict.why]
        return said.format(fact=self.verdict.fact, seen=seen)

    def expert(self):
        """A right response at the current position, by the rule of the prompt."""
        return self.response(self.right_action())

    def advance(self):
        """Move on by the expert's response, whatever answers are judged by: (the response, its Step)."""
        response, judge = self.expert(), self.judged_by
        self.judged_by = self.rule
        step = self.step(response)
        self.judged_by = judge
        return response, step

    def restarted(self) -> "Navigation":
        """A copy at the start, judged by its own rule; two attempts at least, since some demonstrators err once."""
        walker = copy.copy(self)
        walker.position, walker.attempt, walker.verdict, walker.done = 0, 0, None, False
        walker.judged_by, walker.attempts = self.rule, max(self.attempts, 2)
        return walker

    def walk(self, rng):
        """The demonstrator that takes the right action everywhere."""
        walker, texts = self.restarted(), []
        while not walker.done:
            response, step = walker.advance()
            texts += [response, step.feedback]
        return texts[:-1]

    DEMONSTRATORS = {"expert": walk}  # assets/habits.py adds some with bad habits

    def right_action(self) -> str:
        """The right action at the current position, by the rule of the prompt, as in "turn_direction(left)"."""
        here = self.route.rail[self.position]
        return f"turn_direction({right_word(here, self.rule)})" if here.action == "turn" else f"{here.action}()"

    def response(self, action: str) -> str:
        """A response with this action, its observation and instruction those of the current position."""
        here, words = self.route.rail[self.position], WORDING[self.style]
        doing = words["doing"].format(number=here.instruction + 1, text=self.texts[here.instruction])
        fields = dict(zip(words["keys"], (observation(here, self.style), doing)), action=action)
        return json.dumps(fields, separators=(",", ":") if self.style == "short" else None)

    def scores(self, turns, forced=None):
        """Scores by position, beside those of every problem; shares are rounded to four digits.

        "steps_first", "steps": survival, the share of the route's positions passed before the first wrong answer, or before the
        attempts ran out (the paper's per-step accuracy; in a mean over routes each weighs the same, long or short). "forced": the
        share of positions answered rightly after a right walk up to each. Survival says how far one gets alone, and lets one kind
        of mistake cost all that would follow it; teacher-forced says what is known at each position. "failed_at": the position
        of the first wrong answer, or None. "read": the share of all answers that name what is there and nothing else. "marks",
        "forced_marks": a letter for each position reached: the right action's initial, a capital where the first answer was right."""
        positions, right = len(self.route.rail), [turn["outcome"] in ("right_action", "correct") for turn in turns]
        failed_at = turns[right.index(False)]["position"] if False in right else None
        passed = sum(right) if failed_at is None else failed_at
        scores = super().scores(turns) | {
            "read": round(sum(turn["read"] for turn in turns) / len(turns), 4), "steps_first": round(passed / positions, 4),
            "steps": round(sum(right) / positions, 4), "failed_at": failed_at, "marks": self._marks(turns)}
        if forced:
            marks = self._marks(forced)
            scores |= {"forced": round(sum(map(str.isupper, marks)) / len(marks), 4), "forced_marks": marks}
        return scores

    def _marks(self, turns):
        first = {turn["position"]: turn["outcome"] in ("right_action", "correct") for turn in reversed(turns)}
        return "".join(self.actions[i][0].upper() if right else self.actions[i][0] for i, right in sorted(first.items()))

    def figures(self, turns):
        """The views up to the last position reached, and the map; released routes have none."""
        last = max((turn["position"] for turn in turns), default=0)
        shown = {"pictures": [self.picture(i) for i in range(last + 1)]} if self.look else {}
        return shown | ({} if self.route.folder else {"map": draw_map(self, 340)})

    @classmethod
    def parsed(cls, response):
        """What an answer of any content says is seen, followed and done, in the words of any style; a dash where it does not."""
        try:
            answer = parse_answer(str(response))
        except Illegal:
            answer = {}
        keys = (*zip(*(words["keys"] for words in WORDING.values())), ("action",))
        said = (next((answer[key] for key in names if key in answer), "\u2013") for names in keys)
        return [(label, str(text)) for label, text in zip(("observed", "following", "action"), said)]


def _navigation(rule, visual, split, index, attempts, style, judge, tile, data):
    look, tile = None, (560 if style == "full" else 32) if tile is None else tile
    if visual:
        look = parse_scene(fill_scene(visual, random.Random(f"virl/{split}/{index}/look")))
        if not 16 <= tile <= 1120:
            raise ValueError(f"Street views need tiles of 16 to 1120 pixels, not {tile}.")
    if data:
        found = released_routes(str(data), look is not None)
        route = found[index % len(found)]
    else:
        route = routes(f"{split}-{index // ROUTES}", style)[index % ROUTES]
    return Navigation(route, parse_turns(rule), attempts, style, parse_turns(judge or rule), look, tile)


# ---- 16. V-IRL: views ------------------------------------------------------------------------------------------------
# Four views of a place, each 90 degrees wide, drawn with pillow from the same city as the text: the sky, the ground, then
# everything that stands on it, the farthest first. A camera point is (x, z): metres to its right and ahead of it.

EYE, NEAR, FAR = 1.7, 0.4, 110  # metres: height of the eye, and the nearest and farthest that is drawn
HORIZON = 0.6  # share of the picture above it


class Light(NamedTuple):
    """The colours of the sky above and at the horizon, of pavement, road and windows, and how light the walls are."""
    sky: tuple
    low: tuple
    pavement: tuple
    road: tuple
    pane: tuple
    walls: float


LIGHTS = {name: Light(*colours) for name, colours in VIRL["lights"].items()}
PALETTES, BOARDS = VIRL["palettes"], VIRL["boards"]  # five colours of walls; a sign's board and its writing
WEATHERS = {"clear": 0.15, "rain": 0.4, "fog": 0.95, "snow": 0.5}  # and how much of a thing FAR away is lost in the haze
EMBLEMS = ((214, 40, 40), (30, 90, 220), (20, 150, 60), (240, 170, 0))  # of the short names: four colours of four shapes
WHITE = (236, 232, 220)  # of the lines on the roads


@dataclass(frozen=True)
class Scene(Options):
    """How a city is drawn, as in "dusk/weather=rain/palette=brick"; with tiles=1 all four views are in one tile."""
    light: str = _one_of(*LIGHTS)
    weather: str = _one_of(*WEATHERS)
    palette: str = _one_of(*PALETTES)
    tiles: int = _one_of(4, 1)


parse_scene, fill_scene = Scene.parse, Scene.fill


@lru_cache(maxsize=32)
def walls(name, style):
    """All fronts of a city, about 11 m wide each: (left end seen from the street, right end, height, number of its colours)."""
    town, rng, found = city(name, style), random.Random(f"virl/{name}/walls"), []
    for (a, b), side in product(((a, b) for a, b in town.turns if a < b), (1, -1)):
        start, end = town.front(a, b, side)
        count = max(round((end - start) / 11), 1)
        ends = [town.beside(a, b, start + (end - start) * i / count, side * CURB) for i in range(count + 1)][::-side]
        found += [(*pair, rng.choice((7, 10, 13, 16, 22)), rng.randrange(1000)) for pair in pairwise(ends)]
    return found


@lru_cache(maxsize=32)
def roads(name, style):
    """(roads, white lines) of a city, each a list of four corners on the ground."""
    town, paved, lines = city(name, style), [], []
    for a, b in town.turns:
        def strip(start, end, left, right):
            return [town.beside(a, b, *corner) for corner in ((start, left), (end, left), (end, right), (start, right))]
        if a < b:
            paved.append(strip(-4, town.long(a, b) + 4, -5, 5))
            lines += [strip(at, at + 2, -0.12, 0.12) for at in range(16, int(town.long(a, b)) - 16, 5)]
        begin = max(town.front(a, b, 1)[0], town.front(a, b, -1)[0], 5)
        lines += [strip(begin - 2, begin + 0.6, at, at + 0.7) for at in (-4.2, -2.8, -1.4, 0, 1.4, 2.8)]  # a crosswalk
    return paved, lines


class View:
    """One view in the making, `size` pixels each way, from a point of a city. Every draw method adds one kind of thing."""

    def __init__(self, point, heading, look, size):
        self.point, self.size, self.look, self.light = point, size, look, LIGHTS[look.light]
        self.sin, self.cos = math.sin(math.radians(heading)), math.cos(math.radians(heading))
        self.image = _backdrop(look, size).copy()
        self.draw = ImageDraw.Draw(self.image)

    def ahead(self, point):
        """A point of the city as a camera point."""
        x, y = point[0] - self.point[0], point[1] - self.point[1]
        return x * self.cos - y * self.sin, x * self.sin + y * self.cos

    def pixel(self, x, z, height):
        """Where a camera point at a height above ground is in the picture, from its top left."""
        scale = self.size / 2 / z
        return self.size / 2 + scale * x, self.size * HORIZON - scale * (height - EYE)

    def shade(self, colour, distance, light):
        """A colour in this light (1: its own) and, at this distance, in this weather's haze."""
        haze = WEATHERS[self.look.weather] * min(distance / FAR, 1)
        return tuple(int(value * light * (1 - haze) + far * haze) for value, far in zip(colour, self.light.low))

    def fill(self, corners, colour):
        """A polygon of (x, z, height); what is behind the camera is cut off."""
        depths = [z for _, z, _ in corners]
        if min(depths) < NEAR <= max(depths):
            corners = [corner for start, end in zip(corners, corners[1:] + corners[:1]) for corner in _clipped(start, end)]
        if max(depths) >= NEAR:
            self.draw.polygon([self.pixel(*corner) for corner in corners], colour)

    def draw_ground(self, points, colour):
        """A flat shape on the ground, given by its corners in the city, without haze: overlapping roads should show no seams."""
        self.fill([(*self.ahead(point), 0) for point in points], colour)

    def draw_wall(self, left, right, height, pick):
        """A front: its wall, the edge of its roof, its shop and its windows."""
        (x, z), (u, w) = left, right = self.ahead(left), self.ahead(right)
        if _hidden(left, right):
            return
        light, pane, unlit = self.light.walls, self.light.pane, LIGHTS["day"].pane
        distance, colour = math.hypot(x + u, z + w) / 2, PALETTES[self.look.palette][pick % 5]

        def part(first, last, bottom, top, colour, light):
            """A part of the front between two shares of its width, from the left, and two heights."""
            (a, b), (c, d) = ((x + (u - x) * share, z + (w - z) * share) for share in (first, last))
            self.fill([(a, b, bottom), (a, b, top), (c, d, top), (c, d, bottom)], self.shade(colour, distance, light))

        part(0, 1, 0, height, colour, light)
        part(0, 1, height - 0.5, height, colour, light * 0.75)
        part(0.06, 0.94, 0, 2.6, pane, 0.7)
        part(0, 1, 2.6, 3.2, EMBLEMS[pick % 4], light * 0.6)
        if distance < min(FAR, self.size / 2) / 2:  # as far as a small picture shows windows
            columns, floors = max(round(math.dist(left, right) / 2.7), 1), int(height - 3.5) // 3
            for column, floor in product(range(columns), range(floors)):
                lit = light == 1 or (pick + floor * 5 + column * 3) % 4 < 2
                part((column + 0.25) / columns, (column + 0.75) / columns, 4.2 + 3 * floor, 6 + 3 * floor,
                     pane if lit else unlit, 1 if lit else light)

    def draw_board(self, name, spot, angle, distance):
        """The sign of a landmark, seen at this bearing by someone in front of it: its picture in perspective."""
        board = sign(name, self.look.palette)
        half, bottom, top = (4.5, 0.6, 9.6) if board.width == board.height else (4, 2.4, 6.4)
        x, y = half * math.cos(math.radians(angle)), -half * math.sin(math.radians(angle))
        left, right = (self.ahead((spot[0] + s * x, spot[1] + s * y)) for s in (-1, 1))
        if _hidden(left, right) or min(left[1], right[1]) < NEAR:
            return
        corners = [self.pixel(*end, height) for end, height in ((left, top), (right, top), (right, bottom), (left, bottom))]
        x, y = (max(int(min(axis)), 0) for axis in zip(*corners))
        width, height = (min(int(max(axis)) + 1, self.size) - low for axis, low in zip(zip(*corners), (x, y)))
        if width > 0 and height > 0:
            numbers = quad_coefficients([(u - x, v - y) for u, v in corners], *board.size)
            flat = board.transform((width, height), Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BILINEAR)
            share = WEATHERS[self.look.weather] * min(distance / FAR, 1)
            hazy = Image.blend(flat.convert("RGB"), Image.new("RGB", flat.size, self.light.low), share)
            self.image.paste(hazy, (x, y), flat.getchannel("A"))

    def draw_weather(self, rng):
        """Rain or snow in the air."""
        for _ in range({"rain": 160, "snow": 240}.get(self.look.weather, 0) * self.size // 560):
            x, y, long = rng.uniform(0, self.size), rng.uniform(0, self.size), rng.uniform(0.01, 0.05) * self.size
            if self.look.weather == "rain":
                self.draw.line((x, y, x - long / 4, y + long), self.shade((200, 210, 225), 0, 0.9))
            else:
                self.draw.ellipse((x, y, x + long / 4, y + long / 4), (250, 250, 255))


@lru_cache(maxsize=8)
def _backdrop(look, size):
    """What all views have behind them: the pavement, and a sky that turns into the colour at the horizon."""
    def mixed(share, start, end):
        return tuple(int(a + (b - a) * share) for a, b in zip(start, end))
    light, horizon = LIGHTS[look.light], int(size * HORIZON)
    sky = mixed(WEATHERS[look.weather], light.sky, light.low)
    white = look.weather == "snow"
    image = Image.new("RGB", (size, size), tuple((value + 480) // 3 for value in light.pavement) if white else light.pavement)
    for y in range(horizon):
        ImageDraw.Draw(image).line((0, y, size, y), mixed(y / horizon, sky, light.low))
    return image


def _clipped(start, end):
    """What of a polygon's side, from (x, z, height) to the same, is ahead of the camera: its start, and where it crosses NEAR."""
    inside, share = start[1] >= NEAR, (NEAR - start[1]) / ((end[1] - start[1]) or 1)
    crossing = (start[0] + (end[0] - start[0]) * share, NEAR, start[2] + (end[2] - start[2]) * share)
    return [start] * inside + [crossing] * (inside != (end[1] >= NEAR))


def _hidden(left, right):
    """Whether a front between two camera points is behind the camera, outside the view, or seen from its back."""
    (x, z), (u, w) = left, right
    return max(z, w) < NEAR or x * w >= u * z or min(x - z, u - w) > 0 or max(x + z, u + w) < 0


def quad_coefficients(corners, width, height):
    """The eight numbers with which pillow fills the quadrilateral `corners` (from the top left, clockwise) with a width x height
    picture: u = (a x + b y + c) / (g x + h y + 1), v = (d x + e y + f) / (g x + h y + 1)."""
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, ((0, 0), (width, 0), (width, height), (0, height))):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
        values += [u, v]
    return np.linalg.solve(np.array(rows), np.array(values)).tolist()


@lru_cache(maxsize=512)
def sign(name, palette):
    """The picture on a landmark's sign, RGBA: its name on two lines, or for a short name an emblem for the tiny model."""
    if name in VIRL["short"]:
        return _emblem(VIRL["short"].index(name))
    back, ink = BOARDS[palette]
    image = Image.new("RGBA", (320, 160), back)
    draw, lines = ImageDraw.Draw(image), name.split()
    draw.rectangle((4, 4, 315, 155), outline=ink, width=4)
    size = min(int(46 * 300 / max(draw.textlength(line, ImageFont.load_default(46)) for line in lines)), 66)
    for line, middle in zip(lines, (48, 112) if len(lines) == 2 else (80,)):
        draw.text((160, middle), line, ink, ImageFont.load_default(size), "mm")
    return image


def _emblem(number):
    """One of sixteen: a disc, a cross, a triangle or a ring in one of four colours, on white."""
    image = Image.new("RGBA", (64, 64), (255, 255, 255))
    draw, colour = ImageDraw.Draw(image), EMBLEMS[number % 4]
    draw.rectangle((0, 0, 63, 63), outline=(20, 20, 20), width=5)
    if number // 4 == 1:
        draw.rectangle((24, 9, 39, 54), colour)
        draw.rectangle((9, 24, 54, 39), colour)
    elif number // 4 == 2:
        draw.polygon([(32, 9), (55, 54), (9, 54)], colour)
    else:
        draw.ellipse((9, 9, 54, 54), colour if number < 4 else None, colour, 13)
    return image


def _in_reach(name, style, point, road, reach):
    """What there is to see from a point in any direction, as (a draw method of View, its arguments): roads in this colour and
    their lines, then all that stands within so many metres, the farthest first."""
    town, (paved, lines), stood = city(name, style), roads(name, style), []
    for wall in walls(name, style):
        if (far := (math.dist(wall[0], point) + math.dist(wall[1], point)) / 2) < reach:
            stood.append((far, View.draw_wall, *wall))
    for at, (label, angle) in town.landmarks.items():
        spot = town.sign_point(at)
        if (far := math.dist(spot, point)) - 2 < reach:
            stood.append((far - 2, View.draw_board, label, spot, angle, far))  # before the wall that it hangs on
    ground = [(View.draw_ground, strip, road) for strip in paved]
    ground += [(View.draw_ground, strip, WHITE) for strip in lines if math.dist(strip[0], point) < reach / 2]
    return ground + [thing for _, *thing in sorted(stood, key=lambda thing: -thing[0])]


def draw_grid(name, style, place, heading, look, tile):
    """The four views of a place in one picture, see four_views."""
    point = city(name, style).point(place)
    size = tile if look.tiles == 4 else tile // 2
    fine = 4 if size < 100 else 2 if size < 400 else 1  # drawn so many times too large and reduced, which smooths edges
    reach = min(FAR, size * fine / 2)  # a small picture shows less of what is far
    things = _in_reach(name, style, point, LIGHTS[look.light].road, reach)

    def view(heading):
        drawn = View(point, heading, look, size * fine)
        for draw, *what in things:
            draw(drawn, *what)
        drawn.draw_weather(random.Random(f"virl/{name}/{place}/{heading}"))
        return drawn.image.reduce(fine)
    return four_views(heading, view)


def four_views(heading, view):
    """view(heading in degrees), a square picture, of four directions in one: front and right above, back and left below."""
    views = [view((heading + 90 * i) % 360) for i in range(4)]
    size = views[0].width
    image = Image.new("RGB", (2 * size, 2 * size))
    for i, each in enumerate(views):
        image.paste(each, (size * (i % 2), size * (i // 2)))
    return image


def draw_map(problem, size):
    """A map of the part of a generated city around a walk's route, an RGB picture of size x size pixels: north up, the route in
    red, its positions numbered from 1, the landmarks by name."""
    town, rail = city(problem.route.city, problem.style), problem.route.rail
    points = [town.point(here.place) for here in rail]
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points))
    scale = size / (max(right - left, high - low) + 70)

    def pixel(point):
        return size / 2 + (point[0] - (left + right) / 2) * scale, size / 2 - (point[1] - (low + high) / 2) * scale
    image = Image.new("RGB", (size, size), (222, 214, 200))
    draw = ImageDraw.Draw(image)
    for width, colour in ((2 * CURB, (190, 186, 178)), (10, (250, 250, 250))):
        for a, b in town.turns:
            draw.line((pixel(town.nodes[a]), pixel(town.nodes[b])), colour, int(width * scale))
            radius = width * scale / 2
            draw.ellipse([n + sign * radius for sign in (-1, 1) for n in pixel(town.nodes[a])], colour)
    draw.line([pixel(point) for point in points], (214, 40, 40), 5)
    for place, (name, angle) in town.landmarks.items():
        x, y = pixel(town.sign_point(place))
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), (24, 62, 92))
        off_x, off_y = 10 * math.sin(math.radians(angle)), -10 * math.cos(math.radians(angle))  # away from the street
        anchor = ("r" if off_x < -5 else "l" if off_x > 5 else "m") + ("m" if abs(off_x) > 5 else "b" if off_y < 0 else "t")
        draw.text((x + off_x, y + off_y), name, (24, 62, 92), ImageFont.load_default(15), anchor)
    for i, point in enumerate(points):
        x, y = pixel(point)
        draw.ellipse((x - 13, y - 13, x + 13, y + 13), (255, 255, 255), (214, 40, 40), 3)
        draw.text((x, y), str(i + 1), (30, 30, 40), ImageFont.load_default(15), "mm")
    draw.text((size - 30, 30), "N", (30, 30, 40), ImageFont.load_default(28), "mm")
    draw.polygon([(size - 30, 44), (size - 38, 64), (size - 22, 64)], (30, 30, 40))
    return image


# ---- 17. V-IRL: released data ----------------------------------------------------------------------------------------
# The paper's routes (dataset tianzhechu/SFTvsRL_Data), from a folder with route_infos.json, gps_pano_mapping.pkl and
# street_views/. All of it is material from elsewhere: it is bounded, read field by field, and never executed.

MAX_DATA = 1 << 28  # bytes of a file
PUSHES = {"BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(data):
    """Read a pickle (bytes, protocols 2 to 5) of dict, tuple, str, int and float. Nothing is imported or called: any other
    opcode, such as those that name a class or a function, is a ValueError with its name, and so is a broken stream."""
    stack, memo, marks = [], {}, []
    try:
        for opcode, arg, _ in pickletools.genops(data):
            name = opcode.name
            if name in PUSHES:
                stack.append(arg)
            elif name in TUPLES:
                parts = [stack.pop() for _ in range(TUPLES[name])]
                stack.append(tuple(parts[::-1]))
            elif name == "MARK":
                marks.append(len(stack))
            elif name == "TUPLE":
                start = marks.pop()
                stack[start:] = [tuple(stack[start:])]
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name in ("SETITEM", "SETITEMS"):
                start = len(stack) - 2 if name == "SETITEM" else marks.pop()
                _set_items(stack[start - 1], stack[start:])
                del stack[start:]
            elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if arg is None else arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(f"it has the opcode {name}; only dict, tuple, str, int and float are read")
        return stack.pop()
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"This pickle is not plain data: {printable(str(error), 120)}.") from None


def _set_items(target, items):
    if len(items) % 2:
        raise ValueError("a key has no value")
    for key, value in zip(items[::2], items[1::2]):
        flat = key if isinstance(key, tuple) else (key,)
        if not isinstance(target, dict) or len(flat) > 2 or not all(isinstance(part, (str, int, float)) for part in flat):
            raise ValueError("a key is not a str, a number or a pair of them")  # nested pairs could take for ever to hash
        target[key] = value


def metres(a, b):
    """The distance of two points (latitude, longitude) in degrees, by the haversine formula."""
    lat_a, lng_a, lat_b, lng_b = map(math.radians, (*a, *b))
    h = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin((lng_b - lng_a) / 2) ** 2
    return 2 * 6_371_000 * math.asin(math.sqrt(min(h, 1)))


def _read_bytes(path):
    try:
        if path.is_file() and path.stat().st_size <= MAX_DATA:
            return path.read_bytes()
    except OSError:  # a name that is too long, no permission
        pass
    raise ValueError(f"{printable(str(path), 200)} cannot be read or is larger than {MAX_DATA >> 20} MB: give the unpacked folder of "
                     "released routes.")


BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)  # what odd data can raise


@lru_cache(maxsize=4)
def released_routes(folder, pictures=False):
    """All Routes of a folder, in their order; each place is the name of a panorama (None without one, for walks in text only).

    Routes that cannot be used are left out and named on stderr. ValueError for other files, or without any usable route."""
    folder, found, skipped = Path(folder), [], []
    panoramas = read_plain_pickle(_read_bytes(folder / "gps_pano_mapping.pkl"))
    try:
        infos = list(json.loads(_read_bytes(folder / "route_infos.json"))[0])
        if not all(isinstance(point, tuple) and isinstance(name, str) for point, name in panoramas.items()):
            raise ValueError("a panorama's point is no pair or its name no text")  # the text of nested tuples could take for ever
        known = [((float(lat), float(lng)), name) for (lat, lng), name in panoramas.items()]
    except BROKEN as error:
        raise ValueError(f"{folder} does not hold routes as released: {type(error).__name__} {printable(str(error))}.") from None
    for number, info in enumerate(infos):
        try:
            rail = _released_rail(info, number, known)
            if pictures and not all(here.place for here in rail):
                raise ValueError("has no panorama within 20 m of a position")
            found.append(Route(folder.name, rail, str(folder)))
        except BROKEN as error:
            lacks = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            skipped.append(f"{number} {printable(lacks)}")
    named = "; ".join(skipped[:10]) + f"; and {len(skipped) - 10} more" * (len(skipped) > 10)
    if not found:
        raise ValueError(f"{folder} does not hold routes as released, none can be used: {named or 'its list is empty'}.")
    if skipped:
        print(f"{len(skipped)} of {len(infos)} routes in {printable(str(folder), 200)} are left out: {named}.", file=sys.stderr)
    return tuple(found)


def _released_rail(info, number, known):
    """start -> points on the way, kept by chance -> turning point -> ... -> destination, as Positions."""
    rng = random.Random(f"virl/released/{number}")
    places = info["start_place"]["relocated_geocode"], *info["route_results"]["geocode_list"]
    points = [tuple(map(float, place)) for place in places]
    blocks = [parse_answer(block) for block in re.findall(r"\{[^{}]*\}", info["milestone_info"])]
    if len(blocks) != len(points) - 1 or not blocks:
        raise ValueError(f"has {len(points) - 1} points but {len(blocks)} milestones")
    stated = [re.match(r"\d{1,3}(\.\d+)?\b", block["to_next_intersection_heading"].strip()) for block in blocks]  # "298 (west)"
    if not all(stated):
        raise ValueError("has a milestone without a heading in degrees")
    headings = [float(number[0]) for number in stated]
    facing = round(float(info["init_heading"])) % 360 or _facing(rng, headings[0])
    rail = [Position(_nearest(points[0], known), facing, (), False, "turn", headings[0], 0)]
    for i, (block, start, end) in enumerate(zip(blocks, points, points[1:])):
        for share in (k / 6 for k in range(1, 6)) if metres(start, end) > 5 else ():
            kept, point = rng.random() < 0.5, tuple(a + (b - a) * share for a, b in zip(start, end))
            if kept and min(metres(point, start), metres(point, end)) > 8 and (name := _nearest(point, known)):
                rail.append(Position(name, headings[i], (), False, "forward", None, 2 * i + 1))
        told = re.findall(r"(?:The destination )?([^;]+?) is on your ([a-z ]+)", block["landmarks"])
        action, towards = ("turn", headings[i + 1]) if i + 1 < len(blocks) else ("stop", None)
        rail.append(Position(_nearest(end, known), headings[i], tuple((printable(name.strip()), side) for name, side in told),
                             action == "turn", action, towards, 2 * i + 1 + (action == "turn")))
    return tuple(rail)


def _nearest(point, known):
    """The name of the panorama nearest to a point, None where there is none within 20 m."""
    near = [(metres(point, at), name) for at, name in known if abs(at[0] - point[0]) < 3e-4]
    distance, name = min(near, default=(math.inf, None))
    return name if distance <= 20 else None


def released_grid(folder, name, heading, look, tile):
    """As draw_grid, from the panorama `name` of the folder. ValueError where it is missing, too large or wrongly named."""
    if not re.fullmatch(r"[\w-]{1,64}", name or "", re.ASCII):
        raise ValueError(f"{_quoted(name or '')} is no name of a panorama.")
    folder, size = Path(folder) / "street_views", tile if look.tiles == 4 else tile // 2
    metadata, photo = (_read_bytes(folder / f"{name}{ending}") for ending in (".metadata.json", ".jpg"))
    try:
        rotation = float(json.loads(metadata)["rotation"])
        if not abs(rotation) <= 1e6:
            raise ValueError("no angle")
    except BROKEN:
        raise ValueError(f"The metadata of the panorama {name} has no rotation in degrees.") from None
    try:
        with Image.open(io.BytesIO(photo), formats=("JPEG",)) as image:
            if image.size[0] * image.size[1] > 1 << 27:
                raise ValueError(f"The panorama {name} has more than {1 << 27} pixels.")
            panorama = np.asarray(image.convert("RGB"))
    except OSError:
        raise ValueError(f"The panorama {name} is no picture that can be read.") from None

    def view(towards):
        flat = panorama_view(panorama, (towards - 180) % 360 + rotation, 640)
        return Image.fromarray(flat).resize((size, size), Image.Resampling.BILINEAR)
    return four_views(heading, view)


def panorama_view(panorama, yaw, size):
    """A flat view of size x size, 90 degrees wide, pitch 0, of an equirectangular panorama (H, W, 3) uint8; yaw in degrees
    to the right of its middle."""
    high, wide = panorama.shape[:2]
    across = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1  # the plane one unit ahead, from -1 to 1
    u = (np.arctan(across) / (2 * np.pi) + yaw / 360 + 0.5) % 1 * wide - 0.5  # (size,): of a column
    v = (0.5 + np.arctan2(across[:, None], np.hypot(across, 1)) / np.pi) * high - 0.5  # (size, size)
    left, top = np.floor(u).astype(np.int32), np.floor(v).astype(np.int32)
    share_u, share_v = (u - left).astype(np.float32)[:, None], (v - top)[..., None]
    left, right, low, pixels = left % wide, (left + 1) % wide, np.minimum(top + 1, high - 1) * wide, panorama.reshape(-1, 3)
    upper, lower = ((1 - share_u) * pixels[row + left] + share_u * pixels[row + right] for row in (top * wide, low))
    return (upper + (lower - upper) * share_v + 0.5).astype(np.uint8)


# ---- 18. Problems and suites -----------------------------------------------------------------------------------------

class Task(NamedTuple):
    """One row of the table of tasks: the class, the trained rule and visual (None: a task in text), the suite, its probes."""
    problem: type
    rule: str
    visual: str | None
    suite: tuple[Row, ...]
    probes: tuple[Row, ...] = ()

    @property
    def pictures(self) -> bool:
        """Whether the task shows pictures."""
        return self.visual is not None


def task_of(suite: str) -> Task:
    """The Task of a suite such as "gp-l" or "gp-l-probes"; ValueError for others."""
    if suite not in suite_names():
        raise ValueError(f"Unknown suite {printable(suite)!r}: choose one of {', '.join(suite_names())}.")
    return TASKS[suite.removesuffix("-probes")]


def suite_rows(suite: str) -> tuple[Row, ...]:
    """The rows of a suite; ValueError for an unknown one."""
    return task_of(suite).probes if suite.endswith("-probes") else task_of(suite).suite


def suite_names() -> list[str]:
    """The names of all suites: of every task its own, and, where there are probes, "TASK-probes"."""
    return [name + ending for name, task in TASKS.items() for ending in ("", "-probes")[: 1 + bool(task.probes)]]


def make(name: str, rule: str | None = None, visual: str | None = None, split: str = "train", index: int = 0, attempts: int = 1,
         style: str = "full", judged_by: str | None = None, seed: int = 0, tile: int | None = None,
         data: str | None = None) -> Problem:
    """Make the problem (name, rule, visual, split, index): these five give the same problem on every machine.

    rule: GeneralPoints: a text for fill_rule and parse_rule (None: the trained rule), wildcards drawn anew for every index; V-IRL:
    one for parse_turns. visual, for pictures: a text for fill_look or fill_scene (None: the trained one), drawn likewise.
    judged_by: the faces, or the rule for turns, that answers are judged by where they are not the prompt's (the "fake rule"
    control; target and cards are always the prompt's, and the expert follows the prompt). index counts from 0; the run's `seed`
    shifts it for "base" and "train" only. attempts: answers per episode, in V-IRL per position. style: in V-IRL the "short"
    routes are other, shorter ones. tile: the size of the model's image tiles in pixels (None: 32, and for street views in full
    style 560). data, for V-IRL: a folder of released routes to take instead, over and over, whatever the split. ValueError, in
    one sentence, for anything unknown or out of range."""
    for value, known in ((name, TASKS), (split, SPLITS), (style, STYLES)):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}.")
    if index < 0 or seed < 0 or attempts < 1:
        raise ValueError("The index and the seed must be 0 or more, the attempts 1 or more.")
    task = TASKS[name]
    if visual is not None and not task.pictures:
        raise ValueError(f"{name} is a task in text and has no visual {visual!r}.")
    index += seed * 10**9 if split in ("base", "train") else 0
    return task.problem.make(rule=task.rule if rule is None else rule, visual=visual or task.visual, split=split, index=index,
                             attempts=attempts, style=style, judged_by=judged_by, tile=tile, data=data)


# The gap between the rows is the study's result.
PROBES = [                                    # further away, one change from the trained rule each
    Row("faces-5", "5"),                      # faces as numbers that other cards have too
    Row("faces-7", "7"),
    Row("faces-12", "12"),                    # faces as one number that no card of the trained rule has
    Row("five-cards", "10/cards=5"),
    Row("target-36", "10/target=36"),
]
GP_TEXT = (
    Row("id", ID_RULE),                   # the rule that was trained
    Row("rule", OOD_RULE),                # the same hands under the rule that was not
    Row("fake", OOD_RULE, ID_RULE),       # told the new rule, judged by the old: high where the old rule was memorized,
)                                         # low where arithmetic was lost
GP_PICTURES = (
    Row("id", ID_RULE, visual="black"),   # the rule and the look that were trained
    Row("rule", OOD_RULE, visual="black"),
    Row("fake", OOD_RULE, ID_RULE, "black"),
    Row("red", ID_RULE, visual="red"),    # the paper's change of look: only ink and suits
    *(Row(name, ID_RULE, visual="black/" + look) for name, look in (
        ("grid", "layout=grid"), ("scattered", "layout=scattered"), ("serif", "glyphs=serif"), ("dark", "style=dark"),
        ("dim", "light=50/noise=15"), ("numbers", "scheme=numbers"), ("words", "scheme=words"), ("pips", "scheme=pips"))),
    Row("shuffled", ID_RULE, visual="black"),  # the control: every hand beside the picture of another one
    Row("text", ID_RULE, visual="text"),  # the same hands in words: the difference to "id" is the cost of seeing
)
PICTURE_PROBES = (
    *(row._replace(visual="black") for row in PROBES),
    Row("mixed", ID_RULE, visual="*/layout=*/scheme=*/style=*/glyphs=*/table=*/light=50|75|100|125/noise=0|8|15"),
    Row("rule-red", OOD_RULE, visual="red"),
)
WALKS = (Row("id", "absolute"), Row("rule", "relative"), Row("fake", "relative", "absolute"))
WALK_PROBES = (                    # the instructions have the words of the rule alone, which can be copied
    Row("told-id", "absolute/told=rule"),
    Row("told-rule", "relative/told=rule"),
    Row("told-fake", "relative/told=rule", "absolute"),
)
TASKS: dict[str, Task] = {
    "gp-l": Task(GeneralPoints, ID_RULE, None, GP_TEXT, tuple(PROBES)),
    "gp-vl": Task(GeneralPoints, ID_RULE, "black", GP_PICTURES, PICTURE_PROBES),
    "virl-l": Task(Navigation, "absolute", None, WALKS, WALK_PROBES),
    "virl-vl": Task(Navigation, "absolute", "day", (*WALKS, Row("visual", "absolute", visual="dusk/weather=rain/palette=brick"))),
}


# ---- 19. Command line ------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Command line that shows problems."""
    cards, streets = ("; ".join(f"{name} {_any_of(known)}" for name, known in each.options().items()) for each in (Look, Scene))
    parser = argparse.ArgumentParser(description="Show problems as a model sees them, and judge answers.")
    which = parser.add_argument_group("which problems")
    which.add_argument("--task", default="gp-l", help=f"one of: {', '.join(TASKS)} (default %(default)s)")
    which.add_argument("--rule", help="GeneralPoints: what J, Q, K count as: 10 or 11,12,13, * or ? for any of 1..13 or 10..13; "
                       f"then /target=N or * (any of {TARGETS[0]}..{TARGETS[1]}) /cards=N /courts=N (at least N face cards). Not "
                       "named: 24 and 4 cards (default 10). V-IRL: absolute or relative, perhaps /told=rule (default absolute)")
    which.add_argument("--split", default="test", help=f"{', '.join(SPLITS[:-1])} or test (default test)")
    which.add_argument("--index", type=int, default=0, help="the first problem's index (default 0)")
    which.add_argument("--n", type=int, default=3, help="number of problems (default 3)")
    which.add_argument("--seed", type=int, default=0, help="shifts the training problems (default 0)")
    which.add_argument("--style", default="full", help="full or short prompts and feedback (default full)")
    which.add_argument("--data", metavar="FOLDER", help="V-IRL: take released routes from this folder")
    pictures = parser.add_argument_group("pictures")
    pictures.add_argument("--visual", metavar="LOOK", help="such as red/layout=grid/light=60 or dusk/weather=rain, * for any "
                          f"value, a|b for one of some. Cards (default black): {cards}. Streets (default day): {streets}")
    pictures.add_argument("--tile", type=int, default=560, help="size of the model's image tiles in pixels (default 560)")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--answer", metavar="TEXT", help="judge this response (JSON) to the first problem")
    answers.add_argument("--ask", action="store_true", help="ask for answers, as is done at a terminal anyway")
    answers.add_argument("--attempts", type=int, default=1, help="answers per problem (default 1)")
    return parser.parse_args(argv)


def main(args):
    """Print the problems, ask for answers where asked to, and return the list of Steps that were judged."""
    if args.n < 1:
        raise ValueError("The number of problems must be 1 or more.")
    steps = []
    for index in range(args.index, args.index + args.n):
        problem = make(args.task, args.rule, args.visual, args.split, index, args.attempts, args.style, seed=args.seed,
                       tile=args.tile, data=args.data)
        look = f" | look {problem.look}" if getattr(problem, "look", None) else ""
        _say(f"--- {args.task} | rule {problem.rule} | {args.split} {index} | class {problem.cls}{look}\n{problem.prompt}\n")
        if args.answer is not None:
            steps += [_judged(problem, args.answer)] if index == args.index else []
        elif args.ask or sys.stdin.isatty():
            steps += _asked(problem)
        _say("Expert: " + "\n        ".join(problem.demonstrate("expert", random.Random(0))))
        if isinstance(problem, GeneralPoints) and len(problem.hand) <= 4:
            _say(f"Distinct solutions: {len(solutions(problem.numbers, problem.rule.target))}")
        _say("")
    return steps


def _asked(problem):
    steps = []
    while not problem.done:
        try:
            line = input(f"Your {problem.asks}, or a whole response: ")
        except EOFError:
            break
        steps.append(_judged(problem, line if "{" in line else json.dumps({problem.asks: line})))
    return steps


def _judged(problem, response):
    step = problem.step(response)
    _say(f"Verdict: {step.outcome}, reward {step.reward:+g}. {step.feedback}\n")
    return step


def _say(text):
    """Print line by line without control characters, and without an error where the terminal cannot show a character."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in text.split("\n"):
        print(printable(line, len(line)).encode(encoding, "replace").decode(encoding))


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
