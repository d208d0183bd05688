"""Rule `catalogue`, see pipeline/jobs.py."""
# ruff: noqa: F821  (Snakemake puts the name `snakemake` here)

from pipeline import jobs

jobs.catalogue(
    snakemake.output[0],
    parts=snakemake.input.parts,
    shards=snakemake.params.shards,
    made_of=snakemake.params.made_of,
    reading=snakemake.params.reading,
    stacks=snakemake.input.stacks,
    truths=snakemake.input.truths,
    certificates=snakemake.input.certificates,
    config=snakemake.params.config,
    log=snakemake.log[0],
)
