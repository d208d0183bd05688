"""This package against its peers: runs the studies named, all by default, and writes docs/benchmarks.md from them.

    make bench
    make bench ARGS="engines --repeats 7"
    make bench ARGS="--quick --folder /tmp/bench"

Each study leaves its numbers in FOLDER/benchmarks/<study>.json, so that one can be run again without the others; `page`
only writes the page and its picture from what is there.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

# Before numpy is imported, here and in the processes that are started: one thread each for linear algebra too.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ["MPLBACKEND"] = "agg"

from benchmarks import engines, hessian, page, scaling, stores, workers, workflow

STUDIES = {
    "engines": engines.study,
    "hessian": hessian.study,
    "sizes": scaling.sizes,
    "counts": scaling.counts,
    "pipeline": workflow.study,
    "stores": stores.stores,
    "scale": stores.scale,
    "changes": stores.changes,
}
#: To see that all works, in a few minutes; the numbers mean little.
QUICK = {
    "repeats": 2,
    "seconds": 0.5,
    "count": 20,
    "side": 200,
    "largest": 64,
    "most": 20_000,
    "stamps": 2000,
    "stored": 2000,
}


def settings() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)}, page")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "docs")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each measurement")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long a turn of a fast fit takes")
    parser.add_argument("--count", type=int, default=1000, help="images that every peer fits")
    parser.add_argument("--side", type=int, default=3000, help="hessian: side of the image")
    parser.add_argument("--largest", type=int, default=512, help="sizes: largest side")
    parser.add_argument(
        "--most", type=int, default=1_000_000, help="counts, scale: largest count; single files: a tenth"
    )
    parser.add_argument("--stamps", type=int, default=40_000, help="pipeline: larger of the two counts")
    parser.add_argument("--stored", type=int, default=100_000, help="stores: images in each")
    parser.add_argument("--quick", action="store_true", help="small numbers for all of these")
    given = parser.parse_args()
    unknown = set(given.studies) - {*STUDIES, "page"}
    if unknown:
        parser.error(f"got {', '.join(sorted(unknown))}, wanted {', '.join(STUDIES)} or page")
    if given.quick:
        vars(given).update(QUICK)
    for name, unit in (("stored", stores.CHUNK), ("most", 10 * stores.CHUNK)):
        if getattr(given, name) % unit:
            parser.error(f"--{name}: got {getattr(given, name)}, wanted a multiple of {unit}")
    given.studies = given.studies or list(STUDIES)
    return given


def main() -> None:
    """Run the studies, store their numbers, write the page."""
    given = settings()
    store = given.folder / "benchmarks"
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        for name in STUDIES:
            if name not in given.studies:
                continue
            machine, began = workers.machine(), time.monotonic()
            results = STUDIES[name](given)
            numbers = {key: value for key, value in vars(given).items() if key in QUICK}
            facts = {"machine": machine, "settings": numbers, "cores": len(workers.cores())}
            facts |= {"seconds": time.monotonic() - began, "results": results}
            (store / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    stored = {
        name: json.loads((store / f"{name}.json").read_text()) for name in STUDIES if (store / f"{name}.json").exists()
    }
    page.write(stored, given.folder)
    print(f"wrote {given.folder / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
