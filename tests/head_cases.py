"""The head's loss on small inputs: torch's plain one over whole logits, and ours."""

import torch
import torch.distributed as dist

from megatron_encdec.model.head import linear_cross_entropy

ROWS, WIDTH = 40, 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def inputs(vocabulary, padded, dtype, rows=ROWS, width=WIDTH):
    """(hidden [N, H], table [V, H], labels [N]), the same for everyone."""
    draw = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype)
    table_VH = torch.randn(padded, width, generator=draw, dtype=torch.float64).to(dtype)
    return hidden_NH, table_VH, torch.randint(0, vocabulary, (rows,), generator=draw)


def plain(hidden_NH, table_VH, labels_N, vocabulary):
    """torch's own, all logits at once: (losses, gradient of the hidden states, gradient of the table)."""
    hidden_NH, table_VH = (x.clone().requires_grad_() for x in (hidden_NH, table_VH))
    logits_NV = (hidden_NH @ table_VH.T)[:, :vocabulary]
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    losses_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    losses_N.sum().backward()
    return losses_N.detach(), hidden_NH.grad, table_VH.grad


def ours(hidden_NH, table_VH, labels_N, vocabulary, **options):
    hidden_NH, table_VH = (x.clone().requires_grad_() for x in (hidden_NH, table_VH))
    total, losses_N = linear_cross_entropy(hidden_NH, table_VH, labels_N, vocabulary, dist.group.WORLD, **options)
    (3 * total).backward()
    assert not losses_N.requires_grad
    torch.testing.assert_close(total.detach(), losses_N.sum())
    return losses_N, hidden_NH.grad / 3, table_VH.grad / 3
