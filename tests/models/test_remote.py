"""Networks of another stage, called from a program: the same answers, others go on meanwhile, errors by name."""

import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom.errors import InvalidCall, NetworkNotHeld, StageUnavailable
from darkroom.models.denoising import denoise
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal
from darkroom.models.loader import load_part
from darkroom.models.networks import call_network
from darkroom.models.program import Ticket
from darkroom.models.remote import OutsideCall, Reply, calling_for
from darkroom.models.variants import UNCONDITIONED
from tests.models.oracle import CPU, Wanted, held_up
from tests.models.variant_runs import Case, Elsewhere, part_of, requested

WANTED = Wanted("a red circle", 1, 5, 4.0)
CASE = Case(model_id="tiny-sd", plain="StableDiffusionImg2ImgPipeline", image=True, strength=0.6)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def store(tiny_store: Path) -> Path:
    return tiny_store


class Held:
    """Holds calls back until they are answered by hand."""

    def __init__(self) -> None:
        self.asked: list[tuple[OutsideCall, Future[Reply]]] = []
        self.is_asked = threading.Event()

    def send(self, stage: str, call: OutsideCall) -> Future[Reply]:
        assert stage == "vae"
        self.asked.append((call, Future()))
        self.is_asked.set()
        return self.asked[-1][1]


def encode(vae: Any, pixels: torch.Tensor, ticket: Ticket) -> Any:
    with calling_for(ticket):
        return vae.encode(pixels).latent_dist


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_network_elsewhere_answers_as_it_would_here(
    tiny_store: Path, executor: Executor, elsewhere: Elsewhere, layout: torch.memory_format
) -> None:
    vae = part_of(tiny_store, "tiny-sd", "denoiser", elsewhere.send).pipeline.vae
    assert all(parameter.is_meta for parameter in vae.network.parameters())
    pixels = PIXELS.contiguous(memory_format=layout)
    found = executor.submit(partial(encode, vae, pixels, Ticket(alone=True)))[0].result(60)
    with torch.inference_mode():
        network: Any = part_of(tiny_store, "tiny-sd", "vae").networks["vae"]
        right = network.encode(pixels).latent_dist
    assert torch.equal(found.parameters, right.parameters)
    assert found.parameters.stride() == right.parameters.stride()
    noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(found.sample(noise[0]), right.sample(noise[1]))


def test_encodes_of_several_requests_share_a_batch_and_each_gets_its_own(
    tiny_store: Path, executor: Executor, elsewhere: Elsewhere
) -> None:
    vae = part_of(tiny_store, "tiny-sd", "denoiser", elsewhere.send).pipeline.vae
    alone = [
        executor.submit(partial(encode, vae, PIXELS[i : i + 1], Ticket(alone=True)))[0].result(60) for i in range(2)
    ]
    before = elsewhere.executor.counts.batches
    with held_up(elsewhere.executor):
        runs = [executor.submit(partial(encode, vae, PIXELS[i : i + 1], Ticket()))[0] for i in range(2)]
        while len(elsewhere.calls) < 4:
            time.sleep(0.01)
    for run, right in zip(runs, alone, strict=True):
        found = run.result(60)
        assert found.mean.shape == right.mean.shape
        assert torch.allclose(found.parameters, right.parameters, atol=1e-5)
    assert elsewhere.executor.counts.batches - before == 1


def test_other_requests_go_on_while_a_network_elsewhere_is_slow(
    tiny_store: Path, executor: Executor, elsewhere: Elsewhere
) -> None:
    held = Held()
    slow = load_part(tiny_store, "tiny-sd", "denoiser", CPU, send=held.send)
    task, embeddings = requested(tiny_store, CASE, WANTED, executor, slow)
    program = partial(denoise, slow, task, embeddings, Journal(Ticket()), conditions=CASE.conditions(tiny_store, 1))
    waiting, _ = executor.submit(program)
    assert held.is_asked.wait(30)
    other = partial(denoise, slow, task, embeddings, Journal(Ticket()), conditions=UNCONDITIONED)
    assert executor.submit(other)[0].result(60).isfinite().all()
    assert not waiting.done()
    (call, future), *_ = held.asked
    future.set_result(elsewhere.send("vae", call).result(60))
    assert waiting.result(60).isfinite().all()


def test_a_cancelled_request_takes_its_call_along(tiny_store: Path, executor: Executor) -> None:
    held = Held()
    vae = load_part(tiny_store, "tiny-sd", "denoiser", CPU, send=held.send).pipeline.vae
    running, _ = executor.submit(partial(encode, vae, PIXELS, Ticket()))
    assert held.is_asked.wait(30)
    assert running.cancel()
    executor.submit(lambda: None)[0].result(60)
    assert held.asked[0][1].cancelled()


