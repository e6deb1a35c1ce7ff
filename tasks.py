"""The tasks: their problems, an expert's answers, and the verifier that judges all answers.

GeneralPoints ("gp-l" in text, "gp-vl" in pictures): a formula that uses each of some playing cards
once must equal a target. The rule says what J, Q and K count as. V-IRL ("virl-l", "virl-vl"): walk
through a city by instructions. The rule says how a turn is called. Training sees one rule, the
test asks for another, in pictures also for another look: there memory and understanding part ways.

    problem = make("gp-l", rule="11,12,13", split="test", index=0, attempts=5)
    problem.prompt, problem.image           the first user turn; the picture, None in text
    problem.expert()                        a right response
    problem.step(response)                  Step(reward, done, feedback, outcome, read)

Contents, up to 5 the reading path
    1. What a task is        Step, Row, Problem (the protocol), make
    2. Cards and rules       Rule, values
    3. Splits and deals      problem_class, split_of, deal
    4. The verifier          judge, REWARD
    5. GeneralPoints         prompts, GeneralPoints
Cards:  6. Rules as text, 7. Reading an answer (JSON and near-JSON), 8. Formulas and solver,
        9. Looks (as text, with wildcards), 10. Pictures of cards
V-IRL:  11. V-IRL: a walk, 12. V-IRL: words, 13. V-IRL: routes, 14. V-IRL: a city, 15. V-IRL: views
        (for the model), 16. V-IRL: signs and the map (for people); released routes are walked by
        assets/panoramas.py
Table:  17. Tasks and suites; the command line is assets/game.py
"""
import hashlib
import json
import os
import random
import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate, combinations, islice, pairwise, product, zip_longest
from math import atan2, ceil, cos, degrees, dist, gcd, hypot, pi, radians, sin, tan
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

ASSETS = Path(__file__).parent / "assets"


def as_tuples(data):
    if isinstance(data, dict):
        return {key: as_tuples(value) for key, value in data.items()}
    return tuple(map(as_tuples, data)) if isinstance(data, list) else data


CARDS, VIRL = (as_tuples(json.loads((ASSETS / name).read_text(encoding="utf-8")))
               for name in ("cards.json", "virl.json"))  # wordings, names, drawings


# ---- 1. What a task is ---------------------------------------------------------------------------

SPLITS = ("base", "train", "val", "test")  # "base" stands in for pretraining
STYLES = ("full", "short")  # of prompts and feedback: for an instruct model; of few tokens
TASKS: dict[str, "Task"] = {}  # the table of section 17
RIGHT = ("right_action", "correct")  # outcomes
LAST_ATTEMPT, MISREAD = -1, -1.5  # in addition: no attempt is left; a picture is not read rightly


class Step(NamedTuple):
    """One judged answer. outcome: "correct" solves the problem, "right_action" leads on to the next
    question, all else is wrong. read: the share (0 to 1) of the picture that it names rightly."""
    reward: float
    done: bool
    feedback: str  # the next user turn
    outcome: str
    read: float = 0.0


def solved(outcomes: list[str], attempts: int | None = None) -> bool:
    """Whether one of the first `attempts` answers (None: any), right actions aside, is correct."""
    return "correct" in [outcome for outcome in outcomes if outcome != "right_action"][:attempts]


class Row(NamedTuple):
    """One row of a suite."""
    name: str
    rule: str
    judged_by: str | None = None  # the verifier's rule where it is not the prompt's ("fake rule")
    visual: str | None = None     # the look of the pictures; None for the trained look, and in text


class Words(NamedTuple):
    """Words of reports for problems, the trained rule, the other rule, problems of one class."""
    things: str = "problems"
    trained: str = "the trained one"
    other: str = "another"
    alike: str = "problems of the same kind"


class Problem:
    """The protocol: the class of a task. An instance is one problem, for one episode. A new task is
    a row of TASKS and a class whose instances have `prompt` and `cls`, and that defines
        make(**)        class method: the problem that the function `make` was asked for
        expert()        a right response (str) to the open question, by the rule of the prompt
        step(response)  the Step of the next answer; it sets `done`; RuntimeError once that is set
    All else can stay as it is here. A turn is a dict with the keys response, outcome, reward,
    feedback, read and, where `leads_on`, position."""
    prompt: str         # the first user turn
    cls: str            # problems of one class are alike: intervals draw them together
    image = None        # the picture of the open question (PIL), None in text
    done = False        # whether the episode is over
    position = 0        # the number of the open question
    attempt = 0         # the answers to it so far, of `attempts`
    leads_on = False    # whether a right answer leads to another question: Navigation.advance
    asks = ""           # the key of an answer that a person may give without JSON around it
    DEMONSTRATORS = {"expert": lambda problem, rng: [problem.expert()]}
    SCORES = {"first": "first attempt", "episode": "whole episode", "read": "read rightly"}
    WORDS = Words()

    def demonstrate(self, kind: str, rng: random.Random) -> list[str]:
        """[response, feedback, response, ...] of a demonstrator. ValueError for an unknown kind."""
        if kind not in self.DEMONSTRATORS:
            raise ValueError(f"{kind!r} is no demonstrator: choose one of "
                             f"{', '.join(self.DEMONSTRATORS)}.")
        return self.DEMONSTRATORS[kind](self, rng)

    def settle(self, outcome: str, reward: float, misread: bool) -> float:
        """Count an answer, see whether the episode is over, and return the whole reward: that of
        the outcome, LAST_ATTEMPT where no attempt is left, MISREAD for a picture misread."""
        if self.done:
            raise RuntimeError("This episode is over: make the problem anew.")
        self.attempt += 1
        failed = outcome not in RIGHT and self.attempt == self.attempts
        self.done = failed or outcome == "correct"
        return float(reward + LAST_ATTEMPT * failed + MISREAD * misread)

    def scores(self, turns: list[dict], forced: list[dict] | None = None) -> dict:
        """The value (0 to 1) of every name in SCORES. forced: the turns under teacher forcing."""
        outcomes, read = [turn["outcome"] for turn in turns], round(turns[0]["read"], 4)
        return {"first": int(solved(outcomes, 1)), "episode": int(solved(outcomes)), "read": read}

    def forget_pictures(self):
        """Drop what was drawn: the episode is over. A picture that is asked for is drawn anew."""

    def figures(self, turns: list[dict]) -> dict:
        """For a report: {"picture": image}, or {"pictures": [image, ...], "map": image}."""
        return {} if self.image is None else {"picture": self.image}

    @classmethod
    def parsed(cls, response: str) -> list[tuple[str, str]]:
        """The parts of a response that a report names, as (label, text)."""
        return []

    @classmethod
    def legible(cls, row: Row, tile: int) -> bool:
        """Whether the pictures of a row can be read at tiles of so many pixels."""
        return True


def make(name: str, rule: str | None = None, visual: str | None = None, split: str = "train",
         index: int = 0, attempts: int = 1, style: str = "full", judged_by: str | None = None,
         seed: int = 0, tile: int | None = None) -> Problem:
    """Make the problem (name, rule, visual, split, index): the same five give the same problem on
    every machine. ValueError, in one sentence, for anything unknown or out of range.
    rule, visual: texts, None for the trained ones; their wildcards are drawn anew for every index.
    index: from 0; the seed shifts it in "base" and "train" only. attempts: answers per question.
    judged_by: the verifier's face values or rule for turns ("fake rule"; None: the prompt's). The
        target and the number of cards are the prompt's, and the expert follows the prompt.
    style: walks of "short" are shorter. tile: pixels of image tiles (None: 32; "full" walks 560).
    """
    for value, known in ((name, TASKS), (split, SPLITS), (style, STYLES)):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {', '.join(known)}.")
    if index < 0 or seed < 0 or attempts < 1:
        raise ValueError("The index and the seed must be 0 or more, the attempts 1 or more.")
    task = TASKS[name]
    if visual is not None and not task.pictures:
        raise ValueError(f"{name} is a task in text and has no visual {visual!r}.")
    index += seed * 10**9 if split in ("base", "train") else 0
    return task.problem.make(
        rule=task.rule if rule is None else rule, visual=visual or task.visual, split=split,
        index=index, attempts=attempts, style=style, judged_by=judged_by, tile=tile)


# ---- 2. Cards and rules --------------------------------------------------------------------------

RANK_TEXTS = CARDS["ranks"]  # {a Look's scheme: the texts of the ranks}; "index": A, 2, ... Q, K
DECK = tuple((rank, suit) for suit in "SHDC" for rank in range(1, 14))  # a card: (rank 1..13, suit)
ID_RULE, OOD_RULE = "10", "11,12,13"  # the trained rule and the other one
TARGETS, TRIES = (10, 40), 10_000  # lowest and highest target drawn; deals of a hand


@dataclass(frozen=True)
class Rule:
    """The rule of a hand; section 6 reads it from text. ValueError for values out of range."""
    faces: tuple[int, ...] = (10, 10, 10)  # the values of J, Q and K, 1 to 99 each
    target: int = 24                       # 1 to 999; 0, written *: one of TARGETS for every hand
    cards: int = 4                         # 3 to 6
    courts: int = 0                        # a hand has at least so many face cards

    def __post_init__(self):
        fits = 3 <= self.cards <= 6 and 0 <= self.courts <= self.cards and 0 <= self.target <= 999
        if not fits or len(self.faces) != 3 or not all(1 <= face <= 99 for face in self.faces):
            raise ValueError(f"The rule {self} is out of range: J, Q, K have one value or three, "
                             "1 to 99 each, a target is 1 to 999, a hand has 3 to 6 cards and at "
                             "most so many face cards.")

    def __str__(self):
        text = ",".join(map(str, self.faces[:1] if len(set(self.faces)) == 1 else self.faces))
        for name in ("target", "cards", "courts"):
            if (value := getattr(self, name)) != getattr(Rule, name):
                text += f"/{name}={value or '*'}"
        return text


def values(hand, rule: Rule) -> tuple[int, ...]:
    """The numbers of a hand's cards: the ace 1, J, Q and K by the rule, the others as printed."""
    return tuple(rank if rank <= 10 else rule.faces[rank - 11] for rank, _ in hand)


def rank_names(hand) -> list[str]:
    """The ranks of a hand as people write them, such as ["K", "7", "2", "A"]."""
    return [RANK_TEXTS["index"][rank - 1] for rank, _ in hand]


# ---- 3. Splits and deals -------------------------------------------------------------------------
# A split by ranks would leak: K 7 2 A and Q 7 2 A are one problem under J=Q=K=10. So whole classes
# are held out: their hands from every stage and every rule, their numbers from all but "base",
# which stands in for pretraining (under J=3 it may show J-10-2-A, the numbers of 3-K-2-A). A class
# is numbers and target: 1-2-7-10=24 may be held out and 1-2-7-10=25 trained.


def problem_class(numbers, target: int) -> str:
    """Sorted numbers, those above 10 as 10, and the target: "1-2-7-10=24". A hand's values have the
    class of its ranks under ID_RULE and OOD_RULE, but maybe another one under other rules."""
    return "-".join(map(str, sorted(min(n, 10) for n in numbers))) + f"={target}"


@lru_cache(maxsize=1 << 16)
def split_of(cls: str) -> str:
    """The split of a class: train (60 %), val (10 %) or test (30 %), the same on every machine."""
    percent = int(hashlib.sha256(f"gp/{cls}".encode()).hexdigest()[:16], 16) % 100
    return "train" if percent < 60 else "val" if percent < 70 else "test"


