"""A small data set drawn from formulas, in the folder layout of MVTec AD.

Two categories, photographed as on an inspection line:

``cloth``
    A plain weave: warp yarns run down, weft yarns run across, each passes over
    one and under the next.
``nut``
    A hexagonal nut seen from above, in any rotation, on a dark belt.

Every image is made in four steps. A *scene* is drawn at random (where the yarns
lie, how the nut is turned, where the light comes from). A defect, if any, changes
the scene. The scene is rendered at twice the final size and reduced, so that
edges look photographed. Sensor noise comes last. The mask marks where the
renderings with and without the defect differ before the noise.

Good and defective images take the same path, and each has its own random numbers,
seeded by its name. Hence one category alone gives the same files as both together.
The same versions of NumPy, SciPy and Pillow on the same kind of processor give
the same bytes; elsewhere single pixels may differ by one grey level.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from simplenet_lib.config import SimpleNetError

Array = npt.NDArray[Any]

#: Written into the manifest. Raise it when any picture changes.
VERSION = 1
#: Scenes are measured in units of which the image has 256 a side, whatever its size.
SIDE = 256.0
#: A pixel belongs to the mask where the defect changes a channel by more than this.
THRESHOLD = 6 / 255


# --- random fields and shapes ------------------------------------------------------------


def cloud(rng: np.random.Generator, n: int, detail: int = 4, falloff: float = 1.0) -> Array:
    """Smooth random field, (n, n), mean about 0, deviation about 1: a sum of cosines.

    ``detail`` is the number of cosines along each axis; higher ones are weaker
    by the power ``falloff``. einsum, not a matrix product: no threads, same bytes.

    Examples
    --------
    >>> field = cloud(np.random.default_rng(0), 64)
    >>> field.shape, bool(abs(field.mean()) < 0.1)
    ((64, 64), True)
    """
    k = np.arange(detail)
    weight = rng.standard_normal((detail, detail)) / (1 + np.hypot(*np.meshgrid(k, k))) ** falloff
    weight[0, 0] = 0
    weight *= 2 / np.sqrt((weight**2).sum())
    wave = np.cos(np.pi * np.outer((np.arange(n) + 0.5) / n, k))
    field = np.einsum("ik,kl->il", wave, weight).astype(np.float32)
    total: Array = np.einsum("il,jl->ij", field, wave.astype(np.float32))
    return total


def grain(rng: np.random.Generator, n: int, rows: int, columns: int) -> Array:
    """White noise averaged over ``rows`` x ``columns`` grid points, (n, n), deviation 1.

    Examples
    --------
    >>> field = grain(np.random.default_rng(0), 256, rows=3, columns=3)
    >>> round(float(field.std()), 1)
    1.0
    """
    field: Array = rng.standard_normal((n, n), np.float32)
    ndimage.uniform_filter(field, (rows, columns), output=field, mode="wrap")
    field *= math.sqrt(rows * columns)
    return field


def step(value: Array, width: float = 1.0) -> Array:
    """0 below -width/2, 1 above width/2, smooth in between.

    Examples
    --------
    >>> step(np.array([-1.0, 0.0, 1.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    t = np.clip(value / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def stroke(
    x: Array, y: Array, start: tuple[float, float], angle: float, length: float, bend: float
) -> tuple[Array, Array]:
    """Signed distance to a bent line, and position along it (-1 to 1 between its ends).

    Examples
    --------
    >>> x, y = np.array([0.0, 5.0]), np.array([0.0, 1.0])
    >>> distance, along = stroke(x, y, start=(0, 0), angle=0.0, length=10, bend=0)
    >>> distance.tolist(), along.tolist()
    ([0.0, 1.0], [0.0, 1.0])
    """
    dx, dy = x - start[0], y - start[1]
    along = (dx * math.cos(angle) + dy * math.sin(angle)) / (length / 2)
    return dy * math.cos(angle) - dx * math.sin(angle) - bend * along**2, along


# --- scenes ------------------------------------------------------------------------------


class Scene:
    """What both categories share: a grid, a light and whatever lies on top.

    Attributes
    ----------
    x, y : ndarray, (n, n)
        Position of every grid point, 0 to 256; n is twice the image's side.
    light : float
        Direction from which the light comes, in radians.
    tint : ndarray, (n, n, 3) or (3,)
        Factor on the surface's colour: stains.
    overlay : tuple of (cover, shadow, colour) or None
        A foreign fibre: two (n, n) fields between 0 and 1, and a colour (3,).

    Examples
    --------
    >>> scene = Scene(np.random.default_rng(0), 128)
    >>> scene.x.shape, round(float(scene.x.max()))
    ((128, 128), 255)
    """

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        self.n = n
        axis = ((np.arange(n) + 0.5) * (SIDE / n)).astype(np.float32)
        self.x, self.y = np.meshgrid(axis, axis)
        self.light = rng.uniform(0, 2 * math.pi)
        slope = (self.x - 128) * math.cos(self.light) + (self.y - 128) * math.sin(self.light)
        exposure = rng.uniform(0.82, 1.12)
        self.shade = exposure * (1 + rng.uniform(0.05, 0.22) * slope / 128)
        self.shade += 0.02 * cloud(rng, n, 3)
        self.tint: Array = np.ones(3, np.float32)
        self.overlay: tuple[Array, Array, Array] | None = None

    def spot(self, rng: np.random.Generator) -> tuple[float, float]:
        """A place where a defect may lie."""
        return float(rng.uniform(40, 216)), float(rng.uniform(40, 216))

    def surface(self) -> Array:
        """Colour of the scene under even light, (n, n, 3)."""
        raise NotImplementedError

    def render(self) -> Array:
        """The picture without noise, (n / 2, n / 2, 3), 0 to 1."""
        picture = self.surface()
        if self.overlay is not None:
            cover, shadow, colour = self.overlay
            picture = picture * (1 - 0.5 * shadow)[..., None]
            picture += cover[..., None] * (colour - picture)
        picture = picture * self.shade[..., None]
        picture = picture[::2] + picture[1::2]
        picture = (picture[:, ::2] + picture[:, 1::2]) / 4
        # The lens is not quite sharp: every pixel also sees a little of its neighbours.
        for axis in (0, 1):
            picture = ndimage.correlate1d(picture, [0.1, 0.8, 0.1], axis, mode="nearest")
        # Highlights roll off instead of clipping.
        return np.where(picture < 0.75, picture, 1 - 0.25 * np.exp((0.75 - picture) * 4))


class Cloth(Scene):
    """Woven yarns. ``u`` counts warp yarns from left to right, ``v`` weft yarns downwards.

    A yarn's centre lies at an integer. ``warp`` and ``weft`` are factors on the
    yarns' width at every point: 1 in good cloth, 0 where a yarn is gone.

    Examples
    --------
    >>> cloth = Cloth(np.random.default_rng(0), 128)
    >>> cloth.render().shape
    (64, 64, 3)
    """

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        super().__init__(rng, n)
        pitch, turn, shear = rng.uniform(8.6, 9.6), rng.normal(0, 0.03), rng.normal(0, 0.02)
        x, y = self.x - 128, self.y - 128
        self.u = (x + (turn + shear) * y) / pitch + 24 + rng.uniform() + 0.13 * cloud(rng, n, 5)
        self.v = (y - turn * x) / (pitch * rng.uniform(0.97, 1.08)) + 24 + rng.uniform()
        self.v += 0.13 * cloud(rng, n, 5)
        self.warp = np.ones((n, n), np.float32)
        self.weft = np.ones((n, n), np.float32)
        self.yarns = [self.spin(rng), self.spin(rng)]
        self.fibres = [grain(rng, n, 11, 2), grain(rng, n, 2, 11)]
        self.fuzz = grain(rng, n, 3, 3)
        colours = np.array([[0.80, 0.76, 0.68], [0.70, 0.675, 0.615]])
        warmth = rng.normal(0, 0.008) * np.array([1, 0, -1])
        self.colours = (colours + warmth).astype(np.float32)

    @staticmethod
    def spin(rng: np.random.Generator) -> tuple[Array, Array]:
        """Width and tone along 64 yarns, (64, 1024) each: 16 samples per crossing."""
        slub = ndimage.gaussian_filter1d(rng.standard_normal((64, 1024)), 20, axis=1) * 8.4
        width = 0.43 + 0.022 * slub + rng.normal(0, 0.014, (64, 1))
        tone = 1 + 0.03 * slub + rng.normal(0, 0.035, (64, 1))
        return width.astype(np.float32), tone.astype(np.float32)

    def surface(self) -> Array:
        """The higher of the two yarns at every point, lit from the side."""
        height, colour = [], []
        # Along its way a yarn rises over one neighbour and dives under the next.
        ways = ((self.u, self.v, self.warp, 1.0), (self.v, self.u, self.weft, -1.0))
        for kind, (across, along, factor, sign) in enumerate(ways):
            centre = np.rint(across)
            yarn = centre.astype(np.int32) & 63
            at = yarn * 1024 + ((along * 16).astype(np.int32) & 1023)
            width, tone = (table.ravel().take(at) for table in self.yarns[kind])
            offset = across - centre
            bulge = 1 - (offset / (width * factor + 1e-3)) ** 2
            wave = np.cos(np.pi * (along + yarn.astype(np.float32))) * sign
            body = 0.55 * np.sqrt(np.maximum(bulge, 0)) + 0.30 * wave
            height.append(np.where(bulge > 0, body, -0.9))
            # Twisted fibres run obliquely across the yarn.
            twist = np.cos(13.2 * along + 20.1 * offset + 1.5 * self.fuzz)
            colour.append(tone * (1 + 0.05 * twist + 0.075 * self.fibres[kind]))
        top = np.maximum(*height)
        first = height[0] >= height[1]
        soft = ndimage.uniform_filter(top, 3)
        gy, gx = np.gradient(soft)
        relief = -(gx * math.cos(self.light) + gy * math.sin(self.light))
        deep = np.clip((soft + 0.75) / 1.5, 0, 1)
        bright = (0.16 + 0.84 * deep) * np.clip(1 + 1.6 * relief, 0.3, 1.7)
        bright *= np.where(first, *colour) * (1 + 0.03 * self.fuzz)
        woven = np.take(self.colours[::-1], first.astype(np.int8), axis=0) * self.tint
        # Between the yarns one looks at a dark table.
        woven *= bright[..., None]
        woven[top < -0.85] = (0.14, 0.14, 0.147)
        return woven


class Nut(Scene):
    """A steel nut. ``px``, ``py`` are coordinates in the nut's own frame, in scene units.

    ``outline`` is the distance to the hexagon (negative inside), ``height`` the
    relief of the top, and ``rough`` says how dull the metal is, 0 to 1.

    Examples
    --------
    >>> nut = Nut(np.random.default_rng(0), 128)
    >>> nut.render().shape, bool(nut.outline.min() < 0 < nut.outline.max())
    ((64, 64, 3), True)
    """

    APOTHEM, BORE, THROUGH = 80.0, 43.0, 0.80

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        super().__init__(rng, n)
        self.turn = rng.uniform(0, 2 * math.pi)
        self.centre = (128 + rng.uniform(-6, 6), 128 + rng.uniform(-6, 6))
        c, s = math.cos(self.turn), math.sin(self.turn)
        dx, dy = self.x - self.centre[0], self.y - self.centre[1]
        self.px, self.py = dx * c + dy * s, dy * c - dx * s
        self.radius = np.hypot(self.px, self.py)
        self.angle = np.arctan2(dy, dx)
        self.outline = self.hexagon(self.px, self.py)
        # The chamfer is a cone: it takes off the corners and leaves a round top.
        self.height = -0.55 * np.maximum(self.radius - self.APOTHEM * rng.uniform(0.94, 0.97), 0)
        self.height -= 0.85 * np.maximum(self.BORE * 1.12 - self.radius, 0)
        self.rough = np.zeros((n, n), np.float32)
        # Marks of the lathe: noise over radius and angle, averaged far along the angle.
        marks = grain(rng, 512, 2, 101)
        at = ((self.radius * 4).astype(np.intp) % 512, ((self.angle + np.pi) * 81).astype(np.intp))
        self.lathe = marks[at]
        self.speckle, self.mottle = grain(rng, n, 2, 2), cloud(rng, n, 10, 0.6)
        self.belt = 0.21 + 0.010 * self.speckle + 0.012 * grain(rng, n, 2, 41)
        self.belt += 0.012 * self.mottle
        self.gloss, self.metal = rng.uniform(0.24, 0.42), rng.uniform(0.40, 0.50)

    @classmethod
    def hexagon(cls, px: Array, py: Array) -> Array:
        """Signed distance to the nut's six sides."""
        sides = [
            abs(px * math.cos(a) + py * math.sin(a)) for a in (0, math.pi / 3, 2 * math.pi / 3)
        ]
        return np.maximum(np.maximum(sides[0], sides[1]), sides[2]) - cls.APOTHEM

    def spot(self, rng: np.random.Generator) -> tuple[float, float]:
        """A place on the nut's top."""
        angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(54, 76)
        x, y = self.centre
        return x + radius * math.cos(angle), y + radius * math.sin(angle)

    def surface(self) -> Array:
        """Belt, shadow, bore with its thread, and metal."""
        lx, ly = math.cos(self.light), math.sin(self.light)
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        gy, gx = np.gradient(self.height, SIDE / self.n)
        gx = gx + (0.05 * self.lathe + 0.02 * self.speckle) * cos
        gy = gy + (0.05 * self.lathe + 0.02 * self.speckle) * sin
        up = 1 / np.sqrt(1 + gx**2 + gy**2)
        facing = (0.75 - 0.66 * (gx * lx + gy * ly)) * up
        # Turned metal shines in two opposite fans, across its circular marks.
        across = (cos * ly - sin * lx) * up
        fan = (1 - np.minimum(abs(across), 1)) ** 2.5 * (1 - 0.35 * abs(gx * lx + gy * ly))
        shine = self.gloss * fan * (1 - 0.85 * self.rough)
        glint = 0.5 * np.clip(facing - 0.80, 0, 1) / 0.2 * (1 - self.rough)
        metal = self.metal * (0.25 + 0.72 * facing) + shine + glint
        metal *= 1 + 0.035 * self.lathe + 0.02 * self.speckle + 0.035 * self.mottle
        metal *= 0.55 + 0.45 * step(-self.outline - 1.2, 3.5)

        # The bore: thread turns that get darker with depth, and the belt below.
        depth = (self.BORE - self.radius) / (self.BORE * (1 - self.THROUGH))
        ring = 0.5 + 0.5 * np.cos(2 * np.pi * 3.4 * np.sqrt(abs(depth)) + self.angle)
        lit = 0.55 - 0.45 * (cos * lx + sin * ly)
        thread = (0.06 + 0.70 * ring**2 * lit) * np.clip(1.05 - 0.6 * depth, 0.1, 1)

        # The shadow is the outline again, moved away from the light and blurred.
        away = (round(-10 * ly * self.n / SIDE), round(-10 * lx * self.n / SIDE))
        moved = np.roll(self.outline, away, (0, 1))
        belt = self.belt * (1 - 0.6 * step(3 - moved, 22)) * (1 - 0.35 * step(2 - self.outline, 8))
        edge = SIDE / self.n * 1.5
        inside = step(self.BORE - self.radius, edge)
        through = step(self.BORE * self.THROUGH - self.radius, 2.0)
        grey = metal * (1 - inside) + thread * inside
        cover = step(-self.outline, edge) * (1 - through)
        steel = grey[..., None] * np.array([0.985, 1.0, 1.02], np.float32) * self.tint
        ground = belt[..., None] * np.array([0.96, 1.0, 1.06], np.float32)
        ground += cover[..., None] * (steel - ground)
        return ground


# --- defects -----------------------------------------------------------------------------
# Each changes a scene in place. How strong it is comes from ``rng``, from plain to faint.


def blob(scene: Scene, rng: np.random.Generator, radius: float) -> Array:
    """An uneven patch, (n, n): 1 at its centre, 0 at its border, negative outside.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> patch = blob(Nut(rng, 128), rng, radius=30)
    >>> bool(patch.max() > 0 > patch.min())
    True
    """
    x, y = scene.spot(rng)
    squash, angle = rng.uniform(0.6, 1), rng.uniform(0, np.pi)
    dx, dy = scene.x - x, scene.y - y
    along = dx * math.cos(angle) + dy * math.sin(angle)
    across = (dy * math.cos(angle) - dx * math.sin(angle)) / squash
    patch: Array = 1 - np.hypot(along, across) / radius + 0.28 * cloud(rng, scene.n, 14, 0.9)
    return patch


def fibre(scene: Scene, rng: np.random.Generator) -> None:
    """A foreign fibre has fallen on the part: a curled line with a soft shadow.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nut = Nut(rng, 128)
    >>> fibre(nut, rng)
    >>> nut.overlay is None
    False
    """
    steps, size = 500, rng.uniform(30, 80)
    # The heading swings irregularly: two slow waves and a steady curl.
    t = np.linspace(0, 2 * np.pi, steps)
    swing = rng.normal(0, (0.8, 0.5, 0.35), 3) @ [t / 3, np.sin(t), np.sin(2.3 * t + 1)]
    heading = rng.uniform(0, 2 * np.pi) + 1.6 * swing
    x = np.cumsum(np.cos(heading)) * size / steps
    y = np.cumsum(np.sin(heading)) * size / steps
    cx, cy = scene.spot(rng)
    scale = scene.n / SIDE
    line = np.ones((scene.n, scene.n), bool)
    row = np.clip((y - y.mean() + cy) * scale, 0, scene.n - 1).astype(int)
    line[row, np.clip((x - x.mean() + cx) * scale, 0, scene.n - 1).astype(int)] = False
    distance = ndimage.distance_transform_edt(line) / scale
    distance = ndimage.gaussian_filter(distance.astype(np.float32), 1.0)
    thick = rng.uniform(0.5, 1.1)
    shade = np.roll(distance, (2, 2), (0, 1))
    palette = [(0.12, 0.12, 0.14), (0.16, 0.20, 0.42), (0.50, 0.14, 0.13), (0.86, 0.85, 0.80)]
    colour = np.array(palette[rng.integers(4)])
    cover = rng.uniform(0.6, 1.0) * step(thick - distance, 1.0)
    scene.overlay = cover, 0.6 * step(thick + 1 - shade, 4.0), colour


def hole(cloth: Cloth, rng: np.random.Generator) -> None:
    """Yarns are torn out: a dark, ragged gap, and the yarns around it pushed aside.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cloth = Cloth(rng, 128)
    >>> hole(cloth, rng)
    >>> float(cloth.warp.min())  # yarns are gone
    0.0
    """
    x, y = cloth.spot(rng)
    radius, squash = rng.uniform(4.5, 15), rng.uniform(0.75, 1.3)
    distance = np.hypot(cloth.x - x, (cloth.y - y) * squash) + cloud(rng, cloth.n, 20, 0.5)
    push = 0.4 * np.exp(-((distance / (1.5 * radius)) ** 2)) / (abs(distance) + 3)
    cloth.u, cloth.v = cloth.u - push * (cloth.x - x), cloth.v - push * (cloth.y - y)
    ends = rng.uniform(-0.75, 0.35, (2, 64)) * radius  # every yarn breaks somewhere else
    for ways, yarn, end in ((cloth.warp, cloth.u, ends[0]), (cloth.weft, cloth.v, ends[1])):
        torn = np.rint(yarn).astype(np.int32) & 63
        ways *= step(distance - radius - end[torn], 5)


def cut(cloth: Cloth, rng: np.random.Generator) -> None:
    """A blade has gone through: a narrow slit whose ends taper off.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cloth = Cloth(rng, 128)
    >>> cut(cloth, rng)
    >>> bool(cloth.warp.min() < 0.5)
    True
    """
    width = rng.uniform(0.5, 2.0)
    across, along = stroke(
        cloth.x,
        cloth.y,
        cloth.spot(rng),
        rng.uniform(0, np.pi),
        rng.uniform(22, 70),
        rng.uniform(-6, 6),
    )
    open_ = width * np.sqrt(np.clip(1 - along**2, 0, 1))
    ragged = abs(across) + 0.5 * cloth.fuzz
    gone = np.where(abs(along) < 1, step(open_ - ragged, 1.2), 0)
    cloth.warp *= 1 - gone
    cloth.weft *= 1 - gone


def missing_thread(cloth: Cloth, rng: np.random.Generator) -> None:
    """One warp yarn is missing or too thin over some length: a line of open weave.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cloth = Cloth(rng, 128)
    >>> missing_thread(cloth, rng)
    >>> bool(cloth.warp.min() < 1), bool(cloth.weft.min() < 1)  # only the warp suffers
    (True, False)
    """
    x, y = cloth.spot(rng)
    scale = cloth.n / SIDE
    yarn = np.rint(cloth.u[int(y * scale), int(x * scale)])
    reach = abs(cloth.y - y) - rng.uniform(25, 150)
    thin = rng.choice([0.0, rng.uniform(0.2, 0.6)])
    cloth.warp *= np.where(np.rint(cloth.u) == yarn, thin + (1 - thin) * step(reach, 6), 1)


def stain(cloth: Cloth, rng: np.random.Generator) -> None:
    """Something was spilt: a darker patch, with the rim that drying leaves.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> cloth = Cloth(rng, 128)
    >>> stain(cloth, rng)
    >>> bool(cloth.tint.min() < 1)
    True
    """
    patch = blob(cloth, rng, rng.uniform(14, 34))
    rim = np.exp(-((patch / 0.10) ** 2))
    strength = rng.uniform(0.15, 0.5) * (0.75 * step(patch, 0.25) + 0.35 * rim)
    absorbed = np.array([(0.55, 0.8, 1.1), (0.9, 0.9, 0.9), (1.0, 0.8, 0.6)][rng.integers(3)])
    cloth.tint = 1 - strength[..., None] * absorbed


def scratch(nut: Nut, rng: np.random.Generator) -> None:
    """Something hard slid over the top: a thin groove, one side bright, one dark.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nut = Nut(rng, 128)
    >>> before = nut.height
    >>> scratch(nut, rng)
    >>> bool((nut.height < before).any())
    True
    """
    across, along = stroke(
        nut.x,
        nut.y,
        nut.spot(rng),
        rng.uniform(0, np.pi),
        rng.uniform(20, 60),
        rng.uniform(-5, 5),
    )
    taper = np.sqrt(np.clip(1 - along**2, 0, 1))
    groove = np.exp(-((across / rng.uniform(0.8, 1.5)) ** 2)) * taper
    nut.height = nut.height - rng.uniform(0.25, 1.2) * groove
    nut.rough = np.maximum(nut.rough, 0.5 * groove)


def dent(nut: Nut, rng: np.random.Generator) -> None:
    """The nut has been hit on a side: the edge gives way and the top sinks.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nut = Nut(rng, 128)
    >>> before = nut.outline
    >>> dent(nut, rng)
    >>> bool((nut.outline > before).any())
    True
    """
    side, shift = rng.integers(6) * np.pi / 3, rng.uniform(-30, 30)
    c, s = math.cos(side), math.sin(side)
    x, y = nut.APOTHEM * c - shift * s, nut.APOTHEM * s + shift * c
    pit = np.exp(-((np.hypot(nut.px - x, nut.py - y) / rng.uniform(8, 16)) ** 2))
    deep = rng.uniform(2.0, 7.0)
    nut.outline = nut.outline + deep * pit
    nut.height = nut.height - 1.2 * deep * pit


def broken_corner(nut: Nut, rng: np.random.Generator) -> None:
    """A corner has broken off and left a dull, grainy face.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nut = Nut(rng, 128)
    >>> before = nut.outline
    >>> broken_corner(nut, rng)
    >>> bool((nut.outline > before).any())
    True
    """
    corner = rng.integers(6) * np.pi / 3 + np.pi / 6
    tip = nut.APOTHEM * 2 / np.sqrt(3)
    tilt = corner + rng.normal(0, 0.2)
    beyond = nut.px * np.cos(tilt) + nut.py * np.sin(tilt) - tip + rng.uniform(7, 24)
    beyond = beyond + 1.4 * cloud(rng, nut.n, 20, 0.7)
    nut.outline = np.maximum(nut.outline, beyond)
    face = step(beyond + rng.uniform(3, 7), 2.5)
    nut.height = nut.height - face * (1.2 * cloud(rng, nut.n, 32, 0.2) + 0.25 * nut.speckle)
    nut.rough = np.maximum(nut.rough, face)


def rust(nut: Nut, rng: np.random.Generator) -> None:
    """Rust has set in: a mottled brown patch that no longer shines.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> nut = Nut(rng, 128)
    >>> rust(nut, rng)
    >>> bool(nut.tint.min() < 1), bool(nut.rough.max() > 0)
    (True, True)
    """
    patch = blob(nut, rng, rng.uniform(12, 30))
    mottled = np.clip(0.75 + 0.25 * cloud(rng, nut.n, 32, 0.3), 0, 1)
    strength = rng.uniform(0.25, 0.9) * step(patch - 0.1, 0.6) * mottled
    nut.tint = 1 - strength[..., None] * np.array([0.22, 0.48, 0.68])
    nut.rough = np.maximum(nut.rough, strength)


Defect = Callable[[Any, np.random.Generator], None]
#: For each category its scene and its defects.
CATEGORIES: dict[str, tuple[type[Scene], dict[str, Defect]]] = {
    "cloth": (Cloth, {f.__name__: f for f in (cut, fibre, hole, missing_thread, stain)}),
    "nut": (Nut, {f.__name__: f for f in (broken_corner, dent, fibre, rust, scratch)}),
}


# --- one image, and all of them ----------------------------------------------------------


class Sample(NamedTuple):
    """One drawn image: ``image`` (H, W, 3) and ``mask`` (H, W), both 8 bit, as they are
    written; ``clean`` and ``reference`` (H, W, 3), 0 to 1, the renderings before the
    noise with and without the defect.

    Examples
    --------
    >>> sample: Sample = draw("nut", "test", "dent", 0, seed=0, size=64)
    >>> sample.image.dtype, sample.mask.max(), sample.clean.shape
    (dtype('uint8'), np.uint8(255), (64, 64, 3))
    """

    image: Array
    mask: Array
    clean: Array
    reference: Array


def draw(category: str, split: str, kind: str, index: int, *, seed: int, size: int) -> Sample:
    """Draw one image. ``kind`` is ``"good"`` or the name of a defect.

    Examples
    --------
    >>> first, again = (draw("cloth", "train", "good", 0, seed=0, size=64) for _ in range(2))
    >>> first.image.shape, bool((first.image == again.image).all())
    ((64, 64, 3), True)
    """
    name = f"{category}/{split}/{kind}/{index}"
    streams = np.random.SeedSequence([seed, *name.encode()]).spawn(3)
    of_scene, of_defect, of_noise = (np.random.default_rng(stream) for stream in streams)
    make, defects = CATEGORIES[category]
    scene = make(of_scene, 2 * size)
    clean = reference = scene.render()
    changed = np.zeros((size, size), bool)
    if kind != "good":
        defects[kind](scene, of_defect)
        clean = scene.render()
        changed = abs(clean - reference).max(2) > THRESHOLD
        # Small gaps inside a defect, where it happens to match the ground, belong to it.
        changed = ndimage.grey_closing(changed.astype(np.uint8), 5, mode="nearest") > 0
    noise = of_noise.standard_normal(clean.shape, np.float32)
    noisy = clean + noise * np.sqrt(0.008**2 + 0.014**2 * clean)
    image = np.rint(np.clip(noisy, 0, 1) * 255).astype(np.uint8)
    return Sample(image, changed.astype(np.uint8) * 255, clean, reference)


def is_whole(root: Path, manifest: dict[str, Any]) -> bool:
    """Whether ``root`` is a data set with this manifest and none of its files missing.

    Examples
    --------
    >>> import json
    >>> manifest = json.loads((data / "manifest.json").read_text())
    >>> is_whole(data, manifest), is_whole(folder, manifest)
    (True, False)
    """
    try:
        found = json.loads((root / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(found == manifest) and manifest["files"] == len(list(root.glob("*/*/*/*.png")))


def generate(
    root: Path,
    *,
    categories: Sequence[str] = ("cloth", "nut"),
    seed: int = 0,
    train: int = 60,
    test_good: int = 20,
    test_per_defect: int = 8,
    size: int = 256,
) -> Path:
    """Write the data set to ``root``, or do nothing if it is already there.

    Parameters
    ----------
    root : Path
        Folder to create. It appears only when every file in it is written.
    categories : sequence of str
        Some of ``CATEGORIES``.
    seed : int
        Same seed, same files, whichever categories and however many images.
    train, test_good, test_per_defect : int
        Images per category, per category, and per category and defect.
    size : int
        Side of the images in pixels, 64 to 1024.

    Returns
    -------
    Path
        ``root``, laid out like MVTec AD: ``CATEGORY/train/good/000.png``,
        ``CATEGORY/test/DEFECT/000.png``, ``CATEGORY/ground_truth/DEFECT/000_mask.png``.

    Raises
    ------
    SimpleNetError
        If a parameter is out of range, if ``root`` holds something that is not
        this very data set, or if it cannot be written.

    Examples
    --------
    >>> counts = {"train": 2, "test_good": 1, "test_per_defect": 0}
    >>> root = generate(folder / "data", categories=("nut",), **counts)
    >>> sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    ['nut/test/good/000.png', 'nut/train/good/000.png', 'nut/train/good/001.png']
    """
    root = Path(root)
    known = ", ".join(CATEGORIES)
    if (
        not categories
        or len(set(categories)) < len(categories)
        or set(categories) - set(CATEGORIES)
    ):
        raise SimpleNetError(f"categories {list(categories)}: choose each at most once of {known}.")
    limits = {"seed": (seed, 0, 2**31 - 1), "size": (size, 64, 1024)}
    counts = {"train": train, "test_good": test_good, "test_per_defect": test_per_defect}
    limits.update({name: (count, 0, 1000) for name, count in counts.items()})
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise SimpleNetError(f"synthetic data: {name} is {value}, outside {low} to {high}.")
    jobs = []
    for category in categories:
        kinds = dict.fromkeys(CATEGORIES[category][1], test_per_defect)
        jobs += [(category, "train", "good", i) for i in range(train)]
        for kind, count in {"good": test_good, **kinds}.items():
            jobs += [(category, "test", kind, i) for i in range(count)]
    files = len(jobs) + sum(kind != "good" for _, _, kind, _ in jobs)
    manifest = {"version": VERSION, "categories": sorted(categories), "seed": seed, "size": size}
    manifest = {**manifest, **counts, "files": files}

    if is_whole(root, manifest):
        return root
    refusal = f"{root}: exists and is not this data set. Move it away or choose another folder."
    if os.path.lexists(root) and not (root.is_dir() and not any(root.iterdir())):
        raise SimpleNetError(refusal)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=".synthetic-") as folder:
            partial = Path(folder) / "data"
            for category, split, kind, index in jobs:
                sample = draw(category, split, kind, index, seed=seed, size=size)
                pictures = {f"{split}/{kind}/{index:03d}.png": sample.image}
                if kind != "good":
                    pictures[f"ground_truth/{kind}/{index:03d}_mask.png"] = sample.mask
                for name, pixels in pictures.items():
                    path = partial / category / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path, compress_level=1)
            partial.mkdir(exist_ok=True)
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
            os.rename(partial, root)
    except OSError as error:
        if is_whole(root, manifest):  # another process was faster
            return root
        raise SimpleNetError(f"{root}: could not be written ({error}).") from error
    return root
