"""What a local cluster tells its services: what was asked for, so that the environment says the rest."""

from pathlib import Path

import pytest

from darkroom.runtime.cluster import ClusterConfig, cachemgr_flags, denoiser_flags, stage_flags
from darkroom.runtime.config import read_config
from darkroom.runtime.stage import budget_of, memory_of, rooms_of
from services.cachemgr.config import CacheManagerConfig
from services.denoiser.config import DenoiserConfig

_GIB = 1 << 30


def stage_of(config: ClusterConfig, **environment: str) -> DenoiserConfig:
    """What a denoiser of such a cluster reads."""
    variables = {f"DARKROOM_{name.upper()}": value for name, value in environment.items()}
    return read_config(DenoiserConfig, program="denoiser", arguments=denoiser_flags(config), environment=variables)


def test_what_a_cluster_is_not_asked_for_the_environment_says(tmp_path: Path) -> None:
    said = stage_of(
        ClusterConfig(model_store=tmp_path),
        device_budget_bytes="8GiB",
        eviction="lru",
        host_cache_bytes="1GiB",
        pool_bytes="2GiB",
        store_cache=str(tmp_path / "cache"),
        store_cache_bytes="3GiB",
        merged_pairs="7",
        preload="shapes",
    )
    assert said.merged_pairs == 7
    assert (said.device_budget_bytes, said.eviction, said.preload) == (8 * _GIB, "lru", ("shapes",))
    assert (said.host_cache_bytes, said.pool_bytes, said.store_cache_bytes) == (_GIB, 2 * _GIB, 3 * _GIB)
    assert said.store_cache == tmp_path / "cache"


def test_what_a_cluster_is_asked_for_beats_the_environment(tmp_path: Path) -> None:
    config = ClusterConfig(
        model_store=tmp_path,
        device_budget_bytes=0,
        eviction="worth",
        host_cache_bytes=5,
        pool_bytes=6,
        store_cache=tmp_path / "asked",
        store_cache_bytes=7,
        merged_pairs=0,
    )
    said = stage_of(
        config,
        device_budget_bytes="9",
        eviction="lru",
        host_cache_bytes="9",
        pool_bytes="9",
        store_cache_bytes="9",
        merged_pairs="9",
    )
    assert said.merged_pairs == 0
    assert (said.device_budget_bytes, said.eviction) == (0, "worth")
    assert (said.host_cache_bytes, said.pool_bytes, said.store_cache_bytes) == (5, 6, 7)
    assert said.store_cache == tmp_path / "asked"


def test_cache_managers_are_told_in_the_same_way(tmp_path: Path) -> None:
    for asked, variable, said in ((None, "true", True), (False, "true", False), (True, "false", True)):
        flags = cachemgr_flags(ClusterConfig(model_store=tmp_path, hour_prefetch=asked))
        environment = {"DARKROOM_HOUR_PREFETCH": variable}
        config = read_config(CacheManagerConfig, program="cachemgr", arguments=flags, environment=environment)
        assert config.hour_prefetch is said
        assert str(config.model_store) == str(tmp_path)


@pytest.mark.parametrize("name", ["device_budget_bytes", "host_cache_bytes", "pool_bytes", "store_cache_bytes"])
def test_a_cluster_of_negative_size_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative, not -1"):
        ClusterConfig(model_store=tmp_path, **{name: -1})  # type: ignore[arg-type] # which of them, pytest knows


def test_pairs_are_merged_by_denoisers_alone_and_at_most_fifty(tmp_path: Path) -> None:
    config = ClusterConfig(model_store=tmp_path, merged_pairs=50)
    assert stage_of(config).merged_pairs == 50
    assert "--merged-pairs" not in stage_flags(config)
    for count in (-1, 51):
        for kind in (ClusterConfig, DenoiserConfig):
            with pytest.raises(ValueError, match=f"merged_pairs must be 0 to 50, not {count}"):
                kind(model_store=tmp_path, merged_pairs=count)


def test_a_gpu_is_bounded_below_its_memory_unless_told_otherwise_and_a_cpu_is_not(tmp_path: Path) -> None:
    gpu, cpu = DenoiserConfig(model_store=tmp_path, device="cuda:0"), DenoiserConfig(model_store=tmp_path)
    assert 0.75 * _GIB < budget_of(gpu, _GIB) < 0.85 * _GIB
    assert budget_of(cpu, _GIB) == 0
    for bound in (0, 5):
        asked = DenoiserConfig(model_store=tmp_path, device="cuda:0", device_budget_bytes=bound)
        assert budget_of(asked, _GIB) == bound
    rooms = rooms_of(cpu, budget_bytes=0)
    assert not rooms.evicts
    assert 0 < rooms.device_bytes < memory_of("cpu") / 8
    assert rooms_of(gpu, budget_bytes=_GIB).evicts
    assert rooms_of(gpu, budget_bytes=_GIB).device_bytes == _GIB
