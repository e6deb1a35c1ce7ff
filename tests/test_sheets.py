"""The sheets of pictures in the README: drawn by assets/draw_sheets.py, and the shipped ones are what its commands draw."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tasks
from assets import draw_sheets

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = re.findall(r"python -m assets\.draw_sheets (.+)", draw_sheets.__doc__)


def cli(*args):
    return subprocess.run([sys.executable, "-m", "assets.draw_sheets", *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=60)


def test_a_sheet_of_cards(tmp_path):
    for args in (("--tile", "32"), ("--visual", "*/layout=scattered/glyphs=*", "--tile", "112", "--n", "4")):
        drawn = cli("--task", "gp-vl", "--out", tmp_path / "sheet.png", *args)
        assert drawn.returncode == 0 and drawn.stderr == ""
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width > 1000 and sheet.height > 200 and len(sheet.convert("RGB").getcolors(1 << 24)) > 50


def test_a_sheet_of_a_walk(tmp_path):
    for style in tasks.STYLES:
        drawn = cli("--task", "virl-vl", "--style", style, "--visual", "night", "--out", tmp_path / "a.png")
        assert drawn.returncode == 0 and not drawn.stderr
        with Image.open(tmp_path / "a.png") as image:
            assert image.format == "PNG" and min(image.size) > 1000


@pytest.mark.parametrize("args", [
    ("--task", "gp-l"), ("--task", "virl-l"), ("--task", "chess"), ("--task", "gp-vl", "--visual", "text"),
    ("--task", "gp-vl", "--visual", "pink"), ("--task", "gp-vl", "--tile", "8"), ("--n", "0"), ("--task", "virl-vl", "--style", "long"),
    ("--task", "gp-vl", "--n", "1", "--visual", "red", "--out", "nowhere/x.png"), ("--n", "1", "--visual", "red", "--out", "x.psp")])
def test_refused_with_one_sentence(args):
    refused = cli("--out", "x.png", *args)
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1 and refused.stderr.endswith(".\n")
    assert not (ROOT / "x.png").exists() and not (ROOT / "x.psp").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_shipped_sheets_are_what_the_commands_draw(command, tmp_path):
    *flags, shipped = command.split()
    draw_sheets.main(draw_sheets.parse_args([*flags, str(tmp_path / "sheet.png")]))
    with Image.open(tmp_path / "sheet.png") as drawn, Image.open(ROOT / shipped) as there:
        assert drawn.size == there.size and (ROOT / shipped).stat().st_size < 400_000
        drawn, there = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (drawn, there))
        assert abs(drawn - there).mean() < 0.5  # in grey levels of 255; other versions of the font library draw edges a little differently


def test_every_look_of_the_suite_is_on_the_sheet():
    args = draw_sheets.parse_args("--task gp-vl --out x.png".split())
    looks = draw_sheets.legible_looks(args)
    suite = {row.visual for row in tasks.suite_rows("gp-vl")} - {"text"}
    assert suite < set(looks) and len(looks) == len(set(looks)) == len(suite) + len(draw_sheets.MIXED) == 14
    args.tile = 32
    assert set(looks) - set(draw_sheets.legible_looks(args)) == {"both/tiles=1/layout=grid/style=framed"}


def test_what_stands_above_the_views_of_a_walk():
    problem = tasks.make("virl-vl", visual="day/tiles=1", split="test", index=5, style="short", tile=64)
    rail, texts = problem.route.rail, [text for _, text in draw_sheets.views(problem)]
    assert len(texts) == len(rail) == 5 and problem.done
    assert texts[0] == "1. facing south: none\ninstruction 1: turn_direction(southwest)"
    assert texts[1] == "2. facing southwest: cafe front, crossing\ninstruction 3: turn_direction(southeast)"
    assert texts[-1] == "5. facing southeast: club right\ninstruction 4: stop()"


def test_the_key_has_every_sign_of_the_city(monkeypatch):
    problem, key = tasks.make("virl-vl", split="test", index=5, style="short"), {}
    monkeypatch.setattr(draw_sheets, "captioned", lambda image, text: key.setdefault(text, image))
    draw_sheets.key_of_signs(problem)
    key.pop("The signs of this city:")
    assert set(key) == {name for name, _ in tasks.city(problem.route.city, "short").landmarks.values()}
    assert {name for here in problem.route.rail for name, _ in here.landmarks} == {"cafe", "club"} < set(key)
    assert all(key[name].getpixel((36, 36)) == tasks.sign(name, "beige").convert("RGB").getpixel((32, 32)) for name in key)
    assert key["cafe"].getpixel((36, 36)) == (20, 150, 60) and key["club"].getpixel((36, 36)) == (240, 170, 0)  # green, yellow
    key.clear()
    draw_sheets.key_of_signs(tasks.make("virl-vl", split="test", index=5))
    assert not key  # in the full style the names stand on the signs
