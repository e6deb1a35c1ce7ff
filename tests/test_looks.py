"""Tests of gp-vl: looks as data, pictures as pure functions that can be read, deals, prompts, and the judging of what was seen."""
import hashlib
import json
import random
import re
import subprocess
import sys
from copy import copy
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, __version__ as PILLOW

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import assets.habits  # noqa: E402, F401: adds its demonstrators
import tasks  # noqa: E402
from tasks import ID_RULE, OOD_RULE, Look, Rule, make, picture  # noqa: E402

parse_look, OPTIONS = Look.parse, Look.options()
VALUES = [(name, value) for name, known in OPTIONS.items() for value in (known if len(known) < 5 else (known[0], known[-1]))]
ONE_CHANGE = [f"black/{name}={value}" if name != "suits" else value for name, value in VALUES if value != "text"]
SUITE_LOOKS = [row.visual for row in tasks.suite_rows("gp-vl") if row.visual != "text"]
MIXED = ["both/layout=shuffled/scheme=numbers/style=framed/table=wood", "both/layout=scattered/style=dark/glyphs=mono/table=grey",
         "both/layout=scattered/glyphs=italic/table=blue/light=130/noise=25", "both/tiles=1/layout=grid/style=framed"]
HARD = ["red/light=40/noise=40/scheme=words", "black/light=40/noise=40/scheme=pips", "both/style=dark/light=40/noise=40/glyphs=italic",
        "red/layout=scattered/scheme=words/glyphs=mono", "both/layout=scattered/scheme=pips/noise=40/table=wood",
        "both/tiles=1/layout=grid/scheme=words/glyphs=serif", "both/tiles=1/noise=40/scheme=numbers/style=framed"]
LOOKS = list(dict.fromkeys([*ONE_CHANGE, *SUITE_LOOKS, *MIXED, *HARD]))
HANDS = [tuple(((first + k - 1) % 13 + 1, "SHDC"[(first + 3 * k) % 4]) for k in range(4)) for first in (1, 5, 9, 13)]  # all 13 ranks


def problem(visual="black", index=0, **options):
    return make("gp-vl", **{"rule": ID_RULE, "visual": visual, "split": "test", "index": index, "style": "short"} | options)


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


# ---- Looks as data ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", LOOKS + ["text"])
def test_looks_are_read_and_written(text):
    look = parse_look(text)
    assert parse_look(str(look)) == look == parse_look(look)
    assert parse_look("/".join([text.split("/")[0], *text.split("/")[:0:-1]])) == look  # in any order


def test_short_form_of_looks():
    assert str(Look()) == str(parse_look("black/layout=row/light=100/noise=0/tiles=4")) == "black"
    assert str(parse_look("red/noise=20/layout=grid")) == "red/layout=grid/noise=20" and str(parse_look("text/layout=grid")) == "text"
    assert make("gp-vl", visual=None).look == Look() and make("gp-vl", visual="text").look is None


@pytest.mark.parametrize("text", ["", "green", "Black", "black/", "black/layout", "black/layout=", "black/layout=heap", "black/size=3", "red/noise=41",
                                  "red/noise=-1", "red/noise=05", "red/noise=1.5", "red/light=39", "red/light=141", "red/tiles=2", "red/tiles=four",
                                  "red/suits=black", "red/noise=1/noise=1", "layout=grid", "black/glyphs=*", "black|red", "*", "red/noise=" + "9" * 999,
                                  "\x1b[31m" * 99])
def test_unknown_looks_give_one_sentence(text):
    with pytest.raises(ValueError) as error:
        parse_look(text)
    said = str(error.value)
    assert said.endswith(".") and said.count(". ") == 0 and len(said) < 250 and said.isprintable()


@pytest.mark.parametrize("text", ["black/glyphs=sans|serfi", "black|green", "*/noise=1|99", "black/tiles=4|2", "black/font=*", "black/*"])
def test_a_wrong_choice_is_refused_whatever_is_drawn(text):
    for seed in range(20):
        with pytest.raises(ValueError):
            parse_look(text, random.Random(seed))


