"""Train a byte-level GPT on the source of the running Python's own standard library.

    python examples/train_gpt.py --optimizer dykaf
    python examples/train_gpt.py --optimizer adamw
    python examples/train_gpt.py --optimizer adamw --resume      # after Ctrl-C
    torchrun --nproc-per-node 2 examples/train_gpt.py --parallel fsdp

Exit codes: 0 finished, 2 bad arguments or a bad checkpoint, 3 the loss is no longer finite,
128 + signal number (130 for Ctrl-C) stopped and saved. torchrun's is 1 if a rank's is not 0.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import settings as settings_module
from settings import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. Of many ranks the first talks, errors are all's."""
    if os.environ.get("RANK", "0") == "0":
        return run(argv)
    with contextlib.redirect_stdout(io.StringIO()):
        return run(argv)


def run(argv: Sequence[str] | None) -> int:
    """The command of one process."""
    try:
        settings, resume = settings_module.parse(argv)
        # Imported late, so that --help and bad arguments answer at once.
        from plot import PICTURE
        from training import Diverged, Interrupted, train
    except UserError as error:
        return fail(error, 2)
    except ImportError as error:
        return fail(f"{error}; see examples/README.md for what to install", 2)
    except KeyboardInterrupt:
        return fail("stopped before the first step, nothing was saved", 130)
    try:
        result = train(settings, resume=resume)
    except (UserError, OSError) as error:
        return fail(error, 2)
    except Diverged as error:
        return fail(error, 3)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signal_number
    except KeyboardInterrupt:
        return fail("stopped at once; the last checkpoint, if any, is whole", 130)
    print(
        f"{settings.run_name}: validation {result['val_loss']:.4f} nats/byte after "
        f"{result['step']} steps, {result['train_seconds']:.1f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s, "
        f"optimizer {result['optimizer_share']:.1%}"
    )
    print(f"results in {settings.out}, picture {settings.out / PICTURE}")
    return 0


def fail(reason: object, code: int) -> int:
    """Print one line and return the exit code."""
    print(f"train_gpt.py: error: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
