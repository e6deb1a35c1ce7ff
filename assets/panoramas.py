"""Walks along the paper's routes, through its panoramas: the routes.json that assets/convert_routes.py writes.

    walk = make(FOLDER, "virl-vl", rule="relative", index=3)     # in place of tasks.make: a folder's routes, over and over
    python tasks.py --task virl-vl --data FOLDER                 # see them, type answers

The file may come from anybody: it is bounded and checked field by field. A place is the name of a panorama, None without one.
"""
import io
import json
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from math import pi
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tasks  # noqa: E402
from tasks import Navigation, Route, Stop, as_tuples, four_views, make_rail, printable, quoted  # noqa: E402

MAX_DATA = 1 << 28  # bytes of a file
PANORAMA = re.compile(r"[\w-]{1,64}", re.ASCII)  # a name


class Released(NamedTuple):
    """The content of a routes.json: routes, the folder of panoramas, their rotations in degrees."""
    routes: tuple[Route, ...]
    street_views: Path
    rotations: dict


def read_bytes(path: Path) -> bytes:
    """A file of at most MAX_DATA bytes. ValueError for others."""
    try:
        if path.is_file() and path.stat().st_size <= MAX_DATA:
            return path.read_bytes()
    except OSError:  # a name that is too long, no permission
        pass
    raise ValueError(f"{printable(str(path), 200)} cannot be read or is larger than "
                     f"{MAX_DATA >> 20} MB: see assets/convert_routes.py.")


@lru_cache
def released(folder: str, pictures: bool) -> Released:
    """The routes.json of a folder, for pictures only its routes with a panorama at every position.
    ValueError where it is damaged, or no route is left."""
    path = Path(folder) / "routes.json"
    text = read_bytes(path)
    try:
        data = as_tuples(json.loads(text))
        rotations = data["rotations"]
        if not all(PANORAMA.fullmatch(name) and abs(rotations[name]) <= 1e6 for name in rotations):
            raise ValueError("a rotation is no panorama's angle")
        rails = [_released_rail(rotations, **route) for route in data["routes"]]
        routes = tuple(Route(Path(folder).name, rail) for rail in rails
                       if not pictures or all(here.place for here in rail))
        if not routes:
            raise ValueError("none can be used")
        return Released(routes, Path(data["street_views"]), rotations)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        path = printable(str(path), 200)
        reason = printable(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} does not hold released routes ({reason}).") from None


def _released_rail(rotations, facing, stops):
    """The checked rail of a route. It starts with a turn and ends without one."""
    stops = [Stop(*stop) for stop in stops]
    fits = 0 <= facing <= 360 and stops[0].towards is not None and stops[-1].towards is None
    for place, landmarks, towards in stops:
        texts = [name + side for name, side in landmarks]
        fits &= isinstance(landmarks, tuple) and texts == [printable(text, 120) for text in texts]
        fits &= place is None or place in rotations
        fits &= towards is None or 0 <= towards <= 360
    if not fits:
        raise ValueError("a route has a field that does not fit")
    return make_rail(facing, stops)


def panorama_grid(folder, name, heading, look, tile):
    """As draw_grid, from a panorama. ValueError where it is missing or no picture of at most
    2 * Image.MAX_IMAGE_PIXELS pixels."""
    _, street_views, rotations = released(folder, True)
    if name not in rotations:
        raise ValueError(f"{quoted(name or '')} is no name of a panorama.")
    photo = read_bytes(street_views / f"{name}.jpg")
    size = tile if look.tiles == 4 else tile // 2
    try:
        image = Image.open(io.BytesIO(photo), formats=("JPEG",))
        panorama = np.asarray(image.convert("RGB"))
    except (OSError, Image.DecompressionBombError):
        raise ValueError(f"The panorama {name} is no picture that can be read.") from None

    def draw_view(towards):
        flat = panorama_view(panorama, (towards - 180) % 360 + rotations[name], 640)
        return Image.fromarray(flat).resize((size, size), Image.Resampling.BILINEAR)
    return four_views(heading, draw_view)


def panorama_view(panorama: np.ndarray, yaw: float, size: int) -> np.ndarray:
    """A flat view of size x size pixels, 90 degrees wide, pitch 0, of an equirectangular panorama
    (H, W, 3) uint8; yaw in degrees to the right of its middle."""
    high, wide, _ = panorama.shape
    across = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1  # -1 to 1, one unit ahead
    u = (np.arctan(across) / (2 * pi) + yaw / 360 + 0.5) % 1 * wide - 0.5  # (size,): of a column
    v = (0.5 + np.arctan2(across[:, None], np.hypot(across, 1)) / pi) * high - 0.5  # (size, size)
    left = np.floor(u).astype(int)
    top = np.floor(v).astype(int)
    share_u = np.float32(u - left)[:, None]
    share_v = (v - top)[..., None]

    def row(at):  # between two columns
        return (1 - share_u) * panorama[at, left % wide] + share_u * panorama[at, (left + 1) % wide]
    upper, lower = row(top), row((top + 1) % high)
    return (upper + (lower - upper) * share_v + 0.5).astype(np.uint8)


@dataclass
class ReleasedWalk(Navigation):
    """A walk along a route of a folder."""
    folder: str = ""

    def draw(self, here):
        """The four views at a Position."""
        return panorama_grid(self.folder, here.place, here.heading, self.look, self.tile)

    def figures(self, turns):
        """The views up to the last position reached: there is no map."""
        return {name: figure for name, figure in super().figures(turns).items() if name != "map"}


def make(folder, name, rule=None, visual=None, split="train", index=0, *, seed=0, **settings):
    """`tasks.make`, with the routes of a folder, over and over, in place of a city's. ValueError for other tasks than walks, and
    for a folder that holds no routes."""
    asked = tasks.make(name, rule, visual, split, index, seed=seed, **settings)  # checks it all
    if not isinstance(asked, Navigation):
        raise ValueError("GeneralPoints deals its hands: only V-IRL takes released data.")
    known = released(str(folder), bool(asked.look)).routes
    index += seed * 10**9 if split in ("base", "train") else 0
    fields = {name: getattr(asked, name) for name in ("rule", "attempts", "style", "judged_by", "look", "tile")}
    return ReleasedWalk(known[index % len(known)], **fields, folder=str(folder))
