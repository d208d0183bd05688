rule fit:
    input:
        manifest=MANIFEST,
    output:
        PART,
    log:
        LOGS / "fit" / "{shard}.log",
    benchmark:
        BENCHMARKS / "fit" / "{shard}.tsv"
    conda:
        "../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=of_shard(resources.fit_mb),
        runtime=of_shard(resources.fit_minutes),
    params:
        reading=READING,
        fit=config["fit"],
        pipeline_version=__version__,
    message:
        "Fitting the images of shard {wildcards.shard}"
    script:
        "../scripts/fit.py"
