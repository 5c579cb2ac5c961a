"""Draw the README's picture: one MoE layer in the four variants, from ledgers of real ranks.

Run it as `.venv/bin/python notebooks/readme_picture.py` after a change to a variant.
"""

from io import BytesIO
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

import stepmoe as sm
from stepmoe import charts
from stepmoe.charts.dataflow import placements
from stepmoe.lesson import forward_pass

TARGET = Path(__file__).parent / "images" / "four_variants.png"
COLUMNS = 2  # at a README's width of some 900 pixels the text stays legible


def image(figure: Figure) -> Image.Image:
    """A figure as pixels."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=110)
    return Image.open(buffer).convert("RGB")


def main() -> None:
    """Record one pass of each variant on 4 ranks and save the data flow of layer 2."""
    input_ids = torch.arange(192).view(4, 48)
    parallel = sm.ParallelConfig(tp=4, ep=2)
    panels = []
    with sm.Ranks(4, device="cpu") as ranks:
        for variant in sm.VARIANTS:
            ledger = ranks.run(forward_pass, variant, parallel, input_ids)[0].ledger
            panels.append(image(charts.dataflow(ledger, layer=2, title=variant, legend=False)))
    width = max(panel.width for panel in panels)
    rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    heights = [max(panel.height for panel in row) for row in rows]
    sheet = Image.new("RGB", (width * COLUMNS, sum(heights)), "white")
    for index, row in enumerate(rows):
        for column, panel in enumerate(row):
            sheet.paste(panel, (column * width, sum(heights[:index])))
    foot = image(
        placements("recorded: the tiny model, MoE layer 2, 192 tokens, 4 CPU ranks (gloo)")
    )
    sheet.paste(foot, (0, sheet.height - foot.height))  # `fused`, above it, is the shortest
    TARGET.parent.mkdir(exist_ok=True)
    sheet.quantize(64).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
