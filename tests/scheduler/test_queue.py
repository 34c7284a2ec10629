"""Order of the waiting queue, and removal from its middle."""

import hypothesis.strategies as st
from hypothesis import given

from jaxinfer.scheduler.queue import Rank, WaitingQueue, make_rank


def test_fcfs_ignores_priority():
    assert make_rank("fcfs", priority=5, arrival=1) < make_rank("fcfs", priority=0, arrival=2)


def test_priority_comes_before_arrival():
    ranks = [make_rank("priority", priority=p, arrival=a) for p, a in ((1, 0), (0, 2), (0, 1))]
    assert sorted(ranks) == [Rank(0, 1), Rank(0, 2), Rank(1, 0)]


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.integers(-3, 3))))
def test_behaves_like_a_sorted_list(operations):
    queue: WaitingQueue[str] = WaitingQueue()
    model: list[Rank] = []
    for arrival, (operation, number) in enumerate(operations):
        if operation == "push":
            rank = Rank(number, arrival)
            queue.push(rank, str(rank))
            model = sorted([*model, rank])
        elif model and operation == "pop":
            assert queue.peek() == str(model[0])
            assert queue.pop() == str(model.pop(0))
        elif model:
            queue.remove(model.pop(number % len(model)))
        assert len(queue) == len(model)


def test_removed_items_do_not_pile_up():
    queue: WaitingQueue[int] = WaitingQueue()
    queue.push(Rank(0, 0), 0)
    for arrival in range(1, 1000):
        queue.push(Rank(0, arrival), arrival)
        queue.remove(Rank(0, arrival))
    assert len(queue._heap) < 200
    assert queue.pop() == 0


def test_an_item_may_come_back_at_its_rank():
    queue: WaitingQueue[str] = WaitingQueue()
    queue.push(Rank(0, 1), "b")
    queue.push(Rank(0, 0), "a")
    queue.remove(Rank(0, 0))
    queue.push(Rank(0, 0), "a again")
    assert [queue.pop(), queue.pop()] == ["a again", "b"]
    assert not queue
