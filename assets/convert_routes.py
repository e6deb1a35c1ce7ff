"""Converts the paper's routes (dataset tianzhechu/SFTvsRL_Data: nyc_1k_routes.zip, VLN_mini.zip)
into a routes.json that assets/panoramas.py reads:

    python -m assets.convert_routes FOLDER OUT
    python tasks.py --task virl-vl --data OUT

FOLDER holds route_infos.json, gps_pano_mapping.pkl and, for pictures, street_views/. The panoramas
are used where they lie. All files come from elsewhere: they are bounded, read field by field, and
never executed. Routes that cannot be used are left out and named.

    {"street_views": folder, "rotations": {panorama: degrees}, "routes": [{"facing": degrees,
     "stops": [[panorama or null, [[landmark, side], ...], bearing to turn to or null], ...]}, ...]}

Contents
    1. Plain pickles         read_plain_pickle
    2. Points                metres, nearest
    3. Routes                read_milestones, read_landmarks, route_stops, read_rotation
    4. A folder              convert, read_folder, add_rotations
    5. Command line
"""
import argparse
import json
import math
import os
import pickletools
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from assets.panoramas import PANORAMA, read_bytes  # noqa: E402
from tasks import NOTHING, Stop, between, parse_answer, printable, random_facing  # noqa: E402

# ---- 1. Plain pickles ----------------------------------------------------------------------------
# gps_pano_mapping.pkl is a dict {(latitude, longitude): name}. Python's own reader would run
# whatever a pickle names, so only the opcodes of plain data are carried out here.

PUSHES = {"BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(data: bytes):
    """Read a pickle (protocols 2 to 5) of dict, tuple, str, int and float. Nothing is imported or
    called: any other opcode, such as those that name a class or a function, is a ValueError with
    its name, and so is a broken stream."""
    stack, memo, marks = [], {}, []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name in PUSHES:
                stack.append(argument)
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
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise ValueError(f"it has the opcode {name}; only dict, tuple, str, int and float "
                                 "are read")
        return stack.pop()
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"This pickle is not plain data: {printable(str(error), 120)}.") from None


def _set_items(target, items):
    if len(items) % 2:
        raise ValueError("a key has no value")
    for key, value in zip(items[::2], items[1::2]):
        # nested pairs could take for ever to hash
        parts = key if isinstance(key, tuple) else (key,)
        plain = len(parts) <= 2 and all(isinstance(part, (str, int, float)) for part in parts)
        if not plain or not isinstance(target, dict):
            raise ValueError("a key is not a str, a number or a pair of them")
        target[key] = value


# ---- 2. Points -----------------------------------------------------------------------------------
# A point is (latitude, longitude) in degrees.

EARTH = 6_371_000  # metres of its radius
REACH = 20  # metres: a panorama further off shows another place


def metres(a, b) -> float:
    """The distance of two points, by the haversine formula."""
    lat_a, lng_a, lat_b, lng_b = map(math.radians, (*a, *b))
    across = math.cos(lat_a) * math.cos(lat_b) * math.sin((lng_b - lng_a) / 2) ** 2
    h = math.sin((lat_b - lat_a) / 2) ** 2 + across
    return 2 * EARTH * math.asin(math.sqrt(min(h, 1)))


def nearest(point, panoramas) -> str | None:
    """The name of the panorama nearest to a point, None where there is none within REACH."""
    near = [(metres(point, at), name) for at, name in panoramas if abs(at[0] - point[0]) < 3e-4]
    distance, name = min(near, default=(math.inf, None))
    return name if distance <= REACH else None


# ---- 3. Routes -----------------------------------------------------------------------------------

MAX_LANDMARK = 120  # characters of a milestone's landmark, as in tasks.py
HEADING = re.compile(r"\d{1,3}(\.\d+)?\b")  # as in "298 (northwest)"
ODD = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


