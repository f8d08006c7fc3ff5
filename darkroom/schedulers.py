"""The schedulers a request may name, and what each is in diffusers. Data only: every service can check a name."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerChoice:
    """A diffusers scheduler class and the options that make it what its name says."""

    class_name: str
    options: tuple[tuple[str, object], ...] = ()


DIFFUSION_SCHEDULERS = {
    "ddim": SchedulerChoice("DDIMScheduler"),
    "ddpm": SchedulerChoice("DDPMScheduler"),
    "deis": SchedulerChoice("DEISMultistepScheduler"),
    "dpmpp_2m": SchedulerChoice("DPMSolverMultistepScheduler"),
    "dpmpp_2m_karras": SchedulerChoice("DPMSolverMultistepScheduler", (("use_karras_sigmas", True),)),
    "dpmpp_2m_sde": SchedulerChoice("DPMSolverMultistepScheduler", (("algorithm_type", "sde-dpmsolver++"),)),
    "dpmpp_2s": SchedulerChoice("DPMSolverSinglestepScheduler"),
    "euler": SchedulerChoice("EulerDiscreteScheduler"),
    "euler_a": SchedulerChoice("EulerAncestralDiscreteScheduler"),
    "heun": SchedulerChoice("HeunDiscreteScheduler"),
    "kdpm2": SchedulerChoice("KDPM2DiscreteScheduler"),
    "kdpm2_a": SchedulerChoice("KDPM2AncestralDiscreteScheduler"),
    "lcm": SchedulerChoice("LCMScheduler"),
    "lms": SchedulerChoice("LMSDiscreteScheduler"),
    "pndm": SchedulerChoice("PNDMScheduler"),
    "unipc": SchedulerChoice("UniPCMultistepScheduler"),
}
"""For models trained to predict noise, the sample or v."""

FLOW_SCHEDULERS = {
    "flow_euler": SchedulerChoice("FlowMatchEulerDiscreteScheduler"),
    "flow_heun": SchedulerChoice("FlowMatchHeunDiscreteScheduler"),
}
"""For models trained by flow matching."""

_ALL = {**DIFFUSION_SCHEDULERS, **FLOW_SCHEDULERS}


def schedulers_for(scheduler_class_name: str) -> tuple[str, ...]:
    """Names of the schedulers that fit a model whose own is `scheduler_class_name`, its own first.

    An unknown class fits nothing but itself: the answer is empty, and only the model's own can be used.
    """
    family = FLOW_SCHEDULERS if scheduler_class_name.startswith("FlowMatch") else DIFFUSION_SCHEDULERS
    own = [name for name, choice in family.items() if choice.class_name == scheduler_class_name and not choice.options]
    return (own[0], *(name for name in family if name != own[0])) if own else ()


def scheduler_choice(name: str) -> SchedulerChoice:
    """The choice behind a name. Raises KeyError for a name that no catalogue lists."""
    return _ALL[name]
