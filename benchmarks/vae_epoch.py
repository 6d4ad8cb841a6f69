"""Seconds per epoch of the fully connected VAE, 784-512-16-512-784, paired against pythae's own trainer on the same cores. Run it on a quiet machine.

    python benchmarks/vae_epoch.py --pythae-python /path/to/venv/bin/python

Both train on MNIST (PERIPLUS_DATA or the cache) at batch 100 with Adam and the Bernoulli likelihood of grey pixels at beta = 1, each by its own front
door: `periplus.train` and pythae's `BaseTrainer` on its default networks. Two processes of this file, each with the same number of threads; an epoch
of one, then an epoch of the other, while the other waits: the trainers are held between epochs by their own callbacks, so what an epoch took is
measured inside the process, without start-up, evaluation or the wait. The first epoch of each warms up and is left out of the medians.

pythae 0.1.2 lives in an environment of its own (it needs pydantic < 2); a `.pth` file there that names our site-packages gives both the same torch:

    python -m venv /tmp/pythae && /tmp/pythae/bin/pip install --no-deps pythae==0.1.2 imageio cloudpickle dill tqdm "pydantic<2" typing-extensions
    python -c "import site; print(site.getsitepackages()[0])" > /tmp/pythae/lib/python3.11/site-packages/ours.pth

The loss that each reports for an epoch, nats per image, is the mean over it while it was being trained: both must be training the same objective.
The two differ in the activation (leaky) and in the initial weights and output bias, as each library has them.
Writes benchmarks/results/vae_epoch.json; with --images, for a first look, it only prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
BATCH, LATENT, RATE = 100, 16, 1e-3


# ---- the two trainers, each in a process of its own ------------------------------------------------------------------------------------------


class Turns:
    """Inside a trainer's process: waits for its turn before each epoch, and tells what the epoch took and reached."""

    def __init__(self) -> None:
        self.channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the trainers print is not ours to read
        self.start = self.cpu = 0.0

    def wait(self) -> None:
        self.channel.write("ready\n")
        self.channel.flush()
        sys.stdin.readline()
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def done(self, loss: float) -> None:
        seconds, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
        self.channel.write(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "loss": loss}) + "\n")
        self.channel.flush()


def train_periplus(epochs: int, threads: int, precision: str, images: int) -> None:
    import torch

    import periplus

    torch.set_num_threads(threads)
    turns, whole = Turns(), periplus.load_data("mnist")
    data = dataclasses.replace(whole, images=whole.images[:images], labels=None)
    steps = len(data) // BATCH
    config = periplus.AutoencoderConfig(
        "vae",
        latent_dim=LATENT,
        batch_size=BATCH,
        epochs=epochs,
        learning_rate=RATE,
        precision=precision,
        held_out=0,
        log_every=steps,
        checkpoint_every=10**9,
        sample_every=10**9,
    )

    def between(progress: periplus.training.Progress) -> None:
        turns.done(progress.metrics["loss"])
        if progress.step < progress.steps:
            turns.wait()

    with tempfile.TemporaryDirectory() as folder:
        turns.wait()
        periplus.train(config, data, Path(folder) / "run", on_progress=between)


def train_pythae(epochs: int, threads: int) -> None:
    import numpy as np
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    turns = Turns()

    class Between(TrainingCallback):
        def on_epoch_begin(self, *_, **__) -> None:
            turns.wait()

        def on_log(self, _, logs, **__) -> None:
            turns.done(float(logs["train_epoch_loss"]))

    images = torch.from_numpy(np.load(sys.stdin.readline().strip())).float().div_(255)
    model = VAE(VAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce"))
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=epochs,
            learning_rate=RATE,
            per_device_train_batch_size=BATCH,
            optimizer_cls="Adam",
            keep_best_on_train=True,
            no_cuda=True,
        )
        dataset = BaseDataset(images, torch.zeros(len(images)))
        BaseTrainer(model, train_dataset=dataset, training_config=config, callbacks=[Between()]).train()


