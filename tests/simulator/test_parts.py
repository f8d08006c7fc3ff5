"""The simulator's parts: the order of events, shared bandwidth, shelves, accelerators, workloads."""

import gzip
import itertools
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from darkroom.policy.eviction import least_recent
from darkroom.policy.popularity import gini
from simulator.clock import Clock
from simulator.costs import Sizes, Work
from simulator.device import InRounds, OneByOne, Process, Together
from simulator.generator import generate
from simulator.links import Link, Transfer
from simulator.shelf import Shelf
from simulator.worker import Job
from simulator.workload import SHAPES, LoraUse, Request, compressed, read_gentd26, shaped

HEAD = (
    "gmt_create,predict_type,predict_status,exec_time_seconds,groupId,prompt_length,negative_prompt_length,"
    "num_images_per_prompt,num_inference_steps,checkpoint_model_version_id,lora_args\n"
)


def request(number: int = 0, *, base: str = "a", images: int = 1, steps: int = 10) -> Request:
    return Request(number=number, arrival_s=0.0, base=base, image_count=images, step_count=steps)


def test_events_of_one_time_happen_in_the_order_asked_for_and_cancelled_ones_do_not() -> None:
    clock = Clock()
    seen: list[str] = []
    clock.at(2.0, lambda: seen.append("late"))
    for name in "abc":
        event = clock.at(1.0, partial(seen.append, name))
    event.cancel()
    clock.run()
    assert seen == ["a", "b", "late"]
    assert clock.now_s == 2.0


def test_transfers_share_a_link_and_speed_up_when_one_ends() -> None:
    clock = Clock()
    done: dict[str, float] = {}
    link = Link("network", 1.0)

    def end(name: str) -> None:
        done[name] = clock.now_s

    for name, size in (("short", 1.0), ("long", 3.0)):
        Transfer(clock, [link], size, partial(end, name))
    clock.run()
    assert done == pytest.approx({"short": 2.0, "long": 4.0})
    assert link.moved == 4.0


def test_a_transfer_goes_at_the_pace_of_its_slowest_link() -> None:
    clock, done = Clock(), []
    store = Link("store", 1.0)
    for _ in range(4):
        Transfer(clock, [Link("network", 0.5), store], 1.0, lambda: done.append(clock.now_s))
    clock.run()
    assert done == pytest.approx([4.0] * 4, abs=1e-3)


def test_a_shelf_drops_the_oldest_and_never_what_is_in_use() -> None:
    counts: Counter[str] = Counter()
    shelf = Shelf(2.0, least_recent, counts)
    first = shelf.put("a", 1.0, 0.0)
    shelf.put("b", 1.0, 1.0)
    assert first is not None
    first.use_count = 1
    assert shelf.put("c", 1.0, 2.0)
    assert sorted(shelf.items) == ["a", "c"]
    assert shelf.put("d", 2.0, 3.0) is None
    assert sorted(shelf.items) == ["a", "c"]
    assert +counts == Counter("ac")


def finish_times(device: type, tasks: list[tuple[float, Request]], **more: int) -> dict[int, float]:
    clock, ends = Clock(), {}

    def finished(job: Job, seconds: float) -> None:
        ends[job.request.number] = clock.now_s + seconds

    running = device(clock, Work(fixed_s=1.0, step_s=0.1, marginal=0.5), lambda _: None, finished, **more)
    for at_s, asked in tasks:
        clock.at(at_s, partial(running.add, Job(asked, 0, 0)))
    clock.run()
    return ends


def test_one_by_one_each_waits_for_those_before() -> None:
    ends = finish_times(OneByOne, [(0.0, request(0)), (0.5, request(1, images=3))])
    assert ends == pytest.approx({0: 2.0, 1: 2.0 + 1.0 + 10 * 0.2})


def test_together_a_newcomer_joins_between_steps_and_slows_the_batch() -> None:
    ends = finish_times(Together, [(0.0, request(0)), (0.5, request(1))], max_images=8)
    # five steps alone, then five shared at 0.15 s; the newcomer's last five alone again
    assert ends == pytest.approx({0: 1.25 + 1.0, 1: 0.5 + 0.75 + 0.5 + 1.0})


def test_together_other_bases_share_the_time_but_no_batch() -> None:
    ends = finish_times(Together, [(0.0, request(0)), (0.0, request(1, base="b"))], max_images=8)
    assert ends == pytest.approx({0: 3.0, 1: 3.0})


def test_a_full_batch_makes_others_wait() -> None:
    ends = finish_times(Together, [(0.0, request(0, images=2)), (0.0, request(1, images=2))], max_images=2)
    assert ends == pytest.approx({0: 2.5, 1: 4.0})


def answers(core_count: float, tasks: list[tuple[float, Request]], *, replicas: int = 1) -> list[float]:
    """When each request was answered by replicas that take turns and share cores."""
    clock, cores, work = Clock(), Link("cores", core_count), Work(fixed_s=1.0, step_s=0.1, marginal=0.5)

    def done(job: Job, seconds: float) -> None:
        job.finish_s = clock.now_s + seconds

    devices = [
        InRounds[Job](clock, work, lambda _: None, done, max_images=4, process=Process(clock, cores))
        for _ in range(replicas)
    ]
    jobs = [Job(asked, 0, 0) for _, asked in tasks]
    for number, (job, (at_s, _)) in enumerate(zip(jobs, tasks, strict=True)):
        clock.at(at_s, partial(devices[number % replicas].add, job))
    clock.run()
    return [job.finish_s for job in jobs]


