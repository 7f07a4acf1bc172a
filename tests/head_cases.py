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


def bias_of(table_VH):
    """A bias for the table's rows, the same for everyone."""
    return torch.linspace(-2, 2, len(table_VH), dtype=torch.float64).to(table_VH.dtype)


def plain(hidden_NH, table_VH, labels_N, vocabulary, bias_V=None):
    """torch's own, all logits at once: (losses, gradients of the hidden states, of the table, of the bias if any)."""
    given = [x.clone().requires_grad_() for x in (hidden_NH, table_VH, bias_V) if x is not None]
    logits_NV = torch.nn.functional.linear(*given)[:, :vocabulary]
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    losses_N = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    losses_N.sum().backward()
    return losses_N.detach(), *(x.grad for x in given)


def ours(hidden_NH, table_VH, labels_N, vocabulary, bias_V=None, **options):
    given = [x if x is None else x.clone().requires_grad_() for x in (hidden_NH, table_VH, bias_V)]
    total, losses_N = linear_cross_entropy(*given[:2], labels_N, vocabulary, dist.group.WORLD, bias_V=given[2],
                                           **options)
    (3 * total).backward()
    assert not losses_N.requires_grad
    torch.testing.assert_close(total.detach(), losses_N.sum())
    return losses_N, *(x.grad / 3 for x in given if x is not None)
