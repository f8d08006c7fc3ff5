"""Networks in half precision, as on a GPU: what pipelines do to types is the same on a CPU, and exact there."""

from functools import partial
from pathlib import Path

import pytest
import torch

from darkroom.models import controlnets, loader, programs, weights
from darkroom.models.denoising import denoise
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal
from darkroom.models.program import Ticket
from tests.models.oracle import REQUESTS, Plain, decode_task, denoised, encoded, parts
from tests.models.variant_runs import CASES, Elsewhere, plain_latents, requested
from tests.tiny.ip_adapters import save_ip_adapter
from tests.tiny.variants import save_variants
from tests.tiny_models import TINY_MODELS, save_tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network runs in half precision, whatever it is stored in."""
    for module in (weights, controlnets):
        monkeypatch.setattr(module, "running_dtype", lambda *_: HALF)


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_every_family_draws_what_plain_diffusers_draws(tiny_store: Path, executor: Executor, model_id: str) -> None:
    encoder, denoiser, vae = parts(tiny_store, model_id)
    plain = Plain(tiny_store, model_id, denoiser, dtype=HALF)
    asked = [(wanted, encoded(executor, encoder, wanted)) for wanted in (REQUESTS[0], REQUESTS[2])]
    expected = [plain.latents(wanted) for wanted, _ in asked]
    for (found, _), right in zip(denoised(executor, denoiser, asked, alone=True), expected, strict=True):
        assert torch.equal(found, right)
    for (found, _), right in zip(denoised(executor, denoiser, asked, alone=False), expected, strict=True):
        assert (found.float() - right.float()).norm() <= 0.02 * right.float().norm()
    decoding = partial(programs.decode, vae, decode_task(vae), expected[0])
    frames = executor.submit(decoding, alone=True)[0].result(60)
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in plain.frames(REQUESTS[0])]


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apart from other tests': parts are kept by their store, and theirs run in single precision."""
    root = tmp_path_factory.mktemp("half")
    for model_id in ("tiny-sd", "tiny-sdxl", "tiny-sd3", "tiny-flux"):
        save_tiny_model(root, model_id)
    save_variants(root)
    for adapter_id in ("ip-sd", "ip-sd-plus", "ip-sd3", "ip-flux"):
        save_ip_adapter(root, adapter_id)
    return root


@pytest.mark.parametrize(
    "name", ["sd image", "sd inpaint control ip", "xl control", "flux control", "sd 2 ip", "sd3 ip", "flux ip"]
)
def test_pictures_work_alike(own_store: Path, executor: Executor, name: str) -> None:
    case, wanted = CASES[name], REQUESTS[0]
    elsewhere = Elsewhere(own_store)
    try:
        part = case.part(own_store, elsewhere.send)
        task, embeddings = requested(own_store, case, wanted, executor, part)
        conditions = case.conditions(own_store, wanted.seed)
        program = partial(denoise, part, task, embeddings, Journal(Ticket(alone=True)), conditions=conditions)
        found = executor.submit(program, alone=True)[0].result(60)
    finally:
        elsewhere.executor.close()
    assert torch.equal(found, plain_latents(own_store, case, wanted, part, dtype=HALF))


def test_a_vae_that_half_precision_breaks_stays_in_single(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "running_dtype", lambda *_: torch.float16)
    part = loader.load_part(tiny_store, "tiny-sdxl", "vae", torch.device("cpu"))
    assert part.pipeline.vae.config.force_upcast
    assert part.pipeline.vae.dtype is part.denoiser.dtype is torch.float32
