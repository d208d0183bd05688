"""Draw docs/pictures/example.png: stamps with spoilt pixels, their fits, and what least squares makes of them."""

import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Ellipse

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
jax.config.update("jax_enable_x64", True)

from pipeline import fit, model, simulate  # noqa: E402  (the package is used in place, and in double precision)

PICTURE = ROOT / "docs" / "pictures" / "example.png"

SHAPE = (32, 32)
NOISE = {"kind": "contaminated", "scale": 1.0, "fraction": 0.05, "factor": 10.0}
SOURCES = {
    "x0": None,
    "y0": None,
    "amp": [12.0, 16.0],
    "sigma": [2.2, 3.0],
    "rho": [-0.6, 0.6],
    "diff": [-0.3, 0.3],
    "background": [0.0, 0.0],
}
#: A half-width so far beyond all residuals that the Cauchy likelihood is their sum of squares.
WIDE = 1.0e4
FITS = (("Cauchy", "fit", "#1668b0"), ("least squares", WIDE, "#d1560b"))
TRUTH = "#111111"
#: Ends of the colours of residuals, in rms of the unspoilt pixels, and of the last column, in pixels.
SIGMAS = 8.0
REACH = 1.0


def stamps() -> tuple[np.ndarray, np.ndarray]:
    """Three images (3, ny, nx): spoilt pixels alone, with a cosmic ray, with a neighbour; true parameters (3, 7)."""
    images, truth = simulate.draw(0, 3, shape=SHAPE, seed=7, noise=NOISE, parameters=SOURCES)
    y, x = np.indices(SHAPE, dtype=float)
    along = np.arange(12)
    images[1][12 + along, 12 + (0.6 * along).astype(int)] += 18.0
    images[2] += model.gaussian(np.array([21.7, 21.3, 9.5, 1.8, 0.2, 0.1]), x, y)
    return images, truth


def outline(axes, row, colour, **style) -> None:
    """Draw the ellipse of full width at half maximum; ``row``: x0, y0, fwhm_major, fwhm_minor, theta."""
    x0, y0, major, minor, theta = row
    axes.add_patch(Ellipse((x0, y0), major, minor, angle=np.degrees(theta), fill=False, color=colour, **style))


def draw() -> plt.Figure:
    """The picture: a row an image; data, model, the residuals of both fits, and their centres against the truth."""
    images, truth = stamps()
    y, x = np.indices(SHAPE, dtype=float)
    fits = [(name, colour, *fit.fit_rows(images, scale=scale)) for name, scale, colour in FITS]
    titles = (
        "image, widths\n(dashed: truth)",
        "Cauchy fit:\nmodel",
        "Cauchy fit:\nresidual",
        "least squares:\nresidual",
        "centre, 1 and 2 σ\n(+ truth) [pix]",
    )
    figure, grid = plt.subplots(3, 5, figsize=(9.0, 5.65))
    for axes, title, colour in zip(grid[0], titles, ("k", FITS[0][2], FITS[0][2], FITS[1][2], "k"), strict=True):
        axes.set_title(title, color=colour, fontsize=10.5)
    causes = ("5 % spoilt pixels", "… and a cosmic ray", "… and a neighbour")
    for i, (image, true, cause, panels) in enumerate(zip(images, truth, causes, grid, strict=True)):
        pictures = [image, None, None, None]
        for name, colour, rows, covariance in fits:
            ellipse = [rows[key][i] for key in ("x0", "y0", "fwhm_major", "fwhm_minor", "theta")]
            outline(panels[0], ellipse, colour, lw=1.6)
            parameters = np.array([rows[key][i] for key in ("x0", "y0", "amp", "sigma", "rho", "diff")])
            fitted = model.gaussian(parameters, x, y) + rows["background"][i]
            if name == "Cauchy":
                pictures[1:3] = fitted, image - fitted
            else:
                pictures[3] = image - fitted
            centre, cov = ellipse[:2] - true[:2], covariance["pooled"][i][:2, :2]
            lengths, axis = np.linalg.eigh(cov)
            angle = np.degrees(np.arctan2(axis[1, 1], axis[0, 1]))
            for sigmas in (1, 2):
                size = 2 * sigmas * np.sqrt(lengths[::-1])
                panels[4].add_patch(Ellipse(centre, *size, angle=angle, color=colour, alpha=0.30, lw=0))
            panels[4].plot(*centre, ".", color=colour, ms=5)
        outline(panels[0], [*true[:2], *model.derived(true[:6])[3:6]], TRUTH, lw=1.2, ls=(0, (3, 2)))
        for axes, picture, residual in zip(panels, pictures, (False, False, True, True), strict=False):
            limits = (-SIGMAS, SIGMAS) if residual else (-4.0, 20.0)
            axes.imshow(
                picture, origin="lower", cmap="RdBu_r" if residual else "gray_r", vmin=limits[0], vmax=limits[1]
            )
            axes.set(xticks=[], yticks=[])
        panels[0].set_ylabel(cause, fontsize=10.5)
        panels[4].plot(0, 0, "+", color=TRUTH, ms=11, mew=1.4)
        ticks = (-0.5, 0, 0.5)
        panels[4].set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=ticks, yticks=ticks)
        panels[4].set(xticklabels=map("{:g}".format, ticks), yticklabels=map("{:g}".format, ticks))
        panels[4].tick_params(labelsize=9, length=3, labelbottom=i == 2)
        panels[4].yaxis.tick_right()
    figure.subplots_adjust(left=0.028, right=0.955, bottom=0.045, top=0.915, wspace=0.06, hspace=0.06)
    return figure


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of matplotlib in it, the file depends on the picture alone.
    draw().savefig(PICTURE, dpi=200, metadata={"Software": None})
