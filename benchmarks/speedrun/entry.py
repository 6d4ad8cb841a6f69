"""The entry that holds the record: relativistic pairing with R1 + R2, fully connected, on all training images.

An entry is one file with one function, `train`. The referee (`run.py`) starts it in a new process, takes what it yields, and judges that with the
clock stopped. Nothing else is asked of it: networks, objective, optimiser and schedule are its own.
"""

from __future__ import annotations

from collections.abc import Iterator

#: Steps between candidates: each is a chance to be done, and costs the recalibration of batch norm.
CHECK_EVERY = 250


def train(source: str, seed: int) -> Iterator[tuple[int, int, object]]:
    """Train on the training split of `source` from this seed, and yield (step, d, decode) now and then, for ever.

    decode: codes (B, d), standard normal, to images (B, C, H, W) in [0, 1]; it is called before the training goes on.
    """
    import torch

    from periplus import AdversarialConfig, load_data
    from periplus.machine import resolve_device, resolve_precision
    from periplus.networks import AdversarialNetworks
    from periplus.runs import build_networks
    from periplus.seeds import stream
    from periplus.training.adversarial import calibrate, new_state, train_step
    from periplus.training.steps import Batches

    data = load_data(source)
    device = resolve_device("auto")
    config = AdversarialConfig("rpgan", batch_size=128, latent_dim=32, held_out=0, seed=seed, device=device)
    config = AdversarialConfig(**{**vars(config.resolve(len(data))), "precision": resolve_precision("auto", device)})
    torch.manual_seed(stream(seed, "networks"))
    networks = build_networks(config, data.shape)
    assert isinstance(networks, AdversarialNetworks)
    batches = Batches(data.images.to(device), config.batch_size, seed)
    state = new_state(config, networks, device)
    healthy = torch.ones((), dtype=torch.bool, device=device)
    while True:
        healthy = train_step(state, config, batches, healthy)
        if state.step % CHECK_EVERY == 0:
            calibrate(state, config)
            state.ema.eval()
            yield state.step, config.latent_dim, state.ema
