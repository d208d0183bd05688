rule certificate:
    input:
        parts=shard_files(PART),
        manifests=ancient(shard_files(MANIFEST)),
    output:
        CERTIFICATE,
    log:
        LOGS / "certificate.log",
    benchmark:
        BENCHMARKS / "certificate.tsv"
    conda:
        "../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=of_run(resources.certificate_mb),
        runtime=of_run(resources.certificate_minutes, config["certificate"]["sources"]),
    params:
        shards=SHARDS,
        made_of=lambda wildcards: wanted_list(),
        reading=READING,
        fit=config["fit"],
        sources=config["certificate"]["sources"],
        run=RUN,
    message:
        "Putting sources into the residuals to see how often the errors hold"
    script:
        "../scripts/certificate.py"
