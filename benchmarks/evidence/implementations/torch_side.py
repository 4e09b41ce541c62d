"""The comparison's PyTorch side: its AdamW and the authors' IVON, as their documentation says."""

import importlib.metadata
import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import ivon  # pyright: ignore[reportMissingImports] the package ivon-opt
import torch  # pyright: ignore[reportMissingImports]

Carry = tuple[Any, Any, Iterator[float]]  # network, optimizer, rates of the steps


class Trainer:
    """A setting of main.py on the CPU, for its task."""

    as_array = staticmethod(torch.from_numpy)

    def __init__(self, setting: Any, task: Any):
        self.setting, self.task = setting, task
        self.variational = setting.optimizer == "ivon"
        schedule = setting.schedule(task)
        self.rates = [float(schedule(step)) for step in range(task.num_steps)]

    def start(self, seed: int) -> Carry:
        """Before the first step."""
        torch.manual_seed(seed)
        layers = []
        for weight, bias in self.task.weights(seed):
            linear = torch.nn.Linear(*weight.shape)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(weight.T.copy()))
                linear.bias.copy_(torch.from_numpy(bias))
            layers += [linear, torch.nn.ReLU()]
        network = torch.nn.Sequential(*layers[:-1])
        values = dict(self.setting.values)
        values["lr"] = values.pop("learning_rate")
        if self.variational:
            values["beta2"] = values.pop("b2")
            optimizer = ivon.IVON(network.parameters(), ess=self.task.num_train, **values)
        else:
            optimizer = torch.optim.AdamW(network.parameters(), **values)
        return network, optimizer, itertools.cycle(self.rates)

    def step(self, carry: Carry, images: Any, labels: Any) -> Carry:
        """One training step."""
        network, optimizer, rates = carry
        optimizer.param_groups[0]["lr"] = next(rates)
        with optimizer.sampled_params(train=True) if self.variational else nullcontext():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        return carry

    def predict(self, carry: Carry, images: Any) -> list[Any]:
        """Log-probabilities by the weights or mean and, for IVON, averaged over samples."""
        network, optimizer, _ = carry
        with torch.no_grad():
            point = torch.log_softmax(network(images), dim=1)
            if not self.variational:
                return [point]
            draws = []
            for _ in range(self.task.samples):
                with optimizer.sampled_params():
                    draws.append(torch.log_softmax(network(images), dim=1))
            return [point, torch.logsumexp(torch.stack(draws), dim=0) - math.log(self.task.samples)]


def versions() -> list[str]:
    """Versions of the packages, and the threads of PyTorch."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "ivon-opt")]
    return [*packages, f"PyTorch threads: {torch.get_num_threads()}"]
