"""Images that a classifier of digits has not seen: letters and patches of photos.

Both sets are made from files that ship inside installed packages (matplotlib's DejaVu fonts,
scikit-learn's two sample photographs), are the same on every run, and imitate the size, the
intensity range and the antialiasing of the training images, so that they cannot be told apart
by brightness or resolution alone.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from examples._shared.reporting import COLORS

SET_COLORS = "#666666", COLORS["unfamiliar"], "#AA66CC"  # of familiar images, and of two other sets
# Letters that no one takes for a digit. Left out are those that resemble one, in either case:
# A (4), B (8), C and G (6), D O Q U (0), I J L (1), P (9), S (5), T Y (7), Z (2), E (3).
LETTERS = "FHKMNRVWX"
FONTS = (
    *("Sans", "Sans-Oblique", "Sans-Bold", "Sans-BoldOblique"),
    *("SansMono", "SansMono-Oblique", "SansMono-Bold", "SansMono-BoldOblique"),
    *("Serif", "Serif-Italic", "Serif-Bold", "Serif-BoldItalic"),
)
ANGLES = (-15, -10, -5, 0, 5, 10, 15)  # degrees
OVERSAMPLING = 4
GLYPH_BOX = {8: (8.0, 6.0), 28: (20.0, 20.0)}  # height, width the symbols fill
EXTRA_STROKE = {8: 2, 28: 0}  # of 128: print is thinner than the pen strokes of the digits
MIN_CONTRAST = 0.1  # patches of clear sky, stretched to full contrast, would be compression noise


def letters(shape: tuple[int, ...]) -> np.ndarray:
    """Renders `LETTERS` in 12 fonts and 7 slants as bright strokes on black, shape (n, *shape).

    Each is drawn in black and white at four times the resolution and averaged over 4x4 cells,
    which is how the 8x8 digits were made from scans (and what their 17 grey levels are).
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"DejaVu{name}.ttf"), size=128) for name in FONTS]
    drawn = [_letter(*each, shape[0]) for each in itertools.product(LETTERS, fonts, ANGLES)]
    return np.stack(drawn)[..., None]


def _letter(letter: str, font: ImageFont.FreeTypeFont, angle: float, size: int) -> np.ndarray:
    canvas = Image.new("L", (256, 256))
    ImageDraw.Draw(canvas).text(
        (128, 128), letter, fill=255, font=font, anchor="mm", stroke_width=EXTRA_STROKE[size]
    )
    canvas = canvas.rotate(angle, resample=Image.Resampling.BICUBIC)
    glyph = canvas.crop(canvas.getbbox())
    box_height, box_width = (round(OVERSAMPLING * side) for side in GLYPH_BOX[size])
    width = min(round(glyph.width * box_height / glyph.height), box_width)
    glyph = glyph.resize((width, box_height), Image.Resampling.LANCZOS)
    fine = OVERSAMPLING * size
    page = Image.new("L", (fine, fine))
    page.paste(glyph, ((fine - width) // 2, (fine - box_height) // 2))
    return _average_cells(np.asarray(page) > 127, OVERSAMPLING)


def photo_patches(shape: tuple[int, ...], count: int = 756, seed: int = 0) -> np.ndarray:
    """Cuts random squares from two photographs, shape (count, *shape).

    Patches are grey and stretched to the full range, as the digits reach it too.
    """
    size = shape[0]
    cell = max(1, 32 // size)  # squares of at least 32 pixels, averaged down where images are small
    sample_images: Any = load_sample_images()
    photos = [photo / 255.0 for photo in sample_images.images]
    rng = np.random.default_rng(seed)
    patches = []
    while len(patches) < count:
        photo = photos[len(patches) % len(photos)]
        top, left = (rng.integers(0, side - cell * size + 1) for side in photo.shape[:2])
        square = photo[top : top + cell * size, left : left + cell * size]
        patch = _average_cells(square.mean(axis=-1, keepdims=True), cell)
        if np.ptp(patch) >= MIN_CONTRAST:
            patches.append((patch - patch.min()) / np.ptp(patch))
    return np.stack(patches).astype(np.float32)


def _average_cells(image: np.ndarray, cell: int) -> np.ndarray:
    """Averages over cell x cell squares of pixels."""
    height, width, *rest = image.shape
    cells = image.reshape(height // cell, cell, width // cell, cell, *rest)
    return cells.mean(axis=(1, 3)).astype(np.float32)


def draw_entropies(ax: Axes, title: str, entropies: Mapping[str, Any]) -> None:
    """Histograms of predictive entropies by set of images; the first is that of familiar ones."""
    bins = np.linspace(0.0, np.log(10), 31)
    familiar = next(iter(entropies))
    for (name, values), color in zip(entropies.items(), SET_COLORS, strict=False):
        share = np.histogram(np.maximum(values, 0.0), bins)[0] / values.size  # 0: rounding
        style: Any = {"fill": True, "alpha": 0.35} if name == familiar else {"linewidth": 1.6}
        ax.stairs(share, bins, color=color, label=name, **style)
    ax.set(xlabel="predictive entropy, nats", ylabel="share of images", ylim=(0, 1), title=title)
    ax.legend(frameon=False)