# ---- turn and turn about ---------------------------------------------------------------------------------------------------------------------


def launch(side: str, python: str, arguments: argparse.Namespace, images: str) -> subprocess.Popen[str]:
    command = [python, __file__, "--side", side, "--epochs", str(arguments.epochs + 1), "--threads", str(arguments.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    process = subprocess.Popen(
        [*command, "--precision", arguments.precision, "--images", str(arguments.images)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if arguments.verbose else subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    if side == "pythae":
        process.stdin.write(images + "\n")
        process.stdin.flush()
    return process


def expect_ready(process: subprocess.Popen[str], side: str) -> None:
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{side}'s process ended: --verbose shows why")


def epoch(process: subprocess.Popen[str]) -> dict[str, float]:
    process.stdin.write("go\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def paired(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Epochs of both sides in turn, the warm-up first in each list."""
    import numpy as np

    import periplus

    with tempfile.TemporaryDirectory() as folder:
        images = str(Path(folder) / "mnist.npy")
        np.save(images, periplus.load_data("mnist").images[: arguments.images].numpy())
        interpreters = {"periplus": sys.executable, "pythae": arguments.pythae_python}
        processes = {side: launch(side, python, arguments, images) for side, python in interpreters.items()}
        epochs: dict[str, list[dict[str, float]]] = {side: [] for side in processes}
        for k in range(arguments.epochs + 1):
            for side, process in processes.items():
                expect_ready(process, side)
                epochs[side].append(epoch(process) | {"load": round(os.getloadavg()[0], 2)})
                print(f"epoch {k} {side:>8}: {epochs[side][-1]}", flush=True)
        for process in processes.values():
            process.stdin.close()
            process.wait(60)
    return epochs


def summary(epochs: list[dict[str, float]], images: int) -> dict[str, object]:
    seconds = [e["seconds"] for e in epochs[1:]]
    return {
        "seconds_per_epoch": {"median": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds)},
        "cpu_seconds_per_epoch": statistics.median(e["cpu_seconds"] for e in epochs[1:]),
        "batches_per_second": images / BATCH / statistics.median(seconds),
        "loss": epochs[-1]["loss"],
        "epochs": epochs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythae-python", help="interpreter of an environment with pythae 0.1.2")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of each, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="ours; pythae's is float32")
    parser.add_argument("--images", type=int, default=60000, help="of MNIST's, a multiple of the batch; fewer for a first look")
    parser.add_argument("--verbose", action="store_true", help="show what the trainers say")
    parser.add_argument("--side", choices=("periplus", "pythae"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "periplus":
        return train_periplus(arguments.epochs, arguments.threads, arguments.precision, arguments.images)
    if arguments.side == "pythae":
        return train_pythae(arguments.epochs, arguments.threads)
    if arguments.pythae_python is None:
        parser.error("--pythae-python is needed (see above how to make that environment)")

    from periplus.machine import commit, environment

    started, epochs = os.getloadavg()[0], paired(arguments)
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(epochs["periplus"][1:], epochs["pythae"][1:], strict=True)]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "what": "seconds per epoch of MNIST, VAE 784-512-16-512-784, batch 100, Adam 1e-3, epochs in turn; ratio = pythae / periplus, pair by pair",
        "threads": arguments.threads,
        "precision": arguments.precision,
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "load_at_start": started,
        **{side: summary(values, arguments.images) for side, values in epochs.items()},
        "commit": commit(),
        "environment": environment("cpu"),
    }
    if arguments.images == 60000:
        (RESULTS / "vae_epoch.json").write_text(json.dumps(result, indent=1) + "\n")
    for side in epochs:
        print(f"{side:>8}: {result[side]['seconds_per_epoch']}, loss {result[side]['loss']:.2f} nats")
    print(f"   ratio: {result['ratio']}")


if __name__ == "__main__":
    main()
