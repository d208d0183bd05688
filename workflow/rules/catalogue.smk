rule catalogue:
    input:
        parts=shard_files(PART),
        manifests=shard_files(MANIFEST),
        stacks=STACKS,
        truths=TRUTHS,
        certificates=CERTIFICATES,
    output:
        CATALOGUE,
    log:
        LOGS / "catalogue.log",
    benchmark:
        BENCHMARKS / "catalogue.tsv"
    conda:
        "../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=growing(4000),
        runtime=of_run(resources.catalogue_minutes),
    params:
        config=config,
        reading=READING,
        pipeline_version=__version__,
    message:
        "Merging the parts into {output}"
    script:
        "../scripts/catalogue.py"
