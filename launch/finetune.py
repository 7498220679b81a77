"""Fine-tuning; see pretrain/cli.py."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # `launch/` would hide the packages behind its scripts

from pretrain.cli import finetune  # noqa: E402

if __name__ == "__main__":
    sys.exit(finetune())
