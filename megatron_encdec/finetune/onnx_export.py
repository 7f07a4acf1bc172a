"""A fine-tuned model as ONNX, by torch's exporter, beside the directory's other files: `onnx/model.onnx`.

    1. `export_onnx(model, directory, batch)`     inputs input_ids and attention_mask [B, S], both sizes free; output
                                                  logits, or last_hidden_state of a retriever, whose pooling stays
                                                  sentence-transformers'
    2. the file is run by onnxruntime on another batch size and length: within 1e-4 of the model, or it is not kept

Needs the packages onnx, onnxscript and onnxruntime (extra `onnx`).
"""

import shutil
from pathlib import Path

import numpy as np
import torch

from megatron_encdec.platform.errors import RunFailed
from megatron_encdec.platform.optional import require

TOLERANCE = 1e-4


class _Outputs(torch.nn.Module):
    """The one output of a model, of two inputs."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


@torch.no_grad()
def export_onnx(model: torch.nn.Module, directory: Path, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> float:
    """Write `directory`/onnx/model.onnx; the largest difference that was seen. ids_BS, mask_BS: a batch of two texts or
    more with padding. Raises `RunFailed` where onnxruntime gives other numbers."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "training.onnx")
    import onnxruntime

    wrapped, path = _Outputs(model).eval(), directory / "onnx" / "model.onnx"
    path.parent.mkdir()
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=2)}
    name = "logits" if hasattr(model(input_ids=ids_BS, attention_mask=mask_BS), "logits") else "last_hidden_state"
    torch.onnx.export(wrapped, (ids_BS, mask_BS), str(path), dynamo=True, verbose=False, external_data=True,
                      input_names=["input_ids", "attention_mask"], output_names=[name],
                      dynamic_shapes={"input_ids": sizes, "attention_mask": sizes})
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for ids, mask in ((ids_BS, mask_BS), (ids_BS[:1, :-1], mask_BS[:1, :-1])):
        found = session.run(None, {"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy()})[0]
        expected = wrapped(ids, mask).float().cpu().numpy()
        seen = mask.cpu().numpy().astype(bool) if expected.ndim == 3 else slice(None)
        largest = max(largest, float(np.abs(found - expected)[seen].max()))
    if not largest <= TOLERANCE:
        shutil.rmtree(path.parent)
        raise RunFailed(f"training.onnx: onnxruntime's outputs differ by {largest:.2g} from the model's (at most "
                        f"{TOLERANCE:g}); the file is not kept")
    return largest
