"""What a stage is asked to do, as checked values: the requests of the stages' services without protobuf."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from darkroom.errors import InvalidField, InvalidTensor
from darkroom.schedulers import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS
from darkroom.v1 import denoiser_pb2, encoder_pb2, lora_pb2, stage_pb2, tensor_pb2, vae_pb2
from darkroom.wire import fields
from darkroom.wire.checkpoints import Checkpoint, parse_checkpoint
from darkroom.wire.conditions import MAX_CONTROLS, NO_CONDITIONS, ConditionFiles, parse_conditions
from darkroom.wire.tensors import RawTensor, RemoteTensor, digest_of, parse_tensor

_ALL_SCHEDULERS = (*DIFFUSION_SCHEDULERS, *FLOW_SCHEDULERS)
_MAX_EMBEDDINGS = 16
_MAX_SOLVER_STEPS = 2 * fields.MAX_STEPS  # solvers of second order take two for each that is asked for
_MAX_EPOCH = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class LoraUse:
    """A LoRA as a request asks for it."""

    lora_id: str
    scale: float
    """Factor of what it adds; 1 is as trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """One prompt to encode, with its negative."""

    request_id: str
    model_id: str
    prompt: str
    negative_prompt: str
    guided: bool
    deterministic: bool
    loras: tuple[LoraUse, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiseTask:
    """One request's latents to denoise."""

    request_id: str
    model_id: str
    embeddings: dict[str, RawTensor | RemoteTensor]
    width_px: int
    height_px: int
    step_count: int
    guidance_scale: float
    seed: int
    image_count: int
    scheduler: str
    deterministic: bool
    checkpoint_interval: int = 0
    checkpoint: Checkpoint | None = None
    from_step: int = 0
    to_step: int | None = None
    run_id: str = ""
    epoch: int = 0
    priority: int = 0
    tenant: str = ""
    loras: tuple[LoraUse, ...] = ()
    step_cache_threshold: float = 0.0
    preview_interval: int = 0
    frame_count: int = 0
    conditions: ConditionFiles = NO_CONDITIONS

    @property
    def digest(self) -> str:
        """Equal for attempts at the same latents; embeddings count by name only, as they may have been made again."""
        content = [
            self.model_id,
            sorted(self.embeddings),
            [self.width_px, self.height_px, self.image_count, self.frame_count],
            [self.step_count, self.to_step, self.scheduler, self.guidance_scale, self.seed],
            [[use.lora_id, use.scale] for use in self.loras],
            self.step_cache_threshold,
            self.conditions.digests(),
        ]
        return digest_of(json.dumps(content).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTask:
    """Latents to decode into image files."""

    request_id: str
    model_id: str
    latents: RawTensor | RemoteTensor
    width_px: int
    height_px: int
    parameters: dict[str, str]
    deterministic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareTask:
    """What a request will need; hints of several requests may be equal."""

    request_id: str = field(compare=False)
    model_id: str
    loras: tuple[LoraUse, ...] = ()
    controlnet_ids: tuple[str, ...] = ()


def parse_encode(message: encoder_pb2.EncodeRequest) -> EncodeTask:
    """Raises InvalidField."""
    return EncodeTask(
        request_id=fields.check_request_id(message.request_id),
        model_id=fields.check_model_id(message.model_id),
        prompt=fields.check_prompt(message.prompt),
        negative_prompt=fields.check_negative_prompt(message.negative_prompt),
        guided=message.guided,
        deterministic=message.deterministic,
        loras=parse_loras(message.loras),
    )


def parse_denoise(message: denoiser_pb2.DenoiseRequest) -> DenoiseTask:
    """Raises InvalidField or InvalidTensor."""
    width_px, height_px = fields.check_size(message.width_px, message.height_px, 1)
    image_count = fields.check_count("image_count", message.image_count, fields.MAX_IMAGES)
    fields.check_pixels(width_px, height_px, image_count)
    return DenoiseTask(
        request_id=fields.check_request_id(message.request_id),
        model_id=fields.check_model_id(message.model_id),
        embeddings=_parse_embeddings(list(message.embeddings)),
        width_px=width_px,
        height_px=height_px,
        step_count=fields.check_count("step_count", message.step_count, fields.MAX_STEPS),
        guidance_scale=fields.check_guidance_scale(message.guidance_scale),
        seed=fields.check_seed(message.seed, image_count),
        image_count=image_count,
        scheduler=fields.check_scheduler(message.scheduler, _ALL_SCHEDULERS),
        deterministic=message.deterministic,
        checkpoint_interval=fields.check_range("checkpoint_interval", message.checkpoint_interval, 0, fields.MAX_STEPS),
        checkpoint=parse_checkpoint(message.checkpoint) if message.HasField("checkpoint") else None,
        from_step=_parse_from_step(message),
        to_step=_parse_to_step(message),
        run_id=fields.check_request_id(message.run_id, "run_id") if message.run_id else "",
        epoch=fields.check_range("epoch", message.epoch, 0, _MAX_EPOCH),
        priority=fields.check_priority(message.priority),
        tenant=fields.check_tenant(message.tenant),
        loras=parse_loras(message.loras),
        step_cache_threshold=fields.check_step_cache_threshold(message.step_cache_threshold),
        preview_interval=fields.check_range("preview_interval", message.preview_interval, 0, fields.MAX_STEPS),
        frame_count=fields.check_range("frame_count", message.frame_count, 0, fields.MAX_FRAMES),
        conditions=parse_conditions(message),
    )


def parse_loras(
    messages: Iterable[lora_pb2.Lora], default_scale: Callable[[str], float] = lambda _: 1.0
) -> tuple[LoraUse, ...]:
    """LoRAs as a request gives them; `default_scale` is asked for what says none. Raises InvalidField."""
    uses = []
    for position, message in enumerate(messages):
        field = f"loras[{position}]"
        if position >= fields.MAX_LORAS:
            raise InvalidField("loras", f"must be at most {fields.MAX_LORAS}")
        scale = message.scale if message.HasField("scale") else default_scale(message.lora_id)
        uses.append(
            LoraUse(
                fields.check_model_id(message.lora_id, f"{field}.lora_id"),
                fields.check_lora_scale(scale, f"{field}.scale"),
            )
        )
    return tuple(uses)


def _parse_from_step(message: denoiser_pb2.DenoiseRequest) -> int:
    from_step = fields.check_range("from_step", message.from_step, 0, _MAX_SOLVER_STEPS)
    if from_step and not message.HasField("checkpoint"):
        raise InvalidField("from_step", "needs a checkpoint to go on from")
    return from_step


def _parse_to_step(message: denoiser_pb2.DenoiseRequest) -> int | None:
    to_step = fields.check_range("to_step", message.to_step, 0, _MAX_SOLVER_STEPS)
    done = message.checkpoint.step if message.HasField("checkpoint") else 0
    if to_step and to_step < done:
        raise InvalidField("to_step", f"must not be before the checkpoint's step, {done}, as {to_step} is")
    if to_step and to_step == message.from_step:
        raise InvalidField("to_step", f"must be past from_step, {message.from_step}, not {to_step}")
    return to_step or None


def lora_messages(uses: Iterable[LoraUse]) -> list[lora_pb2.Lora]:
    """LoRAs as they travel."""
    return [lora_pb2.Lora(lora_id=use.lora_id, scale=use.scale) for use in uses]


def parse_decode(message: vae_pb2.DecodeRequest) -> DecodeTask:
    """Raises InvalidField or InvalidTensor."""
    if message.format != vae_pb2.IMAGE_FORMAT_PNG:
        raise InvalidField("format", "must be IMAGE_FORMAT_PNG")
    width_px, height_px = fields.check_size(message.width_px, message.height_px, 1)
    return DecodeTask(
        request_id=fields.check_request_id(message.request_id),
        model_id=fields.check_model_id(message.model_id),
        latents=parse_tensor("latents", message.latents),
        width_px=width_px,
        height_px=height_px,
        parameters=fields.check_parameters(dict(message.parameters)),
        deterministic=message.deterministic,
    )


def parse_prepare(message: stage_pb2.PrepareRequest) -> PrepareTask:
    """Raises InvalidField."""
    if len(message.controlnet_ids) > MAX_CONTROLS:
        raise InvalidField("controlnet_ids", f"must be at most {MAX_CONTROLS}, not {len(message.controlnet_ids)}")
    return PrepareTask(
        request_id=fields.check_request_id(message.request_id),
        model_id=fields.check_model_id(message.model_id),
        loras=parse_loras(message.loras),
        controlnet_ids=tuple(
            fields.check_model_id(controlnet_id, f"controlnet_ids[{position}]")
            for position, controlnet_id in enumerate(message.controlnet_ids)
        ),
    )


def _parse_embeddings(messages: list[tensor_pb2.NamedTensor]) -> dict[str, RawTensor | RemoteTensor]:
    if not messages:
        raise InvalidField("embeddings", "must not be empty")
    if len(messages) > _MAX_EMBEDDINGS:
        raise InvalidField("embeddings", f"must be at most {_MAX_EMBEDDINGS}, not {len(messages)}")
    parsed: dict[str, RawTensor | RemoteTensor] = {}
    for message in messages:
        if message.name in parsed:
            raise InvalidTensor(message.name[:64], "is given twice")
        parsed[message.name] = parse_tensor(message.name[:64], message.tensor)
    return parsed
