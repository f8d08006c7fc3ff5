"""The cost curve of a model's UNet, in a process of its own: seconds of one forward, by the rows of its batch."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import AutoConfig

from bench.worker import Answer, Question, answer_lines, worker_flags

_WARM_UP_COUNT = 3


class CostProbe:
    """A UNet as the denoiser stage holds it, called with noise."""

    def __init__(self, folder: Path, device: str) -> None:
        self._device = torch.device(device)
        self._unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype="auto", local_files_only=True)
        self._unet = self._unet.to(self._device).eval()
        self._token_count = _token_count(folder)

    def measure(self, question: Question) -> Answer:
        """Median seconds of a forward of `rows` rows, over `window_s` seconds."""
        arguments = self._arguments(question["rows"])
        for _ in range(_WARM_UP_COUNT):
            self._forward_s(arguments)
        times: list[float] = []
        end_s = time.monotonic() + question["window_s"]
        while not times or time.monotonic() < end_s:
            times.append(self._forward_s(arguments))
        return {"forward_s": statistics.median(times), "count": len(times)}

    def _arguments(self, rows: int) -> dict[str, Any]:
        config = self._unet.config
        side, dtype = config.sample_size, self._unet.dtype
        return {
            "sample": torch.randn(rows, config.in_channels, side, side, dtype=dtype, device=self._device),
            "timestep": torch.full((rows,), 500, device=self._device),
            "encoder_hidden_states": torch.randn(
                rows, self._token_count, config.cross_attention_dim, dtype=dtype, device=self._device
            ),
            "return_dict": False,
        }

    def _forward_s(self, arguments: dict[str, Any]) -> float:
        start_s = time.perf_counter()
        self._unet(**arguments)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start_s


def _token_count(folder: Path) -> int:
    return int(AutoConfig.from_pretrained(folder / "text_encoder").max_position_embeddings)


if __name__ == "__main__":
    given = worker_flags(__doc__)
    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        answer_lines(CostProbe(given.folder, given.device).measure)