def test_wildcards_are_drawn():
    rng = random.Random(0)
    drawn = [parse_look("*/layout=*/glyphs=sans|serif/light=*/noise=10", rng) for _ in range(2000)]
    assert {look.suits for look in drawn} == {"black", "red", "both"} and {look.layout for look in drawn} == set(OPTIONS["layout"])
    assert {look.glyphs for look in drawn} == {"sans", "serif"} and {look.light for look in drawn} == set(range(40, 141))
    assert {look.noise for look in drawn} == {10} and {look.scheme for look in drawn} == {"index"}
    assert {parse_look("black|text/layout=grid", rng) for _ in range(50)} == {parse_look("black/layout=grid"), parse_look("text/layout=grid")}
    state = rng.getstate()
    for text in ("black", "red/noise=10/tiles=1", "text"):  # nothing to draw: nothing is changed
        assert str(parse_look(text, rng)) == text and rng.getstate() == state
    for text in ("green", ""):
        with pytest.raises(ValueError):
            parse_look(text, rng)
        assert rng.getstate() == state


def test_wildcards_are_a_function_of_split_and_index():
    text = "*/layout=grid|shuffled/style=*/noise=*"
    for split, index in product(("base", "train", "test"), range(20)):
        expected = parse_look(text, random.Random(f"gp/{split}/{index}/look"))
        assert make("gp-vl", "*,*,*", text, split, index, tile=64).look == make("gp-vl", "10", text, split, index, tile=64).look == expected
        shifted = index + (10**9 if split != "test" else 0)
        assert make("gp-vl", "10", text, split, index, seed=1, tile=64).look == make("gp-vl", "10", text, split, shifted, tile=64).look


# ---- Deals -----------------------------------------------------------------------------------------------------------

def test_text_and_every_look_deal_the_same_hands_and_no_rank_three_times():
    for split, rule in product(("train", "test"), (ID_RULE, OOD_RULE, "*,*,*")):
        for index in range(150):
            dealt = [make("gp-vl", rule, visual, split, index) for visual in ("black", "red", "both/layout=scattered", "text")]
            assert len({each.hand for each in dealt}) == len({each.rule for each in dealt}) == 1
            ranks = [rank for rank, _ in dealt[0].hand]
            assert max(map(ranks.count, ranks)) <= 2
            text = make("gp-l", rule, None, split, index)
            if max([rank for rank, _ in text.hand].count(rank) for rank in range(1, 14)) <= 2:
                assert text.hand == dealt[0].hand and (text.prompt, None) == (dealt[-1].prompt, dealt[-1].image)


def test_text_is_dealt_as_before():
    prompts = [make("gp-l", OOD_RULE, None, split, index, style="short").prompt for split in ("train", "test") for index in range(2)]
    assert prompts == ["9 J 9 Q, JQK=11,12,13, make 24", "6 4 A 8, JQK=11,12,13, make 24",
                       "A 9 J 5, JQK=11,12,13, make 24", "Q 2 2 3, JQK=11,12,13, make 24"]
    assert any(max([rank for rank, _ in make("gp-l", index=i).hand].count(rank) for rank in range(1, 14)) > 2 for i in range(300))
    assert make("gp-l").image is None


def test_suits_of_one_colour():
    hand = ((13, "S"), (13, "H"), (5, "D"), (1, "C"))
    assert tasks._shown(hand, "black") == [(13, "S"), (13, "C"), (5, "C"), (1, "C")]  # no card twice
    assert tasks._shown(hand, "red") == [(13, "H"), (13, "D"), (5, "D"), (1, "D")] and tasks._shown(hand, "both") == list(hand)
    for index in range(50):
        for colour in ("black", "red", "both"):
            assert len(set(tasks._shown(problem(index=index).hand, colour))) == 4


# ---- Pictures --------------------------------------------------------------------------------------------------------

def test_a_picture_is_a_pure_function():
    looks = ["black", "both/layout=scattered/noise=30/light=60", "red/layout=shuffled/scheme=words/table=wood"]
    first = [digest(problem(look, index).image) for look in looks for index in range(3)]
    code = ("import sys, hashlib; sys.path.insert(0, '.'); import tasks\nfor look in %r:\n for i in range(3):\n  image = tasks.make('gp-vl', '10', "
            "look, 'test', i, 4, 'full', seed=9).image\n  print(hashlib.sha256(image.tobytes()).hexdigest())" % looks)
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.split() == first and len(set(first)) == 9
    assert digest(problem("black", rule=OOD_RULE).image) == first[0] != digest(problem("black", tile=40).image)


