"""Calls to stage replicas over gRPC: values out, values in, errors as DarkroomError."""

from collections.abc import Mapping

import grpc
import structlog

from darkroom.runtime.channels import Channels
from darkroom.v1 import (
    denoiser_pb2,
    denoiser_pb2_grpc,
    encoder_pb2,
    encoder_pb2_grpc,
    stage_pb2,
    stage_pb2_grpc,
    tensor_pb2,
    vae_pb2,
    vae_pb2_grpc,
)
from darkroom.wire.conditions import fill
from darkroom.wire.graphs import DecodeWork, DenoiseWork, EncodeTextWork, Node
from darkroom.wire.status import from_rpc_error
from darkroom.wire.tasks import lora_messages
from darkroom.wire.tensors import parse_tensor, tensor_message
from darkroom.wire.times import seconds
from services.router.attempts import Attempts
from services.router.calls import CallSettings, Preparation
from services.router.values import Answer, CheckpointMessage, Embedding, ImageFile, Images, Latent, StepDone, Value

_CHECKPOINT_INTERVAL = 5
"""Steps that a dead denoiser may cost where a checkpoint is larger than 1 MiB; smaller ones come with every step."""
_log = structlog.get_logger()


class GrpcStages:
    """The stage replicas, reached by address."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels

    async def call(
        self, address: str, node: Node, inputs: Mapping[str, Value], settings: CallSettings, attempts: Attempts
    ) -> Answer:
        """Runs a node's work at `address`. Raises what it raised; StageUnavailable when the connection breaks."""
        channel = self._channels.to(address)
        try:
            match node.work:
                case EncodeTextWork() as work:
                    return await _encode(channel, work, settings)
                case DenoiseWork() as work:
                    return await _denoise(channel, work, inputs, settings, attempts)
                case DecodeWork() as work:
                    latent = inputs["latent"]
                    assert isinstance(latent, Latent)
                    return await _decode(channel, work, latent, settings)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, node.stage) or error from error

    async def prepare(self, address: str, node: Node, settings: CallSettings) -> Preparation:
        """Has the replica load what a node needs. Raises what it raised, or StageUnavailable, and no other error."""
        stub = stage_pb2_grpc.StageServiceStub(self._channels.to(address))
        try:
            response = await stub.Prepare(_prepare_request(node, settings), timeout=settings.timeout_s())
        except grpc.aio.AioRpcError as error:
            if known := from_rpc_error(error, node.stage):
                raise known from error
            _log.info("prepare_unheard", stage=node.stage, address=address, code=error.code().name)
            return Preparation.UNHEARD
        return Preparation.FOUND if response.found else Preparation.LOADED


def _prepare_request(node: Node, settings: CallSettings) -> stage_pb2.PrepareRequest:
    work = node.work
    return stage_pb2.PrepareRequest(
        request_id=settings.request_id,
        model_id=work.model_id,
        loras=() if isinstance(work, DecodeWork) else lora_messages(work.loras),
        controlnet_ids=[use.controlnet_id for use in work.conditions.controls] if isinstance(work, DenoiseWork) else (),
    )


async def _encode(channel: grpc.aio.Channel, work: EncodeTextWork, settings: CallSettings) -> Answer:
    request = encoder_pb2.EncodeRequest(
        request_id=settings.request_id,
        model_id=work.model_id,
        prompt=work.prompt,
        negative_prompt=work.negative_prompt,
        guided=work.guided,
        deterministic=settings.deterministic,
        loras=lora_messages(work.loras),
    )
    response = await encoder_pb2_grpc.EncoderServiceStub(channel).Encode(request, timeout=settings.timeout_s())
    tensors = {named.name: parse_tensor(named.name, named.tensor) for named in response.embeddings}
    return Answer(Embedding(tensors), seconds(response.run_duration))


async def _denoise(
    channel: grpc.aio.Channel,
    work: DenoiseWork,
    inputs: Mapping[str, Value],
    settings: CallSettings,
    attempts: Attempts,
) -> Answer:
    embedding, before = inputs["embedding"], inputs.get("latent")
    assert isinstance(embedding, Embedding)
    assert before is None or isinstance(before, Latent)
    takes_over = before is not None and attempts.checkpoint is None
    request = denoiser_pb2.DenoiseRequest(
        request_id=settings.request_id,
        model_id=work.model_id,
        embeddings=[
            tensor_pb2.NamedTensor(name=name, tensor=tensor_message(tensor))
            for name, tensor in embedding.tensors.items()
        ],
        width_px=work.width_px,
        height_px=work.height_px,
        step_count=work.step_count,
        guidance_scale=work.guidance_scale,
        seed=work.seed,
        image_count=work.image_count,
        scheduler=work.scheduler,
        deterministic=settings.deterministic,
        checkpoint_interval=_CHECKPOINT_INTERVAL,
        checkpoint=before.checkpoint if before is not None and takes_over else attempts.checkpoint,
        from_step=work.from_step if takes_over else 0,
        to_step=work.to_step,
        run_id=attempts.run_id,
        epoch=attempts.epoch,
        priority=settings.priority,
        tenant=settings.tenant,
        loras=lora_messages(work.loras),
        step_cache_threshold=work.step_cache_threshold,
        preview_interval=work.preview_interval,
        frame_count=work.frame_count,
    )
    fill(request, work.conditions)
    result = denoiser_pb2.DenoiseResult()
    async for event in denoiser_pb2_grpc.DenoiserServiceStub(channel).Denoise(request, timeout=settings.timeout_s()):
        attempts.hear()
        if event.HasField("progress"):
            done = event.progress
            checkpoint = CheckpointMessage(done.checkpoint) if done.HasField("checkpoint") else None
            previews = tuple(preview.data for preview in done.previews)
            attempts.step(StepDone(done.step, done.step_count, previews), checkpoint)
        elif event.HasField("result"):
            result = event.result
    latent = Latent(
        tensor=parse_tensor("latents", result.latents),
        width_px=work.width_px,
        height_px=work.height_px,
        batched_forward_count=result.batched_forward_count,
        cached_forward_count=result.cached_forward_count,
        checkpoint=attempts.checkpoint if work.to_step else None,
    )
    return Answer(latent, seconds(result.run_duration))


async def _decode(channel: grpc.aio.Channel, work: DecodeWork, latent: Latent, settings: CallSettings) -> Answer:
    request = vae_pb2.DecodeRequest(
        request_id=settings.request_id,
        model_id=work.model_id,
        latents=tensor_message(latent.tensor),
        width_px=latent.width_px,
        height_px=latent.height_px,
        format=vae_pb2.IMAGE_FORMAT_PNG,
        parameters=work.parameters,
        deterministic=settings.deterministic,
    )
    response = await vae_pb2_grpc.VaeServiceStub(channel).Decode(request, timeout=settings.timeout_s())
    files = tuple(ImageFile(image.data, image.width_px, image.height_px) for image in response.images)
    return Answer(Images(files), seconds(response.run_duration))
