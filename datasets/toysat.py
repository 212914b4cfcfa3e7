"""ToySAT, a drawn stand-in for EuroSAT: the same ten classes, told apart by form more than colour.

It needs no download, and trains in seconds. `draw_toysat` draws it.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from datasets.eurosat import CLASS_NAMES, IM_SIZE
from datasets.pictures import Images
from system.process import ReportedError

# Palettes, one colour per column. Classes share them, so that mean colour alone tells few of them
# apart. The rows are red, green, blue, near and short-wave infrared, in the manner of the spectra
# of soil, leaves and water: leaves are bright in the near infrared, and water is dark in both.
BANDS = ("B04", "B03", "B02", "B08", "B11")  # Sentinel-2's names of the rows
SOIL = np.array(
    [
        [0.46, 0.40, 0.38, 0.52, 0.66],
        [0.56, 0.46, 0.42, 0.60, 0.74],
        [0.66, 0.53, 0.45, 0.68, 0.82],
        [0.52, 0.47, 0.38, 0.56, 0.70],
    ],
    np.float32,
).T
GREEN = np.array(
    [
        [0.14, 0.24, 0.25, 0.62, 0.26],
        [0.18, 0.30, 0.28, 0.68, 0.30],
        [0.23, 0.38, 0.32, 0.75, 0.34],
        [0.28, 0.42, 0.33, 0.78, 0.38],
        [0.35, 0.41, 0.34, 0.66, 0.44],
    ],
    np.float32,
).T
WATER = np.array(
    [
        [0.11, 0.19, 0.30, 0.06, 0.03],
        [0.14, 0.25, 0.34, 0.07, 0.04],
        [0.18, 0.30, 0.37, 0.08, 0.04],
        [0.16, 0.27, 0.29, 0.07, 0.03],
    ],
    np.float32,
).T
GREY = np.array(
    [
        [0.38, 0.39, 0.43, 0.40, 0.42],
        [0.46, 0.46, 0.49, 0.47, 0.48],
        [0.54, 0.53, 0.53, 0.54, 0.54],
    ],
    np.float32,
).T
ROOF = np.array(
    [
        [0.72, 0.50, 0.43, 0.62, 0.58],
        [0.66, 0.58, 0.54, 0.60, 0.58],
        [0.62, 0.62, 0.66, 0.60, 0.56],
        [0.80, 0.79, 0.80, 0.76, 0.66],
    ],
    np.float32,
).T


def cover(scene, mask, colour, opacity=1.0):
    """Paint where the mask is 1; values between soften edges, as a sensor's 10 m footprint does."""
    return scene + np.clip(mask, 0, 1) * opacity * (colour - scene)


