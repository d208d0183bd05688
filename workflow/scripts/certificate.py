"""Rule `certificate`, see pipeline/jobs.py."""
# ruff: noqa: F821  (Snakemake puts the name `snakemake` here)

from pathlib import Path

from pipeline import jobs

jobs.certificate(
    snakemake.output[0],
    parts=snakemake.input.parts,
    manifests=snakemake.input.manifests,
    shards=snakemake.params.shards,
    made_of=snakemake.params.made_of,
    reading=snakemake.params.reading,
    fit=snakemake.params.fit,
    sources=snakemake.params.sources,
    detections=Path(snakemake.config["results"], "detections"),
    run=snakemake.params.run,
    log=snakemake.log[0],
    gpu=snakemake.resources.get("gpu", 0),
    cache=Path(snakemake.config["results"], "cache"),
)