@lru_cache(maxsize=1 << 14)
def deal(rule: Rule, split: str, index: int, suits: int = 4) -> tuple[tuple, Rule]:
    """(hand, rule with its target drawn): the first that fits in the stream of hands of an index.
    Every hand is solvable under its rule. In "val" and "test" it has a face card and is solvable
    under ID_RULE and OOD_RULE too, so both test the same hands; a third rule may get others. No
    rank comes more than `suits` times: one colour has two. ValueError where TRIES deals fail."""
    held_out, wanted = split in ("val", "test"), "train" if split == "base" else split
    faces = [rule.faces] + [parse_rule(text).faces for text in (ID_RULE, OOD_RULE) if held_out]
    rng = random.Random(f"gp/{split}/{index}")  # a text as seed gives the same stream everywhere
    for _ in range(TRIES):
        hand = tuple(rng.sample(DECK, rule.cards))
        dealt = replace(rule, target=rule.target or rng.randint(*TARGETS))
        ranks = [rank for rank, _ in hand]
        by_rank = split_of(problem_class(ranks, dealt.target))
        by_value = split_of(problem_class(values(hand, rule), dealt.target))
        # J=3 would make J-7-2-A of train a 3-7-2-A of test, or the reverse
        leaks = split != "base" and (by_value == "train") == held_out
        fits = by_rank == wanted and not leaks and max(map(ranks.count, ranks)) <= suits
        courts_fit = sum(rank > 10 for rank in ranks) >= max(rule.courts, held_out)
        if fits and courts_fit and all(
                solve(values(hand, replace(rule, faces=each)), dealt.target) for each in faces):
            return hand, dealt
    raise ValueError(f"No solvable {split} hand in {TRIES} deals for rule {rule}: choose another "
                     "target or number of cards.")


# ---- 4. The verifier -----------------------------------------------------------------------------
# Protocol and rewards: Chu et al., arXiv 2501.17161. We differ where the released code is weak:
# exact rationals, a split by class, one outcome per answer, true feedback, no text is evaluated.

REWARD = {"correct": 5, "wrong_value": -1, "wrong_numbers": -2, "illegal": -3}


class Illegal(ValueError):
    """The answer is no legal formula or action; the message says why, as the end of a sentence."""


class Verdict(NamedTuple):
    """The verifier's finding: a key of REWARD, by the formula alone; the fault, empty if none; the
    cards that the response lists; how much of that list is right (read_share)."""
    outcome: str
    fact: str = ""
    cards: tuple[str, ...] | None = None
    read: float = 0.0


def judge(response: str, hand, rule: Rule) -> Verdict:
    """Judge a response of any content, in under a millisecond; it never raises for a str. One
    outcome per answer, the first that holds: "illegal", "wrong_numbers" (a number is not on the
    cards, used too often, or missing), "wrong_value", "correct"."""
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
    if fact := misused(used, values(hand, rule)):
        return Verdict("wrong_numbers", fact, cards, read)
    if value != (rule.target, 1):
        shown = "/".join(map(str, value)).removesuffix("/1")
        return Verdict("wrong_value", f"{shown}, not {rule.target}", cards, read)
    return Verdict("correct", "", cards, read)


# ---- 5. GeneralPoints ----------------------------------------------------------------------------

def write_prompt(hand, rule: Rule, style: str, look=None) -> str:
    """The first user turn; with a Look the cards are in a picture and not in the prompt."""
    words = CARDS["wording"][style]
    names, shown = words["separator"].join(rank_names(hand)), look and CARDS["shown"][look.scheme]
    cards = words["seen" if look else "dealt"].format(count=len(hand), names=names, shown=shown)
    faces = words["alike" if len(set(rule.faces)) == 1 else "unlike"].format(*rule.faces)
    order = "in the picture" if look else "as dealt"
    return words["prompt"].format(cards=cards, faces=faces, target=rule.target, order=order)


largest_first = partial(sorted, reverse=True)  # the style of the demonstrator "sorted"


@dataclass(eq=False)
class GeneralPoints(Problem):
    """One hand of cards, see Problem. `numbers` are its values under the rule of the prompt."""
    hand: tuple
    rule: Rule
    attempts: int
    style: str
    judged_by: Rule             # the verifier's rule
    look: "Look | None" = None  # of the picture, None in text
    tile: int = 32              # pixels
    stream: str = ""            # names the random numbers of the picture
    asks = "formula"
    DEMONSTRATORS = Problem.DEMONSTRATORS | {
        "careful": lambda problem, rng: [problem.expert(rng)],
        "sorted": lambda problem, rng: [problem.expert(order=largest_first)]}
    SCORES = Problem.SCORES | {"read": "cards read", "listed": "numbers listed rightly"}
    WORDS = Words("hands", "J = Q = K = 10", "J, Q, K = 11, 12, 13",
                  "problems with the same numbers")

    def __post_init__(self):
        self.numbers = values(self.hand, self.rule)
        self.cls = problem_class([rank for rank, _ in self.hand], self.rule.target)
        self.prompt = write_prompt(self.hand, self.rule, self.style, self.look)

    @classmethod
    def make(cls, *, rule, visual, split, index, attempts, style, judged_by, tile):
        name, tile = f"gp/{split}/{index}", 32 if tile is None else tile
        rule = parse_rule(rule, random.Random(f"{name}/rule"))
        look = visual and Look.drawn(visual, f"{name}/look", rule.cards, tile)
        hand, rule = deal(rule, split, index, suits=2 if visual else 4)  # look "text" too
        judged_by = replace(rule, faces=parse_rule(judged_by or rule).faces)
        return cls(hand, rule, attempts, style, judged_by, look, tile, f"{name}/picture")

    @classmethod
    def legible(cls, row, tile):
        look, cards = Look.parse(row.visual or "text", random.Random(0)), parse_rule(row.rule).cards
        return look.legible_from(cards) <= tile

    @cached_property
    def image(self):
        """Drawn when first asked for, then kept; a control may set it to another hand's picture."""
        return picture(self.hand, self.look, self.tile, self.stream) if self.look else None

    def step(self, response):
        verdict = judge(response, self.hand, self.judged_by)
        misread = self.look is not None and verdict.read < 1
        reward = self.settle(verdict.outcome, REWARD[verdict.outcome], misread)
        feedback = self.feedback(verdict)
        if misread:
            feedback += CARDS["wording"][self.style]["misread"]
        return Step(reward, self.done, feedback, verdict.outcome, verdict.read)

    def feedback(self, verdict: Verdict) -> str:
        """The verifier's text about the formula."""
        return CARDS["wording"][self.style][verdict.outcome].format(fact=verdict.fact)

    def scores(self, turns, forced=None):
        """"listed": whether the first answer's list of numbers is that of the verifier's rule."""
        right, found = sorted(map(str, values(self.hand, self.judged_by))), []
        with suppress(Illegal, TypeError):  # TypeError: no list
            found = sorted(parse_answer(turns[0]["response"]).get("number"))
        return super().scores(turns) | {"listed": int(found == right)}

    def expert(self, rng: random.Random | None = None, order=list):
        return self.response(self.rule, self.solution(self.rule, rng), order)

    def solution(self, rule: Rule, rng: random.Random | None = None) -> str | None:
        """The first of `solutions` under a rule, or with rng any one; None if there is none."""
        found = solutions(values(self.hand, rule), rule.target)
        return (rng.choice(found) if rng else found[0]) if found else None

    def response(self, rule: Rule, formula: str, order=list) -> str:
        """A response with a formula, and with the values of the cards under a rule, in an order."""
        cards, numbers = rank_names(self.hand), order(values(self.hand, rule))
        return json.dumps({"cards": cards, "number": numbers, "formula": formula})

# ==== The reading path ends here. Everything below can be skipped. ====


# ---- 6. Rules as text ----------------------------------------------------------------------------

def parse_rule(text: str | Rule, rng: random.Random | None = None) -> Rule:
    """Read "10" (J, Q and K alike) or "11,12,13", then "/target=36" or "/target=*", "/cards=5" and
    "/courts=2" in any order; str() undoes it. With rng a face may be a wildcard: * is drawn from
    1..13, ? from 10..13. ValueError, in one sentence, for other texts."""
    if isinstance(text, Rule):
        return text
    head, options = split_options(text, ("target", "cards", "courts"))
    lowest = {"*": 1, "?": 10} if rng else {}
    faces = tuple(rng.randint(lowest[face], 13) if face in lowest else _small_int(face, text)
                  for face in head.split(","))
    numbers = {name: 0 if (name, value) == ("target", "*") else _small_int(value, text)
               for name, value in options.items()}
    return Rule(faces * 3 if len(faces) == 1 else faces, **numbers)


def _small_int(digits, text):
    if re.fullmatch("[1-9][0-9]{0,2}", digits):
        return int(digits)
    raise ValueError(f"{printable(text)!r} is no rule like 10 or 11,12,13/target=36/cards=5.")


def split_options(text: str, names):
    """Take "head/name=value/name=value" apart: (head, {name: value}). ValueError for a name that is
    not one of `names` or stands twice."""
    head, *parts = text.split("/")
    options = dict(part.partition("=")[::2] for part in parts)
    if len(options) < len(parts) or not options.keys() <= set(names):
        known = ", ".join(f"/{name}=VALUE" for name in names)
        raise ValueError(f"{printable(text)!r} cannot be read: after the first value only {known} "
                         "may follow, each once.")
    return head, options


def printable(text: str, limit: int = 60) -> str:
    """Text of unknown origin made fit for a terminal: its printable characters, at most `limit`."""
    return "".join(filter(str.isprintable, text[:limit]))


# ---- 7. Reading an answer ------------------------------------------------------------------------
# Bound first, then read; nothing is executed or evaluated. One reader takes JSON and near-JSON:
# text or a ```json fence around the object, single quotes, bare words, a trailing comma. Numbers
# stay text, so 1e999, NaN or five thousand digits do no harm. Every token is matched once and
# counted (six cards need 36), so the time is short.

MAX_RESPONSE, MAX_TOKENS = 4000, 100  # characters; parts of the JSON object
MAX_FORMULA = 200
MAX_NUMBERS = 16
MAX_DIGITS = 4
MAX_DEPTH = 16
JSON_TOKEN = re.compile(
    r"""\s*(?:(?P<double>"(?:[^"\\]|\\.)*")|(?P<single>'(?:[^'\\]|\\.)*')"""
    r"""|(?P<mark>[{}\[\],:])|(?P<word>[^\s{}\[\],:"']+))""", re.DOTALL)
FORMULA_TOKEN = re.compile(r"[0-9]+|\S", re.ASCII)
SIGNS = str.maketrans("×÷−", "*/-")


def parse_answer(text: str) -> dict:
    """Read the one flat object in a response. A value is a str, a tuple of str (from a list) or
    None (from a bare number or word). Raises Illegal for anything else: no object or two, nested
    ones, a key given twice, more than MAX_TOKENS tokens."""
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
    """Yield (kind, text, end). The kind is one of the marks { } [ ] , : or a kind of text."""
    for _ in range(MAX_TOKENS):
        if not (match := JSON_TOKEN.match(text, position)):
            break
        position = match.end()
        kind = match.lastgroup
        token = match[kind]
        if kind == "double":
            token = _unescaped(token)
        elif kind == "single":
            token = token[1:-1].replace("\\'", "'")
        yield token if kind == "mark" else kind, token, position
    raise Illegal(f"the JSON object is broken, does not end or has more than {MAX_TOKENS} parts")


def _unescaped(token):
    if "\\" not in token:
        return token[1:-1]
    try:
        return json.loads(token, strict=False)  # one string, bounded: only its escapes are read
    except ValueError:
        raise Illegal("a string in the JSON object has a wrong escape") from None


