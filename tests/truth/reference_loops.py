"""The three public ESD recipes as plain loops: the independent truth the presets are held to.

Written from the facts about the reference family alone, on torch and diffusers, with no code of esd_fast.
Nothing here is fast, and nothing should be: two whole UNets, no caching, one `for` a rollout.

    e0, ep, ef    the frozen UNet's predictions for the empty prompt, the concept, and erase_from
    target        anchor - negative_guidance * (ep - e0)
    loss          mean over all elements of (student - target)^2, minimised by Adam with default betas

|                        | frozen_rollout_reference     | paper_ldm                   | paper_diffusers        |
|------------------------|------------------------------|-----------------------------|------------------------|
| preset                 | reference                    | paper                       | paper-diffusers        |
| who rolls out          | frozen                       | student                     | student                |
| on                     | erase_from, else the concept | the concept                 | the concept            |
| sampler                | the pipeline's scheduler     | DDIM as CompVis writes it   | diffusers' DDIM        |
| guided steps           | i                            | min(N - 1, N - i)           | i                      |
| then asked at t =      | timesteps[i]                 | any of [stride i, stride i + stride) | entry stride*i of the 1000-step list |
| anchor                 | erase_from, else the concept | erase_from, else null       | erase_from, else null  |
| student conditioned on | erase_from, else the concept | erase_from, else the concept | erase_from, else the concept |

N is num_inference_steps (50 in all public scripts), stride is 1000 // N (20 there).
All three ask and train on the UNet's raw output, whether that is epsilon or v.

Several words: `concept` is a list (and `erase_from` one for all, or a list), and which[k] numbers the word of each row
of optimizer step k's batch. The paper's script draws one for the step; it has its own rollout and its own questions,
so for a row it is as if it were alone.

`every_state` is no public recipe but the package's own: all states of frozen trajectories, used in a given order.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------------ what comes out


@dataclass
class Record:
    """One optimizer step, as it was before the weights moved."""

    latents: Tensor  # x_t after the rollout, (B, 4, h, w), as the scheduler keeps it
    model_input: (
        Tensor  # what the UNet was given: scale_model_input(latents); equals latents but for Euler
    )
    timestep: Tensor  # what the UNet was given, a scalar or (B,)
    target: Tensor
    noise_pred_student: Tensor
    loss: float


@dataclass
class Run:
    records: list[Record] = field(default_factory=list)
    start: dict[str, Tensor] = field(
        default_factory=dict
    )  # the trained tensors by UNet state-dict name
    final: dict[str, Tensor] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]


# ------------------------------------------------------------------------------------------------------ the pieces


def noise_from_seeds(seeds: Iterable[int], shape: Sequence[int]) -> list[Tensor]:
    """The initial noise of each optimizer step: its own CPU generator, one standard normal draw of `shape`."""
    return [
        torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))
        for seed in seeds
    ]


@torch.no_grad()
def encode(pipe: Any, prompt: str, batch: int) -> Tensor:
    """(batch, 77, width): padded and cut to the tokenizer's length, last hidden state of the text encoder."""
    tokens = pipe.tokenizer(
        prompt,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return pipe.text_encoder(tokens.input_ids)[0].expand(batch, -1, -1)


def predict(unet: Any, model_input: Tensor, timestep: Tensor, embedding: Tensor) -> Tensor:
    return unet(model_input, timestep, encoder_hidden_states=embedding).sample


def predict_guided(
    unet: Any,
    model_input: Tensor,
    timestep: Tensor,
    null: Tensor,
    condition: Tensor,
    guidance_scale: float,
) -> Tensor:
    """Classifier-free guidance on the raw outputs, both in one call as the public scripts do. One timestep for all."""
    both = torch.cat([model_input, model_input])
    noise_pred_null, noise_pred_condition = predict(
        unet, both, timestep, torch.cat([null, condition])
    ).chunk(2)
    return noise_pred_null + guidance_scale * (noise_pred_condition - noise_pred_null)


class Training:
    """What the three recipes share: a frozen teacher, a student with its trainable tensors, Adam, the records.

    The pipeline itself is left as it was.
    """

    def __init__(
        self,
        pipe: Any,
        concept: str | Sequence[str],
        erase_from: str | Sequence[str | None] | None,
        trainable: Sequence[str] | Callable[[str], bool],
        negative_guidance: float,
        learning_rate: float,
        batch: int,
    ):
        self.teacher = copy.deepcopy(pipe.unet).eval().requires_grad_(False)
        self.student = copy.deepcopy(pipe.unet).eval().requires_grad_(False)
        parameters = dict(self.student.named_parameters())
        chosen = [n for n in parameters if trainable(n)] if callable(trainable) else list(trainable)
        if not chosen:
            raise ValueError("nothing to train")
        self.trained = {name: parameters[name].requires_grad_(True) for name in chosen}
        assert all(p.dtype == torch.float32 for p in parameters.values()), (
            "the truth is computed in float32"
        )
        self.optimizer = torch.optim.Adam(self.trained.values(), lr=learning_rate)
        self.negative_guidance = negative_guidance

        self.pipe = pipe
        self.words = [concept] if isinstance(concept, str) else list(concept)
        one_for_all = erase_from is None or isinstance(erase_from, str)
        self.origins = [erase_from] * len(self.words) if one_for_all else list(erase_from)
        self.null = encode(pipe, "", batch)
        self.choose([0] * batch)
        self.run = Run(start=self.snapshot())

    def choose(self, rows: Sequence[int]) -> None:
        """The word of each row. Among words that have an `erase_from` one that has none is its own."""
        origins = [self.origins[k] for k in rows]
        self.concept = torch.cat([encode(self.pipe, self.words[k], 1) for k in rows])
        self.erase_from = None
        if any(o is not None for o in self.origins):
            texts = [self.words[k] if o is None else o for k, o in zip(rows, origins, strict=True)]
            self.erase_from = torch.cat([encode(self.pipe, text, 1) for text in texts])

    def snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trained.items()}

    def step(self, latents: Tensor, model_input: Tensor, timestep: Tensor, anchor: str) -> None:
        """Ask the teacher and the student, move the student. anchor (without erase_from): 'concept' or 'null'."""
        with torch.no_grad():
            e0 = predict(self.teacher, model_input, timestep, self.null)
            ep = predict(self.teacher, model_input, timestep, self.concept)
            if self.erase_from is not None:
                noise_pred_anchor = predict(self.teacher, model_input, timestep, self.erase_from)
            else:
                noise_pred_anchor = {"concept": ep, "null": e0}[anchor]
            target = noise_pred_anchor - self.negative_guidance * (ep - e0)

        condition = self.concept if self.erase_from is None else self.erase_from
        noise_pred_student = predict(self.student, model_input, timestep, condition)
        loss = F.mse_loss(noise_pred_student, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.run.records.append(
            Record(
                latents,
                model_input,
                torch.as_tensor(timestep),
                target,
                noise_pred_student.detach(),
                loss.item(),
            )
        )

    def finish(self) -> Run:
        self.run.final = self.snapshot()
        return self.run


# ------------------------------------------------------------------------------------------- 1. preset `reference`


def frozen_rollout_reference(
    pipe: Any,
    concept: str | Sequence[str],
    *,
    noise: Sequence[Tensor],
    indices: Sequence[int],
    trainable: Sequence[str] | Callable[[str], bool],
    erase_from: str | Sequence[str | None] | None = None,
    which: Sequence[Sequence[int]] | None = None,
    negative_guidance: float = 2.0,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
    learning_rate: float = 5e-5,
) -> Run:
    """esd_sd in its 2026 form: a rollout with the frozen UNet for every optimizer step, only its end is used.

    noise[k], (B, 4, h, w) standard normal, and indices[k] are the draws of optimizer step k. The index goes into the
    scheduler's own list of timesteps, which PNDM makes N + 1 long with one entry twice. Any deterministic scheduler.

    Two departures from the public script: the UNet's inputs go through scale_model_input, and what is trained is
    float32 (the public script keeps bfloat16 weights).
    """
    train = Training(
        pipe, concept, erase_from, trainable, negative_guidance, learning_rate, len(noise[0])
    )
    scheduler = copy.deepcopy(pipe.scheduler)

    for k, (initial, index) in enumerate(zip(noise, indices, strict=True)):
        if which is not None:
            train.choose(which[k])
        condition = train.concept if train.erase_from is None else train.erase_from
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps
        if not 0 <= index < len(timesteps):
            raise ValueError(f"index {index} is not one of the {len(timesteps)} timesteps")
        latents = initial * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in timesteps[:index]:
                model_input = scheduler.scale_model_input(latents, t)
                noise_pred = predict_guided(
                    train.teacher, model_input, t, train.null, condition, guidance_scale
                )
                latents = scheduler.step(noise_pred, t, latents).prev_sample

        t = timesteps[index]
        train.step(latents, scheduler.scale_model_input(latents, t), t, anchor="concept")

    return train.finish()


# ----------------------------------------------------------------------------------------------- 2. preset `paper`


def compvis_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """CompVis' 'uniform' DDIM list, ascending: range(0, 1000, 1000 // N) + 1, so 1, 21, ..., 981 for 50 steps."""
    if num_train_timesteps % num_inference_steps:
        raise ValueError(
            "the facts say nothing of step counts that do not divide the training timesteps"
        )
    return [
        t + 1 for t in range(0, num_train_timesteps, num_train_timesteps // num_inference_steps)
    ]


def compvis_alphas_cumprod(config: Mapping[str, Any]) -> list[float]:
    """The cumulative product of 1 - beta, in float64, from the betas that the scheduler's config describes."""
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError("only the plain schedules of Stable Diffusion")
    start, end, n = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if config["beta_schedule"] == "scaled_linear":  # CompVis calls this one "linear"
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    elif config["beta_schedule"] == "linear":
        betas = torch.linspace(start, end, n, dtype=torch.float64)
    else:
        raise ValueError(f"beta_schedule {config['beta_schedule']}")
    return torch.cumprod(1 - betas, dim=0).tolist()


def ddim_step(
    latents: Tensor, output: Tensor, a_t: float, a_prev: float, prediction_type: str
) -> Tensor:
    """One deterministic (eta 0) DDIM step from noise level a_t to a_prev (both cumulative alphas)."""
    if prediction_type == "epsilon":
        epsilon = output
        x0 = (latents - (1 - a_t) ** 0.5 * epsilon) / a_t**0.5
    elif prediction_type == "v_prediction":  # v = sqrt(a) epsilon - sqrt(1 - a) x0
        epsilon = a_t**0.5 * output + (1 - a_t) ** 0.5 * latents
        x0 = a_t**0.5 * latents - (1 - a_t) ** 0.5 * output
    else:
        raise ValueError(f"prediction_type {prediction_type}")
    return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * epsilon


def paper_ldm(
    pipe: Any,
    concept: str | Sequence[str],
    *,
    noise: Sequence[Tensor],
    indices: Sequence[int],
    timesteps: Sequence[int | Tensor],
    trainable: Sequence[str] | Callable[[str], bool],
    erase_from: str | Sequence[str | None] | None = None,
    which: Sequence[Sequence[int]] | None = None,
    negative_guidance: float = 1.0,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
    learning_rate: float = 1e-5,
) -> Run:
    """The paper's own (LDM) script: the student rolls out with CompVis' DDIM, then any t of the i-th stretch is asked.

    Draws of optimizer step k: noise[k], (B, 4, h, w); indices[k] = i, uniform in 0..N-1; timesteps[k], uniform in
    [stride i, stride i + stride), one integer for the batch or a tensor of B.

    My reading of "the DDIM-50 list without its noisiest timestep; min(49, 50 - i) guided steps", for N = 50:
    the list is 1, 21, ..., 981; the rollout starts from pure noise as if it were at 961 (981 is dropped) and takes its
    steps downwards 961, 941, ...; the step from list[k] lands on list[k - 1], the one from list[0] = 1 on
    alphas_cumprod[0]. So i = 49 takes 1 step (961 -> 941), i = 2 takes 48 (the last one is 21 -> 1), i = 1 and i = 0
    both take all 49. The latents end at the level of list[i - 2] = 20 (i - 2) + 1 and are asked at a t in
    [20i, 20i + 20): two to three strides noisier than they are. That is what the facts say, and is kept.

    The scheduler of the pipeline serves for its betas, prediction_type and num_train_timesteps only.
    """
    config = pipe.scheduler.config
    train = Training(
        pipe, concept, erase_from, trainable, negative_guidance, learning_rate, len(noise[0])
    )
    stride = config["num_train_timesteps"] // num_inference_steps
    ddim_list = compvis_timesteps(num_inference_steps, config["num_train_timesteps"])
    alphas_cumprod = compvis_alphas_cumprod(config)
    prediction_type = config.get("prediction_type", "epsilon")

    for step, (latents, i, t) in enumerate(zip(noise, indices, timesteps, strict=True)):
        if which is not None:
            train.choose(which[step])
        t = torch.as_tensor(t).expand(len(latents))
        if not (
            0 <= i < num_inference_steps and ((stride * i <= t) & (t < stride * i + stride)).all()
        ):
            raise ValueError(f"index {i} and timestep {t.tolist()} do not go together")

        usable = ddim_list[:-1]  # without its noisiest timestep
        number_of_steps = min(num_inference_steps - 1, num_inference_steps - i)
        with torch.no_grad():
            for k in list(reversed(range(len(usable))))[:number_of_steps]:
                a_t = alphas_cumprod[usable[k]]
                a_prev = alphas_cumprod[usable[k - 1]] if k > 0 else alphas_cumprod[0]
                output = predict_guided(
                    train.student,
                    latents,
                    torch.tensor(usable[k]),
                    train.null,
                    train.concept,
                    guidance_scale,
                )
                latents = ddim_step(latents, output, a_t, a_prev, prediction_type)

        train.step(latents, latents, t, anchor="null")

    return train.finish()


# ------------------------------------------------------------------------------------- 3. preset `paper-diffusers`


def paper_diffusers(
    pipe: Any,
    concept: str | Sequence[str],
    *,
    noise: Sequence[Tensor],
    indices: Sequence[int],
    trainable: Sequence[str] | Callable[[str], bool],
    erase_from: str | Sequence[str | None] | None = None,
    which: Sequence[Sequence[int]] | None = None,
    negative_guidance: float = 2.0,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
    learning_rate: float = 2e-5,
) -> Run:
    """alt_esd_diffusers: the student takes i DDIM steps, then entry stride * i of the 1000-step list is asked.

    Draws of optimizer step k: noise[k], (B, 4, h, w), and indices[k] = i in 1..N-2. With Stable Diffusion's scheduler
    config (leading spacing, offset 1) the 1000-step list is 1000, 999, ..., 1 and t = 1000 - 20 i at 50 steps, one
    less noise than the latents have (981 - 20 i); with another config it is whatever that list holds there.

    A pipeline with another scheduler is taken to DDIM by its config, without clipping (an SD config says so; DDIM's
    own default would clip).
    """
    train = Training(
        pipe, concept, erase_from, trainable, negative_guidance, learning_rate, len(noise[0])
    )
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    stride = scheduler.config.num_train_timesteps // num_inference_steps

    for k, (initial, i) in enumerate(zip(noise, indices, strict=True)):
        if which is not None:
            train.choose(which[k])
        if not 1 <= i <= num_inference_steps - 2:
            raise ValueError(f"index {i} is not in 1..{num_inference_steps - 2}")
        scheduler.set_timesteps(num_inference_steps)
        latents = initial * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps[:i]:
                output = predict_guided(
                    train.student, latents, t, train.null, train.concept, guidance_scale
                )
                latents = scheduler.step(output, t, latents).prev_sample

        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        train.step(latents, latents, scheduler.timesteps[stride * i], anchor="null")

    return train.finish()


# ------------------------------------------------------------------------------------- 4. the package's own: `fast`


def every_state(
    pipe: Any,
    concept: str | Sequence[str],
    *,
    noise: Sequence[Tensor],
    which: Sequence[int],
    batches: Sequence[Sequence[int]],
    trainable: Sequence[str] | Callable[[str], bool],
    erase_from: str | Sequence[str | None] | None = None,
    negative_guidance: float = 2.0,
    guidance_scale: float = 3.0,
    num_inference_steps: int = 50,
    learning_rate: float = 5e-5,
) -> Run:
    """Whole trajectories of the frozen UNet, each on its own word and alone; then batches of their states.

    Trajectory n starts from noise[n], (1, 4, h, w), and belongs to word which[n]; with T timesteps in the scheduler's
    list its states are numbers n T, ..., n T + T - 1. Optimizer step k trains on those in batches[k]; a row is asked
    at its own timestep with its own word, and the loss is the mean over all of them.
    """
    train = Training(
        pipe, concept, erase_from, trainable, negative_guidance, learning_rate, len(batches[0])
    )
    null, scheduler, states = train.null[:1], copy.deepcopy(pipe.scheduler), []
    for latents, word in zip(noise, which, strict=True):
        train.choose([word])
        condition = train.concept if train.erase_from is None else train.erase_from
        scheduler.set_timesteps(num_inference_steps)
        latents = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(latents, t)
            states.append((model_input, t, word))
            with torch.no_grad():
                guided = predict_guided(
                    train.teacher, model_input, t, null, condition, guidance_scale
                )
                latents = scheduler.step(guided, t, latents).prev_sample

    for batch in batches:
        inputs, timesteps, words = zip(*(states[n] for n in batch), strict=True)
        train.choose(words)
        model_input = torch.cat(inputs)
        train.step(model_input, model_input, torch.stack(timesteps), anchor="concept")

    return train.finish()


# ---------------------------------------------------------------------------------------------------- what is trained

ALIASES = {
    "xattn": "esd-x",
    "xattn-strict": "esd-x-strict",
    "noxattn": "esd-u",
    "full": "esd-all",
    "esd-a": "esd-all",
}


def compvis_name(unet: Any, name: str) -> str:
    """The CompVis name (under model.diffusion_model.) of a parameter of a Stable Diffusion 1.x / 2.x UNet.

    CompVis numbers its blocks flat. With L resnets a level: input_blocks 0 is the first convolution, then every level
    has L blocks of (resnet, attention) and one downsampler; output_blocks has L + 1 of (resnet, attention) a level,
    and the upsampler is a further member of the level's last one.
    """
    per_level = unet.config.layers_per_block + 1
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]

    parts = name.split(".")
    if parts[0] == "mid_block":
        _, kind, number, *rest = parts
        place = f"middle_block.{2 * int(number) if kind == 'resnets' else 1}"
    elif parts[0] in ("down_blocks", "up_blocks"):
        side, level, kind, number, *rest = parts
        level, number = int(level), int(number)
        down = side == "down_blocks"
        if kind == "downsamplers":
            assert rest[0] == "conv"
            return f"input_blocks.{(level + 1) * per_level}.0.op.{rest[1]}"
        if kind == "upsamplers":
            has_attention = len(getattr(unet.up_blocks[level], "attentions", None) or ()) > 0
            member = 2 if has_attention else 1
            return f"output_blocks.{level * per_level + per_level - 1}.{member}." + ".".join(rest)
        block = level * per_level + number + (1 if down else 0)
        place = f"{'input' if down else 'output'}_blocks.{block}.{0 if kind == 'resnets' else 1}"
    else:
        raise ValueError(f"no CompVis name for {name}")

    if kind == "resnets":
        rest[0] = {
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "time_emb_proj": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "conv_shortcut": "skip_connection",
        }[rest[0]]
    return ".".join([place, *rest])


def _ldm_takes(method: str, name: str) -> bool:
    """The LDM script's selections, by CompVis parameter name."""
    head_or_time = name.startswith("out.") or "time_embed" in name
    if method == "ldm-xattn":
        return "attn2" in name
    if method == "ldm-selfattn":
        return "attn1" in name
    if method == "ldm-noxattn":
        return not head_or_time and "attn2" not in name
    if method == "ldm-notime":
        return not head_or_time
    if method == "ldm-full":
        return True
    if method == "ldm-xlayer":
        return "attn2" in name and ("output_blocks.6." in name or "output_blocks.8." in name)
    if method == "ldm-selflayer":
        return "attn1" in name and ("input_blocks.4." in name or "input_blocks.7." in name)
    raise ValueError(f"unknown train method {method!r}")


def _esd_takes(method: str, module: str, sdxl: bool) -> bool:
    """The diffusers scripts' selections, by the name of a Linear or Conv2d module."""
    if method == "esd-x":
        return "attn2" in module
    if method == "esd-x-strict":
        return "attn2.to_k" in module or "attn2.to_v" in module
    if method == "selfattn":
        return "attn1" in module
    if sdxl and ("block" not in module or "emb" in module) and method in ("esd-u", "esd-all"):
        return False
    if method == "esd-u":
        return "attn2" not in module
    if method == "esd-all":
        return True
    raise ValueError(f"unknown train method {method!r}")


def select_trainable(unet: Any, method: str) -> list[str]:
    """The state-dict names that `method` trains, in the UNet's own order. An empty selection is refused."""
    method = ALIASES.get(method, method)
    if method.startswith("ldm-"):
        names = [n for n, _ in unet.named_parameters() if _ldm_takes(method, compvis_name(unet, n))]
    else:
        sdxl = unet.config.addition_embed_type == "text_time"
        names = [
            f"{module_name}.{n}"
            for module_name, module in unet.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
            and _esd_takes(method, module_name, sdxl)
            for n, _ in module.named_parameters(recurse=False)
        ]
    if not names:
        raise ValueError(f"train method {method!r} selects nothing in this UNet")
    return names
