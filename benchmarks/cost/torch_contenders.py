"""PyTorch's AdamW and the authors' IVON, with gradients given."""

from collections.abc import Callable

import ivon  # pyright: ignore[reportMissingImports] the package ivon-opt
import torch  # pyright: ignore[reportMissingImports]


def steps(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[int], None]]:
    """Functions that take so many steps, on the device that PyTorch has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def parameters() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
        for p in made:
            p.grad = torch.full_like(p, 1e-3)
        return made

    def done() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    adamw = torch.optim.AdamW(parameters(), lr=1e-3)
    variational = ivon.IVON(parameters(), lr=1e-3, ess=1e6, hess_init=1.0)

    def adamw_steps(calls: int) -> None:
        for _ in range(calls):
            adamw.step()
        done()

    def ivon_steps(calls: int) -> None:
        for _ in range(calls):
            with variational.sampled_params(train=True):
                pass  # the gradients are there
            variational.step()
        done()

    return {"PyTorch AdamW": adamw_steps, "PyTorch ivon-opt": ivon_steps}
