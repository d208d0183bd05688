"""Rule `simulate`, see pipeline/jobs.py."""
# ruff: noqa: F821  (Snakemake puts the name `snakemake` here)

from pathlib import Path

from pipeline import jobs

jobs.simulate(
    snakemake.output.stack,
    snakemake.output.truth,
    start=snakemake.params.start,
    stop=snakemake.params.stop,
    shape=snakemake.params.shape,
    seed=snakemake.params.seed,
    noise=snakemake.params.noise,
    parameters=snakemake.params.parameters,
    run=snakemake.params.run,
    log=snakemake.log[0],
    threads=snakemake.threads,
    cache=Path(snakemake.config["results"], "cache"),
)
