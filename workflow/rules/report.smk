rule report:
    input:
        catalogue=CATALOGUE,
        parts=shard_files(PART),
        certificates=CERTIFICATES,
    output:
        report(REPORT, caption="../report/report.rst", category="Catalogue"),
    log:
        LOGS / "report.log",
    benchmark:
        BENCHMARKS / "report.tsv"
    conda:
        "../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=of_run(resources.report_mb),
        runtime=growing(30),
    params:
        reading=READING,
        config=config,
    message:
        "Writing {output}"
    script:
        "../scripts/report.py"
