"""`jaxinfer run JOB.yaml`: a batch job from a file. Knows flags; the work is `batch_run`'s."""

from collections.abc import Sequence

from jaxinfer.cli.batch_run import run_job, shown_job
from jaxinfer.cli.parser import Parser
from jaxinfer.config.job import BatchConfig, job_config
from jaxinfer.config.load import add_flags
from jaxinfer.logging import configure_logging


def run(argv: Sequence[str]) -> int:
    """0 when every line has an answer or an error; 128 + the signal when one ended it."""
    parser = Parser(
        prog="jaxinfer run",
        description="Runs a batch job. Start it again to go on where it ended, however it ended.",
    )
    parser.add_argument("job", metavar="JOB.yaml", help="the job; flags win over it")
    add_job_flags(parser)
    add_flags(parser, BatchConfig, model_argument=False, config_file=False)
    args = parser.parse(argv)
    job = job_config(args)
    if args.dry_run:
        print(shown_job(job), end="")
        return 0
    configure_logging(job.batch.run.log_level)
    return run_job(job, overwrite=args.overwrite)


def add_job_flags(parser: Parser) -> None:
    """What `run` and `run-batch` share besides the settings."""
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew where the output exists already"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what the settings come to, and end"
    )
