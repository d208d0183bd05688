rule catalogue:
    input:
        parts=shard_files(PART),
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
        shards=SHARDS,
        made_of=lambda wildcards: wanted_list(),
        config=config,
        reading=READING,
    message:
        "Merging the parts into {output}"
    script:
        "../scripts/catalogue.py"
