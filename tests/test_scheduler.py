import sys
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxllm.config import EngineConfig
from jaxllm.scheduler import SampledRow, Scheduler
from jaxllm.scoring import SampledLogprob
from tests.fake import VOCAB_SIZE, FakeDevice, generate, make_sequence

PAGE_SIZE = 4


def make_scheduler(num_pages=100, **settings):
    defaults = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    return Scheduler(EngineConfig(page_size=PAGE_SIZE, **{**defaults, **settings}), num_pages)


def prompt(size, start=0):
    return [(start + i) % VOCAB_SIZE for i in range(size)]


def planned(plan):
    """What a plan computes: (name, tokens) for each row."""
    return [(row.seq.request_id, row.num_tokens) for row in plan.rows]


def step(scheduler, device):
    """One checked step; returns its plan."""
    plan = scheduler.schedule()
    scheduler.check_invariants()
    scheduler.update(plan, device.run(plan))
    scheduler.check_invariants()
    return plan


def run(scheduler, device=None):
    """Runs until all have finished; returns all plans."""
    device = device or FakeDevice(PAGE_SIZE)
    plans = []
    while scheduler.has_work:
        plans.append(step(scheduler, device))
        assert plans[-1].rows, "a step did nothing"
    return plans


# -------------------------------------------------------------------- planning


def test_a_scheduler_without_sequences_has_no_work():
    assert not make_scheduler().has_work


def test_waiting_and_running_sequences_are_work():
    scheduler = make_scheduler()
    scheduler.add(make_sequence())
    waiting = scheduler.has_work

    scheduler.schedule()

    assert waiting
    assert scheduler.has_work


def test_nothing_to_do_is_no_plan():
    assert make_scheduler().schedule() is None


def test_a_prompt_is_prefilled_once_and_then_decoded_a_token_a_step():
    scheduler = make_scheduler()
    scheduler.add(make_sequence(prompt=prompt(6), max_tokens=3))

    plans = run(scheduler)

    assert [planned(plan) for plan in plans] == [[("a", 6)], [("a", 1)], [("a", 1)]]


def test_decodes_come_first_then_unfinished_prefills_then_new_sequences():
    scheduler = make_scheduler()
    device = FakeDevice(PAGE_SIZE)
    scheduler.add(make_sequence("decoding", prompt(2, 5)))
    step(scheduler, device)
    scheduler.add(make_sequence("chunked", prompt(20), arrival=1))
    step(scheduler, device)
    scheduler.add(make_sequence("new", prompt(3, 7), arrival=2))

    plan = scheduler.schedule()

    assert planned(plan) == [("decoding", 1), ("chunked", 5), ("new", 3)]
    assert plan.num_decodes == 1
    assert [row.seq.request_id for row in plan.chunks] == ["chunked", "new"]


def test_decodes_are_in_order_of_length():
    scheduler = make_scheduler(max_num_seqs=3)
    device = FakeDevice(PAGE_SIZE)
    for i, length in enumerate((9, 2, 5)):
        scheduler.add(make_sequence(str(length), prompt(length, 10 * i), arrival=i))
    while any(seq.num_pending != 1 for seq in scheduler.running) or scheduler.waiting:
        step(scheduler, device)

    plan = scheduler.schedule()

    assert planned(plan) == [("2", 1), ("5", 1), ("9", 1)]


def test_a_step_has_at_most_max_num_batched_tokens():
    scheduler = make_scheduler(max_num_batched_tokens=16)
    scheduler.add(make_sequence("a", prompt(10)))
    scheduler.add(make_sequence("b", prompt(10, 5)))

    plan = step(scheduler, FakeDevice(PAGE_SIZE))

    assert planned(plan) == [("a", 10), ("b", 6)]


def test_a_step_has_at_most_max_num_seqs_rows():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_sequence(name, prompt(2, ord(name))))

    plan = scheduler.schedule()

    assert planned(plan) == [("a", 2), ("b", 2)]


def test_a_row_is_free_again_when_its_sequence_ends():
    scheduler = make_scheduler(max_num_seqs=1)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt(2, ord(name)), max_tokens=1))

    plans = run(scheduler)

    assert [planned(plan) for plan in plans] == [[("a", 2)], [("b", 2)]]


def test_decodes_go_on_while_they_leave_no_tokens_for_a_prefill():
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=2)
    device = FakeDevice(PAGE_SIZE)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt(1, ord(name)), max_tokens=3))
    step(scheduler, device)
    scheduler.add(make_sequence("c", prompt(4)))

    assert planned(scheduler.schedule()) == [("a", 1), ("b", 1)]


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_one_samples():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence(prompt=prompt(20), max_tokens=1))

    plans = run(scheduler)

    assert [planned(plan) for plan in plans] == [[("a", 8)], [("a", 8)], [("a", 4)]]
    assert [plan.rows[0].samples for plan in plans] == [False, False, True]


