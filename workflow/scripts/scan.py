"""Rule `scan`, see pipeline/jobs.py."""
# ruff: noqa: F821  (Snakemake puts the name `snakemake` here)

from pathlib import Path

from pipeline import jobs

jobs.scan(
    snakemake.output[0],
    Path(snakemake.config["results"], "shards"),
    files=snakemake.params.files,
    reading=snakemake.params.reading,
    shard_size=snakemake.params.shard_size,
    simulated=snakemake.params.simulated,
    own=snakemake.params.own,
    run=snakemake.params.run,
    detections=Path(snakemake.config["results"], "detections"),
    log=snakemake.log[0],
)
