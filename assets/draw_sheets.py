"""Draws the sheets of pictures in the README: cards under many looks, and a walk with its map.

    python -m assets.draw_sheets --task gp-vl --index 12 --n 1 --out assets/looks.png
    python -m assets.draw_sheets --task gp-vl --index 12 --n 1 --tile 32 --out assets/looks-tiny.png
    python -m assets.draw_sheets --task virl-vl --style short --index 5 --out assets/walk.png

Looks, rules and problems are chosen as in tasks.py: --visual, --rule, --split, --index, --seed.

Contents
    1. Cards                 contact_sheet: a row of hands for each look
    2. Walks                 walk_sheet: the map, the views at every position, the key of the signs
    3. Putting together      captioned, table, joined
    4. Command line
"""
import argparse
import random
import sys
from math import ceil, sqrt

from PIL import Image, ImageDraw, ImageFont, ImageOps

import tasks

# ---- 1. Cards ------------------------------------------------------------------------------------

# Drawn after the looks of the suite. They change several things at once, and show the options
# that the suite leaves out.
MIXED = (
    "both/layout=shuffled/scheme=numbers/style=framed/table=wood",
    "both/layout=scattered/style=dark/glyphs=mono/table=grey",
    "both/layout=scattered/glyphs=italic/table=blue/light=130/noise=25",
    "both/tiles=1/layout=grid/style=framed",
)
HAND_SIZE = (440, 210)  # pixels; a picture of a hand is scaled to fit


def contact_sheet(args):
    """Hands in --visual, or else in each of legible_looks, two looks beside each other.

    A look has --n hands, and twice as many where its picture is square.
    Returns (RGB picture, number of looks)."""
    looks = [args.visual] if args.visual else legible_looks(args)
    blocks = [captioned(joined(hands(args, look)), look) for look in looks]
    return table(blocks, columns=2), len(looks)


def legible_looks(args):
    """The looks of the suite and of MIXED that can be read at --tile; else the trained one."""
    task = tasks.TASKS[args.task]
    rule = str(tasks.parse_rule(args.rule or task.rule, random.Random(0)))  # without wildcards
    known = dict.fromkeys([*(row.visual for row in task.suite if row.visual != "text"), *MIXED])
    rows = [tasks.Row("", rule, visual=look) for look in known]
    legible = [row.visual for row in rows if task.problem.legible(row, args.tile)]
    return legible or [task.visual]  # then tasks.make refuses, and says how large a tile must be


def hands(args, look):
    """The pictures of one look, each above the ranks of its cards."""
    first = problem_of(args, args.index, look)
    count = args.n if first.image.width > first.image.height else 2 * args.n
    problems = [first] + [problem_of(args, args.index + i, look) for i in range(1, count)]
    pictures = [ImageOps.contain(problem.image, HAND_SIZE) for problem in problems]
    ranks = [" ".join(tasks.rank_names(problem.hand)) for problem in problems]
    return [captioned(image, text, "dimgrey") for image, text in zip(pictures, ranks)]


# ---- 2. Walks ------------------------------------------------------------------------------------

MAP_SIZE, VIEWS_SIZE, SIGN_SIZE = 960, 360, (72, 72)  # pixels
ORDER_OF_VIEWS = "In each picture: front and right above, back and left below."


def walk_sheet(args):
    """The walk number --index in --visual: its map below its instructions; for each position the
    heading, the observation, the instruction in force, the right action and the four views; and the
    key of the signs."""
    look = one_tile(args.visual or tasks.TASKS[args.task].visual)
    problem = problem_of(args, args.index, look, VIEWS_SIZE)
    title = "\n".join(f"{number}. {text}" for number, text in enumerate(problem.texts, 1))
    route = captioned(tasks.draw_map(problem, MAP_SIZE), title)
    legend = captioned(key_of_signs(problem), ORDER_OF_VIEWS)
    positions = [captioned(image, text) for image, text in views(problem)]
    steps = table(positions, columns=ceil(sqrt(len(positions))))
    return joined([route, joined([steps, legend], down=True)])


def one_tile(look):
    """A look of streets with all four views in one tile, unless it says itself how many."""
    return look if "tiles=" in look else look + "/tiles=1"


def views(problem):
    """Yield (picture, text) for every position of a walk; the problem moves to its end."""
    for number, here in enumerate(problem.route.rail, 1):
        facing, seen = tasks.compass_word(here.heading), tasks.observation(here, problem.style)
        yield problem.image, (f"{number}. facing {facing}: {seen}\n"
                              f"instruction {here.instruction + 1}: {problem.right_action()}")
        problem.advance()


