"""Looks for settings that fit: the best layout of a sweep, or what would fit instead of a "no".

Knows what was asked and how an answer is told; alternatives.py names candidates, check.py judges
each. A compiler that is not there, or fails, leaves the arithmetic and a note.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jaxinfer.config.schema import EngineConfig
from jaxinfer.errors import UserError
from jaxinfer.logging import get_logger, log_phase
from jaxinfer.planner.alternatives import (
    Option,
    combined_options,
    options,
    sweep_options,
    with_utilization,
)
from jaxinfer.planner.check import Checked, Checker, NotCompiledError
from jaxinfer.planner.devices import MissingCompilerError
from jaxinfer.planner.messages import Alternative, PlanRequest
from jaxinfer.planner.roofline import output_tokens_per_s
from jaxinfer.planner.topologies import Target
from jaxinfer.planner.work import largest_batch, rates_of, work_of

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Search:
    """One question, and what is noted on the way to the answer."""

    request: PlanRequest
    target: Target
    checker: Checker
    notes: list[str] = field(default_factory=list)

    def check(self, config: EngineConfig) -> Checked:
        """By arithmetic, and by the compiler if that was asked for and there is one.

        Raises what a start on the machine would raise before it looks at the memory.
        """
        return self._compiled(self.checker.arithmetic(config, self.target))

    def sweep(self) -> tuple[Checked, list[Alternative]]:
        """The best way to share the machine, and all ways, the best first.

        The best is compiled; if that says that it does not fit, the next one is.
        """
        tried = self._all_layouts()
        for index, (option, checked) in enumerate(tried):
            if checked.engine is None:
                break
            tried[index] = (option, self._compiled(checked))
            if tried[index][1].engine is not None:
                break
        tried.sort(key=lambda pair: pair[1].engine is None)  # keeps the order of the rest
        rows = [_alternative(self.request, option.flags, checked) for option, checked in tried]
        return tried[0][1], rows

    def what_would_fit(self, checked: Checked) -> list[Alternative]:
        """Instead of `checked`: one of each kind of change, the first compiled; two changes at
        once only if no single one is enough."""
        config = self.request.engine
        found = list(self._first_of_each_kind(self._single(checked)))
        return found or list(self._first_of_each_kind(combined_options(config, self.target)))

    def _compiled(self, checked: Checked) -> Checked:
        """The check with the compiler's figures, or as it was where there are none."""
        if not self.request.compile or checked.engine is None:
            return checked
        try:
            with log_phase(logger, f"compile for {checked.target.name}"):
                return self.checker.compiled(checked)
        except (MissingCompilerError, NotCompiledError) as error:
            note = f"Not compiled: {error}"
            if note not in self.notes:
                self.notes.append(note)
            return checked

    def _all_layouts(self) -> list[tuple[Option, Checked]]:
        """By arithmetic; those that a start would refuse are left out, if any is not."""
        tried, refused = [], None
        for option in sweep_options(self.request.engine, self.target):
            try:
                tried.append((option, self.checker.arithmetic(option.config, self.target)))
            except UserError as error:
                refused = refused or error
        if not tried and refused is not None:
            raise refused
        return sorted(tried, key=lambda pair: self._rank(pair[1]), reverse=True)

    def _rank(self, checked: Checked) -> tuple[bool, float, int]:
        rate = _best_rate(self.request, checked) or 0.0
        return checked.engine is not None, rate, checked.memory.num_pages

    def _single(self, checked: Checked) -> Iterator[Option]:
        config = self.request.engine
        utilization = checked.utilization_that_fits if checked.programs else None
        if utilization is not None:
            yield with_utilization(config, self.target, utilization)
        yield from options(config, self.target)

    def _first_of_each_kind(self, candidates: Iterable[Option]) -> Iterator[Alternative]:
        kinds: set[str] = set()
        for option in candidates:
            if option.kind in kinds:
                continue
            checked = self.checker.arithmetic_or_none(option.config, option.target)
            if checked is not None and not kinds:
                checked = self._compiled(checked)
            if checked is not None and checked.engine is not None:
                kinds.add(option.kind)
                yield _alternative(self.request, option.flags, checked)


def _alternative(request: PlanRequest, flags: str, checked: Checked) -> Alternative:
    max_len = checked.layout.config.model.max_model_len
    assert max_len is not None
    fits = checked.engine is not None
    return Alternative(
        flags=flags,
        fits=fits,
        why_not=checked.why_not.partition("\n")[0].rstrip(":"),
        compiled=bool(checked.programs),
        num_pages=checked.memory.num_pages if fits else 0,
        concurrency=checked.cache_tokens / max_len if fits else 0.0,
        output_tokens_per_s=_best_rate(request, checked),
        replicas=_replicas(checked),
    )


def _replicas(checked: Checked) -> int:
    return checked.target.num_devices // checked.layout.config.parallel.tensor_parallel_size


def _best_rate(request: PlanRequest, checked: Checked) -> float | None:
    """Roofline of the whole machine, with as many requests as it holds."""
    config = checked.layout.config
    rates = rates_of(checked.target, tensor=config.parallel.tensor_parallel_size)
    max_seqs, step_tokens = config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens
    assert max_seqs is not None and step_tokens is not None
    if rates is None or checked.engine is None:
        return None
    length = request.input_len + request.output_len // 2
    batch = largest_batch(checked.cache_tokens, max_num_seqs=max_seqs, length=length)
    if batch == 0:
        return None
    return _replicas(checked) * output_tokens_per_s(
        work_of(checked.layout, checked.programs),
        rates,
        batch=batch,
        input_len=request.input_len,
        output_len=request.output_len,
        step_tokens=step_tokens,
    )