class LandPainter:
    """Paints n images of a class at once: scenes (C, n, 64, 64), masks, coordinates (n, 64, 64).

    C is the number of `BANDS` that are painted, from the first on.
    """

    def __init__(self, rng, n, bands):
        self.rng, self.n, self.bands = rng, n, bands

    def uniform(self, low, high):
        return self.rng.uniform(low, high, (self.n, 1, 1)).astype(np.float32)

    def tones(self, palette, *shape, spread=0.1):
        """Random colours of a palette, varied in brightness: one per image, or (C, n, *shape)."""
        shape = (self.n, *(shape or (1, 1)))
        brightness = np.exp(spread * self.rng.standard_normal(shape, np.float32))
        chosen = self.rng.integers(palette.shape[1], size=shape)
        return palette[: self.bands, chosen] * brightness

    def noise(self, wavelength):
        """Smooth random fields of unit variance: white noise, low-passed in Fourier space."""
        frequency = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64))
        lowpass = np.exp(-((wavelength * frequency) ** 2))
        lowpass[0, 0] = 0  # no DC: it would swamp long wavelengths
        spectrum = np.fft.rfft2(self.rng.standard_normal((self.n, 64, 64), np.float32))
        field = np.fft.irfft2(spectrum * lowpass.astype(np.float32))
        return field / field.std((1, 2), keepdims=True)

    def axes(self, bend):
        """Pixel coordinates (u, v) in random frames. `bend` makes straight lines wander."""
        y, x = np.mgrid[:64, :64].astype(np.float32)
        x, y, angle = x - self.uniform(16, 48), y - self.uniform(16, 48), self.uniform(0, 2 * np.pi)
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        return u + bend * self.noise(30), v + bend * self.noise(30)

    def parcels(self, u, v, width, length):
        """Land as brickwork: a look-up into tables (..., n, 64), and pixels to a border."""
        image = np.arange(self.n)[:, None, None]
        row, across = np.divmod(u / width, 1)
        row = row.astype(int) % 8
        column, along = np.divmod(
            v / length + self.rng.random((self.n, 8), np.float32)[image, row], 1
        )
        parcel = 64 * image + 8 * row + column.astype(int) % 8
        border = np.minimum(
            np.minimum(across, 1 - across) * width, np.minimum(along, 1 - along) * length
        )
        return lambda table: np.take(table.reshape(*table.shape[:-2], -1), parcel, axis=-1), border

    def annual_crop(self):
        u, v = self.axes(0.5)
        at, border = self.parcels(u, v, self.uniform(14, 28), self.uniform(24, 50))
        furrows = np.sin(2 * np.pi * u / self.uniform(3, 4.5)) * at(
            self.rng.random((self.n, 64), np.float32)
        )
        scene = at(self.tones(np.hstack([SOIL, SOIL, GREEN]), 64)) * (1 + 0.06 * furrows)
        return cover(scene, 1.3 - border, self.tones(SOIL), self.uniform(0, 0.5))

    def forest(self):
        return self.tones(GREEN[:, :2]) * np.exp(
            self.uniform(0.12, 0.2) * self.noise(2) + 0.06 * self.noise(16)
        )

    def herbaceous(self):
        palette = np.hstack([SOIL, GREEN[:, 2:]])
        scene = cover(self.tones(palette), 0.5 + 0.4 * self.noise(16), self.tones(palette))
        scene = scene * np.exp(0.12 * self.noise(6))
        gullies = 1 - 6 * np.abs(self.noise(20))
        return cover(scene, gullies, self.tones(SOIL), self.uniform(0, 0.8))

    def pasture(self):
        at, border = self.parcels(*self.axes(2), self.uniform(18, 32), self.uniform(25, 50))
        scene = at(self.tones(np.ones((1, 1), np.float32), 64, spread=0.05)) * self.tones(
            GREEN[:, 1:4]
        )
        hedges = self.tones(0.65 * GREEN[:, :2])
        return cover(
            scene * (1 + 0.03 * self.noise(12)), 1.8 - border, hedges, self.uniform(0.5, 0.9)
        )

    def permanent_crop(self):
        (u, v), spacing, rows = (
            self.axes(1),
            self.uniform(4, 6),
            self.rng.integers(4, 9, (2, self.n, 1, 1)),
        )
        at, border = self.parcels(u, v, spacing * rows[0], spacing * rows[1])
        # Vines are rows without gaps, whereas an orchard has single trees.
        vines = at(self.rng.random((self.n, 64)) < 0.4)
        along = np.where(vines, 0.5, np.cos(2 * np.pi * v / spacing))
        plants = np.cos(2 * np.pi * u / spacing) + along
        soil = at(self.tones(np.hstack([SOIL, SOIL, GREEN[:, 3:]]), 64))
        return cover(soil, 0.8 * plants * (border > 1), self.tones(GREEN[:, :3]))

    def built_up(self, ground, roofs, size, margins, block):
        """Roofs on plots, some of them empty (a margin of 99), in blocks between streets."""
        u, v = self.axes(1)
        at, border = self.parcels(
            u, v, self.uniform(*size), self.uniform(*size) * self.uniform(1, 1.6)
        )
        street = self.parcels(u, v, self.uniform(*block), self.uniform(*block))[1]
        scene = cover(self.tones(ground), self.noise(10), self.tones(GREEN)) * np.exp(
            0.1 * self.noise(2)
        )
        margin = at(self.rng.choice(np.float32(margins), (self.n, 64)))
        return cover(
            cover(scene, border - margin, at(self.tones(roofs, 64))), 1.5 - street, self.tones(GREY)
        )

    def industrial(self):
        return self.built_up(
            GREY, ROOF[:, 1:], size=(12, 20), margins=(0.5, 1, 2, 3, 99), block=(30, 50)
        )

    def residential(self):
        return self.built_up(
            GREEN, 0.85 * ROOF, size=(4.5, 7), margins=(0.5, 0.8, 1, 99), block=(14, 26)
        )

    def countryside(self):
        """Fields or pasture: what surrounds a road or a river should not give its class away."""
        return np.where(self.uniform(-1, 1) < 0, self.annual_crop(), self.pasture())

    def highway(self):
        scene, (u, v), curve = self.countryside(), self.axes(0), self.uniform(-0.008, 0.008)
        crossing = v + self.uniform(-70, 70)  # often outside of the image
        for line in (u + curve * v**2, crossing):
            scene = cover(scene, self.uniform(2.5, 4) - np.abs(line), self.tones(GREY))
            scene = cover(scene, 1 - np.abs(line), self.tones(GREEN), 0.5)  # central reservation
        return scene

    def river(self):
        (u, v), width, land = self.axes(2), self.uniform(7, 13), self.countryside()
        offset = np.abs(u + self.uniform(2, 10) * np.sin(v / self.uniform(9, 20)))
        return cover(
            cover(land, width + 2 - offset, self.tones(SOIL), 0.5),
            width - offset,
            self.tones(WATER),
        )

    def sea_lake(self):
        u, v = self.axes(3)
        waves = 0.03 * np.sin(u / self.uniform(0.6, 1.5)) + 0.04 * self.noise(40)
        water = self.tones(WATER) * (1 + waves)
        shore = v - self.uniform(15, 120)  # often outside of the image
        return cover(water, shore, self.tones(SOIL))

    def photograph(self, scene):
        """Light, haze and sensor noise, which differ between images of a class."""
        light = self.rng.normal(0, 0.12, (self.n, 1, 1))
        photographs = [self.expose(scene[:3], light, 0.2)]
        if self.bands > 3:  # drawn last, so that it changes nothing of the visible bands
            photographs.append(self.expose(scene[3:], light, 0.05))  # infrared passes through haze
        return np.ascontiguousarray(np.concatenate(photographs).swapaxes(0, 1))

    def expose(self, scene, light, haze):
        """Bands (C, n, 64, 64) of a scene as uint8, in this light and up to so much haze."""
        light = light + self.rng.normal(0, 0.03, (len(scene), self.n, 1, 1))
        scene = cover(
            scene * np.exp(light, dtype=np.float32), self.uniform(0, haze), np.float32(0.45)
        )
        scene += 0.008 * self.rng.standard_normal(scene.shape, np.float32)
        return (255 * scene.clip(0, 1)).astype(np.uint8)