def read_milestones(text: str) -> list[dict]:
    """The blocks { "key": "value", ... } of a route as dicts of text: by line, as the authors read
    them, so that a name may have quotation marks; a block on one line as an answer is read."""
    milestones = []
    for block in re.findall(r"\{[^{}]*\}", text):
        lines = block.strip("{} \n").split("\n")
        pairs = [line.strip().rstrip(",").partition(":")[::2] for line in lines if ":" in line]
        milestones.append(parse_answer(block) if len(lines) == 1 else {
            key.strip(" \"'"): value.strip(" \"'") for key, value in pairs})
    return milestones


def read_landmarks(milestone: dict) -> tuple[tuple[str, str], ...]:
    """((name, side),) of a milestone, () where it has none or "No landmark nearby". As the authors
    do, all of its text is taken for one landmark, whatever marks are in it; the last "is on your"
    parts name and side, and a text without one is a name with an empty side."""
    text = " ".join(milestone.get("landmarks", "").split()).removeprefix("The destination ")
    if text.lower() in NOTHING:
        return ()
    if len(text) > MAX_LANDMARK or not text.isprintable():
        raise ValueError(f"has a landmark that is not printable or of more than {MAX_LANDMARK} "
                         "characters")
    name, on, side = text.rpartition(" is on your ")
    return ((name, side) if on else (text, ""),)


def route_stops(info: dict, number: int, panoramas) -> tuple[float, list[Stop]]:
    """(first heading, stops) of a route: the start, points on the way, kept by chance, a turning
    point, ..., the destination. panoramas: [(point, name)]. One of ODD for a route that is not as
    released."""
    rng = random.Random(f"virl/released/{number}")
    places = info["start_place"]["relocated_geocode"], *info["route_results"]["geocode_list"]
    points = [tuple(map(float, place)) for place in places]
    blocks = read_milestones(info["milestone_info"])
    if len(blocks) != len(points) - 1 or not blocks:
        raise ValueError(f"has {len(points) - 1} points but {len(blocks)} milestones")
    stated = [HEADING.match(block.get("to_next_intersection_heading", "").strip())
              for block in blocks]
    if not all(stated):
        raise ValueError("has a milestone without a heading in degrees")
    headings = [float(match[0]) for match in stated]
    facing = round(float(info.get("init_heading", 0))) % 360
    facing = facing or random_facing(rng, headings[0])  # 0, or none, stands for unknown
    stops = [Stop(nearest(points[0], panoramas), (), headings[0])]
    for start, end, block, after in zip(points, points[1:], blocks, [*headings[1:], None]):
        stops += _on_the_way(rng, start, end, panoramas)
        stops.append(Stop(nearest(end, panoramas), read_landmarks(block), after))
    return facing, stops


def _on_the_way(rng, start, end, panoramas):
    """Stops between two points: five, each kept with probability 0.5 where it has a panorama and
    is not close to an end."""
    stops = []
    for share in (k / 6 for k in range(1, 6)) if metres(start, end) > 5 else ():
        kept, point = rng.random() < 0.5, between(start, end, share)
        if kept and min(metres(point, start), metres(point, end)) > 8:
            name = nearest(point, panoramas)
            stops += [Stop(name, (), None)] if name else []
    return stops


def read_rotation(street_views: Path, name: str) -> float:
    """The rotation of a panorama in degrees, from its metadata. ValueError where there is none."""
    if not PANORAMA.fullmatch(name):
        raise ValueError(f"{printable(name)!r} is no name of a panorama")
    metadata = read_bytes(street_views / f"{name}.metadata.json")
    try:
        rotation = float(json.loads(metadata)["rotation"])
    except ODD:
        rotation = math.inf
    if not abs(rotation) <= 1e6:
        raise ValueError(f"The metadata of the panorama {name} has no rotation in degrees.")
    return rotation


# ---- 4. A folder ---------------------------------------------------------------------------------

