"""The batches of a run, without end, from any step on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from train.data import TrainingRows
from train.stream import RowStream

Row = dict[str, torch.Tensor]


def loaded_batches(loader: DataLoader[Row], accelerator: Accelerator, done: int) -> Iterator[Row]:
    """Batches (see `TrainingRows`) of a prepared loader, epoch after epoch.

    Args:
        done: batches of this process that were trained on before.
    """
    epoch, skip = divmod(done, len(loader))
    while True:
        loader.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from accelerator.skip_first_batches(loader, skip)
        epoch, skip = epoch + 1, 0


def streamed_batches(stream: RowStream, accelerator: Accelerator, size: int) -> Iterator[Row]:
    """This process's `size` rows of each pass, from where the stream stands.

    The processes take turns: together they have the rows that one process would have in a row.
    """
    first = accelerator.process_index * size
    while True:
        rows = TrainingRows(stream.take(size * accelerator.num_processes))
        batch = rows[first : first + size]
        yield {name: tensor_BT.to(accelerator.device) for name, tensor_BT in batch.items()}
