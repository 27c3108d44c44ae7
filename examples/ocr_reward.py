"""Score images of words with a real OCR model, or train the tiny demo model on it. A CPU is enough.

pip install 'trl-unigrpo[ocr]'
python examples/ocr_reward.py                          # three words drawn for you
python examples/ocr_reward.py images --target OPEN     # a folder; without --target, each file's own name
python examples/ocr_reward.py --train --max_steps 4    # rewards the demo model for rings that read as an O
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from trl_unigrpo.rewards import OCRReward


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def drawn_words() -> dict[str, tuple[Image.Image, str]]:
    """Draw words: name -> image of a word and the word that it should be."""
    named = {}
    for word, target in (("HELLO", "HELLO"), ("HELO", "HELLO"), ("CAT", "DOG")):
        image = Image.new("RGB", (256, 128), "white")
        font = ImageFont.load_default(size=56)
        ImageDraw.Draw(image).text((128, 64), word, fill="black", font=font, anchor="mm")
        named[f"drawn {word}"] = (image, target)
    return named


def images_in(folder: Path, target: str | None) -> dict[str, tuple[Image.Image, str]]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"No images in {str(folder)!r}: expected files that end in {', '.join(sorted(SUFFIXES))}.")
    return {path.name: (Image.open(path), target or path.stem) for path in paths}


def score(named: dict[str, tuple[Image.Image, str]]) -> Table:
    reward = OCRReward()
    images, targets = zip(*named.values(), strict=True)
    scores = reward(prompts=[""] * len(images), images=images, target=targets)
    table = Table("image", "should read", "reads", "score")
    for name, image, target, value in zip(named, images, targets, scores, strict=True):
        failed = value is None
        table.add_row(name, target, "" if failed else reward.read(image), "failed" if failed else f"{value:.2f}")
    return table


def train(steps: int, output_dir: str) -> None:
    from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
    from trl_unigrpo.shapeworld import BASE, demo_settings, shapeworld_dataset

    dataset = shapeworld_dataset("train").filter(lambda row: "ring" in row["prompt"].split())
    settings = demo_settings() | {"max_steps": steps, "num_generations": 8, "per_device_train_batch_size": 16}
    trainer = UniGRPOTrainer(
        model=str(BASE),
        reward_funcs=OCRReward(target_column="letter"),
        args=UniGRPOConfig(output_dir=output_dir, **settings),
        train_dataset=dataset.add_column("letter", ["O"] * len(dataset)),
    )
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder with images; without it, three are drawn")
    parser.add_argument("--target", help="text that every image should show; without it, its file's name")
    parser.add_argument("--train", action="store_true", help="train the demo model instead of scoring")
    parser.add_argument("--max_steps", type=int, default=4, help="optimizer steps of --train (default: %(default)s)")
    parser.add_argument("--output_dir", default="ocr-unigrpo", help="folder of --train (default: %(default)s)")
    options = parser.parse_args()
    if options.train:
        train(options.max_steps, options.output_dir)
    else:
        named = images_in(options.folder, options.target) if options.folder else drawn_words()
        Console().print(score(named))
