"""One rank of eight at the published shape, alone on one GPU."""

import pytest
import torch

import stepmoe as sm
from stepmoe.model.merged import published_views

pytestmark = pytest.mark.cuda
FLASH = sm.Step3p5Config.flash()


def share(layer, variant="deferred", rank=0):
    return sm.Step3p5ForCausalLM.from_config(
        FLASH.with_layers(layer).replace(vocab_size=512),
        variant,
        sm.ParallelConfig(8, 4, simulate_rank=rank),
        dtype=torch.bfloat16,
        device="cuda",
    )


@pytest.mark.parametrize("layer", [4, 5])
def test_weights_are_drawn_on_the_device_and_repeat(layer):
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, again = share(layer, rank=3), share(layer, rank=3)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    # Two models, and one float32 slice while it is converted; never a whole expert tensor of 6 GB.
    assert torch.cuda.max_memory_allocated() - before < 2 * held + 2**30
    others = published_views(again)
    for name, tensor in published_views(model).items():
        assert torch.equal(tensor, others[name])
        assert (tensor == 0).float().mean() < 1e-3, name


@pytest.mark.parametrize("variant", sm.VARIANTS)
def test_a_share_of_the_published_layer_prefills_and_decodes(variant):
    model = share(4, variant)
    ids = torch.randint(512, (2, 300), device="cuda")
    with sm.Ledger() as ledger:
        logits = model(ids)
    assert logits.isfinite().all()
    sent = {entry.shape for entry in ledger.entries}
    assert sent == {(600, 4096)}
    assert all(entry.seconds >= 0 for entry in ledger.entries)
    assert model.generate(ids, 6).shape == (2, 306)
    assert model.decode_graph is not None
