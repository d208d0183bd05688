"""Fits a second against the peers: the same images on the same cores, a process a core, in turns."""

import functools

import numpy as np

from benchmarks import workers
from benchmarks.peers import PARAMETERS, PEERS, in_batches, newton, numpy_nll
from tests import stamps

BACKGROUND, SCALE = 3.0, 1.0
AMP = (5, 50)
SEED = 3000
#: Spread of the peers' starts about the truth; of amp, sigma and scale that of their logarithm.
SPREAD = {"x0": 0.3, "y0": 0.3, "amp": 0.2, "sigma": 0.15, "rho": 0.05, "diff": 0.05, "background": 0.3, "scale": 0.2}
#: A fit is right if its nll is no more than this above the minimum that is reached from the truth.
EXCESS = 0.05
#: Free parameters: background and scale held at the truth, or both free.
CASES = (6, 8)
#: The fastest fit at most this many times the images of the slowest.
MOST_TIMES = 32


@functools.cache
def draw(part, count, side):
    """Images of one worker, their truth and the starts near it, (count, 8)."""
    images, source = stamps.draw(count, AMP, seed=SEED + part, shape=(side, side), background=BACKGROUND)
    truth = np.hstack([source, np.full((count, 1), BACKGROUND), np.full((count, 1), SCALE)])
    shift = np.random.default_rng(SEED + part).normal(size=truth.shape) * list(SPREAD.values())
    relative = np.array([name in ("amp", "sigma", "scale") for name in PARAMETERS])
    return images, truth, np.where(relative, truth * np.exp(shift), truth + shift)


@functools.cache
def lowest(part, tested, drawn, side, p):
    """nll (tested,) of the minima reached from the truth by Newton's method."""
    images, truth, _ = draw(part, drawn, side)
    found = in_batches(images[:tested], truth[:tested], p, newton, "float64")
    return np.array([numpy_nll(*pair) for pair in zip(found, images, strict=False)])


def run(part, name, p, count, tested, drawn, side=32):
    """Fit the first ``count`` of ``drawn`` images; for `workers.race`. The result: how many of ``tested`` are right."""
    peer = PEERS[name]
    p = min(p, peer.most)
    images, truth, near = (array[:count] for array in draw(part, drawn, side))
    starts = np.hstack([near[:, :p], truth[:, p:]])
    pixels = images.astype(peer.pixels, copy=False)
    began = workers.clock()
    found = peer.fit(pixels, starts, p)
    ended = workers.clock()
    nll = np.array([numpy_nll(*pair) for pair in zip(found[:tested], images, strict=False)])
    right = nll <= lowest(part, tested, drawn, side, p) + EXCESS if tested else np.zeros(0, bool)
    return began, ended, int(np.sum(right))


def study(arguments) -> dict:
    """Rates [1/s] of every repeat and the share that is right, for each case and peer."""
    results = {}
    with workers.one_a_core() as processes:
        each = -(-arguments.count // len(processes))
        drawn = MOST_TIMES * each
        for p in CASES:
            rows, counts = {}, {}
            for name, peer in PEERS.items():
                # First to compile, then to see how many images fill the time of a turn, then to compile for these.
                first, _ = workers.race(processes, run, name, p, each, 0, drawn)
                seconds, _ = workers.race(processes, run, name, p, each, 0, drawn)
                times = int(np.clip(arguments.seconds / seconds, 1, MOST_TIMES))
                counts[name] = times * each
                workers.race(processes, run, name, p, counts[name], 0, drawn)
                rows[name] = {"parameters": min(p, peer.most), "errors": peer.errors, "first": first, "rates": []}
            for repeat in range(arguments.repeats):
                for name, row in rows.items():
                    seconds, right = workers.race(processes, run, name, p, counts[name], each, drawn)
                    row["rates"].append(len(processes) * counts[name] / seconds)
                    row["right"], row["tested"] = sum(right), len(processes) * each
                    row["images"] = len(processes) * counts[name]
                    print(f"{p} parameters, turn {repeat + 1}, {name}: {row['rates'][-1]:.0f}/s", flush=True)
            results[str(p)] = rows
    return results
