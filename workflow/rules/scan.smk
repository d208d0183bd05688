# The manifests are not declared as outputs: the scan rewrites only those whose bytes change, and only their shards are refitted.
checkpoint scan:
    input:
        scanned_stacks,
    output:
        SHARDS,
    log:
        LOGS / "scan.log",
    benchmark:
        BENCHMARKS / "scan.tsv"
    conda:
        "../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=scan_mb,
        runtime=growing(240),
    params:
        files=FILES,
        reading=READING,
        shard_size=config["shard_size"],
        simulated=SIMULATED,
        own=OWN,
        run=RUN,
    message:
        "Listing the images and dividing them into shards"
    script:
        "../scripts/scan.py"
