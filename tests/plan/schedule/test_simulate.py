"""The event simulator: legal schedules, no idle resource with work that could run, and its bounds."""

from hypothesis import given, settings, strategies as st

from moetrain.plan.schedule.simulate import Task, critical_path_s, simulate

RESOURCES = ("a", "b", "c")


@st.composite
def schedules(draw):
    number, tasks = draw(st.integers(0, 14)), []
    for index in range(number):
        after = draw(st.sets(st.integers(0, index - 1), max_size=3)) if index else set()
        seconds = draw(st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0]))
        tasks.append(Task(str(index), draw(st.sampled_from(RESOURCES)), seconds, tuple(sorted(after)),
                          draw(st.integers(0, 3))))
    return tasks


@settings(max_examples=300, deadline=None, derandomize=True)
@given(schedules())
def test_schedules_are_legal_and_greedy(tasks):
    line = simulate(tasks)
    ready_s = [max((line.end_s[before] for before in task.after), default=0.0) for task in tasks]
    for task, begin, end, ready in zip(tasks, line.begin_s, line.end_s, ready_s):
        assert begin >= ready and end == begin + task.seconds
    for resource in RESOURCES:
        own = sorted((line.begin_s[i], line.end_s[i], task.rank, i) for i, task in enumerate(tasks)
                     if task.resource == resource and task.seconds)
        assert all(end <= begin for (_, end, *_), (begin, *_) in zip(own, own[1:])), "used twice at once"
        for begin, _, rank, index in own:                    # what began before it was ready, ranks before it
            for other_begin, other_end, other_rank, other in own:
                if ready_s[index] <= other_begin < begin:
                    assert (other_rank, other) < (rank, index)
            busy = sum(min(end, begin) - max(start, ready_s[index]) for start, end, *_ in own
                       if start < begin and end > ready_s[index])
            assert busy == begin - ready_s[index], "a task waits while its resource is free"
    assert line.makespan_s >= critical_path_s(tasks)
    assert all(line.makespan_s >= line.busy_s(resource) for resource in RESOURCES)


def test_a_stage_that_takes_no_time_waits_for_nobody():
    line = simulate([Task("long", "a", 5.0), Task("none", "a", 0.0, rank=1), Task("next", "b", 1.0, (1,))])
    assert line.begin_s == (0.0, 0.0, 0.0) and line.exposed_s("b") == 4.0


def test_nothing_takes_no_time():
    assert simulate([]).makespan_s == 0.0
