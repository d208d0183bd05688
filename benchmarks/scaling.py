"""How the cost of a fit grows with the side of the image and with the number of images."""

import numpy as np

from benchmarks import engines, workers
from benchmarks.peers import OURS, PEERS, SCIPY
from tests import stamps

SIDES = (8, 16, 32, 64, 128, 256, 512)
#: Images at a time, as many as a job of the workflow reads.
CHUNK = 8192
#: Most pixels in the images of one side, for each worker.
PIXELS = 1 << 22
DOUBLE = next(iter(OURS))


def sizes(arguments) -> dict:
    """Rates [1/s] of every repeat at each side, eight parameters, for this package and scipy."""
    rows: dict = {name: {str(side): [] for side in SIDES if side <= arguments.largest} for name in (*OURS, SCIPY)}
    with workers.one_a_core() as processes:
        counts = {}
        for name, row in rows.items():
            for side in map(int, row):
                drawn = min(CHUNK, PIXELS // side**2)
                few = 2 if name == SCIPY else min(64, drawn)
                workers.race(processes, engines.run, name, 8, few, 0, drawn, side)
                seconds, _ = workers.race(processes, engines.run, name, 8, few, 0, drawn, side)
                count = int(np.clip(few * arguments.seconds / seconds, 2, drawn))
                counts[name, side] = count, drawn
                workers.race(processes, engines.run, name, 8, count, 0, drawn, side)
        for _ in range(arguments.repeats):
            for name, row in rows.items():
                for side, rates in row.items():
                    count, drawn = counts[name, int(side)]
                    seconds, _ = workers.race(processes, engines.run, name, 8, count, 0, drawn, int(side))
                    rates.append(len(processes) * count / seconds)
                    print(f"{side} x {side}, {name}: {rates[-1]:.3g}/s", flush=True)
    return rows


def many(count):
    """Seconds to fit ``count`` stamps, drawn and forgotten chunk by chunk, and peak memory since compiling [MB]."""
    fit = PEERS[DOUBLE].fit
    starts = np.zeros((CHUNK, 8))
    for length in {min(count, CHUNK), count % CHUNK} - {0}:  # compiles
        images, _ = stamps.draw(length, engines.AMP, seed=5000)
        fit(images, starts[:length], 8)
    workers.forget_peak()
    seconds = 0.0
    for number, low in enumerate(range(0, count, CHUNK)):
        images, _ = stamps.draw(min(CHUNK, count - low), engines.AMP, seed=5000 + number)
        began = workers.clock()
        fit(images, starts[: len(images)], 8)
        seconds += workers.clock() - began
    return seconds, workers.peak_memory()


def counts(arguments) -> dict:
    """Seconds and peak memory [MB] of every repeat for each count, and the slope of log time on log count from 10^3."""
    numbers = [10**power for power in range(2, 10) if 10**power <= arguments.most]
    rows: dict = {str(count): {"seconds": [], "memory": []} for count in numbers}
    for repeat in range(arguments.repeats):
        for count in numbers:
            if repeat and count > 100_000:
                continue  # once: it is the sum of many chunks
            seconds, memory = workers.alone(workers.cores()[:1], many, count)
            rows[str(count)]["seconds"].append(seconds)
            rows[str(count)]["memory"].append(memory)
            print(f"{count} images: {seconds:.3g} s, {memory:.0f} MB", flush=True)
    fitted = [count for count in numbers if count >= 1000]
    times = [np.median(rows[str(count)]["seconds"]) for count in fitted]
    slope = float(np.polyfit(np.log(fitted), np.log(times), 1)[0]) if len(fitted) > 1 else None
    return {"counts": rows, "slope": slope}