def test_a_chunk_of_one_token_counts_as_a_decode():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    device = FakeDevice(PAGE_SIZE)
    scheduler.add(make_sequence("long", prompt(9)))
    step(scheduler, device)
    scheduler.add(make_sequence("new", prompt(5, 5)))

    plan = scheduler.schedule()

    assert planned(plan) == [("long", 1), ("new", 5)]
    assert plan.num_decodes == 1


def test_a_chunk_cut_to_one_token_counts_as_a_decode_that_does_not_sample():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence("a", prompt(7)))
    scheduler.add(make_sequence("b", prompt(7, 5)))

    plan = scheduler.schedule()

    assert planned(plan) == [("b", 1), ("a", 7)]
    assert plan.num_decodes == 1
    assert not plan.rows[0].samples


def test_without_chunked_prefill_a_prompt_waits_until_all_of_it_fits():
    scheduler = make_scheduler(
        max_model_len=16, max_num_batched_tokens=16, enable_chunked_prefill=False
    )
    scheduler.add(make_sequence("a", prompt(10), max_tokens=1))
    scheduler.add(make_sequence("b", prompt(10, 5), max_tokens=1))

    plans = run(scheduler)

    assert [planned(plan) for plan in plans] == [[("a", 10)], [("b", 10)]]


def test_a_sequence_that_waits_is_not_overtaken_by_a_smaller_one():
    scheduler = make_scheduler(
        max_model_len=16, max_num_batched_tokens=16, enable_chunked_prefill=False
    )
    for name, size in (("a", 10), ("b", 10), ("c", 2)):
        scheduler.add(make_sequence(name, prompt(size, ord(name))))

    plan = scheduler.schedule()

    assert planned(plan) == [("a", 10)]


# -------------------------------------------------------------------- pages


def test_a_sequence_is_admitted_only_when_pages_for_its_whole_prompt_are_free():
    scheduler = make_scheduler(num_pages=1 + 6, max_num_batched_tokens=8)
    scheduler.add(make_sequence("a", prompt(8)))  # 2 pages
    scheduler.add(make_sequence("b", prompt(20, 5)))  # 5 pages, and its first chunk only 2
    device = FakeDevice(PAGE_SIZE)

    plans = [step(scheduler, device) for _ in range(2)]

    assert [planned(plan) for plan in plans] == [[("a", 8)], [("a", 1)]]


def test_an_admission_leaves_one_page_for_each_running_sequence():
    def second_is_admitted(num_pages):
        scheduler = make_scheduler(num_pages=1 + num_pages)
        scheduler.add(make_sequence("a", prompt(8)))  # 2 pages
        scheduler.add(make_sequence("b", prompt(8, 5)))  # 2 pages
        return len(scheduler.schedule().rows) == 2

    assert not second_is_admitted(num_pages=4)
    assert second_is_admitted(num_pages=5)


def test_a_decode_takes_a_page_only_when_its_token_needs_one():
    scheduler = make_scheduler()
    device = FakeDevice(PAGE_SIZE)
    seq = make_sequence(prompt=prompt(3))
    scheduler.add(seq)

    held = []
    for _ in range(6):
        step(scheduler, device)
        held.append(len(seq.pages))

    # A token's page is taken in the step that computes it: the fifth token's in the third.
    assert held == [1, 1, 2, 2, 2, 2]


def crowded(num_pages, count=2, size=8, **params):
    """Sequences that all run, over a pool that cannot hold them as they grow."""
    scheduler = make_scheduler(num_pages=1 + num_pages, max_num_batched_tokens=64)
    seqs = [
        make_sequence(f"{i}", prompt(size, 3 * i), arrival=i, **{"max_tokens": 12, **params})
        for i in range(count)
    ]
    for seq in seqs:
        scheduler.add(seq)
    return scheduler, seqs


def test_the_youngest_is_preempted_when_pages_run_out():
    scheduler, (old, young) = crowded(num_pages=5)
    device = FakeDevice(PAGE_SIZE)

    while not scheduler.num_preemptions:
        step(scheduler, device)

    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert scheduler.running == [old]
    assert list(scheduler.waiting) == [young]


def test_a_preempted_sequence_gives_back_all_it_holds_and_keeps_its_tokens():
    scheduler, (_, young) = crowded(num_pages=5)
    device = FakeDevice(PAGE_SIZE)

    while not scheduler.num_preemptions:
        step(scheduler, device)

    assert (young.pages, young.row, young.num_computed) == ([], -1, 0)
    assert young.output_token_ids == generate(young.prompt_token_ids, 1)


def test_nothing_is_lost_by_preemption():
    scheduler, seqs = crowded(num_pages=7, count=3)

    run(scheduler)

    assert scheduler.num_preemptions > 0
    assert [seq.output_token_ids for seq in seqs] == [
        generate(seq.prompt_token_ids, 12) for seq in seqs
    ]


def test_the_oldest_is_never_preempted():
    scheduler, seqs = crowded(num_pages=7, count=3)

    run(scheduler)

    assert seqs[0].num_preemptions == 0