def _items(tokens, close, read):
    """The items of an object or a list, each read by `read`, and the end of its closing mark."""
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
    return key, value if token[0] != "word" else None


def _scalar(token, tokens):
    if token[0] not in ("double", "single", "word"):
        raise Illegal("the JSON object is nested or lacks a value")
    return token[1]


def parse_formula(text: str, target: int):
    """Read a formula: its exact value (numerator, denominator), and the numbers in it, in order.

    Whole numbers without leading zeros, + - * / (also × ÷ −), round brackets, spaces, and one
    optional `=target` at the end. Raises Illegal for anything else, such as a division by zero, a
    sign before a number, a missing operator, and texts past the bounds."""
    if len(text) > MAX_FORMULA:
        raise Illegal(f"the formula is longer than {MAX_FORMULA} characters")
    tokens = FORMULA_TOKEN.findall(text.translate(SIGNS))
    if tokens[-2:] == ["=", str(target)]:
        tokens = tokens[:-2]
    _check_tokens(tokens, target)
    stack = tokens[::-1]  # the next token is the last one
    value = _sum(stack)
    if stack:
        raise Illegal(f"{quoted(stack[-1])} stands where an operator or the end should")
    return value, [int(token) for token in tokens if token.isdigit()]


def _check_tokens(tokens, target):
    depth = count = 0
    for token in tokens:
        if token[0] in "0123456789":
            count += 1
            if len(token) > MAX_DIGITS or token[0] == "0" and len(token) > 1:
                raise Illegal(f"{quoted(token)} has a leading zero or more than {MAX_DIGITS} "
                              "digits")
        elif token == "=":
            raise Illegal(f"'=' may stand only once, at the end, as '={target}'")
        elif token not in "+-*/()":
            raise Illegal(f"{quoted(token)} is not allowed")
        depth += (token == "(") - (token == ")")
        if depth > MAX_DEPTH or count > MAX_NUMBERS:
            raise Illegal(f"it has more than {MAX_NUMBERS} numbers or brackets more than "
                          f"{MAX_DEPTH} deep")


def _sum(stack, operators="+-"):
    """A sum of products, or a product with "*/", worked out from left to right."""
    part = partial(_sum, operators="*/") if operators == "+-" else _atom
    value = part(stack)
    while stack and stack[-1] in operators:
        value = _apply(stack.pop(), value, part(stack))
    return value


def _atom(stack):
    """A number, or a sum in brackets."""
    token = stack.pop() if stack else "the end"
    if token.isdigit():
        return int(token), 1
    if token != "(":
        raise Illegal(f"{quoted(token)} stands where a number or '(' should")
    value = _sum(stack)
    if not stack or stack.pop() != ")":
        raise Illegal("a bracket is not closed")
    return value


def quoted(text):
    return f"'{printable(text)}'" if printable(text) else "an unprintable character"


def misused(used, numbers) -> str:
    """The fault in the numbers that an answer uses, empty if there is none: the number used most in
    excess, and only then a missing one."""
    wrong = [n for n in (*used, *numbers) if used.count(n) != numbers.count(n)]
    if not wrong:
        return ""
    n = max(wrong, key=lambda n: used.count(n) - numbers.count(n))
    times = used.count(n)
    allowed = numbers.count(n)
    if allowed == 0:
        return f"{n} is not on the cards"
    if times == 0:
        return f"{n} is missing"
    limit = f", not {_times(allowed)}" if allowed > 1 else ""
    return f"{n} is used {_times(times)}{limit}"


def _times(count):
    return ("once", "twice")[count - 1] if count < 3 else f"{count} times"


RANK_OF = {"1": 1} | {text: rank for texts in RANK_TEXTS.values()
                      for rank, text in enumerate(texts, 1)}


def read_share(named, hand) -> float:
    """The share (0 to 1) of a hand that a list of card names (str) gets right: the cards in both,
    divided by the longer of the two. Order and case do not matter; "K", "KING" and "13" are one."""
    listed = Counter(RANK_OF.get(name.strip().upper()) for name in named)
    right = listed & Counter(rank for rank, _ in hand)
    return right.total() / max(len(hand), len(named))


# ---- 8. Formulas and solver ----------------------------------------------------------------------
# A value is a pair (numerator, denominator) in lowest terms, the denominator positive. Floats would
# refuse 8/(3-8/3) = 24; fractions.Fraction would do, but is several times slower, and every deal
# runs the solver.

def _ratio(top, bottom):
    shared = gcd(top, bottom) if bottom > 0 else -gcd(top, bottom)
    return top // shared, bottom // shared


def _apply(operator, x, y):
    """The value x operator y. Raises Illegal for a division by zero."""
    (a, b), (c, d) = x, y
    if operator in "+-":
        return _ratio(a * d + (c if operator == "+" else -c) * b, b * d)
    if operator == "*":
        return _ratio(a * c, b * d)
    if c == 0:
        raise Illegal("it divides by zero")
    return _ratio(a * d, b * c)


class Formula(NamedTuple):
    """A formula in one notation: sums and products are flat lists, so a-(b-c) and a+c-b are one.

    `kind` is "+" for a sum, "*" for a product, "" for a number. The `ups` are added (multiplied),
    the `downs` subtracted (divided by). Two texts are equal just where the formulas are, up to
    commutativity and associativity."""
    value: tuple[int, int]
    text: str
    kind: str = ""
    ups: tuple = ()
    downs: tuple = ()


def join_formulas(operator: str, left: Formula, right: Formula) -> Formula:
    """`left operator right`, flattened, in order, with as few brackets as possible."""
    kind, inverse = ("+", "-") if operator in "+-" else ("*", "/")
    (ups, downs), (more, fewer) = ((part.ups, part.downs) if part.kind == kind else ((part,), ())
                                   for part in (left, right))
    if operator == inverse:
        more, fewer = fewer, more
    ups, downs = (tuple(sorted(parts, key=_order)) for parts in (ups + more, downs + fewer))
    text = kind.join(map(_bracketed, ups)) + "".join(inverse + _bracketed(part) for part in downs)
    return Formula(_apply(operator, left.value, right.value), text, kind, ups, downs)


def _order(part):
    """Parts that must be worked out come first, so that their values are there when the rest is
    chosen; then the larger ones. The float only sorts: equal values give equal floats."""
    return part.kind == "", -part.value[0] / part.value[1], part.text


def _bracketed(part):
    return f"({part.text})" if part.kind == "+" else part.text  # only a product has sums as parts


# No partial result is ever negative: (7-13)*(2-6) is (13-7)*(6-2) with two signs flipped, and every
# formula of a positive value can be turned so. That halves the search, and keeps the unary minus
# and its look-alikes out of the experts' answers.

