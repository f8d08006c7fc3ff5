"""Each training does what it should: twenty steps lower its loss, and it goes on where it stopped."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import nn
from transformers import EfficientNetForImageClassification, EfficientNetImageProcessorPil

from tests.training.tiny import PLAN, falls, latents, tiny_shapes
from training.denoiser import DenoiserTraining
from training.descent import Descent, Plan
from training.distil import Distillation
from training.distil import assemble as turbo
from training.dit import DitTraining, GuidanceTraining, pack, positions
from training.dit import assemble as dit
from training.evaluate import interval
from training.features import FEATURES, features_of, frechet_distance, share_read, train_reader
from training.latents import Latents
from training.scenes import Scene, Thing, make_dataset, random_scenes, single
from training.scorer import ScorerTraining, confidence, make_processor, seen
from training.text import Kind, TextTraining, make_t5_encoder, told
from training.tokenizer import caption_words, make_t5_tokenizer
from training.vae import encode_all, make_vae, reconstruct, refine_decoder, train_vae


def descent(steps: int, folder: Path | None = None) -> tuple[nn.Linear, Descent]:
    torch.manual_seed(3)
    network = nn.Linear(4, 1)
    plan = Plan(peak=1e-2, steps=20, run_s=float("inf") if steps == 20 else 0, decay=0.9)
    return network, Descent("line", {"line": network}, plan, seed=3, folder=folder)


def train(network: nn.Linear, training: Descent, steps: int) -> None:
    training.plan = Plan(peak=1e-2, steps=steps, decay=0.9, fall=1e9)  # a rate that does not depend on the end
    training.run(lambda: (network(torch.rand(8, 4)) - training.rng.random()).square().mean())


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, training = descent(20)
    train(whole, training, 20)
    train(*descent(20, tmp_path), 8)
    halves, resumed = descent(20, tmp_path)
    assert resumed.step == 8
    train(halves, resumed, 20)
    assert torch.equal(whole.weight, halves.weight)
    assert all(
        torch.equal(a, b)
        for a, b in zip(training.averaged("line").parameters(), resumed.averaged("line").parameters(), strict=True)
    )


def test_a_run_ends_with_its_cpu_time() -> None:
    network = nn.Linear(4, 1)
    training = Descent("line", {"line": network}, Plan(peak=1e-2, run_s=0.05), seed=0)
    training.run(lambda: network(torch.rand(8, 4)).square().mean())
    assert 0.05 <= training.seconds < 1


def test_sigterm_ends_a_run_after_the_step_at_hand(tmp_path: Path) -> None:
    network, training = descent(20, tmp_path)

    def loss() -> torch.Tensor:
        if training.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        value: torch.Tensor = network(torch.rand(8, 4)).square().mean()
        return value

    assert len(training.run(loss)) == 3
    assert descent(20, tmp_path)[1].step == 3


def test_the_rate_rises_stays_and_falls() -> None:
    plan = Plan(peak=1.0, steps=100, warmup=10, fall=0.2)
    rates = [plan.rate(step, plan.progress(step, 0)) for step in (0, 9, 50, 79, 90, 100)]
    assert rates == pytest.approx([0.1, 1, 1, 1, 0.5, 0.01])


def test_the_vae_learns_and_its_decoder_goes_on_alone() -> None:
    pictures = torch.from_numpy(make_dataset(8, seed=5).pictures)
    vae, losses = train_vae(PLAN, batch=8)
    assert falls(losses)
    latents, drawn = encode_all(vae, pictures), reconstruct(vae, pictures)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.3)
    assert falls(refine_decoder(vae, PLAN, batch=8))
    assert torch.equal(latents, encode_all(vae, pictures))
    assert not torch.equal(drawn, reconstruct(vae, pictures))


def test_the_denoiser_learns_and_its_average_follows() -> None:
    shapes = tiny_shapes()
    training = DenoiserTraining(shapes.tokenizer, shapes.text_encoder, latents(), PLAN)
    start = [p.clone() for p in training.averaged.parameters()]
    assert falls(training.run(batch=16))
    assert any(not torch.equal(a, b) for a, b in zip(start, training.averaged.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_text_encoder_learns(kind: Kind) -> None:
    training = TextTraining(kind, PLAN)
    assert falls(training.run(batch=16))
    assert 0 <= training.share_understood(50) <= 1


def test_captions_answer_what_they_say_and_leave_the_rest_open() -> None:
    things = (Thing(colour="red", shape="circle"), Thing(colour="blue", shape="star"))
    pair = Scene(things=things, place="right of", background="gray")
    whole = told("a red circle to the right of a blue star on a gray background", pair)
    assert whole == told("on gray background blue star left of red circle", pair)
    assert list(whole.values()) == ["gray", "left of", "nothing", "blue", "star", "red", "circle"]
    assert list(told("a red circle and a blue star", pair).values())[:5] == ["open", "open", "nothing", "red", "circle"]
    assert set(told("", pair).values()) == {"open"}
    alone = single("small", "red", "circle", "in the center", "white")
    assert list(told("a red circle", alone).values()) == ["open", "open", "open", "red", "circle", "nothing", "nothing"]


def test_an_interval_holds_the_share_and_narrows_with_the_count() -> None:
    low, high = interval(0.95, 300)
    assert low < 0.95 < high
    assert interval(0.95, 3000)[0] > low


def test_the_vae_makes_latents_of_the_size_that_the_unet_takes() -> None:
    vae: AutoencoderKL = make_vae()
    assert encode_all(vae.eval(), torch.zeros(1, 128, 128, 3, dtype=torch.uint8)).shape == (1, 4, 16, 16)


def test_the_reader_learns() -> None:
    reader, losses = train_reader(PLAN, batch=16)
    assert falls(losses)
    data = make_dataset(8, seed=5)
    assert features_of(reader, data.pictures).shape == (8, FEATURES)
    assert 0 <= share_read(reader, data.pictures, data.scenes) <= 1


def test_a_frechet_distance_is_that_of_the_distributions() -> None:
    source = np.random.default_rng(0)
    first = source.normal(size=(20000, 3))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, first + 2) == pytest.approx(12, abs=1e-6)
    assert frechet_distance(first, 3 * source.normal(size=(20000, 3))) == pytest.approx(3 * (3 - 1) ** 2, rel=0.05)


def test_the_student_learns_and_its_pipeline_draws() -> None:
    teacher = tiny_shapes()
    distillation = Distillation(teacher, latents(), PLAN)
    assert falls(distillation.run(batch=4))
    pipe = turbo(teacher, distillation.averaged)
    pictures = pipe("a red circle", num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert pictures.shape == (1, 128, 128, 3)
    assert pipe.scheduler.timesteps.tolist() == distillation.timesteps == [999, 499]
    assert len(distillation.averaged.down_blocks) == len(teacher.unet.down_blocks) - 1


def test_few_lessons_of_the_student_are_of_two_things() -> None:
    scenes = random_scenes(500, seed=1)
    few = Latents(scenes, torch.arange(500.0)).mostly_easy(0.1)
    assert sum(scene.is_hard for scene in few.scenes) / len(few.scenes) == pytest.approx(0.1, abs=0.01)
    assert sum(not scene.is_hard for scene in few.scenes) == sum(not scene.is_hard for scene in scenes)
    assert [scenes[int(row)] for row in few.latents] == few.scenes


def test_the_transformer_learns_and_so_does_its_guidance() -> None:
    shapes = tiny_shapes()
    text_encoder = make_t5_encoder(make_t5_tokenizer()).eval()
    training = DitTraining(shapes, text_encoder, latents(), PLAN)
    assert falls(training.run(batch=4))
    guided = GuidanceTraining(shapes, text_encoder, training.averaged, latents(), PLAN)
    assert falls(guided.run(batch=4))
    pipe = dit(shapes, text_encoder, guided.averaged)
    sides = {"height": 128, "width": 128}
    answer = pipe("a red circle", num_inference_steps=2, max_sequence_length=32, output_type="np", **sides)
    assert answer.images.shape == (1, 128, 128, 3)


def test_tokens_are_packed_as_flux_packs_them() -> None:
    latent_BCHW = torch.randn(2, 4, 16, 16)
    assert torch.equal(pack(latent_BCHW), FluxPipeline._pack_latents(latent_BCHW, 2, 4, 16, 16))
    assert torch.equal(positions(), FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32))


def test_every_word_of_the_caption_language_is_one_token_for_the_transformer_too() -> None:
    tokenizer = make_t5_tokenizer()
    for word in caption_words():
        assert len(tokenizer(word).input_ids) == 2, word  # before the end
    assert tokenizer.unk_token_id not in tokenizer("zebra, 12").input_ids


def test_the_scorer_learns_and_transformers_loads_it(tmp_path: Path) -> None:
    real, source = make_dataset(16, seed=3).pictures, np.random.default_rng(0)
    generated = (real * 0.7 + 30 * source.random(real.shape)).astype(np.uint8)
    training = ScorerTraining(real, generated, PLAN)
    assert falls(training.run(batch=8))
    training.averaged.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    scorer = EfficientNetForImageClassification.from_pretrained(tmp_path)
    scores = confidence(scorer, real[:3])
    assert ((scores >= 0) & (scores <= 1)).all()
    prepared = EfficientNetImageProcessorPil.from_pretrained(tmp_path)(list(real[:3]), return_tensors="pt")
    torch.testing.assert_close(prepared.pixel_values, seen(torch.from_numpy(real[:3])), atol=0.01, rtol=0)
