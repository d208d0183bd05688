"""Rule `report`, see pipeline/jobs.py."""
# ruff: noqa: F821  (Snakemake puts the name `snakemake` here)

from pathlib import Path

from pipeline import jobs

jobs.report(
    snakemake.output[0],
    catalogue=snakemake.input.catalogue,
    parts=snakemake.input.parts,
    certificates=snakemake.input.certificates,
    reading=snakemake.params.reading,
    config=snakemake.params.config,
    detections=Path(snakemake.config["results"], "detections"),
    log=snakemake.log[0],
)
