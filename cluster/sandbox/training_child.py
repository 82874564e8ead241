"""Makes the batches of a training run in a process of its own: ``python -m cluster.sandbox.training_child``.

It reads one message from stdin, the folders and the options, and writes batches to stdout until all are written. The
pipe's size bounds how far it runs ahead. It ends when its parent closes stdin.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

from cluster.core.errors import MacpipeError
from cluster.core.training import TrainingOptions
from cluster.sandbox.child_streams import end_with_parent, separate_stdout
from cluster.sandbox.training_messages import DataFailed, DataReady, pack, unpack_request


def main() -> int:
    replies = separate_stdout()
    folder, tokenizer_folder, options = unpack_request(sys.stdin.buffer.readline())
    end_with_parent()
    try:
        _write_batches(Path(folder), Path(tokenizer_folder), TrainingOptions.from_json(options), replies)
    except MacpipeError as error:
        replies.write(pack(DataFailed(error.reason, error.sentence)))
        replies.flush()
    except BrokenPipeError:
        return 1
    return 0


def _write_batches(folder: Path, tokenizer_folder: Path, options: TrainingOptions, replies: BinaryIO) -> None:
    from cluster.model.tokenizer import load_tokenizer
    from cluster.model.training_batches import read_training_data

    data = read_training_data(folder, load_tokenizer(tokenizer_folder), options)
    replies.write(pack(DataReady(data.cut, data.longest)))
    for batch in data.batches(options):
        replies.write(pack(batch))
        replies.flush()


if __name__ == "__main__":
    sys.exit(main())
