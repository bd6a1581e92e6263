"""Write `models/labels/*.tsv` again from the class lists that an installed timm carries.

python -m examples.make_labels models/labels
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

LISTS = {"imagenet_1k": "imagenet_synsets.txt", "imagenet_21k": "imagenet22k_synsets.txt"}
"""Our list -> timm's file of WordNet ids in class order; its 22k is the fall11 release."""


def timm_lists() -> Path:
    """Return the folder of timm's class lists; timm itself, which wants torch, is not imported."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        raise SystemExit("the class lists are timm's: pip install --no-deps timm")
    return Path(spec.origin).parent / "data/_info"


def main() -> None:
    """Write both lists: index, WordNet id and text, separated by tabs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    source = timm_lists()
    lemmas = (source / "imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    text_of = dict(line.split("\t", 1) for line in lemmas)
    for name, file in LISTS.items():
        ids = (source / file).read_text("utf-8").split()
        lines = [f"{index}\t{one}\t{text_of[one]}\n" for index, one in enumerate(ids)]
        (out / f"{name}.tsv").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
