"""What the README shows must run, and what it names must exist."""

import re
from pathlib import Path

import pytest
import torch

import stepmoe as sm

REPO = Path(__file__).parents[2]
README = (REPO / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PENDING = """        if hidden_states.is_partial:  # what the layer before left pending
            hidden_states = self.comm.all_reduce(hidden_states, "input_layernorm")
"""


def run(*blocks):
    """Execute README code as a module would: the first block then starts no ranks."""
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(block, namespace)
    return namespace


def test_the_fifth_variant_is_right():
    logits = run(*BLOCKS)["logits"]
    deferred = sm.Step3p5ForCausalLM.from_config(sm.Step3p5Config.tiny(), variant="deferred")
    assert torch.equal(logits, deferred(torch.arange(24).view(2, 12)))


def test_without_its_first_lines_it_is_refused_as_the_text_says():
    first, late = BLOCKS
    assert PENDING in late
    with pytest.raises(sm.PlacementError, match=r"layer 0, mlp_output: the norm .* over tp"):
        run(first, late.replace(PENDING, ""))


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (REPO / link).exists(), link


def test_every_module_is_in_the_map():
    table = README.split("## The modules")[1].split("## The tests")[0]
    named = set(re.findall(r"`([a-z0-9_/]+)`", table))
    for path in sorted((REPO / "stepmoe").glob("*")):
        if path.suffix == ".py" and not path.name.startswith("_"):
            assert path.stem in named, path.name
        elif path.is_dir() and any(path.glob("*.py")):
            name = path.name
            assert any(entry == f"{name}/" or entry.startswith(f"{name}/") for entry in named), name
