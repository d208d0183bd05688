rule fit:
    input:
        # What a part was made of decides, not when: the manifest of one that is up to date may be newer.
        manifest=ancient(MANIFEST),
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
        kept=KEPT,
        run=RUN,
    message:
        "Fitting the images of shard {wildcards.shard}"
    script:
        "../scripts/fit.py"
