"""The cache manager's answers as messages, and operators' wishes from theirs."""

from google.protobuf.timestamp_pb2 import Timestamp

from darkroom.policy.cacheplan import CachePlan
from darkroom.policy.planning import Pin, Wish
from darkroom.policy.scaling import Site
from darkroom.policy.worth import Tier
from darkroom.registry.catalogue import GuideEntry, LoraEntry, ModelEntry
from darkroom.v1 import cachemgr_pb2
from darkroom.wire import fields
from darkroom.wire.times import duration
from darkroom.wire.usage import stage_name
from services.cachemgr.holdings import Asked, Holding

_MAX_COPIES = 1000
_TIERS = {
    cachemgr_pb2.TIER_UNSPECIFIED: Tier.DEVICE,
    cachemgr_pb2.TIER_DEVICE: Tier.DEVICE,
    cachemgr_pb2.TIER_HOST: Tier.HOST,
    cachemgr_pb2.TIER_DISK: Tier.DISK,
}


def parse_prefetch(message: cachemgr_pb2.PrefetchRequest, until_s: float) -> Wish:
    """The wish, checked. Raises InvalidField."""
    fields.check_range("tier", message.tier, min(_TIERS), max(_TIERS))
    return Wish(
        model_id=fields.check_model_id(message.model_id),
        until_s=until_s,
        tier=_TIERS[message.tier],
        stage=_stage(message.stage),
        replica_id=_replica_id(message.replica_id),
        copies=fields.check_range("copy_count", message.copy_count, 0, _MAX_COPIES) or 1,
    )


def parse_drop(message: cachemgr_pb2.DropRequest, until_s: float) -> Wish:
    """The wish, checked. Raises InvalidField."""
    return Wish(
        model_id=fields.check_model_id(message.model_id),
        until_s=until_s,
        is_drop=True,
        stage=_stage(message.stage),
        replica_id=_replica_id(message.replica_id),
    )


def parse_pin(message: cachemgr_pb2.PinRequest) -> Pin:
    """The pin, checked. Raises InvalidField."""
    copies = fields.check_range("copy_count", message.copy_count, 0, _MAX_COPIES)
    return Pin(model_id=fields.check_model_id(message.model_id), copies=copies or None)


def _stage(value: int) -> str | None:
    return stage_name(value) if value else None


def _replica_id(value: str) -> str | None:
    return fields.check_replica_id(value) if value else None


def replica_message(holding: Holding) -> cachemgr_pb2.Replica:
    """A replica with what it has."""
    member = holding.member
    return cachemgr_pb2.Replica(
        replica_id=member.replica_id,
        stage=f"STAGE_{member.stage.upper()}",
        address=member.address,
        device=member.device,
        model_ids=holding.model_ids,
        residences=[
            cachemgr_pb2.Residence(
                model_id=model_id,
                device_bytes=residence.device_bytes,
                host_bytes=residence.host_bytes,
                disk_bytes=residence.disk_bytes,
                problem=residence.problem,
            )
            for model_id, residence in holding.residences.items()
        ],
    )


def plan_message(plan: CachePlan) -> cachemgr_pb2.Plan:
    """The plan, without what only stages read."""
    return cachemgr_pb2.Plan(
        term=plan.term,
        version=plan.version,
        orders=[
            cachemgr_pb2.Order(
                replica_id=order.replica_id,
                model_id=order.model_id,
                tier=f"TIER_{order.tier.name}",
                reason=order.reason,
                expire_time=_time(order.until_s),
                done=order.is_done,
            )
            for order in plan.orders
        ],
        releases=[
            cachemgr_pb2.Release(
                replica_id=release.replica_id, model_id=release.model_id, expire_time=_time(release.until_s)
            )
            for release in plan.releases
        ],
        keeps=[cachemgr_pb2.Keep(replica_id=pin.replica_id, model_id=pin.model_id) for pin in plan.pinned],
    )


def popularity_message(asked: Asked) -> cachemgr_pb2.Popularity:
    """How much a model is asked for."""
    return cachemgr_pb2.Popularity(
        model_id=asked.model_id,
        band=f"BAND_{asked.band.name}",
        rate=asked.rate,
        sites=[_site(stage, site) for stage, site in asked.sites],
    )


def _site(stage: str, site: Site) -> cachemgr_pb2.Site:
    return cachemgr_pb2.Site(
        stage=f"STAGE_{stage.upper()}",
        machine=site.machine,
        replica_id=site.replica_id or "",
        warm_duration=duration(site.warm_s),
        reason=site.reason,
    )


def pin_message(pin: Pin) -> cachemgr_pb2.PinnedModel:
    """A pin."""
    return cachemgr_pb2.PinnedModel(model_id=pin.model_id, copy_count=pin.copies or 0)


def lora_message(entry: LoraEntry) -> cachemgr_pb2.LoraModel:
    """A LoRA of the catalogue."""
    return cachemgr_pb2.LoraModel(
        lora_id=entry.lora_id,
        base_model_id=entry.base_model or "",
        default_scale=entry.default_scale,
        size_bytes=entry.size_bytes,
    )


def guide_message(entry: GuideEntry) -> cachemgr_pb2.GuideModel:
    """A ControlNet or IP-Adapter of the catalogue."""
    return cachemgr_pb2.GuideModel(
        guide_id=entry.guide_id,
        role=f"ROLE_{entry.role.upper()}",
        pipelines=entry.pipelines,
        base_model_id=entry.base_model or "",
        size_bytes=entry.size_bytes,
    )


def model_message(entry: ModelEntry) -> cachemgr_pb2.Model:
    """A model of the catalogue."""
    return cachemgr_pb2.Model(
        model_id=entry.model_id,
        pipeline=entry.pipeline,
        components=[cachemgr_pb2.Component(name=c.name, size_bytes=c.size_bytes) for c in entry.components],
        schedulers=entry.schedulers,
        default_width_px=entry.default_width_px,
        default_height_px=entry.default_height_px,
        size_multiple_px=entry.size_multiple_px,
        default_step_count=entry.default_step_count,
        default_guidance_scale=entry.default_guidance_scale,
    )


def _time(unix_s: float) -> Timestamp:
    message = Timestamp()
    message.FromMilliseconds(round(unix_s * 1000))
    return message