PAINTERS = {
    "AnnualCrop": LandPainter.annual_crop,
    "Forest": LandPainter.forest,
    "HerbaceousVegetation": LandPainter.herbaceous,
    "Highway": LandPainter.highway,
    "Industrial": LandPainter.industrial,
    "Pasture": LandPainter.pasture,
    "PermanentCrop": LandPainter.permanent_crop,
    "Residential": LandPainter.residential,
    "River": LandPainter.river,
    "SeaLake": LandPainter.sea_lake,
}


def draw_toysat(per_class: int, seed: int = 0, bands: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (10 * per_class, C, 64, 64), sorted by class, and labels: a pure function.

    The first C of `BANDS`; the visible ones are the same in all of its images.
    """
    painters = [
        LandPainter(np.random.default_rng((seed, label)), per_class, bands)
        for label in range(len(PAINTERS))
    ]
    images = [
        painter.photograph(paint(painter)) for painter, paint in zip(painters, PAINTERS.values())
    ]
    return np.concatenate(images), np.repeat(np.arange(len(PAINTERS)), per_class)


def write_toysat(folder, per_class, seed=0):
    """Write ToySAT as JPEGs in class folders below `folder`, shaped like EuroSAT's."""
    images, labels = draw_toysat(per_class, seed)
    names = tuple(PAINTERS)
    for index, (image, label) in enumerate(zip(images, labels)):
        name = names[label]
        path = folder / name / f"{name}_{index % per_class + 1}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path, quality=90)


# --------------------------------------------------------------------------------------------------
# As a data set


def load_toysat(data_path, im_size=IM_SIZE, per_class=300):
    """`Images` of ToySAT, a drawn stand-in for EuroSAT; `data_path` is not read."""
    # A version instead of a digest, since the last bit of a sine differs between processors.
    # Increment it with every change to the drawing, so that older experts and caches no longer fit.
    return toysat_images(draw_toysat(per_class), f"toysat-1-{per_class}", im_size)


def load_toysat_bands(data_path, im_size=IM_SIZE, fill_nodata=None, per_class=300):
    """The same with all of ToySAT's bands. Raises ReportedError for --fill_nodata."""
    if fill_nodata is not None:
        raise ReportedError(
            f"--fill_nodata={fill_nodata:g}: every pixel of ToySAT has data: leave it out"
        )
    drawn = draw_toysat(per_class, bands=len(BANDS))
    return toysat_images(drawn, f"toysat-bands-1-{per_class}", im_size)


def band_names(data_path):
    """The names of ToySAT's bands; `data_path` is not read."""
    return BANDS


def toysat_images(drawn, version, im_size):
    """`Images` of drawn images and labels, scaled."""
    images, labels = map(torch.from_numpy, drawn)
    if im_size != IM_SIZE:
        images = F.interpolate(images.float(), size=im_size, mode="area").round().byte()
        version += f"-{im_size}"
    return Images(images, labels, version, CLASS_NAMES)
