"""Every row of the table against plain diffusers: encode, denoise and decode in separate parts, batched and alone."""

from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from darkroom.models import checks, denoising, programs
from darkroom.models.executor import Executor
from darkroom.models.loader import Part, load_part
from darkroom.wire.tasks import DecodeTask, DenoiseTask, EncodeTask
from darkroom.wire.tensors import RawTensor
from tests.tiny_models import TINY_MODELS

PROMPTS = ("a red circle", "a large blue star on a white background", "a ring")


def parts(store: Path, model_id: str) -> tuple[Part, Part, Part]:
    encoder, denoiser, vae = (
        load_part(store, model_id, stage, torch.device("cpu")) for stage in ("encoder", "denoiser", "vae")
    )
    return encoder, denoiser, vae


def encode_task(model_id: str, prompt: str, *, guided: bool) -> EncodeTask:
    return EncodeTask(
        request_id="r", model_id=model_id, prompt=prompt, negative_prompt="", guided=guided, deterministic=False
    )


def denoise_task(model_id: str, seed: int, steps: int, guidance: float) -> DenoiseTask:
    return DenoiseTask(
        request_id="r",
        model_id=model_id,
        embeddings={},
        width_px=32,
        height_px=32,
        step_count=steps,
        guidance_scale=guidance,
        seed=seed,
        image_count=1,
        scheduler="",
        deterministic=False,
    )


def plain_latents(pipeline: DiffusionPipeline, prompt: str, seed: int, steps: int, guidance: float) -> torch.Tensor:
    latents: torch.Tensor = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    return latents


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_stages_apart_and_batched_match_plain_diffusers(tiny_store: Path, model_id: str) -> None:
    plain = DiffusionPipeline.from_pretrained(tiny_store / model_id)
    plain.set_progress_bar_config(disable=True)
    encoder, denoiser, vae = parts(tiny_store, model_id)
    executor = Executor(max_batch_rows=16)
    wanted = [(prompt, i, 3 + i, 3.5) for i, prompt in enumerate(PROMPTS)]

    encoded = [
        executor.submit(
            partial(programs.encode, encoder, encode_task(model_id, prompt, guided=encoder.family.is_guided(3.5)))
        )[0]
        for prompt, *_ in wanted
    ]
    steps_seen: list[tuple[int, int]] = []
    started = []
    for (_, seed, steps, guidance), embeddings in zip(wanted, encoded, strict=True):
        task = denoise_task(model_id, seed, steps, guidance)
        checks.check_embeddings(denoiser, task, embeddings.result())
        started.append(
            executor.submit(
                partial(denoising.denoise, denoiser, task, embeddings.result(), lambda *s: steps_seen.append(s))
            )
        )
    latents = [future.result() for future, _ in started]
    for (prompt, seed, steps, guidance), latent in zip(wanted, latents, strict=True):
        expected = plain_latents(plain, prompt, seed, steps, guidance)
        assert ((latent - expected).norm() / expected.norm()).item() <= 1e-5
    assert sum(counts.batched for _, counts in started) > 0
    assert (5, 5) in steps_seen

    decode_task = DecodeTask(
        request_id="r",
        model_id=model_id,
        latents=RawTensor("float32", (), b""),
        width_px=32,
        height_px=32,
        parameters={},
        deterministic=False,
    )
    checks.check_latents(vae, decode_task, latents[0])
    image = executor.submit(lambda: programs.decode(vae, decode_task, latents[0]))[0].result()[0]
    expected_image = plain(
        PROMPTS[0],
        num_inference_steps=3,
        guidance_scale=3.5,
        width=32,
        height=32,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected_image).astype(int)).max() <= 1
    executor.close()


def test_alone_means_bit_for_bit_equal_beside_others(tiny_store: Path) -> None:
    plain = DiffusionPipeline.from_pretrained(tiny_store / "tiny-sd")
    plain.set_progress_bar_config(disable=True)
    encoder, denoiser, _ = parts(tiny_store, "tiny-sd")
    executor = Executor(max_batch_rows=16)
    embeddings = executor.submit(
        lambda: programs.encode(encoder, encode_task("tiny-sd", PROMPTS[0], guided=True)), alone=True
    )[0].result()
    runs = [
        executor.submit(
            partial(denoising.denoise, denoiser, denoise_task("tiny-sd", seed, 6, 5.0), embeddings, lambda *_: None),
            alone=seed == 1,
        )
        for seed in range(4)
    ]
    results = [future.result() for future, _ in runs]
    assert torch.equal(results[1], plain_latents(plain, PROMPTS[0], 1, 6, 5.0))
    assert runs[1][1].batched == 0
    assert runs[2][1].batched > 0
    executor.close()


@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_a_stage_holds_only_its_own_networks(tiny_store: Path, model_id: str) -> None:
    for part, stage in zip(parts(tiny_store, model_id), ("encoder", "denoiser", "vae"), strict=True):
        resident = {state.name for state in part.network_states() if state.parameter_count}
        everything = {state.name for state in part.network_states()}
        expected = {
            "encoder": {n for n in everything if n.startswith("text_encoder")},
            "denoiser": {part.family.denoiser},
            "vae": {"vae"},
        }
        assert resident == expected[stage]


def test_cancelling_ends_a_program_and_spares_the_others(tiny_store: Path) -> None:
    encoder, denoiser, _ = parts(tiny_store, "tiny-sd")
    executor = Executor(max_batch_rows=16)
    embeddings = executor.submit(lambda: programs.encode(encoder, encode_task("tiny-sd", PROMPTS[0], guided=True)))[
        0
    ].result()
    seen: list[int] = []
    started: Future[None] = Future()

    def on_step(step: int, _: int) -> None:
        seen.append(step)
        if step == 2:
            started.set_result(None)

    long, _ = executor.submit(
        lambda: denoising.denoise(denoiser, denoise_task("tiny-sd", 0, 900, 5.0), embeddings, on_step)
    )
    started.result(timeout=30)
    assert long.cancel()
    short, _ = executor.submit(
        lambda: denoising.denoise(denoiser, denoise_task("tiny-sd", 0, 4, 5.0), embeddings, lambda *_: None)
    )
    assert short.result(timeout=30).shape == (1, 4, 16, 16)
    after = len(seen)
    executor.submit(lambda: None)[0].result(timeout=30)
    assert len(seen) == after < 900
    executor.close()


def test_one_failing_forward_does_not_take_its_batch_along(tiny_store: Path) -> None:
    encoder, denoiser, _ = parts(tiny_store, "tiny-sd")
    executor = Executor(max_batch_rows=16)
    embeddings = executor.submit(lambda: programs.encode(encoder, encode_task("tiny-sd", PROMPTS[0], guided=True)))[
        0
    ].result()
    wrong = {name: value[..., :7] for name, value in embeddings.items()}
    task = denoise_task("tiny-sd", 0, 4, 5.0)
    bad, _ = executor.submit(lambda: denoising.denoise(denoiser, task, wrong, lambda *_: None))
    good, _ = executor.submit(lambda: denoising.denoise(denoiser, task, embeddings, lambda *_: None))
    assert good.result().isfinite().all()
    with pytest.raises(RuntimeError):
        bad.result()
    executor.close()
