"""From pictures to pictures through all services: the VAE called from the denoiser, ControlNets here and elsewhere."""

import asyncio
import hashlib
import io
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import diffusers
import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from diffusers import ControlNetModel, DiffusionPipeline
from PIL import Image

from darkroom.client import Client, Drawing
from darkroom.errors import InvalidField, ModelNotFound
from darkroom.runtime.cluster import LocalCluster
from darkroom.v1 import denoiser_pb2, denoiser_pb2_grpc, encoder_pb2, encoder_pb2_grpc
from darkroom.wire.conditions import ConditionFiles, ControlUse, IpAdapterUse
from tests.models.oracle import NEGATIVE, SIZE_PX
from tests.models.variant_runs import mask, picture
from tests.tiny.ip_adapters import WEIGHTS, save_ip_adapter
from tests.tiny.variants import CONTROLNETS, save_variants

IP_ADAPTERS = ("ip-sd", "ip-sd-plus")
pytestmark = pytest.mark.asyncio(loop_scope="session")
SD = Drawing(
    prompt="a ring",
    negative_prompt=NEGATIVE,
    model_id="tiny-sd",
    width_px=SIZE_PX,
    height_px=SIZE_PX,
    step_count=6,
    guidance_scale=4.0,
    seed=3,
    deterministic=True,
)


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def guides(store: Path, cluster: LocalCluster) -> None:
    """ControlNets and IP-Adapters, once the catalogue has read the store again."""
    save_variants(store)
    for adapter_id in IP_ADAPTERS:
        save_ip_adapter(store, adapter_id)
    cachemgr = Client(router_address="", cachemgr_address=cluster.addresses.cachemgr)
    async with asyncio.timeout(30), cachemgr as client:
        while not {*CONTROLNETS, *IP_ADAPTERS} <= {guide.guide_id for guide in (await client.catalogue()).guides}:
            await asyncio.sleep(0.2)


