"""Run the target once over the data of a training, and store its hidden states on disk for backend=features.

python recipes/capture_features.py model=… draft=eagle3 data.path=FILE output=DIR     the data of that training
python recipes/train_eagle3.py     model=… draft=eagle3 data.path=FILE backend=features backend.directory=DIR
python recipes/capture_features.py … output=DIR plan=true         bytes per token, total, free space
python recipes/capture_features.py draft=eagle1 model=… eagle=CKPTS output=DIR     EAGLE's .ckpt files, converted
python recipes/capture_features.py merge=[DIR1,DIR2] output=DIR   parts captured on several machines
python recipes/capture_features.py verify=true output=DIR         every checksum

The same command resumes an interrupted run; torchrun distributes the work over ranks.
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import CaptureJob


@recipe("capture_features")
def main(job: CaptureJob) -> None:
    from nemo_speculative.targets.cached.store import merge, verify
    from nemo_speculative.training.capture_features import capture

    if job.merge:
        print(merge(job.merge, job.output))
    elif job.verify:
        print(verify(job.output))
    else:
        capture(job)


if __name__ == "__main__":
    main()
