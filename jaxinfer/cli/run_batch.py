"""`jaxinfer run-batch -i IN.jsonl -o OUT.jsonl`: an OpenAI batch file, with vLLM's flags.

Knows flags; the work is `batch_run`'s.
"""

from collections.abc import Sequence

from jaxinfer.cli.batch_run import run_job, shown_job
from jaxinfer.cli.parser import Parser
from jaxinfer.cli.run import add_job_flags
from jaxinfer.config.job import BatchConfig, InputsConfig, JobConfig, OutputsConfig, checked_job
from jaxinfer.config.load import add_flags, config_from_args
from jaxinfer.logging import configure_logging


def run(argv: Sequence[str]) -> int:
    """0 when every line has an answer or an error; 128 + the signal when one ended it."""
    parser = Parser(
        prog="jaxinfer run-batch",
        description="Answers the requests of an OpenAI batch file. Start it again to go on where "
        "it ended, however it ended.",
    )
    parser.add_argument(
        "-i", "--input-file", required=True, help="requests, JSON lines: file, glob or URL"
    )
    parser.add_argument(
        "-o", "--output-file", required=True, help="answers: JSON lines, or as the name says"
    )
    add_job_flags(parser)
    add_flags(parser, BatchConfig, model_argument=False)
    args = parser.parse(argv)
    job = checked_job(
        JobConfig(
            batch=config_from_args(args, BatchConfig),
            inputs=InputsConfig(path=[args.input_file], format="openai"),
            outputs=OutputsConfig(path=args.output_file),
            sampling={},
        )
    )
    if args.dry_run:
        print(shown_job(job), end="")
        return 0
    configure_logging(job.batch.run.log_level)
    return run_job(job, overwrite=args.overwrite)
