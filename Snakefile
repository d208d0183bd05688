"""From FITS images to one catalogue: simulate or list images, fit each, certify, merge, report. Top to bottom as the data flow."""

import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.19")
sys.path.insert(0, workflow.basedir)


configfile: "config.yaml" if Path("config.yaml").exists() else Path(workflow.basedir, "config.yaml")


include: "workflow/rules/common.smk"


wildcard_constraints:
    index=r"\d+",
    shard=r"[bf]-[0-9a-f-]+",


rule all:
    input:
        CATALOGUE,
        REPORT,


include: "workflow/rules/simulate.smk"
include: "workflow/rules/scan.smk"
include: "workflow/rules/fit.smk"
include: "workflow/rules/certificate.smk"
include: "workflow/rules/catalogue.smk"
include: "workflow/rules/report.smk"