def test_a_preempted_sequence_goes_before_all_that_wait():
    scheduler, (_, young) = crowded(num_pages=5)
    device = FakeDevice(PAGE_SIZE)
    step(scheduler, device)
    scheduler.add(make_sequence("new", prompt(2), arrival=2))

    while not scheduler.num_preemptions:
        step(scheduler, device)

    assert scheduler.waiting[0] is young


def test_a_step_that_preempts_admits_nobody():
    scheduler, (old, _) = crowded(num_pages=5)
    device = FakeDevice(PAGE_SIZE)
    step(scheduler, device)
    scheduler.add(make_sequence("new", [1], arrival=2))
    plan = None

    while not scheduler.num_preemptions:
        plan = step(scheduler, device)

    assert planned(plan) == [(old.request_id, 1)]


def test_a_prefill_in_parts_is_preempted_for_an_older_decode():
    scheduler = make_scheduler(num_pages=1 + 7, max_num_seqs=2, max_num_batched_tokens=2)
    old = make_sequence("old", prompt(2), max_tokens=14)
    long = make_sequence("long", prompt(20, 5), arrival=1)
    scheduler.add(old)
    scheduler.add(long)
    device = FakeDevice(PAGE_SIZE)

    while not scheduler.num_preemptions:
        step(scheduler, device)

    assert long.num_preemptions == 1
    assert long.output_token_ids == []


# -------------------------------------------------------------------- prefixes


def test_a_prompt_seen_before_is_computed_only_where_it_differs():
    scheduler = make_scheduler()
    device = FakeDevice(PAGE_SIZE)
    scheduler.add(make_sequence("a", prompt(10), max_tokens=1))
    run(scheduler, device)
    again = make_sequence("b", [*prompt(8), 9, 9, 9], max_tokens=1)
    scheduler.add(again)

    plan = step(scheduler, device)

    assert planned(plan) == [("b", 3)]
    assert again.num_cached == 8


def test_a_prompt_seen_in_full_computes_at_least_one_token():
    scheduler = make_scheduler()
    device = FakeDevice(PAGE_SIZE)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt(8), max_tokens=1))
        plan = run(scheduler, device)[0]

    assert planned(plan) == [("b", 4)]


def test_a_prefix_is_shared_with_a_sequence_that_still_runs():
    scheduler = make_scheduler()
    device = FakeDevice(PAGE_SIZE)
    first, second = (make_sequence(name, prompt(9)) for name in "ab")
    scheduler.add(first)
    step(scheduler, device)
    scheduler.add(second)

    step(scheduler, device)

    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]


def test_the_next_turn_of_a_chat_finds_what_the_last_one_generated():
    scheduler = make_scheduler()
    device = FakeDevice(PAGE_SIZE)
    turn = make_sequence("a", prompt(6), max_tokens=7)
    scheduler.add(turn)
    run(scheduler, device)
    # The last of the 13 tokens was never fed back, so 12 are in the cache.
    following = make_sequence("b", [*turn.tokens(0, 13), 1, 2])
    scheduler.add(following)

    step(scheduler, device)

    assert following.num_cached == 12


@pytest.mark.parametrize(("salts", "cached"), [(("x", "x"), 8), (("x", "y"), 0), (("x", None), 0)])
def test_a_salt_separates_prefixes(salts, cached):
    scheduler = make_scheduler()
    device = FakeDevice(PAGE_SIZE)
    seqs = [make_sequence("s", prompt(9), salt=salt, max_tokens=1) for salt in salts]

    for seq in seqs:
        scheduler.add(seq)
        run(scheduler, device)

    assert seqs[1].num_cached == cached


def test_prefix_caching_can_be_turned_off():
    scheduler = make_scheduler(enable_prefix_caching=False)
    device = FakeDevice(PAGE_SIZE)
    seqs = [make_sequence(name, prompt(9), max_tokens=1) for name in "ab"]

    for seq in seqs:
        scheduler.add(seq)
        run(scheduler, device)

    assert seqs[1].num_cached == 0


def test_hits_and_queries_are_counted_in_tokens():
    scheduler = make_scheduler()
    device = FakeDevice(PAGE_SIZE)
    for name in "ab":
        scheduler.add(make_sequence(name, prompt(9), max_tokens=1))
        run(scheduler, device)

    assert (scheduler.prefixes.num_queried, scheduler.prefixes.num_hit) == (18, 8)


@pytest.mark.parametrize(("old_pages", "num_left"), [(3, 1), (4, 5)])
def test_a_preempted_sequence_finds_those_of_its_pages_that_survived(old_pages, num_left):
    scheduler, (old, young) = crowded(num_pages=5)
    device = FakeDevice(PAGE_SIZE)
    while not young.num_preemptions or len(old.pages) < old_pages:
        step(scheduler, device)
    scheduler.abort([old.request_id])

    plan = step(scheduler, device)

    # It had 9 tokens, 8 of them in two full pages; the older one's fourth page is its second.
    assert planned(plan) == [(young.request_id, num_left)]


