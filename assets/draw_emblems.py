"""Draws the signs of the tiny model's landmarks side by side, in the order of the short names in
virl.json: a disc, a cross, a triangle and a ring, each in four colours.

    python -m assets.draw_emblems assets/emblems.png
"""
import sys

from PIL import Image, ImageDraw

from tasks import EMBLEMS, VIRL

SIZE = 64


def draw_emblem(number: int) -> Image.Image:
    """The emblem of the short name of that number, RGBA on white."""
    image = Image.new("RGBA", (SIZE, SIZE), "white")
    draw, shape, colour = ImageDraw.Draw(image), number // 4, EMBLEMS[number % 4]
    draw.rectangle((0, 0, 63, 63), outline="#141414", width=5)
    if shape == 1:
        draw.rectangle((24, 9, 39, 54), colour)
        draw.rectangle((9, 24, 54, 39), colour)
    elif shape == 2:
        draw.polygon([(32, 9), (55, 54), (9, 54)], colour)
    else:
        draw.ellipse((9, 9, 54, 54), None if shape else colour, colour, 13)
    return image


def draw_all() -> Image.Image:
    """All emblems beside each other."""
    names = VIRL["short"]
    sheet = Image.new("RGBA", (SIZE * len(names), SIZE))
    for number in range(len(names)):
        sheet.paste(draw_emblem(number), (SIZE * number, 0))
    return sheet


if __name__ == "__main__":
    draw_all().save(sys.argv[1], optimize=True)