def key_of_signs(problem):
    """Every sign of the walk's city below its name. Signs of the full style have their names on
    them and need no key: an empty picture."""
    if problem.style == "full":
        return Image.new("RGB", (1, 1), "white")
    town = tasks.city(problem.route.city, problem.style)
    names = sorted({name for name, _ in town.landmarks.values()})
    signs = [tasks.sign(name, problem.look.palette).convert("RGB") for name in names]
    entries = [captioned(sign.resize(SIGN_SIZE), name) for sign, name in zip(signs, names)]
    return captioned(table(entries, columns=8), "The signs of this city:")


# ---- 3. Putting together -------------------------------------------------------------------------

def captioned(image, text, ink="black"):
    """A picture on white, with a margin, below a text of some lines."""
    font = ImageFont.load_default(21)
    # The g gives all last lines the same depth, so that pictures beside each other are level.
    _, _, width, height = ImageDraw.Draw(image).multiline_textbbox((0, 0), text + "g", font)
    size = max(image.width, ceil(width)) + 12, image.height + ceil(height) + 18
    framed = Image.new("RGB", size, "white")
    ImageDraw.Draw(framed).multiline_text((6, 4), text, ink, font)
    framed.paste(image, (6, ceil(height) + 12))
    return framed


def table(images, columns):
    """Pictures in rows of so many, on white; each column is as wide as its widest picture."""
    rows = [images[i:i + columns] for i in range(0, len(images), columns)]
    count = min(columns, len(images))
    widths = [max(image.width for image in images[i::columns]) for i in range(count)]
    return joined([joined(row, widths=widths) for row in rows], down=True)


def joined(images, down=False, widths=None):
    """Pictures beside each other, or below each other, on white. widths: the room for each,
    where it is not the picture's own width."""
    widths = widths or [image.width for image in images]
    heights = [image.height for image in images]
    size = (max(widths), sum(heights)) if down else (sum(widths), max(heights))
    sheet = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        sheet.paste(image, (0, sum(heights[:i])) if down else (sum(widths[:i]), 0))
    return sheet


# ---- 4. Command line -----------------------------------------------------------------------------

def parse_args(argv=None):
    """Command line of the sheets."""
    parser = argparse.ArgumentParser(
        description="Draw a sheet of cards under many looks, or of a walk with its map.")
    add = parser.add_argument
    add("--task", default="gp-vl", help="gp-vl or virl-vl (default gp-vl)")
    add("--out", required=True, metavar="FILE", help="the picture to write, such as sheet.png")
    add("--visual", metavar="LOOK", help="as in tasks.py (default: many looks of cards, or a day)")
    add("--rule", help="rule of the problems (default: the trained one)")
    add("--split", default="test", help="base, train, val or test (default test)")
    add("--index", type=int, default=0, help="the first hand, or the walk (default 0)")
    add("--n", type=int, default=3, help="hands of each look, two for one if square (default 3)")
    add("--seed", type=int, default=0, help="shifts the training problems (default 0)")
    add("--style", default="full", help="full; short: other walks, emblems as signs (default full)")
    add("--tile", type=int, default=560, help="cards: pixels of the model's tiles (default 560)")
    return parser.parse_args(argv)


def problem_of(args, index, look, tile=None):
    """The problem of the command line with this index and look."""
    return tasks.make(args.task, args.rule, look, args.split, index, style=args.style,
                      seed=args.seed, tile=tile or args.tile)


def write(sheet, path):
    """Write a sheet in 256 colours, in a third of the bytes. ValueError where that fails."""
    # MAXCOVERAGE keeps rare colours, such as that of a small sign.
    small = sheet.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    try:
        small.save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its ending names no kind of picture"
        raise ValueError(f"--out {tasks.printable(path)} could not be written ({reason}): "
                         "name a PNG file in a directory that is there.") from None


def main(args):
    """Draw the sheet, write it to --out and print one line about it."""
    if not tasks.task_of(args.task).pictures or args.visual == "text":
        raise ValueError("A sheet shows pictures: choose --task gp-vl and a look other than text, "
                         "or --task virl-vl.")
    if args.n < 1:
        raise ValueError("The number of hands must be 1 or more.")
    if tasks.task_of(args.task).problem.leads_on:
        sheet, what = walk_sheet(args), f"walk {args.split} {args.index}"
    else:
        sheet, count = contact_sheet(args)
        what = f"{count} looks" if count > 1 else "1 look"
    write(sheet, args.out)
    print(f"{args.out}: {what}, {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
