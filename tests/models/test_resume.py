"""Stopped after any step and gone on with in another process, a request ends in the same latents, bit for bit."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.denoise_runs import Asked, OtherProcess, Run, run

_NEEDS_TORCHSDE = {"DPMSolverSDEScheduler"}
SOLVERS = sorted({kind.name for kind in KarrasDiffusionSchedulers} - _NEEDS_TORCHSDE | {"LCMScheduler", "TCDScheduler"})
VARIANTS = (
    ("DPMSolverMultistepScheduler", '{"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": true}'),
    ("DPMSolverMultistepScheduler", '{"solver_order": 3, "thresholding": true}'),
    ("UniPCMultistepScheduler", '{"solver_order": 3}'),
    ("EulerDiscreteScheduler", '{"use_karras_sigmas": true}'),
    ("DDIMScheduler", '{"set_alpha_to_one": false, "timestep_spacing": "trailing"}'),
)
FLOW_SOLVERS = (
    ("FlowMatchEulerDiscreteScheduler", "{}"),
    ("FlowMatchEulerDiscreteScheduler", '{"stochastic_sampling": true}'),
    ("FlowMatchHeunDiscreteScheduler", "{}"),
    ("FlowMatchLCMScheduler", "{}"),
    ("UniPCMultistepScheduler", '{"prediction_type": "flow_prediction", "use_flow_sigmas": true}'),
    ("DPMSolverMultistepScheduler", '{"prediction_type": "flow_prediction", "use_flow_sigmas": true}'),
)
CASES = [
    *(Asked(solver=name) for name in SOLVERS),
    *(Asked(solver=name, options=options) for name, options in VARIANTS),
    *(Asked(model_id="tiny-sd3", solver=name, options=options) for name, options in FLOW_SOLVERS),
    Asked(model_id="tiny-flux"),
    Asked(model_id="tiny-sdxl"),
    Asked(solver="EulerAncestralDiscreteScheduler", image_count=3),
    Asked(guidance_scale=1.0),
]


@pytest.fixture(scope="module")
def other_process(tiny_store: Path) -> Iterator[OtherProcess]:
    with OtherProcess(tiny_store) as process:
        yield process


@cache
def whole(store: Path, asked: Asked) -> Run:
    return run(store, asked)


@pytest.mark.parametrize("asked", CASES, ids=lambda asked: f"{asked.model_id}-{asked.solver}-{asked.options}")
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_stopped_anywhere_goes_on_in_another_process_bit_for_bit(
    tiny_store: Path, other_process: OtherProcess, asked: Asked, data: st.DataObject
) -> None:
    complete = whole(tiny_store, asked)
    step = data.draw(st.sampled_from(sorted(complete.checkpoints)))
    rest = other_process.run(asked, complete.checkpoints[step])
    assert torch.equal(rest.latents, complete.latents)
    per_step = complete.forwards / len(complete.checkpoints)
    assert rest.forwards == complete.forwards - step * per_step


def test_a_checkpoint_of_a_resumed_run_is_as_good(tiny_store: Path) -> None:
    asked = Asked(solver="DPMSolverMultistepScheduler")
    complete = whole(tiny_store, asked)
    second = run(tiny_store, asked, complete.checkpoints[3])
    third = run(tiny_store, asked, second.checkpoints[6])
    assert torch.equal(third.latents, complete.latents)
    assert third.forwards == 2