def test_in_rounds_a_newcomer_joins_the_next_one() -> None:
    found = answers(1.0, [(0.0, request(0)), (0.55, request(1))])
    # six steps alone, four shared at 0.15 s; then on one core the newcomer's last six beside what follows the first's
    assert found == pytest.approx([1.2 + 1.2 + 0.8, 1.2 + 1.2 + 0.8 + 0.6], abs=1e-3)


def test_replicas_with_a_core_each_do_not_slow_each_other_and_those_with_one_together_do() -> None:
    tasks = [(0.0, request(0)), (0.0, request(1))]
    assert answers(2.0, tasks, replicas=2) == pytest.approx([2.0, 2.0], abs=1e-3)
    assert answers(1.0, tasks, replicas=2) == pytest.approx([4.0, 4.0], abs=1e-3)
    assert answers(8.0, tasks[:1]) == pytest.approx([2.0], abs=1e-3)  # a thread has one core at most


def test_in_rounds_a_full_batch_makes_others_wait() -> None:
    found = answers(9.0, [(0.0, request(0, images=4)), (0.0, request(1, images=4))])
    assert found == pytest.approx([2.5 + 1.0, 5.0 + 1.0], abs=1e-3)


def test_sizes_depend_on_seed_and_name_alone_and_spread_as_the_trace_says() -> None:
    sizes = [Sizes(1).base(f"m{number}") for number in range(2000)]
    assert Sizes(1).base("m7") == sizes[7] != Sizes(2).base("m7")
    assert statistics.median(sizes) == pytest.approx(1.0, abs=0.02)
    assert max(sizes) < 1.42  # what a device of the default hardware holds


def test_the_generator_draws_what_the_trace_is_like() -> None:
    made = generate(20_000, seed=3)
    assert made == generate(20_000, seed=3)
    assert [r.number for r in made] == list(range(20_000))
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(made))
    bases = Counter(r.base for r in made)
    assert gini(bases.values()) == pytest.approx(0.871, abs=0.03)
    assert bases.most_common(1)[0][1] / len(made) == pytest.approx(0.307, abs=0.04)
    assert sum(not r.loras for r in made) / len(made) == pytest.approx(0.832, abs=0.02)
    for count, share in ((1, 0.578), (4, 0.191), (8, 0.148)):
        assert sum(r.image_count == count for r in made) / len(made) == pytest.approx(share, abs=0.02)
    assert 500 < len({r.pipeline for r in made}) < 900
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(made)]
    assert statistics.median(gaps) == pytest.approx(15, abs=10)
    assert statistics.fmean(gaps) == pytest.approx(75, rel=0.25)
    assert statistics.pstdev(gaps) > 2 * statistics.fmean(gaps)


def test_the_trace_is_read_with_long_gaps_cut(tmp_path: Path) -> None:
    lora = "\"[{'modelVersionId': 'ink', 'scale': 0.8}, {'modelVersionId': 'chalk', 'scale': 1.0}]\""
    rows = [
        "2024-11-15 10:00:00,TXT_2_IMG,SUCCEED,32.0,G0,63.0,26.0,4.0,40.0,M0,[]",
        f"2024-11-15 10:00:09,TXT_2_IMG,FAILED,,G0,63.0,,,,M1,{lora}",
        "2024-11-15 12:00:00,IMG_2_IMG,SUCCEED,32.0,G1,63.0,26.0,1.0,30.0,M0,[]",
    ]
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress((HEAD + "\n".join(rows) + "\n").encode()))
    first, second, third = read_gentd26(path)
    assert (first.base, first.image_count, first.step_count, first.loras) == ("M0", 4, 40, ())
    assert (second.image_count, second.step_count) == (1, 30)
    assert second.loras == (LoraUse("ink", 0.8), LoraUse("chalk", 1.0))
    assert second.pipeline == "M1+ink:0.8+chalk:1"
    assert [r.arrival_s for r in (first, second, third)] == [0.0, 9.0, 69.0]
    assert [r.arrival_s for r in compressed([first, second, third], 3.0)] == [0.0, 3.0, 23.0]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", HEAD + "yesterday,T,S,1,G,1,1,1,30,M,[]\n", HEAD + "\x00\n"])
def test_what_is_no_trace_is_refused_by_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="line 2"):
        read_gentd26(path)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_changes_when_requests_come_and_nothing_else(name: str) -> None:
    made = generate(3000, seed=1)
    other = shaped(made, SHAPES[name], seed=1)
    assert [r.pipeline for r in other] == [r.pipeline for r in made]
    assert other[-1].arrival_s <= made[-1].arrival_s
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(other))
    span_s = made[-1].arrival_s
    per_tenth = Counter(int(10 * r.arrival_s / span_s) for r in other)
    assert max(per_tenth.values()) > 1.3 * min(per_tenth[tenth] for tenth in range(10))