def test_a_preempted_sequence_does_not_count_as_a_prefix_hit():
    scheduler, (_, young) = crowded(num_pages=5)

    run(scheduler)

    assert young.num_preemptions == 1
    assert young.num_cached == 0
    assert scheduler.prefixes.num_hit == 0
    assert scheduler.prefixes.num_queried == 16


def test_a_cached_page_that_an_admission_reuses_is_not_also_promised_as_free():
    # Four pages: three kept from a past prompt, of which the newcomer shares two and needs two.
    scheduler = make_scheduler(num_pages=1 + 4)
    device = FakeDevice(PAGE_SIZE)
    scheduler.add(make_sequence("a", prompt(12), max_tokens=1))
    run(scheduler, device)
    scheduler.add(make_sequence("b", [*prompt(8), *prompt(8, 5)], max_tokens=1))

    plan = step(scheduler, device)

    assert planned(plan) == [("b", 8)]


# -------------------------------------------------------------------- abort and reset


def test_a_waiting_sequence_can_be_aborted():
    scheduler = make_scheduler()
    seq = make_sequence("a")
    scheduler.add(seq)

    scheduler.abort(["a"])

    assert not scheduler.has_work
    assert seq.finish_reason == "abort"


def test_a_running_sequence_can_be_aborted_and_frees_what_it_holds():
    scheduler = make_scheduler()
    seq = make_sequence("a", prompt(6))
    scheduler.add(seq)
    step(scheduler, FakeDevice(PAGE_SIZE))

    scheduler.abort(["a"])

    scheduler.check_invariants()
    assert not scheduler.has_work
    assert seq.finish_reason == "abort"
    assert scheduler.pool.num_held == 0
    assert len(seq.output_token_ids) == 1


def test_a_preempted_sequence_can_be_aborted():
    scheduler, (old, young) = crowded(num_pages=5)
    device = FakeDevice(PAGE_SIZE)
    while not scheduler.num_preemptions:
        step(scheduler, device)

    scheduler.abort(["1"])
    run(scheduler, device)

    assert young.finish_reason == "abort"
    assert old.finish_reason == "length"


def test_a_prefill_can_be_aborted_between_its_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_sequence("a", prompt(20)))
    step(scheduler, FakeDevice(PAGE_SIZE))

    scheduler.abort(["a"])

    scheduler.check_invariants()
    assert scheduler.pool.num_held == 0


def test_an_abort_ends_all_sequences_of_its_requests_and_no_other():
    scheduler = make_scheduler(max_num_seqs=2)
    seqs = [make_sequence(name, prompt(3), index=i) for i, name in enumerate("abab")]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.schedule()  # two run and two wait

    scheduler.abort(name for name in ["a"])

    scheduler.check_invariants()
    assert [seq.finish_reason for seq in seqs] == ["abort", None, "abort", None]
    assert (scheduler.running, list(scheduler.waiting)) == ([seqs[1]], [seqs[3]])


def test_aborting_an_unknown_request_changes_nothing():
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a"))

    scheduler.abort(["b"])

    assert scheduler.has_work


