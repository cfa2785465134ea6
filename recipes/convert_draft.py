"""Convert a draft of another project into one that is served and trained here, or into a form that others read.

python recipes/convert_draft.py checkpoint=DIR target=DIR                to a servable directory, DIR-servable
python recipes/convert_draft.py checkpoint=RUN form=speculators          for vLLM
python recipes/convert_draft.py checkpoint=RUN form=transformers         for AutoModel.from_pretrained

The original draft is not changed.  Properties that its files do not state are printed, with the assumed values.
"""

from nemo_speculative.config.app import recipe
from nemo_speculative.config.schema import ConvertJob


@recipe("convert_draft")
def main(job: ConvertJob) -> None:
    from nemo_speculative.checkpoint.convert import convert_draft

    done = convert_draft(job)
    for note in done.notes:
        print(f"note: {note}")
    print(f"{done.directory}: written, from the format of {done.format}")


if __name__ == "__main__":
    main()
