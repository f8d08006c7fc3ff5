"""The stages' programs in one executor: company, cancelling, failing, several images to a request, frames."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from darkroom.models import programs
from darkroom.models.denoising import denoise
from darkroom.models.executor import Executor
from darkroom.models.journal import Journal, StepDone
from darkroom.models.program import Ticket
from tests.models.oracle import SIZE_PX, Plain, Wanted, decode_task, denoise_task, encoded, parts
from tests.tiny_models import TINY_MODELS

VIDEO = {"WanPipeline", "LTXPipeline"}
WANTED = Wanted("a red circle", 1, 6, 5.0)


def journal(ticket: Ticket | None = None, on_step: Callable[[StepDone], None] = lambda _: None) -> Journal:
    return Journal(ticket or Ticket(), on_step=on_step)


def test_alone_means_bit_for_bit_equal_beside_others(tiny_store: Path) -> None:
    encoder, denoiser, _ = parts(tiny_store, "tiny-sd")
    executor = Executor(max_batch_rows=16)
    embeddings = encoded(executor, encoder, WANTED)
    runs = []
    for seed in range(4):
        task, ticket = denoise_task(denoiser, replace(WANTED, seed=seed)), Ticket(alone=seed == 1)
        runs.append(executor.submit(partial(denoise, denoiser, task, embeddings, journal(ticket)), ticket=ticket))
    results = [future.result(60) for future, _ in runs]
    assert torch.equal(results[1], Plain(tiny_store, "tiny-sd", denoiser).latents(WANTED))
    assert runs[1][1].batched == 0
    assert runs[2][1].batched > 0
    executor.close()


def test_cancelling_ends_a_program_and_spares_the_others(tiny_store: Path) -> None:
    encoder, denoiser, _ = parts(tiny_store, "tiny-sd")
    executor = Executor(max_batch_rows=16)
    embeddings = encoded(executor, encoder, WANTED)
    seen: list[int] = []
    started: Future[None] = Future()

    def on_step(done: StepDone) -> None:
        seen.append(done.step)
        if done.step == 2:
            started.set_result(None)

    task = denoise_task(denoiser, replace(WANTED, steps=900))
    long, _ = executor.submit(partial(denoise, denoiser, task, embeddings, journal(on_step=on_step)))
    started.result(timeout=30)
    assert long.cancel()
    short, _ = executor.submit(partial(denoise, denoiser, denoise_task(denoiser, WANTED), embeddings, journal()))
    assert short.result(timeout=30).shape == (1, 4, 16, 16)
    after = len(seen)
    executor.submit(lambda: None)[0].result(timeout=30)
    assert len(seen) == after < 900
    executor.close()


def test_one_failing_forward_does_not_take_its_batch_along(tiny_store: Path) -> None:
    encoder, denoiser, _ = parts(tiny_store, "tiny-sd")
    executor = Executor(max_batch_rows=16)
    embeddings = encoded(executor, encoder, WANTED)
    wrong = {name: value[..., :7] for name, value in embeddings.items()}
    task = denoise_task(denoiser, WANTED)
    bad, _ = executor.submit(partial(denoise, denoiser, task, wrong, journal()))
    good, _ = executor.submit(partial(denoise, denoiser, task, embeddings, journal()))
    assert good.result(60).isfinite().all()
    with pytest.raises(RuntimeError):
        bad.result(60)
    executor.close()


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize("model_id", TINY_MODELS)
def test_several_images_of_a_request_are_those_of_plain_diffusers(tiny_store: Path, model_id: str) -> None:
    encoder, denoiser, vae = parts(tiny_store, model_id)
    executor = Executor(max_batch_rows=16)
    task = replace(denoise_task(denoiser, WANTED), image_count=2)
    embeddings = encoded(executor, encoder, WANTED)
    latents = executor.submit(partial(denoise, denoiser, task, embeddings, journal()), alone=True)[0].result(60)
    plain = Plain(tiny_store, model_id, denoiser)
    if denoiser.family.pipeline == "CogVideoXPipeline":  # draws one video to a prompt, however many are asked for
        expected = torch.cat([plain.latents(replace(WANTED, seed=WANTED.seed + i)) for i in range(2)])
        assert ((latents - expected).norm() / expected.norm()).item() <= 1e-5
    else:
        count = "num_videos_per_prompt" if denoiser.family.pipeline in VIDEO else "num_images_per_prompt"
        generators = [torch.Generator().manual_seed(WANTED.seed + i) for i in range(2)]
        assert torch.equal(latents, plain.latents(WANTED, generator=generators, **{count: 2}))
    rows = executor.submit(partial(programs.decode_rows, vae, decode_task(vae), latents))[0].result(60)
    assert len(rows) == 2
    assert rows[0][0].tobytes() != rows[1][0].tobytes()
    executor.close()


@pytest.mark.parametrize(("model_id", "frame_count"), [("tiny-wan", 81), ("tiny-ltx", 161), ("tiny-cogvideox", 9)])
def test_a_video_has_as_many_frames_as_plain_diffusers_draws(tiny_store: Path, model_id: str, frame_count: int) -> None:
    encoder, denoiser, vae = parts(tiny_store, model_id)
    executor = Executor(max_batch_rows=16)
    task = denoise_task(denoiser, replace(WANTED, steps=2))
    embeddings = encoded(executor, encoder, WANTED)
    latents = executor.submit(partial(denoise, denoiser, task, embeddings, journal()))[0].result(60)
    (frames,) = executor.submit(partial(programs.decode_rows, vae, decode_task(vae), latents))[0].result(60)
    assert len(frames) == frame_count
    assert {frame.size for frame in frames} == {(SIZE_PX, SIZE_PX)}
    executor.close()


def test_both_experts_of_a_model_of_two_take_part(tiny_store: Path) -> None:
    encoder, denoiser, _ = parts(tiny_store, "tiny-wan-two-experts")
    called: list[str] = []
    for name in denoiser.denoiser_names:
        denoiser.networks[name].register_forward_hook(lambda *_, name=name: called.append(name))
    executor = Executor(max_batch_rows=16)
    embeddings = encoded(executor, encoder, WANTED)
    executor.submit(partial(denoise, denoiser, denoise_task(denoiser, WANTED), embeddings, journal()))[0].result(60)
    executor.close()
    assert len(called) == 2 * WANTED.steps  # with guidance, two forwards a step
    assert set(called) == {"transformer", "transformer_2"}
    assert called == sorted(called)  # the second only after the first


def test_a_model_may_shorten_its_prompts(tiny_store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_store / "tiny-flux", tmp_path / "short")
    (folder / "darkroom.json").write_text('{"max_sequence_length": 24}')
    encoder, denoiser, _ = parts(tmp_path, "short")
    executor = Executor(max_batch_rows=16)
    embeddings = encoded(executor, encoder, WANTED)
    assert embeddings["prompt_embeds"].shape[1] == 24
    latents, _ = executor.submit(partial(denoise, denoiser, denoise_task(denoiser, WANTED), embeddings, journal()))
    plain = Plain(tmp_path, "short", denoiser)
    assert torch.equal(latents.result(60), plain.latents(WANTED, max_sequence_length=24))
    executor.close()
