"""Measure a checkpoint on a real SGLang server: acceptance, speed and accuracy, compared with the target alone.

python recipes/benchmark.py checkpoint=RUN suite=mt_bench                              with its own settings
python recipes/benchmark.py checkpoint=RUN suite=gsm8k "sweep=[[3,1],[5,1],[5,4,16]]"  several, compared
python recipes/benchmark.py url=http://HOST:PORT suite=jsonl suite.path=FILE           a running server

The same command resumes where it was interrupted: nothing is measured twice.
"""

from pathlib import Path

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import BenchmarkJob


@recipe("benchmark")
def main(job: BenchmarkJob) -> None:
    from nemo_speculative.evaluation.server_benchmark.results import best, heat_map, table
    from nemo_speculative.evaluation.server_benchmark.run import Benchmark

    benchmark, results = Benchmark(job), Path(job.results)
    try:
        benchmark.run()
    finally:  # Ctrl-C included
        comparable = benchmark.comparable
        (results / "table.md").write_text(table(comparable) + "\n")
        (results / "heatmap.svg").write_text(heat_map(comparable))
        print(table(comparable))
    benchmark.require_success()
    if job.write_back:
        benchmark.write_back(best(comparable, job.write_back, job.temperature[0]))


if __name__ == "__main__":
    main()
