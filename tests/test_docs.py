"""The code of README and docs runs as printed; links lead somewhere; quoted
figures stand in the tables; the API pages are complete."""

import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import ivon_jax
from ivon_jax import metrics, recipes

pytest.importorskip("flax", reason='the code blocks need: pip install -e ".[test]"')
pytest.importorskip("sklearn", reason='the code blocks need: pip install -e ".[test]"')

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
QUICKSTART = DOCS / "quickstart.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts),
]
API_PAGES = sorted((DOCS / "api").glob("*.md"))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(page: Path, scope: dict[str, Any]) -> dict[str, Any]:
    """Executes the blocks of a page, one after another, in one namespace."""
    # As outside of these tests; optax's schedules divide an integer count.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, block in enumerate(code_blocks(page), 1):
            exec(compile(block, f"{name_of(page)}, block {number}", "exec"), scope)
    return scope


@cache
def quickstart() -> dict[str, Any]:
    return run(QUICKSTART, {})


def readme_scope() -> dict[str, Any]:
    """The user's own model and data, which README takes for granted."""

    def apply(params, inputs):
        return jnp.tanh(inputs @ params["w"]) @ params["v"]

    def loss_fn(params, batch):
        inputs, labels = batch
        logits = apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    inputs = jnp.sin(jnp.arange(40.0)).reshape(10, 4)
    labels = jnp.arange(10) % 3
    return {
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "apply": apply,
        "loss_fn": loss_fn,
        "inputs": inputs,
        "labels": labels,
        "batch": (inputs, labels),
        "train": range(10),
        "params": {"w": jnp.ones((4, 5)) / 4, "v": jnp.ones((5, 3)) / 5},
        "schedule": optax.cosine_decay_schedule(0.1, 100),
        "key": jax.random.key(0),
    }


def test_the_readme_runs():
    assert len(code_blocks(README)) >= 2
    scope = run(README, readme_scope())
    assert jnp.isfinite(scope["loss"])
    assert jnp.allclose(jnp.exp(scope["log_probs"]).sum(axis=-1), 1.0, atol=1e-5)


def test_the_quick_start_learns():
    scope = quickstart()
    assert jnp.isfinite(scope["loss"])
    assert metrics.accuracy(scope["log_p"], scope["test_y"]) > 0.9


@pytest.mark.parametrize(
    "page", [p for p in PAGES if code_blocks(p) and p not in (README, QUICKSTART)], ids=name_of
)
def test_a_page_runs_after_the_quick_start(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, dict(quickstart()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_its_language(page):
    fences = re.findall(r"^(?:```|:::)(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert all(fences[::2]) and not any(fences[1::2])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    included = re.findall(r"^```\{(?:include|image|figure)\} (\S+)", text, re.MULTILINE)
    for name in [*links, *included]:
        assert (page.parent / name).exists(), name
    paths = r"(?:python |`)((?:ivon_jax|examples|benchmarks|docs|tests)/[\w/.]*)"
    for name in re.findall(paths, text):
        assert "NAME" in name or (ROOT / name).exists(), name


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sections_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for name, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#([^)\s]+)\)", text):
        assert anchor in anchors(page.parent / name if name else page), anchor


def figures(text: str) -> list[tuple[str, str]]:
    """Means with their standard errors."""
    return re.findall(r"([\d.]+\d) ± ([\d.]*\d)", text)


def rounded(measured: tuple[str, str], quoted: tuple[str, str]) -> tuple[str, ...]:
    pairs = zip(measured, quoted, strict=True)
    return tuple(f"{float(x):.{len(like.partition('.')[2])}f}" for x, like in pairs)


@pytest.mark.parametrize("page", [README, DOCS / "results.md"], ids=name_of)
def test_quoted_figures_stand_in_the_tables_that_are_linked_beside_them(page):
    checked = 0
    for item in re.split(r"\n\n|\n(?=[*|] )", page.read_text(encoding="utf-8")):
        tables = re.findall(r"\]\(([^)#\s]*results/\w+\.md)", item)
        known = [pair for name in tables for pair in figures((page.parent / name).read_text())]
        for quoted in figures(item) if tables else ():
            assert quoted in [rounded(pair, quoted) for pair in known], (quoted, tables)
            checked += 1
    assert checked > 3


def public_symbols(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or [
        name
        for name, x in vars(module).items()
        if not name.startswith("_")
        and (getattr(x, "__module__", None) == module.__name__ or isinstance(x, recipes.Recipe))
    ]
    return sorted(n for n in names if not isinstance(getattr(module, n), ModuleType))


SYMBOLS = [(m, n) for m in (ivon_jax, metrics, recipes) for n in public_symbols(m)]


@pytest.mark.parametrize(("module", "name"), SYMBOLS, ids=[f"{m.__name__}.{n}" for m, n in SYMBOLS])
def test_a_public_symbol_is_documented(module, name):
    text = "".join(page.read_text(encoding="utf-8") for page in API_PAGES)
    path = f"{module.__name__}.{name}"
    symbol = getattr(module, name)
    if isinstance(symbol, recipes.Recipe):
        assert f"`{name}`" in text
        return
    assert re.search(rf"^\.\. auto(function|class):: {re.escape(path)}$", text, re.MULTILINE), path
    doc = inspect.getdoc(symbol)
    assert doc and not doc.startswith(f"{name}(")  # as a dataclass or NamedTuple writes one


def test_the_table_of_recipes_shows_their_values():
    text = (DOCS / "hyperparameters.md").read_text(encoding="utf-8")
    for name in public_symbols(recipes):
        recipe = getattr(recipes, name)
        if isinstance(recipe, recipes.Recipe):
            s = recipe.settings
            keys = ("learning_rate", "ess", "hess_init", "weight_decay", "b2")
            numbers = [float(s[key]) for key in keys] + [float(s.get("clip_radius", "inf"))]
            row = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)
            assert row, name
            cells = [cell.strip() for cell in row[1].split("|")]
            assert [float(x.replace("∞", "inf")) for x in cells[-6:]] == numbers, name