@lru_cache(maxsize=4096)
def _splits(numbers):
    """All ways to part a sorted tuple into two non-empty sorted tuples (few, many), each once."""
    found = {}
    for size in range(1, len(numbers) // 2 + 1):
        for few in combinations(numbers, size):
            many = tuple((Counter(numbers) - Counter(few)).elements())
            if (size, few) <= (len(many), many):
                found[few, many] = None
    return tuple(found)


@lru_cache(maxsize=600)  # four of six cards have about a thousand values: at most 100 MB
def _reachable(numbers):
    """Every value that a formula of exactly these numbers can have (a dict as an ordered set)."""
    if len(numbers) == 1:
        return {(numbers[0], 1): None}
    found = {}
    for few, many in _splits(numbers):
        for (a, b), (c, d) in product(_reachable(few), _reachable(many)):
            bottom = b * d
            p = a * d
            q = c * b
            for top, below in (
                    (p + q, bottom), (abs(p - q), bottom), (a * c, bottom), (p, q), (q, p)):
                if below:
                    found[_ratio(top, below)] = None
    return found


def _partners(x, target):
    """Yield all (operator, y, y_first): x operator y, or with y_first y operator x, is the target.

    For x = target = 0 any y would do and is left out: the same numbers give 0 with a single card as
    x too, and a card is never 0."""
    (a, b), (c, d) = x, target
    for operator, top, bottom, y_first in (
            ("-", c * b + a * d, b * d, True), ("+", c * b - a * d, b * d, False),
            ("-", a * d - c * b, b * d, False), ("*", c * b, a * d, False),
            ("/", a * c, b * d, True), ("/", a * d, b * c, False)):
        if top >= 0 and bottom and (a or operator in "+-"):
            yield operator, _ratio(top, bottom), y_first


def _formulas(numbers, target):
    """Yield the Formulas of exactly these numbers that equal the target; some come more than once.

    Meet in the middle: one side of the top operation is enumerated, the partner that it needs is
    looked up. Values are listed for up to three numbers: a list for more would cost too much."""
    if len(numbers) == 1:
        if target == (numbers[0], 1):
            yield Formula(target, str(numbers[0]))
        return
    for few, many in _splits(numbers):
        listed = _reachable(many) if len(many) <= 3 else None
        for x in _reachable(few):
            for operator, y, y_first in _partners(x, target):
                if listed is not None and y not in listed:
                    continue
                for right in _formulas(many, y):
                    for left in _formulas(few, x):
                        first, second = (right, left) if y_first else (left, right)
                        yield join_formulas(operator, first, second)


def solve(numbers, target: int) -> str | None:
    """One formula of 3 to 6 positive numbers, each used once, that equals the target, or None."""
    return _solve(tuple(sorted(numbers)), target)


@lru_cache(maxsize=1 << 16)
def _solve(numbers, target):
    return next((formula.text for formula in _formulas(numbers, (target, 1))), None)


def solutions(numbers, target: int) -> tuple[str, ...]:
    """All distinct formulas of up to 4 positive numbers that equal the target, the simplest first;
    of more numbers, which have too many, the one of `solve`.

    Distinct up to commutativity, associativity, flipped signs (no partial result is negative)."""
    return _solutions(tuple(sorted(numbers)), target)


@lru_cache(maxsize=1 << 13)
def _solutions(numbers, target):
    def simplicity(text):  # few brackets first, then few - and /; never two alike
        return text.count("("), text.count("-") + text.count("/"), text
    found = islice(_formulas(numbers, (target, 1)), 1 if len(numbers) > 4 else None)
    return tuple(sorted({formula.text for formula in found}, key=simplicity))


# ---- 9. Looks ------------------------------------------------------------------------------------
# How a picture of the cards may look, as data: one look is trained, the others are the test.

class Options:
    """Choices as data: each field is Literal[the known values]. Its text is the first value, then
    every other one that is not the default, as in "red/layout=grid"."""

    def __str__(self):
        first, *others = vars(self).items()
        text = first[1]
        for name, value in others if text != "text" else ():
            text += f"/{name}={value}" if value != getattr(type(self), name) else ""
        return text

    @classmethod
    def options(cls):
        """{the name of a field: its known values}"""
        return {name: get_args(known) for name, known in cls.__annotations__.items()}

    @classmethod
    def parse(cls, text, rng: random.Random | None = None):
        """Read a text, its options in any order; str() undoes it, an instance passes through. With
        rng there are wildcards: * is drawn from all values but text, a|b from those named.
        ValueError, in one sentence, for other texts, whatever would be drawn."""
        if isinstance(text, cls):
            return text
        options = cls.options()
        head, *others = options
        first, given = split_options(text, others)
        drawn = {}
        for name, value in ({head: first} | given).items():
            known = {str(each): each for each in options[name]}
            texts = value.split("|") if rng else [value]
            if rng and value == "*":
                texts = [each for each in known if each != "text"]
            for each in texts:
                if each not in known:
                    known = any_of(options[name])
                    raise ValueError(f"{name} must be {known}, not {printable(each)!r}.")
            drawn[name] = known[rng.choice(texts) if len(texts) > 1 else value]
        return cls(**drawn)


def any_of(known) -> str:
    """A few values by name, or the lowest and the highest of many."""
    if len(known) > 4:
        return f"from {known[0]} to {known[-1]}"
    return "one of " + ", ".join(map(str, known))


@dataclass(frozen=True)
class Look(Options):
    """How the cards look, as in "red/layout=grid/light=60"."""
    suits: Literal["black", "red", "both", "text"] = "black"  # S and C; H and D; as dealt
    layout: Literal["row", "grid", "scattered", "shuffled"] = "row"  # shuffled: not in dealt order
    scheme: Literal["index", "numbers", "words", "pips"] = "index"  # K, 13, KING, or 13 suit signs
    style: Literal["plain", "framed", "dark"] = "plain"  # of a card
    glyphs: Literal["sans", "serif", "mono", "italic"] = "sans"  # the typeface
    table: Literal["green", "blue", "wood", "grey"] = "green"
    light: Literal[*range(40, 141)] = 100  # brightness in percent
    noise: Literal[*range(41)] = 0  # standard deviation in grey levels
    tiles: Literal[4, 1] = 4  # how many of the model's tiles the picture takes

    @classmethod
    def drawn(cls, visual, stream, cards, tile):
        """The look of a problem, wildcards drawn from a stream; None for text. ValueError where so
        many cards cannot be read at tiles of so many pixels."""
        look = cls.parse(visual, random.Random(stream))
        if tile < (smallest := look.legible_from(cards)):
            raise ValueError(f"{cards} cards of the look {str(look)!r} need tiles of at least "
                             f"{smallest} pixels, not {tile}.")
        return look if look.suits != "text" else None

    def legible_from(self, cards: int) -> int:
        """The smallest tile, in pixels, at which so many cards can be read; 0 for text."""
        if self.suits == "text":
            return 0
        noise = 100 * self.noise / self.light
        need = 32 + 8 * (noise > 80) + 8 * (noise > 40 and self.scheme in ("words", "pips"))
        return ceil(need / min(self.sizes(cards, 1)[1]))

    def sizes(self, cards: int, tile: int):
        """(width, height) in pixels of a picture, and of the place of each card in it."""
        rows = 1 if self.layout == "row" else 2
        columns = ceil(cards / rows)
        width, height = (tile, tile) if self.tiles == 1 else (4 * tile // rows, tile * rows)
        return (width, height), (width / columns, height / rows)


CHANGED_LOOKS = {
    "grid": "layout=grid", "scattered": "layout=scattered", "serif": "glyphs=serif",
    "dark": "style=dark", "dim": "light=50/noise=15", "numbers": "scheme=numbers",
    "words": "scheme=words", "pips": "scheme=pips"}  # rows of the suite, one change each
ANY_LOOK = "*/layout=*/scheme=*/style=*/glyphs=*/table=*/light=50|75|100|125/noise=0|8|15"


# ---- 10. Pictures of cards -----------------------------------------------------------------------
# Cards are drawn two or four times too large and reduced, which smooths all edges. A picture is a
# pure function of the problem: noise, places and angles come from its own stream.

LARGE = 100                # pixels; a card in a smaller place is another drawing: its rank fills it
ANGLES = (-10, -4, 4, 10)  # degrees; few, so that most cards have been drawn before
GRAIN = 1 << 20            # as many places at which the noise of a picture may begin
STYLE_COLOURS = CARDS["styles"]  # of each style paper, edge, black ink, red ink
TABLE_COLOURS = CARDS["tables"]


def picture(hand, look: Look, tile: int, stream: str) -> Image.Image:
    """A hand as an RGB image, its sides multiples of `tile` pixels; `stream` seeds its noise."""
    rng = random.Random(stream)
    noise_seed = rng.getrandbits(64)  # drawn even if not needed: noise does not change the places
    size, place = look.sizes(len(hand), tile)
    dealt = _shown(hand, look.suits)
    columns = round(size[0] / place[0])
    cards = list(dealt)
    while look.layout == "shuffled" and cards == dealt:
        rng.shuffle(cards)
    image = _table(look.table, *size).copy()
    for k, card in enumerate(cards):
        _lay(image, card, look, place, (k % columns, k // columns), rng)
    if look.light != 100:
        image = image.point(lambda level: level * look.light / 100)
    return _noisy(image, look.noise, noise_seed) if look.noise else image


def _shown(hand, suits):
    """The cards of a picture. One colour has two suits, the first for S and H, the second for D and
    C; a card that is there already takes the other one."""
    if suits == "both":
        return list(hand)
    pair = {"black": "SC", "red": "HD"}[suits]
    shown = []
    for rank, suit in hand:
        card = rank, pair[suit in "CD"]
        shown.append(card if card not in shown else (rank, pair[suit not in "CD"]))
    return shown


@lru_cache
def _table(name, width, height):
    """The background as an RGB image: one colour, and for wood some boards with a grain."""
    if name != "wood":
        return Image.new("RGB", (width, height), TABLE_COLOURS[name])
    x, y = np.linspace(0, 2, width), np.linspace(0, 6, height)[:, None]
    board = np.floor(y)
    grain = .05 * np.sin(13 * y + 3 * np.sin(2 * x + board))
    shade = 1 + grain + .05 * np.sin(7 * board) - .2 * (y - board < 9 / height)
    return Image.fromarray((shade[..., None] * TABLE_COLOURS[name]).astype(np.uint8))


def _lay(image, card, look, place, at, rng):
    """Put a card (rank, suit) into the place `at` (column, row), of `place` pixels: in its middle,
    or scattered anywhere in it."""
    scattered = look.layout == "scattered"
    small = min(place) < LARGE
    share, (across, down) = .84 if scattered else 1, place
    width = share * min(.84 * across, down if small else .63 * down)
    height = min(1.4 * width, .94 * share * down)
    angle = rng.choice(ANGLES) if scattered else 0
    sprite = (_small_card if small else _large_card)(
        Card(*card, round(width), round(height), look.scheme, look.style, look.glyphs, angle))
    corner = [round(n * room + (room - side) * (rng.random() if scattered else .5))
              for n, room, side in zip(at, place, sprite.size)]
    image.paste(sprite, tuple(corner), sprite)


def _noisy(image, deviation, seed):
    start = seed % GRAIN
    count = image.width * image.height
    grain = Image.frombytes("L", image.size, _grain(count)[start:start + count])
    grain = grain.point(lambda level: 128 + (level - 128) / 30 * deviation)
    return ImageChops.add(image, Image.merge("RGB", [grain] * 3), offset=-128)


@lru_cache
def _grain(count):
    """Normal noise as bytes, mean 128, deviation 30. Any `count` in a row serve a picture: new ones
    would take long."""
    noise = np.random.default_rng(0).standard_normal(count + GRAIN, np.float32)
    return (noise * 30 + 128.5).clip(0, 255).astype(np.uint8).tobytes()


class Card(NamedTuple):
    """One card to draw: its size in pixels before it is turned, choices of its Look, degrees."""
    rank: int
    suit: str
    width: int
    height: int
    scheme: str
    style: str
    glyphs: str
    angle: int


def _draw_card(card, size, scale):
    """A card with its shadow as an RGBA image, drawn `scale` times too large and reduced. Its size
    is "small", for a place of 32 pixels, or "large", as from a real pack."""
    paper, edge, *inks = STYLE_COLOURS[card.style]
    face = Image.new("RGB", (card.width * scale, card.height * scale), paper)
    _paint(face, card, inks[card.suit in "HD"], CARDS["layouts"][size])
    outline = Image.new("L", face.size)
    box = (0, 0, face.width - 1, face.height - 1)
    radius = .09 * face.width
    ImageDraw.Draw(outline).rounded_rectangle(box, radius, 255)
    line = max(scale, round(.025 * face.width)) if card.style == "framed" else scale
    ImageDraw.Draw(face).rounded_rectangle(box, radius, None, edge, line)
    image = _with_shadow(face, outline, max(2, round(.03 * card.height)) * scale)
    return image.rotate(card.angle, Image.Resampling.BICUBIC, expand=True).reduce(scale)


def _with_shadow(face, outline, margin):
    image = Image.new("RGBA", (face.width + 2 * margin, face.height + 2 * margin), (0, 0, 0, 0))
    shadow = Image.new("L", (image.width // 4, image.height // 4))  # so small it is blurred sooner
    shadow.paste(130, (margin // 4, margin // 3), outline.reduce(4))
    image.putalpha(shadow.filter(ImageFilter.GaussianBlur(margin / 16)).resize(image.size))
    image.paste(face, (margin, margin), outline)
    return image


_small_card = lru_cache(maxsize=4096)(partial(_draw_card, size="small", scale=4))  # 30 KB each
_large_card = lru_cache(maxsize=256)(partial(_draw_card, size="large", scale=2))  # up to 1 MB each


def _paint(face, card, ink, layouts):
    """Paint the parts of a layout in assets/cards.json: [kind, width and height of its mask in
    shares of the card, x and y of its centre, whether it is upside down]."""
    scheme = "index" if card.scheme == "numbers" else card.scheme
    for kind, across, down, *place in layouts.get(f"{scheme} {card.rank}", layouts[scheme]):
        across *= face.width
        down *= face.height
        if kind == "court":
            _draw_court(face, card, ink)
            continue
        mask = _label(card, across, down) if kind == "label" else _sign(card.suit, across + down)
        for spot in _pips(card.rank, *place) if kind == "pips" else [place]:
            _stamp(face, ink, mask, *spot)


def _stamp(image, ink, mask, x, y, upside_down=False):
    """Paint a mask in ink with its centre at (x, y), in shares of the image."""
    mask = mask.transpose(Image.Transpose.ROTATE_180) if upside_down else mask
    left = x * image.width - mask.width / 2
    top = y * image.height - mask.height / 2
    image.paste(ink, (round(left), round(top)), mask)


def _pips(rank, left, top):
    """(x, y, upside down) of as many signs as the rank, the outer ones at `left` and `top`."""
    columns = left, .5, 1 - left
    return [(columns[column], top + (1 - 2 * top) * (twelfths / 12), twelfths > 6)
            for column, twelfths in CARDS["pips"][str(rank)]]


def _label(card, width, height):
    """A rank's text as a mask, `height` pixels tall in all, narrowed to `width` if it is wider."""
    text = RANK_TEXTS[card.scheme][card.rank - 1]
    size = round(height * 1.37)
    stroke = 0
    if card.glyphs == "sans":  # pillow's own typeface is thin
        font = ImageFont.load_default(size)
        stroke = height / 18
    else:
        # pyftsubset FILE --text=ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 --layout-features=
        # --no-hinting --name-IDs=0,1,2,13
        font = ImageFont.truetype(ASSETS / "fonts" / CARDS["typefaces"][card.glyphs], size)
    left, top, right, bottom = font.getbbox(text, anchor="ls", stroke_width=stroke)
    mask = Image.new("L", (ceil(right - left), ceil(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font, "ls", stroke_width=stroke)
    return mask.resize((min(round(width), mask.width), round(height)))


def _draw_shape(image, shape, colour, width, height):
    """Fill a shape in assets/cards.json, drawn so wide and high: a polygon, or a circle as x, y and
    radius."""
    if not isinstance(shape[0], tuple):
        x, y, r = shape
        shape = [(x + r * cos(k * pi / 24), y + r * sin(k * pi / 24)) for k in range(48)]
    ImageDraw.Draw(image).polygon([(x * width, y * height) for x, y in shape], colour)


SUIT_SHAPES = CARDS["suits"]


def _sign(suit, size):
    """A suit sign as a mask of size x size pixels."""
    mask = Image.new("L", (round(size), round(size)))
    for shape in SUIT_SHAPES[suit]:
        _draw_shape(mask, shape, 255, size, size)
    return mask


def _draw_court(face, card, ink):
    """A frame with the figure of J, Q or K, or with its number, and the same upside down below."""
    width = round(.58 * face.width)
    height = round(.37 * face.height)
    half = Image.new("RGB", (width, height), STYLE_COLOURS[card.style][0])
    if card.scheme == "numbers":
        mask = _label(card, .4 * face.width, .2 * face.height)
        place = .5
    else:
        mask = _sign(card.suit, .12 * face.width)
        place = .14
        for colour, shape in CARDS["courts"][str(card.rank)]:
            _draw_shape(half, shape, CARDS["colours"].get(colour, ink), width, height)
    _stamp(half, ink, mask, place, place)
    left = (face.width - width) // 2
    top = face.height // 2 - height
    face.paste(half, (left, top))
    face.paste(half.transpose(Image.Transpose.ROTATE_180), (left, top + height))
    frame = left, top, left + width, top + 2 * height
    ImageDraw.Draw(face).rectangle(frame, None, ink, max(1, face.width // 120))


# ---- 11. V-IRL: a walk ---------------------------------------------------------------------------
# A walk through streets by instructions, one action at a time. Each answer has one outcome:
# "correct" is the right stop() at the destination, "right_action" every right action before it.

WALK_REWARD = {"correct": 1, "right_action": 1, "wrong_action": -1, "illegal": -1}
WORDING = VIRL["wording"]  # "full": for an instruct model; "short": few tokens, for the tiny model
TILE = {"full": 560, "short": 32}  # pixels of an image tile, where none are given


@dataclass(eq=False)
class Navigation(Problem):
    """One walk along a route, for one episode. `attempts` are the answers per position. `image`
    shows the four views of the current position: after a right action it is another picture.

    More attributes: texts (the instructions), actions ("turn", "forward" or "stop": the right
    action at each position), attempt (the number of answers at this position), verdict (the latest
    Walked), drawn ({position: picture}). All copies share `drawn`: a group has one picture of a
    position."""
    route: "Route"
    rule: str
    attempts: int
    style: str
    judged_by: str
    look: "Scene | None" = None
    tile: int = 32
    drawn: dict = field(default_factory=dict)
    asks = "action"
    leads_on = True
    verdict = None
    SCORES = VIRL["scores"]
    WORDS = Words(**VIRL["report"])

    def __post_init__(self):
        self.actions = tuple(here.action for here in self.route.rail)
        self.texts = instructions(self.route, self.style)
        words = (right_word(here, "relative") for here in self.route.rail)
        self.cls = f"{self.route.city}: {', '.join(filter(None, words))}"

    @classmethod
    def make(cls, *, rule, visual, split, index, attempts, style, judged_by, tile):
        """See the function `make`. ValueError for a rule, a scene or a tile that do not fit."""
        tile = TILE[style] if tile is None else tile
        look = visual and Scene.parse(visual, random.Random(f"virl/{split}/{index}/look"))
        if look and not (least := look.legible_from(style)) <= tile <= 1120:
            raise ValueError(f"Views of the look {str(look)!r} in style {style} need tiles of "
                             f"{least} to 1120 pixels, not {tile}.")
        route = routes(f"{split}-{index // ROUTES}", style)[index % ROUTES]
        judged_by = parse_turns(judged_by or rule)
        return cls(route, parse_turns(rule), attempts, style, judged_by, look, tile)

    @property
    def here(self) -> "Position":
        """The current position."""
        return self.route.rail[self.position]

    @property
    def image(self):
        return self.picture(self.position)

    def forget_pictures(self):
        self.drawn.clear()

    def picture(self, position: int):
        """The picture of a position of the route, None in text."""
        if self.look and position not in self.drawn:
            self.drawn[position] = self.draw(self.route.rail[position])
        return self.drawn.get(position)

    def draw(self, here: "Position"):
        """The four views at a Position."""
        return draw_grid(self.route.city, self.style, here.place, here.heading, self.look,
                         self.tile)

    @property
    def prompt(self):
        """The first user turn: the rule, the instructions and, in text, the first observation."""
        words = WORDING[self.style]
        here = self.route.rail[0]
        items = [words["item"].format(number=i, text=text) for i, text in enumerate(self.texts, 1)]
        return words["prompt"].format(
            instructions=words["listed"].join(items),
            means=words["means"][self.rule],
            choices=", ".join(TURNS[self.rule]),
            facing=compass_word(here.heading),
            seen=words["picture" if self.look else "text"].format(observation(here, self.style)),
        )

    def step(self, response):
        """Judge the next answer. A right action moves on, and the feedback has the next
        observation. A wrong action changes nothing. Done when stop() is right or the attempts at
        this position are used up; a RuntimeError after that."""
        verdict = self.verdict = judge_walk(response, self.here, self.judged_by, self.style)
        outcome = verdict.outcome
        read = float(bool(verdict.observed))
        words = WORDING[self.style]
        reward = self.settle(outcome, WALK_REWARD[outcome], self.look is not None and not read)
        if outcome == "right_action":
            self.position += 1
            self.attempt = 0
        seen = words["next"] if self.look else observation(self.here, self.style)
        text = words["end"] if outcome == "correct" else words["why"][verdict.why]
        return Step(reward, self.done, text.format(fact=verdict.fact, seen=seen), outcome, read)

    def expert(self):
        return self.response(self.right_action())

    def advance(self):
        response = self.expert()
        judged_by = self.judged_by
        self.judged_by = self.rule
        step = self.step(response)
        self.judged_by = judged_by
        return response, step

    def right_action(self) -> str:
        """The right action by the rule of the prompt, as in "turn_direction(left)"."""
        word = right_word(self.here, self.rule)
        return f"turn_direction({word})" if word else f"{self.here.action}()"

    def response(self, action: str) -> str:
        """A response with this action and the right observation and instruction."""
        here = self.here
        words = WORDING[self.style]
        text = self.texts[here.instruction]
        following = words["following"].format(number=here.instruction + 1, text=text)
        answer = dict(zip(words["keys"], (observation(here, self.style), following, action)))
        return json.dumps(answer, separators=(",", ":") if self.style == "short" else None)

    def restarted(self) -> "Navigation":
        """A copy at the start, judged by its own rule, with two attempts at least: some
        demonstrators err once."""
        return replace(self, judged_by=self.rule, attempts=max(self.attempts, 2))

    def walk(self, rng, turn="turn"):
        """The demonstrator that takes the right action everywhere. turn: how it repeats the
        instruction to turn, a key of WORDING."""
        walker = self.restarted()
        texts = []
        walker.texts = instructions(self.route, self.style, turn)
        while not walker.done:
            response, step = walker.advance()
            texts += [response, step.feedback]
        return texts[:-1]

    # "reworded" repeats it in the words of the rule alone: what a base that has not met it would
    # hardly write. assets/habits.py adds some with bad habits.
    DEMONSTRATORS = {"expert": walk, "reworded": lambda walk, rng: walk.walk(rng, walk.rule)}

    def scores(self, turns, forced=None):
        """The scores of every problem, and scores by position. Shares are rounded to four digits.

        "steps_first", "steps": survival, the share of the route's positions passed before the
        first wrong answer, or before the attempts ran out (the paper's per-step accuracy; a mean
        over routes gives each the same weight). "forced": the share of positions answered rightly
        after a right walk up to each. Survival says how far a model gets alone: one kind of
        mistake costs all positions behind it. Teacher forcing says what the model knows at each
        position. "failed_at": the position of the first wrong answer, or None. "read": the share
        of all answers that name all things there and nothing else. "marks", "forced_marks": a
        letter for each position reached, the right action's initial, a capital where the first
        answer was right."""
        marks = self._marks(turns)
        passed = len(marks) - len(marks.lstrip("TFS"))  # positions before the first wrong answer
        right = sum(turn["outcome"] in RIGHT for turn in turns)
        scores = super().scores(turns) | {
            "read": round(sum(turn["read"] for turn in turns) / len(turns), 4),
            "steps_first": round(passed / len(self.actions), 4),
            "steps": round(right / len(self.actions), 4),
            "failed_at": passed if passed < len(marks) else None,
            "marks": marks,
        }
        if forced:
            marks = self._marks(forced)
            scores["forced"] = round(sum(map(str.isupper, marks)) / len(marks), 4)
            scores["forced_marks"] = marks
        return scores

    def _marks(self, turns):
        marks = {}
        for turn in turns:
            mark = self.actions[turn["position"]][0]
            right = turn["outcome"] in RIGHT
            marks.setdefault(turn["position"], mark.upper() if right else mark)
        return "".join(marks.values())

    def figures(self, turns):
        """The views up to the last position reached, and the map."""
        found = {"map": draw_map(self, 340)}
        if self.look:
            last = max((turn["position"] for turn in turns), default=0)
            found["pictures"] = [self.picture(position) for position in range(last + 1)]
        return found

    @classmethod
    def parsed(cls, response):
        """(label, text) for each key of a response of any content, in any style; a dash without
        it."""
        labels = VIRL["labels"]
        answer = {}
        with suppress(Illegal):
            answer = parse_answer(str(response))
        said = dict.fromkeys(labels.values(), "\u2013")
        said |= {labels[key]: str(answer[key]) for key in labels if key in answer}
        return [*said.items()]


# ---- 12. V-IRL: words ----------------------------------------------------------------------------
# Bearings are degrees clockwise from north.

SIDES = ("front", "right", "back", "left")  # of what is seen, and the order of the four views
TURNS = VIRL["turns"]  # {the rule trained in the paper, the one that is not: their words}
COMPASS = TURNS["absolute"]  # clockwise from north
SLIGHT = 60  # a turn by up to so many degrees is a slight one


def parse_turns(text: str) -> str:
    """A rule for turns, what the x of turn_direction(x) means: "absolute" or "relative". ValueError
    for other texts."""
    if text not in TURNS:
        raise ValueError(f"{printable(text)!r} is no rule for turns: write absolute or relative.")
    return text


def wrap(angle):
    """An angle in degrees brought into (-180, 180]. Unwrapped, left and right would change places
    near north."""
    return 180 - (180 - angle) % 360


def compass_word(angle: float) -> str:
    """The nearest of the eight words of COMPASS."""
    return COMPASS[round(angle / 45) % 8]


def turn_word(words, heading, towards):
    """The word for a turn from one bearing to another. "absolute": the compass word of the new one.
    "relative": "left" or "right", with "slightly" for a turn of at most SLIGHT degrees."""
    if words == "absolute":
        return compass_word(towards)
    angle = wrap(towards - heading)
    side = "right" if angle > 0 else "left"
    return f"slightly {side}" if abs(angle) <= SLIGHT else side


def right_word(here: "Position", words: str) -> str:
    """The x of a Position's turn in these words, "" where the right action is no turn."""
    return turn_word(words, here.heading, here.towards) if here.action == "turn" else ""


def landmark_texts(here: "Position", style: str) -> list[str]:
    """The landmarks at a Position; a released one without a side is its own text."""
    return [WORDING[style]["seen"].format(name, side) if side else name
            for name, side in here.landmarks]


def observation(here: "Position", style: str) -> str:
    """The things at a Position, in words: "Cafe Opal is on your left; You observe an
    intersection"."""
    words = WORDING[style]
    parts = landmark_texts(here, style)
    if not parts and (style == "full" or not here.crossing):  # short: "crossing" alone
        parts = [words["none"]]
    if here.crossing:
        parts.append(words["here"])
    return words["between"].join(parts)


def instructions(route, style, turn="turn"):
    """The route's instructions as a list of texts: a turn (said as WORDING[style][turn]), a move to
    the next turn or to the destination, a turn, ..."""
    words = WORDING[style]
    texts = []
    for here in route.rail:
        if here.crossing or here.action == "stop":
            where = "".join(map(words["where"].format, landmark_texts(here, style)))
            texts.append(words["moves"][here.action].format(where=where))
        if here.action == "turn":
            turns = {name: right_word(here, name) for name in TURNS}
            texts.append(words[turn].format(**turns))
    return texts


MAX_ACTION = 60  # characters
TURN = r"turn_direction ?\( ?['\"]?([a-z]+(?: [a-z]+)?)['\"]? ?\)"
ACTION = re.compile(r"(forward|stop) ?\( ?\)|" + TURN)


def parse_action(text):
    """Read "forward()", "stop()" or "turn_direction(x)": ("forward", ""), ("stop", "") or ("turn",
    x). x is any one or two words. Case, quotes round x and spaces do not matter. Raises Illegal
    for anything else."""
    short = text if len(text) <= MAX_ACTION else ""
    match = ACTION.fullmatch(" ".join(short.lower().split()))
    if not match:
        raise Illegal(f"{quoted(text)} is not forward(), stop() or turn_direction(x)")
    return match[1] or "turn", match[2] or ""


class Walked(NamedTuple):
    """What the verifier found: a key of WALK_REWARD, a key of WORDING's "why", the fact for that
    sentence, and whether the observation names all things there and nothing else (None without
    one)."""
    outcome: str
    why: str
    fact: str = ""
    observed: bool | None = None


def judge_walk(response: str, here: "Position", rule: str, style: str) -> Walked:
    """Judge a response (text of a model, of any content) at a Position under a rule. Never
    raises for a str."""
    observed = None
    try:
        answer, (key, _, action) = parse_answer(response), WORDING[style]["keys"]
        if isinstance(answer.get(key), str):
            observed = _parts(answer[key]) == _parts(observation(here, style))
        if not isinstance(answer.get(action), str):
            raise Illegal("the JSON object has no key 'action' with a string")
        kind, word = parse_action(answer[action])
    except Illegal as error:
        return Walked("illegal", "illegal", str(error), observed)
    if (kind, word) != (here.action, right_word(here, rule)):
        return Walked("wrong_action", _why(kind, word, here, rule), printable(word), observed)
    return Walked("correct" if kind == "stop" else "right_action", "right", "", observed)


NOTHING = {"", "none", "no landmarks nearby", "no landmark nearby"}
HERE = {words["here"].lower() for words in WORDING.values()}


def _parts(text):
    """The set of things that an observation names, in lower case. "No landmarks nearby" counts only
    beside a landmark, as a contradiction."""
    parts = re.split("[;,.]", text)
    parts = {" ".join(part.lower().removeprefix("the destination ").split()) for part in parts}
    return parts - ({""} if parts - NOTHING - HERE else NOTHING)


def _why(kind, word, here, rule):
    """Why an action is wrong, as a key of WORDING's "why". Each sentence is true where it is
    given."""
    if here.action == "stop":
        return "arrived"
    if kind == "stop":
        return "not_there"
    if here.action == "forward":
        return "no_turn"
    if kind == "forward":
        return "turn"
    return "direction" if word in TURNS[rule] else "word"


# ---- 13. V-IRL: routes ---------------------------------------------------------------------------
# A route is its rail: one Position after another, each with one right action. A turn also takes the
# first step into the new street, as in the released data. A turn's word fits one street only.

ROUTES = 20  # of a city
LEGS = {"full": (2, 6), "short": (1, 2)}
LENGTHS = {"full": (4, 40), "short": (3, 6)}  # in positions
SLIGHT_TURNS, PLAIN_TURNS = (20, 52), (68, 150)  # clear of straight on, of SLIGHT, of turning round
OFF_COMPASS = 17.5  # degrees that a street may lie off its compass word, whose share ends at 22.5


class Position(NamedTuple):
    """A point of a route where an answer is due: the place, the heading in degrees, the landmarks
    ((name, side), ...), whether it is an intersection, the right action ("turn", "forward" or
    "stop"), the bearing to turn to or None, the instruction from 0."""
    place: object
    heading: float
    landmarks: tuple
    crossing: bool
    action: str
    towards: float | None
    instruction: int


class Stop(NamedTuple):
    """The part of a Position that does not follow from the others of its route."""
    place: object
    landmarks: tuple
    towards: float | None


class Route(NamedTuple):
    """A city's name, the Positions up to the destination."""
    city: str
    rail: tuple

    def key(self):
        """Routes with one key are one problem, whatever their cities are called."""
        acts = ((here.action, here.landmarks, right_word(here, "absolute")) for here in self.rail)
        return compass_word(self.rail[0].heading), *acts


def make_rail(facing: float, stops: list[Stop]) -> tuple[Position, ...]:
    """The Positions of a walk with this first heading; its last stop is the destination."""
    rail = []
    heading = facing
    turns = 0
    for place, landmarks, towards in stops:
        if towards is None:
            rail.append(Position(place, heading, landmarks, False, "forward", None, 2 * turns - 1))
            continue
        rail.append(Position(place, heading, landmarks, turns > 0, "turn", towards, 2 * turns))
        heading = towards
        turns += 1
    return *rail[:-1], rail[-1]._replace(action="stop")


def clear_bearing(angle):
    """Whether a bearing has one obvious compass word."""
    return abs(wrap(angle - 45 * round(angle / 45))) <= OFF_COMPASS


def clear_turn(heading, towards):
    """Whether the turn has one obvious word under both rules, by the margins above."""
    angle = abs(wrap(towards - heading))
    words = {compass_word(heading), compass_word(towards)}
    fits = any(low <= angle <= high for low, high in (SLIGHT_TURNS, PLAIN_TURNS))
    return fits and clear_bearing(towards) and len(words) == 2


@lru_cache(maxsize=256)
def routes(name: str, style: str) -> tuple[Route, ...]:
    """The ROUTES distinct Routes of the city "SPLIT-N". A hash of their keys gives the same split,
    so that no problem of one split occurs in another ("base" shares with "train"). ValueError
    where there are too few."""
    town = city(name, style)
    rng = random.Random(f"virl/{name}/{style}/routes")
    found = {}
    wanted = name.split("-")[0].replace("base", "train")
    for _ in range(TRIES):
        route = Route(name, _random_rail(town, rng, style))
        if route.rail and split_of(f"virl/{route.key()}") == wanted:
            found.setdefault(route.key(), route)
        if len(found) == ROUTES:
            return tuple(found.values())
    raise ValueError(f"{TRIES} walks in the city {name} gave no {ROUTES} routes: choose another "
                     "index.")


def _random_rail(town, rng, style):
    """The rail of a random walk. Empty where it is too long or short, has no clear instructions, or
    no landmark to end at."""
    streets = _random_streets(town, rng, rng.randint(*LEGS[style]))
    if not streets:
        return ()
    first = streets[0]
    stops = _stops(town, streets)
    start = rng.randint(1, first.count - 1)
    facing = random_facing(rng, first.heading)
    on_last = range(max(start, len(stops) - streets[-1].count), len(stops) - 1)
    ends = [i for i in on_last if stops[i].landmarks]
    begin = stops[start - 1]._replace(towards=first.heading)
    clear = clear_bearing(facing) and clear_turn(facing, first.heading) and not begin.landmarks
    if not ends or not clear:
        return ()
    rail = make_rail(facing, [begin, *stops[start:rng.choice(ends) + 1]])
    names, sides = zip(*(landmark for here in rail for landmark in here.landmarks))
    shortest, longest = LENGTHS[style]
    fits = shortest <= len(rail) <= longest and all(sides) and len(set(names)) == len(names)
    return rail if fits else ()


def _random_streets(town, rng, legs):
    """A random walk of so many streets, with a clear turn from each to the next. Empty where it
    gets stuck."""
    streets = [rng.choice(town.arms[rng.choice(tuple(town.arms))])]
    while len(streets) < legs:
        visited = {street.a for street in streets}
        following = [street for street in town.turns[streets[-1]] if street.b not in visited]
        if not following:
            return []
        streets.append(rng.choice(following))
    return streets


def random_facing(rng, heading):
    """A bearing with a clear turn from there to `heading`. All relative words are equally
    likely."""
    side = rng.choice((1, -1))
    return round(heading + side * rng.uniform(*rng.choice((SLIGHT_TURNS, PLAIN_TURNS)))) % 360


def _stops(town, streets):
    """The Stops at all places of these streets, without the first one's start."""
    stops = []
    for street, after in zip_longest(streets, streets[1:]):
        for place in map(street.place, range(1, street.count + 1)):
            stops.append(Stop(place, town.seen(place, street.heading), None))
        if after:
            stops[-1] = stops[-1]._replace(towards=after.heading)
    return stops


# ---- 14. V-IRL: a city ---------------------------------------------------------------------------
# Points are (x, y) in metres, x to the east and y to the north. A *place* is an intersection (a
# node's number), or (a, b, k), the k-th point of the street from node a to node b > a. A place has
# at most one landmark. The order of all draws is part of a city: another order is another city.

GRID = 6  # nodes a side
SPACING = 15  # metres between places (10 to 20 come of it)
CURB = 9  # metres from the middle of a street to its fronts


def bearing(start, end):
    """Degrees clockwise from north, in [0, 360)."""
    return degrees(atan2(*np.subtract(end, start))) % 360


def moved(point, heading, ahead, right=0):
    """The point so many metres ahead and to the right of another one, in this heading."""
    angle = radians(heading)
    x = point[0] + ahead * sin(angle) + right * cos(angle)
    return x, point[1] + ahead * cos(angle) - right * sin(angle)


def between(start, end, share):
    """The point at a share of the way from one point to another, in any number of coordinates."""
    return tuple([a + (b - a) * share for a, b in zip(start, end)])


class Street(NamedTuple):
    """A street from node a to node b: its start, its bearing, its length in metres, its steps."""
    a: int
    b: int
    start: tuple
    heading: float
    length: float
    count: int

    def place(self, k):
        """The place k steps (1 or more) from a: b at the end."""
        if k == self.count:
            return self.b
        return (self.a, self.b, k) if self.a < self.b else (self.b, self.a, self.count - k)

    def along(self, k):
        """The distance of that place from a."""
        return k * self.length / self.count

    def beside(self, along, across):
        """The point so far along the street, and so far to the right of its middle."""
        return moved(self.start, self.heading, along, across)

    def strip(self, start, end, left, right):
        """The corners of a part of the street, between two distances along it and two across."""
        corners = ((start, left), (end, left), (end, right), (start, right))
        return [self.beside(*corner) for corner in corners]


class City:
    """The city of a name such as "test-3", the same on every machine: a grid of streets, turned,
    bent, broken, and crossed by diagonals, so that all eight compass words occur. Landmarks have
    the short names of the tiny model in style "short".

    Attributes: nodes {number: point}, arms {node: the Streets from it, clockwise from north},
    turns {Street: the Streets with a clear turn from it}, points {place: point}, landmarks {place:
    (name, bearing of the front)}, signs (a list of Sign)."""

    def __init__(self, name, style):
        self.name = name
        self.nodes = self._grid(random.Random(f"virl/{name}/grid"))
        self.arms = self._join_nodes(random.Random(f"virl/{name}/streets"))
        self.turns = {street: self._clear_turns(street)
                      for arms in self.arms.values() for street in arms}
        self.streets = [street for street in self.turns if street.a < street.b]
        self.points = self.nodes | {street.place(k): street.beside(street.along(k), 0)
                                    for street in self.streets for k in range(1, street.count)}
        self._place_landmarks(random.Random(f"virl/{name}/landmarks"), style)

    def _grid(self, rng):
        """Points of a grid of uneven blocks. Beyond a line each way the cross streets bend, one
        way hardly and the other by about 45 degrees, and the whole is turned. Most streets stay
        close to a compass word."""
        xs, ys = ([*accumulate((rng.randint(42, 72) for _ in range(GRID)), initial=0)]
                  for _ in "xy")
        bends = [rng.uniform(-6, 6), rng.choice((1, -1)) * rng.uniform(37, 43)]
        slope_x, slope_y = (tan(radians(angle)) for angle in rng.sample(bends, 2))
        bend_x = rng.choice(xs[1:-2])
        bend_y = rng.choice(ys[1:-2])
        turned = rng.choice((0, 45)) + rng.uniform(-8, 8)
        nodes = {}
        for i, j in product(range(GRID), repeat=2):
            x = xs[i] + slope_y * max(ys[j] - bend_y, 0) + rng.uniform(-2, 2)
            y = ys[j] + slope_x * max(xs[i] - bend_x, 0) + rng.uniform(-2, 2)
            nodes[i * GRID + j] = tuple(round(n, 1) for n in moved((0, 0), turned, y, x))
        return nodes

    def _join_nodes(self, rng):
        """Streets along the grid, a few missing, then diagonals. None has less than 40 degrees to
        another; dead ends go."""
        north = [(n, n + 1) for n in self.nodes if (n + 1) % GRID]
        east = [(n, n + GRID) for n in self.nodes if n + GRID in self.nodes]
        diagonals = [rng.choice([(n, m + GRID), (m, n + GRID)])
                     for n, m in north if n + GRID in self.nodes]
        pairs = [pair for pair in sorted(north + east) if rng.random() > 0.2]
        pairs += [pair for pair in diagonals if rng.random() < 0.3]
        arms = {node: [] for node in self.nodes}
        for a, b in pairs:
            both = self._street(a, b), self._street(b, a)
            if all(abs(wrap(street.heading - other.heading)) >= 40
                   for street in both for other in arms[street.a]):
                for street in both:
                    arms[street.a].append(street)
        while dead := [node for node, streets in arms.items() if len(streets) < 2]:
            arms = {node: [street for street in streets if street.b not in dead]
                    for node, streets in arms.items() if node not in dead}
        return {node: sorted(streets, key=lambda street: street.heading)
                for node, streets in arms.items()}

    def _street(self, a, b):
        start = self.nodes[a]
        end = self.nodes[b]
        length = dist(start, end)
        return Street(a, b, start, bearing(start, end), length, max(round(length / SPACING), 1))

    def _clear_turns(self, street):
        """The Streets with a clear turn from another one, whose words fit no other street there."""
        others = [after for after in self.arms[street.b] if after.b != street.a]
        words = [[turn_word(rule, street.heading, after.heading) for rule in TURNS]
                 for after in others]
        count = Counter(sum(words, []))
        return [after for after, own in zip(others, words)
                if clear_turn(street.heading, after.heading) and all(count[w] == 1 for w in own)]

    def front(self, street, side):
        """(start, end), distances along a street: its fronts on the right (side 1) or left (-1) are
        between them."""
        [back] = [back for back in self.arms[street.b] if back.b == street.a]
        return self._setback(street, side), street.length - self._setback(back, -side)

    def _setback(self, street, side):
        # Around a node the fronts of two neighbouring streets end where their lines meet: fronts
        # close every block.
        arms = self.arms[street.a]
        other = arms[(arms.index(street) + side) % len(arms)]
        gap = side * (other.heading - street.heading) % 360
        return min(max(CURB / tan(radians(gap / 2)), -CURB), 3 * CURB)

    def _place_landmarks(self, rng, style):
        """Landmarks at a third of the places along streets, and at most intersections with a long
        front on one side."""
        angles = {}  # {place: bearing of the front there}
        for node, arms in self.arms.items():
            for street, after in pairwise([*arms, arms[0]]):
                gap = (after.heading - street.heading) % 360
                if 150 <= gap <= 210:
                    if rng.random() < 0.8:
                        angles[node] = (street.heading + gap / 2) % 360
                    break
            for street in arms:
                for k in range(1, street.count) if node < street.b else ():
                    side = rng.choice((1, -1))
                    start, end = self.front(street, side)
                    if start + 4 <= street.along(k) <= end - 4 and rng.random() < 0.35:
                        angles[street.place(k)] = (street.heading + 90 * side) % 360
        if style == "short":
            names = [rng.choice(VIRL["short"]) for _ in angles]
        else:
            known = [pattern.format(name) for pattern in VIRL["patterns"] for name in VIRL["names"]]
            names = rng.sample(known, len(angles))
        self.landmarks = {}
        self.signs = []
        for (place, angle), name in zip(angles.items(), names):
            self.landmarks[place] = name, angle
            off = 1.2 if place in self.nodes else 0.3  # from the front, which may bend at a node
            self.signs.append(Sign(name, angle, moved(self.points[place], angle, CURB - off)))

    def seen(self, place, heading):
        """((landmark, side),) at a place in this heading, the side empty where it is not clear; ()
        without a landmark."""
        if place not in self.landmarks:
            return ()
        name, angle = self.landmarks[place]
        quarter = wrap(angle - heading) / 90
        clear = abs(quarter - round(quarter)) < 0.3
        return ((name, SIDES[round(quarter) % 4] if clear else ""),)

    @cached_property
    def walls(self):
        """All fronts, about 11 m wide each."""
        walls = []
        rng = random.Random(f"virl/{self.name}/walls")
        for street, side in product(self.streets, (1, -1)):
            start, end = self.front(street, side)
            count = max(round((end - start) / 11), 1)
            corners = [street.beside(start + (end - start) * i / count, side * CURB)
                       for i in range(count + 1)]
            walls += [Wall(*ends, rng.choice((7, 10, 13, 16, 22)), rng.randrange(1000))
                      for ends in pairwise(corners[::-side])]
        return walls

    @cached_property
    def hung(self):
        """(Sign, the walls that it hangs on) for all signs: some are at a seam of two walls."""
        return [(sign, [wall for wall in self.walls if wall.distance(sign.spot) < 12])
                for sign in self.signs]

    @cached_property
    def ground(self):
        """The corners of all roads, and of the white lines: along the middle of each street, and
        of the crosswalk at its start."""
        roads = [street.strip(-4, street.length + 4, -5, 5) for street in self.streets]
        lines = [street.strip(start, start + 2, -0.12, 0.12) for street in self.streets
                 for start in range(16, int(street.length) - 16, 5)]
        for street in self.turns:
            start = max(self._setback(street, 1), self._setback(street, -1), 5)
            start = min(start, street.along(1) - 3)  # the first place is beyond the intersection
            for left in (-4.2, -2.8, -1.4, 0, 1.4, 2.8):
                lines.append(street.strip(start - 2, start + 0.6, left, left + 0.7))
        return roads, lines


city = lru_cache(maxsize=64)(City)


# ---- 15. V-IRL: views ----------------------------------------------------------------------------
# Four views of a place, each 90 degrees wide, drawn with pillow from the same city as the text: the
# sky, the ground, then everything that stands on it, the farthest first. A camera point is (x, z):
# metres to its right and ahead of it.

EYE, NEAR, FAR = 1.7, 0.4, 110  # metres: height of the eye, the nearest and farthest that is drawn
HORIZON = 0.6  # share of the picture above it
# A light has the colours of the sky above and at the horizon (low), of the pavement (in snow:
# white), the road and the windows (pane), and the brightness of walls. A weather has the share of
# haze at FAR, and the number of drops or flakes. A palette has five colours of walls, a board its
# ground and ink.
LIGHTS = VIRL["lights"]
WEATHERS = VIRL["weathers"]
PALETTES = VIRL["palettes"]
BOARDS = VIRL["boards"]
EMBLEMS = VIRL["emblems"]


@dataclass(frozen=True)
class Scene(Options):
    """The look of a city, as in "dusk/weather=rain/palette=brick". With tiles=1 all four views are
    in one tile."""
    light: Literal[*LIGHTS] = "day"
    weather: Literal[*WEATHERS] = "clear"
    palette: Literal[*PALETTES] = "stone"
    tiles: Literal[4, 1] = 4

    def legible_from(self, style: str) -> int:
        """The smallest tile, in pixels, at which names (full) or emblems (short) can be read."""
        return (128 if style == "full" else 16) * (1 if self.tiles == 4 else 2)


def draw_grid(name, style, place, heading, look, tile):
    """The four views of a place in one picture, see four_views."""
    town = city(name, style)
    size = tile if look.tiles == 4 else tile // 2
    fine = 4 if size < 100 else 2 if size < 400 else 1  # draw too large, then reduce: smooth edges
    reach = min(FAR, size * fine / 2)  # a small picture shows less of what is far
    point, (roads, lines) = town.points[place], town.ground
    lines = [line for line in lines if dist(line[0], point) < reach / 2]
    away = {wall: wall.distance(point) for wall in town.walls}
    away |= {sign: min(away[wall] for wall in walls) for sign, walls in town.hung}  # after them
    standing = [thing for thing in sorted(away, key=away.get, reverse=True) if away[thing] < reach]

    def draw_view(heading):
        view = View(point, heading, look, size * fine, reach)
        view.draw_ground(roads, view.light["road"])
        view.draw_ground(lines, "#ece8dc")
        for thing in standing:
            thing.draw(view)
        view.draw_weather(random.Random(f"virl/{name}/{place}/{round(heading)}"))
        return view.image.reduce(fine)
    return four_views(heading, draw_view)


def four_views(heading, view):
    """view(heading in degrees), a square picture, of four directions in one: front and right above,
    back and left below."""
    views = [view((heading + angle) % 360) for angle in (0, 90, 180, 270)]
    return Image.fromarray(np.vstack([np.hstack(views[:2]), np.hstack(views[2:])]))


class View:
    """A view from a point of a city, `size` pixels each way. It shows walls and signs within
    `reach` metres."""

    def __init__(self, point, heading, look, size, reach):
        self.point = point
        self.look = look
        self.size = size
        self.reach = reach
        self.sin = sin(radians(heading))
        self.cos = cos(radians(heading))
        self.light = LIGHTS[look.light]
        self.weather = WEATHERS[look.weather]
        self.image = _backdrop(look, size).copy()
        self.pen = ImageDraw.Draw(self.image)

    def ahead(self, point):
        """A point of the city as a camera point."""
        x, y = point[0] - self.point[0], point[1] - self.point[1]
        return x * self.cos - y * self.sin, x * self.sin + y * self.cos

    def pixel(self, x, z, height):
        """The place in the picture of a camera point at a height above ground."""
        scale = self.size / 2 / z
        return self.size / 2 + scale * x, self.size * HORIZON - scale * (height - EYE)

    def haze(self, distance):
        """The share of haze in a colour at this distance, in this weather."""
        return self.weather["haze"] * min(distance / FAR, 1)

    def shade(self, distance, colour, light):
        """A colour at this distance and in this light (1: its own)."""
        haze = self.haze(distance)
        pairs = zip(colour, self.light["low"])
        return tuple([int(value * light * (1 - haze) + far * haze) for value, far in pairs])

    def fill(self, corners, colour):
        """A polygon of (x, z, height); the part behind the camera is cut off."""
        if corners := _clipped(corners):
            self.pen.polygon([self.pixel(*corner) for corner in corners], colour)

    def draw_ground(self, strips, colour):
        """Parts of the ground, without haze: overlapping roads should show no seams."""
        for strip in strips:
            self.fill([(*self.ahead(point), 0) for point in strip], colour)

    def draw_weather(self, rng):
        """Rain or snow in the air."""
        size = self.size
        for _ in range(self.weather["drops"] * size // 560):
            x = rng.random() * size
            y = rng.random() * size
            long = rng.uniform(0.01, 0.05) * size
            if self.look.weather == "rain":
                self.pen.line((x, y, x - long / 4, y + long), "#b4bdca")
            else:
                self.pen.ellipse((x, y, x + long / 4, y + long / 4), "#fafaff")


def _clipped(corners):
    """The part of a polygon of (x, z, height) that is ahead of the camera."""
    clipped = []
    for start, end in pairwise([*corners, corners[0]]):
        _, z, _ = start
        _, w, _ = end
        if z >= NEAR:
            clipped.append(start)
        if (z >= NEAR) != (w >= NEAR):
            x, _, height = between(start, end, (NEAR - z) / (w - z))
            clipped.append((x, NEAR, height))
    return clipped


class Wall(NamedTuple):
    """A front: its left end as seen from the street, its right end, its height, and a number for
    the choice of its colours."""
    left: tuple
    right: tuple
    height: int
    number: int

    def distance(self, point):
        return (dist(self.left, point) + dist(self.right, point)) / 2

    def draw(self, view):
        """Its wall, the edge of its roof, its shop and its windows."""
        left = view.ahead(self.left)
        right = view.ahead(self.right)
        if _hidden(left, right):
            return
        distance = hypot(left[0] + right[0], left[1] + right[1]) / 2
        light = view.light["walls"]
        pane = view.light["pane"]
        colour = PALETTES[view.look.palette][self.number % 5]
        shop = EMBLEMS[self.number % 4]

        def part(first, last, bottom, top, colour, light):
            """A part between two shares of the width, from the left, and two heights."""
            (x, z), (u, w) = between(left, right, first), between(left, right, last)
            corners = (x, z, bottom), (x, z, top), (u, w, top), (u, w, bottom)
            view.fill(corners, view.shade(distance, colour, light))

        part(0, 1, 0, self.height, colour, light)
        part(0, 1, self.height - 0.5, self.height, colour, light * 0.75)
        part(0.06, 0.94, 0, 2.6, pane, 0.7)
        part(0, 1, 2.6, 3.2, shop, light * 0.6)
        if distance >= view.reach / 2:  # no windows further off
            return
        columns = max(round(dist(left, right) / 2.7), 1)
        lit = pane, 1
        dark = LIGHTS["day"]["pane"], light
        for column, floor in product(range(columns), range(int(self.height - 3.5) // 3)):
            colour = lit if (self.number + floor * 5 + column * 3) % 4 < 2 else dark
            first = column + 0.25
            bottom = 4.2 + 3 * floor
            part(first / columns, (first + 0.5) / columns, bottom, 6 + 3 * floor, *colour)


class Sign(NamedTuple):
    """The sign of a landmark: the name, the bearing from its place, the point where it stands."""
    name: str
    bearing: float
    spot: tuple

    def draw(self, view):
        """Its picture in perspective."""
        board = sign(self.name, view.look.palette)
        half, bottom, top = (4.5, 0.6, 9.6) if board.width == board.height else (4, 2.4, 6.4)
        left, right = (view.ahead(moved(self.spot, self.bearing, 0, x)) for x in (-half, half))
        if _hidden(left, right) or min(left[1], right[1]) < NEAR:
            return
        ends = (*left, top), (*right, top), (*right, bottom), (*left, bottom)
        corners = np.array([view.pixel(*end) for end in ends])
        first = corners.min(0).astype(int).clip(0)
        size = (corners.max(0).astype(int) + 1).clip(max=view.size) - first
        if min(size) <= 0:
            return
        numbers = quad_coefficients(corners - first, *board.size)
        flat = board.transform(
            size.tolist(), Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BILINEAR)
        low = Image.new("RGB", flat.size, view.light["low"])
        hazy = Image.blend(flat.convert("RGB"), low, view.haze(dist(self.spot, view.point)))
        view.image.paste(hazy, first.tolist(), flat.getchannel("A"))


@lru_cache
def _backdrop(look, size):
    """Behind everything: the pavement, and a sky that turns into the colour at the horizon."""
    light = LIGHTS[look.light]
    horizon = int(size * HORIZON)
    sky = _mixed(light["sky"], light["low"], WEATHERS[look.weather]["haze"])
    ground = light["snow" if look.weather == "snow" else "pavement"]
    image = Image.new("RGB", (size, size), ground)
    for y in range(horizon):
        image.paste(_mixed(sky, light["low"], y / horizon), (0, y, size, y + 1))
    return image


def _mixed(start, end, share):
    return tuple(map(int, between(start, end, share)))


def _hidden(left, right):
    """Whether a front between two camera points is behind the camera, outside the view, or shows
    its back."""
    (x, z), (u, w) = left, right
    return max(z, w) < NEAR or x * w >= u * z or min(x - z, u - w) > 0 or max(x + z, u + w) < 0


# ---- 16. V-IRL: signs and the map ----------------------------------------------------------------

def quad_coefficients(corners, width, height):
    """The eight numbers with which pillow fills the quadrilateral `corners` (from the top left,
    clockwise) with a width x height picture: u = (a x + b y + c) / (g x + h y + 1),
    v = (d x + e y + f) / (g x + h y + 1)."""
    rows = []
    values = [(0, 0), (width, 0), (width, height), (0, height)]
    for (x, y), (u, v) in zip(corners, values):
        rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
    return np.linalg.solve(rows, np.ravel(values)).tolist()


@lru_cache(maxsize=512)
def sign(name: str, palette: str) -> Image.Image:
    """The picture on a landmark's sign, RGBA: the name on at most two lines; for a short name an
    emblem, which assets/draw_emblems.py draws."""
    if name in VIRL["short"]:
        left = 64 * VIRL["short"].index(name)
        return Image.open(ASSETS / "emblems.png").crop((left, 0, left + 64, 64))
    back, ink = BOARDS[palette]
    image = Image.new("RGBA", (320, 160), back)
    draw = ImageDraw.Draw(image)
    lines = name.split()
    draw.rectangle((4, 4, 315, 155), outline=ink, width=4)
    longest = max(map(ImageFont.load_default(46).getlength, lines))
    font = ImageFont.load_default(min(int(46 * 300 / longest), 66))
    for line, middle in zip(lines, (48, 112) if len(lines) == 2 else (80,)):
        draw.text((160, middle), line, ink, font, "mm")
    return image


def draw_map(problem: Navigation, size: int) -> Image.Image:
    """A map of a generated city around a walk's route, size x size pixels, north up: the route in
    red, its positions numbered from 1, the landmarks by name."""
    town = city(problem.route.city, problem.style)
    points = np.array([town.points[here.place] for here in problem.route.rail])
    low = points.min(0)
    high = points.max(0)
    scale = size / (max(high - low) + 70)

    def pixel(point):
        x, y = (point - (low + high) / 2) * scale
        return size / 2 + x, size / 2 - y

    image, font = Image.new("RGB", (size, size), "#ded6c8"), ImageFont.load_default(15)
    draw = ImageDraw.Draw(image)
    route = [pixel(point) for point in points]
    red, blue, black = "#d62828", "#183e5c", "#1e1e28"
    for width, colour in ((2 * CURB * scale, "#bebab2"), (10 * scale, "#fafafa")):
        for street in town.turns:
            start = pixel(street.start)
            end = pixel(town.nodes[street.b])
            draw.line((start, end), colour, int(width))
            draw.circle(start, width / 2, colour)
    draw.line(route, red, 5)
    for name, angle, spot in town.signs:
        draw.circle(pixel(spot), 5, blue)
        beside = pixel(moved(spot, angle, 10 / scale))  # away from the street
        draw.text(beside, name, blue, font, "lm" if angle < 180 else "rm")
    for number, spot in enumerate(route, 1):
        draw.circle(spot, 13, "white", red, 3)
        draw.text(spot, str(number), black, font, "mm")
    draw.text((size - 8, 8), "north is up", black, font, "ra")
    return image


# ---- 17. Tasks and suites ------------------------------------------------------------------------
# The gap between the rows of a suite is the study's result.

class Task(NamedTuple):
    """One row of TASKS: the class, the trained rule and look, the suite, and rows further away."""
    problem: type
    rule: str
    visual: str | None  # None for a task in text
    suite: tuple[Row, ...]
    probes: tuple[Row, ...] = ()

    @property
    def pictures(self) -> bool:
        """Whether the task shows pictures."""
        return self.visual is not None


CARDS_SUITE = (
    Row("id", ID_RULE),              # the trained rule
    Row("rule", OOD_RULE),           # the same hands under the other rule
    Row("fake", OOD_RULE, ID_RULE),  # the prompt has the other rule, the verifier the trained one:
)                                    # high where that was memorized, low where arithmetic was lost
CARDS_PROBES = (                     # one change from the trained rule each
    Row("faces-5", "5"),             # faces as numbers that other cards have too
    Row("faces-7", "7"),
    Row("faces-12", "12"),           # faces as a number that no card of the trained rule has
    Row("five-cards", "10/cards=5"),
    Row("target-36", "10/target=36"),
)
PICTURES_SUITE = (
    *(row._replace(visual="black") for row in CARDS_SUITE),
    Row("red", ID_RULE, visual="red"),  # the paper's change of look: only ink and suits
    *(Row(name, ID_RULE, visual=f"black/{change}") for name, change in CHANGED_LOOKS.items()),
    Row("shuffled", ID_RULE, visual="black"),  # a control: each hand beside another one's picture
    Row("text", ID_RULE, visual="text"),  # the same hands in words; minus "id": the cost of seeing
)
PICTURES_PROBES = (
    *(row._replace(visual="black") for row in CARDS_PROBES),
    Row("mixed", ID_RULE, visual=ANY_LOOK),
    Row("rule-red", OOD_RULE, visual="red"),
)
WALKS_SUITE = (Row("id", "absolute"), Row("rule", "relative"), Row("fake", "relative", "absolute"))
TASKS |= {
    "gp-l": Task(GeneralPoints, ID_RULE, None, CARDS_SUITE, CARDS_PROBES),
    "gp-vl": Task(GeneralPoints, ID_RULE, "black", PICTURES_SUITE, PICTURES_PROBES),
    "virl-l": Task(Navigation, "absolute", None, WALKS_SUITE),
    "virl-vl": Task(Navigation, "absolute", "day", (
        *WALKS_SUITE, Row("visual", "absolute", visual="dusk/weather=rain/palette=brick"))),
}


def suite_names() -> list[str]:
    """The names of all suites: "gp-l", "gp-l-probes", ..."""
    return [name + end for name, task in TASKS.items()
            for end in ("", "-probes") if task.probes or not end]


def task_of(suite: str) -> Task:
    """The task of a suite. ValueError for an unknown suite."""
    if suite not in (known := suite_names()):
        raise ValueError(f"{printable(suite)!r} is no suite: choose one of {', '.join(known)}.")
    return TASKS[suite.removesuffix("-probes")]


def suite_rows(suite: str) -> tuple[Row, ...]:
    """The rows of a suite. ValueError for an unknown suite."""
    return task_of(suite).probes if suite.endswith("-probes") else task_of(suite).suite


if __name__ == "__main__":  # the game: see problems, type answers
    os.execv(sys.executable, [sys.executable, str(ASSETS / "game.py"), *sys.argv[1:]])
