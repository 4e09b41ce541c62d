"""The comparison's PyTorch side: its AdamW and the authors' IVON, as their documentation says."""

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import ivon  # pyright: ignore[reportMissingImports] the package ivon-opt
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.evidence.implementations.task import Setting, Task, Trained


def make_network(weights: list) -> Any:
    """The perceptron with given weights."""
    layers = []
    for weight, bias in weights:
        linear = torch.nn.Linear(*weight.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight.T.copy()))
            linear.bias.copy_(torch.from_numpy(bias))
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def make_optimizer(setting: Setting, task: Task, network: Any) -> Any:
    """The optimizer, with the constant part of the rate."""
    values = dict(setting.values)
    values["lr"] = values.pop("learning_rate")
    if setting.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), **values)
    values["beta2"] = values.pop("b2")
    return ivon.IVON(network.parameters(), ess=task.num_train, **values)


class Trainer:
    """A setting on the CPU."""

    def __init__(self, setting: Setting, task: Task):
        self.setting, self.task = setting, task
        schedule = setting.schedule(task)
        self._rates = [float(schedule(step)) for step in range(task.num_steps)]

    def train(self, seed: int) -> Trained:
        """Trains from the weights and with the batches of a seed."""
        torch.manual_seed(seed)
        task = self.task
        network = make_network(task.weights(seed))
        optimizer = make_optimizer(self.setting, task, network)
        step = self._step_of(network, optimizer)
        batches = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in task.batches(seed)]
        start = time.perf_counter()
        for rate, (images, labels) in zip(self._rates, batches, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            step(images, labels)
        seconds = time.perf_counter() - start
        samples = None
        with torch.no_grad():
            point = self._predict(network)
            if self.setting.optimizer == "ivon":
                samples = np.stack(list(self._draws(network, optimizer)))
        return Trained(point, samples, seconds)

    def timed(self) -> Callable[[int], None]:
        """A function that takes so many steps."""
        network = make_network(self.task.weights(0))
        step = self._step_of(network, make_optimizer(self.setting, self.task, network))
        images = torch.from_numpy(self.task.images[:50])
        labels = torch.from_numpy(self.task.labels[:50])

        def run(calls: int) -> None:
            for _ in range(calls):
                step(images, labels)

        return run

    def _step_of(self, network: Any, optimizer: Any) -> Callable[[Any, Any], None]:
        variational = self.setting.optimizer == "ivon"

        def step(images: Any, labels: Any) -> None:
            sampled = optimizer.sampled_params(train=True) if variational else nullcontext()
            with sampled:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()

        return step

    def _draws(self, network: Any, optimizer: Any) -> Iterator[np.ndarray]:
        for _ in range(self.task.samples):
            with optimizer.sampled_params():
                yield self._predict(network)

    def _predict(self, network: Any) -> np.ndarray:
        images = torch.from_numpy(self.task.test_images)
        return torch.log_softmax(network(images), dim=1).numpy()


def versions() -> list[str]:
    """Versions of the packages, and the threads of PyTorch."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ivon-opt")]
    return [*packages, f"PyTorch threads: {torch.get_num_threads()}"]
