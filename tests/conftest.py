"""What every test shares: models of the test process live on the CPU; cuda tests need a GPU."""

import os
import shutil

import pytest

# A test compares on the CPU, also on a machine with GPUs; ranks are given their device by Ranks.
os.environ["STEPMOE_DEVICE"] = "cpu"

# Without a GPU, kernels are tested in Triton's interpreter; triton reads this when it is imported.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", metavar="FILE", help="keep outcomes, devices and versions of the cuda tests"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("cuda")]
    if not needs_gpu:
        return
    import torch  # takes seconds, so only when a test asks for it

    if not torch.cuda.is_available():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
