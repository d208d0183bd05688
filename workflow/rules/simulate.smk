rule simulate:
    output:
        stack=STACK,
        truth=TRUTH,
    log:
        LOGS / "simulate" / "{index}.log",
    benchmark:
        BENCHMARKS / "simulate" / "{index}.tsv"
    conda:
        "../envs/pipeline.yaml"
    threads: 1
    resources:
        mem_mb=simulate_mb,
        runtime=growing(30),
    params:
        start=first_image,
        stop=stop_image,
        shape=config["simulated"]["shape"],
        seed=config["simulated"]["seed"],
        noise=config["simulated"]["noise"],
        parameters=config["simulated"]["parameters"],
        run=RUN,
    message:
        "Simulating images {params.start} to {params.stop}"
    script:
        "../scripts/simulate.py"
