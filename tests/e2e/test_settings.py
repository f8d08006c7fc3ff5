"""What a request can ask for beside its prompt, through all services: LoRAs, step cache, previews, frames."""

import asyncio
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from darkroom.client import Client, Drawing, Progress
from darkroom.errors import InvalidField, LoraNotFound
from darkroom.runtime.cluster import LocalCluster
from tests.models.oracle import SIZE_PX
from tests.tiny_loras import save_lora_for

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),  # of the oracle
]
TINY = Drawing(
    prompt="a ring",
    model_id="tiny-sd",
    width_px=SIZE_PX,
    height_px=SIZE_PX,
    step_count=5,
    guidance_scale=5.0,
    seed=3,
)


@pytest.fixture(scope="module", autouse=True)
def loras(store: Path) -> None:
    """Two LoRAs, one of which says what model it is for."""
    save_lora_for(store, "ink", store / "tiny-sd", seed=1)
    save_lora_for(store, "gold", store / "tiny-sd", seed=2)
    (store / "gold" / "darkroom.json").write_text('{"base_model": "tiny-sd", "default_scale": 0.5}')


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


async def drawn_once_known(client: Client, drawing: Drawing) -> bytes:
    """Draws as soon as the catalogue has read the store again."""
    async with asyncio.timeout(30):
        while True:
            try:
                return (await client.draw(drawing)).images[0]
            except LoraNotFound:
                await asyncio.sleep(0.2)


async def test_a_lora_draws_what_plain_diffusers_draws_with_it(client: Client, store: Path) -> None:
    plain = DiffusionPipeline.from_pretrained(store / "tiny-sd")
    plain.set_progress_bar_config(disable=True)
    for name in ("ink", "gold"):
        plain.load_lora_weights(store / name, adapter_name=name)
    for uses, names, scales in (
        ((("ink", 0.7),), ["ink"], [0.7]),
        ((("ink", 1.0), ("gold", None)), ["ink", "gold"], [1.0, 0.5]),
    ):
        drawing = replace(TINY, loras=uses, deterministic=True)
        found = await drawn_once_known(client, drawing)
        plain.set_adapters(names, scales)
        expected = plain(
            TINY.prompt,
            width=SIZE_PX,
            height=SIZE_PX,
            num_inference_steps=5,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
        assert np.abs(pixels(found).astype(int) - np.asarray(expected).astype(int)).max() <= 1
        without = (await client.draw(replace(TINY, deterministic=True))).images[0]
        assert not np.array_equal(pixels(found), pixels(without))


async def test_requests_with_and_without_loras_share_batches(client: Client) -> None:
    uses = ((), (("ink", 0.7),), (("ink", 0.2),), (("gold", 1.0), ("ink", 1.0)))
    drawings = [replace(TINY, loras=use, step_count=30) for use in uses]
    await drawn_once_known(client, drawings[-1])
    drawn = await asyncio.gather(*(client.draw(drawing) for drawing in drawings))
    assert all(answer.batched_forward_count > 0 for answer in drawn)
    for drawing, answer in zip(drawings, drawn, strict=True):
        alone = await client.draw(replace(drawing, deterministic=True))
        assert np.abs(pixels(answer.images[0]).astype(int) - pixels(alone.images[0]).astype(int)).max() <= 1


async def test_an_unknown_lora_and_one_of_another_model_are_refused_by_name(client: Client) -> None:
    with pytest.raises(LoraNotFound) as unknown:
        await client.draw(replace(TINY, loras=(("nobody", 1.0),)))
    assert unknown.value.facts["field"] == "loras[0].lora_id"
    with pytest.raises(InvalidField) as other:
        await client.draw(replace(TINY, model_id="shapes", loras=(("gold", 1.0),)))
    assert other.value.facts["field"] == "loras[0]"
    with pytest.raises(InvalidField) as scale:
        await client.draw(replace(TINY, loras=(("ink", float("nan")),)))
    assert scale.value.facts["field"] == "loras[0].scale"


async def test_a_step_cache_saves_forwards_and_keeps_the_picture(client: Client) -> None:
    drawing = Drawing(prompt="a large red circle in the center on a white background", model_id="shapes", seed=1)
    cached = await client.draw(replace(drawing, step_cache_threshold=0.2))
    exact = await client.draw(drawing)
    assert cached.cached_forward_count >= 8
    assert exact.cached_forward_count == 0
    difference = np.abs(pixels(cached.images[0]).astype(int) - pixels(exact.images[0]).astype(int))
    assert 0 < difference.max() < 32


async def test_previews_of_every_image_come_at_their_interval(client: Client) -> None:
    heard: list[Progress] = []
    drawing = Drawing(
        prompt="a large red circle in the center on a white background",
        model_id="shapes",
        seed=1,
        image_count=2,
        preview_interval=5,
    )
    await client.draw(drawing, on_progress=heard.append)
    previews = {progress.step: progress.previews for progress in heard if progress.previews}
    assert sorted(previews) == [5, 10, 15, 20, 25]
    for first, second in previews.values():
        assert pixels(first).shape == pixels(second).shape == (16, 16, 3)
        assert not np.array_equal(pixels(first), pixels(second))


async def test_a_video_has_as_many_frames_as_are_asked_for_and_an_image_has_none(client: Client) -> None:
    drawing = replace(TINY, model_id="tiny-wan", step_count=2, frame_count=5)
    assert len((await client.draw(drawing)).images) == 5
    with pytest.raises(InvalidField) as refused:
        await client.draw(replace(TINY, frame_count=5))
    assert refused.value.facts["field"] == "frame_count"


async def test_the_catalogue_and_the_command_know_loras(client: Client, cluster: LocalCluster, tmp_path: Path) -> None:
    await drawn_once_known(client, replace(TINY, loras=(("gold", None),)))
    listed = {lora.lora_id: lora for lora in (await client.catalogue()).loras}
    assert (listed["gold"].base_model_id, listed["gold"].default_scale) == ("tiny-sd", 0.5)
    assert listed["ink"].base_model_id == "tiny-sd"
    files = {}
    for name, options in {"with": ["--lora", "ink:0.7", "--lora", "gold"], "without": []}.items():
        files[name] = tmp_path / f"{name}.png"
        command = [str(Path(sys.executable).parent / "darkroom"), "run", TINY.prompt, "--output", str(files[name])]
        more = ["--model", "tiny-sd", "--size", "32x32", "--steps", "4", "--seed", "1", "--step-cache", "0.1", *options]
        process = await asyncio.create_subprocess_exec(*command, *more, "--router", cluster.addresses.router)
        assert await process.wait() == 0
    drawn = {name: file.read_bytes() for name, file in files.items()}
    said = Image.open(io.BytesIO(drawn["with"])).info
    assert (said["loras"], said["step_cache"]) == ("ink:0.7, gold:0.5", "0.1")
    assert not np.array_equal(pixels(drawn["with"]), pixels(drawn["without"]))
