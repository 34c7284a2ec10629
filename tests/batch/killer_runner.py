"""A device on which some prompts end the whole process, as the kernel does for memory."""

import os
import signal

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.step import ScheduledStep
from tests.engine.fake_runner import FakePendingStep, FakeRunner, Progress, build_slow

KILLING_BYTE = ord("!")


class KillerRunner(FakeRunner):
    """Is killed in the step after the one in which a prompt that begins so came in."""

    _is_doomed = False

    def dispatch(self, step: ScheduledStep) -> FakePendingStep:
        if self._is_doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        for seq in step.seqs:
            if seq.admission and seq.admission.prompt_token_ids[0] == KILLING_BYTE:
                self._is_doomed = True
        return super().dispatch(step)


def build_killer(config: EngineConfig, progress: Progress) -> KillerRunner:
    slow = build_slow(config, progress)
    return KillerRunner(slow.limits, step_s=0.005)
