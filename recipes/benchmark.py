"""Measure a checkpoint on a real SGLang server: acceptance, speed and accuracy, beside the target without a draft.

python recipes/benchmark.py checkpoint=RUN suite=mt_bench                              the settings it remembers
python recipes/benchmark.py checkpoint=RUN suite=gsm8k "sweep=[[3,1],[5,1],[5,4,16]]"  several, compared
python recipes/benchmark.py url=http://HOST:PORT suite=jsonl suite.path=FILE           a server that runs already

What was measured is not measured again: the same command goes on where it was interrupted.
"""

from pathlib import Path

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import BenchmarkJob


@recipe("benchmark")
def main(job: BenchmarkJob) -> None:
    from nemo_speculative.evaluation.server_benchmark.heatmap import heat_map
    from nemo_speculative.evaluation.server_benchmark.run import Benchmark, require_success, write_back
    from nemo_speculative.evaluation.server_benchmark.table import best, table

    benchmark, results = Benchmark.of(job), Path(job.results)
    try:
        benchmark.run()
    finally:  # Ctrl-C included
        measured = benchmark.comparable
        (results / "table.md").write_text(table(measured) + "\n")
        (results / "heatmap.svg").write_text(heat_map(measured))
        print(table(measured))
    require_success(benchmark)
    if job.write_back:
        write_back(benchmark, best(measured, job.write_back, job.temperature[0]))


if __name__ == "__main__":
    main()