def file(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def plainly(store: Path, kind: str, **more: object) -> np.ndarray:
    plain = DiffusionPipeline.from_pretrained(store / "tiny-sd")
    components = dict(plain.components)
    if "Control" in kind:
        components["controlnet"] = ControlNetModel.from_pretrained(store / "control-sd")
    pipeline = getattr(diffusers, kind)(**components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    if "ip_adapter_image" in more:
        pipeline.load_ip_adapter(str(store / "ip-sd-plus"), subfolder="", weight_name=WEIGHTS)
        pipeline.set_ip_adapter_scale(0.7)
    return np.asarray(
        pipeline(
            SD.prompt,
            negative_prompt=NEGATIVE,
            num_inference_steps=6,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3),
            **more,
        ).images[0]
    ).astype(int)


PROMPTED = IpAdapterUse(adapter_id="ip-sd-plus", image=file(picture(21, size=(50, 40))), scale=0.7)
CONTROL = ControlUse(controlnet_id="control-sd", image=file(picture(12)), scale=0.8, start=0.0, end=1.0)


async def test_pictures_and_what_leads_them_match_plain_diffusers(client: Client, store: Path) -> None:
    cases = [
        (
            ConditionFiles(image=file(picture(1)), strength=0.6),
            plainly(store, "StableDiffusionImg2ImgPipeline", image=picture(1), strength=0.6),
        ),
        (
            ConditionFiles(image=file(picture(1)), mask=file(mask()), strength=0.8),
            plainly(
                store, "StableDiffusionInpaintPipeline", image=picture(1), mask_image=mask(), strength=0.8,
                width=SIZE_PX, height=SIZE_PX,
            ),
        ),
        (
            ConditionFiles(controls=(CONTROL,)),
            plainly(
                store, "StableDiffusionControlNetPipeline", image=picture(12), controlnet_conditioning_scale=0.8,
                width=SIZE_PX, height=SIZE_PX,
            ),
        ),
        (
            ConditionFiles(ip_adapters=(PROMPTED,)),
            plainly(
                store, "StableDiffusionPipeline", ip_adapter_image=picture(21, size=(50, 40)),
                width=SIZE_PX, height=SIZE_PX,
            ),
        ),
    ]  # fmt: skip
    for conditions, expected in cases:
        drawn = await client.draw(replace(SD, conditions=conditions))
        assert np.abs(pixels(drawn.images[0]) - expected).max() <= 1


async def test_wrong_pictures_and_controlnets_are_refused_by_name(client: Client) -> None:
    for conditions, field in (
        (ConditionFiles(image=b"GIF89a" + bytes(100)), "image"),
        (ConditionFiles(image=file(picture(1).resize((16, 16)))), "image"),
        (ConditionFiles(image=file(picture(1)), mask=file(mask().resize((64, 64)))), "mask"),
        (ConditionFiles(controls=(replace(CONTROL, image=b"text named .png"),)), "controls[0].image"),
        (ConditionFiles(controls=(replace(CONTROL, controlnet_id="ip-sd"),)), "controls[0]"),
        (ConditionFiles(controls=(replace(CONTROL, controlnet_id="control-flux"),)), "controls[0]"),
        (ConditionFiles(ip_adapters=(replace(PROMPTED, image=b"GIF89a" + bytes(100)),)), "ip_adapters[0].image"),
        (ConditionFiles(ip_adapters=(replace(PROMPTED, adapter_id="control-sd"),)), "ip_adapters[0]"),
    ):
        with pytest.raises(InvalidField) as refused:
            await client.draw(replace(SD, conditions=conditions))
        assert refused.value.facts["field"] == field
    for unknown in (
        ConditionFiles(controls=(replace(CONTROL, controlnet_id="none"),)),
        ConditionFiles(ip_adapters=(replace(PROMPTED, adapter_id="none"),)),
    ):
        with pytest.raises(ModelNotFound):
            await client.draw(replace(SD, conditions=unknown))


async def test_the_command_takes_pictures(client: Client, tmp_path: Path, cluster: LocalCluster) -> None:
    (tmp_path / "in.png").write_bytes(file(picture(21, size=(50, 40))))
    drawn = await client.draw(replace(SD, conditions=ConditionFiles(ip_adapters=(PROMPTED,))))
    command = [
        *(str(Path(sys.executable).parent / "darkroom"), "run", SD.prompt, "-o", str(tmp_path / "out.png")),
        *("--model", "tiny-sd", "--size", f"{SIZE_PX}x{SIZE_PX}", "--steps", "6", "--guidance", "4", "--seed", "3"),
        *("--negative", NEGATIVE, "--deterministic", "--router", cluster.addresses.router),
    ]

    async def run(*options: str) -> int:
        process = await asyncio.create_subprocess_exec(*command, *options, cwd=tmp_path)
        return await process.wait()

    assert await run("--ip-adapter", "ip-sd-plus:0.7=in.png") == 0
    assert np.array_equal(pixels((tmp_path / "out.png").read_bytes()), pixels(drawn.images[0]))
    assert await run("--ip-adapter", "ip-sd-plus") == 2
    assert await run("--image", "none.png") == 2


@asynccontextmanager
async def denoiser(cluster: LocalCluster, store: Path, *flags: str) -> AsyncIterator[None]:
    """One more denoiser process, that ends well on SIGTERM."""
    command = [sys.executable, "-m", "services.denoiser", "--etcd", cluster.addresses.etcd, "--model-store", str(store)]
    process = await asyncio.create_subprocess_exec(*command, *flags, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield
    finally:
        process.terminate()
        assert await process.wait() == 0


async def replica_at(client: Client, stage: str, known: set[str]) -> str:
    """Address of the replica of the stage that is not known yet."""
    async with asyncio.timeout(60):
        while True:
            for report in await client.replicas():
                if report.listed.replica_id.startswith(f"{stage}-") and report.listed.address not in known:
                    return report.listed.address
            await asyncio.sleep(0.2)


async def test_controlnets_as_a_service_are_a_flag_and_change_nothing(
    client: Client, cluster: LocalCluster, store: Path
) -> None:
    encoded = encoder_pb2.EncodeRequest(model_id="tiny-sd", prompt="a ring", guided=True, deterministic=True)
    known = {report.listed.address for report in await client.replicas()}
    addresses = {report.listed.replica_id.split("-")[0]: report.listed.address for report in await client.replicas()}
    request = denoiser_pb2.DenoiseRequest(
        model_id="tiny-sd", width_px=SIZE_PX, height_px=SIZE_PX, step_count=5, guidance_scale=4.0, seed=1,
        image_count=1, deterministic=True,
        controls=[{"controlnet_id": "control-sd", "image": CONTROL.image, "scale": 0.8}],
    )  # fmt: skip

    async def latents(address: str) -> str:
        """Their digest."""
        async with grpc.aio.insecure_channel(address) as channel:
            events = denoiser_pb2_grpc.DenoiserServiceStub(channel).Denoise(request, timeout=60)
            finished = [event.result.latents async for event in events if event.HasField("result")]
            by_ref = finished[0].HasField("ref")
            return finished[0].ref.digest if by_ref else hashlib.sha256(finished[0].data).hexdigest()

    async with grpc.aio.insecure_channel(addresses["encoder"]) as channel:
        answer = await encoder_pb2_grpc.EncoderServiceStub(channel).Encode(encoded, timeout=60)
        request.embeddings.extend(answer.embeddings)
    here = await latents(addresses["denoiser"])
    async with (
        denoiser(cluster, store, "--controlnets-only", "true"),
        denoiser(cluster, store, "--remote-controlnets", "true"),
    ):
        holder = await replica_at(client, "controlnet", known)
        elsewhere = await replica_at(client, "denoiser", {*known, holder})
        assert await latents(elsewhere) == here
        states = {report.listed.address: report.state for report in await client.replicas()}
        assert {address: resident(states[address]) for address in (holder, elsewhere)} == {
            holder: {"controlnet"},
            elsewhere: {"unet"},
        }


def resident(state: object) -> set[str]:
    """Names of the networks whose weights a replica holds."""
    models = state.models  # type: ignore[attr-defined]
    return {network.name for model in models for network in model.networks if network.resident_bytes}
