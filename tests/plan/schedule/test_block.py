"""Tasks of a block: which exchanges overlap in which order, and what waits for copies."""

from moetrain.plan.schedule.block import BesideTimes, ChunkTimes, block_tasks
from moetrain.plan.schedule.simulate import BETWEEN, COMPUTE, INSIDE, simulate


def test_two_links_carry_different_chunks_at_once_only_where_it_is_planned():
    chunk = ChunkTimes(1.0, 1.0, 0.1, 1.0, 1.0)
    planned, streamed = (simulate(block_tasks([chunk] * 4, order=order)) for order in ("planned", "streamed"))
    assert links_together(streamed) == 0 < links_together(planned)
    assert streamed.makespan_s == 16 and planned.makespan_s < 11


def links_together(line):
    """Pairs of exchanges on different links that overlap in time."""
    spans = list(zip(line.tasks, line.begin_s, line.end_s))
    return sum(min(end, other_end) > max(begin, other_begin)
               for task, begin, end in spans if task.resource == BETWEEN
               for other, other_begin, other_end in spans if other.resource == INSIDE)


def test_experts_wait_for_their_copies_and_gradients_of_copies_leave_last():
    beside = BesideTimes(dense_s=1.0, copies_between_s=3.0, copies_inside_s=0.5, weights_s=1.0,
                         copy_grads_between_s=2.0, copy_grads_inside_s=0.25)
    line = simulate(block_tasks([ChunkTimes(0.1, 0, 1.0, 0, 0.1)], beside))
    at = {task.name: begin for task, begin in zip(line.tasks, line.begin_s)}
    assert at["experts 0"] == 3.5 and line.makespan_s == 3.5 + 1.0 + 1.0 + 0.25 + 2.0
    assert line.busy_s(COMPUTE) == 3.0
