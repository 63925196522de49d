"""``python -m alignbench.cost``: what a model's shape costs with each method, in seconds and bytes of this machine.

The model has the shape of a published one and random weights, so nothing is downloaded; texts are read by encoders of
one layer, and the reward is the brightness of an image. Everything else is a run's own code: rollouts, updates, views,
optimizer. What a reward model costs comes on top.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict
from torch import Tensor

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.command import command_line
from alignbench.configuration import CONF
from alignbench.memory import out_of_memory
from alignbench.methods.method import Clock
from alignbench.policies.policy import Policy
from alignbench.policies.saved_pipeline import ARCHITECTURES
from alignbench.prompts.prompt import Prompt
from alignbench.prompts.sets import draw
from alignbench.rewards.reward import Reward
from alignbench.speed import replaced
from alignbench.training import optimizer_step

MODELS = ("sd35_medium", "flux_dev", "sdxl", "sd15")
METHODS = ("diffusion_nft", "flow_grpo", "tempflow_grpo", "srpo", "sdpo")
VARIANTS = {
    "plain": {"gradient_checkpointing": False, "compile": False},
    "checkpointing": {"gradient_checkpointing": True, "compile": False},
    "compile": {"gradient_checkpointing": False, "compile": True},
}
COLUMNS = {
    "method": "method",
    "variant": "variant",
    "images_per_second": "images/s, rollout",
    "seconds_per_update": "s an update",
    "samples_per_update": "samples with gradient",
    "denoiser_share": "share in the denoiser",
    "peak_bytes": "peak memory, GB",
    "micro_batch": "micro-batch",
}


class Brightness(Reward):
    """The mean of all pixels: a reward that costs nothing and passes gradients on."""

    name = "brightness"
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"reward": images.mean(dim=(1, 2, 3))}


# The model


def narrowed(source: Path, folder: Path, width: float, depth: float) -> None:
    """Write an architecture of which the denoiser and the autoencoder are narrower and shallower.

    Args:
        source: folder of a published architecture.
        folder: where the other one goes.
        width: factor of channels and attention heads, in (0, 1].
        depth: factor of the layers of transformers, in (0, 1].
    """

    def heads(count: int) -> int:
        return max(1, round(count * width))

    def channels(count: int) -> int:
        return max(8, 8 * round(count * width / 8))

    def layers(count: int) -> int:
        return max(1, round(count * depth))

    for path in sorted(source.rglob("*.json")):
        config = json.loads(path.read_text())
        if path.parent.name.startswith("text_encoder"):
            config |= {"num_layers": 1, "num_hidden_layers": 1, "d_ff": 64, "intermediate_size": 64, "vocab_size": 8}
            config |= {"num_heads": 1} if "num_heads" in config else {}  # of T5
        if width != 1 and path.parent.name in ("unet", "vae"):
            config["norm_num_groups"] = 8
            config["block_out_channels"] = [channels(each) for each in config["block_out_channels"]]
        if path.parent.name == "unet":
            given = config["attention_head_dim"]  # the number of heads, by a misnomer of diffusers
            config["attention_head_dim"] = [heads(each) for each in given] if isinstance(given, list) else heads(given)
            if "transformer_layers_per_block" in config:
                config["transformer_layers_per_block"] = [
                    layers(each) for each in config["transformer_layers_per_block"]
                ]
        if path.parent.name == "transformer":
            config["num_attention_heads"] = heads(config["num_attention_heads"])
            config["num_layers"] = layers(config["num_layers"])
            if "num_single_layers" in config:
                config["num_single_layers"] = layers(config["num_single_layers"])
            if "caption_projection_dim" in config:
                config["caption_projection_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
                dual = layers(len(config["dual_attention_layers"]))
                config["dual_attention_layers"] = list(range(min(dual, config["num_layers"])))
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(config))


def configured(options: argparse.Namespace, method: str, variant: str, folder: Path) -> DictConfig:
    """A run of the model in ``folder``, with a batch as small as the options say."""
    few = [f"method.batch.prompts={options.prompts}", f"method.batch.images={options.images}", "method.batch.updates=1"]
    if method == "tempflow_grpo":
        few += ["method.algorithm.seeds=1", f"method.algorithm.branches={options.images}"]
    if method == "sdpo":
        few += [f"method.algorithm.pairs_per_update={options.prompts}", "method.algorithm.refresh_every=1"]
    if options.steps is not None:
        few.append(f"method.rollout.steps={options.steps}")
    settings = {"source": folder, "weights": "random", "dtype": options.dtype} | VARIANTS[variant]
    if options.resolution is not None:
        settings["resolution"] = options.resolution
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "config",
            [
                f"model={options.model}",
                f"method={method}",
                "overlay=none",
                "prompts=geneval",
                f"device={options.device}",
                f"micro_batch={options.micro_batch}",
                "evaluation.features=null",
                *(f"++model.policy.{key}={value}" for key, value in settings.items()),
                *few,
            ],
        )
    with open_dict(config):
        config.evaluation.scorers = {}
        brightness = {"weight": 1.0, "photo": {"_target_": "alignbench.cost.Brightness"}}
        config.reward = {"parts": {"brightness": brightness}, "targets": {}, "normalisation": {}}
    return config


# Measuring


class Clocks:
    """Seconds spent in parts of an iteration, the device synchronised."""

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self.synchronise = synchronise
        self.denoiser = 0.0
        self._inside = False

    def now(self) -> float:
        """Seconds, once all queued work is done."""
        self.synchronise()
        return time.perf_counter()

    @contextmanager
    def watching(self, policy: Policy) -> Iterator[None]:
        """Count the seconds of predictions and of backward passes as the denoiser's."""

        def timed(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                start = self.now()
                try:
                    return call(*arguments, **named)
                finally:
                    self.denoiser += self.now() - start

            return wrapped

        with replaced([(policy, "predict"), (torch.autograd, "backward")], timed):
            yield


def iteration(parts: Parts, clip: float, number: int) -> dict[str, float]:
    """One iteration of a method; its seconds by part."""
    clocks, clock, method = Clocks(parts.ledger.synchronise), Clock(number), parts.method
    prompts = draw(parts.prompts, method.batch.prompts, 0, number)
    start = clocks.now()
    with clocks.watching(parts.policy):
        experience = method.collect(parts.stack, prompts, clock)
        collected = clocks.now()
        updates = 0
        for update in method.updates(experience, parts.stack, clock):
            optimizer_step(parts.stack, method, update, parts.optimizer, clip)
            method.after_step(parts.policy, clock)
            updates += 1
    end = clocks.now()
    return {
        "rollout": collected - start,
        "update": (end - collected) / max(1, updates),
        "denoiser": clocks.denoiser / (end - start),
    }


def measured(config: DictConfig, repeats: int) -> dict[str, Any]:
    """What iterations of a run cost; the first one, which compiles and fills caches, is left out."""
    free()
    processes = assembly.launched(config)
    on_gpu = processes.device.type == "cuda"
    parts = assembly.assemble(config, processes)
    iteration(parts, config.method.optimizer.clip, 0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = [iteration(parts, config.method.optimizer.clip, number + 1) for number in range(repeats)]
    middle = {name: statistics.median(each[name] for each in seconds) for name in seconds[0]}
    cost, batch = parts.method.expected_cost(), parts.method.batch
    images = batch.total if cost.images_with_gradient else cost.images
    return {
        "images_per_second": images / middle["rollout"],
        "seconds_per_update": middle["update"],
        "samples_per_update": cost.backward / batch.updates,
        "denoiser_share": middle["denoiser"],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss,
        "micro_batch": parts.stack.micro_batch.size,
        "seconds": seconds,
    }


def free() -> None:
    """Give back the memory of a model that nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def largest_micro_batch(policy: Policy, limit: int) -> int:
    """The most samples of one prediction with a backward pass that memory holds, at most ``limit``; 0 for none."""

    def fits(rows: int) -> bool:
        try:
            latents, condition = policy.noise(range(rows)), policy.encode([""] * rows)
            torch.autograd.backward(policy.predict(latents, latents.new_full((rows,), 0.5), condition).sum())
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            for parameter in policy.trainable_parameters().values():
                parameter.grad = None
            free()
        return True

    return bisected(fits, limit)


def bisected(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number of 0 to ``limit`` that fits, if all below it fit too."""
    good, bad, tried = 0, limit + 1, 1
    while bad - good > 1:
        if fits(tried):
            good = tried
        else:
            bad = tried
        tried = min(2 * good, limit) if bad > limit and good else (good + bad) // 2
    return good


def largest(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """The largest micro-batch by variant; compiling does not change it."""
    found = {}
    for variant in ("plain", "checkpointing"):
        if variant in options.variants:
            config = configured(options, "diffusion_nft" if options.model in MODELS[:2] else "sdpo", variant, folder)
            free()
            policy = assembly.pretrained(config, assembly.launched(config))
            found[variant] = largest_micro_batch(policy, options.limit)
    return found


# The records


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    options, hardware = record["options"], record["environment"]["hardware"]
    narrower = f", width x {options['width']:g}, depth x {options['depth']:g}"
    scale = "" if options["width"] == options["depth"] == 1 else narrower
    lines = [
        f"{options['model']}{scale}, {options['dtype']}, {hardware['gpu'] or hardware['cpu']}, "
        f"torch {record['environment']['packages']['torch']}, {record['environment']['created']}",
        "",
        f"| {' | '.join(COLUMNS.values())} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in record["rows"]:
        shown = row | ({"peak_bytes": row["peak_bytes"] / 1e9} if "peak_bytes" in row else {})
        known = [shown.get(key, "out of memory") for key in COLUMNS]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in known]
        lines.append(f"| {' | '.join(cells)} |")
    for variant, rows in record["largest_micro_batch"].items():
        bound = " (the limit that was tried)" if rows == options["limit"] else ""
        lines += ["", f"Largest micro-batch of a prediction with its backward pass, {variant}: {rows}{bound}."]
    return "\n".join(lines) + "\n"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, checked."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.cost", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="sd35_medium", help="whose shape")
    parser.add_argument("--methods", nargs="+", help="default: those of the five papers that the model is for")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["plain"], help="a row per method")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the denoiser")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--resolution", type=int, help="side of the images in pixels; default: the model's")
    parser.add_argument("--steps", type=int, help="of a rollout; default: the method's")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per iteration")
    parser.add_argument("--images", type=int, default=4, help="images per prompt")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows of a call; halved when memory runs out")
    parser.add_argument("--limit", type=int, default=0, help="search the largest micro-batch up to this; 0: do not")
    parser.add_argument("--repeats", type=int, default=3, help="iterations that are timed; the median counts")
    parser.add_argument("--width", type=float, default=1.0, help="factor of channels and heads, to try the script")
    parser.add_argument("--depth", type=float, default=1.0, help="factor of transformer layers, to try the script")
    parser.add_argument("--output", type=Path, default=Path("results/cost"), help="folder of NAME.json and NAME.md")
    options = parser.parse_args(arguments)
    for name in ("prompts", "images", "micro_batch", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1")
    for name in ("width", "depth"):
        if not 0 < getattr(options, name) <= 1:
            parser.error(f"--{name} {getattr(options, name):g}: above 0, at most 1")
    if options.limit < 0:
        parser.error(f"--limit {options.limit}: 0 or more")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The record of all methods and variants; a method that does not fit the model is an error before any work."""
    fitting = METHODS if options.model in ("sd35_medium", "flux_dev") else ("sdpo",)
    methods = options.methods or fitting
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        with initialize_config_dir(str(CONF), version_base="1.3"):
            source = compose("config", [f"model={options.model}"]).model.policy.source
        narrowed(ARCHITECTURES / source, folder, options.width, options.depth)
        configs = {(m, v): configured(options, m, v, folder) for m in methods for v in options.variants}
        for config in configs.values():
            assembly.check(config, 1)
        for (method, variant), config in configs.items():
            try:
                found = measured(config, options.repeats)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                found = {}  # with one row a call
            rows.append({"method": method, "variant": variant} | found)
        largest_found = largest(options, folder) if options.limit else {}
    return {
        "schema": 1,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "environment": assembly.environment(assembly.launched(config)),
        "rows": rows,
        "largest_micro_batch": largest_found,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the record and its table, print the table."""
    options = parsed(arguments)
    record = measure(options)
    table = markdown(record)
    name = f"{options.model}_{options.dtype}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.output / f"{name}.md").write_text(table, encoding="utf-8")
    print(table, end="")


if __name__ == "__main__":
    command_line(main, "alignbench.cost")
