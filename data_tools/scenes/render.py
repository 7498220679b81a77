"""Drawing a scene with Pillow: at three times the size, then averaged down, so that edges are smooth."""

import colorsys
import math
import random

from PIL import Image, ImageDraw

from data_tools.scenes.scene import LEFT, Group, Scene

SIDE = 64
_SCALE = 3
_RADII = {"small": 5.8, "large": 8.8}
_GAP = 1.4
_RIM = 1.2
_TILT = math.radians(12)
_HUES = {  # degrees, saturation, value
    "red": (0, 0.9, 0.85),
    "orange": (28, 0.95, 1.0),
    "yellow": (53, 0.95, 0.95),
    "green": (125, 0.8, 0.6),
    "blue": (222, 0.85, 0.85),
    "purple": (276, 0.75, 0.65),
    "pink": (330, 0.45, 1.0),
    "brown": (24, 0.75, 0.45),
}
Point = tuple[float, float]


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """An RGB picture of SIDE x SIDE pixels."""
    shade = 225 + int(rng.random() * 30)
    background = tuple(min(255, shade + int(rng.random() * 8)) for _ in range(3))
    image = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), background)
    draw = ImageDraw.Draw(image)
    for group, places in zip(scene.groups, _layout(scene, rng), strict=True):
        for place in places:
            _draw_shape(draw, group, place, background, rng)
    return image.reduce(_SCALE)


def _layout(scene: Scene, rng: random.Random) -> list[list[Point]]:
    """Centres of the shapes of every group: two groups have a half each, and a group stands in a line with jitter."""
    if not scene.relation:
        group = scene.groups[0]
        line = _line(group, SIDE, SIDE, rng)
        return [line if rng.random() < 0.5 else [(y, x) for x, y in line]]
    half = SIDE / 2
    places = []
    for number, group in enumerate(scene.groups):
        line = [(x + number * half, y) for x, y in _line(group, half, SIDE, rng)]
        places.append(line if scene.relation == LEFT else [(y, x) for x, y in line])
    return places


def _line(group: Group, width: float, height: float, rng: random.Random) -> list[Point]:
    """`group.count` centres one below the other in a box, free of overlaps."""
    radius = _RADII[group.size] + _GAP
    slack = height - 2 * radius * group.count
    cuts = sorted(rng.random() * slack for _ in range(group.count))
    centre = radius + rng.random() * (width - 2 * radius)
    places = []
    for number, cut in enumerate(cuts):
        x = centre + (rng.random() - 0.5) * 2 * _GAP
        places.append((min(max(x, radius), width - radius), radius * (2 * number + 1) + cut))
    return places


def _draw_shape(draw: ImageDraw.ImageDraw, group: Group, place: Point, background: tuple, rng: random.Random) -> None:
    radius = _RADII[group.size] * (0.94 + 0.12 * rng.random())
    color = _color(group.color, rng)
    tilt = (2 * rng.random() - 1) * _TILT
    outline = _OUTLINES[group.shape]

    def points(size: float) -> list[Point]:
        cos, sin = math.cos(tilt) * size, math.sin(tilt) * size
        return [(_SCALE * (place[0] + x * cos - y * sin), _SCALE * (place[1] + x * sin + y * cos)) for x, y in outline]

    draw.polygon(points(radius), color)
    if group.texture == "hollow":
        draw.polygon(points(radius * _HOLLOW[group.shape]), background)
    elif group.texture == "striped":
        _stripes(draw, place, radius, tilt, background)
        draw.polygon(points(radius), None, color, round(_SCALE * _RIM))  # the stripes must not eat the outline


def _stripes(draw: ImageDraw.ImageDraw, place: Point, radius: float, tilt: float, background: tuple) -> None:
    """Bands of background across a shape, askew, and not so long that they touch a neighbour."""
    cos, sin = math.cos(tilt + 0.5), math.sin(tilt + 0.5)
    width = max(1.5, radius * 0.2)
    for step in range(-2, 3):
        offset = step * 2 * width
        reach = math.sqrt(max(0.0, (1.25 * radius) ** 2 - offset**2))
        x, y = place[0] - sin * offset, place[1] + cos * offset
        ends = [(x - cos * reach, y - sin * reach), (x + cos * reach, y + sin * reach)]
        draw.line([(_SCALE * x, _SCALE * y) for x, y in ends], background, round(_SCALE * width))


def _color(name: str, rng: random.Random) -> tuple[int, int, int]:
    hue, saturation, value = _HUES[name]
    turned = hue + (rng.random() - 0.5) * 8
    red, green, blue = colorsys.hsv_to_rgb(turned / 360 % 1, saturation, value * (0.94 + 0.06 * rng.random()))
    return round(255 * red), round(255 * green), round(255 * blue)


def _circle() -> list[Point]:
    return [(math.cos(2 * math.pi * k / 24), math.sin(2 * math.pi * k / 24)) for k in range(24)]


def _star() -> list[Point]:
    radii = (1.15, 0.5)
    angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
    return [(radii[k % 2] * math.cos(angle), radii[k % 2] * math.sin(angle)) for k, angle in enumerate(angles)]


def _cross() -> list[Point]:
    quarter = [(0.34, -1.0), (0.34, -0.34), (1.0, -0.34)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


def _heart() -> list[Point]:
    points = []
    for k in range(24):
        angle = 2 * math.pi * k / 24
        x = 16 * math.sin(angle) ** 3
        y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
        points.append((x / 16, -(y + 2.5) / 15))
    return points


# Outlines around the origin with a radius of about 1, y downwards.
_OUTLINES: dict[str, list[Point]] = {
    "circle": _circle(),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.05), (1.05, 0.85), (-1.05, 0.85)],
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}
# How much of the outline a hollow shape leaves open.
_HOLLOW = {"circle": 0.66, "square": 0.66, "triangle": 0.5, "star": 0.5, "cross": 0.5, "heart": 0.62}
