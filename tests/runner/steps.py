"""Random legal steps, as the scheduler would make them."""

from collections.abc import Sequence

from hypothesis import strategies as st

from jaxinfer.core.step import PENDING_TOKEN, ScheduledSeq, ScheduledStep


def make_seq(
    slot: int,
    token_ids: Sequence[int],
    *,
    start: int = 0,
    samples: bool = True,
    output_index: int = 0,
    first_new_page: int = 0,
    new_pages: Sequence[int] = (),
) -> ScheduledSeq:
    return ScheduledSeq(
        request_id=f"r{slot}",
        slot=slot,
        start=start,
        token_ids=token_ids,
        samples=samples,
        output_index=output_index,
        first_new_page=first_new_page,
        new_pages=new_pages,
        admission=None,
    )


def make_step(seqs: Sequence[ScheduledSeq]) -> ScheduledStep:
    return ScheduledStep(step_id=0, seqs=seqs, num_tokens=sum(len(seq.token_ids) for seq in seqs))


@st.composite
def steps(draw: st.DrawFn, *, max_num_seqs: int, max_num_tokens: int) -> ScheduledStep:
    """Sequences with one token first; a pending token only alone; budget and slots respected."""
    slots = draw(
        st.lists(st.integers(0, max_num_seqs - 1), min_size=1, max_size=max_num_seqs, unique=True)
    )
    left = max_num_tokens - len(slots)
    lengths = []
    for _ in slots:
        extra = draw(st.integers(0, max(0, min(left, 9))))
        left -= extra
        lengths.append(1 + extra)
    lengths.sort(key=lambda length: length > 1)
    seqs = []
    for slot, length in zip(slots, lengths, strict=True):
        is_pending = length == 1 and draw(st.booleans())
        tokens = draw(st.lists(st.integers(0, 1000), min_size=length, max_size=length))
        seqs.append(
            make_seq(
                slot,
                [PENDING_TOKEN] if is_pending else tokens,
                start=draw(st.integers(0, 500)),
                samples=draw(st.booleans()),
                output_index=draw(st.integers(0, 500)),
                first_new_page=draw(st.integers(0, 30)),
                new_pages=draw(st.lists(st.integers(0, 99), max_size=1)),
            )
        )
    return make_step(seqs)