def test_a_call_says_for_whom_it_is(tiny_store: Path, executor: Executor) -> None:
    held = Held()
    vae = load_part(tiny_store, "tiny-sd", "denoiser", CPU, send=held.send).pipeline.vae
    ticket = Ticket(request_id="mine", alone=True, deadline_s=1e9)
    executor.submit(partial(encode, vae, PIXELS, ticket))
    executor.submit(partial(encode, vae, PIXELS, Ticket()))
    while len(held.asked) < 2:
        time.sleep(0.01)
    calls = {call.request_id: call for call, _ in held.asked}
    assert (calls["mine"].alone, calls["mine"].deadline_s) == (True, 1e9)
    assert not calls[""].alone


def test_what_goes_wrong_elsewhere_reaches_the_request(tiny_store: Path, executor: Executor) -> None:
    held = Held()
    vae = load_part(tiny_store, "tiny-sd", "denoiser", CPU, send=held.send).pipeline.vae
    running, _ = executor.submit(partial(encode, vae, PIXELS, Ticket()))
    assert held.is_asked.wait(30)
    held.asked[0][1].set_exception(StageUnavailable("vae", "none is up"))
    with pytest.raises(StageUnavailable):
        running.result(60)
    held.asked.clear()
    running, _ = executor.submit(partial(encode, vae, PIXELS, Ticket()))
    while not held.asked:
        time.sleep(0.01)
    held.asked[0][1].set_result(Reply({"tensor": "t9", "type": "float32"}, {}))
    with pytest.raises(InvalidCall):
        running.result(60)


def test_an_answer_is_of_the_type_of_the_arguments(tiny_store: Path, executor: Executor, elsewhere: Elsewhere) -> None:
    vae = part_of(tiny_store, "tiny-sd", "denoiser", elsewhere.send).pipeline.vae
    exact, rounded = (
        executor.submit(partial(encode, vae, PIXELS.bfloat16().to(dtype), Ticket()))[0].result(60).parameters
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype is torch.bfloat16
    assert torch.equal(exact.bfloat16(), rounded)  # computed in the network's own type


def test_what_no_wire_carries_is_refused(tiny_store: Path, executor: Executor, elsewhere: Elsewhere) -> None:
    vae = part_of(tiny_store, "tiny-sd", "denoiser", elsewhere.send).pipeline.vae
    for wrong in (object(), {1: PIXELS}, PIXELS.to_sparse()):
        with pytest.raises((InvalidCall, RuntimeError)):
            executor.submit(partial(encode, vae, wrong, Ticket()))[0].result(60)  # type: ignore[arg-type]
    assert elsewhere.calls == []


IMAGE = {"tensor": "t0", "type": "float32"}


@pytest.mark.parametrize(
    "arguments",
    [
        None,
        5,
        [],
        {"list": [IMAGE]},
        {"dict": {}},
        {"dict": {"x": None}},
        {"dict": {"x": 3}},
        {"dict": {"x": {"tensor": "t1", "type": "float32"}}},
        {"dict": {"x": {"tensor": "t0", "type": "float64"}}},
        {"dict": {"x": {"tensor": "t0", "type": "float32", "order": [0, 0, 1, 2]}}},
        {"dict": {"x": {"tensor": "t0", "type": "float32", "order": "0123"}}},
        {"dict": {"x": {"tensor": "t0", "type": "float32", "order": [0, 1, 2, 3.5]}}},
        {"dict": {"x": {"gaussian": {"list": []}}}},
        {"dict": {"x": {"list": [IMAGE]}}},
        {"dict": {"x": {"scalar": 1, "type": "object_"}}},
        {"dict": {"x": IMAGE, "y": 1}},
        {"dict": {"x": IMAGE, "self": 1}},
        {"dict": {"x": {"tensor": "t0", "type": "float32", "order": [1, 0, 2, 3]}, "return_dict": {"output": {}}}},
    ],
)
def test_arguments_that_fit_no_network_are_refused(tiny_store: Path, executor: Executor, arguments: Any) -> None:
    vae = part_of(tiny_store, "tiny-sd", "vae")
    call = OutsideCall("tiny-sd", "vae", "encode", arguments, {"t0": torch.zeros(3, 3, 3, 3)})
    try:
        executor.submit(partial(call_network, vae, call))[0].result(60)
    except InvalidCall:
        return
    assert arguments["dict"]["x"]["order"] == [1, 0, 2, 3]  # odd, and a picture all the same


@pytest.mark.parametrize(
    ("network", "method"),
    [("unet", "forward"), ("nothing", "forward"), ("vae", "train"), ("scheduler", "step"), ("__class__", "forward")],
)
def test_what_is_not_held_is_not_called(tiny_store: Path, executor: Executor, network: str, method: str) -> None:
    vae = part_of(tiny_store, "tiny-sd", "vae")
    call = OutsideCall("tiny-sd", network, method, {"dict": {}}, {})
    with pytest.raises(NetworkNotHeld):
        executor.submit(partial(call_network, vae, call))[0].result(60)