PINNED = re.search(r"^pillow==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]


@pytest.mark.skipif(PILLOW != PINNED, reason=f"the digests are those of Pillow {PINNED}; Pillow {PILLOW} may draw other edges and letters")
@pytest.mark.parametrize("look, tile, expected", [
    ("black", 32, "1d671c238f081bd8"),
    ("both/layout=scattered/noise=30/light=60", 32, "be7f2f4a7e8db48f"),
    ("red/layout=shuffled/scheme=words/table=wood/glyphs=serif", 64, "cbe6a5d404235ad4"),
    ("both/layout=grid/style=framed", 112, "b3a07e43f1ae004c"),
    ("both/layout=grid/scheme=pips/style=dark/glyphs=mono", 112, "8c45623cb7a94159"),
    ("red/scheme=numbers/glyphs=italic/table=blue/tiles=1/layout=grid", 224, "065a4519deab3f99")])
def test_pictures_do_not_change(look, tile, expected):
    """Literal digests: results are compared across versions, so a change here is a change of the test set."""
    drawn = b"".join(problem(look, index, tile=tile, style="full").image.tobytes() for index in range(6))
    assert hashlib.sha256(drawn).hexdigest()[:16] == expected


def test_places_order_and_noise_differ_with_the_index():
    hand = problem().hand
    for look, count in (("black/noise=10", 8), ("black/layout=scattered", 8), ("black/layout=shuffled", 5)):
        assert len({digest(picture(hand, parse_look(look), 32, f"gp/test/{i}/picture")) for i in range(8)}) >= count


def test_a_picture_is_drawn_once_and_only_when_asked_for(monkeypatch):
    drawn = []
    monkeypatch.setattr(tasks, "picture", lambda *args: drawn.append(args) or picture(*args))
    first = problem()
    first.step(first.expert())
    assert not drawn
    image = first.image
    assert first.image is image and copy(first).image is image and len(drawn) == 1 and image.mode == "RGB"


@pytest.mark.parametrize("tile", [32, 112, 560])
def test_sizes(tile):
    for layout, tiles, size in (("row", 4, (4, 1)), ("grid", 4, (2, 2)), ("scattered", 4, (2, 2)), ("shuffled", 4, (2, 2)), ("row", 1, (1, 1)),
                                ("grid", 1, (1, 1))):
        look = parse_look(f"black/layout={layout}/tiles={tiles}")
        if look.legible_from(4) <= tile:
            assert problem(look, tile=tile).image.size == (size[0] * tile, size[1] * tile)
    assert problem("black/layout=grid", rule="10/cards=6", tile=48).image.size == (96, 96)


def test_black_and_red_differ_in_suit_signs_and_ink_only(monkeypatch):
    """With one ink they differ, in the signs; with one ink and one sign, in nothing."""
    def clear():
        tasks._small_card.cache_clear(), tasks._large_card.cache_clear()

    pairs = [(f"black/{look}", f"red/{look}", tile) for look in ("layout=row", "layout=scattered/noise=20", "layout=shuffled/style=dark/light=60",
                                                                 "scheme=words/style=framed", "scheme=pips") for tile in (32, 112)]
    same = lambda: [digest(problem(a, 2, tile=tile).image) == digest(problem(b, 2, tile=tile).image) for a, b, tile in pairs]  # noqa: E731
    assert not any(same())
    monkeypatch.setattr(tasks, "STYLE_COLOURS", {name: (*each[:3], each[2]) for name, each in tasks.STYLE_COLOURS.items()})
    clear()
    assert not any(same())
    monkeypatch.setattr(tasks, "SUIT_SHAPES", dict.fromkeys("SHDC", tasks.SUIT_SHAPES["S"]))
    clear()
    assert all(same())
    clear()


def test_every_option_combines_with_every_rule():
    for rule in ("10", "11,12,13", "*,?,7", "5/target=36", "10/target=*", "10/cards=3/target=*", "11,12,13/cards=5", "10/courts=2"):
        for look in ONE_CHANGE + ["text"]:
            for style in tasks.STYLES:
                made = make("gp-vl", rule, look, "test", 1, style=style, tile=160)
                assert made.step(made.expert())[:2] == (5.0, True) and made.prompt
            assert (made.image is None) == (look == "text")


@pytest.mark.parametrize("visual, rule, smallest", [
    ("black", "10", 32), ("black/layout=grid", "10", 32), ("black", "10/cards=5", 40), ("red/layout=scattered", "10/cards=5", 48),
    ("red/layout=grid", "10/cards=6", 48), ("black/tiles=1/layout=grid", "10", 64), ("black/tiles=1", "10", 128),
    ("black/noise=40/light=40", "10", 40), ("black/noise=40/light=40/scheme=words", "10", 48), ("black/noise=30/light=50/scheme=pips", "10", 40)])
def test_too_small_tiles_are_refused_in_one_sentence(visual, rule, smallest):
    assert parse_look(visual).legible_from(tasks.parse_rule(rule).cards) == smallest
    assert problem(visual, rule=rule, tile=smallest).image
    with pytest.raises(ValueError, match=f"at least {smallest} pixels, not {smallest - 1}\\.$") as error:
        problem(visual, rule=rule, tile=smallest - 1)
    assert len(str(error.value)) < 200
    assert problem("text", rule=rule, tile=1).image is None


# ---- A reader --------------------------------------------------------------------------------------------------------

def read(image, hand, look, tile):
    """The ranks in the places of a picture: the best correlation with any card of the look, in any suit, at any spot and angle."""
    width, height = look.sizes(len(hand), tile)[1]
    grey, columns, found = np.asarray(image.convert("L"), np.float32), round(image.width / width), []
    edge = 0 if look.layout == "scattered" else 1  # of the place; an upright card is in its middle, give or take two pixels
    for k in range(len(hand)):
        left, top = round(k % columns * width), round(k // columns * height)
        cut = grey[top:top + round(height), left:left + round(width)]
        trim = [edge * (cut_off(side, look) - 2) for side in cut.shape]
        cut = cut[trim[0]:cut.shape[0] - trim[0], trim[1]:cut.shape[1] - trim[1]]
        found.append(1 + int(np.argmax(correlations(cut, templates(look, tile, len(hand))))))
    return found


def cut_off(side, look):
    """Pixels of a place's side that are not in a template at its either end: the table, the shadow, the card's edge."""
    return round(side * (.17 if look.layout == "scattered" else .09))


@lru_cache(maxsize=2)
def templates(look, tile, cards):
    """The inner part of each card in the look: grey, (13 ranks, suits times angles, height, width)."""
    suits = {"black": "SC", "red": "HD", "both": "SHDC"}[look.suits]
    angles = tasks.ANGLES if look.layout == "scattered" else (0,)
    return np.array([[template((rank, suit), look, tile, cards, angle) for suit in suits for angle in angles] for rank in range(1, 14)])


def template(card, look, tile, cards, angle):
    """A card alone in the middle of its place, without noise."""
    class Middle:
        random, choice = staticmethod(lambda: .5), staticmethod(lambda angles: angle)

    place = look.sizes(cards, tile)[1]
    image = Image.new("RGB", tuple(map(round, place)), tasks.TABLE_COLOURS[look.table])
    tasks._lay(image, card, look, place, (0, 0), Middle)
    grey = np.asarray(image.convert("L"), np.float32)
    y, x = (cut_off(side, look) for side in grey.shape)
    return grey[y:-y, x:-x]


def correlations(cut, wanted):
    """For each rank the best normalised correlation of one of its templates with any window of the cut."""
    windows = np.lib.stride_tricks.sliding_window_view(cut, wanted.shape[2:]).reshape(-1, wanted[0, 0].size)
    windows, wanted = (each - each.mean(-1, keepdims=True) for each in (windows, wanted.reshape(13, -1, windows.shape[1])))
    windows, wanted = (each / (np.linalg.norm(each, axis=-1, keepdims=True) + 1e-6) for each in (windows, wanted))
    return (wanted @ windows.T).max((1, 2))


@pytest.mark.parametrize("text", LOOKS)
def test_every_rank_can_be_read_in_every_look_at_its_smallest_tile(text):
    look = parse_look(text)
    tile = look.legible_from(4)
    upright = replace(look, layout="grid" if look.layout == "shuffled" else look.layout)
    for i, hand in enumerate(HANDS):
        image = picture(hand, upright, tile, f"reader/{i}")
        assert read(image, hand, upright, tile) == [rank for rank, _ in hand], text
        if upright != look:
            mixed = read(picture(hand, look, tile, f"reader/{i}"), hand, look, tile)
            assert mixed != [rank for rank, _ in hand] and sorted(mixed) == sorted(rank for rank, _ in hand)


@pytest.mark.parametrize("text", ["both", "both/scheme=numbers/glyphs=serif", "both/scheme=words/style=dark", "both/scheme=pips/table=wood"])
def test_large_cards_can_be_read(text):
    look = parse_look(text)
    for i, hand in enumerate(HANDS):
        assert read(picture(hand, look, 112, f"reader/{i}"), hand, look, 112) == [rank for rank, _ in hand]


@pytest.mark.parametrize("px", [32, 40, 48, 64, 96, 112])
def test_the_pips_of_a_king_can_be_counted(px):
    """Thirteen signs, five in a column: between each two of a column there is paper."""
    top = tasks.CARDS["layouts"]["large" if px >= tasks.LARGE else "small"]
    left, top = top.get("pips 13", top["pips"])[0][-2:]
    for suit in "SHDC":
        image = Image.new("RGB", (px, px))
        tasks._lay(image, (13, suit), Look(scheme="pips"), (px, px), (0, 0), random.Random(0))
        width = .84 * px if px < tasks.LARGE else .63 * .84 * px
        height = min(1.4 * .84 * px, .94 * px) if px < tasks.LARGE else min(1.4 * width, .94 * px)
        grey, x = np.asarray(image.convert("L")).astype(int), px / 2 - width / 2 + left * width
        column = grey[:, round(x) - 2:round(x) + 2].min(1)
        spare = max(2, px // 32)  # a heart begins below its notch
        ends = [round(px / 2 - height / 2 + height * (top + (1 - 2 * top) * share / 4)) for share in range(5)]
        between = [column[start:end].max() for start, end in pairwise(ends)]
        assert min(between) > 180 and max(column[end - spare:end + spare].min() for end in ends) < 120, (suit, between)


# ---- Prompts ---------------------------------------------------------------------------------------------------------

def test_prompts_do_not_list_the_cards_of_a_picture():
    for look in ("black", "red/scheme=words", "both/scheme=pips", "black/scheme=numbers"):
        for index in range(5):
            short, full = (problem(look, index, rule=OOD_RULE, style=style) for style in ("short", "full"))
            assert short.prompt == "JQK=11,12,13, make 24" and "The picture shows 4 playing cards." in full.prompt
            text = problem("text", index, rule=OOD_RULE, style="full").prompt
            assert json.dumps(tasks.rank_names(full.hand)) in text and json.dumps(tasks.rank_names(full.hand)) not in full.prompt
            assert text.split("J counts as")[1].replace("as dealt", "in the picture") == full.prompt.split("J counts as")[1]
            assert tasks.CARDS["shown"][full.look.scheme] in full.prompt


# ---- Judging what was seen -------------------------------------------------------------------------------------------

HAND = ((13, "S"), (5, "H"), (3, "D"), (1, "C"))
RULE = Rule((11, 12, 13))


def answered(cards, formula="(13-5)*3*1", look=Look(), style="short", attempts=2):
    given = {"formula": formula} | ({} if cards is None else {"cards": cards})
    return tasks.GeneralPoints(HAND, RULE, attempts, style, RULE, look).step(json.dumps(given))


@pytest.mark.parametrize("cards, share", [
    (["K", "5", "3", "A"], 1), (["A", "3", "5", "K"], 1), (["king", "FIVE", " three ", "ace"], 1), ([13, 5, 3, 1], 1), (["K", "5", "3", "1"], 1),
    (["Q", "5", "3", "A"], .75), (["10", "5", "3", "A"], .75), (["5", "5", "3", "A"], .75), (["K", "5", "3"], .75), (["K", "5", "3", "A", "2"], .8),
    (["K", "5", "3", "A"] * 2, .5), (["K"], .25), ([], 0), (["Q"] * 4, 0), (["K5", "?", "", "14"], 0), (None, 0)])
def test_what_was_read(cards, share):
    step = answered(cards)
    assert (step.read, step.outcome, step.done) == (share, "correct", True)
    assert step.reward == (5 if share == 1 else 3.5) and step.feedback == ("Correct." if share == 1 else "Correct. Cards misread.")
    text = answered(cards, look=None)
    assert (text.read, text.reward, text.feedback) == (share, 5, "Correct.")


@pytest.mark.parametrize("formula, reward", [("(13-5)*3*1", 5), ("13+5+3*1", -1), ("10+5+3*1", -2), ("13**5", -3)])
def test_misreading_is_punished_in_addition(formula, reward):
    for attempts, last in ((2, 0), (1, -1)):
        expected = reward + (last if reward < 0 else 0)
        assert answered(["K", "5", "3", "A"], formula, attempts=attempts).reward == expected
        assert answered(["Q", "5", "3", "A"], formula, attempts=attempts).reward == expected + tasks.MISREAD == expected - 1.5
        assert answered(["Q", "5", "3", "A"], formula, attempts=attempts, look=None).reward == expected
    for style in tasks.STYLES:
        told = [answered(cards, formula, style=style).feedback for cards in (["K", "5", "3", "A"], ["Q", "5", "3", "A"])]
        assert told[1] == told[0] + tasks.CARDS["wording"][style]["misread"] and told[1].endswith(".") and told[1].isprintable()


def test_no_answer_reads_nothing():
    made = problem(attempts=2)
    for response in ("", "the cards are fine", '{"cards": "K 5 3 A", "formula": "1"}'):
        step = copy(made).step(response)
        assert step.read == 0 and step.reward in (-3 - 1.5, -2 - 1.5) and step.feedback.endswith("Cards misread.")


def test_every_demonstrator_reads_rightly():
    for kind in tasks.GeneralPoints.DEMONSTRATORS:
        for index in range(20):
            texts = problem("red", index, split="base").demonstrate(kind, random.Random(index))
            made = problem("red", index, split="base", attempts=2)
            assert all(made.step(text).read == 1 for text in texts[::2]) and "misread" not in "".join(texts)


# ---- Command line ----------------------------------------------------------------------------------------------------

def cli(*args):
    return subprocess.run([sys.executable, "tasks.py", *args], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)


def draw_sheet(*args):
    return subprocess.run([sys.executable, "-m", "assets.draw_sheets", *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_cli_draws_a_sheet(tmp_path):
    for args in (("--tile", "32"), ("--visual", "*/layout=scattered/glyphs=*", "--tile", "112", "--n", "4")):
        assert draw_sheet("--task", "gp-vl", "--out", str(tmp_path / "sheet.png"), *args).stderr == ""
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width > 1000 and sheet.height > 200 and len(sheet.convert("RGB").getcolors(1 << 24)) > 50


def test_cli_prints_and_judges():
    shown = cli("--task", "gp-vl", "--visual", "red/layout=grid", "--n", "1", "--style", "short", "--answer", '{"cards": ["2"], "formula": "2"}').stdout
    assert "look red/layout=grid\nJQK=10,10,10, make 24\n" in shown and "wrong_numbers, reward -4.5. " in shown and "Cards misread." in shown


@pytest.mark.parametrize("args", [("--visual", "red"), ("--task", "gp-vl", "--visual", "pink"), ("--task", "gp-vl", "--tile", "31")])
def test_cli_refuses_with_one_sentence(args):
    check_refusal(cli(*args))


@pytest.mark.parametrize("args", [("--task", "gp-l"), ("--task", "gp-vl", "--visual", "text"), ("--task", "gp-vl", "--tile", "8")])
def test_sheets_are_refused_with_one_sentence(args):
    check_refusal(draw_sheet("--out", "x.png", *args))
    assert not (ROOT / "x.png").exists()


def check_refusal(refused):
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1 and refused.stderr.endswith(".\n")
