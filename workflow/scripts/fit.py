"""Rule `fit`, see pipeline/jobs.py."""
# ruff: noqa: F821  (Snakemake puts the name `snakemake` here)

from pathlib import Path

from pipeline import jobs

jobs.fit(
    snakemake.output[0],
    kept=snakemake.params.kept,
    manifest=snakemake.input.manifest,
    reading=snakemake.params.reading,
    fit=snakemake.params.fit,
    detections=Path(snakemake.config["results"], "detections"),
    run=snakemake.params.run,
    log=snakemake.log[0],
    gpu=snakemake.resources.get("gpu", 0),
    cache=Path(snakemake.config["results"], "cache"),
)