def test_a_reset_puts_all_back_to_wait_in_the_order_of_their_arrival():
    scheduler = make_scheduler(max_num_seqs=2)
    seqs = [make_sequence(f"{i}", prompt(3, i), arrival=i) for i in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    step(scheduler, FakeDevice(PAGE_SIZE))

    scheduler.reset()

    scheduler.check_invariants()
    assert list(scheduler.waiting) == seqs
    assert scheduler.running == []
    assert scheduler.pool.num_held == 0


def test_a_reset_keeps_the_tokens_that_were_generated():
    scheduler = make_scheduler()
    seq = make_sequence(prompt=prompt(5), max_tokens=8)
    scheduler.add(seq)
    device = FakeDevice(PAGE_SIZE)
    for _ in range(3):
        step(scheduler, device)

    scheduler.reset()
    run(scheduler, FakeDevice(PAGE_SIZE))  # the cache's content was lost too

    assert seq.output_token_ids == generate(seq.prompt_token_ids, 8)


def test_a_reset_between_planning_and_results_forgets_the_plan():
    scheduler = make_scheduler(max_num_batched_tokens=4)
    seqs = [make_sequence(name, prompt(6, i), arrival=i) for i, name in enumerate("abc")]
    for seq in seqs:
        scheduler.add(seq)
    step(scheduler, FakeDevice(PAGE_SIZE))
    scheduler.schedule()

    scheduler.reset()
    run(scheduler, FakeDevice(PAGE_SIZE))

    assert [s.output_token_ids for s in seqs] == [generate(s.prompt_token_ids, 16) for s in seqs]


def test_a_reset_forgets_every_cached_page():
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", prompt(9), max_tokens=1))
    run(scheduler)

    scheduler.reset()
    scheduler.add(make_sequence("b", prompt(9), max_tokens=1))

    assert planned(run(scheduler)[0]) == [("b", 9)]


class CutOff(BaseException):
    """As KeyboardInterrupt, which may be raised between any two lines."""


def cut_off(function, at):
    """Calls a function of the scheduler and raises before its `at`-th line; False: it ended."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if frame.f_globals["__name__"] != "jaxllm.scheduler":
            return None
        count += event == "line"
        if event == "line" and count == at:
            raise CutOff
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except CutOff:
        return True
    finally:
        sys.settrace(before)
    return False


def test_planning_can_be_cut_off_at_any_line_and_reset_loses_no_sequence():
    num_steps, at, ended = 0, 1, False
    while not ended:
        scheduler, seqs = crowded(num_pages=5, max_tokens=4)
        device = FakeDevice(PAGE_SIZE)
        for _ in range(num_steps):
            step(scheduler, device)
        ended = not scheduler.has_work

        was_cut = cut_off(scheduler.schedule, at)
        num_steps, at = (num_steps, at + 1) if was_cut else (num_steps + 1, 1)
        scheduler.reset()
        scheduler.check_invariants()
        run(scheduler)

        outputs = [seq.output_token_ids for seq in seqs]
        assert outputs == [generate(seq.prompt_token_ids, 4) for seq in seqs]


def test_a_step_can_be_cut_off_at_any_line_and_all_of_it_aborted():
    num_steps, at, ended = 0, 1, False
    while not ended:
        scheduler, seqs = crowded(num_pages=5, max_tokens=4)
        device = FakeDevice(PAGE_SIZE)
        for _ in range(num_steps):
            step(scheduler, device)
        ended = not scheduler.has_work

        def whole_step(scheduler=scheduler, device=device):
            plan = scheduler.schedule()
            scheduler.update(plan, device.run(plan))

        was_cut = cut_off(whole_step, at)
        num_steps, at = (num_steps, at + 1) if was_cut else (num_steps + 1, 1)
        scheduler.abort(seq.request_id for seq in seqs)
        scheduler.reset()

        scheduler.check_invariants()
        assert not scheduler.has_work


# -------------------------------------------------------------------- stopping


def first_tokens(count):
    return generate(prompt(3), count)


STOPS = {
    # settings of the sequence -> tokens it generates, finish_reason, stop_reason
    "max_tokens": ({"max_tokens": 3}, 3, "length", None),
    "max_model_len": ({"max_tokens": None}, 61, "length", None),
    "max_tokens beyond max_model_len": ({"max_tokens": 1000}, 61, "length", None),
    "eos": ({"eos": first_tokens(2)[1:]}, 2, "stop", None),
    "a second eos": ({"eos": (99, first_tokens(2)[1])}, 2, "stop", first_tokens(2)[1]),
    "eos is ignored": ({"eos": first_tokens(2), "ignore_eos": True}, 16, "length", None),
    "stop token": ({"stop_token_ids": first_tokens(3)[2:]}, 3, "stop", first_tokens(3)[2]),
    "stop token that is the ignored eos": (
        {
            "eos": first_tokens(2)[1:],
            "stop_token_ids": first_tokens(2)[1:],
            "ignore_eos": True,
        },
        2,
        "stop",
        first_tokens(2)[1],
    ),
    "stop token that is eos": (
        {"eos": first_tokens(2)[1:], "stop_token_ids": first_tokens(2)[1:]},
        2,
        "stop",
        None,
    ),
    "the stop token comes last of all allowed": (
        {"stop_token_ids": first_tokens(3)[2:], "max_tokens": 3},
        3,
        "stop",
        first_tokens(3)[2],
    ),
}


@pytest.mark.parametrize("case", STOPS)
def test_a_sequence_stops_for_the_right_reason(case):
    asked, count, finish_reason, stop_reason = STOPS[case]
    scheduler = make_scheduler()
    seq = make_sequence(prompt=prompt(3), **asked)
    scheduler.add(seq)

    run(scheduler)

    assert seq.output_token_ids == first_tokens(count)
    assert (seq.finish_reason, seq.stop_reason) == (finish_reason, stop_reason)


def test_a_prompt_one_short_of_max_model_len_gets_one_token():
    scheduler = make_scheduler(max_model_len=8)
    seq = make_sequence(prompt=prompt(7), max_tokens=None)
    scheduler.add(seq)

    run(scheduler)

    assert len(seq.output_token_ids) == 1


def test_finished_sequences_are_returned_once_and_free_what_they_held():
    scheduler = make_scheduler()
    seq = make_sequence(max_tokens=2)
    scheduler.add(seq)
    device = FakeDevice(PAGE_SIZE)

    finished = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        finished += scheduler.update(plan, device.run(plan))

    assert finished == [seq]
    assert scheduler.pool.num_held == 0
    scheduler.check_invariants()


# -------------------------------------------------------------------- results


def several_steps(**params):
    """A scheduler whose next plan may bring several tokens of its one sequence."""
    scheduler = make_scheduler(max_decode_steps=8)
    seq = make_sequence(prompt=[1, 2], **params)
    scheduler.add(seq)
    scheduler.update(scheduler.schedule(), [SampledRow([6], [])])
    return scheduler, seq


def test_a_step_may_bring_several_tokens_of_a_sequence():
    scheduler, seq = several_steps(max_tokens=5)
    plan = scheduler.schedule()
    # The next token is not known, and is counted on.
    assert (seq.num_computed, seq.num_expected, seq.num_pending) == (6, 4, 1)

    scheduler.update(plan, [SampledRow([7, 8, 9, 10], [])])

    assert seq.output_token_ids == [6, 7, 8, 9, 10]
    assert (seq.num_expected, seq.finish_reason) == (0, "length")


def test_tokens_after_the_one_that_stops_are_dropped():
    scheduler, seq = several_steps(stop_token_ids=[8])

    finished = scheduler.update(scheduler.schedule(), [SampledRow([7, 8, 9], [])])

    assert finished == [seq]
    assert seq.output_token_ids == [6, 7, 8]


def test_each_token_keeps_its_logprobs():
    scheduler, seq = several_steps(stop_token_ids=[8], logprobs=1)
    found = [SampledLogprob(-0.1 * i, i, [i], [-0.1 * i], [1]) for i in range(3)]

    scheduler.update(scheduler.schedule(), [SampledRow([7, 8, 9], found)])

    assert seq.logprobs == found[:2]


@pytest.mark.parametrize(("max_tokens", "limit"), [(2, 1), (4, 3), (100, 8)])
def test_a_row_may_generate_what_remains_of_the_lookahead(max_tokens, limit):
    scheduler, _ = several_steps(max_tokens=max_tokens)

    plan = scheduler.schedule()

    assert (plan.lookahead, plan.rows[0].limit) == (1 if limit == 1 else 8, limit)


def test_the_length_of_the_model_limits_what_a_row_may_generate():
    scheduler = make_scheduler(max_decode_steps=8, max_model_len=6)
    scheduler.add(make_sequence(prompt=[1, 2], max_tokens=None))
    scheduler.update(scheduler.schedule(), [SampledRow([6], [])])

    assert scheduler.schedule().rows[0].limit == 3


def test_results_that_do_not_match_the_plan_are_refused():
    scheduler = make_scheduler()
    scheduler.add(make_sequence())
    plan = scheduler.schedule()

    with pytest.raises(ValueError, match="shorter"):
        scheduler.update(plan, [])


# -------------------------------------------------------------------- one step ahead


def ahead(scheduler, device):
    """Plans and launches a step; returns (plan, launch)."""
    plan = scheduler.schedule()
    scheduler.check_invariants()
    return plan, device.launch(plan)


def test_a_step_is_planned_on_top_of_one_in_flight():
    scheduler, device = make_scheduler(), FakeDevice(PAGE_SIZE)
    seq = make_sequence(prompt=prompt(6), max_tokens=3)
    scheduler.add(seq)

    launches = [ahead(scheduler, device) for _ in range(3)]

    assert [(p.rows[0].start, p.rows[0].num_tokens) for p, _ in launches] == [
        (0, 6),
        (6, 1),
        (7, 1),
    ]
    assert scheduler.schedule() is None  # its last token is expected
    for plan, launch in launches:
        scheduler.update(plan, device.fetch(launch))
        scheduler.check_invariants()
    assert seq.output_token_ids == generate(prompt(6), 3)
    assert not scheduler.has_work


def test_a_sequence_that_ends_in_a_step_keeps_its_pages_until_the_next_one_is_done():
    scheduler, device = make_scheduler(), FakeDevice(PAGE_SIZE)
    first = generate(prompt(6), 1)[0]
    seq = make_sequence(prompt=prompt(6), stop_token_ids=[first])
    scheduler.add(seq)
    one, two = ahead(scheduler, device), ahead(scheduler, device)

    finished = scheduler.update(one[0], device.fetch(one[1]))
    scheduler.check_invariants()

    assert finished == [seq]
    assert not scheduler.has_work
    assert (scheduler.num_pages_held, scheduler.pool.num_held) == (0, 2)
    assert scheduler.update(two[0], device.fetch(two[1])) == []
    assert scheduler.pool.num_held == 0
    assert seq.output_token_ids == [first]
    scheduler.check_invariants()


def test_an_aborted_sequence_keeps_its_pages_until_its_step_is_done():
    scheduler, device = make_scheduler(), FakeDevice(PAGE_SIZE)
    seq = make_sequence("a", prompt(6))
    scheduler.add(seq)
    plan, launch = ahead(scheduler, device)

    scheduler.abort({"a"})
    scheduler.check_invariants()

    assert scheduler.pool.num_held == 2
    assert scheduler.update(plan, device.fetch(launch)) == []
    assert (scheduler.pool.num_held, seq.output_token_ids) == (0, [])
    scheduler.check_invariants()


def test_nothing_is_preempted_before_the_step_in_flight_is_done():
    scheduler, _ = crowded(num_pages=5, size=8)
    device = FakeDevice(PAGE_SIZE)
    one = ahead(scheduler, device)

    assert scheduler.schedule() is None  # each needs a third page, and none is free

    scheduler.update(one[0], device.fetch(one[1]))
    assert planned(scheduler.schedule()) == [("0", 1)]
    assert scheduler.num_preemptions == 1


@pytest.mark.parametrize(
    ("params", "settings", "waits"),
    [
        ({}, {}, False),
        ({"stop_token_ids": [99]}, {}, False),  # costs one step for nothing at the most
        ({"stop_token_ids": [99]}, {"max_decode_steps": 8}, True),  # would cost eight
        ({"eos": (99,), "ignore_eos": True}, {"max_decode_steps": 8}, False),
        ({"stop_token_ids": list(range(20, 30))}, {}, True),
    ],
)
def test_a_plan_waits_for_results_where_they_matter(params, settings, waits):
    scheduler, device = make_scheduler(**settings), FakeDevice(PAGE_SIZE)
    scheduler.add(make_sequence(prompt=prompt(6), max_tokens=40, **params))
    step(scheduler, device)

    plan, _ = ahead(scheduler, device)

    assert plan.needs_sync == waits
    assert (scheduler.schedule() is None) == waits


# -------------------------------------------------------------------- the checks themselves


def lose_page(scheduler):
    scheduler.running[0].pages.pop()


def hold_twice(scheduler):
    scheduler.running[1].pages[0] = scheduler.running[0].pages[0]


def free_held_page(scheduler):
    scheduler.pool._free.append(scheduler.running[0].pages[0])


def free_twice(scheduler):
    scheduler.pool._free.append(scheduler.pool._free[0])


def hand_out_trash(scheduler):
    scheduler.running[0].pages[0] = 0


def share_row(scheduler):
    scheduler.running[0].row = scheduler.running[1].row


def compute_without_pages(scheduler):
    scheduler.running[0].num_computed = 100


def wait_with_pages(scheduler):
    scheduler.waiting.append(scheduler.running.pop())


def free_in_flight(scheduler):
    scheduler.schedule()
    seq = scheduler.running.pop()
    scheduler.pool.free(seq.pages)
    scheduler._free_rows.append(seq.row)


@pytest.mark.parametrize(
    "harm",
    [
        lose_page,
        hold_twice,
        free_held_page,
        free_twice,
        hand_out_trash,
        share_row,
        compute_without_pages,
        wait_with_pages,
        free_in_flight,
    ],
)
def test_check_invariants_finds(harm):
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(make_sequence(name, prompt(6, ord(name))))
    step(scheduler, FakeDevice(PAGE_SIZE))

    harm(scheduler)

    with pytest.raises(AssertionError):
        scheduler.check_invariants()


# -------------------------------------------------------------------- under random load

EOS = 0


@dataclass(frozen=True)
class Arrival:
    """One sequence of a load."""

    at: int
    topic: int
    """Prompts of one topic begin alike."""

    size: int
    max_tokens: int | None
    salt: str | None
    ends: bool
    """Whether it stops at EOS."""

    abort_at: int | None

    def prompt(self):
        return [(7 * self.topic + i * i) % VOCAB_SIZE for i in range(self.size)]

    def expected(self, max_model_len):
        room = max_model_len - self.size
        count = room if self.max_tokens is None else min(room, self.max_tokens)
        return generate(self.prompt(), count, stop_ids=(EOS,) if self.ends else ())


@dataclass(frozen=True)
class Load:
    """An engine's settings and what it is asked."""

    config: EngineConfig
    num_pages: int
    arrivals: list[Arrival]
    resets: set[int] = field(default_factory=set)
    """Steps that are cut off after planning, with the cache's content lost."""

    overlap: bool = False
    """Whether each step is launched before the one before it is fetched."""


@st.composite
def loads(draw):
    max_model_len = draw(st.integers(2, 30))
    max_num_seqs = draw(st.integers(1, 5))
    chunked = draw(st.booleans())
    least = max_num_seqs if chunked else max(max_num_seqs, max_model_len)
    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(least, least + 20)),
        page_size=draw(st.sampled_from([1, 2, 4])),
        enable_prefix_caching=draw(st.booleans()),
        enable_chunked_prefill=chunked,
        max_decode_steps=draw(st.sampled_from([1, 8, 32])),
    )
    # The least that `plan_memory` lets pass is one full sequence and the trash page.
    num_pages = config.pages_per_seq + 1 + draw(st.integers(0, 12))
    arrival = st.builds(
        Arrival,
        at=st.integers(0, 20),
        topic=st.integers(0, 2),
        size=st.integers(1, max_model_len - 1),
        max_tokens=st.none() | st.integers(1, 12),
        salt=st.sampled_from([None, None, "salt"]),
        ends=st.booleans(),
        abort_at=st.none() | st.none() | st.integers(0, 30),
    )
    arrivals = draw(st.lists(arrival, min_size=1, max_size=12))
    resets = draw(st.sets(st.integers(0, 30), max_size=2))
    return Load(config, num_pages, arrivals, resets, draw(st.booleans()))