def convert(folder: Path, out: Path) -> dict:
    """Write OUT/routes.json, name the routes that are left out on stderr, and return what is
    written. ValueError for other files, or where no route can be used."""
    panoramas, infos = read_folder(folder)
    street_views = (folder / "street_views").resolve()
    data = {"street_views": str(street_views), "rotations": {}, "routes": []}
    left_out, unseen = {}, {}
    for number, info in enumerate(infos):
        try:
            facing, stops = route_stops(info, number, panoramas)
        except ODD as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            left_out[number] = printable(reason, 120)
            continue
        stops, reason = add_rotations(stops, street_views, data["rotations"])
        data["routes"].append({"facing": facing, "stops": stops})
        if reason:
            unseen[number] = printable(reason, 120)
    if not data["routes"]:
        reason = _named(left_out) or "its list is empty"
        raise ValueError(f"{folder} does not hold routes as released, none can be used: {reason}.")
    count = f"of {len(infos)} routes in {printable(str(folder), 200)} are left out"
    if left_out:
        print(f"{len(left_out)} {count}: {_named(left_out)}.", file=sys.stderr)
    if unseen:
        unseen |= left_out
        print(f"{len(unseen)} {count} of walks in pictures: {_named(unseen)}.", file=sys.stderr)
    _write(out / "routes.json", data)
    return data


def read_folder(folder: Path) -> tuple[list, list]:
    """(panoramas, route infos) of a folder as released: [((lat, lng), name)], [dict]. ValueError
    for other files."""
    panoramas = read_plain_pickle(read_bytes(folder / "gps_pano_mapping.pkl"))
    try:
        infos = list(json.loads(read_bytes(folder / "route_infos.json"))[0])
        # the text of nested tuples could take for ever
        if not all(isinstance(point, tuple) and isinstance(name, str)
                   for point, name in panoramas.items()):
            raise ValueError("a panorama's point is no pair or its name no text")
        return [((float(lat), float(lng)), name) for (lat, lng), name in panoramas.items()], infos
    except ODD as error:
        reason = printable(f"{type(error).__name__} {error}")
        raise ValueError(f"{folder} does not hold routes as released: {reason}.") from None


def add_rotations(stops, street_views: Path, rotations: dict) -> tuple[list[Stop], str]:
    """(stops, reason): the rotation of every stop's panorama goes into `rotations`, a panorama
    without one leaves its stop, and the reason says why there is no walk in pictures ("" where
    there is)."""
    reason, known = "", []
    for stop in stops:
        if stop.place is None:
            reason = f"has no panorama within {REACH} m of a position"
        elif stop.place not in rotations:
            try:
                rotations[stop.place] = read_rotation(street_views, stop.place)
            except ValueError as error:
                reason, stop = str(error).rstrip("."), stop._replace(place=None)
        known.append(stop)
    return known, reason


def _named(reasons):
    """The first ten routes of {number: reason}, and how many more there are."""
    named = [f"{number} {reasons[number]}" for number in sorted(reasons)]
    more = f"; and {len(named) - 10} more" if len(named) > 10 else ""
    return "; ".join(named[:10]) + more


def _write(path, data):
    """Whole or not at all."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(data), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"{printable(str(path), 200)} cannot be written ({error.strerror}): "
                         "give a folder that can be made.") from None


# ---- 5. Command line -----------------------------------------------------------------------------

def main(argv=None) -> dict:
    """Convert a folder; returns what is written."""
    parser = argparse.ArgumentParser(description="Convert the paper's routes for tasks.py --data.")
    parser.add_argument("folder", type=Path, help="has route_infos.json and gps_pano_mapping.pkl")
    parser.add_argument("out", type=Path, help="where routes.json is written; FOLDER is fine")
    args = parser.parse_args(argv)
    data = convert(args.folder, args.out)
    print(f"{len(data['routes'])} routes: {args.out / 'routes.json'}")
    return data


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
