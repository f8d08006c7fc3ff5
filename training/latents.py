"""Latents of drawn scenes, made once and kept on disk: what every denoiser of the family learns from.

They come in shards, each drawn from its own number, so that a longer training adds to what a shorter one made. A
folder is named after the VAE's encoder: another encoder never meets these latents.
"""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.scenes import Scene, draw_all, random_scenes
from training.vae import encode_all

SHARD_COUNT = 2000
_FIRST_SEED = 10_000


@dataclass(frozen=True, slots=True)
class Latents:
    """Scenes and their latents, in the same order."""

    scenes: list[Scene]
    latents: torch.Tensor
    """[N, 4, 16, 16] half precision, scaled to unit deviation."""

    def mostly_easy(self, hard_share: float) -> "Latents":
        """All scenes of one object, and the first of two, so many that they are `hard_share` of the whole."""
        easy = [row for row, scene in enumerate(self.scenes) if not scene.is_hard]
        hard = [row for row, scene in enumerate(self.scenes) if scene.is_hard]
        rows = easy + hard[: round(len(easy) * hard_share / (1 - hard_share))]
        return Latents([self.scenes[row] for row in rows], self.latents[rows])

    def take(self, count: int, rng: random.Random) -> tuple[list[Scene], torch.Tensor]:
        """Random scenes and their latents [count, 4, 16, 16] float32, channels last."""
        rows = [rng.randrange(len(self.scenes)) for _ in range(count)]
        latent_BCHW = self.latents[rows].float().contiguous(memory_format=torch.channels_last)
        return [self.scenes[row] for row in rows], latent_BCHW


def load_latents(vae: AutoencoderKL, folder: Path, count: int, style: str = "flat") -> Latents:
    """The first `count` scenes, a whole number of shards; makes the shards that `folder` does not hold yet."""
    home = folder / f"latents-{_digest(vae)}" / style
    home.mkdir(parents=True, exist_ok=True)
    scenes: list[Scene] = []
    parts: list[torch.Tensor] = []
    for index in range(-(-count // SHARD_COUNT)):
        path = home / f"{index:03}.pt"
        if not path.exists():
            torch.save(_make_shard(vae, index, style), path)
        scenes += random_scenes(SHARD_COUNT, _FIRST_SEED + index)
        parts.append(torch.load(path, weights_only=True))
    return Latents(scenes, torch.cat(parts))


def _make_shard(vae: AutoencoderKL, index: int, style: str) -> torch.Tensor:
    """Draws and encodes one shard: [SHARD_COUNT, 4, 16, 16] half precision."""
    seed = _FIRST_SEED + index
    pictures = torch.from_numpy(draw_all(random_scenes(SHARD_COUNT, seed), seed, style))
    scale: float = vae.config.scaling_factor
    return (encode_all(vae, pictures) * scale).half()


def _digest(vae: AutoencoderKL) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for _, tensor in sorted(vae.encoder.state_dict().items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