def check_plan(plan, scheduler):
    config = scheduler.config
    assert plan.rows, "a step did nothing"
    assert plan.num_tokens <= config.max_num_batched_tokens
    assert len(plan.rows) <= config.max_num_seqs
    assert len({id(row.seq) for row in plan.rows}) == len(plan.rows)
    sizes = [row.num_tokens for row in plan.rows]
    assert min(sizes) > 0
    assert max(sizes[: plan.num_decodes], default=1) == 1
    assert min(sizes[plan.num_decodes :], default=2) > 1
    for row in plan.rows:
        assert row.seq.row >= 0
        assert row.samples == (row.seq.num_pending == 1 and row.seq.num_expected > 0)
        assert row.samples or config.enable_chunked_prefill
        assert row.limit <= plan.lookahead
        written = row.stop + max(0, row.limit - 1)
        assert len(row.seq.pages) * config.page_size >= written
        assert row.seq.num_computed == written
    arrivals = [seq.arrival for seq in (*scheduler.running, *scheduler.waiting)]
    assert arrivals == sorted(arrivals), "a younger one goes before an older one"


def check_owners(scheduler):
    """No page that a step in flight writes to is another's, or free to be taken."""
    size = scheduler.config.page_size
    owners = {}
    for plan in scheduler.in_flight:
        for row in plan.rows:
            stop = row.stop + max(0, row.limit - 1)
            for page in row.seq.pages[row.start // size : -(-stop // size)]:
                assert owners.setdefault(page, row.seq) is row.seq
    assert not set(owners) & set(scheduler.pool.unowned())


def serve(load):
    """Runs a load to its end, checking every step; returns its sequences by arrival."""
    config = load.config
    scheduler, device = Scheduler(config, load.num_pages), FakeDevice(config.page_size)
    todo = sorted(enumerate(load.arrivals), key=lambda pair: pair[1].at)
    seqs, launches, now = {}, deque(), 0
    while todo or scheduler.has_work or launches:
        while todo and todo[0][1].at <= now:
            i, new = todo.pop(0)
            seqs[i] = make_sequence(
                str(i),
                new.prompt(),
                arrival=len(seqs),
                salt=new.salt,
                eos=(EOS,),
                ignore_eos=not new.ends,
                max_tokens=new.max_tokens,
            )
            scheduler.add(seqs[i])
        scheduler.abort(str(i) for i, new in enumerate(load.arrivals) if new.abort_at == now)
        scheduler.check_invariants()
        plan = scheduler.schedule() if scheduler.has_work else None
        scheduler.check_invariants()
        if plan is not None:
            check_plan(plan, scheduler)
            check_owners(scheduler)
            launches.append((plan, device.launch(plan)))
        assert launches or not scheduler.has_work, "a step did nothing"
        if now in load.resets:
            scheduler.reset()
            device, launches = FakeDevice(config.page_size), deque()
        waits = plan is None or plan.needs_sync or not load.overlap
        while len(launches) > (not waits):
            done, launch = launches.popleft()
            finished = scheduler.update(done, device.fetch(launch))
            assert all(seq.is_finished for seq in finished)
            scheduler.check_invariants()
            check_owners(scheduler)
        now += 1
        assert now < 2000, "it does not come to an end"
    assert scheduler.pool.num_held == 0
    return seqs


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(loads())
@example(
    # Many that grow together over the smallest pool: all that can be preempted is.
    Load(
        EngineConfig(max_model_len=16, max_num_seqs=4, max_num_batched_tokens=4, page_size=1),
        num_pages=17,
        arrivals=[Arrival(i, i % 3, 3, None, None, False, None) for i in range(8)],
    )
)
def test_under_random_load_all_finish_with_their_tokens_and_the_books_balance(load):
    seqs = serve(load)

    for i, arrival in enumerate(load.arrivals):
        expected, got = arrival.expected(load.config.max_model_len), seqs[i].output_token_ids
        if seqs[i].finish_reason == "abort":
            assert arrival.abort_at is not None
            assert got == expected[: len(got)]
        else:
            assert got == expected


def test_the_random_load_preempts_and_finds_prefixes():
    load = Load(
        EngineConfig(max_model_len=16, max_num_seqs=4, max_num_batched_tokens=8, page_size=2),
        num_pages=14,
        arrivals=[Arrival(i, i % 2, 6, None, None, False, None) for i in range(8)],
    )

    seqs = serve(load).values()

    assert sum(seq.num_preemptions for seq in seqs) > 0
    assert sum(seq.num_cached for seq in seqs) > 0
