"""What the host remembers of a slot ends with the sequence that held it."""

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import Admission, ScheduledSeq, SeqOutput
from jaxinfer.runner.runner import Runner
from tests.runner.steps import make_step

PLAIN = SamplingParams(temperature=0)
CURIOUS = SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1)


def run_in_slot_0(runner: Runner, sampling: SamplingParams) -> SeqOutput:
    """One step: a prompt of three tokens."""
    prompt = [30, 40, 50]
    seq = ScheduledSeq(
        request_id="r",
        slot=0,
        start=0,
        token_ids=prompt,
        samples=True,
        output_index=0,
        first_new_page=0,
        new_pages=[0],
        admission=Admission(sampling=sampling, prompt_token_ids=prompt, output_token_ids=()),
    )
    (output,) = runner.dispatch(make_step([seq])).result().seqs
    return output


def test_logprobs_are_for_those_who_asked(runner: Runner) -> None:
    before = run_in_slot_0(runner, PLAIN)
    curious = run_in_slot_0(runner, CURIOUS)
    after = run_in_slot_0(runner, PLAIN)
    assert [len(entry.token_ids) for entry in curious.logprobs] == [3]
    assert [len(entry.token_ids) for entry in curious.prompt_logprobs] == [2, 2]
    assert before.token_ids == curious.token_ids == after.token_ids
    assert not (before.logprobs or before.prompt_logprobs)
    assert not (after.logprobs or after.prompt_logprobs)
